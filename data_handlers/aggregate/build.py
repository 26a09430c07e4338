"""Build a feature store: source files → partitions → one Parquet file a year.

A partition is a day of ticks or a month of bars. Each becomes one small Parquet file
below ``<store>/<kind>/.parts``, written beside and renamed, with its account (rows in
and out, rejected rows, options, fingerprint of its source files) inside. A build that
is killed at any moment loses at most the partitions in work: the next one finds the
finished ones by their fingerprint and computes only the rest. When all are there, years
that changed are assembled to ``<store>/<kind>/<year>.parquet``, again beside and
renamed, so a reader sees the old or the new year and never half of one. Stock-days of
these files that the build's source does not hold stay, so a store grows by builds of
its newest files; to take some away, remove the yearly file and build the year anew.

Partitions run through joblib: local processes, or a Ray or Dask cluster that shares the
file system. The overnight return needs the day before, which may lie in another
partition or build; it is added when years are assembled, from closes that are kept in
``.parts`` for every day of the yearly files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from joblib import Parallel, delayed
from qlib.log import get_module_logger
from tqdm import tqdm

from data_handlers.aggregate import reading
from data_handlers.aggregate.minute import (
    MINUTE_FEATURES,
    MINUTE_NAMES,
    StockDays,
    check_session,
    check_stamp,
    dictionary_codes,
    early_closes,
    early_days,
    join_stock_days,
    microseconds,
    midnights,
    overnight_returns,
    reduce_minutes,
)
from data_handlers.aggregate.schema import (
    FLOW_FIELDS,
    SCHEMA_VERSION,
    Session,
    get_session,
)
from data_handlers.aggregate.ticks import (
    FLOW_FEATURES,
    TICK_FEATURES,
    TICK_NAMES,
    TickRows,
    aggregate_ticks,
)
from data_handlers.aggregate.units import check_units
from data_handlers.aggregate.windows import bar_features, day_windows
from data_handlers.backends import check_backend, processes
from data_handlers.codes import CODE, code_of_file
from data_handlers.files import locked, store_lock, write_json, write_parquet
from data_handlers.vendor.intraday import (
    OWN,
    choose,
    first_and_last,
    spell,
    translate,
    vendor_columns,
)
from data_handlers.vendor.mapping import FILENAME, Source, VendorMapping, load_mapping
from data_handlers.vendor.text import is_text

__all__ = ["BuildReport", "build", "read_report"]

_KINDS = {
    "ms": (MINUTE_NAMES, MINUTE_FEATURES, ("bars",)),
    "l2": (TICK_NAMES, TICK_FEATURES, ("trades", "orders", "quotes")),
    "flow": (list(FLOW_FIELDS), FLOW_FEATURES, ("trades",)),
    # its columns follow from the session and the length of a bar
    "bars": ([], (), ("bars",)),
}
#: A source of these kinds without columns is recognised.
_ANY = {"ms": "minute", "l2": "trades", "flow": "trades", "bars": "minute"}
_OF_BARS = ("ms", "bars")
_KEYS = ["datetime", "instrument"]
# Features hardly repeat: looking for repeats costs more than writing. Readers skip row
# groups by the statistics of the keys.
_LAYOUT: dict[str, Any] = {"use_dictionary": ["instrument"], "write_statistics": _KEYS}
_DAY = re.compile(r"(?<!\d)((?:19|20)\d{2})[-_.]?([01]\d)[-_.]?([0-3]\d)(?!\d)")
_MONTH = re.compile(r"(?<!\d)((?:19|20)\d{2})[-_.]?([01]\d)(?!\d)")
_ACCOUNT = b"qlib_ext.account"
#: Columns of partitions that the overnight return is made of, and what it is added to.
_OVERNIGHT = ["open", "close", "factor", "ms_mom"]
#: No exchange of `schema.py` stays closed this long: such a gap is of the store.
_LONGEST_CLOSURE = np.timedelta64(20, "D")
#: Ticks processed at once; about 120 bytes each at the peak.
_TICKS_AT_ONCE = 16_000_000

_FOREIGN = "codes of no known A-share style, kept as they are; they join no store"

logger = get_module_logger("aggregate")


@dataclass(frozen=True)
class Part:
    """A partition: its key and the source files of each table."""

    key: str
    files: dict[str, list[str]]
    day: str | None = None


@dataclass(frozen=True)
class Options:
    """What all partitions of a build share; part of their fingerprint."""

    kind: str
    session: str
    early_close: dict[str, str]
    stamp: str
    bar_minutes: int
    amount: str
    publishes_all: Any
    codes: str
    mapping: dict[str, Any]


@dataclass
class BuildReport:
    """Account of a build.

    Attributes
    ----------
    kind : str
        "ms", "l2", "flow" or "bars".
    partitions, reused : int
        Partitions of the source; those found finished.
    rows_in : dict
        Rows of each source table.
    rows_out : int
        Rows of the partitions (stock-days).
    rows_kept : int
        Rows that the years hold besides, of days that earlier builds put there.
    rejected : dict
        Table to {reason: rows}.
    coverage : dict
        Feature to the share of rows in which it has a value; of all rows of the years
        for those that need the day before.
    missing : dict
        Table to the partitions whose source lacks it, for example orders.
    notes : dict
        Other facts, counted.
    years : list of int
        Years written or kept.
    seconds : float
        Wall time.
    bytes_out : int
        Size of the yearly files.
    options : dict
        Session, bar length and the rest.
    schema_version : int
        Version of the definitions.
    """

    kind: str
    partitions: int = 0
    reused: int = 0
    rows_in: dict[str, int] = field(default_factory=dict)
    rows_out: int = 0
    rows_kept: int = 0
    rejected: dict[str, dict[str, int]] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    years: list[int] = field(default_factory=list)
    seconds: float = 0.0
    bytes_out: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    schema_version: int = 0

    def text(self) -> str:
        """Write the account as lines for a terminal."""
        rate = sum(self.rows_in.values()) / max(self.seconds, 1e-9)
        lines = [
            f"{self.kind}: {self.rows_out:,} stock-days from "
            + ", ".join(f"{n:,} {t}" for t, n in self.rows_in.items())
            + f"; {self.partitions} partitions, {self.reused} of them found finished.",
            f"Years {self.years}, {self.bytes_out / 2**20:.1f} MiB "
            f"({self.bytes_out / max(self.rows_out + self.rows_kept, 1):.0f} bytes a "
            f"stock-day), "
            f"{self.seconds:.1f} s"
            + ("." if self.reused else f" ({rate / 1e6:.2f} million rows/s)."),
        ]
        if self.rows_kept:
            lines.append(f"kept of earlier builds: {self.rows_kept:,} stock-days")
        for table, reasons in self.rejected.items():
            for why, n in sorted(reasons.items(), key=lambda x: -x[1]):
                lines.append(f"rejected {table}: {n:,} {why}")
        for note, value in self.notes.items():
            if isinstance(value, list):
                more = f" and {len(value) - 5} more" if len(value) > 5 else ""
                value = ", ".join(map(str, value[:5])) + more
            lines.append(f"note: {note}: {value}")
        for table, parts in self.missing.items():
            lines.append(
                f"source without {table}: {len(parts)} of {self.partitions} partitions "
                f"({parts[0]} … {parts[-1]}); the features that need it are NaN there"
            )
        low = {k: v for k, v in self.coverage.items() if v < 0.999}
        lines.append(
            "coverage: "
            + (", ".join(f"{k} {v:.1%}" for k, v in low.items()) or "all features full")
        )
        return "\n".join(lines)


def build(
    kind: str,
    source: str | Path,
    out: str | Path,
    mapping: str | Path | Mapping | None = None,
    session: str | Session | None = None,
    stamp: str | None = None,
    bar_minutes: int | None = None,
    amount: str | None = None,
    publishes_all: Any = None,
    factors: pd.Series | None = None,
    daily: pd.DataFrame | None = None,
    start: str | None = None,
    end: str | None = None,
    workers: int = 1,
    backend: str = "local",
    address: str | None = None,
    progress: bool = True,
) -> BuildReport:
    """Build or continue a feature store.

    Parameters
    ----------
    kind : {"ms", "l2", "flow", "bars"}
        Minute-bar features, tick features, the daily flow by order size, or the minute
        bars of a day side by side.
    source : str or Path
        Folder of source files (or one file of bars); see `schema.py` for the plain
        layout and `data_handlers.vendor` for others.
    out : str or Path
        Store; the result lies in ``out/<kind>``.
    mapping : str, Path or dict, optional
        Preset or mapping file; its options are defaults for those below.
    session : str or Session, optional
        Default "a_share".
    stamp, bar_minutes, amount : optional
        Bars; see `minute.reduce_minutes`. Defaults "start", 1, "exact".
    publishes_all : optional
        Ticks; see `aggregate_ticks`. Default "auto".
    factors : Series, optional
        Adjustment factors by (datetime, instrument) for the overnight return, where
        bars carry none.
    daily : DataFrame, optional
        Day bars by (datetime, instrument) that units are checked against; see
        `units.check_units`.
    start, end : str, optional
        First and last day to build; partitions (months of bars, days of ticks)
        outside are not read.
    workers : int, default 1
        Processes. One uses threads for all cores instead.
    backend : {"local", "ray", "dask"}, default "local"
        Where they run. A cluster must see `source` and `out` under the same paths.
    address : str, optional
        Of the cluster; default is a local one.
    progress : bool, default True
        Show a progress bar with rate and time left.

    Returns
    -------
    BuildReport
        Also written to ``out/<kind>/report.json``.

    Raises
    ------
    ValueError
        For a bad option, no source files, partitions that cannot be built, or prices,
        volumes and amounts in another unit than CNY and shares; finished partitions
        are kept, and yearly files stay as they were. Also where a year to write holds
        other days that were built with other options or definitions.
    """
    began = time.perf_counter()
    if kind not in _KINDS:
        raise ValueError(f"`kind` must be one of {list(_KINDS)}, got {kind!r}.")
    check_backend(backend, workers)
    spec = load_mapping(
        {"sources": {kind: {"kind": _ANY[kind]}}} if mapping is None else mapping
    )
    given = {
        "session": session,
        "stamp": stamp,
        "bar_minutes": bar_minutes,
        "amount": amount,
        "publishes_all": publishes_all,
    }
    chosen = {
        **{"session": "a_share", "stamp": "start", "bar_minutes": 1},
        **{"amount": "exact", "publishes_all": "auto", "early_close": {}},
        **spec.shared,
        **{k: v for k, v in given.items() if v is not None},
    }
    exchange = get_session(chosen["session"])
    early = {str(k): str(v) for k, v in (chosen["early_close"] or {}).items()}
    exchange = replace(
        exchange, early_close={**exchange.early_close, **early_closes(early)}
    )
    exchange.slots(chosen["bar_minutes"])
    options = Options(
        kind=kind,
        session=exchange.name,
        early_close={str(d): str(t) for d, t in exchange.early_close.items()},
        stamp=chosen["stamp"],
        bar_minutes=chosen["bar_minutes"],
        amount=chosen["amount"],
        publishes_all=chosen["publishes_all"],
        codes=spec.codes,
        mapping={t: [asdict(s) for s in x] for t, x in spec.tables.items()},
    )
    folder = Path(out) / kind
    (folder / ".parts").mkdir(parents=True, exist_ok=True)
    with _one_builder(folder):
        parts = _plan(kind, str(source), spec, exchange, start, end)
        marks = {p.key: _fingerprint(p, options) for p in parts}
        todo = [p for p in parts if _account(folder, p.key, marks[p.key]) is None]
        if len(todo) < len(parts):
            logger.info(
                "%d of %d partitions are finished already",
                len(parts) - len(todo),
                len(parts),
            )
        _compute(
            todo=todo,
            marks=marks,
            folder=folder,
            options=options,
            session=exchange,
            spec=spec,
            workers=workers,
            backend=backend,
            address=address,
            progress=progress,
        )
        files = {p.key: _part_file(folder, p.key) for p in parts}
        check_units(files, exchange.name, daily)
        report = BuildReport(
            kind,
            partitions=len(parts),
            reused=len(parts) - len(todo),
            options=asdict(options),
            schema_version=SCHEMA_VERSION[kind],
        )
        _assemble(folder, parts, marks, factors, report, progress)
        _account_for(folder, parts, marks, report)
        report.seconds = time.perf_counter() - began
        write_json(folder / "report.json", asdict(report), indent=1)
    return report


def read_report(out: str | Path, kind: str) -> dict[str, Any]:
    """Read the report of the last finished build."""
    path = Path(out) / kind / "report.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist; `qlib-ext build {kind}` writes it.")
    return json.loads(path.read_text())


# -- which files make which partition


def _find(source: str, table: str, described: Sequence[Source]) -> list[str]:
    if os.path.isfile(source):
        return [source] if table == "bars" else []
    given = [pattern for s in described for pattern in s.files]
    if given:
        return sorted({f for p in given for f in _matching(source, p)})
    if table == "bars":
        patterns = ["*", "bars/**/*", "minute/**/*"]
    else:
        patterns = [f"{table}/**/*", f"*{table}*"]
    return next((f for f in (_matching(source, p) for p in patterns) if f), [])


def _matching(source: str, pattern: str) -> list[str]:
    found = glob.glob(os.path.join(source, pattern), recursive=True)
    return sorted(
        f
        for f in found
        if (is_text(f) or f.lower().endswith(".parquet")) and os.path.isfile(f)
    )


def _plan(
    kind: str,
    source: str,
    spec: VendorMapping,
    session: Session,
    start: str | None,
    end: str | None,
) -> list[Part]:
    if not os.path.exists(source):
        raise ValueError(f"`source` {source} does not exist.")
    tables = _KINDS[kind][2]
    files = {t: _find(source, t, spec.tables.get(t, ())) for t in tables}
    if not files[tables[0]]:
        raise ValueError(
            f"{source} has no files of {tables[0]}; expected "
            + (
                "one Parquet file a month, such as 2020-01.parquet"
                if kind in _OF_BARS
                else "trades/2020-01-02.parquet and so on"
            )
            + ", or a mapping file that gives `files`."
        )
    low = None if start is None else np.datetime64(pd.Timestamp(start), "D")
    high = None if end is None else np.datetime64(pd.Timestamp(end), "D")
    if kind in _OF_BARS:
        return _plan_bars(files["bars"], spec, session, low, high)
    days: dict[str, dict[str, list[str]]] = {}
    for table in tables:
        for file in files[table]:
            for day in _days_of(file, table, spec, session):
                days.setdefault(day, {}).setdefault(table, []).append(file)
    parts = []
    for day, have in sorted(days.items()):
        if (low is not None and np.datetime64(day) < low) or (
            high is not None and np.datetime64(day) > high
        ):
            continue
        if "trades" not in have:
            logger.warning("%s has no trades: no features for this day", day)
            continue
        parts.append(Part(day, have, day))
    if not parts:
        raise ValueError(f"{source} has no day of trades between {start} and {end}.")
    return parts


def _plan_bars(
    files: list[str],
    spec: VendorMapping,
    session: Session,
    low: np.datetime64 | None,
    high: np.datetime64 | None,
) -> list[Part]:
    """Group files by month; a file that spans months is a partition of its own."""
    groups: dict[str, list[str]] = {}
    for file in files:
        if not reading.rows_of(file):
            logger.warning("%s has no rows: left out", file)
            continue
        first, last = _months_of(file, spec, session)
        if (low is not None and last < low.astype("datetime64[M]")) or (
            high is not None and first > high.astype("datetime64[M]")
        ):
            continue
        if first == last:
            key = str(first)
        else:
            key = "file-" + re.sub(r"[^\w.-]", "_", Path(file).stem)
            if key in groups:
                key += "-" + hashlib.sha1(file.encode()).hexdigest()[:8]
        groups.setdefault(key, []).append(file)
    if not groups:
        raise ValueError(f"No bars between {low} and {high}.")
    return [Part(k, {"bars": v}) for k, v in sorted(groups.items())]


def _months_of(file: str, spec: VendorMapping, session: Session) -> tuple[Any, Any]:
    """First and last month of a file, from its statistics or its rows."""
    layout = choose(spec.tables.get("bars", ()), "bars", file)
    first, last, _ = first_and_last(file, layout, "datetime", session.tz)
    return first.astype("datetime64[M]"), last.astype("datetime64[M]")


def _days_of(file: str, table: str, spec: VendorMapping, session: Session) -> list[str]:
    """Days of a tick file: the one in its path, else those of its rows."""
    for text in (Path(file).stem, *reversed(Path(file).parts[:-1])):
        found = _DAY.search(text)
        if found:
            return ["-".join(found.groups())]
    layout = choose(spec.tables.get(table, ()), table, file)
    first, last, days = first_and_last(file, layout, "time", session.tz)
    if days is None:
        days = np.unique(np.array([first, last]).astype("datetime64[D]"))
        if len(days) > 1:
            _, _, days = first_and_last(file, layout, "time", session.tz, rows=True)
    assert days is not None  # read row by row
    return [str(d) for d in days]


def _fingerprint(part: Part, options: Options) -> str:
    """Hash of what a partition depends on."""
    facts = []
    for table, files in sorted(part.files.items()):
        for file in files:
            stat = os.stat(file)
            facts.append([table, os.path.abspath(file), stat.st_size, stat.st_mtime_ns])
    text = json.dumps(
        [SCHEMA_VERSION[options.kind], asdict(options), part.key, part.day, facts],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()


# -- one partition


def _part_file(folder: Path, key: str) -> Path:
    return folder / ".parts" / f"{key}.parquet"


def _account(folder: Path, key: str, mark: str) -> dict[str, Any] | None:
    """Account of a finished partition; None if it must be computed."""
    path = _part_file(folder, key)
    try:
        meta = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, OSError) as error:
        logger.warning("%s is damaged (%s) and computed again", path, error)
        return None
    account = json.loads(meta.get(_ACCOUNT, b"{}"))
    return account if account.get("fingerprint") == mark else None


def _compute_part(
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
    account["coverage"] = {
        n: int(np.isfinite(table.column(n).to_numpy()).sum())
        for n in (f.name for f in _features(options.kind, session, options.bar_minutes))
    }
    account["rows_out"] = table.num_rows
    table = table.replace_schema_metadata({_ACCOUNT: json.dumps(account).encode()})
    write_parquet(
        _part_file(Path(folder), part.key), table, compression="lz4", **_LAYOUT
    )
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
        days.notes["days that end early"] = sorted(ends)
    days = days.by_day()
    first = _first_of(days.day, days.code)
    if not first.all():
        days.notes["stock-days found in two files (first kept)"] = int((~first).sum())
        days = days.take(first)
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
    return _key_table(midnights(days.day), days.code, days.labels, columns), account


def _features(kind: str, session: Session, bar_minutes: int) -> tuple[Any, ...]:
    """Definitions of a kind's columns."""
    if kind == "bars":
        return bar_features(session.slots(bar_minutes))
    return tuple(_KINDS[kind][1])


