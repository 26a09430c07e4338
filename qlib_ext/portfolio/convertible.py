"""Convertible bonds in Qlib's back-test: an exchange that redeems, a strategy by pools.

`ConvertibleExchange` is the exchange of `qlib_ext.portfolio.exchange` with the bonds'
rules of `data_handlers.boards`: limits since 2022-08-01 only, lots of ten, sales before
purchases of the same day with their money (T+0). A bond that has left the store, called
or matured, can be sold from its holder's next rebalancing on for what it paid.

Glossary: t days, n bonds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, Gt, Le, Lt
from qlib.backtest.decision import Order
from qlib.backtest.position import Position
from qlib.data import D

from data_handlers.arguments import NamedArguments, NonNegative
from data_handlers.boards import BOND_FIRST_DAY, BOND_REFORM
from data_handlers.convertible import POOLS
from data_handlers.universe import instrument_spans, membership_mask
from qlib_ext.portfolio.exchange import BoardExchange
from qlib_ext.portfolio.strategy import WeeklyStrategy

__all__ = ["ConvertibleExchange", "PoolTopStrategy"]


class ConvertibleExchange(BoardExchange):
    """Exchange for convertible bonds, for daily back-tests.

    Parameters
    ----------
    payout : "last", float or dict of str to float, default "last"
        What a bond pays that has left the store: its last price, as who converts or
        sells in time gets; or CNY per 100 of face value, for all or by code (codes left
        out pay their last price). `[gap]` Not known from prices: a call pays 100 and
        the accrued interest, a maturity the price of the terms.
    deal_price : str, default "close"
    open_cost, close_cost : float, default 0.0005
        Share of the amount; there is no stamp duty, and a redemption costs nothing.
    min_cost : float, default 0
    freq, start_time, end_time, codes, impact_cost, limits, lots, volume_threshold, \
