"""The factor report: one score, its layers, decay and units on one page."""

from __future__ import annotations

import pandas as pd

from qlib_ext.report import plots
from qlib_ext.report.page import Page, caption, format_value
from qlib_ext.report.studies import BUY_COST, SELL_COST
from qlib_ext.report.tables import FEW_UNITS, Context, Evaluation

__all__ = ["factor_page", "headline"]

_TILES: tuple[tuple[str, str, str], ...] = (
    ("Rank IC {h}d", "mean RankIC, every {h} days, all starts", "p2"),
    ("Rank IC {h}d lowest start", "lowest start", "p2"),
    ("Rank IC {h}d highest start", "highest start", "p2"),
    ("Rank ICIR {h}d", "IC_IR, not annualised", "n2"),
    ("Rank IC positive {h}d", "share of RankIC > 0", "p0"),
    ("Rank IC daily HAC t", "t of daily RankIC (HAC)", "n1"),
    ("Top hedged annual return", "top layer hedged, a year", "p1"),
    ("Top hedged Sharpe", "Sharpe of the hedged top", "n2"),
    ("Top hedged max drawdown", "its largest drawdown", "p1"),
    ("Top hedged weekly win rate", "weeks in which it gains", "p1"),
    ("Top weekly turnover", "top layer, weekly one-sided turnover", "p1"),
)
# What the terminal prints, in this order.
_HEADLINE: tuple[tuple[str, str], ...] = (
    ("Rank IC {h}d", "p2"),
    ("Rank IC {h}d lowest start", "p2"),
    ("Rank IC {h}d highest start", "p2"),
    ("Labels carried", "p2"),
    ("Rank IC {h}d without carried labels", "p2"),
    ("Oracle Rank IC {h}d", "p2"),
    ("Rank ICIR {h}d", "n2"),
    ("Rank ICIR {h}d lowest start", "n2"),
    ("Rank ICIR {h}d highest start", "n2"),
    ("Rank IC positive {h}d", "p1"),
    ("Rank IC dates {h}d", "i"),
    ("IC {h}d", "p2"),
    ("Rank IC daily", "p2"),
    ("Rank IC daily HAC error", "p2"),
    ("Rank IC daily HAC t", "n1"),
    ("Rank closeness daily", "n3"),
    ("Layers", "i"),
    ("Top hedged annual return", "p1"),
    ("Top hedged annual mean", "p1"),
    ("Top hedged Sharpe", "n2"),
    ("Top hedged max drawdown", "p1"),
    ("Top hedged weekly win rate", "p1"),
    ("Bottom hedged annual return", "p1"),
    ("Top annual return", "p1"),
    ("Pool annual return", "p1"),
    ("Top weekly turnover", "p1"),
    ("Layer monotonicity", "n2"),
    ("Top hedged annual return after costs", "p1"),
    ("Top hedged Sharpe after costs", "n2"),
    ("Incremental Rank IC {h}d", "p2"),
    ("Neutral Rank IC {h}d", "p2"),
    ("Units", "i"),
    ("Unit mean Rank IC", "p2"),
    ("Unit highest Rank IC", "p2"),
    ("Units with Rank IC above 5 percent", "i"),
    ("Unit mean abs correlation", "n2"),
)
PERIOD_STYLES = {
    "top_minus_bottom": ("top minus bottom", "p2"),
    "hedged_top": ("top hedged", "p2"),
    "hedged_bottom": ("bottom hedged", "p2"),
    "pool": ("pool", "p2"),
    "last week": ("last week", "p2"),
    "last month": ("last month", "p2"),
    "year to date": ("year to date", "p2"),
}
# For correlations between scores, which hardly depend on the first day.
SAMPLED = "every {h} trading days from the first (non-overlapping)"
STARTS = (
    "every {h} trading days (non-overlapping), mean over the {h} possible first days, "
    "not annualised"
)
LAYER_RULE = (
    "scores of the week's last day, filled at the next trading day's close, equal "
    "weight, no costs, suspended stocks held; x252 days a year"
)


