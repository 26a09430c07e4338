"""Level-2 ticks of one day reduced to one row: the 20 `l2` features, and the flow.

Inputs are the normalised tables of `schema.py`: trades (needed), orders and quotes
(optional). `TICK_FEATURES` defines each feature with unit, range, NaN rule and the
moment at which it is known.

Notation, per stock and day: A amount of a trade (price × volume, CNY), s its side (+1
the buyer was the aggressor, −1 the seller, 0 auction). Parent order = all trades of one
order id on one side. Post-open = 09:30–10:00, tail = 14:30–15:00 with the closing
auction. Standard deviations are those of the population; a strength is mean/std over
the 30 minutes of the post-open, minutes without events count as 0.

What the report leaves open is decided here:

- Large: log parent amount > mean + std of the log amounts of all parents of the stock
  that day, buyers and sellers together. If all are equal none is large.
- Return of a trade: price / price of the previous trade of the day − 1, 0 for the
  first. The 30 % (20 %) of trades are ⌈0.3 n⌉ (⌈0.2 n⌉); of ties the earlier counts.
- Resting orders: what new orders add to the book, minus cancellations, minus fills of
  resting orders; each valued at the order's own price. Buy intention adds the net
  aggressive amount.
- A market order (price 0 or NaN) is valued at the last trade before it.
- Spread and depth are weighted by how long a snapshot held inside continuous trading
  (09:30–11:30, 13:00–14:57). The last snapshot of a file counts for nothing: nobody
  knows how long it held. A snapshot with one empty side has no spread; its depth
  counts.

Flow by order size, as vendors publish it: a trade counts on its aggressor's side, in
the class (`schema.FLOW_CLASSES`) of the aggressor's parent order; auction trades count
on neither side. A trade without its aggressor's order id is an order of its own.

The Shanghai rule
-----------------
Shanghai does not publish an order that is filled at once, and of a partly filled one
only the remainder. Counting published orders alone would understate what was placed:
`l2_cancel_ratio` comes out too high, and `l2_order_imb` misses exactly the impatient
side. So the part filled at once is rebuilt from the trades: every trade with an
aggressor adds its volume and amount to what that side placed. Parent orders come from
the trades' order numbers and need no order row. For exchanges that publish everything
(Shenzhen) the part filled at once is valued at its trade prices too, so both kinds of
source give the same numbers for the same market; see `publishes_all`. The resting book
never contains a part filled at once, so buy intention does not depend on the rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from data_handlers.aggregate.columns import (
    dictionary_codes,
    frozen,
    in_threads,
    microseconds,
)
from data_handlers.aggregate.minute import LACKING
from data_handlers.aggregate.schema import (
    FLOW_FIELDS,
    ORDERS,
    TRADES,
    Session,
    get_session,
)
from data_handlers.aggregate.tick_checks import (
    check_orders,
    check_quotes,
    check_trades,
    price_range,
)
from data_handlers.aggregate.tick_kernels import (
    DAY_US,
    FACTS,
    FLOW_FEATURES,
    MIN_US,
    REJECTS,
    TICK_FEATURES,
    TICK_NAMES,
    TICK_REJECT_REASONS,
    Clock,
    Orders,
    Out,
    Quotes,
    Source,
    Trades,
    reduce_stocks,
)
from data_handlers.aggregate.units import (
    LEAST_GAP,
    check_rising,
    of_few,
    other_level,
    silence,
)

__all__ = [
    "FLOW_FEATURES",
    "TICK_FEATURES",
    "TICK_NAMES",
    "TICK_REJECT_REASONS",
    "TickRows",
    "aggregate_ticks",
]


@dataclass
class TickRows:
    """One row a stock, and the account of the input ticks.

    Attributes
    ----------
    frame : DataFrame
        Sorted by instrument: datetime, instrument, open, high, low, close, volume,
        amount (of the trades used), trades, orders, quotes (rows used), the flow by
        order size, the features.
    rows_in : dict
        Table to its number of rows.
    rejected : dict
        Table to {reason: rows}.
    notes : dict
        Other facts and how often: unsorted rows, cancellations of unknown orders.
    lacking : bool ndarray
        Rows of stocks with a stretch of half an hour or more without trades that is
        not by chance: a halt, or lost rows. A build gives them features of NaN.
    """

    frame: pd.DataFrame
    rows_in: dict[str, int]
    rejected: dict[str, dict[str, int]]
    notes: dict[str, Any]
    lacking: np.ndarray

    def blank(self) -> None:
        """Take features and close from stocks that lack trades, in place; note it."""
        if self.lacking.any():
            rows = self.frame[self.lacking]
            names = ["close", *FLOW_FIELDS, *TICK_NAMES]
            self.frame.loc[self.lacking, names] = np.nan
            self.notes[LACKING.replace("bars", "trades")] = [
                f"{row.instrument} {row.datetime:%Y-%m-%d}" for row in rows.itertuples()
            ]


# -- kernels: one stock's rows, sorted by time


# -- from tables to kernels


def aggregate_ticks(
    trades: pa.Table | pd.DataFrame,
    orders: pa.Table | pd.DataFrame | None = None,
    quotes: pa.Table | pd.DataFrame | None = None,
    day: Any = None,
    session: str | Session = "a_share",
    publishes_all: bool | str | Sequence[str] = "auto",
    threads: int | None = None,
) -> TickRows:
    """Reduce one day of ticks to one row a stock.

    Parameters
    ----------
    trades, orders, quotes : pyarrow.Table or DataFrame
        Tables of `schema.py`. Rows of one stock should be sorted by time, rows of one
        moment in the exchange's sequence; rows out of order are sorted and counted.
        Of the quotes all levels present are read.
    day : date, optional
        The day, default that of the first trade. Ticks of another day are rejected.
    session : str or Session, default "a_share"
        When the exchange trades.
    publishes_all : {"auto", True, False} or list of str, default "auto"
        Whether `orders` holds orders that were filled at once. "auto": not for
        Shanghai (codes that begin with SH), else yes. A list names the instruments
        for which it does.
    threads : int, optional
        Threads, default all cores the process may use.

    Raises
    ------
    ValueError
        For a missing column, a time zone, or trades most of which lie outside the
        session.
    """
    session = get_session(session)
    labels, code, trade_rows = _table(trades, "trades")
    rows_in = {"trades": len(code)}
    notes: dict[str, Any] = {}
    if day is None:
        good = trade_rows.time[trade_rows.time >= 0]
        if not len(good):
            raise ValueError("`day` must be given: no trade has a time.")
        day_number = int(good[0] // DAY_US)
    else:
        day_number = int(np.datetime64(pd.Timestamp(day), "D").astype(np.int64))
    n = len(labels)
    at, sorted_rows = {}, {}
    at["trades"], sorted_rows["trades"] = _by_stock(
        code, n, trade_rows, "trades", notes
    )
    for name, table, columns in (
        ("orders", orders, Orders),
        ("quotes", quotes, Quotes),
    ):
        if table is None:
            at[name] = np.zeros(n + 1, dtype=np.int64)
            sorted_rows[name] = columns(*(frozen(np.empty(0, t)) for t in _TYPES[name]))
            continue
        own, code, rows = _table(table, name)
        rows_in[name] = len(code)
        code, rows = _match(labels, own, code, rows, name, notes)
        at[name], sorted_rows[name] = _by_stock(code, n, rows, name, notes)
    ids = sorted_rows["trades"]
    check_rising(ids.volume, at["trades"])
    other = _other_levels(sorted_rows, at)
    of_trades = (ids, at["trades"])
    notes |= check_trades(*of_trades, labels)
    notes |= check_orders(sorted_rows["orders"], at["orders"], *of_trades, day_number)
    check_quotes(sorted_rows["quotes"], at["quotes"], *of_trades)
    odd = np.zeros(n, dtype=bool)
    if session.name == "a_share":
        for name in ("trades", "orders"):
            odd |= _odd_lots(sorted_rows[name].volume, at[name], labels, name)
        odd |= _odd_prices(ids.price, at["trades"], labels)
    source = Source(
        **sorted_rows,
        **{f"{name}_at": x for name, x in at.items()},
        has_ids=bool((ids.buy_id > 0).any() and (ids.sell_id > 0).any()),
        publishes_all=_publishes_all(publishes_all, labels),
    )
    out = Out(
        counts=np.zeros((n, 3, REJECTS), dtype=np.int64),
        unknown=np.zeros(n, dtype=np.int64),
        facts=np.full(n, np.nan, dtype=FACTS),
        flow=np.full((n, len(FLOW_FIELDS)), np.nan),
        values=np.full((n, len(TICK_NAMES)), np.nan),
    )
    in_threads(
        reduce_stocks,
        n,
        (source, _clock(session, day_number), out),
        threads,
        np.asarray(sum(at.values())),
    )
    total = out.counts.sum(axis=0)
    for k, name in enumerate(sorted_rows):
        _check_clock(total[k], session, name)
    for k, name in enumerate(("trades", "orders")):
        moved = min(int(other[name].sum()), int(total[k, 3]))
        total[k, [3, 9]] += [-moved, moved]
    rejected = {
        name: {why: int(row[c]) for c, why in TICK_REJECT_REASONS.items() if row[c]}
        for name, row in zip(sorted_rows, total, strict=True)
    }
    if out.unknown.any():
        notes["cancellations of orders without a row"] = int(out.unknown.sum())
    keep = out.facts["trades"] > 0
    outside = out.counts[:, 0, 2]
    if (gone := ~keep & (outside >= _RUN // 2)).any():
        notes[_OUTSIDE] = [
            f"{x} {np.datetime64(day_number, 'D')}" for x in labels[gone]
        ]
    own = ids.time // DAY_US == day_number
    where = np.r_[0, np.cumsum(own)][at["trades"]]
    odd |= np.any([x > _REJECTED * np.diff(at[t]) for t, x in other.items()], axis=0)
    lacking = keep & (odd | _with_holes(where, ids.time[own], session))
    date = np.datetime64(day_number, "D").astype("datetime64[ns]")
    data: dict[str, Any] = {
        "datetime": np.full(int(keep.sum()), date),
        "instrument": labels[keep],
    }
    data.update({name: out.facts[name][keep] for name in FACTS.names or ()})
    data.update({name: out.flow[keep, i] for i, name in enumerate(FLOW_FIELDS)})
    data.update({name: out.values[keep, i] for i, name in enumerate(TICK_NAMES)})
    return TickRows(pd.DataFrame(data), rows_in, rejected, notes, lacking[keep])


def _other_levels(
    rows: dict[str, Any], at: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Take prices of another level than the stock's trades out; count them by stock.

    A price of -1 is one that the kernels reject.
    """
    out = {}
    trades = rows["trades"].price
    for name in ("trades", "orders"):
        price, begins = rows[name].price, at[name]
        if name == "trades":
            far = other_level(price, begins)
        else:
            far = _beyond(price, begins, trades, at["trades"])
        if far.any():
            trades = np.where(far, -1.0, price) if name == "trades" else trades
            rows[name] = rows[name]._replace(price=frozen(np.where(far, -1.0, price)))
        out[name] = np.diff(np.r_[0, np.cumsum(far)][begins])
    if (far := out["orders"].sum()) > 0.5 * max(len(rows["orders"].price), 1):
        raise ValueError(
            f"{far:,} of {len(rows['orders'].price):,} orders are priced at more than "
            "eight times the highest trade of their stock, or under an eighth of the "
            "lowest: are prices of orders and trades in one unit? Declare them in the "
            "mapping file (`units: {price: fen}` in its source)."
        )
    return out


