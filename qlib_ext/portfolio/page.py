"""Page of an index-enhancement back-test."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qlib_ext.report import plots
from qlib_ext.report.page import Page

__all__ = ["STYLES", "enhance_page"]

STYLES = {
    "predicted": ("predicted", "p2"),
    "realised": ("realised", "p2"),
    "ratio": ("realised / predicted", "n2"),
    "bias": ("bias statistic", "n2"),
    "low": ("from", "n2"),
    "high": ("to", "n2"),
    "inside": ("in the band", "p0"),
    "portfolios": ("portfolios", "i"),
    "periods": ("periods", "i"),
    "annual": ("a year", "p2"),
    "error": ("standard error", "p2"),
    "limit": ("limit", "n3"),
    "mean": ("mean", "n3"),
    "largest": ("largest", "n3"),
    "weeks": ("rebalancings", "i"),
    "share": ("share", "p1"),
    "annual_return": ("annual return", "p2"),
    "tracking": ("tracking error", "p2"),
    "ir": ("IR", "n2"),
    "account": ("account", "p2"),
    "index": ("index", "p2"),
    "weekly_turnover": ("one-sided weekly turnover", "p1"),
}


def enhance_page(
    title: str,
    words: dict[str, str],
    frames: dict[str, pd.DataFrame],
    figures: dict[str, float],
    warnings: list[str],
) -> Page:
    """Lay out the report.

    Parameters
    ----------
    title : str
    words : dict of str to str
        ``lead``, ``conditions`` (below the headline figures), ``limits``, ``index``.
    frames : dict of str to DataFrame
        As `EnhanceRecord` makes them.
    figures : dict of str to float
        Headline figures.
    warnings : list of str
        What the reader must not miss.
    """
    page = Page(title, words["lead"])
    for text in warnings:
        page.warn(text)
    for name, key, style in (
        ("Net return over the index, a year", "excess annual return", "p2"),
        ("Tracking error, realised", "tracking error realised", "p2"),
        ("Tracking error, predicted", "tracking error predicted", "p2"),
        ("Net information ratio", "information ratio", "n2"),
        ("Drawdown of the net excess", "excess max drawdown", "p2"),
        ("One-sided weekly turnover", "weekly turnover", "p1"),
        ("Cost a year", "cost annual", "p2"),
        ("Rebalancings with relaxed limits", "relaxed rebalancings", "i"),
    ):
        if key in figures:
            page.tile(name, figures[key], style)
    page.tiles_note = words["conditions"]
    page.section("Return", words["index"])
    page.plot(
        "Net value of account and index",
        plots.lines(frames["values"][["account", "index"]], "net value"),
        wide=True,
    )
    page.plot(
        "Net value of account over index",
        plots.lines(frames["values"][["excess"]], "net value"),
        "Daily net excess returns compounded.",
    )
    page.plot(
        "Drawdown of the excess", plots.drawdown_curves(frames["values"][["excess"]])
    )
    page.table("By year", frames["by_year"], styles=STYLES, wide=True)
    page.section(
        "Tracking error",
        "A bias statistic above 1 means that risk was underestimated; the band holds "
        "95 % of the values that a right forecast of normal returns gives.",
    )
    page.table("Realised and predicted", frames["tracking"], styles=STYLES, wide=True)
    if "bias" in frames:
        page.table(
            "Risk model on portfolios it was not made for",
            frames["bias"],
            "Weekly returns of the cap-weighted market, of random portfolios, of these "
            "minus the market, and of single stocks.",
            styles=STYLES,
            wide=True,
        )
    page.section(
        "Attribution",
        "Active exposure at the last close times the day's factor return; alpha is "
        "what is left of the stocks' returns, trading what prices did between close "
        "and fill. The parts add up to the net excess.",
    )
    page.table("A year (mean x 252)", frames["attribution_annual"], styles=STYLES)
    page.plot(
        "Running sums",
        plots.lines(frames["attribution_sums"], "sum of daily parts", percent=True),
    )
    page.section("Limits", words["limits"])
    page.table(
        "Exposure to styles, portfolio minus index",
        frames["exposure_table"],
        "Of every close, drift between rebalancings included.",
        styles=STYLES,
    )
    page.table("Rebalancings by outcome", frames["outcomes"], styles=STYLES)
    if len(frames["relaxations"]):
        page.table(
            "Relaxed limits (last 20)",
            frames["relaxations"].tail(20),
            "What gave way, and the constraints that had no solution together.",
            styles={"relaxed": ("relaxed", "s"), "conflict": ("conflict", "s")},
            wide=True,
        )
    page.plot(
        "One-sided turnover of each rebalancing",
        plots.lines(frames["turnover"], "turnover", percent=True),
        "Optimised: as the optimiser wanted. Traded: as filled, before the fills' own "
        "change of value.",
    )
    return page


def text_of(figures: dict[str, Any]) -> str:
    """One line for a log."""
    return ", ".join(
        f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float)
    )
