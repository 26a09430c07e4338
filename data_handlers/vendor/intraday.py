"""Bars and ticks of vendors, translated into the tables of `aggregate.schema`.

`choose` finds how a file is laid out: by the sources of a mapping, else by its columns
among the package's own tables and the layouts of the shipped presets. `translate` turns
its rows into normalised ones. Times may be timestamps, text, or digits, as one number
(YYYYMMDDHHMMSSmmm and shorter) or as day and clock in two columns.

The Shanghai layouts were checked on real files. The Shenzhen ones carry the exchange's
own field names (its STEP feed, messages 300191 and 300192) and are checked on made
files only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from data_handlers.aggregate import reading
from data_handlers.aggregate.schema import CANCEL, NEW, Session
from data_handlers.codes import (
    a_share_code,
    check_spelling,
    code_of_file,
    futures_code,
)
from data_handlers.vendor.mapping import (
    FILENAME,
    INTRADAY,
    NEW_ORDER,
    TABLES,
    Source,
    load_mapping,
    preset_names,
)
from data_handlers.vendor.text import numbers

__all__ = [
    "OWN",
    "choose",
    "detect",
    "first_and_last",
    "spell",
    "translate",
    "vendor_columns",
]

_KIND_OF = {table: kind for kind, table in INTRADAY.items()}
_UNKNOWN_CODE = 99
#: Name of the layouts of the package's own tables.
OWN = "normalised"
_SIDES = ("bid_price", "bid_volume", "ask_price", "ask_volume")
#: Presets whose layouts need no mapping: their columns are nobody else's.
_RECOGNISED = ("shanghai_ticks", "shenzhen_ticks")


@cache
def _known() -> tuple[Source, ...]:
    """Layouts that are recognised, the most specific first."""
    own = [
        Source(OWN, _KIND_OF[t], (), {n: (n,) for n in TABLES[t].names}) for t in TABLES
    ]
    for count in (10, 5, 1):
        pattern = {key: f"{key}_{{}}" for key in _SIDES}
        own.append(
            Source(
                OWN,
                "quotes",
                (),
                {"instrument": ("instrument",), "time": ("time",)},
                options={"levels": {**pattern, "first": 1, "count": count}},
            )
        )
    shipped = [s for name in _RECOGNISED for s in load_mapping(name).sources]
    return (*own, *shipped)


def choose(sources: Sequence[Source], table: str, file: str) -> Source:
    """Find the layout of a file: each column with the one name that the file has.

    Parameters
    ----------
    sources : sequence of Source
        Those of the table in the mapping; none, or one without columns, means that the
        layout is recognised.
    table : str
        "bars", "trades", "orders" or "quotes".
    file : str
        Path.

    Raises
    ------
    ValueError
        If no layout fits, naming the file and its columns.
    """
    described = [s for s in sources if s.columns]
    how = sources[0] if sources else None
    names = reading.columns_of(file, how)
    if not described:
        found = detect(names, table, file)
        if how is None:
            return found
        return replace(
            found,
            **{k: getattr(how, k) for k in ("encoding", "decimal", "skip", "footer")},
            units={**found.units, **how.units},
            options={**found.options, **how.options},
        )
    for source in described:
        if not _lacking(source, names):
            return _resolved(source, names)
    role, wanted = _lacking(described[0], names)[0]
    raise ValueError(
        f"{file} has no column {wanted} (for {role!r}, source "
        f"`{described[0].name}`); it has {list(names)[:14]}{_hint(table, names)}."
    )


def detect(columns: Sequence[str], table: str, where: str) -> Source:
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
    for source in _known():
        if source.kind == _KIND_OF[table] and not _lacking(source, columns):
            return _resolved(source, columns)
    need = TABLES[table].required if table in TABLES else ["instrument", "time", "…"]
    raise ValueError(
        f"{where}: no known layout of {table} has the columns {list(columns)[:14]}"
        f"{_hint(table, columns)}; rename them to {need}, or pass a mapping file "
        "(`--mapping`) that says which is which."
    )


def _hint(table: str, columns: Sequence[str]) -> str:
    fit = [
        name
        for name in preset_names()
        for source in load_mapping(name).of_kind(_KIND_OF[table])
        if not _lacking(source, columns)
    ]
    return f" (those of `--preset {fit[0]}`)" if fit else ""


def _lacking(source: Source, have: Sequence[str]) -> list[tuple[str, str]]:
    """Roles without a column in the file, and the names that would do."""
    schema = TABLES.get(INTRADAY[source.kind])
    optional = [c.name for c in schema.columns if not c.required] if schema else []
    out = []
    for role, names in source.columns.items():
        if isinstance(names, Mapping):
            out += [(role, repr(n)) for n in names.values() if n not in have]
        elif not set(names) & {*have, FILENAME, NEW_ORDER}:
            # Left out only where the source calls it as we do: it may be absent.
            if not (role in optional and (names == (role,) or source.name == OWN)):
                out.append((role, " or ".join(map(repr, names))))
    out += [("levels", repr(n)) for n in _level_columns(source) if n not in have]
    options = source.options
    if "sequence" in options and options["sequence"] not in have:
        out.append(("sequence", repr(options["sequence"])))
    if "cancels" in options and options["cancels"]["column"] not in have:
        out.append(("cancels", repr(options["cancels"]["column"])))
    return out


def _resolved(source: Source, have: Sequence[str]) -> Source:
    """Give each role the one name that the file has."""
    columns: dict[str, Any] = {}
    for role, names in source.columns.items():
        if isinstance(names, Mapping):
            columns[role] = names
        else:
            hit = [n for n in names if n in have or n in (FILENAME, NEW_ORDER)]
            columns.update({role: hit[0]} if hit else {})
    return replace(source, columns=columns)


def vendor_columns(layout: Source) -> list[str]:
    """Return the columns of the vendor's file that are read."""
    out: list[str] = []
    for source in layout.columns.values():
        out += list(source.values()) if isinstance(source, Mapping) else [source]
    out += _level_columns(layout, all_levels=True)
    options = layout.options
    out += [options["sequence"]] if "sequence" in options else []
    out += [options["cancels"]["column"]] if "cancels" in options else []
    out += list(options.get("expect") or ())
    return [c for c in dict.fromkeys(out) if c not in (FILENAME, NEW_ORDER)]