def _beyond(
    price: np.ndarray, at: np.ndarray, trades: np.ndarray, trades_at: np.ndarray
) -> np.ndarray:
    """Orders of eight times their stock's highest trade, or an eighth of the lowest."""
    high, low = price_range(trades, trades_at)
    of = np.repeat(np.arange(len(at) - 1), np.diff(at))
    return (price > 0) & ((price > 8 * high[of]) | (price < low[of] / 8))


def _odd_lots(
    volume: np.ndarray, at: np.ndarray, labels: np.ndarray, name: str
) -> np.ndarray:
    """Stocks in lots, all day or a part of it: nearly all volumes are of whole lots.

    Volumes are looked at a hundred in a row. STAR and Beijing trade by the share, and
    bonds by ten.
    """
    count = np.diff(at)
    runs = np.maximum(count // _RUN, 1)
    has = np.array([bool(_IN_LOTS.match(str(x))) for x in labels], dtype=bool)
    has &= count >= _RUN // 2
    if not has.any():
        return np.zeros(len(labels), dtype=bool)
    much = np.diff(np.r_[0, np.cumsum(volume % 10_000 == 0)][at])
    if (much[has] >= 0.8 * count[has]).mean() > 0.5:
        raise ValueError(
            f"nearly all {name} are of multiples of 10,000 shares, and of 100 they are "
            "by rule: shares taken for lots? Then leave `units: {volume: lots}` out."
        )
    of = np.repeat(np.arange(len(labels)), runs * has)
    step = np.arange(len(of)) - np.repeat(
        np.cumsum(runs * has) - runs * has, runs * has
    )
    first = at[:-1][of] + step * _RUN
    last = np.append(first[1:], 0)
    ends = np.append(of[1:] != of[:-1], True)
    last[ends] = at[1:][of[ends]]
    whole = np.r_[0, np.cumsum(volume % 100 == 0)]
    low = (whole[last] - whole[first]) < _WHOLE_LOTS * (last - first)
    odd = np.zeros(len(labels), dtype=bool)
    odd[of[low]] = True
    if odd.sum() > 0.5 * has.sum():
        share = whole[at[-1]] / max(at[-1], 1)
        raise ValueError(
            f"only {share:.0%} of the {name} are of multiples of 100 shares, as nearly "
            f"all are ({int(odd.sum())} of {int(has.sum())} stocks have a hundred in a "
            "row that are not): volumes in lots? Then declare it in the mapping file: "
            "`units: {volume: lots}`."
        )
    return of_few(
        odd, labels, f"stocks have {name} that are no multiples of 100 shares, as all "
        "others are", "are they in lots? Mend their rows, or read them with a mapping "
        "of their own, `units: {volume: lots}`",
    )  # fmt: skip


def _odd_prices(price: np.ndarray, at: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Stocks whose prices are whole numbers from 100 on, or higher than any share's.

    Refused are prices between the ticks.
    """
    odd = np.zeros(len(labels), dtype=bool)
    count = np.diff(at)
    has = np.flatnonzero(count > 0)
    if not len(has):
        return odd
    price = price[: at[-1]]
    fen, e4 = price * 100, price * 1e4
    off = (np.abs(fen - np.round(fen)) > 0.05) & (np.abs(e4 - np.round(e4)) < 1e-4)
    off = np.add.reduceat(off, at[has], dtype=np.int64)
    shares = np.array([bool(_SHARE.match(str(x))) for x in labels[has]], dtype=bool)
    if (wrong := shares & (count[has] >= _RUN // 2) & (off > 0.2 * count[has])).any():
        raise ValueError(
            f"prices of {', '.join(map(str, labels[has][wrong][:5]))} "
            f"({int(wrong.sum())} stock(s)) are no multiples of 0.01 CNY, the tick of "
            "A-shares: in another unit?"
        )
    broken = np.add.reduceat(price != np.round(price), at[has], dtype=np.int64)
    high, low = (f.reduceat(price, at[has]) for f in (np.maximum, np.minimum))
    whole = (broken == 0) & (high >= low + 2) & (low >= 100)
    odd[has] = (whole & (count[has] >= _RUN // 2)) | (high > _HIGHEST)
    if odd.sum() > 0.5 * len(has):  # all of them: told by their level
        return np.zeros(len(labels), dtype=bool)
    return of_few(
        odd, labels, "stocks have prices in whole numbers, or above 3,000 CNY, as no "
        "others have", "in fen? Mend their rows, or read them with a mapping of their "
        "own, `units: {price: fen}`",
    )  # fmt: skip


def _with_holes(at: np.ndarray, time: np.ndarray, session: Session) -> np.ndarray:
    """Stocks with half an hour or more without trades that is not by chance."""
    spans = [
        ((a.hour * 60 + a.minute) * MIN_US, (b.hour * 60 + b.minute) * MIN_US)
        for a, b in session.intervals
    ]

    def elapsed(moment: np.ndarray) -> np.ndarray:
        clock = moment % DAY_US
        return sum(np.clip(clock - a, 0, b - a) for a, b in spans) / MIN_US

    out = np.zeros(len(at) - 1, dtype=bool)
    has = np.flatnonzero(np.diff(at) > 0)
    if not len(has):
        return out
    first, last = at[:-1][has], at[1:][has] - 1
    gap = np.maximum(elapsed(time[first]), session.minutes - elapsed(time[last]))
    far = np.flatnonzero(np.diff(time) > LEAST_GAP * MIN_US)
    of = np.searchsorted(first, far, "right") - 1
    far, of = (x[far < last[of]] for x in (far, of))
    np.maximum.at(gap, of, elapsed(time[far + 1]) - elapsed(time[far]))
    new = np.diff(time // MIN_US, prepend=-1) != 0
    new[first] = True
    count = np.add.reduceat(new, first, dtype=np.int64)
    found = silence(count, gap, np.full(len(has), session.minutes))
    out[has] = found & (gap >= LEAST_GAP) & (count >= _SEEN)
    return out


def _publishes_all(rule: bool | str | Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Whether each stock's orders hold those that were filled at once."""
    if isinstance(rule, str):
        if rule != "auto":
            raise ValueError(
                "`publishes_all` must be 'auto', true, false or a list of codes, got "
                f"{rule!r}."
            )
        return np.array([not str(c).upper().startswith("SH") for c in labels], bool)
    if isinstance(rule, bool):
        return np.full(len(labels), rule)
    return np.isin(labels.astype(str), [str(c) for c in rule])


def _clock(session: Session, day: int) -> Clock:
    def us(time) -> int:
        return ((time.hour * 60 + time.minute) * 60 + time.second) * 1_000_000

    first = session.auction[0] if session.auction else session.intervals[0][0]
    close = us(session.intervals[-1][1])
    spans = [
        (us(start), min(us(end), us(session.continuous_end)))
        for start, end in session.intervals
    ]
    return Clock(
        day=day,
        first=us(first),
        last=close + int(session.slack.total_seconds() * 1_000_000),
        open=us(session.intervals[0][0]),
        tail=close - 30 * MIN_US,
        spans=np.array(spans, dtype=np.int64),
    )


_SEEN = 100  # minutes with trades
_OUTSIDE = "stock-days all of whose trades lie outside the session (another zone?)"
_RUN, _WHOLE_LOTS = 100, 0.1
_IN_LOTS = re.compile(r"SH(60|5)|SZ(00|30|15)")
_SHARE = re.compile(r"SH6|SZ(00|30)|BJ")
_HIGHEST = 3000.0  # CNY, of any share
_REJECTED = 0.1  # of a stock's prices in another unit, and the stock lacks trades
_INTS = {"volume", "buy_id", "sell_id", "side", "order_id", "action"}
_KERNEL_TYPES = {"side": np.int8, "action": np.int8}
#: Of the kernels' arrays, for a table that is not there.
_TYPES = {
    "orders": (np.int64, float, np.int64, np.int8, np.int64, np.int8),
    "quotes": (np.int64, float, float, float, float, np.int8),
}


def _table(
    table: pa.Table | pd.DataFrame, name: str
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Labels, codes and the kernels' arrays of a normalised table."""
    names = table.column_names if isinstance(table, pa.Table) else list(table.columns)
    schema = {"trades": TRADES, "orders": ORDERS}.get(name)
    required = schema.required if schema else ["instrument", "time", "bid_price_1"]
    for column in required:
        if column not in names:
            raise ValueError(
                f"{name} have no column {column!r}; they need {required} and have "
                f"{names[:12]}. Name your columns in a mapping file."
            )
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    labels, code = dictionary_codes(table.column("instrument"))
    when = microseconds(table.column("time"), "time")
    n = len(code)
    if schema is not None:
        cols: dict[str, np.ndarray] = {"time": when}
        for column in schema.names[2:]:
            kind: Any = np.int64 if column in _INTS else np.float64
            kind = _KERNEL_TYPES.get(column, kind)
            if column not in names:
                cols[column] = np.zeros(n, dtype=kind)
                continue
            data = table.column(column)
            if not (pa.types.is_integer(data.type) or pa.types.is_floating(data.type)):
                raise ValueError(
                    f"{name}: column {column!r} must hold numbers, got {data.type}; a "
                    "mapping file can say what the codes mean."
                )
            values = data.to_numpy()
            if column in _INTS and values.dtype.kind == "f":
                # An unknown id or volume is 0, an unknown code no code at all.
                fill = 99 if column in ("side", "action") else 0
                values = np.where(np.isfinite(values), values, fill)
            if column in ("side", "action") and values.dtype != np.int8:
                values = np.clip(values, -99, 99)
            cols[column] = values.astype(kind, copy=False)
        return labels, code, (Trades if name == "trades" else Orders)(**cols)
    bid, ask = _level(table, "bid_price_1"), _level(table, "ask_price_1")
    sums = []
    bad = np.zeros(n, dtype=np.int8)
    for side in ("bid", "ask"):
        total = np.zeros(n)
        for column in names:
            if column.startswith(f"{side}_volume_"):
                values = _level(table, column)
                bad[values < 0] = 4
                total += values
        sums.append(total)
    bad[(bid < 0) | (ask < 0)] = 3
    return labels, code, Quotes(when, bid, ask, sums[0], sums[1], bad)


def _level(table: pa.Table, column: str) -> np.ndarray:
    if column not in table.column_names:
        raise ValueError(
            f"quotes have no column {column!r}; they have {table.column_names[:12]}. "
            "Name your columns in a mapping file."
        )
    values = table.column(column).to_numpy().astype(np.float64, copy=False)
    return np.nan_to_num(values, nan=0.0) if np.isnan(values).any() else values


def _match(
    labels: np.ndarray,
    own: np.ndarray,
    code: np.ndarray,
    cols: Any,
    name: str,
    notes: dict,
) -> tuple[np.ndarray, Any]:
    """Codes of `own` labels as codes of the trades' labels; rows of others dropped."""
    where = {label: k for k, label in enumerate(labels)}
    to = np.array([where.get(label, -1) for label in own], dtype=np.int64)
    if len(to) == 0:
        return code.astype(np.int64), cols
    code = to[code]
    if (code < 0).any():
        keep = code >= 0
        notes[f"{name} of stocks without trades"] = int((~keep).sum())
        code, cols = code[keep], cols._make(c[keep] for c in cols)
    return code, cols


def _by_stock(
    code: np.ndarray, n: int, cols: Any, name: str, notes: dict
) -> tuple[np.ndarray, Any]:
    """Rows grouped by stock and sorted by time, and where each stock starts."""
    if len(code) and (np.diff(code) < 0).any():
        order = np.argsort(code, kind="stable")
        code, cols = code[order], cols._make(c[order] for c in cols)
    if len(code):
        late = (np.diff(cols.time) < 0) & (np.diff(code) == 0)
        if late.any():
            notes[f"{name} out of time order (sorted)"] = int(late.sum())
            order = np.lexsort((cols.time, code))
            code, cols = code[order], cols._make(c[order] for c in cols)
    at = np.searchsorted(code, np.arange(n + 1))
    return at.astype(np.int64), cols._make(frozen(c) for c in cols)


def _check_clock(counts: np.ndarray, session: Session, name: str) -> None:
    """Refuse ticks whose clock is not the exchange's, and books that cross."""
    total = counts.sum()
    if total >= 20 and counts[8] > 0.5 * total:
        raise ValueError(
            f"{counts[8]:,} of {total:,} {name} bid at the ask or above: are bid and "
            "ask swapped in the mapping?"
        )
    if total >= 20 and counts[2] > 0.5 * total:
        raise ValueError(
            f"{counts[2]} of {total} {name} lie outside the session {session.name!r} "
            f"({session.tz}); the times look like another time zone or exchange: set "
            "`tz` in a mapping file, or `session`."
        )
