"""Frames loaded once a process and cut by every handler that needs a part of them.

Rolling retraining builds one handler a year and seed; their windows overlap by most of
their days. Inside `shared_frames` a handler does not read the store: it cuts its days
out of frames that cover all windows, loaded at first use. Learned processors are still
fitted on each handler's own fit window. Processors of which every row depends on its
own day and the past alone, whatever the frame's span, say so by an attribute `by_day`;
with one among them that says `costly` they run once, on the long frame.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.log import get_module_logger
from qlib.utils import lazy_sort_index

from data_handlers.cross_section import column_values
from data_handlers.labels import check_labels
from data_handlers.segments import check_begins, check_segments

__all__ = [
    "FrameShare",
    "SharedLoading",
    "labels_alone",
    "shared_class",
    "shared_frames",
]

logger = get_module_logger("data_handlers.sharing")

# Bytes of a frame that is kept for later handlers: a larger one would stand beside each
# handler's own frames and what a model copies of them.
_LARGEST = 4 * 2**30


class Frames(NamedTuple):
    """What a share gives a handler: a raw frame, and what stands ready of it.

    A frame that is too large to be kept has no `raw`; its first handler finds it in
    `ready`, a later one loads its own days.
    """

    raw: pd.DataFrame | None
    ready: pd.DataFrame | None  # after the first `ahead` shared processors
    ahead: int


class FrameShare:
    """Frames of a span of days, one pair for each way of loading.

    Parameters
    ----------
    start, end : str or Timestamp
        Span to load; it must cover the handlers that are to use it.
    keep : int, default 4
        Pairs kept; the one not used for longest goes first.

    Attributes
    ----------
    loads : int
        How often the store was read.
    """

    def __init__(self, start: Any, end: Any, keep: int = 4) -> None:
        self.start, self.end = pd.Timestamp(start), pd.Timestamp(end)
        self.keep = keep
        self.loads = 0
        self._frames: OrderedDict[str, Frames] = OrderedDict()
        self._too_large: set[str] = set()

    def covers(self, start: Any, end: Any) -> bool:
        """Whether the span holds `start` to `end`."""
        if start is None or end is None:
            return False
        return self.start <= pd.Timestamp(start) and pd.Timestamp(end) <= self.end

    def frames(self, handler: DataHandlerLP) -> Frames | None:
        """Frames that hold a handler's days.

        Processors are run ahead only if one of them takes time.

        None if the loader's rows do not begin with the day, so cannot be cut by days.
        """
        ahead = 0
        for number, processor in enumerate(handler.shared_processors, 1):
            if not getattr(processor, "by_day", False):
                break
            # A quick one by itself is not worth the second copy, its frame.
            if getattr(processor, "costly", False):
                ahead = number
        key = _key(handler, ahead)
        if key in self._too_large:
            return Frames(None, None, 0)
        if key not in self._frames:
            self.loads += 1
            logger.info(f"loading {self.start:%Y-%m-%d} to {self.end:%Y-%m-%d} once")
            raw = lazy_sort_index(
                handler.data_loader.load(handler.instruments, self.start, self.end)
            )
            if raw.index.names[0] != "datetime":
                return None
            size = raw.memory_usage(index=False).sum()
            if size > _LARGEST:
                logger.info(
                    f"its {size / 2**30:.1f} GiB are not kept: each window loads its "
                    "own days, and keeps of the raw frame the labels alone"
                )
                self._too_large.add(key)
                return Frames(None, raw, 0)
            ready = raw
            for processor in handler.shared_processors[:ahead]:
                ready = processor(ready)
            self._frames[key] = Frames(raw, ready, ahead)
            while len(self._frames) > self.keep:
                self._frames.popitem(last=False)
        self._frames.move_to_end(key)
        return self._frames[key]


_active: FrameShare | None = None


@contextmanager
def shared_frames(share: FrameShare | None) -> Iterator[None]:
    """Let handlers made inside the block take their frames from `share`."""
    global _active
    before, _active = _active, share
    try:
        yield
    finally:
        _active = before


class SharedLoading(DataHandlerLP):
    """A `DataHandlerLP` that takes its frames from `shared_frames` where it can."""

    _checked = ""  # segments found right; not kept by Qlib's pickling

    def fetch(
        self,
        selector: Any = slice(None),
        level: Any = "datetime",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Select rows; see Qlib.

        Raises
        ------
        ValueError
            If a `DatasetH` asks, of which a segment begins after the data end, two
            share days, or `valid` or `test` lies in a processor's fit window.
        """
        self._check_segments()
        return super().fetch(selector, level, *args, **kwargs)

    def _check_segments(self) -> None:
        """Judge the segments of the data set that asks, once.

        Qlib tells a handler nothing of them, and its own models go on with whatever
        they get: so the callers are looked at for a `DatasetH`, before any training.
        """
        frame, dataset = sys._getframe(2), None
        for _ in range(6):
            if frame is None or dataset is not None:
                break
            owner = frame.f_locals.get("self")
            dataset = owner if isinstance(owner, DatasetH) else None
            frame = frame.f_back  # type: ignore[assignment]
        segments = getattr(dataset, "segments", None)
        frames = getattr(self, "_infer", None)
        if not isinstance(segments, dict) or not isinstance(frames, pd.DataFrame):
            return
        if hasattr(dataset, "checks_segments") or self._checked == str(segments):
            return
        days = pd.DatetimeIndex(frames.index.unique("datetime")).sort_values()
        if len(days):
            check_begins(segments, days)
            reach = getattr(self, "label_reach", None)
            check_segments(self, segments, days, reach)
        self._checked = str(segments)

    def setup_data(self, init_type: str = DataHandlerLP.IT_FIT_SEQ, **kwargs) -> None:
        """Load, or cut, and process the data; see Qlib."""
        share, found = _active, None
        if (
            share is not None
            and init_type == DataHandlerLP.IT_FIT_SEQ
            and share.covers(self.start_time, self.end_time)
        ):
            found = share.frames(self)
        if found is None:
            super().setup_data(init_type=init_type, **kwargs)
            return
        days = slice(pd.Timestamp(self.start_time), pd.Timestamp(self.end_time))
        raw, ready, ahead = found
        if ready is None:
            with labels_alone():
                super().setup_data(init_type=init_type, **kwargs)
            return
        if raw is None:
            self._data = ready.loc[days]
            del found, ready  # the first processor's own frame takes its place
            with labels_alone():
                self.fit_process_data()
            return
        every: list = self.shared_processors  # type: ignore[has-type]
        self._data = ready.loc[days]
        self.shared_processors = every[ahead:]
        try:
            self.fit_process_data()
        finally:
            self.shared_processors = every
        if not self.drop_raw:
            self._data = raw.loc[days]

    def process_data(self, with_fit: bool = False) -> None:
        """Process the data, whose labels must not be infinite; see Qlib.

        The frames are Qlib's. Qlib copies its input before a list with any processor
        that writes to it; here the copy is made right before that processor, and only
        if its frame is not one of its own already: Alpha158's
        ``[DropnaLabel, CSZScoreNorm]`` makes one copy of the features, not two.
        """
        check_labels(self._data)
        if self.process_type not in (DataHandlerLP.PTYPE_A, DataHandlerLP.PTYPE_I):
            raise ValueError(
                "`process_type` must be 'append' or 'independent', got "
                f"{self.process_type!r}."
            )
        frame, shared = self._data, pd.DataFrame()
        if _only_labels and "label" in frame.columns.get_level_values(0):
            self._data = frame.loc[:, ["label"]].copy()
        for name, processors in (
            ("_shared", self.shared_processors),
            ("_infer", self.infer_processors),
            ("_learn", self.learn_processors),
        ):
            if name == "_learn" and self.process_type == DataHandlerLP.PTYPE_I:
                frame = shared
            given = _addresses(frame)
            for processor in processors:
                if not processor.readonly() and given & _addresses(frame):
                    frame = frame.copy()
                frame = self._run_proc_l(frame, [processor], with_fit, name != "_learn")
            if name != "_shared":
                setattr(self, name, frame)
            elif self.process_type == DataHandlerLP.PTYPE_I:
                shared = frame
        if self.drop_raw:
            del self._data


