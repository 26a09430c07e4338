"""The only writer of Qlib directories: day bins, calendars, instruments, tables.

Layout of a store::

    calendars/day.txt, day_future.txt   trading days; the same plus 30 weekdays
    instruments/all.txt, <market>.txt   code, first day, last day (tab separated)
    features/<code>/<field>.day.bin     float32: slot of the first value, values
    tables/<name>.parquet, industry.json
    meta.json                           what the numbers are; see `read_meta`

Why a write can be interrupted anywhere
---------------------------------------
A new version is built in a hidden directory beside the store and takes the store's
name in one step: ``renameat2(RENAME_EXCHANGE)``, which swaps two directories
atomically, so a path below the store resolves to the old or to the new version and
never to nothing. The store stays an ordinary directory (a symbolic link to one works
too: its target is swapped). Unchanged files are hard links to the previous version, so
an update writes only what changed. Files are never edited in place, because a link
would carry the edit into the version that readers still see.

Where the system has no exchange call (NFS, macOS) two renames take its place; a kill
between the two leaves the old version under ``.<name>.old``, and the next write or
`read_meta` puts it back. One writer at a time: a lock file beside the store.

A process kill is covered; a power cut is covered as far as the file system orders its
own renames (no fsync of thousands of small files).
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.log import get_module_logger
from tqdm import tqdm

from data_handlers.fields import calendar_days
from data_handlers.files import BusyError, store_lock, unwritable

__all__ = [
    "StoreBusyError",
    "add_fields",
    "check_bins",
    "extend_store",
    "is_store",
    "read_bars",
    "read_calendar",
    "read_industry_names",
    "read_instruments",
    "read_meta",
    "read_table",
    "tidy_store",
    "write_store",
]

FORMAT = 1
FUTURE_DAYS = 30
_KEYS = ("datetime", "instrument")
# fields that ingest writes for each bar, so all end on one day
_BAR_FIELDS = (
    *("open", "high", "low", "close", "volume", "amount", "vwap", "factor", "change"),
    *("turnover", "market_cap", "limit_up", "limit_down", "industry", "is_st"),
    *("pb", "pe_ttm", "ps_ttm", "pcf_ttm"),
)
_ALWAYS = ("open", "high", "low", "close", "factor")
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED_META = (
    "format",
    "fields",
    "start",
    "end",
    "days",
    "rows",
    "instruments",
    "indices",
    "markets",
    "tables",
)

logger = get_module_logger("qlib_ext.ingest.store")
StoreBusyError = BusyError


# ---------------------------------------------------------------- public functions


def write_store(
    root: str | os.PathLike[str],
    bars: pd.DataFrame,
    *,
    markets: Mapping[str, pd.DataFrame] | None = None,
    index_codes: Sequence[str] = (),
    industry_names: Mapping[str, str] | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    meta: Mapping[str, Any] | None = None,
    calendar: Sequence[Any] | pd.DatetimeIndex | None = None,
    files: Mapping[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Write a whole Qlib day store; an existing store at `root` is replaced atomically.

    Parameters
    ----------
    root : path
        Directory of the store. May be absent, empty, or an existing store; any other
        non-empty directory is refused.
    bars : DataFrame
        Long frame with columns ``datetime``, ``instrument`` and one per field (lower
        case, no ``$``). Fields are numbers or booleans; NaN is kept, infinity refused.
        A day without a row, between an instrument's first and last row, becomes NaN.
    markets : mapping of str to DataFrame, optional
        Market name to a frame with ``instrument``, ``start``, ``end`` (both days
        included; several rows per instrument allowed). ``all`` is derived from `bars`
        (first row to last row of each stock) unless given here.
    index_codes : sequence of str
        Instruments of `bars` that are indices: they get bins and stay out of ``all``.
    industry_names : mapping of str to str, optional
        Code in the ``industry`` field to its name, for ``tables/industry.json``.
    tables : mapping of str to DataFrame, optional
        Extra tables, saved as ``tables/<name>.parquet``.
    meta : mapping, optional
        JSON values added to ``meta.json``; names in use by the store are refused.
    calendar : sequence of dates, optional
        Trading days. Default: every date in `bars`. Must contain all of them.
    files : mapping of str to str, optional
        Further text files for the store's root, by name.
    progress : bool, default False
        Show a progress bar.

    Raises
    ------
    ValueError
        If a column, code, date or market is unusable; the message names it.
    StoreBusyError
        If another process is writing this store.
    """
    cal = _calendar_of(bars, calendar)
    panel = _Panel(bars, cal)
    indices = _check_index_codes(index_codes, panel)
    spans = _all_spans(panel, indices)
    frames = {"all": spans, **(markets or {})}
    extra = _check_meta(meta)
    with _new_version(root) as build:
        _write_calendar(build, cal)
        for name, frame in frames.items():
            _write_market(build, name, frame, cal)
        fields_of_index = _write_features(build, panel, indices, progress=progress)
        _write_tables(build, tables, industry_names)
        for name, text in (files or {}).items():
            _write_new(build / name, text)
        _write_json(
            build / "meta.json",
            {
                "format": FORMAT,
                "fields": panel.fields,
                "start": f"{cal[0]:%Y-%m-%d}",
                "end": f"{cal[-1]:%Y-%m-%d}",
                "days": len(cal),
                "rows": len(bars),
                "instruments": len(panel.codes) - len(indices),
                "indices": fields_of_index,
                "markets": sorted(frames),
                "tables": sorted(tables or {}),
                **extra,
            },
        )


