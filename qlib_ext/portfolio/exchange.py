"""A Qlib exchange with the rules of the mainland Chinese boards.

Order of a day: suspended stocks do not trade; a stock whose deal price stands at its
upper (lower) limit cannot be bought (sold); the rest is rounded to lots and cut to the
cash there is. The test for limits looks at the price at which the order would be filled
and at nothing later: a vwap order is barred where the whole day traded at the limit, an
open order where the open did, a close order where the close did. (Qlib's own
`limit_threshold` compares the day's close also for open and vwap orders.)

Limits are the store's `$limit_up` and `$limit_down` if it has them, else previous close
(after ex-rights) times 1 ± the board's limit, rounded to the cent. They and the lots
are those of `data_handlers.boards`. `[gap]` Without `$is_st` no stock is taken for an
ST stock, and the log says so.

Glossary: t days, n instruments.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from qlib.backtest.decision import Order
from qlib.backtest.exchange import Exchange
from qlib.backtest.high_performance_ds import BaseQuote
from qlib.data import D
from qlib.log import get_module_logger
from qlib.utils.index_data import SingleData

from data_handlers.aggregate.schema import SILENT
from data_handlers.arguments import NamedArguments, NonNegative
from data_handlers.boards import (
    AT_LIMIT,
    board_of,
    free_days,
    limit_prices,
    limit_ratio,
    lot_rule,
)
from data_handlers.fields import known_fields
from data_handlers.panel import scatter
from data_handlers.universe import instrument_spans, universe

__all__ = ["BoardExchange", "DayQuote"]

logger = get_module_logger("qlib_ext.portfolio")

# Stands for the volume-weighted price where the store has no `$vwap`.
FALLBACKS = (
    ("$amount/$volume", {"amount", "volume"}),
    ("$open/4+$high/4+$low/4+$close/4", {"open", "high", "low", "close"}),
)


class DayQuote(BaseQuote):
    """Qlib's quote interface over [t, n] arrays: one daily value in constant time.

    Qlib's `NumpyQuote` slices a frame for every question on a Friday.

    Parameters
    ----------
    quote_df : DataFrame
        Rows (instrument, datetime).
    freq : str
        "day".
    """

    def __init__(self, quote_df: pd.DataFrame, freq: str = "day") -> None:
        super().__init__(quote_df=quote_df, freq=freq)
        dates = pd.DatetimeIndex(quote_df.index.unique("datetime")).sort_values()
        names = quote_df.index.unique("instrument")
        self.dates = dates
        self.rows = {date: row for row, date in enumerate(dates)}
        # The row of the last range asked for: a day is asked for many times in a row.
        self._asked: tuple[Any, Any] = (None, None)
        self._row: int | None = None
        self.columns = {name: column for column, name in enumerate(names)}
        self.values: dict[str, np.ndarray] = {}
        for field, series in quote_df.items():
            panel = scatter(series, dates, names, what=str(field))
            # A stock that is not listed (NaN) can be neither bought nor sold.
            flag = series.dtype == bool
            self.values[str(field)] = panel.astype(bool) if flag else panel

    def get_all_stock(self) -> Any:
        """Codes with a quote."""
        return self.columns.keys()

    def get_data(
        self,
        stock_id: str,
        start_time: pd.Timestamp,
        end_time: pd.Timestamp,
        field: str,
        method: str | None = None,
    ) -> Any:
        """Value of one day, or of several by `method`, as Qlib's quotes give it."""
        column = self.columns.get(stock_id)
        if column is None:
            return None
        values = self.values[field]
        if (start_time, end_time) != self._asked:
            day = start_time.normalize()
            one = end_time - day < pd.Timedelta(days=1)
            self._row = self.rows.get(day, -1) if one else None
            self._asked = (start_time, end_time)
        if self._row is not None:
            return None if self._row < 0 else values[self._row, column]
        day = start_time.normalize()
        first = self.dates.searchsorted(day, "left")
        last = self.dates.searchsorted(end_time, "right")
        part = values[first:last, column]
        if not len(part):
            return None
        if method == "all":
            return bool(part.all())
        if method == "sum":
            return float(np.nansum(part))
        if method == "ts_data_last":
            known = part[np.isfinite(part)]
            return known[-1] if len(known) else np.nan
        return SingleData(pd.Series(part, self.dates[first:last]))


