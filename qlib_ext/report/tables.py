"""Frames of figures: aligns scores, labels and prices, and asks `qlib_ext.metrics`.

Glossary: t trading days, n instruments, k factors, h label horizon in days.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data_handlers.panel import scatter
from qlib_ext import metrics

__all__ = [
    "Context",
    "Evaluation",
    "evaluate",
    "fitting_layers",
    "panel_of",
    "performance_of",
    "performance_table",
    "period_returns",
    "unit_table",
]

DECAY_LAGS = (0, 5, 10, 15, 20)
# Fewest pairs for a day's correlation to be reported: below that it is mostly noise
# and a single day could swing a year's mean.
MIN_PAIRS = 10
# Units up to which their correlations are shown one by one, beside the score.
FEW_UNITS = 16
# Stocks a layer needs on a median day; fewer groups are used below that.
MIN_LAYER_SIZE = 5


@dataclass(frozen=True)
class Context:
    """What every figure of a report refers to; printed once, at its head.

    Attributes
    ----------
    universe, label : str
        In words.
    start, end : str
        First and last scored day.
    horizon : int
        Trading days from entry to exit of the label.
    days : int
        Scored days.
    stocks : float
        Mean number of scored stocks a day.
    """

    universe: str
    label: str
    start: str
    end: str
    horizon: int
    days: int
    stocks: float


@dataclass
class Evaluation:
    """Everything a report prints, as frames; also what the recorder keeps.

    Attributes
    ----------
    context : Context
    figures : dict of str to float
        Headline figures by the names they are logged under.
    frames : dict of str to DataFrame
        Tables and series; each becomes a Parquet artifact of that name.
    warnings : list of str
        What stands at the top of the page.
    """

    context: Context
    figures: dict[str, float] = field(default_factory=dict)
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- alignment


def panel_of(
    series: pd.Series, days: pd.DatetimeIndex, instruments: pd.Index
) -> Tensor:
    """Scatter a Qlib series (datetime, instrument) into a panel.

    Parameters
    ----------
    series : Series
        Levels named ``datetime`` and ``instrument`` in any order. Rows outside the
        given days and instruments are left out.
    days, instruments : Index
        Rows and columns of the panel.

    Returns
    -------
    Tensor [t, n]
        float32 or float64 as in `series`; NaN where it has no row.

    Raises
    ------
    ValueError
        If the index lacks a level, holds a pair twice, or the values are not numbers.
    """
    values = series.dtype if series.dtype == np.float32 else np.float64
    name = str(series.name)
    return torch.from_numpy(scatter(series, days, instruments, values, name))


def fitting_layers(score: Tensor, n_layers: int) -> int:
    """Largest of `n_layers`, 10, 5, 3, 2 that leaves 5 stocks a group on most days.

    The reports use 20 groups for the whole market and 5 for an index; a smaller
    pool than that would put one or two stocks into a group.
    """
    count = torch.isfinite(score).sum(1)
    count = count[count > 0]
    median = float(count.double().median()) if len(count) else 0.0
    for groups in (n_layers, 10, 5, 3):
        if groups <= n_layers and median >= groups * MIN_LAYER_SIZE:
            return groups
    return min(2, n_layers)


# ---------------------------------------------------------------- tables


def evaluate(
    score: Tensor,
    label: Tensor,
    days: pd.DatetimeIndex,
    context: Context,
    *,
    close: Tensor | None = None,
    n_layers: int = 20,
    oracle: Tensor | None = None,
    lags: Sequence[int] = DECAY_LAGS,
    carried: Tensor | None = None,
) -> Evaluation:
    """Compute the reports' figures for one score.

    Parameters
    ----------
    score, label : Tensor [t, n]
        Score, and raw forward return (arithmetic). Rows are consecutive trading days.
    days : DatetimeIndex [t]
    context : Context
    close : Tensor [t, n], optional
        Adjusted close, NaN where suspended. None: no layers.
    n_layers : int, default 20
        Wished number of layers, see `fitting_layers`.
    oracle : Tensor [t, n], optional
        True expected return, evaluated beside the score.
    lags : sequence of int
        Delays of the decay table, in days.
    carried : bool Tensor [t, n], optional
        Labels that end at an earlier trade than that of the exit day; RankIC is then
        given without them too.

    Returns
    -------
    Evaluation
        Frames ``rank_ic`` (daily series), ``rank_ic_by_year``, ``decay`` and, with
        prices, ``layer_returns``, ``layer_values``, ``layers``, ``hedged_by_year``,
        ``turnover``, ``periods``.
    """
    result = Evaluation(context)
    known = torch.isfinite(score)
    high = torch.where(known, score, -torch.inf).amax(1)
    low = torch.where(known, score, torch.inf).amin(1)
    constant = (high == low) & (known.sum(1) > 1)
    if constant.any():
        result.figures["Constant score days"] = float(constant.sum())
    _rank_ic_tables(result, score, label, days, oracle)
    if carried is not None:
        _strict_figures(result, score, label, carried)
    _decay_table(result, score, label, days, tuple(lags))
    if close is not None:
        _layer_tables(result, score, close, days, n_layers)
    return result


def _rank_ic_tables(
    result: Evaluation,
    score: Tensor,
    label: Tensor,
    days: pd.DatetimeIndex,
    oracle: Tensor | None,
) -> None:
    h = result.context.horizon
    figures = result.figures
    daily = {
        "rank_ic": metrics.rank_ic(score, label, MIN_PAIRS),
        "ic": metrics.ic(score, label, MIN_PAIRS),
        "closeness": metrics.rank_mae(score, label, MIN_PAIRS),
    }
    if oracle is not None:
        # On the score's own stocks, so that the two columns can be compared.
        oracle = torch.where(torch.isfinite(score), oracle, torch.nan)
        daily["oracle_rank_ic"] = metrics.rank_ic(oracle, label, MIN_PAIRS)
    frame = pd.DataFrame({k: v.numpy() for k, v in daily.items()}, index=days)
    picked = metrics.non_overlapping(daily["rank_ic"], h)
    frame["sampled"] = False
    frame.iloc[picked.numpy(), -1] = True
    frame["pairs"] = (torch.isfinite(score) & torch.isfinite(label)).sum(1).numpy()
    frame.index.name = "datetime"
    result.frames["rank_ic"] = frame

    starts = non_overlapping_starts(daily["rank_ic"], h)
    total, each_start = metrics.over_starts(daily["rank_ic"], starts)
    figures[f"Rank IC {h}d"] = total.mean
    figures[f"Rank ICIR {h}d"] = total.ir
    figures[f"Rank IC positive {h}d"] = total.positive
    figures[f"Rank IC dates {h}d"] = float(total.count)
    figures[f"IC {h}d"] = metrics.over_starts(daily["ic"], starts)[0].mean
    # The first date is arbitrary: show what single starting days would give.
    for name, key in (("Rank IC", "mean"), ("Rank ICIR", "ir")):
        finite = [x for x in (getattr(s, key) for s in each_start) if np.isfinite(x)]
        if finite:
            figures[f"{name} {h}d lowest start"] = min(finite)
            figures[f"{name} {h}d highest start"] = max(finite)
    closeness = daily["closeness"]
    figures["Rank closeness daily"] = metrics.summarise(closeness).mean
    every = metrics.summarise(daily["rank_ic"])
    error = metrics.newey_west_se(daily["rank_ic"], h - 1)
    figures["Rank IC daily"] = every.mean
    figures["Rank IC daily HAC error"] = error
    figures["Rank IC daily HAC t"] = every.mean / error if error > 0 else np.nan
    if oracle is not None:
        figures[f"Oracle Rank IC {h}d"] = metrics.over_starts(
            daily["oracle_rank_ic"], starts
        )[0].mean

    rows = []
    years = torch.from_numpy(days.year.to_numpy().copy())
    for year in [*dict.fromkeys(days.year), "total"]:
        here = torch.ones(len(days), dtype=torch.bool)
        if year != "total":
            here &= years.eq(int(str(year)))
        within = [at[here[at]] for at in starts]
        part, apart = metrics.over_starts(daily["rank_ic"], within)
        each = daily["rank_ic"][here]
        row = {
            "period": str(year),
            "dates": part.count,
            "rank_ic": part.mean,
            "lowest": min((x.mean for x in apart), default=np.nan),
            "highest": max((x.mean for x in apart), default=np.nan),
            "std": part.std,
            "ic_ir": part.ir,
            "positive": part.positive,
            "daily_rank_ic": metrics.summarise(each).mean,
            "hac_error": metrics.newey_west_se(each, h - 1),
            "closeness": metrics.summarise(closeness[here]).mean,
        }
        if oracle is not None:
            row["oracle_rank_ic"] = metrics.over_starts(
                daily["oracle_rank_ic"], within
            )[0].mean
        rows.append(row)
        if year != "total" and part.count:
            figures[f"Rank IC {h}d {year}"] = part.mean
    result.frames["rank_ic_by_year"] = pd.DataFrame(rows).set_index("period")


def _strict_figures(
    result: Evaluation, score: Tensor, label: Tensor, carried: Tensor
) -> None:
    """Share of labels carried to the exit day, and RankIC without them."""
    pairs = torch.isfinite(score) & torch.isfinite(label)
    strict = metrics.rank_ic(
        score, torch.where(carried, torch.nan, label.double()), MIN_PAIRS
    )
    part, _ = metrics.over_starts(strict, starts_of(result))
    h = result.context.horizon
    result.figures |= {
        "Labels carried": float((pairs & carried).sum() / pairs.sum().clamp(min=1)),
        f"Rank IC {h}d without carried labels": part.mean,
    }


def non_overlapping_starts(daily: Tensor, horizon: int) -> list[Tensor]:
    """Non-overlapping days from each of the first `horizon` days that have some."""
    every = [metrics.non_overlapping(daily, horizon, k) for k in range(horizon)]
    return [at for at in every if len(at)]


def starts_of(result: Evaluation) -> list[Tensor]:
    """`non_overlapping_starts` of the score's own daily RankIC."""
    daily = torch.tensor(result.frames["rank_ic"]["rank_ic"].to_numpy())
    return non_overlapping_starts(daily, result.context.horizon)