def extend_store(
    root: str | os.PathLike[str],
    bars: pd.DataFrame,
    *,
    expected_end: pd.Timestamp,
    markets: Mapping[str, pd.DataFrame] | None = None,
    index_codes: Sequence[str] = (),
    industry_names: Mapping[str, str] | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    meta: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Append bars to a store: new days, and instruments that it does not hold yet.

    Days already in the store keep their bytes. Rows of instruments that the store has
    must lie after its last day; an instrument's days without a row become NaN.

    Parameters
    ----------
    root : path
        An existing store.
    bars : DataFrame
        As in `write_store`. Fields that the store has and `bars` lacks are NaN on the
        new days; new fields begin there.
    expected_end : Timestamp
        Last day of the store that `bars` was prepared for; if another process has
        extended the store since, nothing is written.
    markets : mapping, optional
        Whole new market files by name; those not named stay. ``all`` is extended.
    index_codes, industry_names, tables, files, progress
        As in `write_store`; tables and files not named stay.
    meta : mapping, optional
        Keys that replace those of meta.json.

    Raises
    ------
    ValueError
        If bars lie in the past of the store, a bin is damaged, or the store changed.
    StoreBusyError
        If another process is writing this store.
    """
    extra = _check_meta(meta)
    with _new_version(root, need_store=True) as build:
        old = _real(Path(root))
        old_meta = read_meta(old)
        old_cal = read_calendar(old)
        if old_cal[-1] != expected_end:
            raise ValueError(
                f"{root} ends {old_cal[-1]:%Y-%m-%d} now, not {expected_end:%Y-%m-%d}: "
                "another process has updated it; run again."
            )
        _calendar_of(bars, None)  # the checks of columns and dates
        cal = _longer_calendar(bars, old_cal)
        panel = _Panel(bars, cal)
        old_indices = set(old_meta["indices"])
        new_indices = _check_index_codes(
            [c for c in index_codes if c.upper() in panel.codes], panel, only=True
        )
        spans = _longer_spans(read_instruments(old), panel, new_indices | old_indices)
        _link_tree(old, build)
        _write_calendar(build, cal)
        for name, frame in {"all": spans, **(markets or {})}.items():
            _write_market(build, name, frame, cal)
        index_fields = _append_features(
            build, panel, new_indices | old_indices, len(old_cal), progress=progress
        )
        _write_tables(build, tables, industry_names)
        for name, text in (files or {}).items():
            _write_new(build / name, text)
        fields = [*old_meta["fields"]]
        fields += [f for f in panel.fields if f not in fields]
        _write_json(
            build / "meta.json",
            {
                **old_meta,
                "fields": fields,
                "end": f"{cal[-1]:%Y-%m-%d}",
                "days": len(cal),
                "rows": int(old_meta["rows"]) + len(bars),
                "instruments": int(spans["instrument"].nunique()),
                "indices": {**old_meta["indices"], **index_fields},
                "markets": sorted({*old_meta["markets"], *(markets or {}), "all"}),
                "tables": sorted({*old_meta["tables"], *(tables or {})}),
                **extra,
            },
        )


def add_fields(
    root: str | os.PathLike[str], values: pd.DataFrame, *, progress: bool = False
) -> list[str]:
    """Add fields to instruments that a store has, replacing fields of the same name.

    Parameters
    ----------
    root : path
        An existing store.
    values : DataFrame
        Long: datetime, instrument and the new fields. Rows of instruments that the
        store does not have, and of days outside its calendar, are left out.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    list of str
        The fields.

    Raises
    ------
    ValueError
        For a bad field name, a repeated row, or no row that fits the store.
    StoreBusyError
        If another process is writing this store.
    """
    with _new_version(root, need_store=True) as build:
        old = _real(Path(root))
        meta = read_meta(old)
        cal = read_calendar(old)
        codes = values["instrument"].astype(str).str.upper()
        known = {f.name.upper() for f in (old / "features").iterdir()}
        fits = codes.isin(known) & pd.DatetimeIndex(values["datetime"]).isin(cal)
        if not fits.any():
            raise ValueError(
                f"no row of `values` is of an instrument and day that {root} has: it "
                f"holds {len(known)} instruments, {cal[0]:%Y-%m-%d} to "
                f"{cal[-1]:%Y-%m-%d}."
            )
        panel = _Panel(values[fits.to_numpy()], cal)
        _link_tree(old, build)
        bar = tqdm(
            panel.codes, desc="bins", unit="stock", disable=None if progress else True
        )
        for i, code in enumerate(bar):
            start, block = panel.block(i)
            for j, field in enumerate(panel.fields):
                file = build / "features" / code.lower() / f"{field}.day.bin"
                file.unlink(missing_ok=True)  # a link: readers keep the old version
                _write_bin(file, start, block[j])
        fields = [*meta["fields"]]
        fields += [f for f in panel.fields if f not in fields]
        _write_json(build / "meta.json", {**meta, "fields": fields})
    return panel.fields


def check_bins(root: str | os.PathLike[str]) -> None:
    """Refuse a store that lacks price bins, or has them shorter than their others.

    Ingest writes all bar fields of an instrument to the same last day, so a shorter bin
    was cut, and one that is not there is lost; extended, its lost days would pass for
    suspensions.

    Raises
    ------
    ValueError
        For such a bin, or one of no float32 values; the message names the file.
    """
    cal = read_calendar(root)
    spans = read_instruments(root)
    always = [name for name in _ALWAYS if name in read_meta(root).get("fields", ())]
    _check_folders(Path(root) / "features", list(spans["instrument"].unique()), always)
    last = spans.groupby(spans["instrument"].str.lower())["end"].max()
    for folder in sorted((Path(root) / "features").iterdir()):
        ends = {}
        for name in _BAR_FIELDS:
            file = folder / f"{name}.day.bin"
            if file.is_file():
                start, length = _bin_span(file, len(cal))
                ends[file] = start + length
        need = 0
        if folder.name in last:
            need = int(cal.searchsorted(last[folder.name], "right"))
        longest = max([need, *ends.values()])
        for file, end in ends.items():
            if end < longest:
                raise ValueError(
                    f"{file} is damaged: it ends {longest - end} day(s) before the "
                    "other bins of its instrument, or its day in instruments/all.txt. "
                    "Restore the file, or rebuild the store with --overwrite."
                )


def _check_folders(features: Path, names: Sequence[str], fields: Sequence[str]) -> None:
    """Refuse stocks of the store without the bins that each has."""
    there = {path.name for path in features.iterdir()}
    for name in names:
        folder = features / name.lower()
        if folder.name not in there:
            other = next((x for x in there if x.lower() == folder.name), None)
            raise ValueError(
                f"{folder} is missing, and instruments/all.txt has {name}: "
                + (
                    f"rename {features / other} to lower case, which Qlib reads."
                    if other
                    else "restore it, or rebuild the store with --overwrite."
                )
            )
        for field in fields:
            if not (file := folder / f"{field}.day.bin").is_file():
                raise ValueError(
                    f"{file} is missing, and each stock has it. Restore it, or rebuild "
                    "the store with --overwrite."
                )


def check_target(root: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot become a store, before any work is done.

    Raises
    ------
    ValueError
        If it is a file, a directory that holds something else, or its parent is not
        writable.
    """
    target = _real(Path(root))
    if target.exists() and not target.is_dir():
        raise ValueError(f"`root`={target} is a file; name a directory.")
    if target.is_dir() and any(target.iterdir()) and not is_store(target):
        raise ValueError(
            f"`root`={target} is a non-empty directory without calendars/day.txt; "
            "it is left alone. Name a new directory."
        )
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"`root`={target}: {parent} is not writable, and a new version is built "
            "there before it takes the store's name."
        )


