"""Raw fields of a store for many stocks at once: each bin is read once.

Glossary: t days; n stocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data import D
from qlib.data.data import FeatureD, LocalFeatureProvider
from qlib.utils import code_to_fname

from data_handlers.aggregate.schema import SILENT
from data_handlers.panel import scatter
from data_handlers.traded import no_volume

__all__ = ["FieldPanel", "last_before", "read_panel", "silent_days"]

# Days in which a last trade is looked for first.
_NEAR = 32


@dataclass
class FieldPanel:
    """Fields of consecutive days.

    Attributes
    ----------
    days : DatetimeIndex [t]
    instruments : list of str [n]
    fields : dict of str to float32 [t, n]
        By name with ``$``; NaN where a stock has no value.
    spans : dict of str to int array [2, n]
        First row of each stock's series of a field, and the row after its last; a bin
        that is not there has neither, ``(t, 0)``. A day inside without a value is a row
        of Qlib's, a day outside is not.
    member : bool array [t, n], optional
        Members of the universe, which the cross-sectional operators compare.
    before : dict of str to float32 [n]
        Last traded value of a field before the first day, for `LastTraded`.
    silent : bool array [t, n], optional
        Days that `Traded` leaves out whatever the value, see `silent_days`.
    """

    days: pd.DatetimeIndex
    instruments: list[str]
    fields: dict[str, np.ndarray]
    spans: dict[str, np.ndarray] = field(default_factory=dict)
    member: np.ndarray | None = None
    before: dict[str, np.ndarray] = field(default_factory=dict)
    silent: np.ndarray | None = None

    def span(self, names: Iterable[str]) -> np.ndarray:
        """Rows ``[2, n]`` that the series of some fields cover together."""
        t, n = len(self.days), len(self.instruments)
        found = [self.spans[name] for name in names if name in self.spans]
        if not found:
            return np.stack([np.zeros(n, int), np.full(n, t)])
        return np.stack(
            [
                np.min([f[0] for f in found], axis=0),
                np.max([f[1] for f in found], axis=0),
            ]
        )

    def inside(self, names: Iterable[str]) -> np.ndarray:
        """Whether a day lies within the series of some fields, bool ``[t, n]``."""
        first, last = self.span(names)
        row = np.arange(len(self.days))[:, None]
        return (row >= first) & (row < last)


def read_panel(
    fields: Sequence[str],
    instruments: Sequence[str],
    first: int,
    last: int,
    freq: str = "day",
    member: np.ndarray | None = None,
) -> FieldPanel:
    """Read fields of the calendar's slots `first` to `last`, both included.

    Parameters
    ----------
    fields : sequence of str
        Names, with or without ``$``.
    instruments : sequence of str
    first, last : int
        Slots of Qlib's calendar.
    freq : str, default "day"
    member : bool array [t, n], optional
        See `FieldPanel`.

    Returns
    -------
    FieldPanel
        From the bins where Qlib itself would read bins, else through `D.features`.
    """
    names = list(dict.fromkeys("$" + f.removeprefix("$") for f in fields))
    days = pd.DatetimeIndex(D.calendar(freq=freq))[first : last + 1]
    codes = list(instruments)
    read = _from_bins if _reads_bins() else _through_qlib
    values, spans = read(names, codes, first, days, freq)
    return FieldPanel(days, codes, values, spans, member)


def last_before(
    fields: Sequence[str], instruments: Sequence[str], first: int, freq: str = "day"
) -> dict[str, np.ndarray]:
    """Last traded value of each field before a slot of Qlib's calendar.

    Returns
    -------
    dict of str to float32 [n]
        By name with ``$``; NaN where there is none.
    """
    codes = list(instruments)
    out = {name: np.full(len(codes), np.nan, np.float32) for name in fields}
    if first == 0:
        return out
    if not _reads_bins():
        day = pd.DatetimeIndex(D.calendar(freq=freq))[[first - 1]]
        frame = D.features(codes, [f"LastTraded({n}, 0)" for n in fields], *day, *day)
        frame.columns = list(fields)
        return {k: v[0] for k, v in cube_of(frame, fields, day, codes).items()}
    for i, stock in enumerate(_folders(codes, freq)):
        for name, to in out.items():
            file = os.path.join(stock, f"{name[1:].lower()}.{freq}.bin")
            # Nearly always among the last days; else anywhere.
            for since in (max(0, first - _NEAR), 0):
                found = _slots(file, since, first - 1)
                if found is None:
                    continue
                at, values = found
                traded = np.flatnonzero(values > 0)
                silent = _silent_slots(stock, freq, first - 1)
                traded = traded[~np.isin(traded + since + at, silent)]
                if len(traded):
                    to[i] = values[traded[-1]]
                    break
    return out


def _silent_slots(stock: str, freq: str, last: int) -> np.ndarray:
    """Slots up to `last` that the volume of a stock's folder says to be silent."""
    found = _slots(os.path.join(stock, f"volume.{freq}.bin"), 0, last)
    return (
        np.empty(0, int)
        if found is None
        else found[0] + no_volume(found[1]).nonzero()[0]
    )


