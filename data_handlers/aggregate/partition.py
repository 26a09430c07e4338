"""One partition: read its files, compute its stock-days, write them with an account."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from qlib.log import get_module_logger

from data_handlers.aggregate import reading
from data_handlers.aggregate.columns import dictionary_codes, microseconds, midnights
from data_handlers.aggregate.minute import (
    LOST,
    REJECT_REASONS,
    SPOILT,
    StockDays,
    check_lost,
    check_session,
    check_stamp,
    early_closes,
    early_days,
    first_values,
    join_stock_days,
    reduce_minutes,
)
from data_handlers.aggregate.plan import (
    KINDS,
    Options,
    Part,
    day_of_path,
    features_of,
)
from data_handlers.aggregate.schema import FLOW_FIELDS, Session
from data_handlers.aggregate.tick_kernels import DAY_US
from data_handlers.aggregate.ticks import TICK_NAMES, TickRows, aggregate_ticks
from data_handlers.aggregate.windows import bar_features, day_windows
from data_handlers.codes import CODE, code_of_file, is_index
from data_handlers.files import write_parquet
from data_handlers.vendor.intraday import OWN, choose, spell, translate, vendor_columns
from data_handlers.vendor.mapping import FILENAME, Source

__all__ = [
    "EARLY",
    "KEYS",
    "LAYOUT",
    "account_of",
    "add_account",
    "compute_part",
    "first_of",
    "key_table",
    "part_file",
]

KEYS = ["datetime", "instrument"]
# Features hardly repeat: looking for repeats costs more than writing. Readers skip row
# groups by the statistics of the keys.
LAYOUT: dict[str, Any] = {"use_dictionary": ["instrument"], "write_statistics": KEYS}
_ACCOUNT = b"qlib_ext.account"
#: Ticks processed at once; about 120 bytes each at the peak.
_TICKS_AT_ONCE = 16_000_000
#: Note on days whose last half-hour has no trade.
EARLY = "days that end early"
#: Days that circuit breakers ended.
_BREAKERS = {np.datetime64("2016-01-04"), np.datetime64("2016-01-07")}
_MIXED = 0.1  # of the bars in another unit than the rest of their days
_FOREIGN = "codes of no known A-share style, kept as they are; they join no store"

logger = get_module_logger("aggregate")


def part_file(folder: Path, key: str) -> Path:
    """File of a partition."""
    return folder / ".parts" / f"{key}.parquet"


def account_of(folder: Path, key: str, mark: str) -> dict[str, Any] | None:
    """Account of a finished partition; None if it must be computed."""
    path = part_file(folder, key)
    try:
        meta = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, OSError) as error:
        logger.warning("%s is damaged (%s) and computed again", path, error)
        return None
    account = json.loads(meta.get(_ACCOUNT, b"{}"))
    return account if account.get("fingerprint") == mark else None


def compute_part(
    part: Part,
    mark: str,
    folder: str,
    options: Options,
    session: Session,
    layouts: Mapping[str, tuple[Source, ...]],
    threads: int,
) -> str | None:
    """Compute and write one partition. Returns the message of a failure."""
    try:
        if options.kind == "ms":
            table, account = _bars_part(part, options, session, layouts, threads)
        elif options.kind == "bars":
            table, account = _windows_part(part, options, session, layouts)
        else:
            table, account = _ticks_part(part, options, session, layouts, threads)
    except ValueError as error:
        return f"{part.key}: {error}"
    account["fingerprint"] = mark
    if session.name == "a_share":
        names = table.column("instrument").unique().to_pylist()
        foreign = sorted(n for n in map(str, names) if not CODE.fullmatch(n))
        if foreign:
            account["notes"][_FOREIGN] = foreign
        if indices := sorted(n for n in map(str, names) if is_index(n)):
            account["notes"]["codes of indices, beside the stocks"] = indices
    account["coverage"] = {
        n: int(np.isfinite(table.column(n).to_numpy()).sum())
        for n in (
            f.name for f in features_of(options.kind, session, options.bar_minutes)
        )
    }
    account["rows_out"] = table.num_rows
    table = table.replace_schema_metadata({_ACCOUNT: json.dumps(account).encode()})
    write_parquet(part_file(Path(folder), part.key), table, compression="lz4", **LAYOUT)
    return None


def _bars_part(
    part: Part,
    options: Options,
    session: Session,
    layouts: Mapping[str, tuple[Source, ...]],
    threads: int,
) -> tuple[pa.Table, dict[str, Any]]:
    def pieces() -> Iterator[pa.Table]:
        for file in part.files["bars"]:
            layout = choose(layouts.get("bars", ()), "bars", file)
            columns, stock = vendor_columns(layout), layout.columns["instrument"]
            for table in reading.iter_stocks(file, columns, stock, how=layout):
                yield translate(table, layout, file, session.tz, codes=options.codes)[0]

    days = _stream_bars(pieces, options, session, threads)
    slots = session.slots(options.bar_minutes)
    half = 30 // options.bar_minutes
    named = {np.datetime64(d, "D") for d in session.early_close}
    short = early_days(days.day, days.facts["last_slot"], slots, half)
    found = {d: n for d, n in short.items() if np.datetime64(d, "D") not in named}
    if session.name == "a_share":
        _check_early({np.datetime64(d, "D") for d in found} - _BREAKERS)
    if found:
        # Days that end early are known only now; their ends enter a second pass.
        ends = {
            str(np.datetime64(d, "D")): _time_of(session, n * options.bar_minutes)
            for d, n in found.items()
        }
        session = replace(
            session, early_close={**session.early_close, **early_closes(ends)}
        )
        days = _stream_bars(pieces, options, session, threads)
        days.notes[EARLY] = sorted(ends)
    days = days.by_day()
    first = first_of(days.day, days.code)
    if not first.all():
        facts = {name: days.facts[name] for name in ("close", "volume")}
        other = first_values(facts, np.flatnonzero(~first), len(first)).sum()
        days.notes["stock-days found in two files (first kept)"] = int((~first).sum())
        if other:
            days.notes["of these with other values"] = int(other)
        days = days.take(first)
    days.blank()
    columns = days.columns()
    del columns["last_slot"]
    account = {
        "rows_in": {"bars": days.rows_in},
        "rejected": {"bars": days.rejected},
        "notes": days.notes,
        "missing": (
            ["amount"] if len(days.day) and np.isnan(columns["amount"]).all() else []
        ),
    }
    return key_table(midnights(days.day), days.code, days.labels, columns), account


def _windows_part(
    part: Part,
    options: Options,
    session: Session,
    layouts: Mapping[str, tuple[Source, ...]],
) -> tuple[pa.Table, dict[str, Any]]:
    """Minute bars of a few instruments: read whole, put side by side."""
    pieces: list[Any] = []
    lots: dict[str, Any] = {}
    for file in part.files["bars"]:
        layout = choose(layouts.get("bars", ()), "bars", file)
        lots |= layout.options.get("multiplier") or {}
        table = reading.read_file(file, vendor_columns(layout), layout)
        pieces.append(
            translate(table, layout, file, session.tz, codes=options.codes)[0]
        )
    rows = pa.concat_tables(
        [reading.plain_codes(piece) for piece in pieces], promote_options="permissive"
    )
    found = day_windows(rows, session, options.bar_minutes, options.stamp)
    names = [f.name for f in bar_features(session.slots(options.bar_minutes))]
    scale = np.array([lots.get(name, 1.0) for name in found.labels])
    columns = {
        "close": found.close,
        "volume": found.volume * scale[found.code],
        "amount": np.full(len(found.code), np.nan),
        **{name: found.values[:, k] for k, name in enumerate(names)},
    }
    account = {
        "rows_in": {"bars": found.rows_in},
        "rejected": {"bars": found.rejected},
        "notes": {f"days left out: {why}": of for why, of in found.left_out.items()},
        "missing": [],
    }
    order = np.lexsort((found.code, found.day))
    columns = {name: values[order] for name, values in columns.items()}
    return (
        key_table(
            midnights(found.day[order]), found.code[order], found.labels, columns
        ),
        account,
    )


def _stream_bars(
    pieces: Any, options: Options, session: Session, threads: int
) -> StockDays:
    """Reduce pieces in threads while the next piece is read."""
    done: list[StockDays] = []
    with ThreadPoolExecutor(threads) as pool:
        jobs: list[Future] = []
        for piece in pieces():
            jobs.append(
                pool.submit(
                    reduce_minutes,
                    piece,
                    session=session,
                    bar_minutes=options.bar_minutes,
                    stamp=options.stamp,
                    amount=options.amount,
                    threads=1,
                    infer_early=False,
                    check=False,
                )
            )
            del piece
            while len(jobs) > threads:  # memory: never more pieces than this wait
                done.append(jobs.pop(0).result())
        done += [job.result() for job in jobs]
    days = join_stock_days(done)
    if days.rejected.get(other := REJECT_REASONS[8], 0) > _MIXED * days.rows_in:
        raise ValueError(
            f"{days.rejected[other]:,} of {days.rows_in:,} bars are {other}, by their "
            "price or by amount / volume: two units in one file (shares and lots, CNY "
            "and fen)? Mend these rows, or split the file and declare both."
        )
    outside = days.rejected.get("outside the session", 0)
    check_session(outside, days.rows_in, session)
    check_stamp(*days.edges, options.stamp, session)
    lost, spoilt = (days.notes.get(note, 0) for note in (LOST, SPOILT))
    check_lost(lost, spoilt, len(days.day), days.rejected)
    return days


def _check_early(days: set) -> None:
    """Refuse days on which no stock trades to the end."""
    if days:
        first = min(days)
        raise ValueError(
            f"on {first} no stock trades in the last half-hour, and the A-share market "
            "has not closed early since 2016: fetched while the day ran, or bars lost? "
            "Fetch it again or take its rows out; if it did close early, declare it in "
            f'the mapping file: `early_close: {{"{first}": "11:30"}}`.'
        )


def _time_of(session: Session, minutes: int) -> str:
    """Clock time after that many minutes of the session."""
    for start, end in session.intervals:
        first = start.hour * 60 + start.minute
        last = end.hour * 60 + end.minute
        if minutes <= last - first:
            return f"{(first + minutes) // 60:02d}:{(first + minutes) % 60:02d}"
        minutes -= last - first
    raise ValueError(f"the session {session.name!r} is shorter than that.")


def _ticks_part(
    part: Part,
    options: Options,
    session: Session,
    layouts: Mapping[str, tuple[Source, ...]],
    threads: int,
) -> tuple[pa.Table, dict[str, Any]]:
    tables = [t for t in ("trades", "orders", "quotes") if part.files.get(t)]
    use: dict[str, list[tuple[str, Source]]] = {}
    for table in tables:
        use[table] = [
            (f, choose(layouts.get(table, ()), table, f)) for f in part.files[table]
        ]
    rows = sum(reading.rows_of(f) for t in tables for f in part.files[t])
    frames: list[pd.DataFrame] = []
    account: dict[str, Any] = {
        "rows_in": {t: 0 for t in tables},
        "rejected": {},
        "notes": {},
        "missing": [],
    }
    for wanted in _stock_runs(use, rows, options.codes):
        result = _ticks_of(part, use, wanted, options, session, threads)
        if result is None:
            continue
        result.blank()
        frames.append(result.frame)
        add_account(account, vars(result))
    if not frames or not any(len(f) for f in frames):
        raise ValueError(
            f"no usable trade on {part.day} in {part.files['trades'][0]}; rejected: "
            f"{account['rejected'].get('trades')}. If the file's name carries another "
            "date than its rows, rename it."
        )
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.sort_values("instrument", ignore_index=True)
    wanted_tables = KINDS[options.kind][2]
    for table in ("orders", "quotes"):
        if table in wanted_tables and not frame[table].sum():
            account["missing"].append(table)
    whole = frame[frame["close"].notna()]
    for name, what in (("l2_act_buy", "side"), ("l2_buy_hhi", "order ids")):
        if len(whole) and whole[name].isna().all():
            account["missing"].append(f"trades' {what}")
    others = {*TICK_NAMES, *FLOW_FIELDS}.difference(KINDS[options.kind][0])
    frame = frame.drop(columns=sorted(others))
    return pa.Table.from_pandas(frame, preserve_index=False), account


def _ticks_of(
    part: Part,
    use: Mapping[str, list[tuple[str, Source]]],
    wanted: set[str] | None,
    options: Options,
    session: Session,
    threads: int,
) -> TickRows | None:
    """Read and reduce the ticks of some stocks; None if they have no trade.

    A function of its own, so that its tables are gone before the next stocks are read.
    """
    got: dict[str, list[pa.Table]] = {t: [] for t in use}
    gone: list[pa.Table] = []
    for table in use:
        for file, layout in use[table]:
            piece = _tick_rows(file, layout, wanted, options.codes)
            if piece is None:
                continue
            plain, cancels = translate(
                piece, layout, file, session.tz, session, options.codes
            )
            if day_of_path(file) is None:  # it may hold other partitions' days too
                plain = _of_day(plain, part.day)
                cancels = None if cancels is None else _of_day(cancels, part.day)
            got[table].append(plain)
            if cancels is not None and cancels.num_rows and "orders" in use:
                gone.append(cancels)
    if not got["trades"]:
        return None
    joined = {t: _join(x) for t, x in got.items() if x}
    if gone:
        # Behind the orders of their moment: none is cancelled before it is placed.
        joined["orders"] = _in_time(_join([*got["orders"], *gone]))
    return aggregate_ticks(
        joined["trades"],
        joined.get("orders"),
        joined.get("quotes"),
        day=part.day,
        session=session,
        publishes_all=options.publishes_all,
        threads=threads,
    )


def _stock_runs(
    use: Mapping[str, list[tuple[str, Source]]], rows: int, codes: str
) -> list[set[str] | None]:
    """Choose the stocks to process together; one None is all of them."""
    if rows <= _TICKS_AT_ONCE:
        return [None]
    counts: dict[str, int] = {}
    for file, layout in use["trades"]:
        column = layout.columns["instrument"]
        if column == FILENAME:
            found = {code_of_file(file): reading.rows_of(file)}
        else:
            found = reading.stock_counts(file, column, layout)
        for spelt, n in found.items():
            code = spell(spelt, codes)
            counts[code] = counts.get(code, 0) + n
    trades = max(sum(counts.values()), 1)
    runs = reading.split_stocks(counts, max(int(_TICKS_AT_ONCE * trades / rows), 1))
    return [set(run) for run in runs]


def _tick_rows(
    file: str, layout: Source, wanted: set[str] | None, codes: str
) -> pa.Table | None:
    columns, stock = vendor_columns(layout), layout.columns["instrument"]
    if stock == FILENAME and wanted is not None:
        if spell(code_of_file(file), codes) not in wanted:
            return None
        wanted = None
    if wanted is None:
        return reading.read_file(file, columns, layout)
    # Row groups are skipped by their codes only where the file spells them as we do.
    spelt = sorted(wanted) if layout.name == OWN else None
    return reading.read_stocks(
        file, columns, stock, lambda c: spell(c, codes) in wanted, spelt, layout
    )


def _join(pieces: list[pa.Table]) -> pa.Table:
    if len(pieces) == 1:
        return pieces[0]
    return pa.concat_tables(pieces, promote_options="permissive").unify_dictionaries()


def _of_day(table: pa.Table, day: str | None) -> pa.Table:
    """Rows of one day of a file that holds several, and those without a time."""
    days = microseconds(table.column("time"), "time") // DAY_US
    mask = (days < 0) | (days == np.datetime64(day, "D").astype(np.int64))
    return table if mask.all() else table.filter(pa.array(mask))


def _in_time(table: pa.Table) -> pa.Table:
    """Rows sorted by instrument and time; those of one moment keep their order."""
    _, code = dictionary_codes(table.column("instrument"))
    when = microseconds(table.column("time"), "time")
    return table.take(pa.array(np.lexsort((when, code))))


def add_account(total: Mapping[str, dict], more: Mapping[str, Any]) -> None:
    """Add rows in, rejected rows and notes of one account to those of another."""
    for table, n in more["rows_in"].items():
        total["rows_in"][table] = total["rows_in"].get(table, 0) + n
    for table, reasons in more["rejected"].items():
        mine = total["rejected"].setdefault(table, {})
        for why, n in reasons.items():
            mine[why] = mine.get(why, 0) + n
    for note, value in more["notes"].items():
        if isinstance(value, list):
            held = total["notes"].setdefault(note, [])
            held += [v for v in value if v not in held]
        else:
            total["notes"][note] = total["notes"].get(note, 0) + value


def first_of(day: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Mask of rows, sorted by both, whose (day, code) differs from the row before."""
    first = np.ones(len(day), dtype=bool)
    first[1:] = (day[1:] != day[:-1]) | (code[1:] != code[:-1])
    return first


def key_table(
    when: np.ndarray,
    code: np.ndarray,
    labels: np.ndarray,
    columns: Mapping[str, np.ndarray],
) -> pa.Table:
    """Table of `KEYS` and columns; instruments as codes, so no row handles text."""
    instrument = pa.DictionaryArray.from_arrays(
        pa.array(code.astype(np.int32)), pa.array(labels, pa.string())
    )
    values = {k: np.ascontiguousarray(x) for k, x in columns.items()}
    return pa.table({"datetime": when, "instrument": instrument, **values})
