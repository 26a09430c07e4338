"""Two operators for Qlib's expressions: prices of days on which a stock traded.

Qlib's ``Ref($close, 1)`` is the calendar day before, which has no price after a
suspension: the move of the day of resumption, over all the days of the suspension,
would be lost. ``LastTraded($close, 1)`` is the close of the last day on which the stock
traded, however long ago.

Stores write a suspension in several ways, all of which are a day without trades: no
value, a price of 0 or below, or the last price beside a volume of 0 (`no_volume`).

Importing this module makes Qlib know the operators, for good: `qlib.init` empties its
registry, but keeps these. Worker processes that do not fork learn them from Qlib's
configuration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from qlib.config import MODE_CONF, C
from qlib.data import D
from qlib.data.base import Feature
from qlib.data.ops import ElemOperator, Operators, Ref

from data_handlers.aggregate.schema import SILENT

__all__ = ["DAILY_RETURN", "PREVIOUS_CLOSE", "LastTraded", "Traded", "no_volume"]


#: Adjusted close of the last day before t on which the stock traded.
PREVIOUS_CLOSE = "LastTraded($close, 1)"
#: Arithmetic return of day t over that close; NaN on a day without trades.
DAILY_RETURN = f"Traded($close) / {PREVIOUS_CLOSE} - 1"


def no_volume(volume: Any, seen: Any = False) -> np.ndarray:
    """Tell which days a volume says to be without trades.

    Parameters
    ----------
    volume : array [t] or [t, n]
        Volume in any unit; NaN where the store has none, which says nothing.
    seen : bool or bool array [n], default False
        Whether there was a volume before the first day. Until there was one, a 0 says
        nothing either: many stores write it for all days of an index.

    Returns
    -------
    bool array, as `volume`

    Examples
    --------
    >>> no_volume([0, 200, 5.9e-39, float("nan"), 100]).tolist()
    [False, False, True, False, False]
    """
    volume = np.asarray(volume)
    had = np.logical_or.accumulate(volume > SILENT, axis=0) | seen
    return (volume <= SILENT) & had


def _traded(
    series: pd.Series, instrument: str, start: int, end: int, freq: str
) -> pd.Series:
    """Values of the days with trades, else NaN."""
    series = series.where(series > 0)
    volume = Feature("volume").load(instrument, start, end, freq)
    if (volume <= SILENT).any():
        volume = Feature("volume").load(instrument, 0, end, freq)
        silent = volume.index[no_volume(volume)]
        series = series.mask(series.index.isin(silent))
    return series


class Traded(ElemOperator):
    """``Traded(x)``: x where it is above 0 and the stock has a volume, else NaN.

    A store without a `$volume` for the stock, or for the day, is judged by x alone.
    """

    def _load_internal(self, instrument, start_index, end_index, *args):
        series = self.feature.load(instrument, start_index, end_index, *args)
        return _traded(series, instrument, start_index, end_index, args[0])


class LastTraded(Ref):
    """``LastTraded(x, n)``: last ``Traded(x)`` up to the day n days before t.

    The look-back has no end, so a value does not depend on where a query begins. A
    negative n looks ahead: where the stock does not trade on that day, or not any more,
    the last value before it stands; NaN if that day lies beyond the calendar.

    Parameters
    ----------
    feature : Expression
    N : int
        Days between t and the day looked at.
    """

    def _load_internal(self, instrument, start_index, end_index, *args):
        series = self.feature.load(instrument, 0, end_index, *args)
        if series.empty:
            return series
        last = min(int(end_index), len(D.calendar(freq=args[0])) - 1)
        days = pd.RangeIndex(int(series.index[0]), last + 1)
        series = _traded(series, instrument, 0, end_index, args[0])
        held = series.reindex(days).ffill().shift(self.N)
        return held.reindex(series.index[series.index >= start_index])

    def get_longest_back_rolling(self) -> float:
        """Days before t that a value may look at."""
        return np.inf

    def get_extended_window_size(self) -> tuple[int, int]:
        """Days before and after a query that Qlib must load."""
        left, right = self.feature.get_extended_window_size()
        return max(left + self.N, left), max(right - self.N, right)


def _register() -> None:
    own: list[Any] = [Traded, LastTraded]
    specs = [{"class": op.__name__, "module_path": __name__} for op in own]
    for op in own:
        # An attribute comes before the registry, which `qlib.init` empties.
        setattr(Operators, op.__name__, op)
    client: dict = MODE_CONF["client"]
    client["custom_ops"] = [*client["custom_ops"], *specs]
    C["custom_ops"] = [*(C.get("custom_ops") or ()), *specs]


_register()
