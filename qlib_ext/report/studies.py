"""Frames beyond the score's own figures: pools, trading, other factors, exposures.

Figures every h days are means over the h possible first days, as in `tables`.

Glossary: t scored days, n instruments, k factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data_handlers.cross_section import neutralize
from qlib_ext import metrics
from qlib_ext.report.record import flat
from qlib_ext.report.tables import (
    MIN_PAIRS,
    Evaluation,
    correlation_frame,
    fitting_layers,
    non_overlapping_starts,
    performance_table,
    period_returns,
    starts_of,
    yearly_means,
)

__all__ = [
    "add_exposures",
    "add_factor_relations",
    "add_monthly_tenths",
    "add_pools",
    "add_tradability",
]

# One-way costs as a fraction of the amount (docs/enhancement.md).
BUY_COST = 0.001
SELL_COST = 0.002
# As the reports do: an index pool has 5 groups.
POOL_LAYERS = 5
# Top and bottom 10 % of the monthly layers.
TENTHS = 10


def add_pools(
    result: Evaluation,
    score: Tensor,
    label: Tensor,
    close: Tensor,
    days: pd.DatetimeIndex,
    pools: Mapping[str, Tensor],
    n_layers: int,
) -> None:
    """Add frames ``pools`` and ``pools_by_year``: the score within each market.

    Scores are ranked within the pool. A pool with fewer than `MIN_PAIRS` scored
    members on every day is left out.

    Parameters
    ----------
    pools : mapping of str to bool Tensor [t, n]
        Point-in-time membership.
    n_layers : int
        Wished layers of the whole universe; pools have 5.
    """
    h = result.context.horizon
    everything = torch.ones_like(score, dtype=torch.bool)
    # The dates of the whole universe, so that pools can be compared.
    starts = starts_of(result)
    rows: list[dict[str, Any]] = []
    years = {}
    for name, mask in {result.context.universe: everything, **pools}.items():
        part = torch.where(mask, score, torch.nan)
        daily = metrics.rank_ic(part, label, MIN_PAIRS)
        if not torch.isfinite(daily).any():
            continue
        total, _ = metrics.over_starts(daily, starts)
        every = metrics.summarise(daily)
        wished = n_layers if mask is everything else min(n_layers, POOL_LAYERS)
        groups = fitting_layers(part, wished)
        test = metrics.layer_backtest(part, close, metrics.week_ends(days), groups)
        top = metrics.performance(test.returns[:, groups - 1] - test.returns[:, -1])
        low = metrics.performance(test.returns[:, 0] - test.returns[:, -1])
        rows.append(
            {
                "pool_name": name,
                "stocks": float(torch.isfinite(part).sum(1).double().mean()),
                "dates": total.count,
                "rank_ic": total.mean,
                "ic_ir": total.ir,
                "positive": total.positive,
                "daily_rank_ic": every.mean,
                "hac_error": metrics.newey_west_se(daily, h - 1),
                "groups": groups,
                "hedged_top": top.annual_return,
                "hedged_top_sharpe": top.sharpe,
                "hedged_top_drawdown": top.max_drawdown,
                "hedged_bottom": low.annual_return,
                "turnover": float(test.turnover[:, groups - 1].nanmean()),
            }
        )
        years[name] = pd.Series(yearly_means(daily, days, starts))
        if mask is not everything:
            result.figures[f"Rank IC {h}d {name}"] = total.mean
            result.figures[f"Rank ICIR {h}d {name}"] = total.ir
            result.figures[f"Top hedged annual return {name}"] = top.annual_return
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["pool_name"])
    result.frames["pools"] = table.set_index("pool_name")
    by_year = pd.DataFrame(years)
    by_year.index = by_year.index.astype(str).rename("period")
    result.frames["pools_by_year"] = by_year


def add_monthly_tenths(
    result: Evaluation,
    score: Tensor,
    close: Tensor,
    days: pd.DatetimeIndex,
    pools: Mapping[str, Tensor],
    industry: Tensor | None,
) -> None:
    """Add ``monthly`` and ``monthly_returns``: top and bottom 10 % within each pool.

    Scores of the month's last day fill at the next close; equal weight, no costs. In
    each pool the score is first taken net of the pool's industry means.

    Parameters
    ----------
    pools : mapping of str to bool Tensor [t, n]
        Point-in-time membership.
    industry : Tensor [t, n], optional
        Industry codes; without them the score stands as it is.
    """
    ends = metrics.month_ends(days)
    everything = torch.ones_like(score, dtype=torch.bool)
    rows: list[dict[str, Any]] = []
    series = {}
    for name, mask in {result.context.universe: everything, **pools}.items():
        inside = torch.where(mask[ends], score[ends].double(), torch.nan)
        part = residual(inside, [], None if industry is None else industry[ends])
        if not torch.isfinite(part).any():
            continue
        groups, top, low, pool = tenths(part, close, ends)
        shown = {"hedged_top": top - pool, "hedged_bottom": low - pool}
        shown["top_minus_bottom"] = shown["hedged_top"] - shown["hedged_bottom"]
        frame = pd.DataFrame({k: v.numpy() for k, v in shown.items()}, days)
        series[name] = frame
        periods = period_returns(frame)
        table: Any = performance_table(frame).to_dict("index")
        for portfolio in shown:
            rows.append(
                {
                    "portfolio": f"{name}: {portfolio.replace('_', ' ')}",
                    "groups": groups,
                    **{
                        period: periods.at[period, portfolio]
                        for period in metrics.latest_periods(days)
                    },
                    "annual_return": table[portfolio]["annual_return"],
                    "sharpe": table[portfolio]["sharpe"],
                    "max_drawdown": table[portfolio]["max_drawdown"],
                }
            )
    if not rows:
        return
    result.frames["monthly"] = pd.DataFrame(rows).set_index("portfolio")
    joined = pd.concat(series, axis=1).rename_axis("datetime")
    result.frames["monthly_returns"] = flat(joined)


def tenths(
    picked: Tensor, close: Tensor, ends: Tensor
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Hold the top and bottom tenth of what has a value, at equal weight.

    Parameters
    ----------
    picked : Tensor [w, n]
        Scores of the signal days; NaN is not in the pool.
    close : Tensor [t, n]
    ends : Tensor [w]
        Positions of the signal days; orders fill at the next close, without costs.

    Returns
    -------
    groups : int
        10, or fewer where a tenth would be under 5 stocks.
    top, bottom, pool : Tensor [t]
        Daily returns.
    """
    chosen = torch.full(close.shape, torch.nan, dtype=torch.float64)
    chosen[ends] = picked.double()
    groups = fitting_layers(picked, TENTHS)
    held = metrics.layer_backtest(chosen, close, ends, groups).returns
    return groups, held[:, groups - 1], held[:, 0], held[:, -1]