def _level_columns(source: Source, all_levels: bool = False) -> list[str]:
    """Vendor's level columns of quotes: of prices the best ones are enough."""
    levels = source.options.get("levels")
    if not levels:
        return []
    first, count = levels["first"], levels["count"]
    return [
        levels[key].format(k)
        for key in _SIDES
        for k in range(first, first + count)
        if all_levels or key.endswith("volume") or k == first
    ]


def translate(
    table: pa.Table,
    layout: Source,
    file: str,
    tz: str,
    session: Session | None = None,
    codes: str = "cn",
) -> tuple[pa.Table, pa.Table | None]:
    """Turn a vendor's rows into normalised ones.

    Parameters
    ----------
    table : pyarrow.Table
        Rows with the layout's columns.
    layout : Source
        From `choose` or `detect`.
    file : str
        Path, for messages and ``@filename``.
    tz : str
        Zone of the exchange.
    session : Session, optional
        Says which trades were made in an auction, where `side_from_ids` must know.
    codes : {"cn", "futures", "asis"}, default "cn"
        Write codes as Qlib does where they can be told, those of futures as exchange
        and product, or keep them.

    Returns
    -------
    (Table, Table or None)
        The normalised rows; cancellations found among trades, as orders.

    Raises
    ------
    ValueError
        For a missing column, or a value that cannot be read, naming file, column and
        row.
    """
    missing = [c for c in vendor_columns(layout) if c not in table.column_names]
    needed = {repr(c) for c in missing} & {n for _, n in _lacking_of(layout, table)}
    if needed:
        raise ValueError(
            f"{file} has no column {min(needed)} (source `{layout.name}`); it has "
            f"{table.column_names[:14]}."
        )
    options = layout.options
    for column, allowed in (options.get("expect") or {}).items():
        if column in table.column_names:
            _check_expected(table, column, allowed, file)
    if "sequence" in options:
        table = _sorted(table, layout)
    out: dict[str, Any] = {}
    for name, source in layout.columns.items():
        if name == "instrument":
            out[name] = _instrument(table, source, file, codes)
        elif name in ("time", "datetime"):
            out[name] = _time(table, source, options.get("tz"), tz, file)
        elif source == NEW_ORDER:
            out[name] = pa.array(np.full(table.num_rows, NEW, dtype=np.int8))
        elif source not in table.column_names:
            continue
        elif name in options.get("values", ()):
            out[name] = _coded(table.column(source), options["values"][name])
        elif name in ("contract", "buy_id", "sell_id", "order_id", "side", "action"):
            out[name] = table.column(source)
        else:
            out[name] = _number(table, source, name, layout, file)
    if "levels" in options:
        first, count = options["levels"]["first"], options["levels"]["count"]
        for key in _SIDES:
            for k in range(count):
                source = options["levels"][key].format(first + k)
                if source in table.column_names:
                    role = key.partition("_")[2]
                    out[f"{key}_{k + 1}"] = _number(table, source, role, layout, file)
    if options.get("side_from_ids"):
        buy, sell = out["buy_id"].to_numpy(), out["sell_id"].to_numpy()
        side = np.where((buy > 0) & (sell > 0), np.sign(buy - sell), 0)
        if session is not None:
            side = np.where(_continuous(out["time"], session), side, 0)
        out["side"] = pa.array(side.astype(np.int8))
    result = pa.table(out)
    if "cancels" not in options:
        return result, None
    marks = table.column(options["cancels"]["column"])
    is_cancel = pc.is_in(
        pc.cast(marks, pa.string()),
        value_set=pa.array([str(v) for v in options["cancels"]["values"]]),
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


def _sorted(table: pa.Table, layout: Source) -> pa.Table:
    """Rows sorted by instrument, then the vendor's sequence; nothing if they are."""
    seq = table.column(layout.options["sequence"]).to_numpy()
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
    if source != FILENAME:
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


def _lacking_of(layout: Source, table: pa.Table) -> list[tuple[str, str]]:
    named = {
        role: names if isinstance(names, Mapping) else (names,)
        for role, names in layout.columns.items()
    }
    return _lacking(replace(layout, columns=named), table.column_names)


def _check_expected(table: pa.Table, column: str, allowed: Any, file: str) -> None:
    options = {str(a) for a in (allowed if isinstance(allowed, list) else [allowed])}
    for value in table.column(column).unique().to_pylist():
        text = str(int(value)) if isinstance(value, float) else str(value)
        if value is not None and text not in options:
            raise ValueError(
                f"{file}: column {column!r} must be {sorted(options)}, got {text!r}; "
                "the mapping is for another kind of file."
            )


def spell(code: str, codes: str, at: str = "") -> str:
    """Write a code by the mapping's `codes`: as Qlib does, or in upper case.

    Raises
    ------
    ValueError
        With `at`, if it is no A-share code but holds one.
    """
    if codes == "futures":
        return futures_code(code) or code.strip().upper()
    if codes != "cn":
        return code.strip().upper()
    known = a_share_code(code)
    if known is None and at:
        check_spelling(code.strip(), at)
    return known or code.strip()


def _instrument(table: pa.Table, source: str, file: str, codes: str) -> Any:
    if source == FILENAME:
        label = spell(code_of_file(file), codes, f"the name of {file}")
        zeros = pa.array(np.zeros(table.num_rows, dtype=np.int32))
        return pa.DictionaryArray.from_arrays(zeros, pa.array([label]))
    at = f"{file}, column {source!r},"
    column = reading.as_text(table.column(source))
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = []
    for chunk in column.unify_dictionaries().chunks:
        names = [spell(str(x), codes, at) for x in chunk.dictionary.to_pylist()]
        if "" in names:
            raise ValueError(f"{at} has rows without a code; every row needs its own.")
        labels = pa.array(names)
        chunks.append(pa.DictionaryArray.from_arrays(chunk.indices, labels))
    kind = pa.dictionary(pa.int32(), pa.string())
    return (
        pa.chunked_array(chunks, type=kind) if not chunks else pa.chunked_array(chunks)
    )


def _number(table: pa.Table, source: str, role: str, layout: Source, file: str) -> Any:
    """One column of numbers in the table's unit."""
    column = table.column(source)
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        at = f"{file}, column {source!r}"
        price = role not in ("volume", "amount")
        values = numbers(
            column.to_pandas(), at, decimal=layout.decimal, price=price
        ).to_numpy()
        column = pa.array(values)
        if not np.isnan(values).any() and role == "volume" and _whole(values):
            column = column.cast(pa.int64())
    elif pa.types.is_null(kind):
        column = pc.cast(column, pa.float64())
    scale = layout.scale("price" if role in _PRICES else role, source)
    if scale == 1:
        return column
    if scale < 1:  # by division, so that 123400 in e4 is 12.34 and not beside it
        return pc.divide(pc.cast(column, pa.float64()), float(round(1 / scale)))
    if pa.types.is_integer(column.type):
        return pc.multiply(column, pa.scalar(int(scale)))
    return pc.multiply(column, pa.scalar(scale))


_PRICES = ("open", "high", "low", "close", "price")


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.round(values)).all())


