"""Which source files make which partition: a day of ticks or a month of bars."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.log import get_module_logger

from data_handlers.aggregate import reading
from data_handlers.aggregate.minute import MINUTE_FEATURES, MINUTE_NAMES
from data_handlers.aggregate.schema import FLOW_FIELDS, SCHEMA_VERSION, Session
from data_handlers.aggregate.ticks import FLOW_FEATURES, TICK_FEATURES, TICK_NAMES
from data_handlers.aggregate.windows import bar_features
from data_handlers.vendor.intraday import choose, first_and_last
from data_handlers.vendor.mapping import Source, VendorMapping
from data_handlers.vendor.text import is_text, left_out

__all__ = [
    "KINDS",
    "Options",
    "Part",
    "day_of_path",
    "features_of",
    "mark_of",
    "plan",
]

#: Kind of build to the names and definitions of its features and its source tables.
KINDS = {
    "ms": (MINUTE_NAMES, MINUTE_FEATURES, ("bars",)),
    "l2": (TICK_NAMES, TICK_FEATURES, ("trades", "orders", "quotes")),
    "flow": (list(FLOW_FIELDS), FLOW_FEATURES, ("trades",)),
    # its columns follow from the session and the length of a bar
    "bars": ([], (), ("bars",)),
}
_OF_BARS = ("ms", "bars")
_DAY = re.compile(r"(?<!\d)((?:19|20)\d{2})[-_.]?([01]\d)[-_.]?([0-3]\d)(?!\d)")

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


def plan(
    kind: str,
    source: str,
    spec: VendorMapping,
    session: Session,
    start: str | None,
    end: str | None,
) -> list[Part]:
    """List the partitions of a source, in order of their days.

    Raises
    ------
    ValueError
        If there is no such source, or nothing in it between `start` and `end`.
    """
    if not os.path.exists(source):
        raise ValueError(f"`source` {source} does not exist.")
    tables = KINDS[kind][2]
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
        when = "" if low is high is None else f" between {low} and {high}"
        raise ValueError(
            f"No bars{when} in the {len(files)} file(s), first {files[0]}: no rows "
            "there; fetch them again, or change `--start` and `--end`."
        )
    return [Part(k, {"bars": v}) for k, v in sorted(groups.items())]


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
    if unread := left_out(found):
        logger.warning(
            "%d file(s) in forms that are not read are left out, first %s; save them "
            "as CSV or Parquet",
            len(unread),
            unread[0],
        )
    return sorted(
        f
        for f in found
        if (is_text(f) or f.lower().endswith(".parquet")) and os.path.isfile(f)
    )


def _months_of(file: str, spec: VendorMapping, session: Session) -> tuple[Any, Any]:
    """First and last month of a file, from its statistics or its rows."""
    layout = choose(spec.tables.get("bars", ()), "bars", file)
    first, last, _ = first_and_last(file, layout, "datetime", session.tz)
    return first.astype("datetime64[M]"), last.astype("datetime64[M]")


def _days_of(file: str, table: str, spec: VendorMapping, session: Session) -> list[str]:
    """Days of a tick file: the one in its path, else those of its rows."""
    if day := day_of_path(file):
        return [day]
    layout = choose(spec.tables.get(table, ()), table, file)
    first, last, days = first_and_last(file, layout, "time", session.tz)
    if days is None:
        days = np.unique(np.array([first, last]).astype("datetime64[D]"))
        if len(days) > 1:
            _, _, days = first_and_last(file, layout, "time", session.tz, rows=True)
    assert days is not None  # read row by row
    return [str(d) for d in days]


def day_of_path(file: str) -> str | None:
    """Day that a file's name, or a folder it lies in, carries."""
    for text in (Path(file).stem, *reversed(Path(file).parts[:-1])):
        if found := _DAY.search(text):
            return "-".join(found.groups())
    return None


def mark_of(part: Part, options: Options) -> str:
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


def features_of(kind: str, session: Session, bar_minutes: int) -> tuple[Any, ...]:
    """Definitions of a kind's columns."""
    if kind == "bars":
        return bar_features(session.slots(bar_minutes))
    return tuple(KINDS[kind][1])
