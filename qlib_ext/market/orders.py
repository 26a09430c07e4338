r"""Orders, aggressors and quotes around the trades of one stock-day.

The tape is given (`tape.py`); this module says who wanted those trades. Ids ascend with
the time of placing and are unique within a stock-day. As on the real exchanges,
Shenzhen publishes every order and Shanghai none that is filled at once.

- Trades of one moment are one sweep and share their aggressor's order. The aggressor's
  side follows the price move, the day's mood and the `tick` state.
- The passive side rests at the trade's price since a moment after which no trade went
  through that price. Some rest is left over and taken back before the next trade.
- Orders that never trade lie outside the day's range, so no trade passes them by; most
  are cancelled later.
- Snapshots show the last price at the touch, a spread of one to a few ticks, and
  depths that lean with the `tick` state; the side beyond a price limit is empty. The
  book is drawn, not matched: levels beyond the touch are not the sum of the orders.

Footprint of the `tick` alpha: for a high state more trades, large ones above all, are
buyer initiated, more waiting orders are bids, and the bid side of the book is deeper.
None of it moves a price, a volume or the time of a trade.
"""

import numpy as np

from data_handlers.compiled import inner

__all__ = ["LEVELS", "draw_orders", "draw_quotes"]

LEVELS = 5
_AT_ONCE = 2  # action of an order that meets resting ones, until it is numbered
_OPEN_AUCTION = -900_000  # 09:15 in session milliseconds
_CONTINUOUS_END = 14_220_000  # continuous trading ends at 14:57


@inner
def _exp(mean):
    return -mean * np.log(1 - np.random.random())


@inner
def _logistic(x):
    return 1 / (1 + np.exp(-x))


@inner
def draw_orders(key, n, tape, bounds, state, traits, publishes_all, trade, order):
    """Draw sides and orders of one stock-day.

    Parameters
    ----------
    key : uint32
        The stream's seed.
    n : int
        Number of trades.
    tape : tuple of (ms, price, lots)
        The trades.
    bounds : tuple of (high, low, up, down)
        Range of the day and price limits, cents; limits of 0 are none.
    state : float
        State of the tick alpha.
    traits : tuple of (pressure, size)
        How strongly buyers press, and how much more the large ones do; 0 for none.
    publishes_all : bool
        False leaves out orders that are filled at once.
    trade : tuple of (side, buy, sell)
        Result: aggressor's side and order ids of each trade.
    order : tuple of (ms, price, lots, side, id, action)
        Result: messages sorted by time, a placing before its trade or cancellation.

    Returns
    -------
    int
        Number of messages.
    """
    ms, price, lots = tape
    high, low, up, down = bounds
    side, buy, sell = trade
    o_ms, o_price, o_lots, o_side, o_id, o_action = order
    np.random.seed(key)
    mood = 0.35 * np.random.normal(0.0, 1.0) + 0.28 * state + 0.9 * traits[0]
    total = 0
    for i in range(n):
        total += lots[i]
    mean = total / n
    m = 0  # messages so far; an order is known by the slot of its placing

    # the auctions: one order a side, no aggressor
    for i in (0, n - 1):
        side[i] = 0
        start = _OPEN_AUCTION if i == 0 else _CONTINUOUS_END
        for s in (1, -1):
            at = start + int(np.random.random() * (ms[i] - start))
            m = _message(order, m, at, price[i], lots[i], s, m, 1)
            if s > 0:
                buy[i] = m - 1
            else:
                sell[i] = m - 1

    i = 1
    while i < n - 1:
        j = i
        size = lots[i]
        while j + 1 < n - 1 and ms[j + 1] == ms[i]:
            j += 1
            size += lots[j]
        move = price[j] - price[i] if price[j] != price[i] else price[i] - price[i - 1]
        lean = 1.3 * np.sign(move) + mood
        if size > 1.5 * mean:
            lean += 0.35 * state + 0.8 * traits[1]
        else:
            lean -= 0.8 * traits[1]
        s = 1 if np.random.random() < _logistic(lean) else -1
        after = ms[j + 1]
        limit = price[i]
        for k in range(i, j + 1):
            side[k] = s
            limit = max(limit, price[k]) if s > 0 else min(limit, price[k])
            m = _passive(tape, k, -s, after, order, m, buy if s < 0 else sell)
        m = _message(order, m, ms[i], limit, size, s, m, _AT_ONCE)
        for k in range(i, j + 1):
            if s > 0:
                buy[k] = m - 1
            else:
                sell[k] = m - 1
        i = j + 1

    lean = 0.4 * np.random.normal(0.0, 1.0) + 0.45 * state
    width = 2 + 0.3 * (high - low)
    for _ in range(int(0.6 * n)):
        s = 1 if np.random.random() < _logistic(lean) else -1
        away = 1 + int(_exp(width))
        at = ms[np.random.randint(1, n - 1)] + int(_exp(5000))
        size = 1 + int(mean * np.exp(0.8 * np.random.normal(0.0, 1.0)))
        wait = int(_exp(600_000))
        stays = np.random.random() < 0.4
        p = low - away if s > 0 else high + away
        if p < max(down, 1) or (up > 0 and p > up) or at >= _CONTINUOUS_END:
            continue
        m = _message(order, m, at, p, size, s, m, 1)
        if not stays and at + wait < _CONTINUOUS_END:
            m = _message(order, m, at + wait + 1, p, size, s, m - 1, -1)

    # number the orders by time and translate slots into ids
    rank = np.argsort(o_ms[:m], kind="mergesort")
    ident = np.zeros(m, dtype=np.int64)
    copy = np.empty((m, 6), dtype=np.int64)
    count = shown = 0
    for r in rank:
        if o_action[r] != -1:
            count += 1
            ident[r] = count
        if o_action[r] == _AT_ONCE and not publishes_all:
            continue
        copy[shown, 0], copy[shown, 1], copy[shown, 2] = o_ms[r], o_price[r], o_lots[r]
        copy[shown, 3], copy[shown, 4] = o_side[r], o_id[r]
        copy[shown, 5] = -1 if o_action[r] == -1 else 1
        shown += 1
    for k in range(shown):
        o_ms[k], o_price[k], o_lots[k] = copy[k, 0], copy[k, 1], copy[k, 2]
        o_side[k], o_action[k] = copy[k, 3], copy[k, 5]
        o_id[k] = ident[copy[k, 4]]
    for k in range(n):
        buy[k], sell[k] = ident[buy[k]], ident[sell[k]]
    return shown


