"""Whether the trades, orders and quotes of a day can be each other's.

Of the two orders of a trade the aggressor's is the later, so its id is the greater: so
it is in every trade of the real Shanghai files. Buyers who attack lift the price. An
order that a trade names as the buyer's is one to buy, most orders are not cancelled and
some are, and a bid does not stand above all trades of its day.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_handlers.aggregate.tick_kernels import DAY_US

__all__ = ["check_orders", "check_quotes", "check_trades", "price_range"]

_ENOUGH = 200  # trades, or orders, before they are judged
_NONE, _AGREE = 0.05, 0.8  # of the trades of a stock; 1 in real files
_MOVING = 0.2  # mean of side times direction of the price; above 0.4 in real files
_MOVED = 1.005  # highest price over lowest: not locked at a limit
_LOOKED = 500_000  # orders that are looked up
_FOUND = 0.05  # of the trades' order ids among the orders; above 0.5 in real files
_AGAIN = 0.05  # of the ids placed twice; none in real files
_BEYOND = 1.02  # times the highest trade, and the lowest over it


def check_trades(trades: Any, at: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Refuse sides that contradict order ids or prices; note doubtful ones.

    Parameters
    ----------
    trades : Trades
        Sorted by stock and time.
    at : int ndarray [stocks + 1]
        Where each stock begins, and the last one ends.
    labels : ndarray [stocks]
        Codes.

    Returns
    -------
    dict of str to list of str
        Note to stocks.

    Raises
    ------
    ValueError
        Naming the stocks.
    """
    notes: dict[str, Any] = {}
    side = trades.side
    sided = np.abs(side) == 1
    ids = sided & (trades.buy_id > 0) & (trades.sell_id > 0)
    ids &= trades.buy_id != trades.sell_id
    agree = ids & (np.sign(trades.buy_id - trades.sell_id) == side)
    known, right = _by_stock(ids, at), _by_stock(agree, at)
    step = np.sign(np.diff(trades.price, prepend=0.0)).astype(np.int8)
    step[at[:-1][np.diff(at) > 0]] = 0
    moving = sided & (step != 0)
    count, sum_ = _by_stock(moving, at), _by_stock(np.where(moving, side * step, 0), at)
    # Where sides have nothing to do with prices they show nothing about the ids.
    telling = np.abs(sum_) > np.maximum(_MOVING * count, 5 * np.sqrt(count))
    contradict = (known >= _ENOUGH) & (right < _AGREE * known)
    odd = contradict & (right < _NONE * known) & telling
    if odd.any():
        share = 1 - right[odd].sum() / known[odd].sum()
        raise ValueError(
            f"the side contradicts the order ids in {share:.0%} of the trades of "
            f"{_some(labels, odd)}: the aggressor's order is the later and its id the "
            "greater. Are buyers and sellers swapped, in the sides or the ids?"
        )
    if contradict.any():
        note = "sides that contradict the order ids (the aggressor's is the greater)"
        notes[note] = _named(labels, contradict)
    buys, sells = _by_stock(side == 1, at), _by_stock(side == -1, at)
    high, low = price_range(trades.price, at)
    odd = (high > _MOVED * low) & (buys + sells >= _ENOUGH)
    odd &= np.minimum(buys, sells) == 0
    if odd.any():
        note = "trades all of one side, though prices moved (what do the codes mean?)"
        notes[note] = _named(labels, odd)
    odd = (known < _ENOUGH) & (count >= _ENOUGH) & telling & (sum_ < 0)
    if odd.any():
        raise ValueError(
            f"prices of {_some(labels, odd)} fall in trades that buyers are said to "
            "have begun, and rise in those of sellers: are the sides swapped?"
        )
    return notes


