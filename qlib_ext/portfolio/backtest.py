"""What records of a weekly back-test share: strategy, range, run, Qlib's figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from qlib.backtest import backtest
from qlib.contrib.evaluate import risk_analysis
from qlib.data import D
from qlib.utils import fill_placeholder, flatten_dict, init_instance_by_config
from qlib.workflow.record_temp import SignalRecord

from qlib_ext.portfolio.strategy import WeeklyStrategy
from qlib_ext.report.record import FileRecord
from qlib_ext.report.tables import performance_of

__all__ = ["BacktestRecord", "net_values", "table_by_year"]

_EXECUTOR = {
    "class": "SimulatorExecutor",
    "module_path": "qlib.backtest.executor",
    "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
}


class BacktestRecord(FileRecord):
    """Base of records that back-test a weekly strategy on ``pred.pkl``.

    Parameters
    ----------
    recorder : Recorder
    config : dict
        ``strategy`` and ``backtest``, as `PortAnaRecord` takes them.
    skip_existing : bool, default False
    """

    depend_cls = SignalRecord

    def __init__(
        self,
        recorder: Any,
        config: Mapping[str, Any] | None = None,
        skip_existing: bool = False,
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        for part in ("strategy", "backtest"):
            if not isinstance(config, Mapping) or part not in config:
                raise ValueError(f"`config` must have `{part}`, got {config!r}.")
        self.config = _copy(config)

    def _made(self, score: pd.Series) -> Any:
        """Build the strategy on the scores."""
        config = {"strategy": _copy(self.config["strategy"])}
        config = fill_placeholder(config, {"<PRED>": score})
        return init_instance_by_config(config["strategy"])

    def _range(self, score: pd.Series) -> tuple[pd.Timestamp, pd.Timestamp]:
        """First and last day of the back-test that have a day on either side."""
        calendar = pd.DatetimeIndex(D.calendar())
        scored = pd.DatetimeIndex(score.index.unique("datetime"))
        plan = self.config["backtest"]
        start = pd.Timestamp(plan.get("start_time") or scored.min())
        end = pd.Timestamp(plan.get("end_time") or scored.max())
        days = calendar[(calendar >= start) & (calendar <= end)]
        # Qlib asks for the day after the last one.
        if len(days) and days[-1] == calendar[-1]:
            days = days[:-1]
        if len(days) < 10:
            raise ValueError(
                f"`backtest` from {start:%Y-%m-%d} to {end:%Y-%m-%d} has {len(days)} "
                "trading days in the store; 10 are needed."
            )
        return days[0], days[-1]

    def _run(
        self, strategy: WeeklyStrategy, bench: pd.Series, start: Any, end: Any
    ) -> tuple[pd.DataFrame, Mapping, str]:
        """Back-test; return Qlib's daily report, its positions and the deal price.

        Raises
        ------
        ValueError
            If the strategy never rebalanced.
        """
        plan = self.config["backtest"]
        exchange = _exchange(plan.get("exchange_kwargs") or {}, start, end)
        portfolio, _ = backtest(
            start_time=start,
            end_time=end,
            strategy=strategy,
            executor=self.config.get("executor", _EXECUTOR),
            benchmark=bench.reindex(D.calendar(start, end)).fillna(0.0),
            account=plan.get("account", 1e8),
            exchange_kwargs=exchange,
            pos_type=plan.get("pos_type", "Position"),
        )
        (freq, (report, positions)), *_ = portfolio.items()
        if not strategy.targets:
            raise ValueError(
                f"the back-test from {start:%Y-%m-%d} to {end:%Y-%m-%d} never "
                "rebalanced: no scores, or equal ones, on the last days of its weeks."
            )
        self._qlib_analysis(report, positions, freq)
        dealt = getattr(
            exchange.get("exchange"), "deal_price_", plan.get("deal_price", "")
        )
        return report, positions, dealt

    def _qlib_analysis(
        self, report: pd.DataFrame, positions: Mapping, freq: str
    ) -> None:
        """Figures and file of `PortAnaRecord`, by Qlib's conventions."""
        excess = report["return"] - report["bench"]
        analysis = {
            "excess_return_without_cost": risk_analysis(excess, freq=freq),
            "excess_return_with_cost": risk_analysis(
                excess - report["cost"], freq=freq
            ),
        }
        table = pd.concat(analysis)["risk"].unstack().T.to_dict()
        self.recorder.log_metrics(
            **{f"{freq}.{k}": v for k, v in flatten_dict(table).items()}
        )
        self.recorder.save_objects(
            **{f"report_normal_{freq}.pkl": report}, artifact_path="portfolio_analysis"
        )


def _copy(config: Any) -> Any:
    """Copy of nested dicts and lists; objects in them are shared."""
    if isinstance(config, Mapping):
        return {k: _copy(v) for k, v in config.items()}
    if isinstance(config, list):
        return [_copy(v) for v in config]
    return config


def _exchange(kwargs: dict[str, Any], start: Any, end: Any) -> dict[str, Any]:
    """Exchange arguments with an exchange that is built and knows its dates."""
    config = kwargs.get("exchange")
    if not isinstance(config, Mapping):
        return kwargs
    inner = {"start_time": start, "end_time": end, **config.get("kwargs", {})}
    return {**kwargs, "exchange": init_instance_by_config({**config, "kwargs": inner})}


def net_values(net: pd.Series, bench: pd.Series, excess: pd.Series) -> pd.DataFrame:
    """Compound daily returns of account, benchmark and their difference."""
    return (
        1 + pd.DataFrame({"account": net, "index": bench, "excess": excess})
    ).cumprod()


def table_by_year(
    net: pd.Series, bench: pd.Series, excess: pd.Series, traded: pd.Series
) -> pd.DataFrame:
    """Net return, benchmark and excess by year, and the mean weekly turnover."""
    rows = {}
    when = pd.DatetimeIndex(net.index).year.to_numpy()
    week = pd.DatetimeIndex(traded.index).year.to_numpy()
    for year in [*sorted(set(when.tolist())), "total"]:
        here = when == year if year != "total" else when > 0
        weeks = traded[week == year] if year != "total" else traded
        part = performance_of(excess[here])
        rows[str(year)] = {
            "days": int(here.sum()),
            "account": float(np.prod(1 + net[here].to_numpy(float)) - 1),
            "index": float(np.prod(1 + bench[here].to_numpy(float)) - 1),
            "annual_return": part.annual_return,
            "tracking": part.annual_volatility,
            "ir": part.sharpe,
            "max_drawdown": part.max_drawdown,
            "weekly_turnover": float(weeks.mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("period")
