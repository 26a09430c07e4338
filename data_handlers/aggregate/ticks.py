"""Level-2 ticks of one day reduced to one row: the 20 `l2` features, and the flow.

Inputs are the normalised tables of `schema.py`: trades (needed), orders and quotes
(optional). `TICK_FEATURES` defines each feature with unit, range, NaN rule and the
moment at which it is known.

Notation, per stock and day: A amount of a trade (price × volume, CNY), s its side (+1
the buyer was the aggressor, −1 the seller, 0 auction). Parent order = all trades of one
order id on one side. Post-open = 09:30–10:00, tail = 14:30–15:00 with the closing
auction. Standard deviations are those of the population; a strength is mean/std over
the 30 minutes of the post-open, minutes without events count as 0.

What SPEC §1.3 leaves open is decided here:

- Large: log parent amount > mean + std of the log amounts of all parents of the stock
  that day, buyers and sellers together. If all are equal none is large.
- Return of a trade: price / price of the previous trade of the day − 1, 0 for the
  first. The 30 % (20 %) of trades are ⌈0.3 n⌉ (⌈0.2 n⌉); of ties the earlier counts.
- Resting orders: what new orders add to the book, minus cancellations, minus fills of
  resting orders; each valued at the order's own price. Buy intention adds the net
  aggressive amount.
- A market order (price 0 or NaN) is valued at the last trade before it.
- Spread and depth are weighted by how long a snapshot held inside continuous trading
  (09:30–11:30, 13:00–14:57). The last snapshot of a file counts for nothing: nobody
  knows how long it held. A snapshot with one empty side has no spread; its depth
  counts.

Flow by order size, as vendors publish it: a trade counts on its aggressor's side, in
the class (`schema.FLOW_CLASSES`) of the aggressor's parent order; auction trades count
on neither side. A trade without its aggressor's order id is an order of its own.

The Shanghai rule
-----------------
Shanghai does not publish an order that is filled at once, and of a partly filled one
only the remainder. Counting published orders alone would understate what was placed:
`l2_cancel_ratio` comes out too high, and `l2_order_imb` misses exactly the impatient
side. So the part filled at once is rebuilt from the trades: every trade with an
aggressor adds its volume and amount to what that side placed. Parent orders come from
the trades' order numbers and need no order row. For exchanges that publish everything
(Shenzhen) the part filled at once is valued at its trade prices too, so both kinds of
source give the same numbers for the same market; see `publishes_all`. The resting book
never contains a part filled at once, so buy intention does not depend on the rule.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numba as nb
import numpy as np
import pandas as pd
import pyarrow as pa

from data_handlers.aggregate.minute import dictionary_codes, frozen, microseconds
from data_handlers.aggregate.schema import (
    FLOW_CLASSES,
    FLOW_FIELDS,
    ORDERS,
    TRADES,
    FeatureDef,
    Session,
    get_session,
)

__all__ = [
    "FLOW_FEATURES",
    "TICK_FEATURES",
    "TICK_NAMES",
    "TICK_REJECT_REASONS",
    "TickRows",
    "aggregate_ticks",
]

_INF = float("inf")
_ALL = "close"
_OPEN = "10:00"
_IDS = ("trades' order ids",)
_SIDE = ("trades' side",)
_NO_IDS = "no order ids"
_NO_SIDE = "no aggressor side known"

#: The features in the order of their columns.
TICK_FEATURES: tuple[FeatureDef, ...] = (
    FeatureDef(
        *("l2_big_net", "(large buy − large sell)/ΣA", "share", -1, 1, _NO_IDS),
        needs=_IDS,
    ),
    FeatureDef(
        "l2_big_buy", "large buy parents' amount/ΣA", "share", 0, 1, _NO_IDS, needs=_IDS
    ),
    FeatureDef(
        *("l2_big_sell", "large sell parents' amount/ΣA", "share", 0, 1, _NO_IDS),
        needs=_IDS,
    ),
    FeatureDef(
        "l2_open_big_net_ratio",
        "(large buy − large sell)/ΣA over post-open trades; large by the whole day",
        "share",
        -1,
        1,
        "no order ids, or no post-open trade",
        needs=_IDS,
    ),
    FeatureDef(
        "l2_open_big_net_strength",
        "mean/std of the post-open minutes' large net buy",
        "1",
        -_INF,
        _INF,
        "no order ids, or all minutes equal",
        needs=_IDS,
    ),
    FeatureDef(
        "l2_open_buy_will_ratio",
        "(ΣsA + Δ resting buy − Δ resting sell)/ΣA, post-open",
        "share",
        -_INF,
        _INF,
        "no orders, no side, or no post-open trade",
        _OPEN,
        ("orders", *_SIDE),
    ),
    FeatureDef(
        "l2_open_buy_will_strength",
        "mean/std of the post-open minutes' buy intention",
        "1",
        -_INF,
        _INF,
        "no orders, no side, or all minutes equal",
        _OPEN,
        ("orders", *_SIDE),
    ),
    FeatureDef("l2_act_buy", "ΣA[s=1]/ΣA", "share", 0, 1, _NO_SIDE, _ALL, needs=_SIDE),
    FeatureDef(
        "l2_act_net_open30",
        "ΣsA/ΣA, post-open",
        "share",
        -1,
        1,
        "no side, or no post-open trade",
        _OPEN,
        _SIDE,
    ),
    FeatureDef(
        "l2_act_net_last30",
        "ΣsA/ΣA, tail",
        "share",
        -1,
        1,
        "no side, or no tail trade",
        _ALL,
        _SIDE,
    ),
    FeatureDef("l2_avg_trade", "log(mean A)", "log CNY", -_INF, _INF, "never"),
    FeatureDef(
        "l2_avg_outflow_ratio",
        "mean A[s=−1]/mean A",
        "1",
        0,
        _INF,
        "no aggressive sale",
        needs=_SIDE,
    ),
    FeatureDef(
        "l2_big_push",
        "Π(1+r) − 1 over the 30 % of trades with the largest A",
        "return",
        -1,
        _INF,
        "never",
    ),
    FeatureDef("l2_buy_hhi", "Σ(parent/Σ)², buyers", "1", 0, 1, _NO_IDS, needs=_IDS),
    FeatureDef("l2_sell_hhi", "Σ(parent/Σ)², sellers", "1", 0, 1, _NO_IDS, needs=_IDS),
    FeatureDef(
        "l2_cancel_ratio",
        "cancelled/placed volume",
        "share",
        0,
        _INF,
        "no orders, or nothing placed",
        needs=("orders",),
    ),
    FeatureDef(
        "l2_order_imb",
        "(buy − sell)/(buy + sell) placed amount",
        "share",
        -1,
        1,
        "no orders, or nothing placed",
        needs=("orders",),
    ),
    FeatureDef(
        "l2_spread",
        "time-weighted (ask₁ − bid₁)/mid",
        "fraction of price",
        0,
        2,
        "no quotes, or never two-sided",
        needs=("quotes",),
    ),
    FeatureDef(
        "l2_depth_imb",
        "time-weighted (Σbid − Σask)/(Σbid + Σask) volume over the levels",
        "share",
        -1,
        1,
        "no quotes",
        needs=("quotes",),
    ),
    FeatureDef(
        "l2_smart",
        "vwap of the 20 % of trades with the largest |r|/sqrt(volume) / day vwap − 1",
        "return",
        -1,
        _INF,
        "never",
    ),
)
TICK_NAMES = [f.name for f in TICK_FEATURES]

#: The daily flow in the order of its columns.
FLOW_FEATURES = tuple(
    FeatureDef(
        name,
        f"ΣA[s={sign}, parent {size}]",
        "CNY",
        0,
        _INF,
        "no side or no order ids",
        needs=(*_SIDE, *_IDS),
    )
    for name, (sign, size) in zip(
        FLOW_FIELDS,
        itertools.product(("+1", "−1"), FLOW_CLASSES),
        strict=True,
    )
)

#: Why a tick is not used, by status code; 0 means it is.
TICK_REJECT_REASONS = {
    1: "another day",
    2: "outside the session",
    3: "price not positive",
    4: "volume not positive",
    5: "duplicate",
    6: "unknown side or action code",
    7: "no time",
    8: "crossed quote",
}
_REJECTS = len(TICK_REJECT_REASONS) + 1
_DAY_US = 86_400_000_000
_MIN_US = 60_000_000
_EXTRA = [
    *("open", "high", "low", "close", "volume", "amount"),
    *("trades", "orders", "quotes"),
    *FLOW_FIELDS,
]
_FLOW_AT = _EXTRA.index(FLOW_FIELDS[0])
_FLOW_BOUNDS = np.array(list(FLOW_CLASSES.values())[:-1])
_N = len(TICK_NAMES)


@dataclass
class TickRows:
    """One row a stock, and the account of the input ticks.

    Attributes
    ----------
    frame : DataFrame
        Sorted by instrument: datetime, instrument, open, high, low, close, volume,
        amount (of the trades used), trades, orders, quotes (rows used), the flow by
        order size, the features.
    rows_in : dict
        Table to its number of rows.
    rejected : dict
        Table to {reason: rows}.
    notes : dict
        Other facts and how often: unsorted rows, cancellations of unknown orders.
    """

    frame: pd.DataFrame
    rows_in: dict[str, int]
    rejected: dict[str, dict[str, int]]
    notes: dict[str, Any] = field(default_factory=dict)


# -- kernels: one stock's rows, sorted by time


@nb.njit(nogil=True, cache=True)
def _mixed(key):
    """Spread a number over 64 bits."""
    # Unsigned throughout: compiled signed products must not overflow. Two rounds:
    # order ids are runs of numbers, which one round can map onto runs of slots.
    h = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


@nb.njit(nogil=True, cache=True)
def _slot(mixed, mask):
    return np.int64(mixed & np.uint64(mask))


@nb.njit(nogil=True, cache=True)
def _find(keys, mask, key):
    """Slot of `key` in an open-addressing table, or of the empty slot it belongs to."""
    k = _slot(_mixed(key), mask)
    while keys[k] != 0 and keys[k] != key:
        k = (k + 1) & mask
    return k


@nb.njit(nogil=True, cache=True)
def _capacity(n):
    cap = 16
    while cap < 2 * n:
        cap *= 2
    return cap


@nb.njit(nogil=True, cache=True)
def _check_trades(t, price, volume, buy, sell, side, day, first, last, status):
    """Status of one stock's trades; duplicates share moment, ids, price and volume."""
    n = len(t)
    cap = _capacity(n)
    rows = np.full(cap, -1, dtype=np.int64)
    for i in range(n):
        if t[i] < 0:
            status[i] = 7
        elif t[i] // 86_400_000_000 != day:
            status[i] = 1
        elif not (first <= t[i] % 86_400_000_000 < last):
            status[i] = 2
        elif not (price[i] > 0):
            status[i] = 3
        elif volume[i] <= 0:
            status[i] = 4
        elif not (-1 <= side[i] <= 1):
            status[i] = 6
        elif buy[i] > 0 and sell[i] > 0:
            # Reports without both ids may be equal and still be two trades.
            k = _slot(_mixed(_mixed(buy[i]) ^ np.uint64(sell[i])), cap - 1)
            while rows[k] >= 0:
                j = rows[k]
                if (
                    buy[i] == buy[j]
                    and sell[i] == sell[j]
                    and t[i] == t[j]
                    and price[i] == price[j]
                    and volume[i] == volume[j]
                ):
                    status[i] = 5
                    break
                k = (k + 1) & (cap - 1)
            else:
                rows[k] = i