def headline(horizon: int) -> list[tuple[str, str]]:
    """Names of the logged figures and how to print them, in reading order."""
    return [(name.format(h=horizon), style) for name, style in _HEADLINE]


def factor_page(evaluation: Evaluation, title: str) -> Page:
    """Lay out the factor report.

    Parameters
    ----------
    evaluation : Evaluation
        Sections whose frames are absent are left out.
    title : str
    """
    context = evaluation.context
    page = Page(title, _lead(context))
    for name, text, style in _TILES:
        value = evaluation.figures.get(name.format(h=context.horizon))
        if value is not None:
            page.tile(text.format(h=context.horizon), value, style)
    constant = int(evaluation.figures.get("Constant score days", 0))
    if constant:
        none = ", no RankIC" if constant == context.days else ""
        page.warn(f"Constant scores on {constant} of {context.days} days{none}.")
    page.tiles_note = (
        "Returns annualised x252, hedged against the pool's equal weight, no costs."
    )
    for text in evaluation.warnings:
        page.warn(text)
    _rank_ic_section(page, evaluation)
    if "layers" in evaluation.frames:
        _layer_section(page, evaluation)
        _period_section(page, evaluation)
        _trading_section(page, evaluation)
    if len(evaluation.frames.get("pools", ())) > 1:
        _pool_section(page, evaluation)
    if "factor_correlation" in evaluation.frames:
        _factor_section(page, evaluation)
    if "neutral" in evaluation.frames:
        _exposure_section(page, evaluation)
    if "units" in evaluation.frames:
        _unit_section(page, evaluation)
    if "part_table" in evaluation.frames:
        page.section(
            "Parts of the score",
            "What the network learnt, what is left of it net of industries and styles, "
            "and the styles weighed by what the training years paid: the score is the "
            "residual plus `tilt` times the style part.",
        )
        page.table("Parts", evaluation.frames["part_table"])
        page.table("Style weights", evaluation.frames["style_weights"])
    return page


def _lead(context: Context) -> str:
    return (
        f"{context.universe}, {context.start} to {context.end}: {context.days:,} "
        f"trading days, {context.stocks:,.0f} scored stocks a day. Label: "
        f"{context.label}, horizon {context.horizon} trading days."
    )


def _rank_ic_section(page: Page, evaluation: Evaluation) -> None:
    context, frames = evaluation.context, evaluation.frames
    page.section(
        "RankIC",
        "Spearman correlation, each day across the stocks, between the score and the "
        f"raw return that follows; {STARTS.format(h=context.horizon)}."
        + _carried(evaluation),
    )
    page.plot(
        "RankIC over time",
        plots.rank_ic_series(frames["rank_ic"]),
        f"Bars {SAMPLED.format(h=context.horizon)}.",
    )
    by_year = frames["rank_ic_by_year"]
    shown = ["rank_ic"] + [c for c in ("oracle_rank_ic",) if c in by_year]
    names = {"rank_ic": "score", "oracle_rank_ic": "oracle"}
    page.plot(
        "RankIC by year",
        plots.bars(by_year[shown].rename(columns=names), "mean RankIC"),
    )
    page.table(
        "By year and in total",
        by_year,
        caption(
            "IC_IR = mean / standard deviation",
            "lowest and highest: of a single first day",
            "closeness e^(-RankMAE) on every day, 0.315 without information",
            "daily RankIC on every day, with Newey-West errors over "
            f"{context.horizon - 1} lags",
        ),
        wide=True,
    )
    decay = frames["decay"]
    page.plot(
        "Decay",
        plots.bars(decay[["rank_ic"]], "mean RankIC", x_title="score delayed by days"),
    )
    page.table("RankIC by delay of the score", decay)


