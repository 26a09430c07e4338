"""Vendor layouts translated into the tables of `schema.py`.

A `Layout` says how one kind of file maps onto one table. `LAYOUTS` holds the ones this
package knows; `detect` picks the one whose columns a file has. Any other layout is
given as a mapping file::

    session: a_share              # or us_regular
    stamp: end                    # bars: datetime is the end of the bar
    bar_minutes: 1                # bars: length of the bars to compute from
    early_close: {"2024-11-29": "13:00"}   # bars: days that end early
    publishes_all: auto           # ticks: see aggregate_ticks
    bars:                         # or trades, orders, quotes: one block a table
      path: "minute/*.parquet"    # below --source; default <table>/*.parquet
      columns: {instrument: code, datetime: t, open: o, high: h, low: l, close: c,
                volume: vol, amount: amt}
      tz: UTC                     # zone of naive times, if not the exchange's own
    trades:
      columns: {instrument: sym, time: {date: day, time: hhmmssmmm}, price: px,
                volume: qty, buy_id: bid_no, sell_id: ask_no, side: flag}
      codes: {side: {B: 1, S: -1, N: 0}}
      volume_unit: 100            # shares a unit: 100 where volumes are lots
      sequence: seq               # sorts rows of one stock, instead of file order
      side_from_ids: true         # no flag: the later order was the aggressor
      cancels: {column: exec, values: ["4"]}  # rows that are cancellations (Shenzhen)
    orders:
      columns: {…, order_id: no, action: type}
      codes: {side: {1: 1, 2: -1}, action: {A: 1, D: -1}}
    quotes:
      columns: {instrument: sym, time: t}
      levels: {bid_price: "BidPx{}", bid_volume: "BidVol{}", ask_price: "AskPx{}",
               ask_volume: "AskVol{}", first: 1, count: 10}

A column `instrument: "{file}"` takes the code from the file's name; `action: "{new}"`
says that every row of an order file places an order (Shenzhen: cancellations lie among
the trades). Codes such as 600000.SH, sh600000, 600000.XSHG or 600000 become Qlib's
SH600000. Times may be timestamps, text, or YYYYMMDDHHMMSSmmm as one number or two.

The Shanghai layouts were checked on real files. The Shenzhen ones carry the exchange's
own field names (its STEP feed, messages 300191 and 300192) and are checked on made
files only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from data_handlers.aggregate.reading import as_text
from data_handlers.aggregate.schema import (
    BARS,
    CANCEL,
    NEW,
    ORDERS,
    SESSIONS,
    TRADES,
    Session,
    TableSchema,
)
from data_handlers.codes import code_of_file, qlib_code

__all__ = ["LAYOUTS", "Layout", "SourceMapping", "detect", "read_mapping", "translate"]

_TABLES = ("bars", "trades", "orders", "quotes")
_UNKNOWN_CODE = 99
#: What a column may be instead of one of the vendor's.
_CONSTANTS = ("{file}", "{new}")


@dataclass(frozen=True)
class Layout:
    """How a vendor's file maps onto one normalised table.

    Attributes
    ----------
    name : str
        For messages and the build report.
    table : {"bars", "trades", "orders", "quotes"}
        What it becomes.
    columns : dict
        Normalised column to the vendor's; the time may be
        ``{"date": column, "time": column}`` with YYYYMMDD and HHMMSSmmm, or one
        column with both as one number. `action` may be "{new}": all rows are new.
    codes : dict
        Normalised column to {vendor's code: ours}. Other codes are rejected rows.
    levels : dict
        Quotes: patterns of the level columns, `first` number and `count`.
    tz : str or None
        Zone of times without one; None is the exchange's own.
    volume_unit : float
        Shares a unit of volume.
    sequence : str or None
        Vendor's column that orders the rows of one stock.
    side_from_ids : bool
        Trades without a flag: the order with the larger id came later, so it was the
        aggressor; in an auction nobody is.
    cancels : dict or None
        Trades: ``{"column": c, "values": [...]}`` of rows that are cancellations.
    path : str or None
        Glob below the source folder.
    """

    name: str
    table: str
    columns: Mapping[str, Any]
    codes: Mapping[str, Mapping[Any, int]] = field(default_factory=dict)
    levels: Mapping[str, Any] = field(default_factory=dict)
    tz: str | None = None
    volume_unit: float = 1
    sequence: str | None = None
    side_from_ids: bool = False
    cancels: Mapping[str, Any] | None = None
    path: str | None = None

    def vendor_columns(self) -> list[str]:
        """Return the columns of the vendor's file that are read."""
        out: list[str] = []
        for source in self.columns.values():
            out += list(source.values()) if isinstance(source, Mapping) else [source]
        out += self.level_columns()
        if self.sequence:
            out.append(self.sequence)
        if self.cancels:
            out.append(self.cancels["column"])
        return [c for c in dict.fromkeys(out) if c not in _CONSTANTS]

    def level_columns(self) -> list[str]:
        """Return the vendor's level columns of quotes."""
        if not self.levels:
            return []
        first, count = int(self.levels["first"]), int(self.levels["count"])
        return [
            self.levels[key].format(k)
            for key in ("bid_price", "bid_volume", "ask_price", "ask_volume")
            for k in range(first, first + count)
            if key.endswith("volume") or k == first
        ]


def _same(schema: TableSchema) -> dict[str, str]:
    return {n: n for n in schema.names}


def _levels(pattern: Sequence[str], first: int, count: int) -> dict[str, Any]:
    keys = ("bid_price", "bid_volume", "ask_price", "ask_volume")
    return {**dict(zip(keys, pattern, strict=True)), "first": first, "count": count}


#: Known layouts, the most specific first.
LAYOUTS: tuple[Layout, ...] = (
    Layout("normalised bars", "bars", _same(BARS)),
    Layout("normalised trades", "trades", _same(TRADES)),
    Layout("normalised orders", "orders", _same(ORDERS)),
    *(
        Layout(
            f"normalised quotes, {n} levels",
            "quotes",
            {"instrument": "instrument", "time": "time"},
            levels=_levels(
                ("bid_price_{}", "bid_volume_{}", "ask_price_{}", "ask_volume_{}"), 1, n
            ),
        )
        for n in (10, 5, 1)
    ),
    Layout(
        "Shanghai trades, numeric flags (2023-07)",
        "trades",
        {
            **{"instrument": "instrument", "time": "time", "price": "price"},
            **{"volume": "qty", "buy_id": "buy_no", "sell_id": "sell_no"},
            **{"side": "bs_flag"},
        },
        # One layout for both forms: numbers in the newer files, letters in the older.
        codes={"side": {1: 1, 2: -1, 0: 0, "B": 1, "S": -1, "N": 0}},
        sequence="appl_seq",
    ),
    Layout(
        "Shanghai trades, letter flags (2023-02)",
        "trades",
        {
            **{"instrument": "instrument", "time": "time", "price": "price"},
            **{"volume": "qty", "buy_id": "buy_no", "sell_id": "sell_no"},
            **{"side": "bs_flag"},
        },
        codes={"side": {1: 1, 2: -1, 0: 0, "B": 1, "S": -1, "N": 0}},
        sequence="biz_index",
    ),
    Layout(
        "Shanghai orders, numeric types (2023-07)",
        "orders",
        {
            **{"instrument": "instrument", "time": "time", "price": "price"},
            **{"volume": "qty", "side": "side", "order_id": "order_no"},
            **{"action": "order_type"},
        },
        codes={"side": {1: 1, 2: -1}, "action": {2: 1, 10: -1}},
        sequence="appl_seq",
    ),
    Layout(
        "Shanghai orders, letter types (2023-02)",
        "orders",
        {
            **{"instrument": "instrument", "time": "time", "price": "price"},
            **{"volume": "balance_qty", "side": "side", "order_id": "order_no"},
            **{"action": "order_type"},
        },
        codes={"side": {"B": 1, "S": -1}, "action": {"A": 1, "D": -1}},
        sequence="biz_index",
    ),
    Layout(
        "Shanghai snapshots, levels from 1 (2023-02)",
        "quotes",
        {"instrument": "instrument", "time": "time"},
        levels=_levels(
            ("BidPrice{}", "BidVolume{}", "AskPrice{}", "AskVolume{}"), 1, 10
        ),
    ),
    Layout(
        "Shanghai snapshots, levels from 0 (2021-12)",
        "quotes",
        {"instrument": "instrument", "time": "time"},
        levels=_levels(
            ("BidPrice{}", "BidOrderQty{}", "OfferPrice{}", "OfferOrderQty{}"), 0, 10
        ),
    ),
    Layout(
        "Shenzhen trades, the exchange's field names",
        "trades",
        {
            **{"instrument": "SecurityID", "time": "TransactTime", "price": "LastPx"},
            **{"volume": "LastQty", "buy_id": "BidApplSeqNum"},
            **{"sell_id": "OfferApplSeqNum"},
        },
        sequence="ApplSeqNum",
        side_from_ids=True,
        # 4 cancelled, F filled; some vendors keep the characters' numbers.
        cancels={"column": "ExecType", "values": ["4", "52"]},
    ),
    Layout(
        "Shenzhen orders, the exchange's field names",
        "orders",
        {
            **{"instrument": "SecurityID", "time": "TransactTime", "price": "Price"},
            **{"volume": "OrderQty", "side": "Side", "order_id": "ApplSeqNum"},
            **{"action": "{new}"},
        },
        codes={"side": {1: 1, 2: -1, 49: 1, 50: -1}},
        sequence="ApplSeqNum",
    ),
)


@dataclass(frozen=True)
class SourceMapping:
    """Contents of a mapping file.

    Attributes
    ----------
    layouts : dict
        Table name to `Layout`; tables not named are detected.
    options : dict
        `session`, `stamp`, `bar_minutes`, `amount`, `early_close`, `publishes_all`, as
        far as given.
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


_OPTIONS = (
    *("session", "stamp", "bar_minutes", "amount", "early_close"),
    "publishes_all",
)


def read_mapping(source: str | Path | Mapping | None) -> SourceMapping:
    """Read a mapping file, or check the same as a dict.

    Raises
    ------
    ValueError
        For an unknown key, table, column or session, naming file and key.
    """
    if source is None:
        return SourceMapping()
    where = "mapping"
    if not isinstance(source, Mapping):
        where = str(source)
        try:
            with open(source, encoding="utf-8") as file:
                source = yaml.safe_load(file)
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{where} is not a readable YAML file: {error}") from error
        if not isinstance(source, Mapping):
            raise ValueError(
                f"{where} must hold a mapping {{table: {{columns: …}}}}, got "
                f"{type(source).__name__}."
            )
    layouts, options = {}, {}
    for key, value in source.items():
        if key in _OPTIONS:
            options[key] = value
        elif key in _TABLES:
            layouts[key] = _layout(where, key, value)
        else:
            raise ValueError(
                f"{where}: unknown key {key!r}; known are {[*_TABLES, *_OPTIONS]}."
            )
    if options.get("session") is not None and options["session"] not in SESSIONS:
        raise ValueError(
            f"{where}: `session` must be one of {sorted(SESSIONS)}, got "
            f"{options['session']!r}."
        )
    return SourceMapping(layouts, options)


def _layout(where: str, table: str, value: Any) -> Layout:
    known = {f.name for f in fields(Layout)} - {"name", "table"}
    if not isinstance(value, Mapping) or "columns" not in value:
        raise ValueError(f"{where}: `{table}` needs a block with `columns`.")
    for key in value:
        if key not in known:
            raise ValueError(
                f"{where}: `{table}` has the unknown key {key!r}; it takes "
                f"{sorted(known)}."
            )
    schema = {"bars": BARS, "trades": TRADES, "orders": ORDERS}.get(table)
    names = schema.names if schema else ["instrument", "time"]
    required = schema.required if schema else names
    columns = value["columns"]
    for column in columns:
        if column not in names:
            raise ValueError(
                f"{where}: `{table}.columns` names {column!r}; known are {names}."
            )
    from_ids = value.get("side_from_ids")
    for column in required:
        if column not in columns and not (column == "side" and from_ids):
            raise ValueError(f"{where}: `{table}.columns` lacks {column!r}.")
    levels = value.get("levels") or {}
    if table == "quotes":
        need = {"bid_price", "bid_volume", "ask_price", "ask_volume", "first", "count"}
        if set(levels) != need:
            raise ValueError(
                f"{where}: `quotes.levels` needs exactly {sorted(need)}, got "
                f"{sorted(levels)}."
            )
    return Layout(name=f"{where}:{table}", table=table, **value)


def detect(columns: Sequence[str], table: str, where: str) -> Layout:
    """Find the known layout of a file.

    Parameters
    ----------
    columns : list of str
        The file's columns.
    table : str
        Which table is looked for.
    where : str
        The file, for the message.

    Raises
    ------
    ValueError
        If no layout fits, naming the columns of the file.
    """
    have = set(columns)
    schema = {"bars": BARS, "trades": TRADES, "orders": ORDERS}.get(table)
    for layout in LAYOUTS:
        if layout.table != table:
            continue
        needed = set(layout.vendor_columns())
        if layout.name.startswith("normalised") and schema is not None:
            needed = set(schema.required)
        if needed <= have:
            return layout
    need = schema.required if schema else ["instrument", "time", "bid_price_1", "…"]
    raise ValueError(
        f"{where}: no known layout of {table} has the columns {list(columns)[:14]}; "
        f"rename them to {need}, or pass a mapping file (`--mapping`) that says which "
        "is which."
    )


def translate(
    table: pa.Table, layout: Layout, file: str, tz: str, session: Session | None = None
) -> tuple[pa.Table, pa.Table | None]:
    """Turn a vendor's rows into normalised ones.

    Parameters
    ----------
    table : pyarrow.Table
        Rows with the layout's columns.
    layout : Layout
        From `detect` or a mapping file.
    file : str
        Path, for messages and ``{file}``.
    tz : str
        Zone of the exchange.
    session : Session, optional
        Says which trades were made in an auction, where `side_from_ids` must know.

    Returns
    -------
    (Table, Table or None)
        The normalised rows; cancellations found among trades, as orders.

    Raises
    ------
    ValueError
        For a missing column or a time that cannot be read, naming file and column.
    """
    schema = {"bars": BARS, "trades": TRADES, "orders": ORDERS}.get(layout.table)
    optional = [c.name for c in schema.columns if not c.required] if schema else []
    for name, source in layout.columns.items():
        parts = source.values() if isinstance(source, Mapping) else [source]
        for part in parts:
            if part in table.column_names or part in _CONSTANTS:
                continue
            if name in optional and source == name:
                continue
            raise ValueError(
                f"{file} has no column {part!r} (for {name!r}, layout {layout.name}); "
                f"it has {table.column_names[:14]}."
            )
    if layout.sequence:
        table = _sorted(table, layout)
    out: dict[str, Any] = {}
    for name, source in layout.columns.items():
        if name == "instrument":
            out[name] = _instrument(table, source, file)
        elif name in ("time", "datetime"):
            out[name] = _time(table, source, layout.tz, tz, file, name)
        elif source == "{new}":
            out[name] = pa.array(np.full(table.num_rows, NEW, dtype=np.int8))
        elif source not in table.column_names:
            continue
        elif name in layout.codes:
            out[name] = _coded(table.column(source), layout.codes[name])
        else:
            out[name] = table.column(source)
            if name == "volume" and layout.volume_unit != 1:
                out[name] = pc.multiply(out[name], pa.scalar(layout.volume_unit))
    if layout.levels:
        first, count = int(layout.levels["first"]), int(layout.levels["count"])
        for key in ("bid_price", "bid_volume", "ask_price", "ask_volume"):
            for k in range(count):
                source = layout.levels[key].format(first + k)
                if source in table.column_names:
                    column = table.column(source)
                    if key.endswith("volume") and layout.volume_unit != 1:
                        column = pc.multiply(column, pa.scalar(layout.volume_unit))
                    out[f"{key}_{k + 1}"] = column
    if layout.side_from_ids:
        buy, sell = out["buy_id"].to_numpy(), out["sell_id"].to_numpy()
        side = np.where((buy > 0) & (sell > 0), np.sign(buy - sell), 0)
        if session is not None:
            side = np.where(_continuous(out["time"], session), side, 0)
        out["side"] = pa.array(side.astype(np.int8))
    result = pa.table(out)
    if not layout.cancels:
        return result, None
    marks = table.column(layout.cancels["column"])
    is_cancel = pc.is_in(
        pc.cast(marks, pa.string()),
        value_set=pa.array([str(v) for v in layout.cancels["values"]]),
    )
    gone = result.filter(is_cancel)
    buy = np.nan_to_num(gone.column("buy_id").to_numpy())
    sell = np.nan_to_num(gone.column("sell_id").to_numpy())
    n = gone.num_rows
    cancels = pa.table(
        {
            "instrument": gone.column("instrument"),
            "time": gone.column("time"),
            "price": pa.array(np.zeros(n)),
            "volume": gone.column("volume"),
            "side": pa.array(np.where(buy > 0, 1, -1).astype(np.int8)),
            "order_id": pa.array(np.where(buy > 0, buy, sell).astype(np.int64)),
            "action": pa.array(np.full(n, CANCEL, dtype=np.int8)),
        }
    )
    return result.filter(pc.invert(is_cancel)), cancels


def _continuous(time: Any, session: Session) -> np.ndarray:
    """Whether each moment lies in continuous trading."""
    when = pa.chunked_array(time) if isinstance(time, pa.Array) else time
    stamp = when.to_numpy().astype("datetime64[us]")
    clock = (stamp - stamp.astype("datetime64[D]")).astype(np.int64) // 60_000_000
    out = np.zeros(len(clock), dtype=bool)
    for start, end in session.intervals:
        last = min(end, session.continuous_end)
        first_minute = start.hour * 60 + start.minute
        out |= (clock >= first_minute) & (clock < last.hour * 60 + last.minute)
    return out


def _sorted(table: pa.Table, layout: Layout) -> pa.Table:
    """Rows sorted by instrument, then the vendor's sequence; nothing if they are."""
    seq = table.column(str(layout.sequence)).to_numpy()
    keys = [seq]
    # The sequence starts anew every day.
    time = layout.columns["time"]
    when = table.column(time["date"] if isinstance(time, Mapping) else time)
    if pa.types.is_timestamp(when.type):
        keys.append(when.to_numpy().astype("datetime64[D]").view(np.int64))
    elif isinstance(time, Mapping):
        keys.append(when.to_numpy())
    elif pa.types.is_integer(when.type):
        keys.append(when.to_numpy() // 1_000_000_000)
    source = layout.columns["instrument"]
    if source != "{file}":
        code = table.column(source)
        if not pa.types.is_dictionary(code.type):
            code = code.dictionary_encode()
        chunks = code.unify_dictionaries().chunks
        index = [c.indices.to_numpy(zero_copy_only=False) for c in chunks]
        keys.append(np.concatenate(index) if index else np.empty(0, dtype=np.int32))
    # Sorted already: at every step the first key that changes, counted from the
    # outermost, must grow.
    ok = np.ones(max(len(seq) - 1, 0), dtype=bool)
    same = ok.copy()
    for key in reversed(keys):
        step = np.diff(key)
        ok &= ~(same & (step < 0))
        same &= step == 0
    return table if ok.all() else table.take(pa.array(np.lexsort(keys)))


def _instrument(table: pa.Table, source: str, file: str) -> Any:
    if source == "{file}":
        label = qlib_code(code_of_file(file))
        zeros = pa.array(np.zeros(table.num_rows, dtype=np.int32))
        return pa.DictionaryArray.from_arrays(zeros, pa.array([label]))
    column = table.column(source)
    column = as_text(column)
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = []
    for chunk in column.unify_dictionaries().chunks:
        labels = pa.array([qlib_code(str(x)) for x in chunk.dictionary.to_pylist()])
        chunks.append(pa.DictionaryArray.from_arrays(chunk.indices, labels))
    kind = pa.dictionary(pa.int32(), pa.string())
    return (
        pa.chunked_array(chunks, type=kind) if not chunks else pa.chunked_array(chunks)
    )


def _time(
    table: pa.Table, source: Any, own_tz: str | None, tz: str, file: str, name: str
) -> Any:
    if isinstance(source, Mapping):
        column = _date_and_time(table, source, file)
    else:
        column = table.column(source)
        if pa.types.is_integer(column.type):
            column = _date_and_time(table, {"both": source}, file)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            try:
                column = pc.cast(column, pa.timestamp("us"))
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"{file}: column {source!r} ({name}) is no time: {error}"
                ) from error
        if not pa.types.is_timestamp(column.type):
            raise ValueError(
                f"{file}: column {source!r} ({name}) must be a timestamp, got "
                f"{column.type}; split days and HHMMSSmmm are given as "
                "{date: column, time: column}."
            )
    if column.type.tz is not None or own_tz not in (None, tz):
        if column.type.tz is None:
            column = pc.assume_timezone(column, str(own_tz), ambiguous="earliest")
        # Not safe: nanoseconds below a microsecond are cut off.
        column = pc.cast(column, pa.timestamp("us", tz), safe=False)
        column = pc.local_timestamp(column)
    return column


def _date_and_time(table: pa.Table, source: Mapping, file: str) -> pa.Array:
    """Timestamps from YYYYMMDD and HHMMSSmmm, in two columns or in one."""
    if "both" in source:
        both = _numbers(table.column(source["both"]), file, source["both"])
        date, clock = both // 1_000_000_000, both % 1_000_000_000
    else:
        date = _numbers(table.column(source["date"]), file, source["date"])
        clock = _numbers(table.column(source["time"]), file, source["time"])
    year, month, day = date // 10000, date // 100 % 100, date % 100
    months = (year - 1970) * 12 + month - 1
    days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    days += day - 1
    ms = clock % 1000
    hms = clock // 1000
    seconds = hms // 10000 * 3600 + hms // 100 % 100 * 60 + hms % 100
    bad = (month < 1) | (month > 12) | (day < 1) | (day > 31) | (seconds >= 86400)
    bad |= (year < 1970) | (year > 2200)
    stamp = days * 86_400_000_000 + seconds * 1_000_000 + ms * 1000
    # A time that is none becomes null and is counted as a row without time.
    return pa.array(stamp, mask=bad).cast(pa.timestamp("us"))


def _numbers(column: pa.ChunkedArray, file: str, name: str) -> np.ndarray:
    try:
        return pc.cast(column, pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{file}: column {name!r} must hold digits: {error}"
        ) from error


def _coded(column: pa.ChunkedArray, codes: Mapping[Any, int]) -> pa.Array:
    """Vendor codes as ours; what is not in `codes` becomes a rejected code."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    out = np.full(len(column), _UNKNOWN_CODE, dtype=np.int8)
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text:
        encoded = column.dictionary_encode().combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):
            if encoded.num_chunks == 0:
                return pa.array(out)
            encoded = encoded.chunk(0)
        text = {str(k): v for k, v in codes.items()}
        # The last entry stands for null.
        known = [
            text.get(str(x), _UNKNOWN_CODE) for x in encoded.dictionary.to_pylist()
        ]
        lookup = np.array([*known, _UNKNOWN_CODE], dtype=np.int8)
        index = encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
        return pa.array(lookup[index])
    values = column.to_numpy()
    for code, ours in codes.items():
        if isinstance(code, (int, float)) or str(code).lstrip("-").isdigit():
            out[values == float(code)] = ours
    return pa.array(out)
