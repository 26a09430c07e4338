"""Which days a rolling task learns from, chooses on, and scores.

Orient Securities, factor series 91 (docs/systems/rnn.md). Two schemes:

``day`` (day and minute features)
    Ten years of training, one year of validation, then the test window.
``l2`` (Level-2 features, of which there are few years)
    All days from the first one on to the test window, split 9:1 by time.

At both borders the earlier segment ends so early that its last label does not reach
into the later one. The fit window of processors is the training segment, always.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
from qlib.utils.mod import get_callable_kwargs

from data_handlers.arguments import Count, checked

__all__ = [
    "Window",
    "label_horizon_of",
    "label_reach_of",
    "make_windows",
    "move_task",
    "own_window",
    "parse_step",
]

#: Share of the days before the test window that `l2` trains on.
L2_TRAIN_SHARE = 0.9

Span = tuple[str, str]


@dataclass(frozen=True)
class Window:
    """The days of one task; every pair is (first, last) trading day, both included.

    Attributes
    ----------
    name : str
        "2018", or the first month, "2018-07", if windows are no calendar years.
    train, valid, test : (str, str)
    handler : (str, str)
        Rows that the handler loads.
    note : str
        What the scheme asks for and the data do not have.
    """

    name: str
    train: Span
    valid: Span
    test: Span
    handler: Span
    note: str = ""

    @property
    def fit(self) -> Span:
        """Window on which processors learn."""
        return self.train

    def record(self) -> dict[str, Any]:
        """Flatten to one row of a table."""
        row = {"window": self.name}
        for part in ("train", "valid", "test", "fit", "handler"):
            first, last = getattr(self, part)
            row |= {f"{part}_start": first, f"{part}_end": last}
        return {**row, "note": self.note}

    def days(self) -> dict[str, Any]:
        """Give what identifies the window in a task's hash: all but note and name."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "note")}