# -- times


def first_and_last(
    file: str, layout: Source, role: str, tz: str, rows: bool = False
) -> tuple[np.datetime64, np.datetime64, np.ndarray | None]:
    """Return the first and last moment of a file, and its days where they were read.

    Parameters
    ----------
    file : str
        Path.
    layout : Source
        From `choose`.
    role : str
        The time: "datetime" of bars, "time" of ticks.
    tz : str
        Zone of the exchange.
    rows : bool, default False
        Read the rows even where statistics give the bounds.

    Returns
    -------
    (datetime64, datetime64, datetime64[D] array or None)
        None where the statistics of a Parquet file gave the bounds.

    Raises
    ------
    ValueError
        If a time cannot be read, or there is none.
    """
    source = layout.columns[role]
    own = layout.options.get("tz")
    if isinstance(source, str):
        bounds = None if rows else reading.bounds_of(file, source)
        if bounds is not None:
            low, high = _time(bounds, source, own, tz, file).to_numpy()
            return low, high, None
        table = reading.read_file(file, [source], layout)
    else:
        table = reading.read_file(file, list(source.values()), layout)
    when = _time(table, source, own, tz, file)
    if isinstance(when, pa.ChunkedArray):
        when = when.combine_chunks()
    stamps = when.drop_null().to_numpy(zero_copy_only=False)
    if not len(stamps):
        raise ValueError(f"{file}: column {source!r} ({role}) has no time.")
    days = np.unique(stamps.astype("datetime64[D]"))
    return stamps.min(), stamps.max(), days