def check_orders(
    orders: Any, at: np.ndarray, trades: Any, trades_at: np.ndarray, day: int
) -> dict[str, int]:
    """Refuse orders whose sides, ids or actions contradict the trades.

    Parameters
    ----------
    orders, at, trades, trades_at
        As in `check_trades`.
    day : int
        Since 1970; rows of other days are not looked at.

    Returns
    -------
    dict of str to int
        Note to a number.

    Raises
    ------
    ValueError
        With the numbers.
    """
    new, gone = int((orders.action == 1).sum()), int((orders.action == -1).sum())
    if new + gone >= _ENOUGH and gone >= 2 * new:
        raise ValueError(
            f"{gone:,} cancellations of {new:,} new orders: are the codes of `action` "
            "swapped, or new orders missing?"
        )
    seen = found = wrong = placed = twice = 0
    for k in range(len(at) - 1):
        if placed > _LOOKED:
            break
        rows = slice(at[k], at[k + 1])
        made = (orders.action[rows] == 1) & (orders.order_id[rows] > 0)
        made &= orders.time[rows] // DAY_US == day
        ids, first, where = np.unique(
            orders.order_id[rows][made], return_index=True, return_inverse=True
        )
        if not len(ids):
            continue
        when = orders.time[rows][made]
        placed += len(when)
        twice += int((when != when[first][where]).sum())
        side = orders.side[rows][made][first]
        own = slice(trades_at[k], trades_at[k + 1])
        for name, what in ((trades.buy_id[own], 1), (trades.sell_id[own], -1)):
            name = name[name > 0]
            where = np.minimum(np.searchsorted(ids, name), len(ids) - 1)
            hit = ids[where] == name
            seen, found = seen + len(name), found + int(hit.sum())
            wrong += int((side[where[hit]] == -what).sum())
    if found >= _ENOUGH and wrong > _AGREE * found:
        raise ValueError(
            f"{wrong:,} of {found:,} orders are on the other side than the trades say: "
            "are buyers and sellers swapped?"
        )
    notes = {}
    if found >= _ENOUGH and wrong > (1 - _AGREE) * found:
        notes["orders on the other side than the trades say"] = wrong
    if placed >= _ENOUGH and twice > _AGAIN * placed:
        notes["new orders with the id of an earlier one (cancellations?)"] = twice
    if min(placed, seen) >= _ENOUGH and found < _FOUND * seen:
        notes["order ids of trades that no order has (another number?)"] = seen - found
    if new >= 5 * _ENOUGH and not gone:
        notes["orders, and none of them cancelled (dropped by the vendor?)"] = new
    return notes


def check_quotes(
    quotes: Any, at: np.ndarray, trades: Any, trades_at: np.ndarray
) -> None:
    """Refuse quotes that stand above or below all trades of their stock.

    Parameters
    ----------
    quotes, at, trades, trades_at
        As in `check_trades`.

    Raises
    ------
    ValueError
        With the numbers.
    """
    high, low = price_range(trades.price, trades_at)
    of = np.repeat(np.arange(len(at) - 1), np.diff(at))
    far = quotes.bid > _BEYOND * high[of]
    far |= (quotes.ask > 0) & (quotes.ask * _BEYOND < low[of])
    priced = (quotes.bid > 0) | (quotes.ask > 0)
    if priced.sum() >= _ENOUGH and far.sum() > 0.5 * priced.sum():
        raise ValueError(
            f"{int(far.sum()):,} of {int(priced.sum()):,} quotes bid above the highest "
            "trade of their stock, or ask below the lowest: quotes of another day, "
            "another stock or in another unit (`units: {price: fen}` in their source)?"
        )


def price_range(price: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest and lowest price above 0 of each stock; without any, inf and 0."""
    high, low = np.full(len(at) - 1, np.inf), np.zeros(len(at) - 1)
    has = np.flatnonzero(np.diff(at) > 0)
    if len(has):
        price = price[: at[-1]]
        known = price > 0
        high[has] = np.maximum.reduceat(np.where(known, price, 0.0), at[has])
        low[has] = np.minimum.reduceat(np.where(known, price, np.inf), at[has])
    return high, low


def _by_stock(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.diff(np.r_[0, np.cumsum(values, dtype=np.int64)][at])


def _named(labels: np.ndarray, odd: np.ndarray) -> list[str]:
    return [str(name) for name in labels[odd]]


def _some(labels: np.ndarray, odd: np.ndarray) -> str:
    names = ", ".join(_named(labels, odd)[:5])
    return f"{names} ({int(odd.sum())} of {len(odd)} stocks)"
