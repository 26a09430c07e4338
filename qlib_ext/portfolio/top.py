"""The best k stocks at equal weight, weekly: strategy, record and page."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, Lt
from qlib.backtest.position import Position

from data_handlers.arguments import Count, NamedArguments
from data_handlers.universe import instrument_spans, membership_mask, universe
from qlib_ext import metrics
from qlib_ext.portfolio.attribution import daily_returns, holdings_frame, traded_closes
from qlib_ext.portfolio.backtest import BacktestRecord, net_values, table_by_year
from qlib_ext.portfolio.page import STYLES
from qlib_ext.portfolio.strategy import WeeklyStrategy
from qlib_ext.report import plots
from qlib_ext.report.page import Page
from qlib_ext.report.record import first_column, footer
from qlib_ext.report.tables import performance_of, period_returns

__all__ = ["TopRecord", "TopStrategy"]


class TopStrategy(NamedArguments, WeeklyStrategy):
    """Hold the k best scores of the week's last day at equal weight.

    A stock without a trade on that day is not chosen. What the exchange bars (limits,
    suspensions) stays as it was until next week.

    Parameters
    ----------
    signal : Series, DataFrame, str or Signal
        Scores; ``<PRED>`` in a workflow.
    k : int, default 200
        Stocks held; all that have a score, where they are fewer.
    cash : float, default 0.005
        Share of the account kept for costs.
    **kwargs
        What Qlib passes (`trade_exchange`, `level_infra`, `common_infra`).

    Attributes
    ----------
    history : list of dict
        One row a rebalancing: dates, holdings wanted, stocks to choose from.
    targets : dict of Timestamp to Series
        Weights wanted, by trading day.
    """

    picks = True

    def __init__(
        self,
        *,
        signal: Any = None,
        k: Count = 200,
        cash: Annotated[float, Ge(0), Lt(1)] = 0.005,
        **kwargs: Any,
    ) -> None:
        super().__init__(signal=signal, cash=cash, **kwargs)

    def _decide(
        self,
        day: pd.Timestamp,
        trade_day: pd.Timestamp,
        score: pd.Series,
        position: Position,
    ) -> pd.Series | None:
        if self.closes is None:
            self._load_closes(day)
        assert self.closes is not None
        traded = self.closes.columns[self.closes.loc[day].notna().to_numpy()]
        score = score[np.isfinite(score) & score.index.isin(traded)]
        # Equal scores in the order of their codes, whatever order they come in.
        best = score.sort_index().sort_values(ascending=False, kind="stable")[: self.k]
        weights = pd.Series((1 - self.cash) / max(len(best), 1), best.index)
        held = pd.Index(position.get_stock_list()).difference(best.index)
        self.targets[trade_day] = weights
        self.history.append(
            {
                "signal_date": day,
                "trade_date": trade_day,
                "status": "optimal",
                "holdings": len(best),
                "candidates": len(score),
            }
        )
        return pd.concat([weights, pd.Series(0.0, held)])


class TopRecord(BacktestRecord):
    """Back-test `TopStrategy` on ``pred.pkl`` against the equal weight of a market.

    Long only, after costs, by the exchange's rules. Writes ``top/account.parquet``
    (daily return before costs, cost, benchmark, turnover), ``history.parquet``,
    ``holdings.parquet``, ``periods.parquet``, ``by_year.parquet`` and ``report.html``;
    logs figures as ``top …``.

    The benchmark is the mean return of the market's stocks that trade on the day, each
    from its last close: equal weight every day, no costs.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    config : dict
        ``strategy`` (config of a `TopStrategy`, with ``<PRED>``) and ``backtest``
        (`start_time`, `end_time`, `account`, `exchange_kwargs`).
    market : str, default "all"
        Market of the store that is the benchmark, members point in time.
    skip_existing : bool, default False

    Raises
    ------
    ValueError
        If the strategy is another one, or the market has no stock.
    """

    artifact_path = "top"
    leaves = ("report.html", "account.parquet", "history.parquet", "summary.json")

    def __init__(
        self,
        recorder: Any,
        config: Any = None,
        market: str = "all",
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder, config, skip_existing)

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = first_column(self.load("pred.pkl"), "pred.pkl")
        start, end = self._range(score)
        strategy = self._made(score)
        if not isinstance(strategy, TopStrategy):
            raise ValueError(
                f"`strategy` must be a TopStrategy, got {type(strategy).__name__}; use "
                "PortAnaRecord for others."
            )
        bench = equal_weight(self.market, start, end)
        report, positions, dealt = self._run(strategy, bench, start, end)
        bought = min(strategy.targets)
        account = report[report.index > bought]
        net = account["return"] - account["cost"]
        excess = net - account["bench"]
        history = strategy.history_frame()
        traded = (report["turnover"].reindex(history.index) / 2).iloc[1:]
        frames = {
            "values": net_values(net, account["bench"], excess),
            "by_year": table_by_year(net, account["bench"], excess, traded),
            "periods": period_returns(
                pd.DataFrame(
                    {"account": net, "index": account["bench"], "excess": excess}
                )
            ),
        }
        perf = performance_of(excess)
        figures = self.log(
            {
                "excess annual return": perf.annual_return,
                "excess annual mean": perf.annual_mean,
                "tracking error": perf.annual_volatility,
                "information ratio": perf.sharpe,
                "excess max drawdown": perf.max_drawdown,
                "weekly turnover": float(traded.mean()),
                "cost annual": float(account["cost"].mean() * metrics.DAYS_PER_YEAR),
                "holdings": float(history["holdings"].mean()),
                "rebalancings": float(len(history)),
            },
            "top ",
        )
        words = (
            f"The best {strategy.k} scores of {bought:%Y-%m-%d} to "
            f"{report.index[-1]:%Y-%m-%d}, equal weight, rebalanced on the first day "
            "of each week with the scores of the last day of the week before, filled "
            f"at {dealt or 'the deal price'}, after costs. Benchmark: equal weight of "
            f"{self.market}, every day, without costs."
        )
        page = _page(f"Top {strategy.k} of {self.market}", words, frames, figures)
        for text in strategy.untraded():
            page.warn(text)
        return {
            "account.parquet": report,
            "history.parquet": history,
            "holdings.parquet": holdings_frame(positions),
            "by_year.parquet": frames["by_year"],
            "periods.parquet": frames["periods"],
            "summary.json": {"figures": figures, "k": strategy.k},
            "report.html": page.render(footer(self.recorder, costs=True)),
        }


def equal_weight(market: str, start: Any, end: Any) -> pd.Series:
    """Daily mean return of a market's stocks that trade, from their last closes."""
    spans = instrument_spans(universe(market), start, end) or {}
    if not spans:
        raise ValueError(f"`market` {market!r} has no stock from {start} to {end}.")
    closes = traded_closes(sorted(spans), start, end)
    days = pd.DatetimeIndex(closes.index)
    inside = membership_mask(spans, days, closes.columns) & closes.notna().to_numpy()
    return daily_returns(closes).where(inside).mean(axis=1).loc[start:end]


