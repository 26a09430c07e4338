"""Compare recorders of any Qlib model: seeds, paired tests, scores, curves.

Glossary: t days of all recorders, m sampled days, n instruments, h label horizon.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from qlib.log import get_module_logger
from qlib.workflow.recorder import MLflowRecorder
from torch import Tensor
from tqdm import tqdm

from data_handlers.arguments import Count, checked
from qlib_ext import metrics, recorders
from qlib_ext.report import plots
from qlib_ext.report.factor import SAMPLED, STARTS
from qlib_ext.report.page import COLUMNS, Page, caption, format_value
from qlib_ext.report.reported import REPORTED, reported_for
from qlib_ext.report.tables import (
    MIN_PAIRS,
    Context,
    correlation_frame,
    fitting_layers,
    net_values,
    non_overlapping_starts,
    panel_of,
    yearly_means,
)

__all__ = ["Comparison", "Run", "compare", "compare_page", "load_runs", "with_spread"]

logger = get_module_logger("qlib_ext.report.compare")

# Parameters that may differ between two seeds of the same model.
_NOT_THE_MODEL = {"seed", "random_state", "GPU", "n_jobs", "num_threads"}
_NOT_THE_MODEL |= {"checkpoint_dir", "n_seeds", "save_path"}
# Figures that FactorRecord leaves, with the name of their column here.
_LOGGED = {
    "Top hedged annual return": "hedged_top",
    "Top hedged Sharpe": "hedged_top_sharpe",
    "Top hedged max drawdown": "hedged_top_drawdown",
    "Top weekly turnover": "turnover",
}
_DRAWS = 2000
# Labels of two recorders that agree so far are taken to be the same.
_SAME_LABEL = 1e-4


@dataclass
class Run:
    """One recorder.

    Attributes
    ----------
    experiment, recorder, name : str
        Experiment's name, recorder's id and name.
    params : dict of str to str
        Task configuration as Qlib logged it.
    logged : dict of str to float
        Metrics.
    score : Series
        First column of ``pred.pkl``.
    label : Series or None
        Column of ``label.pkl``; None if the recorder has no raw label.
    """

    experiment: str
    recorder: str
    name: str
    params: dict[str, str]
    logged: dict[str, float]
    score: pd.Series
    label: pd.Series | None


@dataclass
class Comparison:
    """Frames of the comparison.

    Attributes
    ----------
    context : Context
    models : DataFrame
        One row a model, mean and standard deviation over its recorders.
    runs : DataFrame
        One row a recorder.
    paired : DataFrame
        One row a pair of models.
    by_year, correlation, values : DataFrame
        RankIC by year, score correlations, net value of the hedged top group; one
        column a model.
    warnings : list of str
    """

    context: Context
    models: pd.DataFrame
    runs: pd.DataFrame
    paired: pd.DataFrame
    by_year: pd.DataFrame
    correlation: pd.DataFrame
    values: pd.DataFrame
    warnings: list[str] = field(default_factory=list)


def load_runs(
    uris: Sequence[str], experiments: Sequence[str], label_col: int = 0
) -> tuple[list[Run], int | None, list[str]]:
    """Read every finished recorder of some experiments, in any of some MLflow stores.

    Returns
    -------
    runs : list of Run
    horizon : int or None
        Label horizon that the first among them that tells it states.
    skipped : list of str
        Why recorders were left out; which horizons are stated beside the first.

    Raises
    ------
    ValueError
        If an experiment is in none of the stores, or no recorder has predictions.
    """
    found: list[tuple[str, MLflowRecorder]] = [
        (name, recorder)
        for name in dict.fromkeys(experiments)
        for uri in _stores_of(name, uris)
        for recorder in reversed(recorders.list_recorders(uri, name))
    ]
    runs: list[Run] = []
    skipped: list[str] = []
    stated: dict[int, str] = {}  # horizon, and who states it first
    for name, recorder in tqdm(
        found, desc="recorders", unit="run", leave=False, disable=None
    ):
        if not recorders.has_artifact(recorder, "pred.pkl"):
            skipped.append(f"{name} {recorder.id[:8]}: no pred.pkl")
            continue
        label = None
        try:
            score = recorders.load_frame(recorder, "pred.pkl").iloc[:, 0]
            if recorders.has_artifact(recorder, "label.pkl"):
                frame = recorders.load_frame(recorder, "label.pkl")
                if label_col < frame.shape[1]:
                    label = frame.iloc[:, label_col].rename("label")
            of_run = recorders.stated_horizon(recorder, label_col)
        except recorders.DamagedError as error:
            skipped.append(f"{name} {recorder.id[:8]} is left out: {error}")
            continue
        if of_run is not None:
            stated.setdefault(of_run, f"{name} {recorder.id[:8]}")
        runs.append(
            Run(
                experiment=name,
                recorder=recorder.id,
                name=str(recorder.name),
                params=dict(recorder.list_params()),
                logged=dict(recorder.list_metrics()),
                score=score.rename("score"),
                label=label,
            )
        )
    if not runs:
        raise ValueError(
            f"no finished recorder of {list(experiments)} has a pred.pkl that can be "
            "read; add SignalRecord to the workflow's `record` list."
            + "".join(f" {text}" for text in skipped)
        )
    horizon = next(iter(stated), None)
    skipped += [
        f"{who} states a horizon of {other} days, not {horizon}: labels of different "
        "horizons are not comparable"
        for other, who in stated.items()
        if other != horizon
    ]
    return runs, horizon, skipped


def _stores_of(experiment: str, uris: Sequence[str]) -> list[str]:
    """Return the stores that hold an experiment; all, which then say so, if none."""
    uris = list(dict.fromkeys(uris))
    if len(uris) == 1:
        return uris
    return [uri for uri in uris if recorders.has_experiment(uri, experiment)] or uris


@checked
def compare(runs: Sequence[Run], horizon: Count = 10, n_layers: int = 20) -> Comparison:
    """Measure all recorders in the same way, and models against each other.

    Recorders of an experiment whose model and data parameters differ by no more than a
    seed are one model. Each recorder's own figures use its own days and stocks. Paired
    tests, years, curves and correlations use the days and stocks that all models score.

    The paired bootstrap resamples blocks of 2h days of the difference in daily RankIC
    (mean over seeds), 2,000 draws; p is two-sided.

    Parameters
    ----------
    runs : sequence of Run
    horizon : int, default 10
        Trading days of the label, for the sampled dates.
    n_layers : int, default 20
        Wished groups for the top group's curve.

    Raises
    ------
    ValueError
        If `horizon` is below 1, no recorder has a label, or there is no day on which
        all models score a stock.
    """
    models = _models(runs)
    days = pd.DatetimeIndex(
        sorted(set().union(*(r.score.index.unique("datetime") for r in runs)))
    )
    instruments = pd.Index(
        sorted(set().union(*(r.score.index.unique("instrument") for r in runs)))
    )
    scores = [panel_of(r.score, days, instruments) for r in runs]
    labels, warnings, comparable = _labels(runs, days, instruments)

    daily = [
        metrics.rank_ic(s, y, MIN_PAIRS) for s, y in zip(scores, labels, strict=True)
    ]
    table = _run_table(runs, models, daily, horizon)
    means = {name: _mean_score([scores[i] for i in at]) for name, at in models.items()}
    shared = torch.stack([torch.isfinite(x) for x in means.values()]).all(0)
    if not bool(shared.any()):
        raise ValueError(
            "the models have no day and stock in common; compare experiments with the "
            "same test segment and universe."
        )
    for name, score in means.items():
        kept = float(shared.sum() / torch.isfinite(score).sum())
        if kept < 0.95:
            warnings.append(
                f"{name}: {kept:.0%} of its scores lie on days and stocks that all "
                "models score; paired figures use those."
            )
    on_shared = {
        name: torch.stack(
            [
                metrics.rank_ic(
                    torch.where(shared, scores[i], torch.nan), labels[i], MIN_PAIRS
                )
                for i in at
            ]
        ).nanmean(0)
        for name, at in models.items()
    }
    starts = non_overlapping_starts(
        torch.stack(list(on_shared.values())).nanmean(0), horizon
    )
    picked = starts[0]
    label = labels[0]
    means = {k: torch.where(shared, v, torch.nan) for k, v in means.items()}
    first = next(iter(means.values()))
    context = Context(
        universe="stocks that all models score",
        label="raw label of label.pkl",
        start=f"{days[0]:%Y-%m-%d}",
        end=f"{days[-1]:%Y-%m-%d}",
        horizon=horizon,
        days=len(days),
        stocks=float(shared.sum(1).double().mean()),
    )
    groups = fitting_layers(first, n_layers)
    return Comparison(
        context=context,
        models=_model_table(runs, models, table),
        runs=table,
        paired=_paired(on_shared, models, comparable, horizon),
        by_year=_by_year(on_shared, days, starts),
        correlation=_score_correlation(means, picked),
        values=_curves(means, label, days, picked, groups),
        warnings=warnings,
    )


def _models(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Positions of the recorders of each model, by a name for it."""
    parts: dict[str, dict[tuple, list[int]]] = {}
    for i, run in enumerate(runs):
        key = tuple(
            sorted(
                (k, v)
                for k, v in run.params.items()
                if k.split(".")[0] in ("model", "dataset")
                and k.split(".")[-1] not in _NOT_THE_MODEL
            )
        )
        parts.setdefault(run.experiment, {}).setdefault(key, []).append(i)
    models = {}
    for experiment, groups in parts.items():
        for number, (key, at) in enumerate(groups.items(), 1):
            name = experiment
            if len(groups) > 1:
                # Several models under one name: tell them apart by class and order.
                kind = dict(key).get("model.class", "model")
                name = f"{experiment}: {kind} {number}"
            models[name] = at
    return models