@nb.njit(nogil=True, cache=True)
def _check_orders(t, price, volume, side, oid, action, day, first, last, status):
    """Status of one stock's orders; an id is placed, and cancelled, once a moment."""
    n = len(t)
    cap = _capacity(n)
    rows = np.full(cap, -1, dtype=np.int64)
    for i in range(n):
        if t[i] < 0:
            status[i] = 7
        elif t[i] // 86_400_000_000 != day:
            status[i] = 1
        elif not (first <= t[i] % 86_400_000_000 < last):
            status[i] = 2
        elif price[i] < 0:
            status[i] = 3
        elif volume[i] <= 0:
            status[i] = 4
        elif (action[i] != 1 and action[i] != -1) or (
            side[i] != 1 and side[i] != -1 and not (side[i] == 0 and action[i] == -1)
        ):
            status[i] = 6
        elif oid[i] > 0:
            k = _slot(_mixed(oid[i]), cap - 1)
            while rows[k] >= 0:
                j = rows[k]
                if (
                    oid[i] == oid[j]
                    and action[i] == action[j]
                    and t[i] == t[j]
                    and volume[i] == volume[j]
                ):
                    status[i] = 5
                    break
                k = (k + 1) & (cap - 1)
            else:
                rows[k] = i


@nb.njit(nogil=True, cache=True)
def _check_quotes(t, bid, ask, bad, day, first, last, spans, status):
    n = len(t)
    for i in range(n):
        if t[i] < 0:
            status[i] = 7
            continue
        if t[i] // 86_400_000_000 != day:
            status[i] = 1
            continue
        s = t[i] % 86_400_000_000
        if not (first <= s < last):
            status[i] = 2
            continue
        if bad[i] != 0:
            status[i] = bad[i]
            continue
        if bid[i] > 0 and ask[i] > 0 and bid[i] >= ask[i]:
            # In an auction the book crosses by design.
            for k in range(len(spans)):
                if spans[k, 0] <= s < spans[k, 1]:
                    status[i] = 8
    # Of one moment the last usable snapshot stays.
    later = np.int64(-1)
    for i in range(n - 1, -1, -1):
        if status[i] == 0:
            if t[i] == later:
                status[i] = 5
            later = t[i]


