"""Day, minute and tick features side by side: 6 + 22 + 20 = 48 features.

For models that take all frequencies at once; the reports train one model each and
average their scores.
"""

from __future__ import annotations

from typing import Any

from qlib.log import get_module_logger

from data_handlers.day import _PRICES, day_features
from data_handlers.handler import FeatureHandler
from data_handlers.loaders import aggregate_source

__all__ = ["MultiFrequencyHandler"]


class MultiFrequencyHandler(FeatureHandler):
    """All 48 features in one frame, with DayHandler's labels and risk exposures.

    Rows are those of any of the sets. Features of a set that has no row for a
    stock-day (ticks before the source begins, say) are missing, and count as the mean
    after standardisation.

    Parameters
    ----------
    ms_path, l2_path : str or None
        Feature files, see `MsHandler` and `Level2Handler`; None leaves the set out.
    day : bool, default True
        Whether the six day features are in.
    missing_years : {"raise", "warn"}, default "raise"
        What a year without a file is. Ticks begin later than bars in most sources:
        "warn" then keeps the years before.
    instruments, start_time, …
        As in `FeatureHandler`, without `features`.

    Examples
    --------
    In a workflow::

        handler:
          class: MultiFrequencyHandler
          module_path: data_handlers.multi_frequency
          kwargs:
            instruments: all
            start_time: 2013-01-01
            end_time: 2020-12-31
            fit_start_time: 2013-01-01
            fit_end_time: 2017-12-31
            horizon: 10
    """

    def __init__(
        self,
        instruments: Any = "all",
        *,
        ms_path: str | None = "{store}/ms",
        l2_path: str | None = "{store}/l2",
        day: bool = True,
        missing_years: str = "raise",
        **kwargs: Any,
    ) -> None:
        sources = []
        if day:
            known = self.known([*_PRICES, "volume", "turnover"], instruments, kwargs)
            expressions, names = day_features(known)
            sources.append({"expressions": expressions, "names": names})
        if ms_path is not None:
            sources.append(aggregate_source("ms", ms_path, None, missing_years, kwargs))
        if l2_path is not None:
            sources.append(aggregate_source("l2", l2_path, None, missing_years, kwargs))
        if not sources:
            raise ValueError(
                "`day`, `ms_path` and `l2_path` leave no feature: set at least one."
            )
        get_module_logger("data_handlers").info("%d feature sets", len(sources))
        super().__init__(
            features=sources,
            instruments=instruments,
            **kwargs,
        )