def silent_days(panel: FieldPanel, first: int, freq: str = "day") -> np.ndarray | None:
    """Days without volume, by `data_handlers.traded.no_volume`.

    Parameters
    ----------
    panel : FieldPanel
    first : int
        Slot of Qlib's calendar of its first day.
    freq : str, default "day"

    Returns
    -------
    bool array [t, n], or None if there is none
    """
    codes, last = panel.instruments, first + len(panel.days) - 1
    volume = panel.fields.get("$volume")
    if volume is None:
        volume = read_panel(["$volume"], codes, first, last, freq).fields["$volume"]
    days = volume <= SILENT
    if not days.any():
        return None
    seen = np.zeros(len(codes), bool)
    open_ = np.flatnonzero((days & ~no_volume(volume)).any(axis=0))
    if first and len(open_):
        names = [codes[i] for i in open_]
        before = read_panel(["$volume"], names, 0, first - 1, freq)
        seen[open_] = (before.fields["$volume"] > SILENT).any(axis=0)
    return no_volume(volume, seen)


def _folders(codes: Sequence[str], freq: str) -> list[str]:
    folder = Path(str(C.dpm.get_data_uri(freq))) / "features"
    return [os.path.join(folder, code_to_fname(c).lower()) for c in codes]


def _reads_bins() -> bool:
    provider = getattr(FeatureD, "_provider", FeatureD)
    return type(provider) is LocalFeatureProvider and not provider.backend


def _from_bins(names, codes, first, days, freq):
    folders = _folders(codes, freq)
    t, n = len(days), len(codes)
    values: dict[str, np.ndarray] = {}
    spans: dict[str, np.ndarray] = {}
    for name in names:
        # A stock's days lie side by side while they are read.
        cube = np.full((n, t), np.nan, np.float32)
        span = np.stack([np.full(n, t), np.zeros(n, int)])
        file = f"{name[1:].lower()}.{freq}.bin"
        for i, stock in enumerate(folders):
            found = _slots(os.path.join(stock, file), first, first + t - 1)
            if found is not None:
                at, part = found
                cube[i, at : at + len(part)] = part
                span[:, i] = at, at + len(part)
        values[name], spans[name] = np.ascontiguousarray(cube.T), span
    return values, spans


def _slots(path: str, first: int, last: int) -> tuple[int, np.ndarray] | None:
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


def _through_qlib(names, codes, first, days, freq):
    t, n = len(days), len(codes)
    frame = D.features(codes, names, days[0], days[-1], freq=freq)
    return cube_of(frame, names, days, codes), {
        name: span for name, span in _spans(frame, names, days, codes, t, n).items()
    }


def cube_of(
    frame: pd.DataFrame,
    names: Sequence[str],
    days: pd.DatetimeIndex,
    codes: Sequence[str],
) -> dict[str, np.ndarray]:
    """Columns of a frame by (instrument, datetime) as float32 arrays ``[t, n]``."""
    cube = scatter(frame, days, codes, np.float32)
    return {n: np.ascontiguousarray(cube[..., k]) for k, n in enumerate(names)}


def _spans(frame, names, days, codes, t, n) -> Mapping[str, np.ndarray]:
    # D.features says for each stock which days it has, the same for all its fields.
    span = np.stack([np.full(n, t), np.zeros(n, int)])
    stock = pd.Index(codes).get_indexer(frame.index.get_level_values("instrument"))
    day = days.get_indexer(frame.index.get_level_values("datetime"))
    np.minimum.at(span[0], stock, day)
    np.maximum.at(span[1], stock, day + 1)
    return dict.fromkeys(names, span)