@nb.njit(nogil=True, cache=True)
def _kth_largest(x, k):
    """k-th largest of x (k ≥ 1); reorders x."""
    k -= 1
    left, right = 0, len(x) - 1
    while left < right:
        pivot = x[(left + right) // 2]
        i, j = left, right
        while i <= j:
            while x[i] > pivot:
                i += 1
            while x[j] < pivot:
                j -= 1
            if i <= j:
                x[i], x[j] = x[j], x[i]
                i += 1
                j -= 1
        if k <= j:
            right = j
        elif k >= i:
            left = i
        else:
            break
    return x[k]


@nb.njit(nogil=True, cache=True)
def _strength(x):
    low, high, total = x[0], x[0], 0.0
    for m in range(len(x)):
        low, high = min(low, x[m]), max(high, x[m])
        total += x[m]
    if high == low:
        return np.nan
    mean = total / len(x)
    var = 0.0
    for m in range(len(x)):
        var += (x[m] - mean) ** 2
    return mean / np.sqrt(var / len(x))


@nb.njit(nogil=True, cache=True)
def _parents(ids, amount, slot):
    """Sum amounts by id. Returns table of ids and amounts; `slot` gets each row's."""
    cap = _capacity(len(ids))
    keys = np.zeros(cap, dtype=np.int64)
    sums = np.zeros(cap)
    for i in range(len(ids)):
        if ids[i] <= 0:
            slot[i] = -1
            continue
        k = _find(keys, cap - 1, ids[i])
        keys[k] = ids[i]
        sums[k] += amount[i]
        slot[i] = k
    return keys, sums


@nb.njit(nogil=True, cache=True)
def _hhi(keys, sums):
    total = 0.0
    square = 0.0
    for k in range(len(keys)):
        if keys[k] != 0:
            total += sums[k]
            square += sums[k] * sums[k]
    return square / (total * total) if total > 0 else np.nan


@nb.njit(nogil=True, cache=True)
def _flow(side, amount, b_slot, b_sums, s_slot, s_sums, extra):
    """Add each trade to its aggressor's side and parent's class."""
    classes = len(_FLOW_BOUNDS) + 1
    for k in range(2 * classes):
        extra[_FLOW_AT + k] = 0.0
    for i in range(len(side)):
        if side[i] == 0:
            continue
        parent = amount[i]
        if side[i] == 1 and b_slot[i] >= 0:
            parent = b_sums[b_slot[i]]
        elif side[i] == -1 and s_slot[i] >= 0:
            parent = s_sums[s_slot[i]]
        c = 0
        while c < classes - 1 and parent >= _FLOW_BOUNDS[c]:
            c += 1
        extra[_FLOW_AT + (0 if side[i] == 1 else classes) + c] += amount[i]


@nb.njit(nogil=True, cache=True)
def _trade_features(t, price, volume, buy, sell, side, clock, has_ids, extra, row, net):
    """Fill everything that trades alone decide; `net` gets ΣsA of each minute."""
    n = len(t)
    open_us, tail_us = clock[0], clock[1]
    amount = np.empty(n)
    total = total_v = act_buy = act_sell = 0.0
    open_amount = open_net = tail_amount = tail_net = 0.0
    n_sell = 0
    high, low = -np.inf, np.inf
    any_side = False
    for i in range(n):
        a = price[i] * volume[i]
        amount[i] = a
        total += a
        total_v += volume[i]
        high, low = max(high, price[i]), min(low, price[i])
        if side[i] == 1:
            act_buy += a
            any_side = True
        elif side[i] == -1:
            act_sell += a
            n_sell += 1
            any_side = True
        s = t[i] % 86_400_000_000
        m = (s - open_us) // 60_000_000
        if s >= open_us and m < 30:
            open_amount += a
            open_net += side[i] * a
            net[m] += side[i] * a
        if s >= tail_us:
            tail_amount += a
            tail_net += side[i] * a
    extra[0], extra[1], extra[2], extra[3] = price[0], high, low, price[n - 1]
    extra[4], extra[5], extra[6] = total_v, total, n
    mean = total / n
    if any_side:
        row[7] = act_buy / total
        if open_amount > 0:
            row[8] = open_net / open_amount
        if tail_amount > 0:
            row[9] = tail_net / tail_amount
        if n_sell > 0:
            row[11] = (act_sell / n_sell) / mean
    row[10] = np.log(mean)
    # -- large parent orders
    if has_ids:
        b_slot = np.empty(n, dtype=np.int64)
        s_slot = np.empty(n, dtype=np.int64)
        b_keys, b_sums = _parents(buy, amount, b_slot)
        s_keys, s_sums = _parents(sell, amount, s_slot)
        count = 0
        log_sum = 0.0
        least, most = np.inf, -np.inf
        for keys, sums in ((b_keys, b_sums), (s_keys, s_sums)):
            for k in range(len(keys)):
                if keys[k] != 0:
                    count += 1
                    log_sum += np.log(sums[k])
                    least, most = min(least, sums[k]), max(most, sums[k])
        if count > 0:
            log_mean = log_sum / count
            var = 0.0
            for keys, sums in ((b_keys, b_sums), (s_keys, s_sums)):
                for k in range(len(keys)):
                    if keys[k] != 0:
                        var += (np.log(sums[k]) - log_mean) ** 2
            bound = log_mean + np.sqrt(var / count)
            # Compare amounts, not logs: one exp instead of a log a trade.
            large = np.exp(bound) if most > least else np.inf
            big_b = big_s = open_big = 0.0
            minute = np.zeros(30)
            for i in range(n):
                flow = 0.0
                if b_slot[i] >= 0 and b_sums[b_slot[i]] > large:
                    big_b += amount[i]
                    flow += amount[i]
                if s_slot[i] >= 0 and s_sums[s_slot[i]] > large:
                    big_s += amount[i]
                    flow -= amount[i]
                s = t[i] % 86_400_000_000
                m = (s - open_us) // 60_000_000
                if s >= open_us and m < 30:
                    open_big += flow
                    minute[m] += flow
            row[0] = (big_b - big_s) / total
            row[1] = big_b / total
            row[2] = big_s / total
            if open_amount > 0:
                row[3] = open_big / open_amount
            row[4] = _strength(minute)
            if any_side:
                _flow(side, amount, b_slot, b_sums, s_slot, s_sums, extra)
            row[13] = _hhi(b_keys, b_sums)
            row[14] = _hhi(s_keys, s_sums)
    # -- returns of the largest and of the smartest trades
    k = (3 * n + 9) // 10
    least_a = _kth_largest(amount.copy(), k)
    above = 0
    for i in range(n):
        above += amount[i] > least_a
    ties = k - above
    push = 1.0
    for i in range(n):
        take = amount[i] > least_a
        if amount[i] == least_a and ties > 0:
            take = True
            ties -= 1
        if take and i > 0:
            push *= 1.0 + (price[i] / price[i - 1] - 1.0)
    row[12] = push - 1.0
    smart = np.zeros(n)
    for i in range(1, n):
        smart[i] = abs(price[i] / price[i - 1] - 1.0) / np.sqrt(np.float64(volume[i]))
    k = (n + 4) // 5
    least_s = _kth_largest(smart.copy(), k)
    above = 0
    for i in range(n):
        above += smart[i] > least_s
    ties = k - above
    sa = sv = 0.0
    for i in range(n):
        take = smart[i] > least_s
        if smart[i] == least_s and ties > 0:
            take = True
            ties -= 1
        if take:
            sa += amount[i]
            sv += volume[i]
    row[19] = (sa / sv) / (total / total_v) - 1.0
    return open_amount, any_side


@nb.njit(nogil=True, cache=True)
def _order_features(
    t,
    price,
    volume,
    side,
    oid,
    action,
    t_time,
    t_price,
    t_volume,
    t_buy,
    t_sell,
    t_side,
    clock,
    publishes_all,
    open_amount,
    any_side,
    net,
    row,
):
    """Fill the features that need orders; returns the cancels of unknown orders."""
    n, nt = len(t), len(t_time)
    open_us = clock[0]
    cap = _capacity(n)
    keys = np.zeros(cap, dtype=np.int64)
    value = np.zeros(cap)  # CNY/share that the order is valued at
    sides = np.zeros(cap, dtype=np.int8)
    will = net.copy()
    placed_v = cancel_v = 0.0
    placed = np.zeros(2)  # CNY: sell, buy
    unknown = 0
    j = 0
    for i in range(n):
        s = t[i] % 86_400_000_000
        m = (s - open_us) // 60_000_000
        inside = s >= open_us and m < 30
        while j < nt and t_time[j] < t[i]:
            j += 1
        if action[i] == 1:
            p = price[i]
            if not (p > 0):
                p = t_price[j - 1] if j > 0 else t_price[0]
            if oid[i] > 0:
                k = _find(keys, cap - 1, oid[i])
                keys[k] = oid[i]
                value[k] = p
                sides[k] = side[i]
            placed_v += volume[i]
            placed[1 if side[i] == 1 else 0] += p * volume[i]
            if inside:
                will[m] += side[i] * p * volume[i]
        else:
            cancel_v += volume[i]
            p, d = price[i], side[i]
            if oid[i] > 0 and (not (p > 0) or d == 0):
                k = _find(keys, cap - 1, oid[i])
                if keys[k] != 0:
                    p = p if p > 0 else value[k]
                    d = sides[k]
            if p > 0 and d != 0:
                if inside:
                    will[m] -= d * p * volume[i]
            else:
                unknown += 1
    for i in range(nt):
        d = t_side[i]
        if d == 0:
            # Auction: both orders rested before, and both leave the book.
            continue
        a = t_price[i] * t_volume[i]
        s = t_time[i] % 86_400_000_000
        m = (s - open_us) // 60_000_000
        inside = s >= open_us and m < 30
        # The passive order leaves the other side of the book.
        if inside:
            will[m] += d * a
        if publishes_all:
            # The aggressor's order row said volume × limit for this part as well:
            # it never rested, and it was worth its trade price.
            own = t_buy[i] if d == 1 else t_sell[i]
            if own > 0:
                k = _find(keys, cap - 1, own)
                if keys[k] != 0:
                    placed[1 if d == 1 else 0] += a - value[k] * t_volume[i]
                    if inside:
                        will[m] -= d * value[k] * t_volume[i]
        else:
            placed_v += t_volume[i]
            placed[1 if d == 1 else 0] += a
    if any_side:
        if open_amount > 0:
            total = 0.0
            for m in range(30):
                total += will[m]
            row[5] = total / open_amount
        row[6] = _strength(will)
    if placed_v > 0:
        row[15] = cancel_v / placed_v
    if placed[0] + placed[1] > 0:
        row[16] = (placed[1] - placed[0]) / (placed[1] + placed[0])
    return unknown


@nb.njit(nogil=True, cache=True)
def _quote_features(t, bid, ask, bid_sum, ask_sum, spans, row):
    spread = spread_w = depth = depth_w = 0.0
    for i in range(len(t) - 1):
        start, end = t[i] % 86_400_000_000, t[i + 1] % 86_400_000_000
        w = 0.0
        for k in range(len(spans)):
            w += max(0, min(end, spans[k, 1]) - max(start, spans[k, 0]))
        if w <= 0:
            continue
        if bid[i] > 0 and ask[i] > bid[i]:
            spread += w * (ask[i] - bid[i]) / (0.5 * (ask[i] + bid[i]))
            spread_w += w
        both = bid_sum[i] + ask_sum[i]
        if both > 0:
            depth += w * (bid_sum[i] - ask_sum[i]) / both
            depth_w += w
    if spread_w > 0:
        row[17] = spread / spread_w
    if depth_w > 0:
        row[18] = depth / depth_w


@nb.njit(nogil=True, cache=True)
def _stocks(
    lo,
    hi,
    t_at,
    trades,
    o_at,
    orders,
    q_at,
    quotes,
    day,
    hours,
    clock,
    spans,
    has_ids,
    has_orders,
    has_quotes,
    all_flags,
    counts,
    unknown,
    extra,
    out,
):
    """Stocks lo…hi: check rows, drop bad ones, compute their rows."""
    tt, tp, tv, tb, ts, td = trades
    ot, op, ov, od, oi, oa = orders
    qt, qb, qa, qbs, qas, qbad = quotes
    for g in range(lo, hi):
        a, b = t_at[g], t_at[g + 1]
        status = np.zeros(b - a, dtype=np.int8)
        _check_trades(
            tt[a:b],
            tp[a:b],
            tv[a:b],
            tb[a:b],
            ts[a:b],
            td[a:b],
            day,
            hours[0],
            hours[1],
            status,
        )
        for i in range(b - a):
            counts[g, 0, status[i]] += 1
        ok = status == 0
        if counts[g, 0, 0] == b - a:
            t, p, v, buy, sell, side = (
                tt[a:b],
                tp[a:b],
                tv[a:b],
                tb[a:b],
                ts[a:b],
                td[a:b],
            )
        else:
            t, p, v, buy, sell, side = (
                tt[a:b][ok],
                tp[a:b][ok],
                tv[a:b][ok],
                tb[a:b][ok],
                ts[a:b][ok],
                td[a:b][ok],
            )
        oa0, ob0 = o_at[g], o_at[g + 1]
        o_status = np.zeros(ob0 - oa0, dtype=np.int8)
        if ob0 > oa0:
            _check_orders(
                ot[oa0:ob0],
                op[oa0:ob0],
                ov[oa0:ob0],
                od[oa0:ob0],
                oi[oa0:ob0],
                oa[oa0:ob0],
                day,
                hours[0],
                hours[1],
                o_status,
            )
            for i in range(ob0 - oa0):
                counts[g, 1, o_status[i]] += 1
        qa0, qb0 = q_at[g], q_at[g + 1]
        q_status = np.zeros(qb0 - qa0, dtype=np.int8)
        if qb0 > qa0:
            _check_quotes(
                qt[qa0:qb0],
                qb[qa0:qb0],
                qa[qa0:qb0],
                qbad[qa0:qb0],
                day,
                hours[0],
                hours[1],
                spans,
                q_status,
            )
            for i in range(qb0 - qa0):
                counts[g, 2, q_status[i]] += 1
        if len(t) == 0:
            continue
        net = np.zeros(30)
        row = out[g]
        open_amount, any_side = _trade_features(
            t, p, v, buy, sell, side, clock, has_ids, extra[g], row, net
        )
        extra[g, 7] = counts[g, 1, 0]
        extra[g, 8] = counts[g, 2, 0]
        if has_orders and counts[g, 1, 0] > 0:
            good = o_status == 0
            unknown[g] = _order_features(
                ot[oa0:ob0][good],
                op[oa0:ob0][good],
                ov[oa0:ob0][good],
                od[oa0:ob0][good],
                oi[oa0:ob0][good],
                oa[oa0:ob0][good],
                t,
                p,
                v,
                buy,
                sell,
                side,
                clock,
                all_flags[g],
                open_amount,
                any_side,
                net,
                row,
            )
        if has_quotes and counts[g, 2, 0] > 0:
            fine = q_status == 0
            _quote_features(
                qt[qa0:qb0][fine],
                qb[qa0:qb0][fine],
                qa[qa0:qb0][fine],
                qbs[qa0:qb0][fine],
                qas[qa0:qb0][fine],
                spans,
                row,
            )


# -- from tables to kernels


def aggregate_ticks(
    trades: pa.Table | pd.DataFrame,
    orders: pa.Table | pd.DataFrame | None = None,
    quotes: pa.Table | pd.DataFrame | None = None,
    day: Any = None,
    session: str | Session = "a_share",
    publishes_all: bool | str | Sequence[str] = "auto",
    threads: int | None = None,
) -> TickRows:
    """Reduce one day of ticks to one row a stock.

    Parameters
    ----------
    trades, orders, quotes : pyarrow.Table or DataFrame
        Tables of `schema.py`. Rows of one stock should be sorted by time, rows of one
        moment in the exchange's sequence; rows out of order are sorted and counted.
        Of the quotes all levels present are read.
    day : date, optional
        The day, default that of the first trade. Ticks of another day are rejected.
    session : str or Session, default "a_share"
        When the exchange trades.
    publishes_all : {"auto", True, False} or list of str, default "auto"
        Whether `orders` holds orders that were filled at once. "auto": not for
        Shanghai (codes that begin with SH), else yes. A list names the instruments
        for which it does.
    threads : int, optional
        Threads, default all cores the process may use.

    Returns
    -------
    TickRows

    Raises
    ------
    ValueError
        For a missing column, a time zone, or trades most of which lie outside the
        session.
    """
    session = get_session(session)
    labels, t_code, t_cols = _table(trades, "trades")
    rows_in = {"trades": len(t_code)}
    notes: dict[str, Any] = {}
    if day is None:
        good = t_cols[0][t_cols[0] >= 0]
        if not len(good):
            raise ValueError("`day` must be given: no trade has a time.")
        day_number = int(good[0] // _DAY_US)
    else:
        day_number = int(np.datetime64(pd.Timestamp(day), "D").astype(np.int64))
    n = len(labels)
    t_at, t_cols = _by_stock(t_code, n, t_cols, "trades", notes)
    o_at, q_at = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
    o_cols, q_cols = _empty("orders"), _empty("quotes")
    if orders is not None:
        o_labels, o_code, o_cols = _table(orders, "orders")
        rows_in["orders"] = len(o_code)
        o_code, o_cols = _match(labels, o_labels, o_code, o_cols, "orders", notes)
        o_at, o_cols = _by_stock(o_code, n, o_cols, "orders", notes)
    if quotes is not None:
        q_labels, q_code, q_cols = _table(quotes, "quotes")
        rows_in["quotes"] = len(q_code)
        q_code, q_cols = _match(labels, q_labels, q_code, q_cols, "quotes", notes)
        q_at, q_cols = _by_stock(q_code, n, q_cols, "quotes", notes)
    if isinstance(publishes_all, str):
        if publishes_all != "auto":
            raise ValueError(
                "`publishes_all` must be 'auto', true, false or a list of codes, got "
                f"{publishes_all!r}."
            )
        flags = np.array([not str(c).upper().startswith("SH") for c in labels], bool)
    elif isinstance(publishes_all, bool):
        flags = np.full(n, publishes_all)
    else:
        flags = np.isin(labels.astype(str), [str(c) for c in publishes_all])
    hours, clock, spans = _clock(session)
    has_ids = bool((t_cols[3] > 0).any() and (t_cols[4] > 0).any())
    counts = np.zeros((n, 3, _REJECTS), dtype=np.int64)
    unknown = np.zeros(n, dtype=np.int64)
    extra = np.full((n, len(_EXTRA)), np.nan)
    extra[:, 6:_FLOW_AT] = 0
    out = np.full((n, _N), np.nan)
    args = (
        *(t_at, t_cols, o_at, o_cols, q_at, q_cols),
        *(day_number, hours, clock, spans),
        *(has_ids, orders is not None, quotes is not None, flags),
        *(counts, unknown, extra, out),
    )
    _run(n, t_at + o_at + q_at, args, threads)
    total = counts.sum(axis=0)
    _check_clock(total[0], session)
    rejected = {}
    for k, name in enumerate(("trades", "orders", "quotes")):
        rejected[name] = {
            why: int(total[k, c])
            for c, why in TICK_REJECT_REASONS.items()
            if total[k, c]
        }
    if unknown.any():
        notes["cancellations of orders without a row"] = int(unknown.sum())
    keep = extra[:, 6] > 0
    date = np.datetime64(day_number, "D").astype("datetime64[ns]")
    data: dict[str, Any] = {
        "datetime": np.full(int(keep.sum()), date),
        "instrument": labels[keep],
    }
    data.update({k: extra[keep, i] for i, k in enumerate(_EXTRA)})
    data.update({k: out[keep, i] for i, k in enumerate(TICK_NAMES)})
    return TickRows(pd.DataFrame(data), rows_in, rejected, notes)


def _clock(session: Session) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hours in which ticks count, start of post-open and tail, continuous intervals."""

    def us(time) -> int:
        return ((time.hour * 60 + time.minute) * 60 + time.second) * 1_000_000

    first = session.auction[0] if session.auction else session.intervals[0][0]
    close = us(session.intervals[-1][1])
    slack = int(session.slack.total_seconds() * 1_000_000)
    hours = np.array([us(first), close + slack])
    clock = np.array([us(session.intervals[0][0]), close - 30 * _MIN_US])
    spans = [
        (us(start), min(us(end), us(session.continuous_end)))
        for start, end in session.intervals
    ]
    return hours, clock, np.array(spans, dtype=np.int64)


def _run(n: int, at: np.ndarray, args: tuple, threads: int | None) -> None:
    threads = threads or len(os.sched_getaffinity(0))
    if n == 0:
        return
    if threads == 1 or n < 4:
        _stocks(0, n, *args)
        return
    # Blocks of about equal rows: a few stocks hold most of a day's ticks.
    edges = np.searchsorted(at, np.linspace(0, at[-1], 8 * threads + 1))
    edges = np.unique(np.r_[0, edges, n])
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(_stocks, int(lo), int(hi), *args)
            for lo, hi in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()


_INTS = {"volume", "buy_id", "sell_id", "side", "order_id", "action"}
_KERNEL_TYPES = {"side": np.int8, "action": np.int8}


def _table(
    table: pa.Table | pd.DataFrame, name: str
) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Labels, codes and the kernels' arrays of a normalised table."""
    names = table.column_names if isinstance(table, pa.Table) else list(table.columns)
    schema = {"trades": TRADES, "orders": ORDERS}.get(name)
    required = schema.required if schema else ["instrument", "time", "bid_price_1"]
    for column in required:
        if column not in names:
            raise ValueError(
                f"{name} have no column {column!r}; they need {required} and have "
                f"{names[:12]}. Name your columns in a mapping file."
            )
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    labels, code = dictionary_codes(table.column("instrument"))
    when = microseconds(table.column("time"), "time")
    n = len(code)
    if schema is not None:
        cols: list[np.ndarray] = [when]
        for column in schema.names[2:]:
            kind: Any = np.int64 if column in _INTS else np.float64
            kind = _KERNEL_TYPES.get(column, kind)
            if column not in names:
                cols.append(np.zeros(n, dtype=kind))
                continue
            data = table.column(column)
            if not (pa.types.is_integer(data.type) or pa.types.is_floating(data.type)):
                raise ValueError(
                    f"{name}: column {column!r} must hold numbers, got {data.type}; a "
                    "mapping file can say what the codes mean."
                )
            values = data.to_numpy()
            if column in _INTS and values.dtype.kind == "f":
                # An unknown id or volume is 0, an unknown code no code at all.
                fill = 99 if column in ("side", "action") else 0
                values = np.where(np.isfinite(values), values, fill)
            if column in ("side", "action") and values.dtype != np.int8:
                values = np.clip(values, -99, 99)
            cols.append(values.astype(kind, copy=False))
        return labels, code, tuple(cols)
    bid, ask = _level(table, "bid_price_1"), _level(table, "ask_price_1")
    sums = []
    bad = np.zeros(n, dtype=np.int8)
    for side in ("bid", "ask"):
        total = np.zeros(n)
        for column in names:
            if column.startswith(f"{side}_volume_"):
                values = _level(table, column)
                bad[values < 0] = 4
                total += values
        sums.append(total)
    bad[(bid < 0) | (ask < 0)] = 3
    return labels, code, (when, bid, ask, sums[0], sums[1], bad)


def _level(table: pa.Table, column: str) -> np.ndarray:
    if column not in table.column_names:
        raise ValueError(
            f"quotes have no column {column!r}; they have {table.column_names[:12]}. "
            "Name your columns in a mapping file."
        )
    values = table.column(column).to_numpy().astype(np.float64, copy=False)
    return np.nan_to_num(values, nan=0.0) if np.isnan(values).any() else values


def _empty(name: str) -> tuple:
    f, i, b = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int8)
    cols = (i, f, i, b, i, b) if name == "orders" else (i, f, f, f, f, b)
    return tuple(frozen(c) for c in cols)


def _match(
    labels: np.ndarray,
    own: np.ndarray,
    code: np.ndarray,
    cols: tuple,
    name: str,
    notes: dict,
) -> tuple[np.ndarray, tuple]:
    """Codes of `own` labels as codes of the trades' labels; rows of others dropped."""
    where = {label: k for k, label in enumerate(labels)}
    to = np.array([where.get(label, -1) for label in own], dtype=np.int64)
    if len(to) == 0:
        return code.astype(np.int64), cols
    code = to[code]
    if (code < 0).any():
        keep = code >= 0
        notes[f"{name} of stocks without trades"] = int((~keep).sum())
        code, cols = code[keep], tuple(c[keep] for c in cols)
    return code, cols


def _by_stock(
    code: np.ndarray, n: int, cols: tuple, name: str, notes: dict
) -> tuple[np.ndarray, tuple]:
    """Rows grouped by stock and sorted by time, and where each stock starts."""
    when = cols[0]
    if len(code) and (np.diff(code) < 0).any():
        order = np.argsort(code, kind="stable")
        code, cols = code[order], tuple(c[order] for c in cols)
        when = cols[0]
    if len(code):
        late = (np.diff(when) < 0) & (np.diff(code) == 0)
        if late.any():
            notes[f"{name} out of time order (sorted)"] = int(late.sum())
            order = np.lexsort((when, code))
            code, cols = code[order], tuple(c[order] for c in cols)
    at = np.searchsorted(code, np.arange(n + 1))
    return at.astype(np.int64), tuple(frozen(c) for c in cols)


def _check_clock(counts: np.ndarray, session: Session) -> None:
    """Refuse trades whose clock is not the exchange's."""
    total = counts.sum()
    if total >= 20 and counts[2] > 0.5 * total:
        raise ValueError(
            f"{counts[2]} of {total} trades lie outside the session {session.name!r} "
            f"({session.tz}); the times look like another time zone or exchange: set "
            "`tz` in a mapping file, or `session`."
        )