def is_store(root: str | os.PathLike[str]) -> bool:
    """Tell whether `root` is a directory with a Qlib day calendar."""
    return (Path(root) / "calendars" / "day.txt").is_file()


def read_meta(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``meta.json`` of a store.

    Keys the store itself writes: ``format``, ``fields`` (all stock fields), ``start``,
    ``end``, ``days``, ``rows``, ``instruments`` (count of stocks), ``indices`` (code to
    its fields), ``markets``, ``tables``. Ingest adds what is adjusted and from where.

    Raises
    ------
    ValueError
        If `root` is no store, or its meta file is missing or damaged.
    """
    path = Path(root)
    target = _real(path)
    if not target.exists() and _old_name(target).is_dir():
        with store_lock(
            target
        ):  # or a writer between its two renames would be disturbed
            _recover(target)
    file = path / "meta.json"
    if not file.is_file():
        hint = (
            "it has a Qlib calendar but was not written by qlib_ext"
            if is_store(path)
            else "make one with `qlib-ext ingest` or `qlib-ext market make`"
        )
        raise ValueError(f"`root`={path} has no meta.json: {hint}.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); rebuild it.") from error


def read_calendar(root: str | os.PathLike[str]) -> pd.DatetimeIndex:
    """Read the trading days of a store.

    Raises
    ------
    ValueError
        If the calendar is missing, or `data_handlers.fields.calendar_days` refuses it.
    """
    file = Path(root) / "calendars" / "day.txt"
    if not file.is_file():
        raise ValueError(f"`root`={root} is no Qlib store: {file} is missing.")
    return calendar_days(file)


def read_instruments(root: str | os.PathLike[str], market: str = "all") -> pd.DataFrame:
    """Read a market file as a frame with ``instrument``, ``start``, ``end``.

    Raises
    ------
    ValueError
        If the market does not exist; the message lists those that do.
    """
    folder = Path(root) / "instruments"
    file = folder / f"{market.lower()}.txt"
    if not file.is_file():
        known = sorted(f.stem for f in folder.glob("*.txt"))
        raise ValueError(f"`market`={market!r} is not in {root}; it has {known}.")
    frame = pd.read_csv(
        file, sep="\t", header=None, names=["instrument", "start", "end"], dtype=str
    )
    for column in ("start", "end"):
        frame[column] = pd.to_datetime(frame[column], format="%Y-%m-%d")
    return frame


def tidy_store(root: str | os.PathLike[str]) -> None:
    """Finish or clear what an interrupted write left beside the store.

    Does nothing while another process writes.
    """
    target = _real(Path(root))
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        return
    try:
        with store_lock(target):
            _recover(target)
            _remove_leftovers(target)
    except StoreBusyError:
        logger.info("%s is being written by another process", target)


def read_table(
    root: str | os.PathLike[str], name: str, *, missing_ok: bool = False
) -> Any:
    """Read ``tables/<name>.parquet``; None if absent and `missing_ok`.

    Raises
    ------
    ValueError
        If the table is absent or damaged.
    """
    file = Path(root) / "tables" / f"{name}.parquet"
    if not file.is_file():
        if missing_ok:
            return None
        raise ValueError(f"{root} has no table {name!r}; rebuild it.")
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{file} is damaged ({error}); rebuild the store.") from error


def read_industry_names(root: str | os.PathLike[str]) -> dict[str, str]:
    """Read the names of the codes in field ``industry``; empty if there are none."""
    file = Path(root) / "tables" / "industry.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def read_bars(
    root: str | os.PathLike[str],
    instruments: Sequence[str],
    fields: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Read day bins without Qlib, as the long frame `write_store` takes.

    Parameters
    ----------
    root : path
        The store.
    instruments : sequence of str
        Codes; those without bins are skipped.
    fields : sequence of str, optional
        Default: every field found.

    Returns
    -------
    DataFrame
        ``datetime``, ``instrument``, fields (float32); rows with no value at all
        (suspended days) are left out.

    Raises
    ------
    ValueError
        If a bin is truncated or reaches beyond the calendar.
    """
    cal = read_calendar(root)
    features = Path(root) / "features"
    columns: dict[str, int] = {}
    pieces: list[tuple[str, list[int], np.ndarray, np.ndarray]] = []
    for code in instruments:
        folder = features / code.lower()
        names = (
            sorted(f.name[: -len(".day.bin")] for f in folder.glob("*.day.bin"))
            if fields is None
            else list(fields)
        )
        bins = {
            name: _read_bin(file, len(cal))
            for name in names
            if (file := folder / f"{name}.day.bin").is_file()
        }
        if not bins:
            continue
        first = min(start for start, _ in bins.values())
        last = max(start + len(values) for start, values in bins.values())
        block = np.full((len(bins), last - first), np.nan, dtype=np.float32)
        for row, (start, values) in zip(block, bins.values(), strict=True):
            row[start - first : start - first + len(values)] = values
        at = [columns.setdefault(name, len(columns)) for name in bins]
        slots = np.flatnonzero(~np.isnan(block).all(axis=0))
        pieces.append((code.upper(), at, first + slots, block[:, slots]))
    if not pieces:
        none = pd.DataFrame({"datetime": cal[:0], "instrument": np.array([], object)})
        return none.assign(**dict.fromkeys(fields or [], np.float32(np.nan)))
    count = [len(slots) for _, _, slots, _ in pieces]
    out = np.full((len(columns), sum(count)), np.nan, dtype=np.float32)
    for end, (_, at, slots, block) in zip(np.cumsum(count), pieces, strict=True):
        out[at, end - len(slots) : end] = block
    frame = pd.DataFrame(out.T, columns=list(columns))
    codes = np.array([code for code, *_ in pieces], dtype=object)
    frame.insert(0, "instrument", np.repeat(codes, count))
    days = np.concatenate([slots for _, _, slots, _ in pieces])
    frame.insert(0, "datetime", cal[days])
    return frame


# --------------------------------------------------------------------- checked input


class _Panel:
    """Bars sorted by instrument and day, fields as one float32 array [fields, rows]."""

    def __init__(self, bars: pd.DataFrame, cal: pd.DatetimeIndex) -> None:
        self.cal = cal
        self.fields = [str(c) for c in bars.columns if c not in _KEYS]
        if not self.fields:
            raise ValueError("`bars` has no field besides datetime and instrument.")
        for field in self.fields:
            if not _FIELD.fullmatch(field):
                raise ValueError(
                    f"`bars` has field {field!r}; Qlib field names here are lower case "
                    "letters, digits and _, without $."
                )
        inst = bars["instrument"]
        if inst.isna().any():
            raise ValueError("`bars` has rows without an instrument.")
        codes, names = pd.factorize(inst.astype(str).str.upper(), sort=True)
        self.codes = [str(name) for name in names]
        for name in self.codes:
            if not _CODE.fullmatch(name):
                raise ValueError(
                    f"`bars` has instrument {name!r}, which cannot be a directory "
                    "name; use codes such as SH600000."
                )
        slots = cal.get_indexer(pd.DatetimeIndex(bars["datetime"]))
        if (slots < 0).any():
            bad = bars["datetime"].iloc[int(np.argmax(slots < 0))]
            raise ValueError(f"`bars` has {bad}, which is not in `calendar`.")
        order = np.lexsort((slots, codes))
        self.slots = slots[order]
        sorted_codes = codes[order]
        same = (np.diff(sorted_codes) == 0) & (np.diff(self.slots) == 0)
        if same.any():
            at = int(np.argmax(same))
            raise ValueError(
                f"`bars` has {int(same.sum())} duplicate row(s), the first at "
                f"{self.codes[sorted_codes[at]]} {cal[self.slots[at]]:%Y-%m-%d}."
            )
        # [a, b) rows of instrument i: bounds[i], bounds[i + 1]
        self.bounds = np.searchsorted(sorted_codes, np.arange(len(self.codes) + 1))
        self.values = np.empty((len(self.fields), len(bars)), dtype=np.float32)
        for i, field in enumerate(self.fields):
            self.values[i] = _as_float32(bars[field], field)[order]

    def span(self, i: int) -> tuple[int, int]:
        """First and last calendar slot of instrument `i`."""
        return int(self.slots[self.bounds[i]]), int(self.slots[self.bounds[i + 1] - 1])

    def block(self, i: int) -> tuple[int, np.ndarray]:
        """Start slot and float32 [fields, slots] of instrument `i`, NaN for no row."""
        first, last = self.span(i)
        a, b = self.bounds[i], self.bounds[i + 1]
        out = np.full((len(self.fields), last - first + 1), np.nan, dtype=np.float32)
        out[:, self.slots[a:b] - first] = self.values[:, a:b]
        return first, out


def _as_float32(column: pd.Series, field: str) -> np.ndarray:
    if not (
        pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)
    ):
        raise ValueError(
            f"`bars` field {field!r} has dtype {column.dtype}; it must be a number."
        )
    wide = column.to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):
        values = wide.astype(np.float32)
    if np.isinf(values).any():
        raise ValueError(
            f"`bars` field {field!r} has infinite values or values beyond float32; "
            "use NaN for unknown."
        )
    return values


