"""Tables, sessions and feature definitions that the aggregates share.

One place says how bars and ticks look once a vendor's layout has been translated,
when an exchange trades, and how a feature is described. `minute.py` and `ticks.py`
compute from these tables, `adapters.py` translates vendor files into them, the
embedded market writes them.

On disk
-------
Normalised sources need no mapping file::

    <source>/2020-01.parquet, …                    minute bars, one file a month
    <source>/trades/2020-01-02.parquet, …          ticks, one file a day and table
    <source>/orders/…  <source>/quotes/…           (orders and quotes may be absent)

Rows are grouped by instrument and sorted by time within it; rows of one moment keep
the exchange's sequence. Times are exchange-local, without a time zone.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

__all__ = [
    "A_SHARE",
    "BARS",
    "BUY",
    "CANCEL",
    "CFFEX_BONDS",
    "FLOW_CLASSES",
    "FLOW_FIELDS",
    "FUTURES_BARS",
    "NEW",
    "ORDERS",
    "SCHEMA_VERSION",
    "SELL",
    "SESSIONS",
    "SILENT",
    "TRADES",
    "US_REGULAR",
    "Column",
    "FeatureDef",
    "Session",
    "TableSchema",
    "get_session",
    "quotes_schema",
]

#: Volume up to which there was no trade: some feeds write 5.9e-39 for 0.
SILENT = 1e-6

#: Version of the feature definitions, raised whenever one changes: partitions of an old
#: version are computed anew, and handlers refuse yearly files of another one.
SCHEMA_VERSION = {"ms": 1, "l2": 1, "flow": 1, "bars": 1}
#: Values of the `side` columns (int8). A trade's side is its aggressor's; auction
#: trades have none.
BUY, SELL, UNKNOWN_SIDE = 1, -1, 0
#: Values of the `action` column of orders (int8).
NEW, CANCEL = 1, -1
#: Size classes of parent orders and the amount, CNY, below which each ends.
FLOW_CLASSES = {"small": 4e4, "medium": 2e5, "large": 1e6, "xlarge": np.inf}
#: Daily flow by order size: what aggressors of each class bought, and sold.
FLOW_FIELDS = tuple(
    f"flow_{side}_{name}" for side in ("buy", "sell") for name in FLOW_CLASSES
)


@dataclass(frozen=True)
class Column:
    """One column of a normalised table.

    Attributes
    ----------
    name : str
        Column name.
    type : pyarrow.DataType
        Type on disk.
    unit : str
        Unit of the values.
    meaning : str
        What a value says, with its codes.
    required : bool
        Whether a source must have it.
    """

    name: str
    type: pa.DataType
    unit: str
    meaning: str
    required: bool = True


@dataclass(frozen=True)
class TableSchema:
    """A normalised table: its name and columns in order.

    Attributes
    ----------
    name : str
        "bars", "trades", "orders" or "quotes".
    columns : tuple of Column
        In the order of the file.
    """

    name: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        return [c.name for c in self.columns]

    @property
    def required(self) -> list[str]:
        """Names of the columns a source must have."""
        return [c.name for c in self.columns if c.required]

    def arrow(self) -> pa.Schema:
        """Return the schema on disk."""
        return pa.schema([(c.name, c.type) for c in self.columns])


_CODE = pa.dictionary(pa.int32(), pa.string())
_TIME = pa.timestamp("us")

BARS = TableSchema(
    "bars",
    (
        Column("instrument", _CODE, "", "Qlib code, SH600000"),
        Column("datetime", _TIME, "", "start or end of the bar, exchange-local"),
        Column("open", pa.float64(), "CNY/share", "first price, unadjusted"),
        Column("high", pa.float64(), "CNY/share", "highest price"),
        Column("low", pa.float64(), "CNY/share", "lowest price"),
        Column("close", pa.float64(), "CNY/share", "last price"),
        Column("volume", pa.float64(), "shares", "shares traded, 0 = no trade"),
        Column("amount", pa.float64(), "CNY", "money traded", required=False),
        Column(
            "factor",
            pa.float64(),
            "1",
            "adjusted price / price; constant within a day; 1 if absent",
            required=False,
        ),
    ),
)

#: Bars as they are read: what bars of futures tell besides.
FUTURES_BARS = TableSchema(
    "bars",
    (
        *BARS.columns,
        Column("open_interest", pa.float64(), "lots", "at the end of the bar", False),
        Column("contract", pa.string(), "", "delivery month, in any spelling", False),
    ),
)

TRADES = TableSchema(
    "trades",
    (
        Column("instrument", _CODE, "", "Qlib code, SH600000"),
        Column("time", _TIME, "", "moment of the trade, exchange-local"),
        Column("price", pa.float64(), "CNY/share", "unadjusted, > 0"),
        Column("volume", pa.int64(), "shares", "> 0"),
        Column("buy_id", pa.int64(), "", "buyer's order id, 0 = unknown", False),
        Column("sell_id", pa.int64(), "", "seller's order id, 0 = unknown", False),
        Column(
            "side",
            pa.int8(),
            "",
            "1 the buyer was the aggressor, -1 the seller, 0 auction or unknown",
            False,
        ),
    ),
)

ORDERS = TableSchema(
    "orders",
    (
        Column("instrument", _CODE, "", "Qlib code, SH600000"),
        Column("time", _TIME, "", "moment of the message, exchange-local"),
        Column("price", pa.float64(), "CNY/share", "limit; NaN or 0 = market order"),
        Column("volume", pa.int64(), "shares", "placed, or taken back, > 0"),
        Column("side", pa.int8(), "", "1 buy, -1 sell"),
        Column("order_id", pa.int64(), "", "the id that trades refer to"),
        Column("action", pa.int8(), "", "1 new, -1 cancel"),
    ),
)


def quotes_schema(levels: int = 10) -> TableSchema:
    """Describe snapshots of the book with that many levels a side (1 is the best).

    Prices are CNY/share and volumes shares; an empty level has price 0 or NaN and
    volume 0.
    """
    columns = [
        Column("instrument", _CODE, "", "Qlib code, SH600000"),
        Column("time", _TIME, "", "moment of the snapshot, exchange-local"),
    ]
    for side in ("bid", "ask"):
        columns += [
            Column(f"{side}_price_{k}", pa.float64(), "CNY/share", f"level {k}")
            for k in range(1, levels + 1)
        ]
        columns += [
            Column(f"{side}_volume_{k}", pa.float64(), "shares", f"level {k}")
            for k in range(1, levels + 1)
        ]
    return TableSchema("quotes", tuple(columns))


@dataclass(frozen=True)
class Session:
    """When an exchange trades, in its own local time.

    Attributes
    ----------
    name : str
        Key in `SESSIONS`.
    tz : str
        IANA time zone of the exchange, used to translate sources in another zone.
    intervals : tuple of (time, time)
        Trading intervals, half-open [start, end); the closing auction belongs to the
        last one.
    auction : tuple of (time, time) or None
        Opening auction. Bars and trades stamped in it belong to the day; bars join
        the first bar of the session.
    continuous_end : time
        Start of the closing auction (or the close): quotes count until then.
    slack : timedelta
        How late after the close a closing print may be stamped.
    early_close : dict
        ``{date: time}`` of days that end early. `minute.py` finds a day on which no
        instrument at all trades in the last half-hour without it.
    """

    name: str
    tz: str
    intervals: tuple[tuple[dt.time, dt.time], ...]
    auction: tuple[dt.time, dt.time] | None
    continuous_end: dt.time
    slack: dt.timedelta = dt.timedelta(seconds=60)
    early_close: dict[dt.date, dt.time] = field(default_factory=dict)

    @property
    def minutes(self) -> int:
        """Minutes of a full session."""
        return sum(_minute(e) - _minute(s) for s, e in self.intervals)

    def slots(self, bar_minutes: int) -> int:
        """Bars of a full session.

        Raises
        ------
        ValueError
            If `bar_minutes` is not 1, 5 or 15.
        """
        if bar_minutes not in (1, 5, 15):
            raise ValueError(f"`bar_minutes` must be 1, 5 or 15, got {bar_minutes!r}.")
        return self.minutes // bar_minutes

    def edges(self) -> tuple[int, int]:
        """Minutes of the day that only bars stamped at their start, or end, carry.

        A bar that begins 13:00 is stamped 13:00 or 13:01, one that ends 11:30 is
        stamped 11:29 or 11:30. The outer edges of a session with an auction do not
        tell: vendors put the auctions there.
        """
        if self.auction is not None and len(self.intervals) > 1:
            return _minute(self.intervals[1][0]), _minute(self.intervals[0][1])
        return _minute(self.intervals[0][0]), _minute(self.intervals[-1][1])

    def minute_of_session(self, end_stamped: bool) -> np.ndarray:
        """Look-up table from minute of the day to minute of the session.

        Parameters
        ----------
        end_stamped : bool
            Whether a stamp is the end of its minute (09:31 is the first) or the
            start (09:30 is the first).

        Returns
        -------
        int16[1441]
            Minute of the session, -1 outside. On an exchange with an opening auction
            in its session, stamps in that auction, on the open edge of an end-stamped
            source and on the close edge of a start-stamped one go to the nearest
            minute: vendors put the auctions there. In the US those stamps belong to
            pre-market and after-hours trading and stay outside.
        """
        table = np.full(1441, -1, dtype=np.int16)
        base = 0
        for start, end in self.intervals:
            first, last = _minute(start), _minute(end)
            for m in range(first, last):
                table[m + end_stamped] = base + m - first
            edge = first if end_stamped else last
            if self.auction is not None and table[edge] < 0:
                table[edge] = base if end_stamped else base + last - first - 1
            base += last - first
        if self.auction is not None:
            first, last = _minute(self.auction[0]), _minute(self.intervals[0][0])
            inside = table[first:last]
            inside[inside < 0] = 0
        return table


def _minute(time: dt.time) -> int:
    return time.hour * 60 + time.minute


A_SHARE = Session(
    name="a_share",
    tz="Asia/Shanghai",
    intervals=((dt.time(9, 30), dt.time(11, 30)), (dt.time(13), dt.time(15))),
    auction=(dt.time(9, 15), dt.time(9, 25)),
    continuous_end=dt.time(14, 57),
)
US_REGULAR = Session(
    name="us_regular",
    tz="America/New_York",
    intervals=((dt.time(9, 30), dt.time(16)),),
    auction=None,
    continuous_end=dt.time(16),
)
#: Treasury-bond futures since 2020-07-20; before it the morning began at 09:15.
CFFEX_BONDS = Session(
    name="cffex_bonds",
    tz="Asia/Shanghai",
    intervals=((dt.time(9, 30), dt.time(11, 30)), (dt.time(13), dt.time(15, 15))),
    auction=(dt.time(9, 25), dt.time(9, 30)),
    continuous_end=dt.time(15, 15),
)
SESSIONS = {s.name: s for s in (A_SHARE, US_REGULAR, CFFEX_BONDS)}


def get_session(session: str | Session) -> Session:
    """Look a session up by name; a `Session` passes through.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if isinstance(session, Session):
        return session
    if session not in SESSIONS:
        raise ValueError(
            f"`session` must be one of {sorted(SESSIONS)} or a Session, got "
            f"{session!r}."
        )
    return SESSIONS[session]


@dataclass(frozen=True)
class FeatureDef:
    """Definition of one aggregate feature.

    Attributes
    ----------
    name : str
        Column name.
    formula : str
        In the notation of the module that computes it.
    unit : str
        Unit of the value; "1" is a plain number.
    low, high : float
        Values it can take, both ends included; infinite where unbounded.
    nan : str
        When it is NaN.
    known : str
        Earliest exchange-local moment at which it can be known.
    needs : tuple of str
        Inputs without which a source cannot give it.
    """

    name: str
    formula: str
    unit: str
    low: float
    high: float
    nan: str
    known: str = "close"
    needs: Sequence[str] = ()