def add_tradability(
    result: Evaluation,
    score: Tensor,
    close: Tensor,
    days: pd.DatetimeIndex,
    n_layers: int,
    limits: tuple[Tensor, Tensor] | None,
) -> None:
    """Add ``tradability``: the top layer idealised, with price limits, with costs.

    The idealised case and the pool that hedges, which pays no costs and stands for an
    index future, are those of the ``layers`` that `tables.evaluate` has made.

    Parameters
    ----------
    limits : tuple of bool Tensor [t, n], optional
        Whether each stock can be bought and sold; None if the store does not say.
    """
    groups, ends = fitting_layers(score, n_layers), metrics.week_ends(days)
    layers = result.frames["layers"].to_dict("index")
    pool = torch.tensor(result.frames["layer_returns"]["pool"].to_numpy())
    rows = [
        _top_row(
            "idealised, suspensions only",
            layers[f"layer_{groups:02d}"],
            layers["hedged_top"],
        )
    ]
    cases: dict[str, dict] = {}
    barred = {}
    if limits is not None:
        barred = {"buyable": limits[0], "sellable": limits[1]}
        cases["price limits"] = barred
    costs = {"buy_cost": BUY_COST, "sell_cost": SELL_COST}
    cases["costs"] = costs
    if limits is not None:
        cases["price limits and costs"] = {**barred, **costs}
    for name, kwargs in cases.items():
        test = metrics.layer_backtest(score, close, ends, groups, **kwargs)
        returns = pd.DataFrame(
            {
                "top": test.returns[:, groups - 1].numpy(),
                "hedged": (test.returns[:, groups - 1] - pool).numpy(),
            },
            days,
        )
        table = performance_table(returns).to_dict("index")
        top = {
            **table["top"],
            "turnover": float(test.turnover[:, groups - 1].nanmean()),
            "blocked": float(test.blocked[:, groups - 1].mean()),
        }
        rows.append(_top_row(name, top, table["hedged"]))
    result.frames["tradability"] = pd.DataFrame(rows).set_index("case")
    result.figures["Top hedged annual return after costs"] = rows[-1]["hedged_top"]
    result.figures["Top hedged Sharpe after costs"] = rows[-1]["hedged_top_sharpe"]