def _calendar_of(
    bars: pd.DataFrame, calendar: Sequence[Any] | pd.DatetimeIndex | None
) -> pd.DatetimeIndex:
    if not isinstance(bars, pd.DataFrame):
        raise ValueError(f"`bars` must be a DataFrame, got {type(bars).__name__}.")
    missing = [key for key in _KEYS if key not in bars.columns]
    if missing:
        raise ValueError(f"`bars` lacks column(s) {missing}; it has {list(bars)}.")
    if bars.columns.has_duplicates:
        raise ValueError(f"`bars` has duplicate columns: {list(bars.columns)}.")
    if bars.empty:
        raise ValueError("`bars` has no rows; there is nothing to write.")
    if not pd.api.types.is_datetime64_any_dtype(bars["datetime"]):
        raise ValueError(
            f"`bars` column 'datetime' has dtype {bars['datetime'].dtype}; convert it "
            "with pandas.to_datetime."
        )
    days = bars["datetime"].unique() if calendar is None else calendar
    cal = pd.DatetimeIndex(pd.to_datetime(list(days))).unique().sort_values()
    if cal.hasnans or cal.tz is not None or (cal != cal.normalize()).any():
        raise ValueError(
            "`calendar` (or `bars` datetime) must be plain dates: no missing values, "
            "time zone or time of day."
        )
    return cal


