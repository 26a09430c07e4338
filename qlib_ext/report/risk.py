"""Records of risk: factor returns and coverage; a score when styles turn round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.workflow.record_temp import SignalRecord
from torch import Tensor

from data_handlers.arguments import Count, Share
from data_handlers.expression.loading import read_values
from data_handlers.risk import DAILY_RETURN, STYLES, factor_return_frame, style_coverage
from qlib_ext import metrics
from qlib_ext.models.styles import style_state
from qlib_ext.report import market_data
from qlib_ext.report.record import FileRecord, first_column
from qlib_ext.report.tables import panel_of

__all__ = ["ReversalRecord", "RiskRecord", "style_reversals"]

MONTH = 20  # days of a style's run


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
    leaves = ("factor_returns.parquet", "coverage.parquet")
    depend_cls = None

    def __init__(
        self, recorder: Any, dataset: Any = None, skip_existing: bool = False
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        frame, table = _factor_returns(self.dataset)
        means = table.drop(columns="r2").mean() * 252
        own = {n: v for n, v in means.items() if not str(n).startswith("industry")}
        self.log({f"{name} return": value for name, value in own.items()})
        return {
            "factor_returns.parquet": table,
            "coverage.parquet": style_coverage(frame),
        }


def _factor_returns(dataset: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Risk group of a dataset's handler, and the daily returns of its factors."""
    risk = market_data.risk_frame(dataset, slice(None))
    if risk is None:
        raise ValueError(
            "`dataset` must have a handler with a `risk` group; use one of "
            "data_handlers."
        )
    frame = pd.concat({"risk": risk}, axis=1)
    dates = frame.index.get_level_values("datetime")
    names = list(frame.index.unique("instrument"))
    returns = read_values(names, [DAILY_RETURN], dates.min(), dates.max())
    return frame, factor_return_frame(frame, returns.iloc[:, 0])


def style_reversals(
    score: Tensor,
    exposures: dict[str, Tensor],
    excess: Tensor,
    days: pd.DatetimeIndex,
    style_returns: pd.DataFrame,
    sharpest: float = 0.2,
) -> pd.DataFrame:
    """Look at a score month by month, by how sharply the styles turned round.

    Parameters
    ----------
    score : Tensor [t, n]
    exposures : dict of str to Tensor [t, n]
        Exposure to each style, NaN unknown.
    excess : Tensor [t]
        Daily return of what is bought by the score, over the pool's.
    days : DatetimeIndex [t]
    style_returns : DataFrame
        Daily returns of the same styles, from before `days` on.
    sharpest : float, default 0.2
        Share of the months that count as sharp; at least one.

    Returns
    -------
    DataFrame
        A row a month: `days`; `reversal`, minus the mean over styles of the run before
        the month (sum of 20 days) times the run in it, both in units of the style's own
        deviation: high where what ran turned; `sharp`; `exposure`, mean over days and
        styles of the absolute correlation with the score; `chase`, mean correlation
        with the exposures weighted by the run of 20 days up to the day; `excess`,
        compounded; `drawdown` of the excess within the month, a positive fraction.
    """
    names = list(exposures)
    runs = pd.DataFrame(
        style_state(style_returns[names].to_numpy(), (MONTH,)),
        style_returns.index,
        names,
    )
    unit = pd.DataFrame(
        style_state(style_returns[names].to_numpy(), (1,)), style_returns.index, names
    )
    before = runs.shift().reindex(days)
    lean = torch.stack([metrics.ic(score, exposures[k]) for k in names], 1)
    ran = torch.as_tensor(runs.reindex(days).to_numpy(), dtype=score.dtype)
    chased = sum(
        torch.nan_to_num(exposures[k]) * ran[:, [i]] for i, k in enumerate(names)
    )
    chase = metrics.ic(score, torch.as_tensor(chased))
    rows = {}
    months = pd.Series(np.arange(len(days)), days).groupby(days.to_period("M"))
    for month, at in months:
        day = at.to_numpy()
        inside = unit.reindex(days[day]).sum() / len(day) ** 0.5
        gain = excess[day]
        rows[str(month)] = {
            "days": len(day),
            "reversal": float(-(before.iloc[day[0]] * inside).mean()),
            "exposure": float(lean[day].abs().nanmean()),
            "chase": float(chase[day].nanmean()),
            "excess": float((1 + torch.nan_to_num(gain)).prod() - 1),
            "drawdown": metrics.max_drawdown(gain),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("month")
    count = max(1, round(sharpest * len(table)))
    border = table["reversal"].nlargest(count).min()
    table.insert(2, "sharp", table["reversal"] >= border)
    return table


class ReversalRecord(FileRecord):
    """Keep a score's exposures and drawdown in months in which styles turned round.

    Writes ``risk/reversals.parquet`` (see `style_reversals`) and logs the means over
    sharp and other months as `sharp exposure`, `other excess` and so on. Bought is the
    best of `n_layers` groups, weekly at the next close, without costs, against the
    pool's equal weight.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib; must hold `pred.pkl`.
    dataset : DatasetH
        Whose handler has a `risk` group with styles; `<DATASET>` in a workflow.
    n_layers : int, default 10
    sharpest : float, default 0.2
        Share of the months that count as sharp.
    skip_existing : bool, default False
    """

    artifact_path = "risk"
    leaves = ("reversals.parquet",)
    depend_cls = SignalRecord

    def __init__(
        self,
        recorder: Any,
        dataset: Any = None,
        n_layers: Count = 10,
        sharpest: Share = 0.2,
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = first_column(self.load("pred.pkl"), "pred.pkl")
        frame, returns = _factor_returns(self.dataset)
        styles = [s for s in STYLES if ("risk", s) in frame.columns]
        if not styles:
            raise ValueError(
                "`dataset`: the risk group has no style exposure, so no style can turn "
                "round; set the handler's `styles`."
            )
        bars = market_data.load_bars(score)
        days, stocks = bars.days, bars.instruments
        panel = panel_of(score, days, stocks).double()
        layers = metrics.layer_backtest(
            panel, bars.during("close"), metrics.week_ends(days), self.n_layers
        )
        table = style_reversals(
            panel,
            {s: panel_of(frame["risk", s], days, stocks).double() for s in styles},
            layers.returns[:, self.n_layers - 1] - layers.returns[:, self.n_layers],
            days,
            returns,
            self.sharpest,
        )
        means = table.groupby("sharp")[["exposure", "chase", "excess", "drawdown"]]
        for sharp, row in means.mean().iterrows():
            figures = {str(name): value for name, value in row.items()}
            self.log(figures, "sharp " if sharp else "other ")
        return {"reversals.parquet": table}