def _labels(
    runs: Sequence[Run], days: pd.DatetimeIndex, instruments: pd.Index
) -> tuple[list[Tensor], list[str], list[bool]]:
    """Label panel of each run, remarks, and whether it is the first run's label."""
    known = [r for r in runs if r.label is not None]
    if not known:
        raise ValueError(
            "no recorder has a raw label in label.pkl; set `drop_raw` of the handler "
            "to False, or use FactorRecord, which takes returns from the store."
        )
    panels: list[Tensor] = []
    warnings, same = [], []
    # The label with most values stands in where a recorder has none.
    base = max(known, key=lambda r: r.label.notna().sum() if r.label is not None else 0)
    assert base.label is not None
    reference = panel_of(base.label, days, instruments)
    for run in runs:
        if run.label is None:
            warnings.append(
                f"{run.experiment} {run.recorder[:8]} has no raw label; that of "
                f"{base.experiment} is used."
            )
            panels.append(reference)
            same.append(True)
            continue
        panel = panel_of(run.label, days, instruments)
        panels.append(panel)
        gap = (panel - reference).abs()
        gap = gap[torch.isfinite(gap)]
        agrees = bool(len(gap)) and float(gap.double().mean()) < _SAME_LABEL
        same.append(agrees)
        if not agrees:
            warnings.append(
                f"{run.experiment} {run.recorder[:8]} has another label than "
                f"{base.experiment}: its figures are its own and it is left out of the "
                "paired tests."
            )
    return panels, warnings, same


