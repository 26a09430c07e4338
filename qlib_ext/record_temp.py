"""Records for Qlib workflows: what is kept of a score, and the factor report."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from qlib.config import C
from qlib.log import get_module_logger
from qlib.workflow.record_temp import ACRecordTemp, SignalRecord

from data_handlers.arguments import check_whole
from data_handlers.loaders import read_factors
from data_handlers.panel import load_panel, scatter
from qlib_ext import metrics
from qlib_ext.dataset import Panel
from qlib_ext.graphs import DAILY_RETURN
from qlib_ext.models.mamba import linear_factors
from qlib_ext.recorders import find_recorder, has_artifact, load_frame, own_name
from qlib_ext.report import market_data, studies, tables
from qlib_ext.report.factor import factor_page
from qlib_ext.report.graph import graph_page
from qlib_ext.report.mamba import (
    Beside,
    expert_figures,
    expert_warnings,
    exposure_figures,
    industry_exposure,
    mamba_page,
    market_regime,
    part_of,
)

__all__ = [
    "FactorRecord",
    "FileRecord",
    "GraphRecord",
    "MambaRecord",
    "RiskRecord",
    "WeightRecord",
]

logger = get_module_logger("qlib_ext.record_temp")

# Label and store agree when their returns correlate so closely on the days of overlap.
_SAME_RETURN = 0.999


class FileRecord(ACRecordTemp):
    """A record of frames, pages and figures in files that anybody may open."""

    def save(self, **objects: object) -> None:
        """Write frames as Parquet, text and JSON as such; nothing is pickled."""
        with tempfile.TemporaryDirectory() as folder:
            for name, value in objects.items():
                path = Path(folder) / name
                if isinstance(value, pd.DataFrame):
                    value.to_parquet(path)
                elif isinstance(value, str):
                    path.write_text(value, encoding="utf-8")
                else:
                    path.write_text(_json(value), encoding="utf-8")
            self.recorder.save_objects(local_path=folder, artifact_path=self.get_path())
        if "report.html" in objects:
            logger.info(
                f"Report saved: recorder {self.recorder.id}, artifact "
                f"{self.get_path('report.html')}; `qlib-ext report` copies it out."
            )


class FactorRecord(FileRecord):
    """Evaluate a score as sell-side factor reports do, beside SigAnaRecord.

    Reads ``pred.pkl`` and ``label.pkl`` of `SignalRecord` and closes from the Qlib
    store. Logs the figures as metrics, saves frames as Parquet and one HTML page, all
    under ``factor/``. Works after any Qlib model.

    Conventions: RankIC every `horizon` trading days from the first scored day, IC_IR
    not annualised; layers are rebalanced weekly at the close after the signal, without
    costs; returns annualised over 252 days, geometric unless called a mean. A score or
    label that is NaN or infinite leaves the stock out for that day.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    model, dataset : optional
        Given by Qlib. A model with ``predict_units(dataset, segment)`` has its units
        analysed and saved as ``factor/units.parquet``.
    horizon : int, default 10
        Trading days from entry (close of t+1) to exit of the label.
    n_layers : int, default 20
        Groups; fewer where the pool leaves under 5 stocks to a group.
    label_col : int, default 0
        Column of ``label.pkl`` to score against.
    oracle_path : str or None, default "auto"
        Parquet with ``datetime``, ``instrument`` and the true expected return in
        column ``total``, shown as an upper bound. "auto" takes the file that the
        embedded market writes beside its store, ``<provider_uri>.oracle.parquet``, if
        there is one.
    universe : str, optional
        Name of the pool in the report. Default: the handler's ``instruments``.
    label : str, optional
        Words for the label. Default: found by comparing ``label.pkl`` to the store.
    pools : list of str, optional
        Markets of the store in which the score is also judged, members point in time.
        Default: all of them.
    factors_path : str, optional
        Parquet with ``datetime``, ``instrument`` and one column per factor, such as
        the 20-day means of `ms` features: correlation and incremental RankIC are
        reported for them beside the classic price and volume factors.
    risk_path : str, optional
        Parquet with ``datetime``, ``instrument``, ``industry`` (code) and style
        columns. Default: the ``risk`` group of the dataset's handler, if it has one.
    segment : str, default "test"
        Segment for which units are predicted; that of ``pred.pkl``.
    skip_existing : bool, default False
        Leave a finished report as it is.

    Raises
    ------
    ValueError
        If an argument is out of range, `oracle_path` does not exist, or the recorder's
        predictions and labels have no day in common.
    """

    artifact_path = "factor"
    depend_cls = SignalRecord

    def __init__(
        self,
        recorder: Any,
        model: Any = None,
        dataset: Any = None,
        horizon: int = 10,
        n_layers: int = 20,
        label_col: int = 0,
        oracle_path: str | None = "auto",
        universe: str | None = None,
        label: str | None = None,
        pools: list[str] | None = None,
        factors_path: str | None = None,
        risk_path: str | None = None,
        segment: str = "test",
        skip_existing: bool = False,
    ) -> None:
        for name, value, least in (
            ("horizon", horizon, 1),
            ("n_layers", n_layers, 2),
            ("label_col", label_col, 0),
        ):
            check_whole(name, value, least)
        if oracle_path == "auto":
            beside = Path(f"{C.dpm.get_data_uri('day')}.oracle.parquet")
            oracle_path = str(beside) if beside.is_file() else None
        if pools is not None and not isinstance(pools, list | tuple):
            raise ValueError(
                f"`pools` must be a list of market names, got {pools!r}; [] for none."
            )
        for name, path in (("factors_path", factors_path), ("risk_path", risk_path)):
            if path is not None and not Path(path).exists():
                raise ValueError(
                    f"`{name}` must be an existing Parquet file or folder, got "
                    f"{path!r}."
                )
        if oracle_path is not None and not Path(oracle_path).is_file():
            raise ValueError(
                f"`oracle_path` must be an existing Parquet file, got {oracle_path!r}. "
                "The embedded market writes one beside its store; leave it out "
                "elsewhere."
            )
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        self.model = model
        self.dataset = dataset
        self.horizon = horizon
        self.n_layers = n_layers
        self.label_col = label_col
        self.oracle_path = oracle_path
        self.universe = universe
        self.label = label
        self.pools = None if pools is None else list(pools)
        self.factors_path = factors_path
        self.risk_path = risk_path
        self.segment = segment

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = _first_column(self.load("pred.pkl"), "pred.pkl")
        bars = market_data.load_bars(score)
        days, instruments = bars.days, bars.instruments
        panel = tables.panel_of(score, days, instruments)
        label, label_words = self._label(bars)
        context = tables.Context(
            universe=self.universe or _universe_of(self.dataset),
            label=label_words,
            start=f"{days[0]:%Y-%m-%d}",
            end=f"{days[-1]:%Y-%m-%d}",
            horizon=self.horizon,
            days=len(days),
            stocks=float(torch.isfinite(panel).sum(1).double().mean()),
        )
        evaluation = tables.evaluate(
            panel,
            label,
            days,
            context,
            close=bars.during("close"),
            n_layers=self.n_layers,
            oracle=self._oracle(days, instruments),
        )
        self._add_studies(evaluation, panel, label, bars)
        objects: dict[str, object] = {}
        units = self._units()
        if units is not None:
            objects["units.parquet"] = units
            if units.shape[1] > 1:
                self._add_units(evaluation, units, panel, label, bars)
        known = {k: v for k, v in evaluation.figures.items() if np.isfinite(v)}
        self.recorder.log_metrics(**known)
        for name, frame in evaluation.frames.items():
            # `units.parquet` holds the units' values, their table goes beside it.
            objects[f"{'unit_table' if name == 'units' else name}.parquet"] = frame
        objects["context.json"] = {**asdict(context), "figures": known}
        page = factor_page(evaluation, self._title())
        objects["report.html"] = page.render(_footer(self.recorder))
        return objects

    def _add_studies(
        self,
        evaluation: tables.Evaluation,
        score: torch.Tensor,
        label: torch.Tensor,
        bars: market_data.Bars,
    ) -> None:
        """Pools, trading, other factors and exposures, as far as data allow."""
        days, instruments = bars.days, bars.instruments
        close = bars.during("close")
        names = market_data.market_names() if self.pools is None else self.pools
        pools = {
            name: market_data.membership(name, days, instruments)
            for name in names
            if name != evaluation.context.universe
        }
        studies.add_pools(evaluation, score, label, close, days, pools, self.n_layers)
        studies.add_tradability(
            evaluation,
            score,
            close,
            days,
            self.n_layers,
            market_data.price_limits(bars),
        )
        flags = torch.from_numpy(evaluation.frames["rank_ic"]["sampled"].to_numpy())
        sampled = flags.nonzero().flatten()
        dates = days[sampled.numpy()]

        def panels(frame: pd.DataFrame) -> dict[str, torch.Tensor]:
            return {
                str(name): tables.panel_of(column, dates, instruments)
                for name, column in _on_days(frame, dates).items()
            }

        factors = market_data.classic_factors(bars, sampled + bars.scored.start)
        # In the pool only: the score decides which stocks a factor is ranked among.
        inside = torch.isfinite(score[sampled])
        factors = {
            name: torch.where(inside, values, torch.nan)
            for name, values in factors.items()
            if torch.isfinite(values).any()
        }
        if self.factors_path is not None:
            given = read_factors(self.factors_path, "factors_path")
            factors |= panels(given)
        studies.add_factor_relations(
            evaluation, score[sampled], label[sampled], factors
        )
        risk = (
            market_data.risk_frame(self.dataset, self.segment)
            if self.risk_path is None
            else read_factors(self.risk_path, "risk_path")
        )
        if risk is None:
            logger.info(
                "no exposures in the report: the handler has no `risk` group; give "
                "`risk_path` or a handler of data_handlers."
            )
            return
        styles = panels(risk)
        industry = styles.pop("industry", None)
        studies.add_exposures(
            evaluation,
            score[sampled],
            label[sampled],
            industry,
            styles,
            market_data.industry_names(),
            self.n_layers,
        )

    def _add_units(
        self,
        evaluation: tables.Evaluation,
        units: pd.DataFrame,
        score: torch.Tensor,
        label: torch.Tensor,
        bars: market_data.Bars,
    ) -> None:
        sampled = evaluation.frames["rank_ic"]["sampled"].to_numpy()
        dates = bars.days[sampled]
        table, correlation, figures = tables.unit_table(
            {
                str(name): tables.panel_of(column, dates, bars.instruments)
                for name, column in _on_days(units, dates).items()
            },
            label[torch.from_numpy(sampled)],
            score[torch.from_numpy(sampled)],
        )
        evaluation.frames |= {"units": table, "unit_correlation": correlation}
        evaluation.figures |= figures

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return ["report.html", "context.json", "rank_ic.parquet", "layers.parquet"]

    def _title(self) -> str:
        model = type(self.model).__name__ if self.model is not None else "score"
        name = own_name(self.recorder)
        return f"Factor report: {model}" + (f" ({name})" if name else "")

    def _label(self, bars: market_data.Bars) -> tuple[torch.Tensor, str]:
        h = self.horizon
        days, instruments = bars.days, bars.instruments
        words = f"close of t+1 to close of t+{1 + h}, raw arithmetic return"
        implied = forward_return(bars.fields["close"], h)[bars.scored]
        frame = self.load("label.pkl")
        if frame is None or frame.empty:
            logger.warning(
                "`label.pkl` is empty (the handler has `drop_raw=True`); returns of "
                "the store's closes take its place."
            )
            return implied, self.label or f"{words}, from the store"
        if self.label_col >= frame.shape[1]:
            raise ValueError(
                f"`label_col` must be below {frame.shape[1]}, the number of columns in "
                f"label.pkl, got {self.label_col}."
            )
        series = frame.iloc[:, self.label_col]
        label = tables.panel_of(series, days, instruments)
        if not torch.isfinite(label).any():
            raise ValueError(
                f"label.pkl has no value on the {len(days)} days of pred.pkl "
                f"({days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}); give the test segment "
                f"at least {h + 1} trading days before the end of the data."
            )
        if self.label is not None:
            return label, self.label
        match = metrics.ic(label, implied)
        match = match[torch.isfinite(match)]
        if len(match) and float(match.mean()) > _SAME_RETURN:
            return label, words
        logger.warning(
            f"label.pkl is not the return from {words}. The report uses label.pkl; "
            "set `horizon` (it spaces the sampled dates) and `label` (its words)."
        )
        name = series.name[-1] if isinstance(series.name, tuple) else series.name
        return label, f"column {name} of label.pkl (not close t+1 to close t+{1 + h})"

    def _oracle(
        self, days: pd.DatetimeIndex, instruments: pd.Index
    ) -> torch.Tensor | None:
        if self.oracle_path is None:
            return None
        frame = pd.read_parquet(self.oracle_path)
        missing = {"datetime", "instrument", "total"} - set(frame.columns)
        if missing:
            raise ValueError(
                f"`oracle_path` must have the columns datetime, instrument and total; "
                f"{self.oracle_path} lacks {sorted(missing)}."
            )
        series = frame.set_index(["datetime", "instrument"])["total"]
        return tables.panel_of(series, days, instruments)

    def _units(self) -> pd.DataFrame | None:
        if self.dataset is None or not hasattr(self.model, "predict_units"):
            return None
        units = self.model.predict_units(self.dataset, segment=self.segment)
        units = units.astype(np.float32)
        # Sorting copies, and a unit frame can be the largest thing in memory.
        return units if units.index.is_monotonic_increasing else units.sort_index()


class _ModelRecord(FileRecord):
    """Base of the records of what one kind of model can tell of itself."""

    depend_cls = None
    _asks: ClassVar[str]  # the model's method that is asked
    _due: ClassVar[str]  # what the model must do or be, in words

    def __init__(
        self,
        recorder: Any,
        model: Any = None,
        dataset: Any = None,
        segment: str = "test",
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        if not hasattr(model, self._asks):
            raise ValueError(f"`model` must {self._due}, got {type(model).__name__}.")
        self.model = model
        self.dataset = dataset
        self.segment = segment


class GraphRecord(_ModelRecord):
    """Keep what a graph model did: weights of its relations, and the graphs.

    Writes ``graph/weights.parquet`` (daily weights beside the style returns that they
    follow), ``graph/statistics.parquet`` (degree, turnover, isolated stocks of each
    relation) and ``graph/report.html``.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    model : GRUGAT
        `<MODEL>` in a workflow.
    dataset : DatasetH
        `<DATASET>` in a workflow.
    segment : str, default "test"
        Segment whose weights are kept.
    skip_existing : bool, default False
        Leave finished files as they are.
    """

    artifact_path = "graph"
    _asks = "predict_weights"
    _due = "have relations to report (GRUGAT; write <MODEL>)"

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        weights = self.model.predict_weights(self.dataset, self.segment)
        statistics = self.model.graph_statistics(self.dataset)
        figures = {
            f"{relation}_{name}": float(value)
            for (relation, name), value in statistics.mean().items()
            if np.isfinite(value)
        } | {f"weight_{k}": float(v) for k, v in weights["weight"].mean().items()}
        self.recorder.log_metrics(**figures)
        page = graph_page(weights, statistics, f"{own_name(self.recorder)}: graphs")
        return {
            "weights.parquet": _flat(weights),
            "statistics.parquet": _flat(statistics),
            "report.html": page.render(_footer(self.recorder)),
        }

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return ["weights.parquet", "statistics.parquet", "report.html"]


class WeightRecord(_ModelRecord):
    """Keep the daily weights with which a model joins its sources.

    Writes ``weights/weights.parquet`` (rows datetime, columns ``weighting/source``; row
    t is known at the close of t) and logs each weight's mean.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    model : FamilyComposite
        `<MODEL>` in a workflow.
    dataset : DatasetH
        `<DATASET>` in a workflow.
    segment : str, default "test"
        Segment whose weights are kept.
    skip_existing : bool, default False
        Leave finished files as they are.
    """

    artifact_path = "weights"
    _asks = "predict_weights"
    _due = "weigh its sources (FamilyComposite; write <MODEL>)"

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        weights = self.model.predict_weights(self.dataset, self.segment)
        self.recorder.log_metrics(
            **{f"weight_{a}_{b}": float(v) for (a, b), v in weights.mean().items()}
        )
        return {"weights.parquet": _flat(weights)}

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return ["weights.parquet"]


class RiskRecord(FileRecord):
    """Keep the daily returns of country, industry and style factors, and coverage.

    Writes ``risk/factor_returns.parquet`` (see `data_handlers.risk.factor_returns`; row
    t is known at the close of t) and ``risk/coverage.parquet`` (share of known values
    of each risk column by year), over the whole range of the handler.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    dataset : DatasetH
        Whose handler has a `risk` group; `<DATASET>` in a workflow.
    skip_existing : bool, default False
        Leave finished files as they are.
    """

    artifact_path = "risk"
    depend_cls = None

    def __init__(
        self, recorder: Any, dataset: Any = None, skip_existing: bool = False
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        self.dataset = dataset

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        from qlib.data import D

        from data_handlers.risk import (
            DAILY_RETURN,
            factor_return_frame,
            style_coverage,
        )

        risk = market_data.risk_frame(self.dataset, slice(None))
        if risk is None:
            raise ValueError(
                "`dataset` must have a handler with a `risk` group; use one of "
                "data_handlers."
            )
        frame = pd.concat({"risk": risk}, axis=1)
        dates = frame.index.get_level_values("datetime")
        names = list(frame.index.unique("instrument"))
        returns = D.features(names, [DAILY_RETURN], dates.min(), dates.max())
        table = factor_return_frame(frame, returns.iloc[:, 0].swaplevel())
        annual = {
            f"{name} return": float(value) * 252
            for name, value in table.drop(columns="r2").mean().items()
            if np.isfinite(value) and not str(name).startswith("industry")
        }
        self.recorder.log_metrics(**annual)
        return {
            "factor_returns.parquet": table,
            "coverage.parquet": style_coverage(frame),
        }

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return ["factor_returns.parquet", "coverage.parquet"]


class MambaRecord(_ModelRecord):
    """Keep what a Mamba model did: its risk factor, exposures and experts.

    Reads ``pred.pkl`` and ``label.pkl`` of `SignalRecord`. Writes under ``mamba/``:

    - ``risk_factor.parquet`` (dual task): column `risk` by datetime and instrument,
      from the segment ``valid`` on. `ParquetDataLoader` reads it as a feature
      (``{"recorder": …, "file": "mamba/risk_factor.parquet"}``), the risk model as a
      further style (its `factors`);
    - ``exposure.parquet``, ``industry.parquet``, ``daily.parquet``: exposure of the
      score, RankIC before and after neutralising it, share explained by linear risk;
    - ``experts.parquet`` (weights and scores by day and stock) and
      ``expert_daily.parquet`` (load, entropy, RankIC), for `MambaMoE`;
    - ``report.html``.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    model : Mamba or MambaMoE
        `<MODEL>` in a workflow.
    dataset : DatasetH
        `<DATASET>` in a workflow; its handler needs a ``risk`` group.
    segment : str, default "test"
        That of ``pred.pkl``.
    beside : str, optional
        Name of an experiment whose latest run is shown beside this one's exposures:
        the same model without penalty, say. Where it has no finished run yet, the
        report says so.
    skip_existing : bool, default False
        Leave finished files as they are.
    """

    artifact_path = "mamba"
    depend_cls = SignalRecord
    _asks = "predict_risk"
    _due = "be a Mamba or MambaMoE (write <MODEL>)"

    def __init__(
        self,
        recorder: Any,
        model: Any = None,
        dataset: Any = None,
        segment: str = "test",
        beside: str | None = None,
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder, model, dataset, segment, skip_existing)
        self.beside = beside

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        panel = Panel.from_dataset(self.dataset)
        score = _first_column(self.load("pred.pkl"), "score")
        label = self.load("label.pkl")
        if label is None:
            raise ValueError(
                "`label.pkl` is empty: set the handler's `drop_raw` to false, or leave "
                "MambaRecord out of `record`."
            )
        label = label.iloc[:, 0]
        dates = pd.DatetimeIndex(score.index.unique("datetime")).sort_values()
        days = panel.dates.get_indexer(dates)

        def grid(series: pd.Series) -> torch.Tensor:
            values = scatter(series, dates, panel.instruments, np.float32)
            return torch.from_numpy(values)

        def named(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.set_axis(dates.rename("datetime"), axis=0)

        industry = panel.risk_column("industry")
        industry = None if industry is None else industry[days]
        styles = {}
        if panel.risk is not None:
            names = linear_factors(panel)
            columns = [panel.risk_names.index(n) for n in names]
            values = panel.risk[days][..., columns].unbind(-1)
            styles = dict(zip(names, values, strict=True))
        out: dict[str, object] = {}
        learnt = None
        if self.model.learns_risk:
            # From `valid` on: a risk model needs a history before the first test day.
            first, last = dates[[0, -1]]
            if "valid" in self.dataset.segments:
                days_of = panel.days(self.dataset.segments["valid"])
                first = min(first, panel.dates[days_of[0]])
            risk = self.model.predict_risk(self.dataset, (first, last))
            out["risk_factor.parquet"] = risk.to_frame()
            learnt = grid(risk)
        of_score, returns = grid(score), grid(label)
        exposure, daily = (
            named(frame)
            for frame in exposure_figures(of_score, returns, industry, styles, learnt)
        )
        out |= {"exposure.parquet": exposure, "daily.parquet": daily}
        figures = {f"exposure_{k}": v for k, v in exposure.abs().mean().items()}
        figures |= {f"mamba_{k}": v for k, v in daily.mean().items()}
        by_industry = None
        if industry is not None:
            by_industry = named(
                industry_exposure(of_score, industry, market_data.industry_names())
            )
            out["industry.parquet"] = by_industry
        experts = by_regime = None
        if hasattr(self.model, "predict_experts"):
            table = self.model.predict_experts(self.dataset, self.segment)
            out["experts.parquet"] = table
            names = self.model.expert_names_
            weights, scores = (
                torch.stack([grid(table[f"{kind}_{n}"]) for n in names], dim=-1)
                for kind in ("weight", "score")
            )
            market, _ = load_panel([DAILY_RETURN], panel.dates, panel.instruments)
            market = pd.DataFrame(market[..., 0]).mean(axis=1).to_numpy()
            experts, by_regime = expert_figures(
                weights, scores, of_score, returns, names, market_regime(market)[days]
            )
            experts = named(experts)
            out["expert_daily.parquet"] = experts
            load = part_of(experts, "load").mean()
            figures |= {f"load_{k}": v for k, v in load.items()}
            figures["gate_entropy"] = float(experts["entropy"].mean())
            for text in expert_warnings(load):
                logger.warning(text)
        self.recorder.log_metrics(
            **{k: float(v) for k, v in figures.items() if np.isfinite(v)}
        )
        beside, why = self._beside()
        page = mamba_page(
            f"{own_name(self.recorder)}: risk and experts",
            exposure,
            daily,
            by_industry,
            experts,
            by_regime,
            beside,
        )
        if why:
            logger.warning(why)
            page.warn(why)
        out["report.html"] = page.render(_footer(self.recorder))
        return out

    def _beside(self) -> tuple[Beside | None, str]:
        """Exposures of the latest run of `beside`, or why there are none."""
        experiment = self.recorder.client.get_experiment(self.recorder.experiment_id)
        if self.beside in (None, experiment.name):
            return None, ""
        file = self.get_path("exposure.parquet")
        try:
            _, other = find_recorder(self.recorder.uri, self.beside, artifact=file)
        except ValueError as error:
            # The training is done: a comparison that is not there must not lose it.
            return None, f"No exposures beside these: {error}"
        frames = [load_frame(other, file)]
        file = self.get_path("industry.parquet")
        if has_artifact(other, file):
            frames.append(load_frame(other, file))
        return Beside(self.beside, *frames), ""

    def list(self) -> list[str]:
        """Artifacts that every run leaves."""
        return ["exposure.parquet", "daily.parquet", "report.html"]


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Join column levels by a slash: Parquet keeps plain names."""
    return frame.set_axis(["/".join(map(str, c)) for c in frame.columns], axis=1)