def _time(table: pa.Table, source: Any, own_tz: str | None, tz: str, file: str) -> Any:
    """Exchange-local times, without a zone."""
    if isinstance(source, Mapping):
        date, clock = (table.column(source[k]) for k in ("date", "time"))
        column = _date_and_clock(date, clock, f"{file}, columns {dict(source)}")
    else:
        at = f"{file}, column {source!r}"
        column = _plain(table.column(source))
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            column = _digits(column, at)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = _text_time(column, at)
        if not pa.types.is_timestamp(column.type):
            raise ValueError(
                f"{at} must be a time such as 2024-03-04 09:31:00, got {column.type}; "
                "days and clock times in two columns are given as {date: column, time: "
                "column}."
            )
    if column.type.tz is not None or own_tz not in (None, tz):
        if column.type.tz is None:
            column = pc.assume_timezone(column, str(own_tz), ambiguous="earliest")
        # Not safe: nanoseconds below a microsecond are cut off.
        column = pc.cast(column, pa.timestamp("us", tz), safe=False)
        column = pc.local_timestamp(column)
    return column


def _plain(column: Any) -> Any:
    if pa.types.is_dictionary(column.type):
        return pc.cast(column, column.type.value_type)
    return column


def _text_time(column: Any, at: str) -> Any:
    """Read times from text: ISO, 2024/3/4 9:31, digits."""
    try:
        return pc.cast(column, pa.timestamp("us"))
    except pa.ArrowInvalid:
        pass
    encoded = pa.chunked_array([column]) if isinstance(column, pa.Array) else column
    encoded = encoded.dictionary_encode().unify_dictionaries()
    texts = pd.Series(
        encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else [],
        dtype="str",
    ).str.strip()
    if texts.str.fullmatch(r"\d{12,17}").all():
        return _digits(pc.cast(column, pa.int64()), at)
    given = texts.str.fullmatch(
        r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}[ T]+\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?"
        r"( ?(Z|[+-]\d{2}:?\d{2}))?"
    )
    zoned = texts.str.contains(r"(?:Z|[+-]\d{2}:?\d{2})$", regex=True) & given
    clean = texts.where(given).str.replace(r"[/.](?=\d{1,2}[/. T])", "-", regex=True)
    if zoned.any() and not zoned[given].all():
        raise ValueError(f"{at} has times with and without a zone; write them one way.")
    found = pd.to_datetime(
        clean, format="mixed", errors="coerce", utc=bool(zoned.any())
    )
    bad = found.isna() & ~texts.isin(["", "-", "--", "nan", "None"])
    if bad.any():
        text = texts[bad].iloc[0]
        row = int(pc.index(column, pa.scalar(text, column.type)).as_py()) + 1
        raise ValueError(
            f"{at} has the value {text!r} in data row {row}, which is no time; write "
            "2024-03-04 09:31:00, or 20240304093100 as one number."
        )
    stamps = pa.array(found.dt.tz_localize(None) if zoned.any() else found)
    stamps = pc.cast(stamps, pa.timestamp("us"), safe=False)
    index = pa.concat_arrays([chunk.indices for chunk in encoded.chunks])
    out = stamps.take(index)
    return pc.assume_timezone(out, "UTC") if zoned.any() else out