def _run_table(
    runs: Sequence[Run], models: dict[str, list[int]], daily: list[Tensor], horizon: int
) -> pd.DataFrame:
    rows = []
    for name, at in models.items():
        for i in at:
            run = runs[i]
            starts = non_overlapping_starts(daily[i], horizon)
            part, _ = metrics.over_starts(daily[i], starts)
            rows.append(
                {
                    "recorder": run.recorder[:8],
                    "model": name,
                    "seed": run.params.get("model.kwargs.seed", ""),
                    **part.row(),
                    "daily_rank_ic": metrics.summarise(daily[i]).mean,
                    "hac_error": metrics.newey_west_se(daily[i], horizon - 1),
                    **{
                        column: run.logged.get(figure, np.nan)
                        for figure, column in _LOGGED.items()
                    },
                }
            )
    return pd.DataFrame(rows).set_index("recorder")


def _model_table(
    runs: Sequence[Run], models: dict[str, list[int]], table: pd.DataFrame
) -> pd.DataFrame:
    figures = ["rank_ic", "ic_ir", "daily_rank_ic", *_LOGGED.values()]
    rows = []
    for name, at in models.items():
        part = table[table["model"] == name]
        row: dict[str, object] = {"model": name, "recorders": len(at)}
        for figure in figures:
            values = part[figure]
            row[figure] = float(values.mean())
            row[f"{figure}_std"] = float(values.std()) if len(at) > 1 else np.nan
        known = reported_for(runs[at[0]].params)
        row["reported"] = known.text() if known else ""
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def _mean_score(panels: list[Tensor]) -> Tensor:
    """Average of the daily ranks over seeds, where any seed has a score."""
    ranks = []
    for panel in panels:
        rank = metrics.cs_rank(panel)
        ranks.append(rank / torch.isfinite(rank).sum(1, keepdim=True).clamp(min=1))
    return torch.stack(ranks).nanmean(0)


