"""Features of a few days, read for all stocks at once.

Qlib evaluates an expression instrument by instrument, which for thousands of stocks
takes longer than everything else that a morning's score needs. Here the tails of the
bins are read and Qlib's own expression trees are evaluated on frames of days by
instruments. Operators that are not known here make `recent_frame` return None; the
caller then asks Qlib.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data import D
from qlib.data import ops as O
from qlib.data.base import Expression, Feature, PFeature
from qlib.data.data import ExpressionD
from qlib.data.dataset.loader import QlibDataLoader

from data_handlers.loaders import (
    ParquetDataLoader,
    expand_store,
    instrument_spans,
    membership_mask,
    read_daily_parquet,
)

__all__ = ["RawDays", "Unsupported", "evaluate", "fields_of", "recent_frame"]


class Unsupported(Exception):
    """An operator or a loader that only Qlib itself can evaluate."""


@dataclass
class RawDays:
    """Raw fields of consecutive trading days, read from bins at first use.

    Attributes
    ----------
    calendar : DatetimeIndex
        Trading days of the store.
    first, last : int
        Slots of the calendar that are covered, both included.
    instruments : list of str
    """

    calendar: pd.DatetimeIndex
    first: int
    last: int
    instruments: list[str]
    _fields: dict[str, pd.DataFrame] = field(default_factory=dict)
    _inside: np.ndarray | None = None

    def __getitem__(self, name: str) -> pd.DataFrame:
        """Field as float32 frame [days, instruments]; NaN where there is no value."""
        if name not in self._fields:
            folder = Path(str(C.dpm.get_data_uri("day"))) / "features"
            days = self.last - self.first + 1
            values = np.full((len(self.instruments), days), np.nan, np.float32)
            if self._inside is None:
                self._inside = np.zeros((len(self.instruments), days), bool)
            for i, code in enumerate(self.instruments):
                found = _tail(
                    os.path.join(folder, code.lower(), f"{name.lower()}.day.bin"),
                    self.first,
                    self.last,
                )
                if found is not None:
                    at, tail = found
                    values[i, at : at + len(tail)] = tail
                    self._inside[i, at : at + len(tail)] = True
            self._fields[name] = pd.DataFrame(
                np.ascontiguousarray(values.T),
                index=self.calendar[self.first : self.last + 1],
                columns=self.instruments,
                copy=False,
            )
        return self._fields[name]

    @property
    def inside(self) -> np.ndarray:
        """Slots [days, instruments] that the bins read so far cover."""
        assert self._inside is not None
        return self._inside.T


def _tail(path: str, first: int, last: int) -> tuple[int, np.ndarray] | None:
    """Values of a bin in the slots `first` to `last`: where they begin, and they."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        count = os.fstat(handle).st_size // 4 - 1
        if count < 1:
            return None
        start = int(np.frombuffer(os.pread(handle, 4, 0), "<f4")[0])
        a, b = max(first, start), min(last, start + count - 1)
        if b < a:
            return None
        raw = os.pread(handle, 4 * (b - a + 1), 4 * (1 + a - start))
    finally:
        os.close(handle)
    return a - first, np.frombuffer(raw, "<f4")


def fields_of(expression: Any) -> set[str]:
    """Names, without `$`, of the fields an expression reads.

    Raises
    ------
    Unsupported
        If it reads point-in-time fields or another instrument.
    """
    if isinstance(expression, (PFeature, O.ChangeInstrument)):
        raise Unsupported(str(expression))
    if isinstance(expression, Feature):
        return {str(expression).lstrip("$")}
    if not isinstance(expression, Expression):
        return set()
    found: set[str] = set()
    for part in vars(expression).values():
        if isinstance(part, Expression):
            found |= fields_of(part)
    return found


