"""Two operators for Qlib's expressions: prices of days on which a stock traded.

Qlib's ``Ref($close, 1)`` is the calendar day before, which has no price after a
suspension: the move of the day of resumption, over all the days of the suspension,
would be lost. ``LastTraded($close, 1)`` is the close of the last day on which the stock
traded, however long ago. A value that is missing, 0 or negative is that of a day
without trades: stores write a suspension in any of these ways.

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
from qlib.data.ops import ElemOperator, Operators, Ref

__all__ = ["DAILY_RETURN", "PREVIOUS_CLOSE", "LastTraded", "Traded"]

#: Adjusted close of the last day before t on which the stock traded.
PREVIOUS_CLOSE = "LastTraded($close, 1)"
#: Arithmetic return of day t over that close; NaN on a day without trades.
DAILY_RETURN = f"Traded($close) / {PREVIOUS_CLOSE} - 1"


class Traded(ElemOperator):
    """``Traded(x)``: x where it is above 0, else NaN."""

    def _load_internal(self, instrument, start_index, end_index, *args):
        series = self.feature.load(instrument, start_index, end_index, *args)
        return series.where(series > 0)


class LastTraded(Ref):
    """``LastTraded(x, n)``: last x above 0 up to the day n days before t.

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
        held = series.where(series > 0).reindex(days).ffill().shift(self.N)
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
