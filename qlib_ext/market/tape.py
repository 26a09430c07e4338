r"""The trades of one stock-day, drawn so that they add up to its day bar.

A day bar is given first (open, high, low, close in cents, volume in lots, amount in
CNY). Everything finer is filled in below it, so whatever the intraday data show beyond
the bar is independent of the bar by construction. Minute bars are sums over these
trades, orders and quotes are built around them: all levels agree to the unit.

Steps, all from one stream per (seed, stock, day):

1. Number and times of trades: one in each auction, the others with the U-shaped
   intensity of a session; about a third follow their predecessor at once (sweeps).
2. Prices: Brownian bridges through knots (open, the trades that make high and low, the
   price at 14:30, close), folded into [low, high] and rounded to the cent.
3. Lots: log-normal weights, tilted exponentially in price until the mean price is the
   day's vwap, rounded to whole lots; what rounding leaves of the amount is removed by
   moving single lots between trades.

Footprint of the `minute` alpha: for a high state the last half-hour rises (and the
hours before it fall by as much, since open and close are given), and volume moves from
the first half-hour to the last.
"""

import numba as nb
import numpy as np

from data_handlers.compiled import inner

__all__ = ["TRADE_TIMES", "clock_us", "draw_trades", "most_trades", "stream_keys"]

SESSION_SECONDS = 14_400  # 09:30-11:30 and 13:00-15:00
_AUCTION = SESSION_SECONDS - 180  # the closing auction starts at 14:57

_GRID = np.linspace(0.0, _AUCTION, 1185)
_DENSITY = 1 + 1.8 * np.exp(-_GRID / 1500) + 0.8 * np.exp((_GRID - _AUCTION) / 1300)
_CDF = np.concatenate([[0.0], np.cumsum((_DENSITY[1:] + _DENSITY[:-1]) / 2)])
_CDF /= _CDF[-1]
TRADE_TIMES = np.interp(np.linspace(0, 1, 2049), _CDF, _GRID)
"""Quantiles of the time of a trade, seconds of the session."""


def stream_keys(
    seed: int, purpose: int, stock: np.ndarray, day: np.ndarray
) -> np.ndarray:
    """Return the 32-bit seed of each stock-day's stream.

    Parameters
    ----------
    seed : int
        The market's seed.
    purpose : int
        1 trades, 2 orders and quotes.
    stock, day : ndarray of int
        Number of the stock in the universe, and days since 1970.
    """
    x = np.full(np.shape(stock), seed * 2 + purpose, dtype=np.uint64)
    for part in (stock, day):
        x = _mix(_mix(x) ^ np.asarray(part).astype(np.uint64))
    return (x >> np.uint64(32)).astype(np.uint32)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@nb.njit(cache=True)
def most_trades(mean_trades):
    """Return the most trades a stock-day can have."""
    return int(4 * mean_trades) + 8


@nb.njit(cache=True)
def clock_us(ms):
    """Microseconds of the day of a session time in milliseconds.

    Session time runs from 0 at 09:30 without the lunch break; -300,000 is the opening
    auction at 09:25. The break's moment belongs to the afternoon.
    """
    us = 34_200_000_000 + ms * 1000
    if ms >= 7_200_000:
        us += 5_400_000_000
    return us


@inner
def _fold(x, low, high):
    """Reflect x into [low, high]."""
    width = high - low
    y = (x - low) % (2 * width)
    if y > width:
        y = 2 * width - y
    return low + y


@inner
def _tilt(weight, price, n, target, mid, width):
    """Multiply weights by exp(theta * price) until the mean price is the target.

    Newton steps inside a bracket; the mean rises with theta, so the root is unique.
    """
    low, high, theta = -60.0, 60.0, 0.0
    for _ in range(60):
        w0 = w1 = w2 = 0.0
        for i in range(n):
            x = (price[i] - mid) / width
            w = weight[i] * np.exp(theta * x)
            w0 += w
            w1 += w * x
            w2 += w * x * x
        mean = w1 / w0
        gap = mean - (target - mid) / width
        if abs(gap) < 1e-10:
            break
        if gap > 0:
            high = theta
        else:
            low = theta
        slope = w2 / w0 - mean * mean
        step = theta - gap / slope if slope > 1e-12 else 2 * high
        theta = step if low < step < high else 0.5 * (low + high)
    total = 0.0
    for i in range(n):
        weight[i] *= np.exp(theta * (price[i] - mid) / width)
        total += weight[i]
    return total