def _decay_table(
    result: Evaluation,
    score: Tensor,
    label: Tensor,
    days: pd.DatetimeIndex,
    lags: tuple[int, ...],
) -> None:
    h = result.context.horizon
    series = metrics.lagged_rank_ic(score, label, lags, MIN_PAIRS)
    starts = starts_of(result)
    rows = []
    for lag, values in zip(lags, series, strict=True):
        part, _ = metrics.over_starts(values, starts)
        rows.append(
            {"lag": lag, "rank_ic": part.mean, "ic_ir": part.ir, "dates": part.count}
        )
        if lag:
            result.figures[f"Rank IC {h}d lag {lag}"] = part.mean
    result.frames["decay"] = pd.DataFrame(rows).set_index("lag")


def _layer_tables(
    result: Evaluation,
    score: Tensor,
    close: Tensor,
    days: pd.DatetimeIndex,
    n_layers: int,
) -> None:
    groups = fitting_layers(score, n_layers)
    test = metrics.layer_backtest(score, close, metrics.week_ends(days), groups)
    pool = test.returns[:, -1]
    columns = [*(f"layer_{g + 1:02d}" for g in range(groups)), "pool"]
    returns = pd.DataFrame(test.returns.numpy(), days, columns)
    returns["hedged_top"] = (test.returns[:, groups - 1] - pool).numpy()
    returns["hedged_bottom"] = (test.returns[:, 0] - pool).numpy()
    returns["top_minus_bottom"] = returns["hedged_top"] - returns["hedged_bottom"]
    returns.index.name = "datetime"
    result.frames["layer_returns"] = returns
    result.frames["layer_values"] = net_values(returns)

    table = performance_table(returns)
    turnover = pd.DataFrame(
        test.turnover.numpy(), days[test.fills.numpy()], columns
    ).rename_axis("datetime")
    table["turnover"] = turnover.mean()
    table["blocked"] = pd.Series(test.blocked.numpy().mean(0), columns)
    result.frames["layers"] = table
    result.frames["turnover"] = turnover

    by_year = {
        str(year): performance_table(part) for year, part in returns.groupby(days.year)
    }
    result.frames["hedged_by_year"] = pd.DataFrame(
        {
            "period": list(by_year),
            "hedged_top": [
                t.at["hedged_top", "annual_return"] for t in by_year.values()
            ],
            "hedged_top_sharpe": [
                t.at["hedged_top", "sharpe"] for t in by_year.values()
            ],
            "hedged_bottom": [
                t.at["hedged_bottom", "annual_return"] for t in by_year.values()
            ],
            "pool": [t.at["pool", "annual_return"] for t in by_year.values()],
        }
    ).set_index("period")

    cell: dict = table.to_dict("index")
    top, pooled = cell["hedged_top"], cell["pool"]
    highest = cell[columns[groups - 1]]
    weekly = 1 + returns["hedged_top"].dropna()
    weekly = weekly.groupby(pd.DatetimeIndex(weekly.index).to_period("W")).prod() - 1
    columns_shown = ["hedged_top", "hedged_bottom", "top_minus_bottom", "pool"]
    periods = period_returns(returns[columns_shown])
    daily = result.frames["rank_ic"]
    for name, inside in periods_of(days).items():
        part = daily[inside]
        periods.loc[name, "daily_rank_ic"] = part["rank_ic"].mean()
        periods.loc[name, "closeness"] = part["closeness"].mean()
    result.frames["periods"] = periods
    layer_mean = torch.tensor(table["annual_mean"].to_numpy()[:groups])
    result.figures |= {
        "Layers": float(groups),
        "Top hedged annual return": top["annual_return"],
        "Top hedged annual mean": top["annual_mean"],
        "Top hedged Sharpe": top["sharpe"],
        "Top hedged max drawdown": top["max_drawdown"],
        "Top hedged weekly win rate": float((weekly > 0).mean()),
        "Bottom hedged annual return": cell["hedged_bottom"]["annual_return"],
        "Top annual return": highest["annual_return"],
        "Pool annual return": pooled["annual_return"],
        "Top weekly turnover": highest["turnover"],
        "Layer monotonicity": metrics.monotonicity(layer_mean),
    }


