"""Weekly index enhancement as a Qlib strategy.

On the first trading day of a week the strategy takes what was known at the close of the
last day of the week before: its scores, its risk model, its index weights, its prices
and who was suspended. It optimises, and hands the exchange orders for the difference
between the portfolio held and the one wanted, sales first. Whether an order can be
filled is the exchange's business on the day of the order, which the strategy has not
seen: an order that is barred leaves cash or the old holding, until next week.

Glossary: t days, n stocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Lt
from qlib.backtest.decision import Order, OrderDir, TradeDecisionWO
from qlib.backtest.position import Position
from qlib.contrib.strategy.signal_strategy import BaseSignalStrategy
from qlib.data import D
from qlib.log import get_module_logger

import data_handlers.traded  # noqa: F401 - registers the operators with Qlib
from data_handlers.arguments import NamedArguments, NonNegative
from data_handlers.index_weights import IndexWeights, load_index_weights
from data_handlers.universe import universe
from qlib_ext.portfolio.attribution import traded_closes
from qlib_ext.portfolio.limits import RELAX_ORDER, Limits
from qlib_ext.portfolio.optimiser import Missing, Optimiser, Solution, make_problem
from qlib_ext.portfolio.risk_model import read_day
from qlib_ext.portfolio.solvers import SOLVERS

__all__ = [
    "IndexEnhancementStrategy",
    "IndexWeights",
    "WeeklyStrategy",
    "load_index_weights",
]

logger = get_module_logger("qlib_ext.portfolio")

# A change of weight smaller than this is no order.
_NO_TRADE = 1e-5


#: Why nothing is traded in a week, and its words on a page.
_NO_CHOICE = {
    "no score": "no scores",
    "equal scores": "the same score for all stocks",
}


class WeeklyStrategy(BaseSignalStrategy):
    """Trades on the first day of a week on what was known at the close before.

    A subclass says in `_decide` what weights it wants. Orders are the difference to
    the portfolio held, sales first.

    Parameters
    ----------
    signal : Series, DataFrame, str or Signal
        Scores; ``<PRED>`` in a workflow. Those of the week's last day are used.
    cash : float
        Share of the account kept for costs and for prices that move before the
        purchase.
    **kwargs
        What Qlib passes (`trade_exchange`, `level_infra`, `common_infra`).

    Attributes
    ----------
    history : list of dict
        One row a rebalancing.
    targets : dict of Timestamp to Series
        Weights wanted, by trading day.
    """

    #: Whether it takes the best; among equals that would be a choice by their codes.
    picks: ClassVar[bool] = False

    def __init__(self, *, signal: Any, cash: float, **kwargs: Any) -> None:
        passed = {
            "trade_exchange",
            "level_infra",
            "common_infra",
            "outer_trade_decision",
        }
        unknown = sorted(set(kwargs) - passed)
        if unknown:
            raise ValueError(
                f"`{unknown[0]}` is no argument of {type(self).__name__}; see its "
                "docstring."
            )
        if signal is None:
            raise ValueError("`signal` must hold scores; write <PRED> in a workflow.")
        self.history: list[dict[str, Any]] = []
        self.targets: dict[pd.Timestamp, pd.Series] = {}
        self.closes: pd.DataFrame | None = None
        super().__init__(signal=signal, risk_degree=1 - cash, **kwargs)

    def _decide(
        self,
        day: pd.Timestamp,
        trade_day: pd.Timestamp,
        score: pd.Series,
        position: Position,
    ) -> pd.Series | None:
        """Weights wanted, with 0 for what is to be sold; None: trade nothing.

        Appends to `history` and `targets`.
        """
        raise NotImplementedError

    # --------------------------------------------------------------------------- steps
    def generate_trade_decision(self, execute_result: Any = None) -> TradeDecisionWO:
        """Orders of one trading day; none but on the first day of a week."""
        step = self.trade_calendar.get_trade_step()
        trade_start, trade_end = self.trade_calendar.get_step_time(step)
        signal_start, signal_end = self.trade_calendar.get_step_time(step, shift=1)
        if signal_start.to_period("W") == trade_start.to_period("W"):
            return TradeDecisionWO([], self)
        score = self.signal.get_signal(start_time=signal_start, end_time=signal_end)
        if isinstance(score, pd.DataFrame):
            score = score.iloc[:, 0]
        why = "no score"
        if score is not None:
            known = score[np.isfinite(score)]
            equal = self.picks and len(known) > 1 and known.nunique() == 1
            why = "equal scores" if equal else ""
        if why:
            if self.history or score is not None:
                # Not silent: a hole in the scores is not a decision to hold.
                logger.warning(f"{why} of {signal_start:%Y-%m-%d}: nothing traded.")
            if self.history:
                self.history.append(
                    {
                        "signal_date": signal_start.normalize(),
                        "trade_date": trade_start.normalize(),
                        "status": why,
                    }
                )
            return TradeDecisionWO([], self)
        position = self.trade_position
        if not isinstance(position, Position):
            raise ValueError(
                f"`pos_type` must be 'Position', got {type(position).__name__}."
            )
        day = pd.Timestamp(signal_start).normalize()
        wanted = self._decide(
            day, pd.Timestamp(trade_start).normalize(), score, position
        )
        orders: list[Order] = []
        if wanted is not None:
            orders = self._orders(wanted, position, day, trade_start, trade_end)
        self.history[-1]["orders"] = len(orders)
        return TradeDecisionWO(orders, self)

    def _load_closes(self, day: pd.Timestamp) -> None:
        """Read closes from a little before `day` to the end."""
        names = universe(D.instruments("all"), stocks_only=False)
        self.closes = traded_closes(names, day, self.trade_calendar.end_time)

    def _orders(
        self,
        weights: pd.Series,
        position: Position,
        day: pd.Timestamp,
        start: pd.Timestamp,
        end: pd.Timestamp,
    ) -> list[Order]:
        assert self.closes is not None
        total = position.calculate_value()
        prices = self.closes.loc[:day].iloc[-1]
        wanted: list[tuple[float, str, int, float]] = []
        for name, weight in weights.items():
            name = str(name)
            amount = position.get_stock_amount(name)
            price = position.get_stock_price(name) if amount else prices.get(name)
            if price is None or not np.isfinite(price) or price <= 0:
                continue
            change = weight * total - amount * price
            if abs(change) <= _NO_TRADE * total:
                continue
            if change < 0:
                # The rest of a position goes whole, whatever its lots.
                all_of_it = weight <= _NO_TRADE
                shares = amount if all_of_it else -change / price
                wanted.append((change, name, OrderDir.SELL, shares))
            else:
                wanted.append((-change, name, OrderDir.BUY, change / price))
        # Sales first, for their money; then the largest purchases.
        wanted.sort(key=lambda x: (x[2] == OrderDir.BUY, x[0], x[1]))
        return [
            Order(
                stock_id=name,
                amount=float(shares),
                direction=direction,
                start_time=start,
                end_time=end,
            )
            for _, name, direction, shares in wanted
        ]

    def history_frame(self) -> pd.DataFrame:
        """`history` as a table by trading day."""
        frame = pd.DataFrame(self.history)
        return frame if frame.empty else frame.set_index("trade_date")

    def untraded(self) -> list[str]:
        """Say in how many weeks nothing was traded for want of scores, if in any."""
        status = [row.get("status") for row in self.history]
        return [
            f"{status.count(why)} weeks had {words}: nothing was traded."
            for why, words in _NO_CHOICE.items()
            if why in status
        ]


class IndexEnhancementStrategy(NamedArguments, WeeklyStrategy):
    """Hold the portfolio with the highest score within limits around an index.

    Parameters
    ----------
    signal : Series, DataFrame, str or Signal
        Scores; ``<PRED>`` in a workflow. Those of the week's last day are used.
    market : str, default "csi300"
        Index to enhance: a market of the store.
    riskmodel_root : path, default "riskmodel"
        Directory written by `build_risk_model`, with the last day of each week.
    limits : {"wide", "strict"}, default "wide"
        See `Limits.preset`.
    limit_changes : dict, optional
        Fields of `Limits` to set otherwise, ``{turnover: 0.1}`` say.
    cash : float, default 0.005
        Share of the account kept for costs and for prices that move before the
        purchase.
    risk_aversion, missing, relax_order, solvers
        As `Optimiser` takes them.
    **kwargs
        What Qlib passes (`trade_exchange`, `level_infra`, `common_infra`).

    Attributes
    ----------
    history : list of dict
        One row a rebalancing: dates, status, solver, predicted tracking error,
        turnover, relaxations, conflict, counts, exposures.
    targets : dict of Timestamp to Series
        Weights wanted, by trading day.
    index_weights : IndexWeights or None
        Set on the first rebalancing.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        *,
        signal: Any = None,
        market: str = "csi300",
        riskmodel_root: str = "riskmodel",
        limits: Literal["wide", "strict"] = "wide",
        limit_changes: Mapping[str, Any] | None = None,
        cash: Annotated[float, Ge(0), Lt(1)] = 0.005,
        risk_aversion: NonNegative = 0.0,
        missing: Missing = "neutral",
        relax_order: Sequence[str] = RELAX_ORDER,
        solvers: Sequence[str] = SOLVERS,
        **kwargs: Any,
    ) -> None:
        self.riskmodel_root = str(riskmodel_root)
        self.optimiser = Optimiser(
            Limits.preset(limits, market, **dict(limit_changes or {})),
            risk_aversion=risk_aversion,
            missing=missing,
            relax_order=relax_order,
            solvers=solvers,
        )
        self.index_weights: IndexWeights | None = None
        super().__init__(signal=signal, cash=cash, **kwargs)

    # --------------------------------------------------------------------------- steps
    def _decide(
        self,
        day: pd.Timestamp,
        trade_day: pd.Timestamp,
        score: pd.Series,
        position: Position,
    ) -> pd.Series | None:
        solution = self._optimise(day, score, position)
        self._record(day, trade_day, solution)
        return None if solution.status == "failed" else solution.weights

    def _load(self, day: pd.Timestamp) -> None:
        """Index weights and closes from a little before `day` to the end."""
        self._load_closes(day)
        assert self.closes is not None
        end = self.trade_calendar.end_time
        self.index_weights = load_index_weights(self.market, self.closes.index[0], end)

    def _optimise(
        self, day: pd.Timestamp, score: pd.Series, position: Position
    ) -> Solution:
        if self.index_weights is None or self.closes is None:
            self._load(day)
        assert self.index_weights is not None and self.closes is not None
        risk = read_day(self.riskmodel_root, day)
        total = position.calculate_value()
        held = {
            name: position.get_stock_amount(name)
            * position.get_stock_price(name)
            / total
            for name in position.get_stock_list()
        }
        current = pd.Series(held, dtype=float)
        benchmark = self.index_weights.at(day)
        past = self.closes.loc[:day]
        names = past.columns
        shut = [str(x) for x in names[np.isnan(self.closes.loc[day].to_numpy())]]
        # A share whose price nobody has seen yet cannot be ordered either.
        seen = names[past.notna().any()].union(current.index)
        score = score[score.index.isin(seen)]
        problem = make_problem(
            risk, score, benchmark, current, barred=shut, invested=1 - self.cash
        )
        return self.optimiser.solve(problem)

    def _record(
        self, day: pd.Timestamp, trade_day: pd.Timestamp, solution: Solution
    ) -> None:
        relaxed = "; ".join(str(r) for r in solution.relaxations)
        conflict = "; ".join(solution.conflict)
        self.history.append(
            {
                "signal_date": day,
                "trade_date": trade_day,
                "status": solution.status,
                "solver": solution.solver,
                "objective": solution.objective,
                "tracking_error": solution.tracking_error,
                "turnover": solution.turnover,
                "member_share": solution.member_share,
                "holdings": int((solution.weights > _NO_TRADE).sum()),
                "relaxed": relaxed,
                "relaxed_groups": ", ".join(
                    dict.fromkeys(r.group for r in solution.relaxations)
                ),
                "conflict": conflict,
                "messages": "; ".join(solution.messages),
                "seconds": solution.seconds,
                **solution.counts,
                **{f"exposure:{k}": v for k, v in solution.exposures.items()},
            }
        )
        self.targets[trade_day] = solution.weights[solution.weights > 0]
        if solution.status == "relaxed":
            logger.warning(
                f"{day:%Y-%m-%d}: limits could not be kept together ({conflict}); "
                f"relaxed {relaxed}."
            )
        elif solution.status == "failed":
            logger.error(
                f"{day:%Y-%m-%d}: no solver gave a portfolio "
                f"({'; '.join(solution.messages)}); the old one is held."
            )

    def describe(self) -> dict[str, Any]:
        """Return what was asked for, for a report."""
        return {
            "market": self.market,
            "preset": self.limits,
            "limits": self.optimiser.limits.describe(),
            "relax_order": list(self.optimiser.relax_order),
            "missing": self.optimiser.missing,
            "cash": self.cash,
            "index_weights": ""
            if self.index_weights is None
            else self.index_weights.source,
        }
