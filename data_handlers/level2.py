"""Level-2 ticks of one day in one row: the `l2` feature set, 20 features.

The features are defined, with unit, range and NaN rule, in
`data_handlers.aggregate.ticks.TICK_FEATURES`; `qlib-ext build l2` computes them.
"""

from __future__ import annotations

from typing import Any

from qlib.data.dataset.handler import DataHandlerLP

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
        As in `FeatureHandler`, without `features` and `inst_processors`.

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
        start_time: Any = None,
        end_time: Any = None,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        freq: str = "day",
        horizon: Any = 10,
        price: str = "close",
        styles: Any = "auto",
        neutralize: Any = None,
        neutralize_weights: str | None = None,
        missing_risk: str = "drop",
        infer_processors: list | None = None,
        learn_processors: list | None = None,
        shared_processors: list | None = None,
        process_type: str = DataHandlerLP.PTYPE_A,
        drop_raw: bool = False,
        filter_pipe: list | None = None,
        path: str = "{store}/l2",
        columns: list | None = None,
        missing_years: str = "raise",
    ) -> None:
        super().__init__(
            features=aggregate_source("l2", path, columns, missing_years),
            instruments=instruments,
            start_time=start_time,
            end_time=end_time,
            fit_start_time=fit_start_time,
            fit_end_time=fit_end_time,
            freq=freq,
            horizon=horizon,
            price=price,
            styles=styles,
            neutralize=neutralize,
            neutralize_weights=neutralize_weights,
            missing_risk=missing_risk,
            infer_processors=infer_processors,
            learn_processors=learn_processors,
            shared_processors=shared_processors,
            process_type=process_type,
            drop_raw=drop_raw,
            filter_pipe=filter_pipe,
        )
