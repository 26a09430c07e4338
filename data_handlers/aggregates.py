"""Feature sets kept in yearly files, alone or beside the day features, as handlers.

| handler | feature sets | columns |
|---|---|---|
| `MsHandler` | `ms`: minute bars of one day in one row | 22 |
| `Level2Handler` | `l2`: Level-2 ticks of one day in one row | 20 |
| `MultiFrequencyHandler` | day, `ms`, `l2` | 6 + 22 + 20 |
| `HFHandler` | `ms`, and the `l2` features that trades alone decide | 22 + 14 |

`data_handlers.aggregate.minute.MINUTE_FEATURES` and
`data_handlers.aggregate.ticks.TICK_FEATURES` define the features, with unit, range and
NaN rule; `qlib-ext build ms` and `qlib-ext build l2` compute them. All handlers have
DayHandler's labels and risk exposures. In a workflow::

    handler:
      class: MsHandler
      module_path: data_handlers.aggregates
      kwargs:
        instruments: all
        start_time: 2013-01-01
        end_time: 2020-12-31
        fit_start_time: 2013-01-01
        fit_end_time: 2017-12-31
        horizon: 10
"""

from __future__ import annotations

from typing import Any, Literal

from data_handlers.aggregate.ticks import TICK_FEATURES
from data_handlers.arguments import Text
from data_handlers.day import day_source
from data_handlers.handler import FeatureHandler
from data_handlers.loaders import aggregate_source

__all__ = [
    "TRADE_FEATURES",
    "AggregateHandler",
    "HFHandler",
    "Level2Handler",
    "MsHandler",
    "MultiFrequencyHandler",
]

#: The `l2` features that trades alone decide.
TRADE_FEATURES = tuple(
    f for f in TICK_FEATURES if not {"orders", "quotes"} & set(f.needs)
)


class AggregateHandler(FeatureHandler):
    """Features of several sources side by side, as data says.

    Rows are those of any source: a stock-day without a row in one of them (ticks
    before the source begins, say) has its features missing, which counts as the mean
    after standardisation. A suspended stock has no row in the files.

    Parameters
    ----------
    sources : list of (str, str or None, list of str or None)
        Kind of the feature set ("day", "ms" or "l2"), where its files are, and which
        columns to use, None for all. Sets other than "day" without a path are left out.
    missing_years : {"raise", "warn"}, default "raise"
        What a year without a file is. Ticks begin later than bars in most sources:
        "warn" then keeps the years before.
    instruments, start_time, …
        As in `FeatureHandler`, without `features`.

    Raises
    ------
    ValueError
        If no source is left, or files hold another feature set or version.
    """

    def __init__(
        self,
        sources: list,
        instruments: Any = "all",
        *,
        missing_years: Literal["raise", "warn"] = "raise",
        **kwargs: Any,
    ) -> None:
        features = [
            day_source(self, instruments, kwargs)
            if kind == "day"
            else aggregate_source(kind, path, columns, missing_years, kwargs)
            for kind, path, columns in sources
            if kind == "day" or path is not None
        ]
        if not features:
            raise ValueError(
                f"the paths leave no feature in {type(self).__name__}: give at least "
                "one of its feature sets."
            )
        super().__init__(features=features, instruments=instruments, **kwargs)


class MsHandler(AggregateHandler):
    """22 features of the minute bars.

    Parameters
    ----------
    path : str, default "{store}/ms"
        Folder of yearly files, or one file or glob; ``{store}`` is Qlib's data folder.
    columns : list of str, optional
        Features to use, default all.
    instruments, missing_years, start_time, …
        As in `AggregateHandler`.
    """

    _kept_back = frozenset({"sources"})
    _set = "ms"

    def __init__(
        self,
        instruments: Any = "all",
        *,
        path: Text = "{store}/ms",
        columns: list | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__([(self._set, path, columns)], instruments, **kwargs)


class Level2Handler(MsHandler):
    """20 features of Level-2 ticks.

    Parameters
    ----------
    path : str, default "{store}/l2"
    instruments, columns, missing_years, start_time, …
        As in `MsHandler`.
    """

    _set = "l2"

    def __init__(
        self, instruments: Any = "all", *, path: Text = "{store}/l2", **kwargs: Any
    ) -> None:
        super().__init__(instruments, path=path, **kwargs)


class MultiFrequencyHandler(AggregateHandler):
    """All 48 features in one frame.

    For models that take all frequencies at once; the reports train one model each and
    average their scores.

    Parameters
    ----------
    ms_path, l2_path : str or None
        Feature files, as in `MsHandler`; None leaves the set out.
    day : bool, default True
        Whether the six day features are in.
    instruments, missing_years, start_time, …
        As in `AggregateHandler`.
    """

    _kept_back = frozenset({"sources"})
    _l2_columns: tuple[str, ...] | None = None

    def __init__(
        self,
        instruments: Any = "all",
        *,
        ms_path: str | None = "{store}/ms",
        l2_path: str | None = "{store}/l2",
        day: bool = True,
        **kwargs: Any,
    ) -> None:
        sources = [("ms", ms_path, None), ("l2", l2_path, self._l2_columns)]
        if day:
            sources.insert(0, ("day", None, None))
        super().__init__(sources, instruments, **kwargs)


class HFHandler(MultiFrequencyHandler):
    """Family HF: the minute features and the Level-2 ones that need trades only.

    Arguments as in `MultiFrequencyHandler`, without the day features.
    """

    _kept_back = frozenset({"sources", "day"})
    _l2_columns = tuple(f.name for f in TRADE_FEATURES)

    def __init__(self, instruments: Any = "all", **kwargs: Any) -> None:
        super().__init__(instruments, day=False, **kwargs)