def _longer_calendar(bars: pd.DataFrame, old: pd.DatetimeIndex) -> pd.DatetimeIndex:
    days = pd.DatetimeIndex(np.sort(bars["datetime"].unique()))
    inside = days[(days <= old[-1]) & ~days.isin(old)]
    if len(inside):
        raise ValueError(
            f"`bars` has {inside[0]:%Y-%m-%d}, which lies before the end of the store "
            "and is not in its calendar; rebuild the store to insert days."
        )
    return pd.DatetimeIndex(old.append(days[days > old[-1]]))


def _longer_spans(old: pd.DataFrame, panel: _Panel, indices: set[str]) -> pd.DataFrame:
    """Move the end of each known stock's last span; add the new stocks."""
    cal = panel.cal
    last = {c: cal[panel.span(i)[1]] for i, c in enumerate(panel.codes)}
    spans = old.sort_values(["instrument", "start"], ignore_index=True)
    final = ~spans["instrument"].duplicated(keep="last")
    end = spans["instrument"].map(last)
    spans["end"] = spans["end"].where(
        ~(final & end.notna() & (end > spans["end"])), end
    )
    known = set(spans["instrument"])
    new = [
        (code, cal[panel.span(i)[0]], last[code])
        for i, code in enumerate(panel.codes)
        if code not in known and code not in indices
    ]
    added = pd.DataFrame(new, columns=["instrument", "start", "end"])
    return pd.concat([spans, added], ignore_index=True) if new else spans