def _carried(evaluation: Evaluation) -> str:
    """Sentence on labels that end before the exit day, if any do."""
    share = evaluation.figures.get("Labels carried", 0.0)
    if not share:
        return ""
    name = f"Rank IC {evaluation.context.horizon}d"
    strict = evaluation.figures[f"{name} without carried labels"]
    return (
        f" {format_value(share, 'p2')} of the returns end at the last trade before the "
        "exit day, on which the stock was suspended or not listed any more; without "
        f"them the mean is {format_value(strict, 'p2')}."
    )


def _layer_section(page: Page, evaluation: Evaluation) -> None:
    frames = evaluation.frames
    layers = frames["layers"]
    count = sum(str(x).startswith("layer_") for x in layers.index)
    page.section(
        "Layers",
        f"Stocks in {count} groups each week by score; the highest scores are the last "
        "layer. Hedged means the layer's daily return minus that of the pool at equal "
        f"weight. Layers: {LAYER_RULE}.",
    )
    order = format_value(evaluation.figures["Layer monotonicity"], "n2")
    page.plot(
        "Return of each layer",
        plots.layer_bars(layers),
        f"Monotonicity {order} (Spearman correlation of layer and mean return; 1 is "
        "perfect order).",
    )
    values = frames["layer_values"]
    page.plot("Net value", plots.layer_curves(values))
    hedged = values[["hedged_top", "hedged_bottom"]].rename(
        columns={"hedged_top": "top hedged", "hedged_bottom": "bottom hedged"}
    )
    page.plot("Hedged net value", plots.lines(hedged, "net value"))
    page.plot(
        "Drawdown of the hedged top", plots.drawdown_curves(hedged[["top hedged"]])
    )
    ends = [f"layer_{count:02d}", "layer_01", "pool"]
    ends += ["hedged_top", "hedged_bottom", "top_minus_bottom"]
    page.table(
        "Top, bottom, pool",
        layers.loc[ends],
        caption(
            "annual return geometric, mean x 252 arithmetic, Sharpe = mean x 252 / "
            "volatility without a risk-free rate",
            "turnover one-sided",
            "blocked = weight that could not trade",
        ),
        wide=True,
    )
    page.table("Hedged, by year", frames["hedged_by_year"])
    page.table(
        "Every layer",
        layers.loc[
            [x for x in layers.index if str(x).startswith("layer_")],
            ["annual_return", "sharpe", "max_drawdown", "turnover"],
        ],
    )


def _period_section(page: Page, evaluation: Evaluation) -> None:
    frames = evaluation.frames
    page.section(
        "Periods",
        "The week, month and year that the last scored day lies in, up to that day, "
        "and every year. Returns compounded within the period, not annualised.",
    )
    page.table(
        "Weekly layers",
        frames["periods"],
        caption(
            "daily RankIC and e^(-RankMAE) of the period's scores, as far as their "
            "returns are known",
            f"layers: {LAYER_RULE}",
        ),
        wide=True,
        styles=PERIOD_STYLES,
    )
    if "monthly" not in frames:
        return
    page.table(
        "Top and bottom 10 % of each pool, monthly",
        frames["monthly"],
        caption(
            "score net of the pool's industry means where the handler has industries",
            "scores of the month's last day, filled at the next close, equal weight, "
            "no costs",
            "hedged against the pool's equal weight",
            "fewer groups than 10 where they would hold under 5 stocks",
        ),
        wide=True,
        styles=PERIOD_STYLES,
    )


def _trading_section(page: Page, evaluation: Evaluation) -> None:
    frames = evaluation.frames
    if "tradability" not in frames:
        return
    table = frames["tradability"]
    page.section(
        "Costs and tradability",
        "The top layer again, with what an order would meet: no buying at the upper "
        f"price limit and no selling at the lower, {BUY_COST:.1%} to buy and "
        f"{SELL_COST:.1%} to sell. The pool that hedges is free of costs and limits, "
        "as an index future would be."
        + (
            ""
            if len(table) > 2
            else " The store has no limit prices, so limit-up and limit-down days "
            "count as tradable."
        ),
    )
    note = caption(
        "top layer, weekly, next close, equal weight",
        "annual returns geometric, Sharpe from daily means, x252 days a year",
        "turnover one-sided",
        "blocked = weight that could not trade",
    )
    page.table("Top layer, idealised and not", table, note, wide=True)


