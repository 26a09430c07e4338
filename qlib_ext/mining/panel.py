"""What a search is judged on: fields, forward returns and the dates that count.

Glossary: t days; n stocks; m dates of the fitness. Stocks are spread over the
evaluator's blocks by a checksum of their code, so every block is a random sample of the
market that does not depend on which other stocks there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data_handlers.expression import Evaluator, FieldPanel, parse, read_panel
from data_handlers.expression.panel import silent_days
from data_handlers.labels import forward_return, label_reach
from qlib_ext.metrics import non_overlapping

__all__ = ["MiningPanel", "mining_panel"]


@dataclass
class MiningPanel(FieldPanel):
    """Fields, forward returns and dates of the fitness.

    Attributes
    ----------
    days, instruments, fields, spans
        As in `FieldPanel`; days before the fitness' first only feed look-back windows,
        instruments are in the order of their blocks.
    member : bool array [t, n]
        Members of the universe, which cross-sections compare.
    traded : bool array [t, n]
        Those that traded.
    dates : int array [m]
        Positions of the fitness' dates, `horizon` days apart: labels do not overlap.
    label : Tensor [m, n]
        Forward returns of traded members of the universe, else NaN. Days whose return
        would end after the panel's last day have none.
    """

    dates: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    label: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    traded: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))

    @property
    def expected(self) -> np.ndarray:
        """Traded members on the dates of the fitness, bool ``[m, n]``."""
        return self.traded[self.dates]

    @property
    def checksum(self) -> str:
        """Short text that changes with the data."""
        value = zlib.crc32(",".join(self.instruments).encode())
        for name in sorted(self.fields):
            value = zlib.crc32(name.encode(), value)
            value = zlib.crc32(np.ascontiguousarray(self.fields[name]).data, value)
        value = zlib.crc32(np.ascontiguousarray(self.label.numpy()).data, value)
        return f"{value:08x}"


def mining_panel(
    fields: Sequence[str],
    universe: Any,
    start: Any,
    end: Any,
    *,
    horizon: int = 10,
    price: str = "close",
    look_back: int = 250,
    freq: str = "day",
    cross: bool = False,
) -> MiningPanel:
    """Read fields and returns through Qlib; nothing after `end` is read into them.

    Parameters
    ----------
    fields : sequence of str
        Names without ``$``.
    universe : str
        Market; membership counts day by day.
    start, end : date-like
        First and last day of the fitness, inclusive.
    horizon, price : int, str
        Label, see `data_handlers.labels.forward_return`.
    look_back : int
        Trading days read before `start`, as many as the longest expression needs.
    freq : str
        Qlib's frequency.
    cross : bool, default False
        Take in those that left the universe before `start` as well, whom a comparison
        on earlier days needs.

    Raises
    ------
    ValueError
        If the market has no member, the range no trading day, a field no value, or no
        date has a label.
    """
    from qlib.data import D

    from data_handlers.universe import instrument_spans, membership_mask
    from data_handlers.universe import universe as stocks_of

    days = pd.DatetimeIndex(D.calendar(freq=freq))
    start, end = pd.Timestamp(start), pd.Timestamp(end)
    first, last = days.searchsorted(start), days.searchsorted(end, side="right") - 1
    if start > end or last < first:
        raise ValueError(
            f"the store has no trading day from {start.date()} to {end.date()}; its "
            f"calendar runs from {days[0].date()} to {days[-1].date()}."
        )
    begin = max(0, first - look_back)
    days = days[begin : last + 1]
    since = days[0] if cross else start
    spans = instrument_spans(stocks_of(universe, freq), since, end, freq)
    if not spans:
        raise ValueError(
            f"`universe` {universe!r} has no member from {start.date()} to "
            f"{end.date()}."
        )
    codes = sorted(spans, key=lambda c: (zlib.crc32(c.encode()), c))
    names = ["$" + f.removeprefix("$") for f in fields]
    if "$close" not in names:
        names = [*names, "$close"]
    returns = parse(forward_return(horizon, price))
    panel = read_panel([*names, *returns.fields], codes, begin, last, freq)
    for name in names:
        if not np.isfinite(panel.fields[name]).any():
            raise ValueError(f"`fields`: the store has no value of {name} there.")
    panel.silent = silent_days(panel, begin, freq)
    label = Evaluator(panel).evaluate([returns])[0]
    label[-label_reach(horizon) :] = np.nan
    member = membership_mask(spans, days, codes)
    traded = member & (panel.fields["$close"] > 0)
    if panel.silent is not None:
        traded &= ~panel.silent
    label[~traded] = np.nan
    known = np.isfinite(label).sum(1).astype(float)
    known[: first - begin] = 0
    dates = non_overlapping(
        torch.from_numpy(np.where(known >= 2, known, np.nan)), horizon
    ).numpy()
    if len(dates) < 3:
        raise ValueError(
            f"from {start.date()} to {end.date()} there are {len(dates)} dates with "
            f"{horizon}-day returns that do not overlap; at least 3 are needed."
        )
    return MiningPanel(
        days=days,
        instruments=codes,
        fields={name: panel.fields[name] for name in names},
        spans=panel.spans,
        member=member,
        traded=traded,
        dates=dates,
        label=torch.from_numpy(np.ascontiguousarray(label[dates])),
    )