@inner
def _settle(price, lots, fixed, n, low, high, due):
    """Bring the amount to the unit: `due` is what is missing. True when done."""
    for _ in range(4 * n):
        if due == 0:
            return True
        # whole moves first: from the far end of the price range to the other
        best, source, dest = 0, -1, -1
        for i in range(n):
            if lots[i] > 1:
                far = high - price[i] if due > 0 else price[i] - low
                if far > best and far <= abs(due):
                    best, source = far, i
        if source >= 0:
            edge = high if due > 0 else low
            for j in range(n):
                if price[j] == edge:
                    dest = j
                    break
            count = min(abs(due) // best, (lots[source] - 1 + 1) // 2)
            count = max(count, 1)
            lots[source] -= count
            lots[dest] += count
            due -= count * best if due > 0 else -count * best
            continue
        # then one pair whose prices differ by exactly what is missing
        for i in range(n):
            if lots[i] < 2:
                continue
            for j in range(n):
                if price[j] - price[i] == due:
                    lots[i] -= 1
                    lots[j] += 1
                    return True
        # or a trade of few lots at a slightly different price
        choice, move = -1, high - low + 1
        for i in range(n):
            if not fixed[i] and due % lots[i] == 0:
                step = due // lots[i]
                if low <= price[i] + step <= high and abs(step) < move:
                    choice, move = i, abs(step)
        if choice >= 0:
            price[choice] += due // lots[choice]
            return True
        # no luck: shift one lot at random and look again
        i, j = np.random.randint(0, n), np.random.randint(0, n)
        if lots[i] > 1:
            lots[i] -= 1
            lots[j] += 1
            due -= price[j] - price[i]
    return due == 0


@inner
def _plain(o, h, low, c, volume, amount, ms, price, lots):
    """Write five trades that exist for every day bar, for want of better."""
    rest = volume - 5
    room = amount - (o + h + low + c)
    # one of them is one lot at what is left between whole lots at high and at low
    top = (room - (rest + 1) * low) // (h - low)
    odd = room - top * h - (rest - top) * low
    quotes = (o, h, low, odd, c)
    for i in range(5):
        price[i] = quotes[i]
        lots[i] = 1
        ms[i] = 2_000_000 * i
    lots[1] += top
    lots[2] += rest - top
    ms[0], ms[4] = -300_000, 14_400_000
    return 5


@nb.njit(cache=True)
def draw_trades(key, o, h, low, c, volume, amount, mean_trades, state, inverse, out):
    """Draw the trades of one stock-day.

    Parameters
    ----------
    key : uint32
        The stream's seed.
    o, h, low, c, volume, amount : int
        The day bar: cents, lots, CNY.
    mean_trades : float
        Expected number of trades.
    state : float
        State of the minute alpha.
    inverse : ndarray
        Quantiles of trade times, seconds of the session.
    out : tuple of (ms, price, lots, weight, fixed)
        Scratch arrays of at least ``most_trades(mean_trades)`` values; the first three
        hold the result: session milliseconds (see `clock_us`), cents, lots.

    Returns
    -------
    int
        Number of trades.
    """
    ms, price, lots, weight, fixed = out
    np.random.seed(key)
    n = int(mean_trades * np.exp(0.25 * np.random.normal(0.0, 1.0)))
    n = max(8, min(n, min(most_trades(mean_trades), volume // 2)))

    # 1. times: order statistics of the intensity, a third of them sweeps
    total = 0.0
    for i in range(1, n - 1):
        if i == 1 or np.random.random() > 0.33:
            total += -np.log(1 - np.random.random())
        weight[i] = total
    total += -np.log(1 - np.random.random())
    for i in range(1, n - 1):
        at = weight[i] / total * (len(inverse) - 1)
        k = min(int(at), len(inverse) - 2)
        second = inverse[k] + (at - k) * (inverse[k + 1] - inverse[k])
        ms[i] = int(1000 * second)
    ms[0], ms[n - 1] = -300_000, 1000 * 14_400

    # 2. prices
    for i in range(n):
        fixed[i] = False
    width = h - low
    price[0], price[n - 1] = o, c
    fixed[0] = fixed[n - 1] = True
    if width == 0:
        for i in range(n):
            price[i] = o
    else:
        drift = (c - o) / width
        top = 1 + int((n - 2) * np.random.random() ** np.exp(-1.2 * drift))
        bottom = 1 + int((n - 2) * np.random.random() ** np.exp(1.2 * drift))
        top, bottom = min(top, n - 2), min(bottom, n - 2)
        if top == bottom:
            bottom = top + 1 if top < n - 2 else top - 1
        if h > max(o, c):
            price[top], fixed[top] = h, True
        if low < min(o, c):
            price[bottom], fixed[bottom] = low, True
        late = n - 1
        while late > 1 and ms[late - 1] >= 12_600_000:
            late -= 1
        noise = np.random.normal(0.0, 1.0)
        if 1 < late < n - 1 and not fixed[late - 1]:
            x = c + width * (0.17 * noise - 0.15 * state)
            price[late - 1] = round(min(max(x, low), h))
            fixed[late - 1] = True
        step = width / 1.6 / np.sqrt(n)
        begin, x = 0, float(o)
        while begin < n - 1:
            end = begin + 1
            while not fixed[end]:
                end += 1
            for i in range(begin + 1, end):
                left = end - i
                x += (price[end] - x) / (left + 1)
                x += step * np.sqrt(left / (left + 1.0)) * np.random.normal(0.0, 1.0)
                x = _fold(x, float(low), float(h))
                price[i] = round(x)
            begin, x = end, float(price[end])

    # 3. lots
    for i in range(n):
        w = np.exp(0.8 * np.random.normal(0.0, 1.0))
        if i == 0:
            w *= 0.01 * n
        elif i == n - 1:
            w *= 0.015 * n
        if ms[i] < 1_800_000:
            w *= np.exp(-0.16 * state)
        elif ms[i] >= 12_600_000:
            w *= np.exp(0.16 * state)
        weight[i] = w
    if width == 0:
        total = 0.0
        for i in range(n):
            total += weight[i]
    else:
        # every trade has one lot; the others carry what is left of the amount
        base = 0
        for i in range(n):
            base += price[i]
        target = (amount - base) / (volume - n)
        mid = 0.5 * (h + low)
        target = min(max(target, low + 0.001 * width), h - 0.001 * width)
        total = _tilt(weight, price, n, target, mid, width)
    spare, used, cumulative = volume - n, 0, 0.0
    sum_amount = 0
    for i in range(n):
        cumulative += weight[i] / total * spare
        upto = int(cumulative + 0.5) if i < n - 1 else spare
        upto = min(max(upto, used), spare)
        lots[i] = 1 + upto - used
        used = upto
        sum_amount += lots[i] * price[i]
    if width > 0 and not _settle(price, lots, fixed, n, low, h, amount - sum_amount):
        n = _plain(o, h, low, c, volume, amount, ms, price, lots)
    return n