def parse_step(text: str) -> int:
    """Months of a test window from ``year``, ``month``, ``quarter`` or ``6 months``.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    words = {"year": 12, "quarter": 3, "month": 1}
    plain = str(text).strip().lower()
    if plain in words:
        return words[plain]
    found = re.fullmatch(r"(\d+)\s*(m|months?)", plain)
    if found and int(found.group(1)) > 0:
        return int(found.group(1))
    raise ValueError(
        f"`step` must be 'year', 'quarter', 'month' or 'N months', got {text!r}."
    )


@checked
def make_windows(
    calendar: pd.DatetimeIndex,
    test: tuple[Any, Any],
    *,
    scheme: Literal["day", "l2"] = "day",
    step: Count = 12,
    reach: int = 11,
    start: Any = None,
    train_months: Count = 120,
    valid_months: Count = 12,
    gap: int = 0,
) -> list[Window]:
    """Lay out the windows of a rolling study.

    Parameters
    ----------
    calendar : DatetimeIndex
        Trading days of the store.
    test : (start, end)
        Days to score, both included; the last window ends with the calendar if that
        ends earlier.
    scheme : {"day", "l2"}
        See the module.
    step : int
        Months of a test window.
    reach : int
        Trading days after t that the label of t uses: so many lie between segments.
    start : date, optional
        First day to learn from; by default the calendar's.
    train_months, valid_months : int
        Of scheme `day`.
    gap : int
        Trading days that the handler begins before the training segment.

    Raises
    ------
    ValueError
        If a window has no day to train, validate or test on, naming it.
    """
    first, last = pd.Timestamp(test[0]), pd.Timestamp(test[1])
    data_start = 0 if start is None else int(calendar.searchsorted(pd.Timestamp(start)))
    yearly = step == 12 and (first.month, first.day) == (1, 1)
    windows = []
    begins = first
    while begins <= last:
        ends = min(
            begins + pd.DateOffset(months=step) - pd.Timedelta(days=1),
            last,
        )
        name = f"{begins:%Y}" if yearly else f"{begins:%Y-%m}"
        at = int(calendar.searchsorted(begins))
        stop = int(calendar.searchsorted(ends, side="right"))
        if stop <= at:
            raise ValueError(
                f"test window {name} ({begins:%Y-%m-%d} to {ends:%Y-%m-%d}) holds no "
                f"trading day: the store spans {calendar[0]:%Y-%m-%d} to "
                f"{calendar[-1]:%Y-%m-%d}."
            )
        notes = []
        if ends > calendar[-1]:
            notes.append(f"store ends {calendar[-1]:%Y-%m-%d}")
        if scheme == "day":
            wanted = begins - pd.DateOffset(months=valid_months)
            valid_at = max(int(calendar.searchsorted(wanted)), data_start)
            wanted -= pd.DateOffset(months=train_months)
            train_at = max(int(calendar.searchsorted(wanted)), data_start)
            earliest = calendar[data_start] if data_start < len(calendar) else wanted
            # A holiday or two between is no shortage.
            if earliest > wanted + pd.Timedelta(days=14):
                have = (begins - earliest).days / 30.44 - valid_months
                notes.append(f"{have:.0f} of {train_months} months of training")
        else:
            train_at = data_start
            valid_at = train_at + round(L2_TRAIN_SHARE * (at - train_at))
        segments = {
            "train": (train_at, valid_at - reach - 1),
            "valid": (valid_at, at - reach - 1),
        }
        for segment, (a, b) in segments.items():
            if b < a:
                raise ValueError(
                    f"test window {name} leaves no day for `{segment}`: the data begin "
                    f"{calendar[min(data_start, len(calendar) - 1)]:%Y-%m-%d} and "
                    f"{reach} trading days lie between segments. Begin `test` later, "
                    "or shorten validation (`valid_months`)."
                )
        a, b = segments["train"]
        c, d = segments["valid"]
        windows.append(
            Window(
                name=name,
                train=_days(calendar, a, b),
                valid=_days(calendar, c, d),
                test=_days(calendar, at, stop - 1),
                handler=_days(calendar, max(a - gap, 0), stop - 1),
                note="; ".join(notes),
            )
        )
        begins += pd.DateOffset(months=step)
        if begins > calendar[-1]:
            break
    return windows


def own_window(task: Mapping[str, Any]) -> Window:
    """Give the segments that a workflow has itself, as one window named "own"."""
    dataset = next(_datasets(task))
    segments = dataset["kwargs"]["segments"]
    handler = dataset["kwargs"]["handler"].get("kwargs", {})
    spans = {k: (str(v[0]), str(v[1])) for k, v in segments.items()}
    first = handler.get("start_time") or spans["train"][0]
    last = handler.get("end_time") or spans["test"][1]
    return Window(
        name="own",
        train=spans["train"],
        valid=spans["valid"],
        test=spans["test"],
        handler=(str(first), str(last)),
    )


def move_task(task: Mapping[str, Any], window: Window) -> dict[str, Any]:
    """Copy a task with every segment, handler range and fit window moved.

    Data sets inside the model's arguments (`ScoreAverage`) move as well.

    Raises
    ------
    ValueError
        If a data set has no handler of which the days could be set, or segments
        beyond train, valid and test.
    """
    moved = copy.deepcopy(dict(task))
    for dataset in _datasets(moved):
        kwargs = dataset["kwargs"]
        extra = set(kwargs.get("segments") or {}) - {"train", "valid", "test"}
        if extra:
            raise ValueError(
                f"`segments` has {sorted(extra)}; rolling moves train, valid and test."
            )
        if "segments" in kwargs:
            kwargs["segments"] = {
                name: list(getattr(window, name)) for name in ("train", "valid", "test")
            }
        handler = kwargs["handler"]
        cls, _ = get_callable_kwargs(handler)
        own = handler.setdefault("kwargs", {})
        own["start_time"], own["end_time"] = window.handler
        if "fit_start_time" in inspect.signature(cls.__init__).parameters:
            own.setdefault("fit_start_time", None)
            own.setdefault("fit_end_time", None)
        _move_fit(own, window.fit)
    return moved


def label_reach_of(task: Mapping[str, Any]) -> int:
    """Trading days after t that the labels of a task's handler use.

    Raises
    ------
    ValueError
        If it cannot be told from the handler's arguments.
    """
    return max(_label_of(d["kwargs"]["handler"])[0] for d in _datasets(task))


def label_horizon_of(task: Mapping[str, Any]) -> int:
    """Trading days between the prices of a task's label; see `label_reach_of`."""
    return _label_of(next(_datasets(task))["kwargs"]["handler"])[1]