def _paired(
    daily: dict[str, Tensor],
    models: dict[str, list[int]],
    comparable: list[bool],
    horizon: int,
) -> pd.DataFrame:
    rows = []
    fit = [name for name, at in models.items() if all(comparable[i] for i in at)]
    for a, b in itertools.combinations(fit, 2):
        gap = daily[a] - daily[b]
        draws = metrics.block_bootstrap(gap, 2 * horizon, _DRAWS)
        if not len(draws):
            continue
        low, high = (float(draws.quantile(q)) for q in (0.025, 0.975))
        side = min(
            float((draws <= 0).double().mean()), float((draws >= 0).double().mean())
        )
        rows.append(
            {
                "pair": f"{a} less {b}",
                "days": int(torch.isfinite(gap).sum()),
                "difference": float(gap.nanmean()),
                "low": low,
                "high": high,
                "p": min(1.0, max(2 * side, 1 / _DRAWS)),
            }
        )
    columns = ["pair", "days", "difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns).set_index("pair")


def _by_year(
    daily: dict[str, Tensor], days: pd.DatetimeIndex, starts: Sequence[Tensor]
) -> pd.DataFrame:
    by_year = {name: yearly_means(x, days, starts) for name, x in daily.items()}
    years = pd.DatetimeIndex(days[torch.cat(list(starts)).unique().numpy()]).year
    rows = {
        str(year): {name: means[year] for name, means in by_year.items()}
        for year in years.unique()
    }
    rows["total"] = {
        k: metrics.over_starts(x, starts)[0].mean for k, x in daily.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("period")


def _score_correlation(means: dict[str, Tensor], picked: Tensor) -> pd.DataFrame:
    stack = torch.stack([x[picked].double() for x in means.values()])
    return correlation_frame(stack, list(means), "model")


def _curves(
    means: dict[str, Tensor],
    label: Tensor,
    days: pd.DatetimeIndex,
    picked: Tensor,
    groups: int,
) -> pd.DataFrame:
    """Net value of each model's top group less the pool, one step a sampled day."""
    steps = {}
    for name, score in means.items():
        layers = metrics.layer_means(score[picked], label[picked], groups)
        steps[name] = (layers[:, groups - 1] - layers[:, -1]).numpy()
    # A step entered after one sampled day is known by the next one; the curves start
    # at 1 on the first.
    horizon = int(picked[1] - picked[0]) if len(picked) > 1 else 1
    ends = torch.cat([picked, picked[-1:] + horizon]).clamp(max=len(days) - 1)
    frame = pd.DataFrame(steps, days[ends[1:].numpy()])
    start = pd.DataFrame(np.nan, days[ends[:1].numpy()], frame.columns)
    return net_values(pd.concat([start, frame]).dropna(how="all", axis=1))


def compare_page(result: Comparison, title: str) -> Page:
    """Lay out the comparison."""
    context = result.context
    h = context.horizon
    page = Page(
        title,
        f"{len(result.models)} models, {len(result.runs)} recorders, {context.start} "
        f"to {context.end}, raw label, horizon {h} trading days; RankIC "
        f"{STARTS.format(h=h)}. Tables of single recorders use the universe and days "
        f"of each one's own pred.pkl; all else {context.universe}, mean over seeds.",
    )
    for text in result.warnings:
        page.warn(text)
    weekly = (
        "Hedged figures as logged by FactorRecord (weekly layers, next close, no "
        "costs, x252), empty where a recorder has none."
    )
    page.section(
        "Models",
        "Mean and standard deviation over the recorders (seeds) of each model. "
        "Reported figures come from other data, days and costs: not comparable.",
    )
    shown, styles = with_spread(result.models)
    page.table("Mean ± spread", shown, weekly, wide=True, styles=styles)
    page.plot(
        "RankIC",
        plots.bars(
            result.models[["rank_ic"]],
            "mean RankIC",
            error=result.models["rank_ic_std"],
        ),
        "Each recorder's own universe and days; error bars: standard deviation over "
        "seeds.",
    )
    page.plot("RankIC by year", plots.bars(result.by_year, "mean RankIC"))
    page.table("RankIC by year", result.by_year, wide=True, default_style="p2")
    page.section(
        "Paired tests",
        "Difference in daily RankIC on the same days and stocks. An interval that "
        "holds zero means that these days do not tell the two models apart.",
    )
    page.table(
        "Block bootstrap",
        result.paired,
        caption(
            "daily RankIC",
            f"blocks of {2 * h} days, {_DRAWS:,} draws, 95 % interval, two-sided p",
        ),
        wide=True,
        styles={
            "difference": ("difference", "p2"),
            "low": ("from", "p2"),
            "high": ("to", "p2"),
            "p": ("p", "n3"),
        },
    )
    page.section("Scores", "How alike the models' scores are.")
    page.plot(
        "Correlation (below the diagonal Spearman, above Pearson)",
        plots.heatmap(result.correlation, show_values=len(result.correlation) <= 16),
        caption(SAMPLED.format(h=h)),
        wide=True,
    )
    page.plot(
        "Top group, hedged",
        plots.lines(result.values, "net value"),
        caption(
            f"top group's mean label less the pool's, compounded every {h} days",
            "no costs, not annualised",
        ),
        wide=True,
    )
    page.section("Recorders")
    page.table(
        "Every recorder",
        result.runs,
        weekly,
        wide=True,
        styles={"model": ("model", "s"), "seed": ("seed", "v")},
    )
    page.section(
        "Reported by the sell side",
        "Not comparable: licensed data, other stocks, days, costs and conventions.",
    )
    reported = pd.DataFrame(
        [
            {
                "system": item.system,
                "figures": item.text(),
                "other": item.other,
                "source": item.source,
            }
            for item in REPORTED
        ]
    ).set_index("system")
    page.table(
        "As printed",
        reported,
        "Universe, period, label and horizon as in the source.",
        wide=True,
        styles={x: (x, "s") for x in reported.columns},
    )
    return page


def with_spread(
    models: pd.DataFrame,
) -> tuple[pd.DataFrame, dict[str, tuple[str, str]]]:
    """Write mean and spread into one cell."""
    shown = pd.DataFrame(index=models.index)
    shown["recorders"] = models["recorders"].astype(str)
    styles = {"recorders": ("recorders", "v")}
    for column in ("rank_ic", "ic_ir", "daily_rank_ic", *_LOGGED.values()):
        heading, style = COLUMNS[column]
        shown[column] = [
            format_value(float(mean), style)
            + (f" ± {format_value(float(std), style)}" if np.isfinite(std) else "")
            for mean, std in zip(models[column], models[f"{column}_std"], strict=True)
        ]
        styles[column] = (heading, "v")
    # Beside the figures it would be compared with, were it comparable.
    shown.insert(3, "reported", models["reported"].replace("", "–"))
    styles["reported"] = ("reported, not comparable", "v")
    return shown, styles
