"""The 20 `l2` features of a stock's day, and the loops that fill them.

See `ticks.py` for the notation. Features and loops share a file: numba keeps what it
has compiled until the file of the outer loop changes.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numba as nb
import numpy as np

from data_handlers.aggregate.features import INF, FeatureSet
from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS, FeatureDef
from data_handlers.compiled import inner

__all__ = [
    "DAY_US",
    "FACTS",
    "FLOW_FEATURES",
    "MIN_US",
    "REJECTS",
    "TICK_FEATURES",
    "TICK_NAMES",
    "TICK_REJECT_REASONS",
    "Clock",
    "Orders",
    "Out",
    "Quotes",
    "Source",
    "Trades",
    "reduce_stocks",
]


_ALL = "close"
_OPEN = "10:00"
_IDS = ("trades' order ids",)
_SIDE = ("trades' side",)
_NO_IDS = "no order ids"
_NO_SIDE = "no aggressor side known"


class _TradeSums(NamedTuple):
    """What the trades of a stock's day come to; amounts in CNY, volumes in shares."""

    total: Any  # amount and volume of all trades
    total_v: Any
    mean: Any  # amount of a trade
    act_buy: Any  # aggressive amounts, NaN without sides
    act_sell: Any
    n_sell: Any
    open_amount: Any  # post-open and tail: amount, and ΣsA
    open_net: Any
    tail_amount: Any
    tail_net: Any
    big_buy: Any  # amounts of large parents, NaN without order ids
    big_sell: Any
    open_big: Any
    big_strength: Any
    buy_hhi: Any
    sell_hhi: Any
    push: Any  # Π(1 + r) over the largest trades
    smart: Any  # vwap of the smartest trades


class _OrderSums(NamedTuple):
    """What the orders of a stock's day come to; all NaN without orders."""

    will: Any  # buy intention of the post-open, NaN without sides
    will_strength: Any
    placed: Any  # volumes
    cancelled: Any
    placed_buy: Any  # amounts
    placed_sell: Any
    unknown: Any  # cancellations of orders without a row


class _QuoteMeans(NamedTuple):
    """Time-weighted means of the quotes; NaN without quotes."""

    spread: Any
    depth: Any


class _Day(NamedTuple):
    """Summary of a stock's day: what the features are functions of."""

    trades: Any
    orders: Any
    quotes: Any


_NO_ORDERS = _OrderSums(*[np.nan] * len(_OrderSums._fields))
_NO_QUOTES = _QuoteMeans(np.nan, np.nan)
_TICK = FeatureSet()
_feature = _TICK.feature


@_feature(
    "l2_big_net",
    "(large buy − large sell)/ΣA",
    "share",
    -1,
    1,
    _NO_IDS,
    needs=_IDS,
)
def _(x):
    return (x.trades.big_buy - x.trades.big_sell) / x.trades.total


@_feature(
    "l2_big_buy", "large buy parents' amount/ΣA", "share", 0, 1, _NO_IDS, needs=_IDS
)
def _(x):
    return x.trades.big_buy / x.trades.total


@_feature(
    "l2_big_sell",
    "large sell parents' amount/ΣA",
    "share",
    0,
    1,
    _NO_IDS,
    needs=_IDS,
)
def _(x):
    return x.trades.big_sell / x.trades.total


@_feature(
    "l2_open_big_net_ratio",
    "(large buy − large sell)/ΣA over post-open trades; large by the whole day",
    "share",
    -1,
    1,
    "no order ids, or no post-open trade",
    needs=_IDS,
)
def _(x):
    return (
        x.trades.open_big / x.trades.open_amount if x.trades.open_amount > 0 else np.nan
    )


@_feature(
    "l2_open_big_net_strength",
    "mean/std of the post-open minutes' large net buy",
    "1",
    -INF,
    INF,
    "no order ids, or all minutes equal",
    needs=_IDS,
)
def _(x):
    return x.trades.big_strength