def _page(
    title: str, words: str, frames: dict[str, pd.DataFrame], figures: dict[str, float]
) -> Page:
    page = Page(title, words)
    for text, key, style in (
        ("Net return over the benchmark, a year", "excess annual return", "p2"),
        ("Tracking error", "tracking error", "p2"),
        ("Net information ratio", "information ratio", "n2"),
        ("Drawdown of the net excess", "excess max drawdown", "p2"),
        ("One-sided weekly turnover", "weekly turnover", "p1"),
        ("Cost a year", "cost annual", "p2"),
        ("Stocks wanted", "holdings", "i"),
    ):
        if key in figures:
            page.tile(text, figures[key], style)
    page.section("Return", "Net of costs; excess is account less benchmark, daily.")
    values = frames["values"]
    page.plot(
        "Net value of account and benchmark",
        plots.lines(values[["account", "index"]], "net value"),
        wide=True,
    )
    page.plot("Excess, compounded", plots.lines(values[["excess"]], "net value"))
    page.plot("Its drawdown", plots.drawdown_curves(values[["excess"]]))
    styles = {**STYLES, "index": ("benchmark", "p2"), "excess": ("excess", "p2")}
    page.table(
        "Week, month and year to the last day, and every year",
        frames["periods"],
        "Compounded within the period.",
        styles=styles,
    )
    page.table("By year", frames["by_year"], styles=styles, wide=True)
    return page