def _top_row(case: str, top: Mapping, hedged: Mapping) -> dict[str, Any]:
    return {
        "case": case,
        "annual_return": top["annual_return"],
        "hedged_top": hedged["annual_return"],
        "hedged_top_sharpe": hedged["sharpe"],
        "hedged_top_drawdown": hedged["max_drawdown"],
        "turnover": top["turnover"],
        "blocked": top["blocked"],
    }


def add_factor_relations(
    result: Evaluation, score: Tensor, label: Tensor, factors: Mapping[str, Tensor]
) -> None:
    """Add ``factor_correlation`` and ``incremental``: the score beside known factors.

    Incremental RankIC: each day the score's ranks are regressed on the factors' ranks
    and the residual is correlated with the label. A factor's missing values take a
    dummy of their own, so the residual covers the same stocks as the score.

    Parameters
    ----------
    score, label : Tensor [t, n]
    factors : mapping of str to Tensor [t, n]
    """
    if not factors:
        return
    names = list(factors)
    starts = starts_of(result)

    def stacked(at: Tensor) -> Tensor:
        return torch.stack([x[at].double() for x in (score, *factors.values())])

    result.frames["factor_correlation"] = correlation_frame(
        stacked(starts[0] if starts else torch.arange(0)), ["score", *names], "factor"
    )
    cases: dict[str, list[str]] = {"alone": []}
    cases |= {f"over {x}": [x] for x in names}
    cases["over all of them"] = names
    daily = {case: score.new_full((len(score),), torch.nan).double() for case in cases}
    for at in starts:
        ranks = centred_ranks(stacked(at))
        for case, used in cases.items():
            chosen = [ranks[1 + names.index(x)] for x in used]
            rest = residual(ranks[0], chosen)
            daily[case][at] = metrics.rank_ic(rest, label[at], MIN_PAIRS).double()
    rows = []
    for case, used in cases.items():
        part, _ = metrics.over_starts(daily[case], starts)
        own = metrics.Summary(0, np.nan, np.nan, np.nan, np.nan)
        if len(used) == 1:
            alone = metrics.rank_ic(factors[used[0]], label, MIN_PAIRS)
            own, _ = metrics.over_starts(alone, starts)
        rows.append(
            {"score": case, **part.row(), "own_rank_ic": own.mean, "own_ic_ir": own.ir}
        )
    result.frames["incremental"] = pd.DataFrame(rows).set_index("score")
    h = result.context.horizon
    result.figures[f"Incremental Rank IC {h}d"] = part.mean


