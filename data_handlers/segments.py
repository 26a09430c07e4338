"""Segments of a data set against its handler's days, labels and fit windows."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd
from qlib.log import get_module_logger

__all__ = [
    "check_begins",
    "check_fit_windows",
    "check_overlap",
    "check_purge",
    "check_segments",
    "check_spans",
    "overlap_words",
    "segment_ends",
]

logger = get_module_logger("data_handlers.segments")


def _slice(segment: Any) -> slice:
    return segment if isinstance(segment, slice) else slice(*segment)


def segment_ends(segment: Any) -> tuple[pd.Timestamp | None, pd.Timestamp | None]:
    """First and last day of a (start, end) pair or slice; None is open."""
    slc = _slice(segment)
    start, end = (None if d is None else pd.Timestamp(d) for d in (slc.start, slc.stop))
    return start, end


def check_begins(segments: dict[str, Any], dates: pd.DatetimeIndex) -> None:
    """Refuse segments that begin after the data's last day, or end before they start.

    Parameters
    ----------
    segments : dict
        Name to (start, end), both inclusive.
    dates : DatetimeIndex
        Days of the data.

    Raises
    ------
    ValueError
        Naming segment and dates.
    """
    for name, segment in segments.items():
        start, end = segment_ends(segment)
        if start is not None and end is not None and start > end:
            raise ValueError(
                f"`segments.{name}` starts at {start:%Y-%m-%d}, after its end "
                f"{end:%Y-%m-%d}."
            )
        if start is not None and start > dates[-1]:
            raise ValueError(_no_day(name, segment, dates))


def _no_day(name: str, segment: Any, dates: pd.DatetimeIndex) -> str:
    return (
        f"`segments.{name}` ({_slice(segment).start}..{_slice(segment).stop}) holds no "
        f"trading day of the data, which spans {dates[0]:%Y-%m-%d} to "
        f"{dates[-1]:%Y-%m-%d}: end it, and the handler's `end_time`, within the "
        "store's days."
    )


def check_spans(segments: dict[str, Any], dates: pd.DatetimeIndex) -> None:
    """Refuse segments that end before they start, or hold no day of the data.

    As `check_begins`, which it includes.
    """
    check_begins(segments, dates)
    for name, segment in segments.items():
        if dates[slice(*dates.slice_locs(*segment_ends(segment)))].empty:
            raise ValueError(_no_day(name, segment, dates))


def check_purge(
    segments: dict[str, Any], dates: pd.DatetimeIndex, reach: int
) -> list[tuple[str, str, int, pd.Timestamp | None]]:
    """Borders between segments at which a label reaches into the later segment.

    Parameters
    ----------
    segments : dict
        Name to (start, end), both inclusive.
    dates : DatetimeIndex
        Trading calendar.
    reach : int
        Trading days after t that the label of t uses.

    Returns
    -------
    list of (earlier, later, gap, last)
        `gap` trading days lie strictly between the two, fewer than `reach`; `last` is
        the last day at which the earlier segment may end, None if there is none.
    """
    spans = []
    for name, segment in segments.items():
        start, stop = dates.slice_locs(*segment_ends(segment))
        if stop > start:
            spans.append((int(start), int(stop) - 1, name))
    spans.sort()
    found = []
    for (_, end, earlier), (start, _, later) in itertools.pairwise(spans):
        gap = start - end - 1
        if gap < reach:
            last = start - reach - 1
            found.append((earlier, later, gap, dates[last] if last >= 0 else None))
    return found


def overlap_words(
    segments: dict[str, Any],
    reach: int,
    earlier: str,
    later: str,
    gap: int,
    last: pd.Timestamp | None,
) -> str:
    """Say what is wrong at a border that `check_purge` found, and what helps."""
    return (
        f"`segments.{earlier}` ends at {_slice(segments[earlier]).stop} and "
        f"`segments.{later}` starts at {_slice(segments[later]).start}: {gap} trading "
        f"days lie between, but the label uses prices up to {reach} trading days "
        f"ahead, so {reach} are needed. "
        + (
            f"No day of the data is early enough for `{earlier}` to end at"
            if last is None
            else f"End `{earlier}` at {last:%Y-%m-%d} or earlier"
        )
    )


def check_fit_windows(
    handler: Any, segments: dict[str, Any], dates: pd.DatetimeIndex
) -> None:
    """Refuse processors that learn from days on which the model is judged.

    Parameters
    ----------
    handler : DataHandler
        Its processors with a `fit_end_time` learn from the days up to it.
    segments : dict
        Name to (start, end), both inclusive; `valid` and `test` are looked at.
    dates : DatetimeIndex
        Trading calendar.

    Raises
    ------
    ValueError
        If a fit window reaches into `valid` or `test`, naming processor and dates.
    """
    all_of = getattr(handler, "get_all_processors", list)
    fitted = [p for p in all_of() if hasattr(p, "fit_end_time")]
    for name, processor in itertools.product(("valid", "test"), fitted):
        if name not in segments:
            continue
        days = dates[slice(*dates.slice_locs(*segment_ends(segments[name])))]
        start, end = segment_ends(
            (getattr(processor, "fit_start_time", None), processor.fit_end_time)
        )
        if days.empty or (start is not None and days[-1] < start):
            continue
        if end is None or days[0] <= end:
            until = "the last day" if end is None else f"{end:%Y-%m-%d}"
            raise ValueError(
                f"{type(processor).__name__} learns from days up to {until} "
                f"(`fit_end_time`), but `segments.{name}` starts at "
                f"{days[0]:%Y-%m-%d}: it would know days that it is judged on. Set "
                "`fit_end_time` to the end of `segments.train` or earlier."
            )


def check_overlap(segments: dict[str, Any], dates: pd.DatetimeIndex) -> None:
    """Refuse segments that share days.

    Parameters
    ----------
    segments : dict
        Name to (start, end), both inclusive; `train`, `valid` and `test` are looked at.
    dates : DatetimeIndex
        Trading calendar.

    Raises
    ------
    ValueError
        If two of them share days.
    """
    named = {k: v for k, v in segments.items() if k in ("train", "valid", "test")}
    for earlier, later, gap, _ in check_purge(named, dates, 0):
        raise ValueError(
            f"`segments.{earlier}` ends at {_slice(named[earlier]).stop} and "
            f"`segments.{later}` starts at {_slice(named[later]).start}: they share "
            f"{-gap} trading day(s). End `{earlier}` as many trading days before it as "
            "the label reaches ahead."
        )


def check_segments(
    handler: Any, segments: dict[str, Any], dates: pd.DatetimeIndex, reach: int | None
) -> None:
    """Refuse segments on which no model could be judged, and warn of short gaps.

    Parameters
    ----------
    handler : DataHandler
    segments : dict
        Name to (start, end), both inclusive.
    dates : DatetimeIndex
        Days of the data.
    reach : int or None
        Trading days after t that the label of t uses, where that is known.

    Raises
    ------
    ValueError
        See `check_fit_windows` and `check_overlap`.
    """
    check_fit_windows(handler, segments, dates)
    check_overlap(segments, dates)
    for border in check_purge(segments, dates, reach or 0):
        logger.warning(overlap_words(segments, reach or 0, *border) + ".")
