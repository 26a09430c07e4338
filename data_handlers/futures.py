"""FuturesHandler: one or a few continuous futures, for timing.

The six day features of `data_handlers.day` and, where they were built, the minute bars
of the same day (`qlib-ext build bars`), which are complete at its close. The label is
the return from the open of t+1 to that of t+2: what a position taken at the next open
earns.

One instrument has no cross-section. So no label is neutralised or standardised over the
day: `FitScale` divides it by its root mean square of the fit window and keeps its sign.
"""

from __future__ import annotations

from typing import Any

from data_handlers.aggregates import AggregateHandler
from data_handlers.arguments import Universe
from data_handlers.labels import Price

__all__ = ["FuturesHandler"]


class FuturesHandler(AggregateHandler):
    """Day features and the day's minute bars; next-day return from open to open.

    Parameters
    ----------
    bars_path : str or None, default "{store}/bars"
        Folder of yearly files, or one file or glob; None for day features only.
    horizon : int or list of int, default 1
    price : {"close", "open", "vwap"}, default "open"
    learn_processors : list, optional
        Default `FitScale` on the label.
    instruments, missing_years, start_time, …
        As in `AggregateHandler`.

    Examples
    --------
    In a workflow::

        handler:
          class: FuturesHandler
          module_path: data_handlers.futures
          kwargs:
            instruments: [CFFEX.T]
            start_time: 2013-01-01
            end_time: 2020-12-31
            fit_start_time: 2013-01-01
            fit_end_time: 2017-12-28
    """

    _kept_back = frozenset({"sources", "styles", "neutralize", "neutralize_weights"})

    def __init__(
        self,
        instruments: Universe = "all",
        *,
        bars_path: str | None = "{store}/bars",
        horizon: Any = 1,
        price: Price = "open",
        learn_processors: list | None = None,
        **kwargs: Any,
    ) -> None:
        if learn_processors is None:
            learn_processors = [
                {
                    "class": "FitScale",
                    "module_path": "data_handlers.processors",
                    "kwargs": {"fields_group": "label"},
                }
            ]
        super().__init__(
            [("day", None, None), ("bars", bars_path, None)],
            instruments,
            horizon=horizon,
            price=price,
            styles=[],
            learn_processors=learn_processors,
            **kwargs,
        )