subscribe_fields
        See `BoardExchange`.

    Raises
    ------
    ValueError
        On an argument out of range.
    """

    def __init__(
        self,
        payout: Any = "last",
        deal_price: str = "close",
        open_cost: NonNegative = 0.0005,
        close_cost: NonNegative = 0.0005,
        min_cost: NonNegative = 0.0,
        **kwargs: Any,
    ) -> None:
        values = payout.values() if isinstance(payout, Mapping) else [payout]
        for value in [] if payout == "last" else values:
            if isinstance(value, (bool, str)) or not value >= 0:
                raise ValueError(
                    "`payout` must be 'last', CNY per 100 of face value, or such by "
                    f"code, got {payout!r}."
                )
        self.ended: dict[str, pd.Timestamp] = {}
        super().__init__(
            deal_price=deal_price,
            open_cost=open_cost,
            close_cost=close_cost,
            min_cost=min_cost,
            **kwargs,
        )

    def get_quote_from_qlib(self) -> None:
        """Load quotes, and append what bonds pay after their last day."""
        super().get_quote_from_qlib()
        frame: pd.DataFrame = self.quote_df  # type: ignore[has-type]
        calendar = pd.DatetimeIndex(D.calendar(self.start_time, self.end_time))
        final = pd.DatetimeIndex(D.calendar())[-1]
        every = instrument_spans("all") or {}
        parts = []
        close = frame["$close"].dropna()
        held = close.groupby(level="instrument").last()
        for name, price in held.items():
            code = str(name)
            spans = every.get(code.upper(), [])
            end = max((pd.Timestamp(e) for _, e in spans), default=final)
            after = calendar[calendar > end]
            if end >= final or not len(after):
                continue
            self.ended[code] = end
            worth = self.payout
            if isinstance(worth, Mapping):
                worth = worth.get(code, "last")
            worth = float(price) if worth == "last" else float(worth)
            index = pd.MultiIndex.from_product([[name], after], names=frame.index.names)
            rows = pd.DataFrame(np.nan, index, frame.columns)
            rows[[c for c in ("$close", self.buy_price) if c in rows]] = worth
            rows[["$factor", "$change", "$volume"]] = [1.0, 0.0, 1e12]
            rows["limit_buy"], rows["limit_sell"] = True, False
            parts.append(rows.astype(frame.dtypes.to_dict()))
        if parts:
            self.quote_df = pd.concat([frame.drop(self._stale(frame)), *parts])

    def _stale(self, frame: pd.DataFrame) -> pd.Index:
        """Rows without prices that Qlib has for days after a bond's end."""
        days = frame.index.get_level_values("datetime")
        ends = frame.index.get_level_values("instrument").map(self.ended)
        return frame.index[np.asarray(days > pd.DatetimeIndex(ends))]

    def _prices(self, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        up, down = super()._prices(frame)
        if self._given:
            return up, down
        days = frame.index.get_level_values("datetime")
        spans = instrument_spans("all") or {}
        begins = {k: min(pd.Timestamp(s) for s, _ in v) for k, v in spans.items() if v}
        first = frame.index.get_level_values("instrument").map(begins)
        day_one = np.asarray((days == first) & (days >= BOND_REFORM))
        day_one &= days != pd.Timestamp(D.calendar()[0])  # listed before the store
        high, low = (100 * x for x in BOND_FIRST_DAY)
        return np.where(day_one, high, up), np.where(day_one, low, down)

    def _calc_trade_info_by_order(
        self, order: Order, position: Any, dealt_order_amount: dict
    ) -> tuple[float, float, float]:
        price, value, cost = super()._calc_trade_info_by_order(
            order, position, dealt_order_amount
        )
        end = self.ended.get(order.stock_id)
        over = end is not None and order.start_time > end + pd.Timedelta(days=1)
        over |= end is not None and order.start_time.normalize() > end
        return price, value, 0.0 if over else cost


class PoolTopStrategy(NamedArguments, WeeklyStrategy):
    """Hold the best-scored share of each pool, equally weighted, renewed every week.

    On the first trading day of a week it takes scores, pools and prices of the last
    day of the week before. Pools share the account equally, as far as they have members
    with a score.

    Parameters
    ----------
    signal : Series, DataFrame, str or Signal
        Scores; ``<PRED>`` in a workflow.
    pools : list of str, default all three
        Markets of the store; members point in time.
    top : float, default 0.2
        Share of a pool's scored bonds that is held, at least one.
    cash : float, default 0.01
        Share of the account kept for costs, and prices that move before the purchase.
    **kwargs
        What Qlib passes (`trade_exchange`, `level_infra`, `common_infra`).

    Raises
    ------
    ValueError
        If an argument is out of range, or a pool is no market of the store.
    """

    picks = True

    def __init__(
        self,
        *,
        signal: Any = None,
        pools: list | None = None,
        top: Annotated[float, Gt(0), Le(1)] = 0.2,
        cash: Annotated[float, Ge(0), Lt(1)] = 0.01,
        **kwargs: Any,
    ) -> None:
        self.pools = list(POOLS if pools is None else pools)
        self.spans = {name: instrument_spans(name) or {} for name in self.pools}
        super().__init__(signal=signal, cash=cash, **kwargs)

    def wanted(self, day: pd.Timestamp, score: pd.Series) -> pd.Series:
        """Weights by the scores and pools of a day; they sum to 1 if any is scored."""
        score = score.dropna()
        parts = []
        for name in self.pools:
            days = pd.DatetimeIndex([day])
            member = membership_mask(self.spans[name], days, score.index)[0]
            inside = score[member].sort_values(ascending=False, kind="stable")
            count = max(1, int(np.floor(self.top * len(inside)))) if len(inside) else 0
            if count:
                parts.append(pd.Series(1.0 / count, inside.index[:count]))
        if not parts:
            return pd.Series(dtype=float)
        return pd.concat(parts).groupby(level=0).sum() / len(parts)

    def _decide(
        self,
        day: pd.Timestamp,
        trade_day: pd.Timestamp,
        score: pd.Series,
        position: Position,
    ) -> pd.Series:
        if self.closes is None:
            self._load_closes(day)
        weights = self.wanted(day, score)
        self.history.append(
            {
                "signal_date": day,
                "trade_date": trade_day,
                "status": "ok" if len(weights) else "no bond with a score in a pool",
                "holdings": len(weights),
            }
        )
        self.targets[trade_day] = weights
        every = weights.index.union(pd.Index(position.get_stock_list(), dtype=object))
        return weights.reindex(every, fill_value=0.0) * self.risk_degree