def evaluate(expression: Any, raw: RawDays) -> Any:
    """Evaluate a Qlib expression on frames [days, instruments].

    Raises
    ------
    Unsupported
        If it has an operator that is not known here.
    """
    if not isinstance(expression, Expression):
        return expression
    kind = type(expression)
    if kind is Feature:
        return raw[str(expression).lstrip("$")]
    own = getattr(kind, "_load_internal", None)
    if own is O.NpPairOperator._load_internal:
        left = evaluate(expression.feature_left, raw)
        right = evaluate(expression.feature_right, raw)
        return getattr(np, expression.func)(left, right)
    if own is O.NpElemOperator._load_internal:
        return getattr(np, expression.func)(evaluate(expression.feature, raw))
    if kind is O.Sign:
        return np.sign(evaluate(expression.feature, raw).astype(np.float32))
    if kind is O.If:
        condition = evaluate(expression.condition, raw)
        left, right = (
            evaluate(part, raw)
            for part in (expression.feature_left, expression.feature_right)
        )
        return pd.DataFrame(
            np.where(condition, left, right), condition.index, condition.columns
        )
    if isinstance(expression, O.Rolling):
        n = expression.N
        if not isinstance(n, int) or n == 0:
            raise Unsupported(str(expression))
        if kind is O.Ref:
            return evaluate(expression.feature, raw).shift(n)
        if own is O.Rolling._load_internal:
            value = evaluate(expression.feature, raw).astype(np.float64)
            # Qlib's series begin with the listing; comparisons know no NaN.
            value = value.where(raw.inside)
            return getattr(value.rolling(n, min_periods=1), expression.func)()
    raise Unsupported(str(expression))


def recent_frame(
    loader: Any,
    instruments: Any,
    first: pd.Timestamp,
    last: pd.Timestamp,
    group: str = "feature",
) -> pd.DataFrame | None:
    """Load one column group of a few days, as the loader itself would.

    Parameters
    ----------
    loader : QlibDataLoader or ParquetDataLoader
    instruments : str, dict or list
        As a handler takes it.
    first, last : Timestamp
        Trading days, both included.
    group : str
        Column group.

    Returns
    -------
    DataFrame or None
        Rows (datetime, instrument) of members, columns (group, name); None if only
        the loader itself can do it.
    """
    sources = _sources(loader, group)
    if sources is None or C.provider is None:
        return None
    spans = instrument_spans(
        instruments, first, last, filter_pipe=getattr(loader, "filter_pipe", None)
    )
    if not spans:
        return None
    frames = []
    for source in sources:
        if "expressions" in source:
            try:
                frames.append(_expressions(source, spans, first, last))
            except Unsupported:
                return None
        else:
            frame = read_daily_parquet(
                expand_store(source["path"]),
                columns=source.get("columns"),
                start_time=first,
                end_time=last,
                spans=spans,
                missing_years=source.get("missing_years", "raise"),
            )
            if source.get("names"):
                frame.columns = list(source["names"])
            frames.append(frame)
    frame = frames[0] if len(frames) == 1 else pd.concat(frames, axis=1).sort_index()
    frame.index.names = ["datetime", "instrument"]
    frame.columns = pd.MultiIndex.from_product([[group], frame.columns])
    return frame


def _sources(loader: Any, group: str) -> list[dict] | None:
    """Find the sources of a group, if they can be read here."""
    if type(loader) is QlibDataLoader:
        plain = loader.is_group and not loader.inst_processors and loader.swap_level
        if not plain or loader.freq != "day" or group not in loader.fields:
            return None
        expressions, names = loader.fields[group]
        return [{"expressions": list(expressions), "names": list(names)}]
    if type(loader) is ParquetDataLoader and loader.freq == "day":
        sources = loader.config.get(group)
        if sources is None or any("experiment" in s for s in sources):
            return None
        if any(s.get("inst_processors") for s in sources) or loader.join == "inner":
            return None
        return sources
    return None


def _expressions(
    source: Mapping[str, Any],
    spans: Mapping[str, Sequence],
    first: pd.Timestamp,
    last: pd.Timestamp,
) -> pd.DataFrame:
    trees = [ExpressionD.get_expression_instance(e) for e in source["expressions"]]
    for tree in trees:
        fields_of(tree)  # raises early
    back = max(tree.get_extended_window_size()[0] for tree in trees)
    calendar = pd.DatetimeIndex(D.calendar(freq="day"))
    a, b = calendar.searchsorted(first), calendar.searchsorted(last, "right") - 1
    codes = sorted(spans)
    raw = RawDays(calendar, max(0, int(a - back)), int(b), codes)
    days = calendar[a : b + 1]
    columns = [
        evaluate(tree, raw).loc[days].to_numpy(np.float32).ravel() for tree in trees
    ]
    member = membership_mask(spans, days, codes)
    inside = raw.inside[-len(days) :]
    rows = (member & inside).ravel()
    index = pd.MultiIndex(
        levels=[days, pd.Index(codes)],  # type: ignore[list-item]
        codes=[
            np.repeat(np.arange(len(days)), len(codes))[rows],
            np.tile(np.arange(len(codes)), len(days))[rows],
        ],
        names=["datetime", "instrument"],
    )
    return pd.DataFrame(
        np.stack([column[rows] for column in columns], axis=1),
        index=index,
        columns=list(source["names"]),
    )