def _pool_section(page: Page, evaluation: Evaluation) -> None:
    context, frames = evaluation.context, evaluation.frames
    page.section(
        "Pools",
        "The score within each market of the store, members as of each day, ranked "
        "and layered among themselves, by the rules above.",
    )
    note = f"Daily RankIC with Newey-West errors over {context.horizon - 1} lags."
    page.table("By pool", frames["pools"].rename_axis("pool"), note, wide=True)
    by_year = frames["pools_by_year"]
    page.plot("RankIC by pool and year", plots.bars(by_year, "mean RankIC"), wide=True)


def _factor_section(page: Page, evaluation: Evaluation) -> None:
    context, frames = evaluation.context, evaluation.frames
    page.section(
        "Other factors",
        "Is the score something new? Classic price and volume factors over 60 days "
        "(apb_5d: 5 days) and, where the store has minute features, intraday ones over "
        "20 days, computed from the store, and the factors supplied; RankIC "
        f"{STARTS.format(h=context.horizon)}.",
    )
    correlation = frames["factor_correlation"]
    page.plot(
        "Correlation (below the diagonal Spearman, above Pearson)",
        plots.heatmap(correlation, show_values=len(correlation) <= 16),
        f"Daily correlation, {SAMPLED.format(h=context.horizon)}.",
        wide=True,
    )
    page.table(
        "Incremental RankIC",
        frames["incremental"],
        "Residual of the score's ranks on the factors' ranks, each day.",
        wide=True,
    )


def _exposure_section(page: Page, evaluation: Evaluation) -> None:
    context, frames = evaluation.context, evaluation.frames
    page.section(
        "Exposures",
        "What the top and bottom layers lean on, against the pool's equal weight; "
        f"RankIC {STARTS.format(h=context.horizon)}.",
    )
    page.table(
        "RankIC without exposures",
        frames["neutral"],
        "Residual of the score's ranks on industry dummies and style exposures.",
    )
    if "style_exposure" in frames:
        styles = frames["style_exposure"]
        note = caption(
            "mean over the days",
            "layer mean less pool mean, in the style's own unit",
            "correlation Spearman",
        )
        page.table("Styles", styles, note)
        page.plot(
            "Style exposure of the layers",
            plots.bars(
                styles[["top", "bottom"]], "exposure less the pool's", percent=False
            ),
            note,
        )
    if "industry_exposure" in frames:
        industries = frames["industry_exposure"]
        page.table(
            "Industries",
            industries,
            caption(
                "mean over the days",
                "share of the layer's stocks less the pool's share",
            ),
            styles={"top": ("top", "p1"), "bottom": ("bottom", "p1")},
        )


def _unit_section(page: Page, evaluation: Evaluation) -> None:
    context, frames = evaluation.context, evaluation.frames
    units: pd.DataFrame = frames["units"]
    days = {"h": context.horizon}
    page.section(
        "Factor units",
        f"The {len(units)} factors the model averages, each as a factor of its own; "
        f"RankIC {STARTS.format(h=context.horizon)}.",
    )
    page.plot(
        "RankIC of the units",
        plots.histogram(units["rank_ic"], "mean RankIC", percent=True),
    )
    page.plot("IC_IR of the units", plots.histogram(units["ic_ir"], "IC_IR"))
    correlation = frames["unit_correlation"]
    few = len(units) <= FEW_UNITS
    page.plot(
        "Correlation between units"
        + (" (below the diagonal Spearman, above Pearson)" if few else ""),
        plots.heatmap(correlation, show_values=few),
        f"Units by {'rank and value' if few else 'value'}, {SAMPLED.format(**days)}.",
        wide=True,
    )
    page.table("Highest units", units.sort_values("rank_ic", ascending=False).head(10))
    page.table("Lowest units", units.sort_values("rank_ic").head(10))