def forward_return(close: torch.Tensor, horizon: int) -> torch.Tensor:
    """Arithmetic return from the close of t+1 to the close of t+1+h, ``[t, n]``.

    NaN where either close is missing, as Qlib's ``Ref`` gives.
    """
    out = torch.full_like(close, torch.nan)
    if len(close) > horizon + 1:
        out[: -horizon - 1] = close[horizon + 1 :] / close[1:-horizon] - 1
    return out


def _on_days(frame: pd.DataFrame, days: pd.DatetimeIndex) -> pd.DataFrame:
    """Rows of the given days: once for all columns, before each becomes a panel."""
    return frame[frame.index.get_level_values("datetime").isin(days)]


def _first_column(frame: pd.DataFrame | pd.Series, name: str) -> pd.Series:
    series = frame.iloc[:, 0] if isinstance(frame, pd.DataFrame) else frame
    series = series.rename(name)
    if not np.isfinite(series.to_numpy(float)).any():
        raise ValueError(f"{name} holds no finite score; see the training log.")
    return series


def _universe_of(dataset: Any) -> str:
    """Name of the pool as the handler was given it."""
    instruments = getattr(getattr(dataset, "handler", None), "instruments", None)
    if isinstance(instruments, str):
        return instruments
    if isinstance(instruments, dict) and "market" in instruments:
        return str(instruments["market"])
    return "stocks with a score"


def _footer(recorder: Any) -> str:
    return (
        f"Recorder {recorder.id}, experiment {recorder.experiment_id}. No costs and no "
        "price limits unless stated; research, not advice."
    )


def _json(value: object) -> str:
    return json.dumps(value, indent=1, default=str)