@_feature(
    "l2_open_buy_will_ratio",
    "(ΣsA + Δ resting buy − Δ resting sell)/ΣA, post-open",
    "share",
    -INF,
    INF,
    "no orders, no side, or no post-open trade",
    known=_OPEN,
    needs=("orders", *_SIDE),
)
def _(x):
    return x.orders.will / x.trades.open_amount if x.trades.open_amount > 0 else np.nan


@_feature(
    "l2_open_buy_will_strength",
    "mean/std of the post-open minutes' buy intention",
    "1",
    -INF,
    INF,
    "no orders, no side, or all minutes equal",
    known=_OPEN,
    needs=("orders", *_SIDE),
)
def _(x):
    return x.orders.will_strength


@_feature("l2_act_buy", "ΣA[s=1]/ΣA", "share", 0, 1, _NO_SIDE, known=_ALL, needs=_SIDE)
def _(x):
    return x.trades.act_buy / x.trades.total


@_feature(
    "l2_act_net_open30",
    "ΣsA/ΣA, post-open",
    "share",
    -1,
    1,
    "no side, or no post-open trade",
    known=_OPEN,
    needs=_SIDE,
)
def _(x):
    return (
        x.trades.open_net / x.trades.open_amount if x.trades.open_amount > 0 else np.nan
    )


@_feature(
    "l2_act_net_last30",
    "ΣsA/ΣA, tail",
    "share",
    -1,
    1,
    "no side, or no tail trade",
    known=_ALL,
    needs=_SIDE,
)
def _(x):
    return (
        x.trades.tail_net / x.trades.tail_amount if x.trades.tail_amount > 0 else np.nan
    )


@_feature("l2_avg_trade", "log(mean A)", "log CNY", -INF, INF, "never")
def _(x):
    return np.log(x.trades.mean)


@_feature(
    "l2_avg_outflow_ratio",
    "mean A[s=−1]/mean A",
    "1",
    0,
    INF,
    "no aggressive sale",
    needs=_SIDE,
)
def _(x):
    return (
        (x.trades.act_sell / x.trades.n_sell) / x.trades.mean
        if x.trades.n_sell > 0
        else np.nan
    )


@_feature(
    "l2_big_push",
    "Π(1+r) − 1 over the 30 % of trades with the largest A",
    "return",
    -1,
    INF,
    "never",
)
def _(x):
    return x.trades.push - 1.0


@_feature("l2_buy_hhi", "Σ(parent/Σ)², buyers", "1", 0, 1, _NO_IDS, needs=_IDS)
def _(x):
    return x.trades.buy_hhi


@_feature("l2_sell_hhi", "Σ(parent/Σ)², sellers", "1", 0, 1, _NO_IDS, needs=_IDS)
def _(x):
    return x.trades.sell_hhi


@_feature(
    "l2_cancel_ratio",
    "cancelled/placed volume",
    "share",
    0,
    INF,
    "no orders, or nothing placed",
    needs=("orders",),
)
def _(x):
    return x.orders.cancelled / x.orders.placed if x.orders.placed > 0 else np.nan


@_feature(
    "l2_order_imb",
    "(buy − sell)/(buy + sell) placed amount",
    "share",
    -1,
    1,
    "no orders, or nothing placed",
    needs=("orders",),
)
def _(x):
    return (
        (x.orders.placed_buy - x.orders.placed_sell)
        / (x.orders.placed_buy + x.orders.placed_sell)
        if x.orders.placed_buy + x.orders.placed_sell > 0
        else np.nan
    )


@_feature(
    "l2_spread",
    "time-weighted (ask₁ − bid₁)/mid",
    "fraction of price",
    0,
    2,
    "no quotes, or never two-sided",
    needs=("quotes",),
)
def _(x):
    return x.quotes.spread