#: Digits of a moment as one number, and of what is missing behind them.
_MOMENTS = {17: 1, 14: 10**3, 12: 10**5}
_CLOCKS = {2400: 10**5, 240_000: 10**3}


def _digits(column: Any, at: str) -> pa.Array:
    """Timestamps from YYYYMMDDHHMMSSmmm, YYYYMMDDHHMMSS or YYYYMMDDHHMM."""
    values, blank = _whole_numbers(column, at)
    seen = values[~blank & (values > 0)]
    length = len(str(int(np.median(seen)))) if len(seen) else 17
    if length not in _MOMENTS:
        row = int(np.flatnonzero(~blank & (values > 0))[0]) + 1
        raise ValueError(
            f"{at} has the number {seen[0]} in data row {row}, of {length} digits, as "
            "a time; known are YYYYMMDDHHMMSSmmm, YYYYMMDDHHMMSS and YYYYMMDDHHMM. "
            "Write seconds since 1970 as timestamps, and days and clock times in two "
            "columns as {date: column, time: column}."
        )
    both = values * _MOMENTS[length]
    return _stamps(both // 1_000_000_000, both % 1_000_000_000, blank)


def _date_and_clock(date: Any, clock: Any, at: str) -> pa.Array:
    """Timestamps from days and clock times: digits, text, or dates and times."""
    date, clock = _plain(date), _plain(clock)
    if pa.types.is_date(date.type) or pa.types.is_timestamp(date.type):
        date = pc.strftime(date, format="%Y%m%d")
    if pa.types.is_time(clock.type):
        clock = pc.replace_substring(pc.cast(clock, pa.string()), ":", "")
        clock = pc.utf8_slice_codeunits(clock, 0, 6)
    date, no_date = _whole_numbers(date, at, drop="-/. ")
    clock, no_clock = _whole_numbers(clock, at, drop=": ")
    seen = clock[~no_clock]
    middle = float(np.median(seen)) if len(seen) else np.inf
    scale = next((s for most, s in _CLOCKS.items() if middle < most), 1)
    return _stamps(date, clock * scale, no_date | no_clock)


def _stamps(date: np.ndarray, clock: np.ndarray, blank: np.ndarray) -> pa.Array:
    """Timestamps from YYYYMMDD and HHMMSSmmm; what is none becomes null."""
    year, month, day = date // 10000, date // 100 % 100, date % 100
    months = (year - 1970) * 12 + month - 1
    days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    days += day - 1
    ms = clock % 1000
    hms = clock // 1000
    seconds = hms // 10000 * 3600 + hms // 100 % 100 * 60 + hms % 100
    bad = (month < 1) | (month > 12) | (day < 1) | (day > 31) | (seconds >= 86400)
    bad |= (year < 1970) | (year > 2200) | blank
    stamp = days * 86_400_000_000 + seconds * 1_000_000 + ms * 1000
    # A time that is none becomes null and is counted as a row without time.
    return pa.array(stamp, mask=bad).cast(pa.timestamp("us"))


def _whole_numbers(
    column: Any, at: str, drop: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, and where there is none."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        for mark in drop:
            column = pc.replace_substring(column, mark, "")
    try:
        column = pc.cast(column, pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{at} must hold digits or times: {error}") from error
    blank = pc.is_null(column).to_numpy(zero_copy_only=False).astype(bool)
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False), blank


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
