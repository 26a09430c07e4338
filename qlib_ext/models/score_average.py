"""ScoreAverage: the equal-weighted average of several models' standardised scores.

Orient Securities, factor series 91: the score of a day is the average of the scores of
the day, ms and l2 models, each standardised over the day's cross-section. Sources are
recorders that hold a finished run's ``pred.pkl``, or models with their own data sets
that are trained here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from qlib.data.dataset import DatasetH
from qlib.log import get_module_logger
from qlib.model.base import Model
from qlib.utils import init_instance_by_config
from qlib.workflow import R

from data_handlers.arguments import Count, NamedArguments, check_number, check_whole
from data_handlers.cross_section import day_codes, standardize_days
from qlib_ext.dataset import segment_dates
from qlib_ext.models.description import described
from qlib_ext.recorders import find_recorder, load_frame

__all__ = ["NoScore", "ScoreAverage", "standardize_scores"]

logger = get_module_logger("qlib_ext.models")

Missing = Literal["zero", "mean", "drop"]

_RECORDER_KEYS = {"experiment", "recorder", "file", "weight"}
_MODEL_KEYS = {"model", "dataset", "weight"}


class NoScore(ValueError):
    """A source has no run, or no score where one is asked for."""


class ScoreAverage(NamedArguments, Model):
    """Average the scores of several sources, standardised day by day.

    Every source is standardised over its own stocks of the day (mean 0, standard
    deviation 1); a day on which all its scores are equal gives 0.

    Parameters
    ----------
    sources : dict
        Name to source, either

        - ``{"experiment": E, "recorder": ID or "latest", "file": "pred.pkl"}``: a
          finished run, whose first column is the score ("latest": the newest
          finished one of the experiment that has the file; the run's id is logged);
        - ``{"model": {class, module_path, kwargs}, "dataset": {…}}``: trained by
          `fit`. Without `dataset` it uses the workflow's; a data set without
          `segments` takes the workflow's segments.

        Each may have a `weight`, default 1.
    missing : {"zero", "mean", "drop"}, default "zero"
        What a stock-day without a score of some source gets: that source counts as
        the day's mean, 0; the average of the others, which makes stocks with few
        sources look extreme; or no score at all. A source without any score on a day
        is left out that day, whatever the rule but "drop".
    min_sources : int, default 1
        Fewest sources that a stock-day needs.

    Raises
    ------
    ValueError
        For an unknown key or rule, a source that is neither kind, or a recorder without
        the file.

    Examples
    --------
    In a workflow, after the three runs::

        model:
          class: ScoreAverage
          module_path: qlib_ext.models
          kwargs:
            sources:
              day: {experiment: rnn_day_single, recorder: latest}
              ms: {experiment: rnn_ms_single, recorder: latest}
              l2: {experiment: rnn_l2_single, recorder: latest}
    """

    def __init__(
        self, sources: dict, missing: Missing = "zero", min_sources: Count = 1
    ) -> None:
        if not isinstance(sources, Mapping) or not sources:
            raise ValueError(
                f"`sources` must map names to sources, got {sources!r}; see the class."
            )
        check_whole("min_sources", min_sources, 1, len(sources))
        self.sources = {str(k): _checked(str(k), v) for k, v in sources.items()}
        self.models: dict[str, Model] = {}
        # Data sets stay out of the pickle; a fresh process makes them again.
        self._datasets: dict[str, DatasetH] = {}

    @described
    def fit(
        self,
        dataset: DatasetH,
        evals_result: dict | None = None,
        reweighter: Any = None,
    ) -> None:
        """Train the sources that are models; those that are recorders are finished.

        Parameters
        ----------
        dataset : DatasetH
            The workflow's; for sources without one of their own.
        evals_result : dict, optional
            Gets each model's history under its source's name.
        reweighter : optional
            Handed on.
        """
        for name, source in self.sources.items():
            if "model" not in source:
                continue
            logger.info("training source %s", name)
            model = init_instance_by_config(source["model"], accept_types=Model)
            history: dict = {}
            kwargs = {} if reweighter is None else {"reweighter": reweighter}
            model.fit(self._dataset(name, dataset), evals_result=history, **kwargs)
            if evals_result is not None:
                evals_result[name] = history
            self.models[name] = model

    def predict(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.Series:
        """Average the sources' scores over a segment.

        Parameters
        ----------
        dataset : DatasetH
            The workflow's; its segment decides the days.
        segment : str or slice or (start, end)

        Returns
        -------
        Series
            `score` by (datetime, instrument), for stock-days with enough sources.
        """
        parts = self.predict_units(dataset, segment)
        weight = pd.Series(
            {k: float(v.get("weight", 1.0)) for k, v in self.sources.items()}
        )
        return self.combine(parts, weight).rename("score")

    def combine(self, parts: pd.DataFrame, weight: pd.Series | pd.DataFrame):
        """Weigh standardised scores, by the rules for missing ones.

        Parameters
        ----------
        parts : DataFrame
            Rows (datetime, instrument), a column a source.
        weight : Series or DataFrame
            Weight by source, or rows datetime and a column a source.

        Returns
        -------
        Series
            Weighted mean, for stock-days with enough sources.
        """
        known = parts.notna()
        if isinstance(weight, pd.DataFrame):
            when = parts.index.get_level_values("datetime")
            weight = weight.reindex(columns=parts.columns).loc[when]
            weight.index = parts.index
        # A source that is silent on the whole day plays no part in it.
        there = known.groupby(level="datetime").transform("any")
        counts = known if self.missing == "mean" else there
        total = (counts * weight).sum(axis=1)
        score = (parts.fillna(0.0) * weight).sum(axis=1) / total
        least = parts.shape[1] if self.missing == "drop" else self.min_sources
        enough = (known.sum(axis=1) >= least) & (total > 0)
        silent = ~there.groupby(level="datetime").first()
        for name in silent.columns[silent.any()]:
            logger.warning(
                "source %s has no score on %d of %d days",
                name,
                int(silent[name].sum()),
                len(silent),
            )
        return score[enough]

    def absent_source(self, name: str, why: NoScore) -> None:
        """Say what a source without scores means: here, an error."""
        raise why

    def predict_units(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.DataFrame:
        """Return the standardised score of each source, NaN where it has none.

        Qlib calls nothing by this name; FactorRecord does, and so reports correlation
        and RankIC of the sources beside those of the average.
        """
        start, end = segment_dates(dataset, segment)
        parts = {}
        for name, source in self.sources.items():
            if "model" in source:
                if name not in self.models:
                    raise ValueError(
                        f"source {name!r} is not trained: call fit before predict."
                    )
                raw = self.models[name].predict(self._dataset(name, dataset), segment)
            else:
                try:
                    raw = _recorded(name, source)
                except NoScore as error:
                    self.absent_source(name, error)
                    continue
            score = raw.iloc[:, 0] if isinstance(raw, pd.DataFrame) else raw
            score = score.sort_index()
            days = score.index.get_level_values("datetime")
            keep = np.ones(len(score), dtype=bool)
            if start is not None:
                keep &= days >= start
            if end is not None:
                keep &= days <= end
            score = score[keep].astype(float).replace([np.inf, -np.inf], np.nan)
            if score.notna().sum() == 0:
                why = (
                    f"source {name!r} has no score between {start} and {end}: its run "
                )
                self.absent_source(name, NoScore(why + "must cover the segment."))
                continue
            parts[name] = standardize_scores(score)
        return pd.DataFrame(parts).rename_axis(["datetime", "instrument"]).sort_index()

    def _dataset(self, name: str, dataset: DatasetH) -> DatasetH:
        config = self.sources[name].get("dataset")
        if config is None:
            return dataset
        if not hasattr(self, "_datasets"):  # after unpickling
            self._datasets = {}
        if name not in self._datasets:
            if isinstance(config, Mapping):
                kwargs = {"segments": dataset.segments, **config.get("kwargs", {})}
                config = {**config, "kwargs": kwargs}
            self._datasets[name] = init_instance_by_config(
                config, accept_types=DatasetH
            )
        return self._datasets[name]


def _checked(name: str, source: Any) -> dict:
    if not isinstance(source, Mapping) or ("model" in source) == (
        "experiment" in source
    ):
        raise ValueError(
            f"`sources.{name}` must have either `experiment` and `recorder`, or "
            f"`model`, got {source!r}."
        )
    known = _MODEL_KEYS if "model" in source else _RECORDER_KEYS
    for key in source:
        if key not in known:
            raise ValueError(
                f"`sources.{name}` has the unknown key {key!r}; it takes "
                f"{sorted(known)}."
            )
    if "experiment" in source and not source.get("recorder"):
        raise ValueError(
            f"`sources.{name}` lacks `recorder`: the run's id, or 'latest'."
        )
    weight = source.get("weight", 1.0)
    check_number(f"sources.{name}.weight", weight, 0, exclusive=True)
    return dict(source)


def _recorded(name: str, source: Mapping) -> pd.Series | pd.DataFrame:
    """Score that a finished run saved."""
    wanted = None if source["recorder"] == "latest" else str(source["recorder"])
    file = source.get("file", "pred.pkl")
    try:
        experiment, recorder = find_recorder(
            R.get_uri(), source["experiment"], wanted, file
        )
    except ValueError as error:
        kind = NoScore if wanted is None else ValueError
        raise kind(f"`sources.{name}`: {error}") from error
    logger.info("source %s: run %s of %s", name, recorder.id, experiment)
    return load_frame(recorder, file)


def standardize_scores(score: pd.Series) -> pd.Series:
    """Mean 0 and standard deviation 1 over each day; NaN stays."""
    values = standardize_days(score.to_numpy(float), *day_codes(score.index))
    dtype = np.float32 if score.dtype == np.float32 else np.float64
    return pd.Series(values, score.index, dtype=dtype, name=score.name)