@_feature(
    "l2_depth_imb",
    "time-weighted (Σbid − Σask)/(Σbid + Σask) volume over the levels",
    "share",
    -1,
    1,
    "no quotes",
    needs=("quotes",),
)
def _(x):
    return x.quotes.depth


@_feature(
    "l2_smart",
    "vwap of the 20 % of trades with the largest |r|/sqrt(volume) / day vwap − 1",
    "return",
    -1,
    INF,
    "never",
)
def _(x):
    return x.trades.smart / (x.trades.total / x.trades.total_v) - 1.0


#: The features in the order of their columns.
TICK_FEATURES: tuple[FeatureDef, ...] = tuple(_TICK.definitions)
TICK_NAMES = [f.name for f in TICK_FEATURES]
_fill = _TICK.kernel()

#: The daily flow in the order of its columns.
FLOW_FEATURES = tuple(
    FeatureDef(
        name,
        f"ΣA[s={sign}, parent {size}]",
        "CNY",
        0,
        INF,
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
    9: "price of another level than the stock's trades",
}

REJECTS = len(TICK_REJECT_REASONS) + 1
DAY_US = 86_400_000_000
MIN_US = 60_000_000
_OPEN_MINUTES = 30

FACTS = np.dtype(
    [
        (name, np.float64)
        for name in (
            *("open", "high", "low", "close", "volume", "amount"),
            *("trades", "orders", "quotes"),
        )
    ]
)

_FLOW_BOUNDS = np.array(list(FLOW_CLASSES.values())[:-1])


class Trades(NamedTuple):
    """Columns of `schema.TRADES`; `time` in µs since 1970, negative without one."""

    time: Any
    price: Any
    volume: Any
    buy_id: Any
    sell_id: Any
    side: Any


class Orders(NamedTuple):
    """Columns of `schema.ORDERS` as arrays."""

    time: Any
    price: Any
    volume: Any
    side: Any
    order_id: Any
    action: Any


class Quotes(NamedTuple):
    """Snapshots: best prices, volumes over the levels, why a row is bad (0 = fine)."""

    time: Any
    bid: Any
    ask: Any
    bid_volume: Any
    ask_volume: Any
    bad: Any


class Source(NamedTuple):
    """Tables sorted by stock and time, and the row where each stock starts."""

    trades: Any
    orders: Any
    quotes: Any
    trades_at: Any
    orders_at: Any
    quotes_at: Any
    has_ids: Any
    publishes_all: Any  # of each stock


class Clock(NamedTuple):
    """The day since 1970, and µs since its midnight."""

    day: Any
    first: Any  # ticks count from here …
    last: Any  # … to before here
    open: Any  # start of the post-open, and of the tail
    tail: Any
    spans: Any  # continuous trading, shape (spans, 2)


class Out(NamedTuple):
    """One row a stock, all written."""

    counts: Any  # rows of each table and status
    unknown: Any  # cancellations of orders without a row
    facts: Any
    flow: Any
    values: Any


@inner
def _mixed(key):
    """Spread a number over 64 bits."""
    # Unsigned throughout: compiled signed products must not overflow. Two rounds:
    # order ids are runs of numbers, which one round can map onto runs of slots.
    h = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


@inner
def _slot(mixed, mask):
    return np.int64(mixed & np.uint64(mask))


@inner
def _find(keys, mask, key):
    """Slot of `key` in an open-addressing table, or of the empty slot it belongs to."""
    k = _slot(_mixed(key), mask)
    while keys[k] != 0 and keys[k] != key:
        k = (k + 1) & mask
    return k


@inner
def _capacity(n):
    cap = 16
    while cap < 2 * n:
        cap *= 2
    return cap


@inner
def _part(x, begin, end, use):
    """Rows of a column that `use` marks; an empty `use` means all of them."""
    part = x[begin:end]
    return part[use] if len(use) else part


@inner
def _trades_of(x, begin, end, use):
    return Trades(
        time=_part(x.time, begin, end, use),
        price=_part(x.price, begin, end, use),
        volume=_part(x.volume, begin, end, use),
        buy_id=_part(x.buy_id, begin, end, use),
        sell_id=_part(x.sell_id, begin, end, use),
        side=_part(x.side, begin, end, use),
    )


@inner
def _orders_of(x, begin, end, use):
    return Orders(
        time=_part(x.time, begin, end, use),
        price=_part(x.price, begin, end, use),
        volume=_part(x.volume, begin, end, use),
        side=_part(x.side, begin, end, use),
        order_id=_part(x.order_id, begin, end, use),
        action=_part(x.action, begin, end, use),
    )


@inner
def _quotes_of(x, begin, end, use):
    return Quotes(
        time=_part(x.time, begin, end, use),
        bid=_part(x.bid, begin, end, use),
        ask=_part(x.ask, begin, end, use),
        bid_volume=_part(x.bid_volume, begin, end, use),
        ask_volume=_part(x.ask_volume, begin, end, use),
        bad=_part(x.bad, begin, end, use),
    )


@inner
def _check_time(t, clock):
    """Status of a moment."""
    if t < 0:
        return 7
    if t // 86_400_000_000 != clock.day:
        return 1
    return 0 if clock.first <= t % 86_400_000_000 < clock.last else 2


@inner
def _open_minute(t, clock):
    """Minute of the post-open, -1 outside."""
    s = t % 86_400_000_000
    m = (s - clock.open) // 60_000_000
    return m if s >= clock.open and m < _OPEN_MINUTES else -1


@inner
def _check_trades(x, clock, status):
    """Status of one stock's trades; duplicates share moment, ids, price and volume."""
    n = len(x.time)
    cap = _capacity(n)
    rows = np.full(cap, -1, dtype=np.int64)
    for i in range(n):
        status[i] = _check_time(x.time[i], clock)
        if status[i] != 0:
            continue
        if not (x.price[i] > 0):
            status[i] = 3
        elif x.volume[i] <= 0:
            status[i] = 4
        elif not (-1 <= x.side[i] <= 1):
            status[i] = 6
        elif x.buy_id[i] > 0 and x.sell_id[i] > 0:
            # Reports without both ids may be equal and still be two trades.
            ids = _mixed(_mixed(x.buy_id[i]) ^ np.uint64(x.sell_id[i]))
            k = _slot(ids, cap - 1)
            while rows[k] >= 0:
                j = rows[k]
                if (
                    x.buy_id[i] == x.buy_id[j]
                    and x.sell_id[i] == x.sell_id[j]
                    and x.time[i] == x.time[j]
                    and x.price[i] == x.price[j]
                    and x.volume[i] == x.volume[j]
                ):
                    status[i] = 5
                    break
                k = (k + 1) & (cap - 1)
            else:
                rows[k] = i


@inner
def _check_orders(x, clock, status):
    """Status of one stock's orders; an id is placed, and cancelled, once a moment."""
    n = len(x.time)
    cap = _capacity(n)
    rows = np.full(cap, -1, dtype=np.int64)
    for i in range(n):
        status[i] = _check_time(x.time[i], clock)
        if status[i] != 0:
            continue
        side, action = x.side[i], x.action[i]
        if x.price[i] < 0:
            status[i] = 3
        elif x.volume[i] <= 0:
            status[i] = 4
        elif (action != 1 and action != -1) or (
            side != 1 and side != -1 and not (side == 0 and action == -1)
        ):
            status[i] = 6
        elif x.order_id[i] > 0:
            k = _slot(_mixed(x.order_id[i]), cap - 1)
            while rows[k] >= 0:
                j = rows[k]
                if (
                    x.order_id[i] == x.order_id[j]
                    and action == x.action[j]
                    and x.time[i] == x.time[j]
                    and x.volume[i] == x.volume[j]
                ):
                    status[i] = 5
                    break
                k = (k + 1) & (cap - 1)
            else:
                rows[k] = i


@inner
def _check_quotes(x, clock, status):
    """Status of one stock's snapshots."""
    n = len(x.time)
    for i in range(n):
        status[i] = _check_time(x.time[i], clock)
        if status[i] != 0:
            continue
        if x.bad[i] != 0:
            status[i] = x.bad[i]
        elif x.bid[i] > 0 and x.ask[i] > 0 and x.bid[i] >= x.ask[i]:
            # In an auction the book crosses by design.
            s = x.time[i] % 86_400_000_000
            for k in range(len(clock.spans)):
                if clock.spans[k, 0] <= s < clock.spans[k, 1]:
                    status[i] = 8
    # Of one moment the last usable snapshot stays.
    later = np.int64(-1)
    for i in range(n - 1, -1, -1):
        if status[i] == 0:
            if x.time[i] == later:
                status[i] = 5
            later = x.time[i]


@inner
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


@inner
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


@inner
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


@inner
def _hhi(keys, sums):
    total = 0.0
    square = 0.0
    for k in range(len(keys)):
        if keys[k] != 0:
            total += sums[k]
            square += sums[k] * sums[k]
    return square / (total * total) if total > 0 else np.nan


@inner
def _largest(x, k):
    """Mask of the k largest of x; of ties the earlier count."""
    least = _kth_largest(x.copy(), k)
    ties = k - (x > least).sum()
    take = np.empty(len(x), dtype=np.bool_)
    for i in range(len(x)):
        take[i] = x[i] > least
        if x[i] == least and ties > 0:
            take[i] = True
            ties -= 1
    return take


@inner
def _add_flow(side, amount, b_slot, b_sums, s_slot, s_sums, flow):
    """Add each trade to its aggressor's side and parent's class."""
    classes = len(_FLOW_BOUNDS) + 1
    flow[:] = 0.0
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
        flow[(0 if side[i] == 1 else classes) + c] += amount[i]


@inner
def _trade_sums(x, clock, has_ids, net, facts, flow):
    """Sum what trades alone decide; `net` gets ΣsA of each minute of the post-open."""
    n = len(x.time)
    amount = np.empty(n)
    total = total_v = act_buy = act_sell = 0.0
    open_amount = open_net = tail_amount = tail_net = 0.0
    n_sell = 0
    high, low = -np.inf, np.inf
    any_side = False
    for i in range(n):
        a, side = x.price[i] * x.volume[i], x.side[i]
        amount[i] = a
        total += a
        total_v += x.volume[i]
        high, low = max(high, x.price[i]), min(low, x.price[i])
        if side == 1:
            act_buy += a
            any_side = True
        elif side == -1:
            act_sell += a
            n_sell += 1
            any_side = True
        m = _open_minute(x.time[i], clock)
        if m >= 0:
            open_amount += a
            open_net += side * a
            net[m] += side * a
        if x.time[i] % 86_400_000_000 >= clock.tail:
            tail_amount += a
            tail_net += side * a
    facts.open, facts.close = x.price[0], x.price[n - 1]
    facts.high, facts.low = high, low
    facts.volume, facts.amount, facts.trades = total_v, total, n
    big_buy = big_sell = open_big = big_strength = buy_hhi = sell_hhi = np.nan
    if has_ids:
        b_slot = np.empty(n, dtype=np.int64)
        s_slot = np.empty(n, dtype=np.int64)
        b_keys, b_sums = _parents(x.buy_id, amount, b_slot)
        s_keys, s_sums = _parents(x.sell_id, amount, s_slot)
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
            big_buy = big_sell = open_big = 0.0
            minute = np.zeros(_OPEN_MINUTES)
            for i in range(n):
                move = 0.0
                if b_slot[i] >= 0 and b_sums[b_slot[i]] > large:
                    big_buy += amount[i]
                    move += amount[i]
                if s_slot[i] >= 0 and s_sums[s_slot[i]] > large:
                    big_sell += amount[i]
                    move -= amount[i]
                m = _open_minute(x.time[i], clock)
                if m >= 0:
                    open_big += move
                    minute[m] += move
            big_strength = _strength(minute)
            if any_side:
                _add_flow(x.side, amount, b_slot, b_sums, s_slot, s_sums, flow)
            buy_hhi = _hhi(b_keys, b_sums)
            sell_hhi = _hhi(s_keys, s_sums)
    push = 1.0
    take = _largest(amount, (3 * n + 9) // 10)
    for i in range(1, n):
        if take[i]:
            push *= 1.0 + (x.price[i] / x.price[i - 1] - 1.0)
    smart = np.zeros(n)
    for i in range(1, n):
        move = abs(x.price[i] / x.price[i - 1] - 1.0)
        smart[i] = move / np.sqrt(np.float64(x.volume[i]))
    take = _largest(smart, (n + 4) // 5)
    smart_a = smart_v = 0.0
    for i in range(n):
        if take[i]:
            smart_a += amount[i]
            smart_v += x.volume[i]
    if not any_side:
        act_buy = act_sell = open_net = tail_net = np.nan
    return _TradeSums(
        total=total,
        total_v=total_v,
        mean=total / n,
        act_buy=act_buy,
        act_sell=act_sell,
        n_sell=n_sell,
        open_amount=open_amount,
        open_net=open_net,
        tail_amount=tail_amount,
        tail_net=tail_net,
        big_buy=big_buy,
        big_sell=big_sell,
        open_big=open_big,
        big_strength=big_strength,
        buy_hhi=buy_hhi,
        sell_hhi=sell_hhi,
        push=push,
        smart=smart_a / smart_v,
    )


@inner
def _order_sums(x, trades, clock, publishes_all, has_side, net):
    """Sum what needs orders; `net` is ΣsA of each minute of the post-open."""
    n, nt = len(x.time), len(trades.time)
    cap = _capacity(n)
    keys = np.zeros(cap, dtype=np.int64)
    value = np.zeros(cap)  # CNY/share that the order is valued at
    sides = np.zeros(cap, dtype=np.int8)
    will = net.copy()
    placed = cancelled = placed_buy = placed_sell = unknown = 0.0
    j = 0
    for i in range(n):
        m = _open_minute(x.time[i], clock)
        while j < nt and trades.time[j] < x.time[i]:
            j += 1
        p, d, oid = x.price[i], x.side[i], x.order_id[i]
        if x.action[i] == 1:
            if not (p > 0):
                p = trades.price[max(j - 1, 0)]
            if oid > 0:
                k = _find(keys, cap - 1, oid)
                keys[k] = oid
                value[k] = p
                sides[k] = d
            placed += x.volume[i]
            if d == 1:
                placed_buy += p * x.volume[i]
            else:
                placed_sell += p * x.volume[i]
            if m >= 0:
                will[m] += d * p * x.volume[i]
        else:
            cancelled += x.volume[i]
            if oid > 0 and (not (p > 0) or d == 0):
                k = _find(keys, cap - 1, oid)
                if keys[k] != 0:
                    p = p if p > 0 else value[k]
                    d = sides[k]
            if not (p > 0 and d != 0):
                unknown += 1
            elif m >= 0:
                will[m] -= d * p * x.volume[i]
    for i in range(nt):
        d = trades.side[i]
        if d == 0:
            # Auction: both orders rested before, and both leave the book.
            continue
        v = trades.volume[i]
        a = trades.price[i] * v
        m = _open_minute(trades.time[i], clock)
        # The passive order leaves the other side of the book.
        if m >= 0:
            will[m] += d * a
        more = 0.0
        if publishes_all:
            # The aggressor's order row said volume × limit for this part as well:
            # it never rested, and it was worth its trade price.
            own = trades.buy_id[i] if d == 1 else trades.sell_id[i]
            if own > 0:
                k = _find(keys, cap - 1, own)
                if keys[k] != 0:
                    more = a - value[k] * v
                    if m >= 0:
                        will[m] -= d * value[k] * v
        else:
            placed += v
            more = a
        if d == 1:
            placed_buy += more
        else:
            placed_sell += more
    return _OrderSums(
        will=will.sum() if has_side else np.nan,
        will_strength=_strength(will) if has_side else np.nan,
        placed=placed,
        cancelled=cancelled,
        placed_buy=placed_buy,
        placed_sell=placed_sell,
        unknown=unknown,
    )


@inner
def _quote_means(x, clock):
    spread = spread_w = depth = depth_w = 0.0
    for i in range(len(x.time) - 1):
        start, end = x.time[i] % 86_400_000_000, x.time[i + 1] % 86_400_000_000
        w = 0.0
        for k in range(len(clock.spans)):
            w += max(0, min(end, clock.spans[k, 1]) - max(start, clock.spans[k, 0]))
        if w <= 0:
            continue
        if x.bid[i] > 0 and x.ask[i] > x.bid[i]:
            spread += w * (x.ask[i] - x.bid[i]) / (0.5 * (x.ask[i] + x.bid[i]))
            spread_w += w
        both = x.bid_volume[i] + x.ask_volume[i]
        if both > 0:
            depth += w * (x.bid_volume[i] - x.ask_volume[i]) / both
            depth_w += w
    return _QuoteMeans(
        spread=spread / spread_w if spread_w > 0 else np.nan,
        depth=depth / depth_w if depth_w > 0 else np.nan,
    )


@inner
def _count(status, counts):
    """Count each status; mask of the usable rows, empty where all are."""
    for i in range(len(status)):
        counts[status[i]] += 1
    return status[:0] == 0 if counts[0] == len(status) else status == 0


@nb.njit(nogil=True, cache=True)
def reduce_stocks(first, last, source, clock, out):
    """Check and reduce stocks first…last to one row each."""
    nothing = np.zeros(0, dtype=np.bool_)
    for g in range(first, last):
        counts = out.counts[g]
        a, b = source.trades_at[g], source.trades_at[g + 1]
        trades = _trades_of(source.trades, a, b, nothing)
        status = np.empty(b - a, dtype=np.int8)
        _check_trades(trades, clock, status)
        trades = _trades_of(source.trades, a, b, _count(status, counts[0]))
        a, b = source.orders_at[g], source.orders_at[g + 1]
        orders = _orders_of(source.orders, a, b, nothing)
        status = np.empty(b - a, dtype=np.int8)
        _check_orders(orders, clock, status)
        orders = _orders_of(source.orders, a, b, _count(status, counts[1]))
        a, b = source.quotes_at[g], source.quotes_at[g + 1]
        quotes = _quotes_of(source.quotes, a, b, nothing)
        status = np.empty(b - a, dtype=np.int8)
        _check_quotes(quotes, clock, status)
        quotes = _quotes_of(source.quotes, a, b, _count(status, counts[2]))
        if counts[0, 0] == 0:
            continue
        net = np.zeros(_OPEN_MINUTES)
        traded = _trade_sums(
            trades, clock, source.has_ids, net, out.facts[g], out.flow[g]
        )
        ordered, quoted = _NO_ORDERS, _NO_QUOTES
        out.facts[g].orders, out.facts[g].quotes = counts[1, 0], counts[2, 0]
        if counts[1, 0] > 0:
            everything, has_side = source.publishes_all[g], traded.act_buy >= 0
            ordered = _order_sums(orders, trades, clock, everything, has_side, net)
            out.unknown[g] = ordered.unknown
        if counts[2, 0] > 0:
            quoted = _quote_means(quotes, clock)
        _fill(_Day(trades=traded, orders=ordered, quotes=quoted), out.values[g])
