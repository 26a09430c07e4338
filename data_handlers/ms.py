"""Minute bars of one day in one row: the `ms` feature set, 22 features.

The features are defined, with unit, range and NaN rule, in
`data_handlers.aggregate.minute.MINUTE_FEATURES`; `qlib-ext build ms` computes them.
"""

from __future__ import annotations

from typing import Any

from data_handlers.handler import FeatureHandler
from data_handlers.loaders import aggregate_source

__all__ = ["MsHandler"]


class MsHandler(FeatureHandler):
    """22 features of the minute bars, with DayHandler's labels and risk exposures.

    Rows are the stock-days of the feature files: a suspended stock has none.

    Parameters
    ----------
    path : str, default "{store}/ms"
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
          class: MsHandler
          module_path: data_handlers.ms
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
        path: str = "{store}/ms",
        columns: list | None = None,
        missing_years: str = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            features=aggregate_source("ms", path, columns, missing_years, kwargs),
            instruments=instruments,
            **kwargs,
        )