def add_exposures(
    result: Evaluation,
    score: Tensor,
    label: Tensor,
    industry: Tensor | None,
    styles: Mapping[str, Tensor],
    industry_names: Mapping[str, str],
    n_layers: int,
) -> None:
    """Add ``style_exposure``, ``industry_exposure`` and ``neutral``.

    Style exposure of a layer is the mean over its stocks less the mean over the pool,
    averaged over dates, in the style's own unit; correlation is the mean Spearman one.
    Industry exposure is the share of the layer's stocks in the industry less the
    pool's. ``neutral`` is RankIC of the score's residual on industries and styles.

    Parameters
    ----------
    score, label : Tensor [t, n]
    industry : Tensor [t, n], optional
        Industry codes.
    styles : mapping of str to Tensor [t, n]
    industry_names : mapping of str to str
        Code to name; codes without one are shown as they are.
    n_layers : int
    """
    groups = fitting_layers(score, n_layers)
    layers = metrics.assign_layers(score, groups)
    pool, top, low = layers >= 0, layers == groups - 1, layers == 0
    if styles:
        rows = []
        for name, style in styles.items():
            base = _masked_mean(style, pool)
            rows.append(
                {
                    "style": name,
                    "correlation": metrics.summarise(
                        metrics.rank_ic(score, style, MIN_PAIRS)
                    ).mean,
                    "top": float((_masked_mean(style, top) - base).nanmean()),
                    "bottom": float((_masked_mean(style, low) - base).nanmean()),
                }
            )
        result.frames["style_exposure"] = pd.DataFrame(rows).set_index("style")
    if industry is not None:
        result.frames["industry_exposure"] = _industry_table(
            industry, pool, top, low, industry_names
        )
    cases: dict[str, tuple[bool, list[str]]] = {"score": (False, [])}
    if industry is not None:
        cases["less industries"] = (True, [])
        if "log_mcap" in styles:
            cases["less industries and log market cap"] = (True, ["log_mcap"])
    if styles:
        what = "less industries and all styles" if industry is not None else ""
        cases[what or "less all styles"] = (industry is not None, list(styles))
    own = metrics.rank_ic(score, label, MIN_PAIRS)
    starts = non_overlapping_starts(own, result.context.horizon)
    ranks = centred_ranks(score.double())
    rows = []
    for case, (with_industry, used) in cases.items():
        daily = torch.full((len(score),), torch.nan, dtype=torch.float64)
        for at in starts:
            rest = residual(
                ranks[at],
                [styles[x][at].double() for x in used],
                None if industry is None or not with_industry else industry[at],
            )
            daily[at] = metrics.rank_ic(rest, label[at], MIN_PAIRS).double()
        part, _ = metrics.over_starts(daily, starts)
        rows.append({"score": case, **part.row()})
    result.frames["neutral"] = pd.DataFrame(rows).set_index("score")
    if len(rows) > 1:
        h = result.context.horizon
        result.figures[f"Neutral Rank IC {h}d"] = part.mean


def residual(
    y: Tensor, factors: list[Tensor], industry: Tensor | None = None
) -> Tensor:
    """Residual ``[m, n]`` of a daily least squares on factors and industry dummies.

    Unknown factor values and industries get dummies of their own.
    """
    if not factors and industry is None:
        return y
    out = neutralize(
        y.double().unsqueeze(-1).numpy(),
        None if industry is None else industry.double().numpy(),
        torch.stack(factors, -1).numpy() if factors else None,
        missing="unknown",
    )
    return torch.from_numpy(out[..., 0])


def centred_ranks(x: Tensor) -> Tensor:
    """Ranks as fractions between -0.5 and 0.5, so that days of any size compare."""
    ranks = metrics.cs_rank(x)
    count = torch.isfinite(ranks).sum(-1, keepdim=True).clamp(min=1)
    return (ranks - 0.5) / count - 0.5


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x.double(), torch.nan).nanmean(-1)


def _industry_table(
    industry: Tensor, pool: Tensor, top: Tensor, low: Tensor, names: Mapping[str, str]
) -> pd.DataFrame:
    codes = sorted({float(x) for x in industry[torch.isfinite(industry) & pool]})
    masks: list[tuple[str, Tensor]] = []
    for code in codes:
        key = f"{code:g}"
        masks.append((names.get(key, f"industry {key}"), industry == code))
    unknown = ~torch.isfinite(industry)
    if bool((unknown & pool).any()):
        masks.append(("unknown", unknown))
    rows = []
    for name, member in masks:
        shares = [_share(member, group) for group in (pool, top, low)]
        rows.append(
            {
                "industry": name,
                "pool_share": shares[0],
                "top": shares[1] - shares[0],
                "bottom": shares[2] - shares[0],
            }
        )
    table = pd.DataFrame(rows, columns=["industry", "pool_share", "top", "bottom"])
    return table.set_index("industry").sort_values("top", ascending=False)


def _share(member: Tensor, group: Tensor) -> float:
    """Mean over days of the share of a group's stocks that are members."""
    size = group.sum(-1).double()
    share = (member & group).sum(-1) / torch.where(size > 0, size, torch.nan)
    return float(share.nanmean())
