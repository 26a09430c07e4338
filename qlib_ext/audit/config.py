"""Move a workflow onto another calendar, and bound how long its model trains."""

from __future__ import annotations

import copy
import datetime
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["DateMap", "bounded", "retarget", "store_needs"]

_DATE = re.compile(r"(19|20)\d{2}-?[01]\d-?[0-3]\d( 00:00:00)?")
# What bounds training, for models of Qlib and of this package; applied only to
# arguments that a constructor names or a workflow sets.
_BOUNDS: dict[str, Any] = {
    "n_epochs": "epochs",
    "max_epochs": "epochs",
    "early_stop": "epochs",
    "gate_n_epochs": "epochs",
    "gate_early_stop": "epochs",
    "n_seeds": 1,
    "n_folds": 2,
    "num_boost_round": 30,
    "num_threads": 1,
    "n_jobs": 0,
    "GPU": -1,
    "checkpoint_dir": None,
    "cache_dir": None,
}
_MOST = {"n_seeds", "n_folds", "num_boost_round"}  # never raised above what is given
_DATA: dict[str, Any] = {"keep_frames": True, "drop_raw": False}
LONGEST_GAP = 40
SHORTEST = 0.15  # share of the days that a segment gets at least
SHORTEST_TEST = 0.3


class DateMap:
    """Dates of a workflow on another, shorter calendar.

    Gaps between segments keep their length in trading days (up to 40), so a purge that
    is missing stays missing; segments shrink alike, none below a few months.

    Parameters
    ----------
    segments : dict
        Name to (start, end), both inclusive.
    old, new : DatetimeIndex
        Trading calendars.
    start, end : optional
        Time range of the handler; up to 80 days before and 30 after the segments stay.
    """

    def __init__(
        self,
        segments: Mapping[str, Any],
        old: pd.DatetimeIndex,
        new: pd.DatetimeIndex,
        start: Any = None,
        end: Any = None,
    ) -> None:
        self.old, self.new = old, new
        spans = {k: (self._first(s), self._stop(e)) for k, (s, e) in segments.items()}
        for name, (first, stop) in spans.items():
            if stop <= first:
                raise ValueError(
                    f"segment `{name}` {segments[name]} holds no trading day."
                )
        points = np.unique([p for span in spans.values() for p in span])
        lead = 0 if start is None else min(max(0, points[0] - self._first(start)), 80)
        tail = 0 if end is None else min(max(0, self._stop(end) - points[-1]), 30)
        lengths = np.diff(points).astype(float)
        inside = np.array(
            [
                any(f <= p and q <= s for f, s in spans.values())
                for p, q in itertools.pairwise(points)
            ]
        )
        lengths[~inside] = np.minimum(lengths[~inside], LONGEST_GAP)
        room = len(new) - lead - tail - lengths[~inside].sum()
        share = lengths[inside] / lengths[inside].sum()
        share = np.maximum(share, min(SHORTEST, 1 / len(share)))
        if "test" in spans and (at := self._only(points, inside, spans["test"])) >= 0:
            share[at] = max(share[at], SHORTEST_TEST)
        lengths[inside] = np.floor(room * share / share.sum())
        if room < 40 * inside.sum():
            raise ValueError(
                f"the audit's calendar of {len(new)} days is too short for segments "
                f"{dict(segments)} and the gaps between them."
            )
        self.points = points
        self.moved = lead + np.concatenate([[0], np.cumsum(lengths)]).astype(int)

    @staticmethod
    def _only(points, inside, span) -> int:
        """Look up which covered stretch is this span; -1 if it is cut up."""
        at = np.flatnonzero((points[:-1] == span[0]) & (points[1:] == span[1]))
        return int(inside[: at[0]].sum()) if len(at) else -1

    def _first(self, value: Any) -> int:
        return int(self.old.searchsorted(pd.Timestamp(value), side="left"))

    def _stop(self, value: Any) -> int:
        return int(self.old.searchsorted(pd.Timestamp(value), side="right"))

    def _move(self, position: int) -> int:
        if position <= self.points[0]:
            moved = self.moved[0] - (self.points[0] - position)
        elif position >= self.points[-1]:
            moved = self.moved[-1] + (position - self.points[-1])
        else:
            moved = int(np.interp(position, self.points, self.moved))
        return int(moved)

    def start(self, value: Any) -> str:
        """First day of a stretch that began on `value`."""
        at = min(max(self._move(self._first(value)), 0), len(self.new) - 1)
        return f"{self.new[at]:%Y-%m-%d}"

    def end(self, value: Any) -> str:
        """Last day of a stretch that ended on `value`."""
        at = min(max(self._move(self._stop(value)) - 1, 0), len(self.new) - 1)
        return f"{self.new[at]:%Y-%m-%d}"


def is_date(value: Any) -> bool:
    """Whether a YAML value is a day."""
    if isinstance(value, (datetime.date, pd.Timestamp)):
        return True
    return isinstance(value, str) and _DATE.fullmatch(value) is not None