def _windows_part(
    part: Part,
    options: Options,
    session: Session,
    layouts: Mapping[str, tuple[Source, ...]],
) -> tuple[pa.Table, dict[str, Any]]:
    """Minute bars of a few instruments: read whole, put side by side."""
    pieces, lots = [], {}
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
        _key_table(
            midnights(found.day[order]), found.code[order], found.labels, columns
        ),
        account,
    )


def _first_of(day: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Mask of rows, sorted by both, whose (day, code) differs from the row before."""
    first = np.ones(len(day), dtype=bool)
    first[1:] = (day[1:] != day[:-1]) | (code[1:] != code[:-1])
    return first


def _key_table(
    when: np.ndarray,
    code: np.ndarray,
    labels: np.ndarray,
    columns: Mapping[str, np.ndarray],
) -> pa.Table:
    """Table of `_KEYS` and columns; instruments as codes, so no row handles text."""
    instrument = pa.DictionaryArray.from_arrays(
        pa.array(code.astype(np.int32)), pa.array(labels, pa.string())
    )
    values = {k: np.ascontiguousarray(x) for k, x in columns.items()}
    return pa.table({"datetime": when, "instrument": instrument, **values})


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
    outside = days.rejected.get("outside the session", 0)
    check_session(outside, days.rows_in, session)
    check_stamp(*days.edges, options.stamp, session)
    return days


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
        frames.append(result.frame)
        _add_account(account, result)
    if not frames or not any(len(f) for f in frames):
        raise ValueError(
            f"no usable trade on {part.day} in {part.files['trades'][0]}; rejected: "
            f"{account['rejected'].get('trades')}. If the file's name carries another "
            "date than its rows, rename it."
        )
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.sort_values("instrument", ignore_index=True)
    wanted_tables = _KINDS[options.kind][2]
    for table in ("orders", "quotes"):
        if table in wanted_tables and not frame[table].sum():
            account["missing"].append(table)
    if frame["l2_act_buy"].isna().all():
        account["missing"].append("trades' side")
    if frame["l2_buy_hhi"].isna().all():
        account["missing"].append("trades' order ids")
    others = {*TICK_NAMES, *FLOW_FIELDS}.difference(_KINDS[options.kind][0])
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


def _join(pieces: list[pa.Table]) -> pa.Table:
    if len(pieces) == 1:
        return pieces[0]
    return pa.concat_tables(pieces, promote_options="permissive").unify_dictionaries()


def _in_time(table: pa.Table) -> pa.Table:
    """Rows sorted by instrument and time; those of one moment keep their order."""
    _, code = dictionary_codes(table.column("instrument"))
    when = microseconds(table.column("time"), "time")
    return table.take(pa.array(np.lexsort((when, code))))


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


def _add_account(account: dict[str, Any], rows: TickRows) -> None:
    for table, n in rows.rows_in.items():
        account["rows_in"][table] = account["rows_in"].get(table, 0) + n
    for table, reasons in rows.rejected.items():
        mine = account["rejected"].setdefault(table, {})
        for why, n in reasons.items():
            mine[why] = mine.get(why, 0) + n
    for note, n in rows.notes.items():
        account["notes"][note] = account["notes"].get(note, 0) + n


# -- all partitions


def _compute(
    todo: list[Part],
    marks: Mapping[str, str],
    folder: Path,
    options: Options,
    session: Session,
    spec: VendorMapping,
    workers: int,
    backend: str,
    address: str | None,
    progress: bool,
) -> None:
    if not todo:
        return
    cores = len(os.sched_getaffinity(0))
    threads = cores if workers == 1 else max(1, cores // workers)
    calls = [
        (p, marks[p.key], str(folder), options, session, spec.tables, threads)
        for p in todo
    ]
    bar = tqdm(
        total=len(todo),
        desc=f"build {options.kind}",
        unit="month" if options.kind == "ms" else "day",
        disable=None if progress else True,
    )
    failed: list[str] = []
    with bar:
        if workers == 1 and backend == "local":
            for call in calls:
                failed += [m for m in [_compute_part(*call)] if m]
                bar.update()
        else:
            with (
                processes(backend, address, workers) as there,
                _watch(bar, todo, folder),
            ):
                results = Parallel(n_jobs=there, batch_size=1)(
                    delayed(_compute_part)(*call) for call in calls
                )
            failed += [m for m in results if m]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(todo)} partitions could not be built; the others "
            "are kept, and a new run computes only these. First: " + failed[0]
        )


@contextmanager
def _watch(bar: tqdm, todo: list[Part], folder: Path) -> Iterator[None]:
    """Follow the partitions' files: works the same on every backend."""
    waiting = {p.key for p in todo}
    before = {k: _stamp(_part_file(folder, k)) for k in waiting}
    stop = threading.Event()

    def look() -> None:
        done = {k for k in waiting if _stamp(_part_file(folder, k)) != before[k]}
        waiting.difference_update(done)
        bar.update(len(done))

    def loop() -> None:
        while not stop.wait(0.5):
            look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# -- years


def _assemble(
    folder: Path,
    parts: list[Part],
    marks: Mapping[str, str],
    factors: pd.Series | None,
    report: BuildReport,
    progress: bool,
) -> None:
    """Put the partitions' stock-days into the yearly files; all others stay.

    Years after them are written again where the overnight return of their first days
    continues from a close that changed.
    """
    kind = report.kind
    features = _features(
        kind, get_session(report.options["session"]), report.options["bar_minutes"]
    )
    names = [f.name for f in features]
    by_year: dict[int, list[Part]] = {}
    for part in parts:
        for year in _years_of(folder, part):
            by_year.setdefault(year, []).append(part)
    todo = set(by_year)
    if kind == "ms":
        later = [y for y in _stored_years(folder) if y > min(by_year)]
        todo |= {y for y in later if not _differences(_meta(folder, y), report)}
    given = None if factors is None else _Factors(factors)
    salt = "" if factors is None else _hash_of(factors)
    years = tqdm(
        sorted(todo),
        desc=f"{kind} years",
        unit="year",
        disable=None if progress and len(todo) > 2 else True,
    )
    for year in years:
        own = by_year.get(year, [])
        meta = _meta(folder, year)
        # A year follows from its partitions and the closes of the years before it.
        plan = _digest(marks[p.key] for p in own) if own else meta["plan"]
        last = max((y for y in _stored_years(folder) if y < year), default=None)
        known = [_meta(folder, last)["mark"]] if kind == "ms" and last else []
        before = _digest([salt, *known])
        if (plan, before) == (meta.get("plan"), meta.get("before")) and (
            kind != "ms" or _closes_file(folder, year, meta).exists()
        ):
            continue
        unlike = _differences(meta, report) if meta else ""
        when, code, labels, columns, counts = _year_rows(
            folder, own, year, meta, whole_days=bool(unlike)
        )
        if unlike and counts["kept"]:
            raise ValueError(
                f"{folder / f'{year}.parquet'} holds {counts['kept']} stock-days of "
                f"other days, built with another {unlike}. Build all days of {year} "
                "from their source in one run, or choose another `out`."
            )
        for count, note in (
            ("twice", "stock-days found in two partitions (first kept)"),
            ("stale", "stock-days kept though their day came again without the stock"),
        ):
            if counts[count]:
                report.notes[note] = report.notes.get(note, 0) + counts[count]
        mark = _digest([plan, before, meta.get("mark", "") if counts["kept"] else ""])
        if kind == "ms":
            carry = _last_closes(folder, last)
            closes, blind = _add_overnight(when, code, labels, columns, carry, given)
            if blind:
                note = "stock-days without ms_overnight: the close before is not known"
                report.notes[note] = report.notes.get(note, 0) + blind
            # Named by the mark: whenever a kill comes, the yearly file finds its own.
            state = _closes_file(folder, year, {"mark": mark})
            write_parquet(state, closes, **_LAYOUT)
        narrow = {n: columns[n].astype(np.float32) for n in names}
        table = _key_table(when, code, labels, narrow)
        facts = {
            "kind": kind,
            "schema_version": str(SCHEMA_VERSION[kind]),
            "plan": plan,
            "before": before,
            "mark": mark,
            "options": json.dumps(report.options, default=str),
            "features": json.dumps([asdict(f) for f in features], ensure_ascii=False),
        }
        table = table.replace_schema_metadata(
            {f"qlib_ext.{k}": v for k, v in facts.items()}
        )
        write_parquet(
            folder / f"{year}.parquet", table, row_group_size=131072, **_LAYOUT
        )
        if kind == "ms":
            for path in state.parent.glob(f"closes-{year}-*.parquet"):
                if path != state:
                    path.unlink()
    for year in _stored_years(folder):
        if year not in by_year:
            logger.info("%s: no partition covers %d in this build", folder, year)
    report.years = sorted(by_year)
    report.bytes_out = sum(
        (folder / f"{y}.parquet").stat().st_size for y in report.years
    )


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _hash_of(factors: pd.Series) -> str:
    values = pd.util.hash_pandas_object(factors.dropna().sort_index())
    return hashlib.sha256(values.to_numpy().tobytes()).hexdigest()


def _stored_years(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("[12][0-9][0-9][0-9].parquet"))


def _meta(folder: Path, year: int) -> dict[str, str]:
    """Read what a yearly file says of itself; empty if there is none."""
    path = folder / f"{year}.parquet"
    try:
        meta = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        return {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it and build all days of {year}."
        ) from error
    start = len("qlib_ext.")
    facts = {
        k.decode()[start:]: v.decode()
        for k, v in meta.items()
        if k.startswith(b"qlib_ext.")
    }
    return {"plan": "", "mark": "", **facts}


def _differences(meta: Mapping[str, str], report: BuildReport) -> str:
    """Name what makes a yearly file's features others than this build's; "" if equal.

    How a source is read may change, and so may the list of half days.
    """
    mine = {**report.options, "schema version": report.schema_version}
    theirs = json.loads(meta.get("options", "{}"))
    theirs["schema version"] = int(meta.get("schema_version", 0))
    return ", ".join(
        f"{name} ({theirs.get(name)!r}, now {value!r})"
        for name, value in mine.items()
        if name not in ("mapping", "early_close") and theirs.get(name) != value
    )


def _closes_file(folder: Path, year: int, meta: Mapping[str, str]) -> Path:
    """File of what the overnight returns of a yearly file are made of."""
    return folder / ".parts" / f"closes-{year}-{meta.get('mark', '')[:16]}.parquet"


def _last_closes(folder: Path, year: int | None) -> pd.DataFrame:
    """Each stock's last day, close and factor up to the end of a year.

    NaN where only the yearly file is left of them.
    """
    columns = ["datetime", "instrument", "close", "factor"]
    if year is None:
        return pd.DataFrame(columns=columns).set_index("instrument")
    path = _closes_file(folder, year, _meta(folder, year))
    if path.exists():
        rows = pd.read_parquet(path, columns=columns)
    else:
        rows = pd.read_parquet(folder / f"{year}.parquet", columns=_KEYS)
        rows = rows.reindex(columns=columns)
    rows = rows.drop_duplicates("instrument", keep="last")
    return rows.set_index(rows.pop("instrument").astype(object))


def _years_of(folder: Path, part: Part) -> list[int]:
    if part.key[:4].isdigit():
        return [int(part.key[:4])]
    column = pq.read_table(_part_file(folder, part.key), columns=["datetime"])
    days = column.column("datetime").to_numpy().astype("datetime64[Y]")
    return sorted({int(str(y)) for y in np.unique(days)})


def _year_rows(
    folder: Path,
    parts: list[Part],
    year: int,
    meta: Mapping[str, str],
    whole_days: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Rows of a year, sorted by day and instrument, each stock-day once.

    Those of the partitions, and all others of the yearly file: a source may hold one
    more stock as well as one more day. With `whole_days`, those of other days only.

    Returns
    -------
    (days, codes, labels of the codes, columns, counts of stock-days found twice in the
    partitions, kept from the yearly file, kept of days that the partitions hold)
    """
    tables = [pq.ParquetFile(_part_file(folder, p.key)).read() for p in parts]
    new = sum(table.num_rows for table in tables)
    if meta:
        tables.append(_stored_rows(folder, year, meta))
    for k, table in enumerate(tables):
        at = table.column_names.index("instrument")
        if not pa.types.is_dictionary(table.column(at).type):
            tables[k] = table.set_column(
                at, "instrument", table.column(at).dictionary_encode()
            )
    table = pa.concat_tables(tables, promote_options="permissive")
    when = table.column("datetime").to_numpy().astype("datetime64[ns]")
    labels, code = dictionary_codes(table.column("instrument"))
    order = np.lexsort((code, when))
    order = order[when[order].astype("datetime64[Y]") == np.datetime64(str(year))]
    first, old = _first_of(when[order], code[order]), order >= new
    stale = first & old & np.isin(when[order], np.unique(when[:new]))
    if whole_days:
        first &= ~stale
    counts = {
        "twice": int((~first & ~old).sum()),
        "kept": int((first & old).sum()),
        "stale": int((first & stale).sum()),
    }
    order = order[first]
    columns = {
        name: table.column(name).to_numpy()[order]
        for name in table.column_names
        if name not in _KEYS
    }
    return when[order], code[order], labels, columns, counts


def _stored_rows(folder: Path, year: int, meta: Mapping[str, str]) -> pa.Table:
    """Rows of a yearly file, in the form of a partition's."""
    with pq.ParquetFile(folder / f"{year}.parquet") as file:
        table = file.read()
    if meta.get("kind") != "ms":
        return table
    path = _closes_file(folder, year, meta)
    if path.exists():
        with pq.ParquetFile(path) as file:
            closes = file.read()
        closes = closes.slice(closes.num_rows - table.num_rows)
        raw = {c: closes.column(c) for c in _OVERNIGHT}
    else:
        nothing = np.full(table.num_rows, np.nan)
        moves = [table.column(c).to_numpy() for c in ("ms_mom", "ms_overnight")]
        raw = {c: pa.array(nothing) for c in _OVERNIGHT}
        raw["ms_mom"] = pa.array(np.subtract(*moves, dtype=np.float64))
    table = table.drop_columns("ms_mom")
    for name, values in raw.items():
        table = table.append_column(name, values)
    return table


class _Factors:
    """Adjustment factors by (datetime, instrument), looked up by sorted numbers."""

    def __init__(self, factors: pd.Series) -> None:
        factors = factors.dropna()
        index = factors.index
        self.days = pd.DatetimeIndex(index.get_level_values(0)).as_unit("ns")
        self.codes, self.labels = pd.factorize(index.get_level_values(1), sort=True)
        key = self._key(self.days.to_numpy(), self.codes)
        order = np.argsort(key)
        self.key, self.value = key[order], factors.to_numpy(dtype=float)[order]

    def _key(self, when: np.ndarray, code: np.ndarray) -> np.ndarray:
        days = when.astype("datetime64[D]").astype(np.int64)
        return days * (len(self.labels) + 1) + code

    def of(self, when: np.ndarray, code: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Factors of rows, NaN where there is none."""
        mine = pd.Index(self.labels).get_indexer(pd.Index(labels))[code]
        key = self._key(when, mine)
        at = np.minimum(np.searchsorted(self.key, key), max(len(self.key) - 1, 0))
        if not len(self.key):
            return np.full(len(key), np.nan)
        return np.where((self.key[at] == key) & (mine >= 0), self.value[at], np.nan)


def _add_overnight(
    when: np.ndarray,
    code: np.ndarray,
    labels: np.ndarray,
    columns: dict[str, np.ndarray],
    carry: pd.DataFrame,
    factors: _Factors | None,
) -> tuple[pa.Table, int]:
    """Complete the columns that need the day before.

    Parameters
    ----------
    when, code, labels, columns
        Rows of a year; see `_year_rows`.
    carry : DataFrame
        Each stock's last day, close and factor before these rows.
    factors : _Factors, optional
        Adjustment factors that go before the rows' own.

    Returns
    -------
    closes, blind
        `carry` and the rows, with what this needed of them; number of rows that have
        an earlier one but no overnight return.
    """

    def factor_of(when, code, labels, own):
        if factors is None:
            return own
        known = factors.of(when, code, labels)
        return np.where(np.isfinite(known), known, own)

    factor = factor_of(when, code, labels, columns["factor"])
    last = carry["datetime"].to_numpy().astype("datetime64[ns]")
    carry = carry.assign(
        factor=factor_of(
            last, np.arange(len(carry)), carry.index, carry["factor"].to_numpy(float)
        )
    )
    before = (carry["close"] * carry["factor"]).reindex(labels).to_numpy(dtype=float)
    # Days that are not in the store part the rows: what is before them is not the
    # close of the day before.
    days = np.unique(np.append(when, last.max())) if len(last) else np.unique(when)
    holes = days[1:][np.diff(days) > _LONGEST_CLOSURE]
    part, parts = np.searchsorted(holes, when, side="right"), len(holes) + 1
    known = np.full(len(labels) * parts, np.nan)
    known[::parts] = before
    overnight = overnight_returns(
        code * parts + part,
        when,
        opened=columns["open"] * factor,
        closed=columns["close"] * factor,
        before=known,
    )
    # What the yearly file knew goes on where its closes were lost.
    overnight = np.where(np.isnan(overnight), columns["ms_overnight"], overnight)
    here = labels[np.unique(code)]
    new = len(here) - int(pd.Index(here).isin(carry.index).sum())
    raw = {c: columns[c] for c in _OVERNIGHT} | {"factor": factor}
    closes = _key_table(when, code, labels, raw)
    columns["ms_overnight"] = overnight
    columns["ms_mom"] = columns["ms_mom"] + overnight
    nothing = np.full(len(carry), np.nan)
    earlier = _key_table(
        last,
        np.arange(len(carry)),
        carry.index.to_numpy(),
        {c: carry[c].to_numpy(float) if c in carry else nothing for c in _OVERNIGHT},
    )
    closes = pa.concat_tables([earlier, closes])
    return closes, max(int(np.isnan(overnight).sum()) - new, 0)


def _account_for(
    folder: Path, parts: list[Part], marks: Mapping[str, str], report: BuildReport
) -> None:
    """Sum the partitions' accounts into the report."""
    filled: dict[str, int] = {}
    for part in parts:
        account = _account(folder, part.key, marks[part.key])
        if account is None:
            raise ValueError(
                f"partition {part.key} changed while the build ran; run it again."
            )
        report.rows_out += account["rows_out"]
        for table, n in account["rows_in"].items():
            report.rows_in[table] = report.rows_in.get(table, 0) + n
        for table, reasons in account["rejected"].items():
            for why, n in reasons.items():
                mine = report.rejected.setdefault(table, {})
                mine[why] = mine.get(why, 0) + n
        for note, value in account["notes"].items():
            if isinstance(value, list):
                held = report.notes.setdefault(note, [])
                held += [v for v in value if v not in held]
            else:
                report.notes[note] = report.notes.get(note, 0) + value
        for table in account["missing"]:
            report.missing.setdefault(table, []).append(part.key)
        for name, n in account["coverage"].items():
            filled[name] = filled.get(name, 0) + n
    rows = max(report.rows_out, 1)
    report.coverage = {k: n / rows for k, n in filled.items()}
    stored = sum(
        pq.read_metadata(folder / f"{y}.parquet").num_rows for y in report.years
    )
    report.rows_kept = max(stored - report.rows_out, 0)
    if report.kind == "ms":
        # Completed at assembly, so counted in the yearly files.
        for name in ("ms_mom", "ms_overnight"):
            have = 0
            for year in report.years:
                column = pq.read_table(folder / f"{year}.parquet", columns=[name])
                have += int(np.isfinite(column.column(0).to_numpy()).sum())
            report.coverage[name] = have / max(stored, 1)


@contextmanager
def _one_builder(folder: Path) -> Iterator[None]:
    """Refuse a second build, and an update of the store that the build lies in.

    An update swaps the whole store: what a build wrote meanwhile would be lost.
    """
    store = folder.parent
    busy = f"{folder} is being built or its store written"
    lock = (
        store_lock(store, busy)
        if (store / "calendars").is_dir()
        else locked(folder / ".parts" / "lock", busy)
    )
    with lock:
        for left in (folder / ".parts").glob(".*.tmp"):
            left.unlink(missing_ok=True)  # of a build that was killed
        yield