def _check_index_codes(
    index_codes: Sequence[str], panel: _Panel, *, only: bool = False
) -> set[str]:
    if isinstance(index_codes, str):
        raise ValueError(f"`index_codes` must be a list, got {index_codes!r}.")
    indices = {str(code).upper() for code in index_codes}
    unknown = sorted(indices - set(panel.codes))
    if unknown:
        raise ValueError(f"`index_codes` {unknown} have no rows in `bars`.")
    if len(indices) == len(panel.codes) and not only:
        raise ValueError("`bars` has only indices; a store needs stocks.")
    return indices


def _check_meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    extra = dict(meta or {})
    clash = sorted(set(extra) & set(_RESERVED_META))
    if clash:
        raise ValueError(f"`meta` key(s) {clash} are written by the store itself.")
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`meta` cannot be saved as JSON: {error}.") from error
    return extra


def _all_spans(panel: _Panel, indices: set[str]) -> pd.DataFrame:
    rows = [
        (code, *panel.span(i))
        for i, code in enumerate(panel.codes)
        if code not in indices
    ]
    return pd.DataFrame(rows, columns=["instrument", "start", "end"])


# --------------------------------------------------------------------------- writing


def _write_calendar(build: Path, cal: pd.DatetimeIndex) -> None:
    # Qlib reads day_future.txt instead of day.txt, so it repeats the past. With it a
    # back-test may end on the last day: the exchange looks one day ahead.
    future = pd.bdate_range(cal[-1] + pd.Timedelta(days=1), periods=FUTURE_DAYS)
    days = [f"{day:%Y-%m-%d}" for day in cal]
    later = [f"{day:%Y-%m-%d}" for day in future]
    _write_lines(build / "calendars" / "day.txt", days)
    _write_lines(build / "calendars" / "day_future.txt", days + later)


