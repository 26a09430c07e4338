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

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import Parallel, delayed
from qlib.log import get_module_logger
from tqdm import tqdm

from data_handlers.aggregate.minute import early_closes
from data_handlers.aggregate.partition import account_of, compute_part, part_file
from data_handlers.aggregate.plan import KINDS, Options, Part, mark_of, plan
from data_handlers.aggregate.report import BuildReport, add_accounts, read_report
from data_handlers.aggregate.schema import SCHEMA_VERSION, Session, get_session
from data_handlers.aggregate.units import (
    against_days,
    check_units,
    fixed_holidays,
    is_thin,
    unexplained_weekdays,
    usual_rows,
)
from data_handlers.aggregate.years import assemble
from data_handlers.backends import check_backend, following, processes
from data_handlers.files import locked, store_lock, write_json
from data_handlers.vendor.mapping import VendorMapping, load_mapping

__all__ = ["BuildReport", "build", "read_report"]

#: A source of these kinds without columns is recognised.
_ANY = {"ms": "minute", "l2": "trades", "flow": "trades", "bars": "minute"}

#: Note on days on which no market is open.
HOLIDAYS = "public holidays, on which A-shares never trade (wrong dates?)"
#: Note on days that hold a part of the market.
THIN = "days with far fewer stocks than those around (an interrupted download?)"

logger = get_module_logger("aggregate")


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
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
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
        parts = plan(kind, str(source), spec, exchange, start, end)
        marks = {p.key: mark_of(p, options) for p in parts}
        todo = [p for p in parts if account_of(folder, p.key, marks[p.key]) is None]
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
        files = {p.key: part_file(folder, p.key) for p in parts}
        rows = _rows_by_day(files)
        if rows.empty:
            raise ValueError(
                f"no stock of {source} trades on any day: is `volume` mapped to the "
                "right column?"
            )
        doubts = check_units(files, exchange.name, daily)
        report = BuildReport(
            kind,
            partitions=len(parts),
            reused=len(parts) - len(todo),
            options=asdict(options),
            schema_version=SCHEMA_VERSION[kind],
            notes=dict(doubts),
        )
        assemble(folder, parts, marks, factors, report, progress)
        add_accounts(folder, parts, marks, report)
        days = pd.DatetimeIndex(rows.index)
        if exchange.name == "a_share" and (off := days[fixed_holidays(days)]).size:
            report.notes[HOLIDAYS] = [f"{day:%Y-%m-%d}" for day in off]
        if lost := _lost_days(days, exchange, daily):
            report.notes["trading days without any bars or ticks"] = lost
        if thin := _thin_days(rows):
            report.notes[THIN] = thin
        if kind == "bars" and daily is not None and "close" in daily:
            years = [folder / f"{year}.parquet" for year in report.years]
            report.notes |= against_days(files, years, daily)
        report.seconds = time.perf_counter() - began
        write_json(folder / "report.json", asdict(report), indent=1)
    return report


def _rows_by_day(files: Mapping[str, Path]) -> pd.Series:
    """Count the stocks of each day."""
    columns = [pd.read_parquet(f, columns=["datetime"]) for f in files.values()]
    rows = pd.concat(columns)["datetime"].value_counts().sort_index()
    return rows


def _thin_days(rows: pd.Series) -> list[str]:
    """List days with far fewer stocks than the days around them."""
    usual = usual_rows(rows)
    thin = (usual >= 5) & is_thin(rows, usual)
    return [
        f"{day:%Y-%m-%d} ({n} of {usual[day]:.0f})" for day, n in rows[thin].items()
    ]


def _lost_days(
    days: pd.DatetimeIndex, session: Session, daily: pd.DataFrame | None
) -> list[str]:
    """List days between the first and the last that should have bars and have none."""
    if daily is not None:
        known = daily.index[daily.notna().any(axis=1)].get_level_values("datetime")
        should = known.unique()
        should = should[(should > days[0]) & (should < days[-1])]
    elif session.name == "a_share":
        should = pd.bdate_range(days[0], days[-1]).difference(days)
        should = should[unexplained_weekdays(should)]
    else:
        return []
    return [f"{day:%Y-%m-%d}" for day in should.difference(days)]


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
                failed += [m for m in [compute_part(*call)] if m]
                bar.update()
        else:
            with (
                processes(backend, address, workers) as there,
                _watch(bar, todo, folder),
            ):
                results = Parallel(n_jobs=there, batch_size=1)(
                    delayed(compute_part)(*call) for call in calls
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
    before = {k: _stamp(part_file(folder, k)) for k in waiting}

    def look() -> None:
        done = {k for k in waiting if _stamp(part_file(folder, k)) != before[k]}
        waiting.difference_update(done)
        bar.update(len(done))

    try:
        with following(look, 0.5):
            yield
    finally:
        look()


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


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