_only_labels = False


@contextmanager
def labels_alone() -> Iterator[None]:
    """Let handlers made inside the block keep only the labels of their raw frame.

    For a caller that reads nothing else of it: the loaded features are freed as soon as
    the first processor has made its own.
    """
    global _only_labels
    before, _only_labels = _only_labels, True
    try:
        yield
    finally:
        _only_labels = before


def _addresses(frame: pd.DataFrame) -> set[int]:
    """Where the arrays begin of which a frame's columns are views; -1 can't be told.

    Two frames have one in common if writing to one may change the other.
    """
    found = set()
    for at, kind in enumerate(frame.dtypes):
        values = column_values(frame, at)
        while isinstance(values.base, np.ndarray):
            values = values.base
        own = isinstance(kind, np.dtype) and values.base is None
        found.add(values.__array_interface__["data"][0] if own else -1)
    return found


def shared_class(cls: type[DataHandlerLP]) -> type[DataHandlerLP]:
    """Give a handler class of anybody the loading of `SharedLoading`.

    Objects of the result should get `cls` back as their ``__class__`` once they are
    made: the result itself cannot be pickled.
    """
    if issubclass(cls, SharedLoading):
        return cls
    return type(cls.__name__, (SharedLoading, cls), {})


def _key(handler: DataHandlerLP, ahead: int) -> str:
    """Text that is equal for handlers that load and prepare the same rows."""
    parts = [handler.data_loader, *handler.shared_processors[:ahead]]
    return json.dumps(
        [
            str(C.dpm.get_data_uri("day")),
            handler.instruments,
            [[type(part).__qualname__, vars(part)] for part in parts],
        ],
        sort_keys=True,
        default=repr,
    )