def _write_market(
    build: Path, name: str, frame: pd.DataFrame, cal: pd.DatetimeIndex
) -> None:
    if not _FIELD.fullmatch(str(name)):
        raise ValueError(
            f"`markets` has name {name!r}; use lower case letters, digits and _."
        )
    missing = {"instrument", "start", "end"} - set(frame.columns)
    if missing:
        raise ValueError(f"`markets`[{name!r}] lacks column(s) {sorted(missing)}.")
    spans = frame[["instrument", "start", "end"]].copy()
    spans["instrument"] = spans["instrument"].astype(str).str.upper()
    for column in ("start", "end"):
        if pd.api.types.is_integer_dtype(spans[column]):  # calendar slots
            spans[column] = cal[spans[column].to_numpy()]
        spans[column] = pd.to_datetime(spans[column])
    if spans[["start", "end"]].isna().any(axis=None):
        raise ValueError(f"`markets`[{name!r}] has a span without start or end.")
    bad = spans[spans["start"] > spans["end"]]
    if not bad.empty:
        row = bad.iloc[0]
        raise ValueError(
            f"`markets`[{name!r}] has {row['instrument']} from {row['start']:%Y-%m-%d} "
            f"to {row['end']:%Y-%m-%d}: the start is after the end."
        )
    spans = spans.sort_values(["instrument", "start"])
    lines = [
        f"{code}\t{start:%Y-%m-%d}\t{end:%Y-%m-%d}"
        for code, start, end in spans.itertuples(index=False)
    ]
    _write_lines(build / "instruments" / f"{name}.txt", lines)


def _write_features(
    build: Path, panel: _Panel, indices: set[str], *, progress: bool
) -> dict[str, list[str]]:
    """Write all bins; return the fields of each index code."""
    index_fields: dict[str, list[str]] = {}
    bar = tqdm(
        panel.codes, desc="bins", unit="stock", disable=None if progress else True
    )
    for i, code in enumerate(bar):
        start, block = panel.block(i)
        fields = list(range(len(panel.fields)))
        if code in indices:  # an index has no industry or market cap: no empty bins
            fields = [j for j in fields if not np.isnan(block[j]).all()]
            index_fields[code] = [panel.fields[j] for j in fields]
        folder = build / "features" / code.lower()
        folder.mkdir(parents=True)
        for j in fields:
            _write_bin(folder / f"{panel.fields[j]}.day.bin", start, block[j])
    return index_fields


def _append_features(
    build: Path,
    panel: _Panel,
    indices: set[str],
    old_days: int,
    *,
    progress: bool,
) -> dict[str, list[str]]:
    """Lengthen the bins of `build`, which are links, by writing new files."""
    index_fields: dict[str, list[str]] = {}
    bar = tqdm(
        panel.codes, desc="bins", unit="stock", disable=None if progress else True
    )
    for i, code in enumerate(bar):
        start, block = panel.block(i)
        end = start + block.shape[1]
        folder = build / "features" / code.lower()
        existing = {f.name[: -len(".day.bin")] for f in folder.glob("*.day.bin")}
        if existing and start < old_days:
            raise ValueError(
                f"`bars` has {code} on {panel.cal[start]:%Y-%m-%d}, which the store "
                "already covers; only later days can be appended."
            )
        folder.mkdir(parents=True, exist_ok=True)
        for j, field in enumerate(panel.fields):
            if field not in existing:
                if code not in indices or not np.isnan(block[j]).all():
                    _write_bin(folder / f"{field}.day.bin", start, block[j])
                continue
            _lengthen(folder / f"{field}.day.bin", old_days, start, block[j])
        for field in sorted(existing - set(panel.fields)):
            empty = np.full(end - start, np.nan, dtype=np.float32)
            _lengthen(folder / f"{field}.day.bin", old_days, start, empty)
        if code in indices:
            names = (f.name[: -len(".day.bin")] for f in folder.glob("*.day.bin"))
            index_fields[code] = sorted(names)
    return index_fields


def _lengthen(file: Path, old_days: int, start: int, values: np.ndarray) -> None:
    first, before = _read_bin(file, old_days)
    gap = start - (first + len(before))
    hole = np.full(gap, np.nan, dtype=np.float32)
    file.unlink()  # a link: the old version keeps its bytes
    _write_bin(file, first, np.concatenate([before, hole, values]))


def _link_tree(old: Path, build: Path) -> None:
    """Fill `build` with hard links to the files of `old` (copies where impossible)."""
    can_link = True
    for folder, _, names in os.walk(old):
        to = build / os.path.relpath(folder, old)
        to.mkdir(exist_ok=True)
        for name in names:
            source = os.path.join(folder, name)
            if can_link:
                try:
                    os.link(source, to / name)
                    continue
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                        raise
                    can_link = False
            shutil.copy2(source, to / name)


