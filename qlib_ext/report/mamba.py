"""Record and report of Mamba models: exposure to risk, learnt risk, the experts.

Glossary: c days, n instruments, k styles, e experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from qlib.workflow.record_temp import SignalRecord

from data_handlers.cross_section import neutralize
from data_handlers.expression.loading import load_panel
from data_handlers.panel import scatter
from data_handlers.risk import DAILY_RETURN
from qlib_ext.dataset import Panel
from qlib_ext.metrics import ic, rank_ic
from qlib_ext.models.mamba import linear_factors
from qlib_ext.recorders import find_recorder, has_artifact, load_frame, own_name
from qlib_ext.report import market_data, plots
from qlib_ext.report.page import Page
from qlib_ext.report.record import ModelRecord, first_column, footer, logger

__all__ = [
    "Beside",
    "MambaRecord",
    "expert_figures",
    "expert_warnings",
    "exposure_figures",
    "industry_exposure",
    "mamba_page",
    "market_regime",
    "part_of",
]


@dataclass(frozen=True)
class Beside:
    """Exposures of another run, as `exposure_figures` and `industry_exposure` make."""

    name: str
    exposure: pd.DataFrame
    industries: pd.DataFrame | None = None


class MambaRecord(ModelRecord):
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
    leaves = ("exposure.parquet", "daily.parquet", "report.html")
    depend_cls = SignalRecord
    asks = "predict_risk"
    due = "be a Mamba or MambaMoE (write <MODEL>)"

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

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        panel = Panel.from_dataset(self.dataset)
        score = first_column(self.load("pred.pkl"), "score")
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
        self.log(figures)
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
        out["report.html"] = page.render(footer(self.recorder))
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


def exposure_figures(
    score: torch.Tensor,
    label: torch.Tensor,
    industry: np.ndarray | None,
    styles: dict[str, torch.Tensor],
    learnt: torch.Tensor | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Exposure of a score to risk, and what is left of it without, each day.

    Parameters
    ----------
    score, label : Tensor [c, n]
        NaN leaves the stock out. The label is the raw forward return.
    industry : ndarray [c, n] or None
        Codes.
    styles : dict of str to Tensor [c, n]
    learnt : Tensor [c, n] or None
        The learnt risk factor.

    Returns
    -------
    exposure : DataFrame [c, k]
        Correlation of the score with each style, and with `learnt`.
    daily : DataFrame [c]
        `rank_ic`; `neutral_rank_ic` of the score's residual on industries and styles;
        `explained`, the share of the score's variance that these explain, adjusted
        for their number (noise: 0 on average);
        `risk_rank_ic` of the learnt factor.
    """
    exposure = {name: ic(score, value) for name, value in styles.items()}
    if learnt is not None:
        exposure["learnt"] = ic(score, learnt)
    columns = [value.numpy() for value in styles.values()]
    known = (
        [] if industry is None else [torch.from_numpy(industry)],
        [*styles.values()],
    )
    residual = torch.from_numpy(
        neutralize(
            score.double().unsqueeze(-1).numpy(),
            industry,
            np.stack(columns, axis=-1) if columns else None,
            missing="unknown",
        )[..., 0]
    )
    daily = {
        "rank_ic": rank_ic(score, label),
        "neutral_rank_ic": rank_ic(residual, label),
        "explained": 1.0
        - _variance(residual) / _variance(score.double()) * _inflation(score, known),
    }
    if learnt is not None:
        daily["risk_rank_ic"] = rank_ic(learnt, label)
    return (
        pd.DataFrame({k: v.numpy() for k, v in exposure.items()}),
        pd.DataFrame({k: v.numpy() for k, v in daily.items()}),
    )