def net_values(returns: pd.DataFrame) -> pd.DataFrame:
    """Compounded curves; 1 on the day of the first fill, NaN before."""
    started = returns.notna()
    curve = (1 + returns.fillna(0.0)).cumprod()
    # The day before the first return is the day of the fill.
    shown = started | started.shift(-1, fill_value=False)
    return curve.where(shown)


def periods_of(days: pd.DatetimeIndex) -> dict[str, np.ndarray]:
    """Days of each period that reports tell of: `latest_periods`, then every year."""
    years = {str(year): np.asarray(days.year == year) for year in days.year.unique()}
    return {**metrics.latest_periods(days), **years}


def period_returns(returns: pd.DataFrame) -> pd.DataFrame:
    """Compound daily returns over each of `periods_of`; nothing is annualised.

    Parameters
    ----------
    returns : DataFrame [t]
        Daily arithmetic returns, one column a portfolio; NaN days are left out.

    Returns
    -------
    DataFrame
        Rows periods, columns ``days`` and the portfolios; NaN without a day.
    """
    rows = {}
    for name, inside in periods_of(pd.DatetimeIndex(returns.index)).items():
        part = returns[inside]
        total = (1 + part).prod(min_count=1) - 1
        rows[name] = {"days": len(part), **total.to_dict()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("period")


def performance_of(returns: pd.Series) -> metrics.Performance:
    """`metrics.performance` of a series of daily returns."""
    return metrics.performance(torch.from_numpy(returns.to_numpy(float, copy=True)))


def performance_table(returns: pd.DataFrame) -> pd.DataFrame:
    """`performance_of` each column of daily returns, one row a column."""
    rows = {name: asdict(performance_of(column)) for name, column in returns.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("portfolio")


def correlation_frame(stack: Tensor, names: list[str], axis: str = "") -> pd.DataFrame:
    """Mean daily correlations of factors, Spearman below the diagonal, else Pearson.

    Parameters
    ----------
    stack : Tensor [k, t, n]
    names : list of str [k]
    axis : str
        Name of the rows.
    """
    pearson, spearman = metrics.pair_correlations(stack)
    below = torch.ones_like(pearson).tril(-1).bool()
    shown = torch.where(below, spearman, pearson).numpy()
    return pd.DataFrame(shown, pd.Index(names, name=axis or None), names)


def yearly_means(
    daily: Tensor, days: pd.DatetimeIndex, starts: Sequence[Tensor]
) -> dict[int, float]:
    """Mean of a daily series by year, over each set of dates, mean over the sets."""
    years = torch.from_numpy(days.year.to_numpy().copy())
    return {
        year: metrics.over_starts(daily, [at[years[at] == year] for at in starts])[
            0
        ].mean
        for year in dict.fromkeys(days.year.tolist())
    }


def unit_table(
    units: Iterable[tuple[str, Tensor]],
    label: Tensor,
    score: Tensor | None = None,
    starts: Sequence[Tensor] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]:
    """Analyse k factor units.

    Parameters
    ----------
    units : iterable of (str, Tensor [t, n])
        Names and values, taken one after the other: k units on every day of a market
        would not fit into memory beside each other.
    label : Tensor [t, n]
        Raw forward return.
    score : Tensor [t, n], optional
        What the units make together; joins the correlations of a few units.
    starts : list of Tensor, optional
        `starts_of` the report. Default: every day, once.

    Returns
    -------
    table : DataFrame
        One row a unit: ``rank_ic``, ``ic_ir``, ``positive``, ``dates``.
    correlation : DataFrame
        Mean over the dates of the first start of the daily correlation between units.
        Up to `FEW_UNITS`
        Spearman below the diagonal and Pearson above, the score first; more of them
        Pearson alone.
    figures : dict of str to float
    """
    starts = starts or [torch.arange(len(label))]
    names, rows, kept = [], [], []
    for name, values in units:
        names.append(name)
        daily = metrics.rank_ic(values, label, MIN_PAIRS)
        rows.append(metrics.over_starts(daily, starts)[0].row())
        kept.append(values[starts[0]])
    stack = torch.stack(kept)
    table = pd.DataFrame(rows, index=pd.Index(names, name="unit"))
    mean, mean_abs = metrics.cs_correlation(stack)
    off = ~torch.eye(len(names), dtype=torch.bool)
    apart = mean_abs[off]
    known = apart[torch.isfinite(apart)]
    figures = {
        "Units": float(len(names)),
        "Unit mean Rank IC": float(table["rank_ic"].mean()),
        "Unit highest Rank IC": float(table["rank_ic"].max()),
        "Units with Rank IC above 5 percent": float((table["rank_ic"] > 0.05).sum()),
        "Unit mean abs correlation": float(known.mean()) if len(known) else np.nan,
    }
    if len(names) <= FEW_UNITS:
        if score is not None:
            names, stack = ["score", *names], torch.stack([score[starts[0]], *stack])
        return table, correlation_frame(stack, names), figures
    return table, pd.DataFrame(mean.numpy(), names, names), figures