class BoardExchange(NamedArguments, Exchange):
    """Exchange with limits and lots by board, for daily back-tests.

    In a workflow it stands under ``backtest: exchange_kwargs: exchange:`` with
    ``class``, ``module_path`` and ``kwargs``; Qlib passes it nothing else, so give
    `start_time` and `end_time` here too (`EnhanceRecord` fills them in).

    Parameters
    ----------
    freq : str, default "day"
    start_time, end_time : date, optional
        Range of the back-test; default: all of the store.
    codes : str or list, default "all"
        Stocks that can be traded or held.
    deal_price : str, default "vwap"
        Field at which orders are filled. "vwap" takes `$vwap`, else `$amount` /
        `$volume`, else the mean of open, high, low and close; `deal_price_` says which.
    open_cost, close_cost : float, default 0.001, 0.002
        Share of the amount bought, sold.
    min_cost : float, default 5
        Least cost of an order, CNY.
    impact_cost : float, default 0
        As in Qlib.
    limits : bool, default True
        Whether price limits bar orders.
    lots : bool, default True
        Whether orders are rounded to lots (only with a `$factor` for every price).
    volume_threshold, subscribe_fields
        As in Qlib.

    Raises
    ------
    ValueError
        If a cost is negative or no number, or the store lacks the deal price.
    """

    def __init__(
        self,
        freq: Literal["day"] = "day",
        start_time: Any = None,
        end_time: Any = None,
        codes: Any = "all",
        deal_price: str = "vwap",
        open_cost: NonNegative = 0.001,
        close_cost: NonNegative = 0.002,
        min_cost: NonNegative = 5.0,
        impact_cost: NonNegative = 0.0,
        limits: bool = True,
        lots: bool = True,
        volume_threshold: Any = None,
        subscribe_fields: list | None = None,
    ) -> None:
        if not isinstance(deal_price, str):
            raise ValueError(
                f"`deal_price` must be the name of one field, got {deal_price!r}."
            )
        start_time = None if start_time is None else pd.Timestamp(start_time)
        end_time = None if end_time is None else pd.Timestamp(end_time)
        asked = deal_price.lstrip("$")
        codes = universe(codes, stocks_only=False)
        more = ("limit_up", "limit_down", "is_st", "vwap", "amount", "volume")
        wanted = list(dict.fromkeys([*more, "open", "high", "low", "close", asked]))
        have = set(known_fields(wanted, codes, start_time, end_time, sample=24))
        self.deal_price_ = f"${asked}"
        if asked not in have:
            found = [e for e, need in FALLBACKS if asked == "vwap" and need <= have]
            if not found:
                raise ValueError(
                    f"`deal_price`: the store has no ${asked}; it has "
                    f"{sorted(have)} to choose from."
                )
            self.deal_price_ = found[0]
            logger.warning(f"no $vwap in this store: orders are filled at {found[0]}.")
        self._range = {"high", "low"} & have if self.deal_price_ != "$close" else set()
        self._given = {"limit_up", "limit_down"} <= have
        self._st = "is_st" in have
        if limits and not self._given and not self._st:
            logger.warning("no $is_st in this store: no stock is taken for ST.")
        fields = {f"${x}" for x in self._range} | set(subscribe_fields or ())
        if limits:
            fields |= {"$limit_up", "$limit_down"} if self._given else set()
            fields |= {"$is_st"} if self._st and not self._given else set()
        super().__init__(
            freq=freq,
            start_time=start_time,
            end_time=end_time,
            codes=codes,
            deal_price=self.deal_price_,
            subscribe_fields=sorted(fields),
            limit_threshold=None,
            volume_threshold=volume_threshold,
            open_cost=open_cost,
            close_cost=close_cost,
            min_cost=min_cost,
            impact_cost=impact_cost,
            quote_cls=DayQuote,
            trade_unit=100 if lots else None,
        )

    # ------------------------------------------------------------------------- limits
    def _update_limit(self, limit_threshold: Any) -> None:
        frame = self.quote_df
        close = frame["$close"].to_numpy(float)
        shut = ~(np.isfinite(close) & (close > 0))
        if "$volume" in frame:
            shut |= frame["$volume"].to_numpy(float) <= SILENT
        buy, sell = shut.copy(), shut.copy()
        if self.limits:
            up, down = self._prices(frame)
            price = frame[self.buy_price].to_numpy(float)
            # The range of the day decides for a price that is a mean of the day's.
            low = frame["$low"].to_numpy(float) if "low" in self._range else price
            high = frame["$high"].to_numpy(float) if "high" in self._range else price
            if self.deal_price_ == "$open":
                low = high = price
            buy |= np.fmax(price, low) >= up * (1 - AT_LIMIT)
            sell |= np.fmin(price, high) <= down * (1 + AT_LIMIT)
        frame["limit_buy"] = buy
        frame["limit_sell"] = sell

    def _prices(self, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Return adjusted limit prices of each row; infinite (0) where none."""
        if self._given:
            up = frame["$limit_up"].to_numpy(float)
            down = frame["$limit_down"].to_numpy(float)
            # A day without limits has none, or 0, in the store.
            up = np.where(np.isfinite(up) & (up > 0), up, np.inf)
            return up, np.where(np.isfinite(down), down, 0.0)
        days = pd.DatetimeIndex(frame.index.get_level_values("datetime"))
        close = frame["$close"].where(frame["$close"] > 0)
        before = close.groupby(level="instrument").transform(
            lambda x: x.ffill().shift()
        )
        # The vendor's change knows about ex-rights and the day before the range.
        change = frame["$change"].to_numpy(float)
        reference = np.where(
            np.isfinite(change), close.to_numpy(float) / (1 + change), before.to_numpy()
        )
        st = np.zeros(len(frame), bool)
        if self._st:
            st = frame["$is_st"].to_numpy(float) == 1
        ratio = np.full(len(frame), np.nan)
        calendar = pd.DatetimeIndex(D.calendar())
        # Not the spans of `codes`: who joins an index is no new listing.
        spans = instrument_spans("all") or {}
        for name, rows in frame.groupby(level="instrument").indices.items():
            board = board_of(str(name))
            ratio[rows] = limit_ratio(board, days[rows], st[rows])
            begin = min((s for s, _ in spans.get(str(name), [])), default=calendar[0])
            first = calendar.searchsorted(pd.Timestamp(begin))
            if first == 0:
                continue  # listed before the store begins
            age = calendar.searchsorted(days[rows]) - first
            ratio[rows[age < free_days(board, days[rows])]] = np.inf
        up, down = limit_prices(reference, ratio, frame["$factor"].to_numpy(float))
        known = np.isfinite(reference) & np.isfinite(ratio)
        return np.where(known, up, np.inf), np.where(known, down, 0.0)

    # --------------------------------------------------------------------------- lots
    def round_order(
        self, instrument: str, amount: float, factor: float | None
    ) -> float:
        """Largest order of adjusted shares that the lot rule allows.

        Parameters
        ----------
        instrument : str
        amount : float
            Adjusted shares: shares over `factor`.
        factor : float or None
            Adjustment factor; None or NaN: no rounding.
        """
        rounds = self.lots and not self.trade_w_adj_price
        if not rounds or factor is None or not np.isfinite(factor):
            return amount
        rule = lot_rule(instrument)
        # A tenth of a share makes up for what the factor's division loses.
        shares = np.floor((amount * factor + 0.1) / rule.step) * rule.step
        return float(shares / factor) if shares >= rule.least else 0.0

    def _calc_trade_info_by_order(
        self, order: Order, position: Any, dealt_order_amount: dict
    ) -> tuple[float, float, float]:
        when = (order.stock_id, order.start_time, order.end_time)
        price = float(self.get_deal_price(*when, direction=order.direction))
        traded = float(self.get_volume(*when)) * price
        order.factor = self.get_factor(*when)
        order.deal_amount = order.amount
        self._clip_amount_by_volume(order, dealt_order_amount)
        ratio = self.close_cost if order.direction == Order.SELL else self.open_cost
        if self.impact_cost and traded > 0:
            ratio += self.impact_cost * (order.deal_amount * price / traded) ** 2
        amount = order.deal_amount
        if order.direction == Order.SELL:
            held = amount if position is None else position.get_stock_amount(when[0])
            amount = min(amount, held)
            if not np.isclose(amount, held):
                amount = self.round_order(when[0], amount, order.factor)
            if position is not None:
                fee = max(amount * price * ratio, self.min_cost)
                if position.get_cash() + amount * price < fee:
                    amount = 0.0
        else:
            if position is not None:
                most = self._get_buy_amount_by_cash_limit(
                    price, position.get_cash(), ratio
                ) if ratio > 0 else position.get_cash() / price  # fmt: skip
                amount = min(amount, max(most, 0.0))
            amount = self.round_order(when[0], amount, order.factor)
        order.deal_amount = amount
        value = amount * price
        cost = max(value * ratio, self.min_cost) if value > 1e-5 else 0.0
        return price, value, cost
