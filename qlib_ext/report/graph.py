"""Record and page of a graph model: weights of its relations, and the graphs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from qlib_ext.recorders import own_name
from qlib_ext.report import plots
from qlib_ext.report.page import Page
from qlib_ext.report.record import ModelRecord, flat, footer

__all__ = ["GraphRecord"]

_STATISTICS = {
    "edges": ("edges", "n1"),
    "mean_degree": ("mean neighbours", "n1"),
    "max_degree": ("most neighbours", "n1"),
    "isolated": ("isolated stocks", "p1"),
    "turnover": ("new edges a day", "p1"),
}


class GraphRecord(ModelRecord):
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
    leaves = ("weights.parquet", "statistics.parquet", "report.html")
    asks = "predict_weights"
    due = "have relations to report (GRUGAT; write <MODEL>)"

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        weights = self.model.predict_weights(self.dataset, self.segment)
        statistics = self.model.graph_statistics(self.dataset)
        self.log({f"{a}_{b}": v for (a, b), v in statistics.mean().items()})
        self.log(weights["weight"].mean(), "weight_")
        page = graph_page(weights, statistics, f"{own_name(self.recorder)}: graphs")
        return {
            "weights.parquet": flat(weights),
            "statistics.parquet": flat(statistics),
            "report.html": page.render(footer(self.recorder)),
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