def _inflation(
    score: torch.Tensor, known: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> torch.Tensor:
    """(n - 1) / (n - p) of each day, with p coefficients; NaN where none is left.

    One for each industry that has stocks (the constant without industries), one for
    each style that differs among stocks, and one for the unknown values of either.
    """
    industries, styles = known
    here = torch.isfinite(score)
    n = here.sum(-1)
    p = torch.zeros_like(n)
    for code in industries:
        lost = here & ~torch.isfinite(code)
        p += lost.any(-1)
        for value in code[torch.isfinite(code)].unique():
            p += (here & (code == value)).any(-1)
    p = p.clamp(min=1)
    for style in styles:
        use = here & torch.isfinite(style)
        high = torch.where(use, style, -torch.inf).amax(-1)
        low = torch.where(use, style, torch.inf).amin(-1)
        p += (high > low).long() + (use.any(-1) & (here & ~use).any(-1)).long()
    left = (n - p).double()
    return (n - 1) / torch.where(left > 0, left, torch.nan)


def _variance(x: torch.Tensor) -> torch.Tensor:
    """Variance of each day over what is finite."""
    return (x - x.nanmean(-1, keepdim=True)).square().nanmean(-1)


def industry_exposure(
    score: torch.Tensor, industry: np.ndarray, names: Mapping[str, str]
) -> pd.DataFrame:
    """Mean score of each industry's stocks each day [c, industries], NaN without any.

    `score` is standardised over the day, so this is the industry's exposure in units
    of its standard deviation. `names` are those of the codes, where known.
    """
    z = (score - score.nanmean(-1, keepdim=True)) / _variance(score).sqrt().unsqueeze(
        -1
    )
    values = z.numpy()
    out = {}
    for code in np.unique(industry[np.isfinite(industry)]):
        here = np.where(industry == code, values, np.nan)
        known = np.isfinite(here)
        total = np.where(known, here, 0.0).sum(1)
        with np.errstate(invalid="ignore"):
            out[names.get(f"{code:g}", f"{code:g}")] = total / known.sum(1)
    return pd.DataFrame(out)


def market_regime(returns: np.ndarray) -> np.ndarray:
    """Name the state of the market on each day, from days up to it.

    Parameters
    ----------
    returns : ndarray [t]
        Daily return of the market, NaN unknown.

    Returns
    -------
    object ndarray [t]
        "rising" or "falling" (sum of 20 days), with "calm" or "turbulent" (their
        standard deviation below or above its median of 250 days).
    """
    series = pd.Series(returns)
    trend = series.rolling(20, min_periods=5).sum()
    spread = series.rolling(20, min_periods=5).std()
    usual = spread.rolling(250, min_periods=20).median()
    state = np.where(trend >= 0, "rising", "falling").astype(object)
    out = state + np.where(spread > usual, ", turbulent", ", calm")
    out[~np.isfinite(usual.to_numpy())] = "unknown"
    return out


def expert_figures(
    weights: torch.Tensor,
    scores: torch.Tensor,
    fused: torch.Tensor,
    label: torch.Tensor,
    names: list[str],
    regime: np.ndarray,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Load, entropy and RankIC of the experts.

    Parameters
    ----------
    weights, scores : Tensor [c, n, e]
        NaN where a stock is absent.
    fused, label : Tensor [c, n]
    names : list of str [e]
    regime : ndarray [c]

    Returns
    -------
    daily : DataFrame [c]
        `load/<expert>`: mean weight; `entropy`: mean entropy of a stock's weights, 1
        when all are equal; `rank_ic/<expert>` and `rank_ic/fused`.
    by_regime : DataFrame
        Rows market states and `all`; mean RankIC of each expert and of the fusion, and
        the number of days.
    """
    table: dict[str, np.ndarray] = {}
    for i, name in enumerate(names):
        table[f"load/{name}"] = weights[..., i].nanmean(1).numpy()
        table[f"rank_ic/{name}"] = rank_ic(scores[..., i], label).numpy()
    entropy = -(weights * torch.log(weights.clamp_min(1e-12))).sum(-1)
    scale = np.log(len(names)) if len(names) > 1 else 1.0
    table["entropy"] = (entropy.nanmean(1) / scale).numpy()
    table["rank_ic/fused"] = rank_ic(fused, label).numpy()
    daily = pd.DataFrame(table)
    found = part_of(daily, "rank_ic")
    grouped = found.groupby(regime).mean()
    grouped.loc["all"] = found.mean()
    grouped.insert(0, "days", pd.Series(regime).value_counts())
    grouped.loc["all", "days"] = len(found)
    return daily, grouped.rename_axis("market")


def part_of(frame: pd.DataFrame, group: str) -> pd.DataFrame:
    """Columns `<group>/<name>` under their bare names."""
    part = frame.filter(regex=f"^{group}/")
    return part.set_axis([str(c).split("/", 1)[1] for c in part], axis=1)


def expert_warnings(load: pd.Series) -> list[str]:
    """Say whether the gate has collapsed.

    Parameters
    ----------
    load : Series
        Mean weight by expert.
    """
    out, even = [], 1 / len(load)
    if len(load) > 1 and load.max() > 1 - 0.1 * (len(load) - 1) / len(load):
        out.append(
            f"The gate has collapsed: {load.idxmax()} carries {load.max():.0%} of the "
            "weight. Raise `router_aux_loss_coef`."
        )
    for name, value in load.items():
        if value < 0.1 * even:
            out.append(f"Expert {name} is hardly used: {value:.1%} of the weight.")
    return out


def mamba_page(
    title: str,
    exposure: pd.DataFrame,
    daily: pd.DataFrame,
    industries: pd.DataFrame | None = None,
    experts: pd.DataFrame | None = None,
    by_regime: pd.DataFrame | None = None,
    beside: Beside | None = None,
) -> Page:
    """Lay out the report.

    Parameters
    ----------
    title : str
    exposure, daily, industries, experts : DataFrame
        Rows datetime; see the functions above.
    by_regime : DataFrame
    beside : Beside, optional
        Another run, for comparison.
    """
    page = Page(title, "Exposure to risk, the learnt risk factor and the experts.")
    mean = daily.mean()
    page.tile("RankIC", mean["rank_ic"])
    page.tile("RankIC without risk", mean["neutral_rank_ic"])
    page.tile("explained by linear risk", mean["explained"], "p1")
    if "risk_rank_ic" in daily:
        page.tile("RankIC of the risk factor", mean["risk_rank_ic"])
    page.section(
        "Exposure of the score",
        "Correlation of the score with each risk factor over the day's stocks; "
        "`learnt` is the model's own factor.",
    )
    table = _exposure_table(exposure, "")
    size = _mean_size(exposure, "this run")
    if beside is not None:
        table = table.join(_exposure_table(beside.exposure, f", {beside.name}"))
        size = size.join(_mean_size(beside.exposure, beside.name), how="left")
    page.table("Mean and mean size", table, default_style="n3")
    page.plot(
        "Mean size over time",
        plots.lines(_smooth(size), "size of correlation"),
        "Over the linear factors, mean of 20 days.",
    )
    page.plot(
        "Over time", plots.lines(_smooth(exposure), "correlation"), "Mean of 20 days."
    )
    if beside is not None:
        page.plot(
            f"Over time, {beside.name}",
            plots.lines(_smooth(beside.exposure), "correlation"),
            "Mean of 20 days.",
        )
    if industries is not None:
        note = "Mean standardised score of the industry's stocks, by month."
        page.plot("Industries", _by_month(industries), note)
        if beside is not None and beside.industries is not None:
            page.plot(f"Industries, {beside.name}", _by_month(beside.industries), note)
    page.plot(
        "What linear risk explains",
        plots.lines(_smooth(daily[["explained"]]), "share of variance", percent=True),
        "R² of the day's score on industries and styles, mean of 20 days.",
    )
    if experts is None or by_regime is None:
        return page
    for text in expert_warnings(part_of(experts, "load").mean()):
        page.warn(text)
    page.section("Experts")
    styles = {str(name): (str(name), "p2") for name in by_regime} | {
        "days": ("days", "i")
    }
    title = "RankIC by expert and market state"
    page.table(title, by_regime, wide=True, styles=styles)
    load = _smooth(part_of(experts, "load"))
    page.plot(
        "Load", plots.lines(load, "mean weight", percent=True), "Mean of 20 days."
    )
    page.plot(
        "Entropy of the gate",
        plots.lines(experts[["entropy"]], "entropy over its largest value"),
        "1 is equal weights.",
    )
    return page


def _smooth(daily: pd.DataFrame) -> pd.DataFrame:
    return daily.rolling(20, min_periods=1).mean()


def _mean_size(exposure: pd.DataFrame, name: str) -> pd.DataFrame:
    linear = exposure.drop(columns="learnt", errors="ignore")
    return linear.abs().mean(axis=1).to_frame(name)


def _by_month(industries: pd.DataFrame) -> go.Figure:
    months = pd.DatetimeIndex(industries.index).strftime("%Y-%m")
    return plots.heatmap(industries.groupby(months).mean().T, show_values=False)


def _exposure_table(exposure: pd.DataFrame, suffix: str) -> pd.DataFrame:
    return pd.DataFrame(
        {f"mean{suffix}": exposure.mean(), f"mean size{suffix}": exposure.abs().mean()}
    )