def _write_bin(file: Path, start: int, values: np.ndarray) -> None:
    data = np.empty(len(values) + 1, dtype="<f4")
    data[0] = start
    data[1:] = values
    with open(file, "wb") as handle:
        handle.write(data.data)


def _bin_span(file: Path, days: int) -> tuple[int, int]:
    """Start slot and number of values of a bin, of which only the head is read."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        head = handle.read(4)
    if size < 8 or size % 4:
        raise ValueError(f"{file} is damaged: {size} bytes is no float32 bin.")
    return _bin_start(file, head, size // 4 - 1, days), size // 4 - 1


def _bin_start(file: Path, head: bytes, length: int, days: int) -> int:
    start = float(np.frombuffer(head, dtype="<f4")[0])
    if not math.isfinite(start) or start != int(start) or start < 0:
        raise ValueError(f"{file} is damaged: its first value {start} is no slot.")
    if int(start) + length > days:
        raise ValueError(
            f"{file} is damaged: it ends at slot {int(start) + length} of a calendar "
            f"of {days} days."
        )
    return int(start)


def _read_bin(file: Path, days: int) -> tuple[int, np.ndarray]:
    """Start slot and values of a bin; a damaged one is an error, not an empty one."""
    raw = file.read_bytes()
    if len(raw) < 8 or len(raw) % 4:
        raise ValueError(f"{file} is damaged: {len(raw)} bytes is no float32 bin.")
    values = np.frombuffer(raw, dtype="<f4")[1:]
    return _bin_start(file, raw[:4], len(values), days), values


def _write_tables(
    build: Path,
    tables: Mapping[str, pd.DataFrame] | None,
    industry_names: Mapping[str, str] | None,
) -> None:
    folder = build / "tables"
    folder.mkdir(exist_ok=True)
    for name, frame in (tables or {}).items():
        if not _FIELD.fullmatch(str(name)):
            raise ValueError(
                f"`tables` has name {name!r}; use lower case letters, digits and _."
            )
        file = folder / f"{name}.parquet"
        file.unlink(missing_ok=True)  # may be a link into the version readers see
        frame.to_parquet(file, compression="zstd")
    if industry_names is not None:
        names = {str(code): str(name) for code, name in industry_names.items()}
        _write_json(folder / "industry.json", names)


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_new(file, "".join(line + "\n" for line in lines))


def _write_json(file: Path, value: Any) -> None:
    _write_new(file, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _write_new(file: Path, text: str) -> None:
    # unlink first: the file may be a hard link into the version readers see
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


# ------------------------------------------------------------- one version to the next


@contextmanager
def _new_version(
    root: str | os.PathLike[str], *, need_store: bool = False
) -> Iterator[Path]:
    """Yield an empty directory that becomes the store when the block ends well."""
    target = _real(Path(root))
    check_target(target)
    with store_lock(target):
        _recover(target)
        if need_store and not is_store(target):
            raise ValueError(
                f"`root`={target} is no store; there is nothing to extend."
            )
        _remove_leftovers(target)
        build = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.build-", dir=target.parent)
        )
        try:
            os.chmod(build, 0o777 & ~_umask())
            yield build
            _swap(build, target)
        except OSError as error:
            if reason := unwritable(error):
                raise ValueError(
                    f"{target} cannot be written: {reason}. It is as it was before."
                ) from error
            raise
        finally:
            # after a swap this is the old version, after an error the half-built one
            shutil.rmtree(build, ignore_errors=True)


def _real(root: Path) -> Path:
    return Path(os.path.realpath(root))


def _old_name(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(build: Path, target: Path) -> None:
    if not target.exists():
        os.rename(build, target)
        return
    try:
        if _exchange(build, target):
            return
        old = _old_name(target)
        logger.warning(
            "this file system cannot swap directories in one step; for an instant the "
            "store has no name"
        )
        os.rename(target, old)
        os.rename(build, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise ValueError(
                f"`root`={target} is a mount point and cannot be swapped; use a "
                "directory inside it."
            ) from error
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories atomically; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if (
        libc.renameat2(
            at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange
        )
        == 0
    ):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _recover(target: Path) -> None:
    """Put the old version back if a kill fell between the two renames of `_swap`."""
    old = _old_name(target)
    if old.is_dir() and not target.exists():
        os.rename(old, target)
        logger.warning("restored %s after an interrupted write", target)


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.glob(f".{target.name}.build-*"):
        logger.info("removing %s, left by an interrupted write", path)
        shutil.rmtree(path)
    shutil.rmtree(_old_name(target), ignore_errors=True)