def retarget(
    task: Mapping[str, Any],
    dates: DateMap,
    markets: set[str],
    codes: frozenset[str] | set[str] = frozenset(),
) -> tuple[dict[str, Any], list[str]]:
    """Move every date of a task, and name a market that the store has.

    A list of instruments stays where they are all among `codes`, in lower case.

    Returns
    -------
    dict
        The task.
    list of str
        What else was changed, in words.
    """
    notes: list[str] = []

    def walk(value: Any, key: str, ends: bool) -> Any:
        if isinstance(value, Mapping):
            return {k: walk(v, str(k), "end" in str(k)) for k, v in value.items()}
        if key == "instruments" and isinstance(value, (list, tuple)):
            if all(str(v).lower() in codes for v in value):
                return list(value)
            return walk(", ".join(map(str, value)), key, ends)
        if isinstance(value, (list, tuple)):
            pair = len(value) == 2 and all(v is None or is_date(v) for v in value)
            return [walk(v, key, i == 1 if pair else ends) for i, v in enumerate(value)]
        if is_date(value):
            return dates.end(value) if ends else dates.start(value)
        if key in ("instruments", "market", "universe") and isinstance(value, str):
            if value.lower() not in markets:
                note = f"market {value!r} is not in the simulated store: all stocks"
                if note not in notes:
                    notes.append(note)
                return "all"
        return value

    return walk(task, "", False), notes


def bounded(
    task: Mapping[str, Any], epochs: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Bound training, keep training on the CPU in this process, keep all frames.

    Parameters
    ----------
    task : mapping
        With `model` and `dataset`.
    epochs : int
        Most passes over the data.
    overrides : mapping
        Set wherever a `kwargs` below the model has the name, or a constructor does.
    """
    bounds: dict[str, Any] = copy.deepcopy(dict(task))
    values = {k: epochs if v == "epochs" else v for k, v in _BOUNDS.items()}
    for node in _classes(bounds["model"]):
        kwargs = node.setdefault("kwargs", {})
        if kwargs is None:
            kwargs = node["kwargs"] = {}
        named = _parameters(node)
        for name, value in {**values, **overrides}.items():
            if name not in kwargs and name not in named:
                continue
            given = kwargs.get(name)
            if name in _MOST and isinstance(given, int) and name not in overrides:
                value = min(given, value)
            if name not in kwargs and name in ("n_jobs", "num_threads", "cache_dir"):
                # Elsewhere these names mean other things; the default stays.
                if not node.get("module_path", "").startswith("qlib"):
                    continue
            kwargs[name] = value
        if node.get("class") == "LGBModel":
            kwargs.setdefault("num_threads", 1)
            kwargs.setdefault("num_boost_round", values["num_boost_round"])
    for node in _classes(bounds["dataset"]):
        kwargs = node.get("kwargs") or {}
        for name, value in _DATA.items():
            if name in kwargs:
                kwargs[name] = value
    return bounds


def store_needs(task: Any) -> set[str]:
    """Find what a task needs in a store beside day bars.

    Returns
    -------
    set of str
        Folders and files that arguments name as ``{store}/...`` (`ms`, `mined.yaml`),
        `flow` for a table of capital flow, `bonds` and `futures` for a store of these,
        and `funds` for holdings of funds.
    """
    found: set[str] = set()

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for v in value.values():
                yield from texts(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from texts(v)
        elif isinstance(value, str):
            yield value

    every = list(texts(task))
    for node in _classes(task):
        every += [
            p.default for p in _parameters(node).values() if isinstance(p.default, str)
        ]
    for text in every:
        if match := re.match(r"\{store\}/([\w.-]+)", text):
            found.add(match.group(1))
    if any("$flow_" in text or text == "FlowHandler" for text in every):
        found.add("flow")
    if "ConvertibleHandler" in every:
        found.add("bonds")
    if any(text.startswith("data_handlers.holdings.") for text in every):
        found.add("funds")
    if "FuturesHandler" in every:
        found.add("futures")
    return found


def _classes(value: Any) -> Iterator[dict[str, Any]]:
    """Every config with a `class` below a value."""
    if isinstance(value, dict):
        if "class" in value:
            yield value
        for item in value.values():
            yield from _classes(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _classes(item)


def _parameters(node: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """Arguments of the constructor a config names; empty if that cannot be told."""
    name, path = node.get("class"), node.get("module_path")
    if not isinstance(name, str) or not isinstance(path, str) or path.endswith(".py"):
        return {}
    try:
        found = getattr(importlib.import_module(path), name)
        return inspect.signature(found.__init__).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return {}  # building it will say what is wrong, by name


def calendar_of(store: Path | None) -> pd.DatetimeIndex:
    """Trading days by which a workflow's dates are counted."""
    from qlib_ext.ingest.store import is_store, read_calendar
    from qlib_ext.market.calendar import trading_days, weekdays

    if store is not None and is_store(store):
        return read_calendar(store)
    past = trading_days(30)
    later = weekdays(past[-1] + pd.Timedelta(days=1), pd.Timestamp("2045-12-31"))
    return pd.DatetimeIndex(past.append(later))