@inner
def _message(order, m, at, price, lots, side, slot, action):
    """Append a message; return the new count."""
    o_ms, o_price, o_lots, o_side, o_id, o_action = order
    o_ms[m], o_price[m], o_lots[m] = at, price, lots
    o_side[m], o_id[m], o_action[m] = side, slot, action
    return m + 1


@inner
def _passive(tape, k, s, after, order, m, own):
    """Place the resting order that trade `k` meets; return the new count."""
    ms, price, lots = tape
    o_lots = order[2]
    # the order of the trade before may have been larger: same side, same price, no
    # cancellation, another moment (two fills of one sweep would be one trade)
    if (
        k > 1
        and ms[k] > ms[k - 1]
        and price[k] == price[k - 1]
        and own[k - 1] > 0
        and order[3][own[k - 1]] == s
        and order[0][own[k - 1]] < ms[k - 1]
        and own[k - 1] + 1 < m
        and order[5][own[k - 1] + 1] != -1
        and np.random.random() < 0.3
    ):
        own[k] = own[k - 1]
        o_lots[own[k]] += lots[k]
        return m
    lag = int(_exp(90_000))
    earliest = max(0, ms[k] - lag)
    j = k - 1
    while j >= 0 and ms[j] >= earliest:
        if (price[k] - price[j]) * s > 0:  # a trade went through this price
            earliest = ms[j] + 1 if ms[j] < ms[k] else ms[k]
            break
        j -= 1
    at = earliest + int(np.random.random() * (ms[k] - earliest))
    more = 0
    if np.random.random() < 0.2 and after > ms[k] + 1:
        more = 1 + int(_exp(0.6 * lots[k]))
    own[k] = m
    m = _message(order, m, at, price[k], lots[k] + more, s, m, 1)
    if more > 0:
        gone = (
            ms[k]
            + 1
            + int(np.random.random() * (min(after, _CONTINUOUS_END) - ms[k] - 1))
        )
        m = _message(order, m, gone, price[k], more, s, own[k], -1)
    return m


@inner
def draw_quotes(n, tape, side, bounds, state, every_ms, quote_ms, prices, volumes):
    """Draw snapshots of the book; continues the stream of `draw_orders`.

    Parameters
    ----------
    n, tape, side, bounds, state
        As in `draw_orders`.
    every_ms : int
        Time between snapshots.
    quote_ms : ndarray
        Result: session milliseconds.
    prices, volumes : ndarray, shape (snapshots, 2, levels)
        Result: cents and shares, bids then asks; an empty level is 0.

    Returns
    -------
    int
        Number of snapshots.
    """
    ms, price, lots = tape
    _, _, up, down = bounds
    total = 0
    for i in range(n):
        total += lots[i]
    size = 3 * total / n
    lean = 0.35 * np.random.normal(0.0, 1.0) + 0.28 * state
    levels = prices.shape[2]
    k, last = 0, 0
    at = 0
    while at < _CONTINUOUS_END:
        while last + 1 < n - 1 and ms[last + 1] <= at:
            last += 1
        p = price[last]
        spread = 1
        while spread < 5 and np.random.random() < 0.25:
            spread += 1
        tilt = lean + 0.4 * np.random.normal(0.0, 1.0)
        bid = p - spread if side[last] > 0 else p
        ask = p if side[last] > 0 else p + spread
        if up > 0 and p >= up:
            bid = p
            ask = up + 1  # beyond the limit: empty
        elif down > 0 and p <= down:
            ask = p
            bid = down - 1
        quote_ms[k] = at
        for level in range(levels):
            for s in range(2):
                q = bid - level if s == 0 else ask + level
                v = size * np.exp(0.5 * np.random.normal(0.0, 1.0))
                v *= np.exp(0.5 * tilt if s == 0 else -0.5 * tilt)
                inside = q >= max(down, 1) if s == 0 else (up == 0 or q <= up)
                prices[k, s, level] = q if inside else 0
                volumes[k, s, level] = 100 * (1 + int(v)) if inside else 0
        k += 1
        at += every_ms
    return k
