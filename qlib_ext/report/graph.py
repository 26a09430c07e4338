"""Page of a graph model: weights of the relations, style returns, and the graphs."""

from __future__ import annotations

import pandas as pd

from qlib_ext.report import plots
from qlib_ext.report.page import Page

__all__ = ["graph_page"]

_STATISTICS = {
    "edges": ("edges", "n1"),
    "mean_degree": ("mean neighbours", "n1"),
    "max_degree": ("most neighbours", "n1"),
    "isolated": ("isolated stocks", "p1"),
    "turnover": ("new edges a day", "p1"),
}


def graph_page(weights: pd.DataFrame, statistics: pd.DataFrame, title: str) -> Page:
    """Lay out the page.

    Parameters
    ----------
    weights : DataFrame
        `GRUGAT.predict_weights`.
    statistics : DataFrame
        `GRUGAT.graph_statistics`.
    title : str

    Returns
    -------
    Page
    """
    page = Page(
        title,
        f"Relations {', '.join(weights['weight'])}, "
        f"{weights.index[0]:%Y-%m-%d} to {weights.index[-1]:%Y-%m-%d}.",
    )
    page.section(
        "Weights of the relations",
        "One softmax a day, known at the close of the day; averaged over seeds.",
    )
    page.plot(
        "Weight",
        plots.lines(pd.DataFrame(weights["weight"]), "weight", percent=True),
        wide=True,
    )
    if "style_return" in weights.columns.get_level_values(0):
        styles = pd.DataFrame(weights["style_return"])
        page.plot(
            "Style returns, running sum",
            plots.lines(styles.fillna(0.0).cumsum(), "return", percent=True),
            "Daily weighted regression on country, industries and styles; what the "
            "weights above are a function of.",
            wide=True,
        )
        recent = styles.rolling(20, min_periods=10).mean()
        table = pd.concat([weights["weight"], recent], axis=1).corr("spearman")
        page.table(
            "Rank correlation of weights with 20-day style returns",
            table.loc[list(styles), list(weights["weight"])].rename_axis("style"),
        )
    page.section(
        "Graphs",
        "Over all days of the data; only edges between stocks that traded count.",
    )
    mean = statistics.mean().unstack().rename_axis("relation")
    page.table("Mean of the daily figures", mean[list(_STATISTICS)], styles=_STATISTICS)
    for name, heading, percent in (
        ("mean_degree", "Mean number of neighbours", False),
        ("isolated", "Share of isolated stocks", True),
        ("turnover", "Share of the day's edges that are new", True),
    ):
        frame = pd.DataFrame(statistics.xs(name, axis=1, level=1))
        page.plot(heading, plots.lines(frame, heading.lower(), percent=percent))
    return page