def _label_of(handler: Mapping[str, Any]) -> tuple[int, int]:
    """How far the labels of a handler reach, and the horizon of the first."""
    from data_handlers.labels import given_labels, holding_days, label_reach

    cls, kwargs = get_callable_kwargs(handler)
    label = kwargs.get("label")  # in place of `horizon` where a handler has both
    horizon = kwargs.get("horizon")
    parameters = inspect.signature(cls.__init__).parameters
    if horizon is None and "horizon" in parameters:
        horizon = parameters["horizon"].default
    if not label and horizon not in (None, inspect.Parameter.empty):
        every = list(horizon) if isinstance(horizon, (list, tuple)) else [horizon]
        return label_reach(int(max(every))), int(every[0])
    if not label and hasattr(cls, "get_label_config"):
        label = cls.get_label_config(object.__new__(cls))
    loader = kwargs.get("data_loader")
    if not label and isinstance(loader, Mapping):
        groups = (loader.get("kwargs") or {}).get("config")
        label = groups.get("label") if isinstance(groups, Mapping) else None
    if label:
        expressions, _, reach = given_labels(label)
        return reach, holding_days(expressions[0])
    raise ValueError(
        f"how far the labels of {cls.__name__} reach cannot be told: to roll, give "
        "`purge`, in trading days (11 for the return from the close of t+1 to that of "
        "t+11)."
    )


def calendar_gap(task: Mapping[str, Any], calendar: pd.DatetimeIndex) -> int:
    """Trading days that a workflow's handler begins before its training segment."""
    window = own_window(task)
    first = int(calendar.searchsorted(pd.Timestamp(window.handler[0])))
    train = int(calendar.searchsorted(pd.Timestamp(window.train[0])))
    return max(0, train - first)


def _days(calendar: pd.DatetimeIndex, first: int, last: int) -> Span:
    return f"{calendar[first]:%Y-%m-%d}", f"{calendar[last]:%Y-%m-%d}"


def _datasets(node: Any) -> Iterator[dict]:
    """Every data set configuration below a node, the task's own first."""
    if isinstance(node, Mapping):
        if "dataset" in node and "model" in node:  # a task: its own first
            yield from _datasets(node["dataset"])
            yield from _datasets({k: v for k, v in node.items() if k != "dataset"})
            return
        kwargs = node.get("kwargs")
        if isinstance(kwargs, Mapping) and "handler" in kwargs:
            handler = kwargs["handler"]
            if not isinstance(handler, Mapping) or "class" not in handler:
                raise ValueError(
                    f"`handler` must name a class and its arguments to be moved, got "
                    f"{handler!r}."
                )
            yield node  # type: ignore[misc]
        for value in node.values():
            yield from _datasets(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _datasets(value)


def _move_fit(node: Any, fit: Span) -> None:
    """Set every fit window below the handler's arguments, processors' included."""
    if isinstance(node, dict):
        for name, value in (("fit_start_time", fit[0]), ("fit_end_time", fit[1])):
            if name in node:
                node[name] = value
        for value in node.values():
            _move_fit(value, fit)
    elif isinstance(node, list):
        for value in node:
            _move_fit(value, fit)
