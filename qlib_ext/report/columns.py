"""The record that judges every feature of a data set as a factor by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset.handler import DataHandlerLP

from data_handlers.arguments import Count
from qlib_ext import metrics
from qlib_ext.dataset import handler_label_horizon
from qlib_ext.report import market_data, studies, tables
from qlib_ext.report.page import Page
from qlib_ext.report.record import FileRecord, footer

__all__ = ["ColumnRecord"]

_STYLES = {
    "ic": ("IC", "p2"),
    "long_short": ("long-short", "p1"),
    "long_only": ("long-only excess", "p1"),
}


class ColumnRecord(FileRecord):
    """Judge each column of the handler's features: IC, RankIC, closeness, portfolios.

    Writes ``columns/columns.parquet``, one row a column: `ic`, `rank_ic`, `ic_ir`,
    `closeness`, which is e^(-RankMAE), `long_short` and `long_only`;
    ``columns/daily.parquet``, the daily RankIC of each; and a page. Logs
    ``<column>_rank_ic``.

    IC, RankIC and e^(-RankMAE) are of every `horizon`-th day, the mean over the first
    days possible, against the raw return; IC_IR is not annualised. The portfolios hold
    the top and bottom tenth by the month's last value at equal weight, filled at the
    next close, without costs: `long_short` is top less bottom, `long_only` top less
    all that have a value, both geometric and a year. A column without a value on any
    day is named on the page.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    dataset : DatasetH
        `<DATASET>` in a workflow.
    horizon : int, optional
        Trading days of the label; default the handler's.
    columns : list of str, optional
        Features to judge, default all.
    segment : str, default "test"
    skip_existing : bool, default False
        Leave finished files as they are.

    Raises
    ------
    ValueError
        If there is no data set, or `columns` names none of its features.
    """

    artifact_path = "columns"
    leaves = ("columns.parquet", "daily.parquet", "report.html")
    depend_cls = None

    def __init__(
        self,
        recorder: Any,
        dataset: Any = None,
        horizon: Count | None = None,
        columns: list[str] | None = None,
        segment: str = "test",
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        if dataset is None:
            raise ValueError("`dataset` is not given; write <DATASET> in the workflow.")
        if horizon is None:
            horizon = handler_label_horizon(dataset.handler)
        if horizon is None:
            raise ValueError(
                "`horizon` is not given, and over how many days the label reaches "
                "cannot be told from this handler; set it, in trading days."
            )
        self.horizon: int = horizon

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        values = self.dataset.prepare(self.segment, col_set="feature")
        names = [str(name) for name in values]
        chosen = names if self.columns is None else list(self.columns)
        for name in chosen:
            if name not in names:
                raise ValueError(f"`columns` names {name!r}; the data has {names}.")
        label = self.dataset.prepare(
            self.segment, col_set="label", data_key=DataHandlerLP.DK_R
        ).iloc[:, 0]
        bars = market_data.load_bars(label)
        days, stocks = bars.days, bars.instruments
        truth = tables.panel_of(label, days, stocks)
        close = bars.during("close")
        rows, daily = {}, {}
        for name in chosen:
            factor = tables.panel_of(values[name], days, stocks)
            row, daily[name] = self._judge(factor, truth, close, days)
            rows[name] = row
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("column")
        table["dates"] = table["dates"].astype(int)
        self.log({f"{name}_rank_ic": v for name, v in table["rank_ic"].items()})
        series = pd.DataFrame(daily, index=days).rename_axis("datetime")
        return {
            "columns.parquet": table,
            "daily.parquet": series,
            "report.html": self._page(table, days).render(footer(self.recorder)),
        }

    def _judge(
        self,
        factor: torch.Tensor,
        truth: torch.Tensor,
        close: torch.Tensor,
        days: pd.DatetimeIndex,
    ) -> tuple[dict[str, float], np.ndarray]:
        """Figures of one column, and its daily RankIC."""
        least = tables.MIN_PAIRS
        daily = metrics.rank_ic(factor, truth, least)
        starts = tables.non_overlapping_starts(daily, self.horizon)
        rank, _ = metrics.over_starts(daily, starts)
        plain, _ = metrics.over_starts(metrics.ic(factor, truth, least), starts)
        near, _ = metrics.over_starts(metrics.rank_mae(factor, truth, least), starts)
        row = {
            "ic": plain.mean,
            "rank_ic": rank.mean,
            "ic_ir": rank.ir,
            "closeness": near.mean,
            "long_short": np.nan,
            "long_only": np.nan,
            "dates": float(rank.count),
            "stocks": float(torch.isfinite(factor).sum(1).double().mean()),
        }
        ends = metrics.month_ends(days)
        if rank.count:
            _, top, bottom, every = studies.tenths(factor[ends], close, ends)
            row["long_short"] = metrics.performance(top - bottom).annual_return
            row["long_only"] = metrics.performance(top - every).annual_return
        return row, daily.numpy()

    def _page(self, table: pd.DataFrame, days: pd.DatetimeIndex) -> Page:
        page = Page(
            f"{len(table)} columns as factors",
            f"{days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}, return of {self.horizon} "
            "trading days from the close after, raw.",
        )
        empty = table.index[table["dates"] == 0].tolist()
        if empty:
            page.warn(f"Without a value on any day: {', '.join(empty)}.")
        page.section("Columns")
        page.table(
            "Each column by itself",
            table,
            f"IC, RankIC and e^(-RankMAE) on every {self.horizon}th day, mean over all "
            "first days; portfolios of the top and bottom tenth, monthly, equal weight,"
            " no costs, a year.",
            wide=True,
            styles=_STYLES,
        )
        return page
