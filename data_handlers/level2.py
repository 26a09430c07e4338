"""Level-2 ticks of one day in one row: the `l2` feature set, 20 features.

The features are defined, with unit, range and NaN rule, in
`data_handlers.aggregate.ticks.TICK_FEATURES`; `qlib-ext build l2` computes them.
"""

from __future__ import annotations

from typing import Any

from data_handlers.handler import FeatureHandler
from data_handlers.loaders import aggregate_source

__all__ = ["Level2Handler"]


class Level2Handler(FeatureHandler):
    """20 features of Level-2 ticks, with DayHandler's labels and risk exposures.

    Rows are the stock-days of the feature files: a suspended stock has none.

    Parameters
    ----------
    path : str, default "{store}/l2"
        Folder of yearly files, or one file or glob; ``{store}`` is Qlib's data folder.
    columns : list of str, optional
        Features to use, default all.
    missing_years : {"raise", "warn"}, default "raise"
        What a year without a file is.
    instruments, start_time, …
        As in `FeatureHandler`, without `features`.

    Examples
    --------
    In a workflow::

        handler:
          class: Level2Handler
          module_path: data_handlers.level2
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
        path: str = "{store}/l2",
        columns: list | None = None,
        missing_years: str = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            features=aggregate_source("l2", path, columns, missing_years, kwargs),
            instruments=instruments,
            **kwargs,
        )
