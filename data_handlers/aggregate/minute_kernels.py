"""The 22 `ms` features of a stock's day, and the loops that fill them.

See `minute.py` for the notation. Features and loops share a file: numba keeps what it
has compiled until the file of the outer loop changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np

from data_handlers.aggregate.features import INF, FeatureSet
from data_handlers.aggregate.schema import SILENT, FeatureDef
from data_handlers.compiled import inner

__all__ = [
    "FACTS",
    "MINUTE_FEATURES",
    "MINUTE_NAMES",
    "REJECTS",
    "REJECT_REASONS",
    "Bars",
    "Clock",
    "Out",
    "reduce_days",
    "split_days",
]


_NO_MOVE = "no price change all day (Σr² = 0)"


class _Day(NamedTuple):
    """Summary of a stock's day: what the features are functions of."""

    p: Any  # close of each slot; the first n of each array count
    v: Any  # volume
    r: Any  # log returns
    n: Any  # slots
    open: Any
    high: Any
    low: Any
    r1: Any  # Σr, Σr², Σr³, Σr⁴, and Σr² over r < 0
    r2: Any
    r3: Any
    r4: Any
    down: Any
    jump: Any  # Σr over extreme r
    abs_r: Any  # Σ|r|
    first_r: Any  # Σr of the first 30 minutes
    last_r: Any
    middle: Any  # whether minutes lie between the first and the last 30
    first_v: Any  # Σv of the first 30 minutes
    last_v: Any
    sum_v: Any
    sum_a: Any  # NaN without amounts
    illiq: Any  # Σ|r|/a over bars with a > 0, and their number
    n_illiq: Any
    mean_p: Any
    mean_v: Any
    pp: Any  # sums of products of centred p, v, |r|; v2 of v itself
    vv: Any
    rr: Any
    pv: Any
    rv: Any
    v2: Any
    p_moves: Any  # whether p, v, |r| vary
    v_moves: Any
    r_moves: Any


_MINUTE = FeatureSet()
_feature = _MINUTE.feature


@_feature("ms_rv", "sqrt(Σr²)", "log return a day", 0, INF, "never")
def _(x):
    return np.sqrt(x.r2)


@_feature("ms_skew", "sqrt(N)·Σr³/(Σr²)^1.5", "1", -INF, INF, _NO_MOVE)
def _(x):
    return np.sqrt(x.n) * x.r3 / (x.r2 * np.sqrt(x.r2)) if x.r2 > 0 else np.nan


@_feature("ms_kurt", "N·Σr⁴/(Σr²)²", "1", 1, INF, _NO_MOVE)
def _(x):
    return x.n * x.r4 / (x.r2 * x.r2) if x.r2 > 0 else np.nan


@_feature("ms_down_ratio", "Σr²[r<0]/Σr²", "share", 0, 1, _NO_MOVE)
def _(x):
    return x.down / x.r2 if x.r2 > 0 else np.nan


@_feature(
    "ms_jump",
    "Σr over |r| > 3·1.4826·median(|r − median(r)|); a MAD of 0 (most minutes "
    "without a move) makes every move extreme",
    "log return",
    -INF,
    INF,
    "never",
)
def _(x):
    return x.jump


@_feature(
    "ms_mom",
    "ms_overnight + Σr over the remaining, moderate r",
    "log return",
    -INF,
    INF,
    "no earlier day of the stock in the source",
)
def _(x):
    return x.r1 - x.jump  # `overnight_returns` adds the rest


@_feature(
    "ms_overnight",
    "log(O_t·f_t / (C_{t-1}·f_{t-1})), f the adjustment factor, t-1 the stock's "
    "previous traded day",
    "log return",
    -INF,
    INF,
    "no earlier day of the stock in the source",
    known="open",
)
def _(x):
    return np.nan  # `overnight_returns` knows the day before


@_feature(
    "ms_ret_open30",
    "Σr, first 30 minutes",
    "log return",
    -INF,
    INF,
    "never",
    known="30 minutes after the open",
)
def _(x):
    return x.first_r


@_feature(
    "ms_ret_mid",
    "Σr, between the first and the last 30 minutes",
    "log return",
    -INF,
    INF,
    "session shorter than 61 minutes",
    known="30 minutes before the close",
)
def _(x):
    return x.r1 - x.first_r - x.last_r if x.middle else np.nan


@_feature("ms_ret_last30", "Σr, last 30 minutes", "log return", -INF, INF, "never")
def _(x):
    return x.last_r


@_feature("ms_vol_open30", "Σv of the first 30 minutes / Σv", "share", 0, 1, "never")
def _(x):
    return x.first_v / x.sum_v


@_feature("ms_vol_last30", "Σv of the last 30 minutes / Σv", "share", 0, 1, "never")
def _(x):
    return x.last_v / x.sum_v


@_feature("ms_vhhi", "Σ(v/Σv)²", "1", 0, 1, "never")
def _(x):
    return x.v2 / (x.sum_v * x.sum_v)


@_feature("ms_vvol", "std(v)/mean(v)", "1", 0, INF, "never")
def _(x):
    return np.sqrt(x.vv / x.n) / x.mean_v


@_feature(
    "ms_apb",
    "log(mean(p) / (Σa/Σv))",
    "log ratio",
    -INF,
    INF,
    "no amount",
    needs=("amount",),
)
def _(x):
    return np.log(x.mean_p / (x.sum_a / x.sum_v)) if x.sum_a > 0 else np.nan


@_feature(
    "ms_arpp",
    "(mean(p) − L)/(H − L), every minute weighs the same",
    "share",
    0,
    1,
    "H = L",
)
def _(x):
    return (x.mean_p - x.low) / (x.high - x.low) if x.high > x.low else np.nan


@_feature("ms_corr_pv", "corr(p, v)", "correlation", -1, 1, "p or v does not vary")
def _(x):
    return x.pv / np.sqrt(x.pp * x.vv) if x.p_moves and x.v_moves else np.nan


@_feature("ms_corr_rv", "corr(|r|, v)", "correlation", -1, 1, "|r| or v does not vary")
def _(x):
    return x.rv / np.sqrt(x.rr * x.vv) if x.r_moves and x.v_moves else np.nan


@_feature(
    "ms_corr_lag",
    "corr(r_i, v_{i-1}), i = 2…N",
    "correlation",
    -1,
    1,
    "r or lagged v does not vary",
)
def _(x):
    m = x.n - 1
    if m < 2:
        return np.nan
    late, early = x.r[1 : x.n], x.v[:m]
    r_min, r_max = _range(late, m)
    v_min, v_max = _range(early, m)
    if not (r_max > r_min and v_max > v_min):
        return np.nan
    return _lagged(late, early, (x.r1 - x.r[0]) / m, (x.sum_v - x.v[m]) / m)


@_feature(
    "ms_illiq",
    "mean(|r|/a) over bars with a > 0",
    "1/CNY",
    0,
    INF,
    "no bar with an amount",
    needs=("amount",),
)
def _(x):
    return x.illiq / x.n_illiq if x.n_illiq > 0 else np.nan


@_feature("ms_trend", "|log(C/O)|/Σ|r|", "share", 0, 1, "Σ|r| = 0")
def _(x):
    return abs(np.log(x.p[x.n - 1] / x.open)) / x.abs_r if x.abs_r > 0 else np.nan


@_feature("ms_mdd", "max over i ≤ j of 1 − p_j/p_i", "fraction of price", 0, 1, "never")
def _(x):
    return _drawdown(x.p, x.n)


#: The features in the order of their columns.
MINUTE_FEATURES: tuple[FeatureDef, ...] = tuple(_MINUTE.definitions)
MINUTE_NAMES = [f.name for f in MINUTE_FEATURES]
_fill = _MINUTE.kernel()

#: Why a row of a source is not used, by status code; 0 means it is.
REJECT_REASONS = {
    1: "outside the session",
    2: "price not positive",
    3: "open, close, high and low disagree",
    4: "volume or amount negative or unknown",
    5: "duplicate (instrument, datetime)",
    6: "no time",
    7: "open 0 or empty in a bar with a volume",
    8: "of another level or unit than the rest of the day",
}

REJECTS = len(REJECT_REASONS) + 1

#: What a stock-day tells beside its features: prices in CNY/share, volume in shares,
#: amount in CNY, the number of bars with a trade and the last slot that has one.
FACTS = np.dtype(
    [
        (name, np.float64)
        for name in (
            *("open", "high", "low", "close", "volume", "amount", "factor", "bars"),
            "last_slot",
        )
    ]
)

#: Sums may be taken in any order, and what reaches these loops is finite: only so can
#: they run on whole vectors. Loops that meet unchecked values do without.
_FAST = {"reassoc", "contract", "arcp", "nsz", "nnan", "ninf"}


@nb.njit(nogil=True, cache=True)
def split_days(code, stamp, starts, days):
    """Find where each stock-day starts, and count what is out of order.

    Returns
    -------
    (stock-days, rows out of time order, rows without time, whether codes ascend)
    """
    g = 0
    unsorted = no_time = 0
    ascend = True
    own = -1
    since = until = np.int64(0)  # the day of the last stock-day, µs
    for i in range(len(code)):
        t, c = stamp[i], code[i]
        if i > 0:
            if c == code[i - 1]:
                unsorted += t < stamp[i - 1]
            elif c < code[i - 1]:
                ascend = False
        if c == own and since <= t < until:
            continue
        if t < 0:
            no_time += 1
            continue
        own = c
        day = t // 86_400_000_000
        since = day * 86_400_000_000
        until = since + 86_400_000_000
        starts[g] = i
        days[g] = day
        g += 1
    starts[g] = len(code)
    return g, unsorted, no_time, ascend


@inner
def _middle(x, n, k, odd):
    """k-th smallest of x[:n], with the one below it averaged unless `odd`.

    Quickselect whose inner loops have no branch: on random returns half of all branches
    would be guessed wrong, which costs more than the rest of the features together.
    Values equal to the pivot are gathered apart, so that a silent day (all returns 0)
    takes one step, not n. Reorders x.
    """
    left, right = 0, n
    while right - left > 1:
        a, b, c = x[left], x[(left + right) // 2], x[right - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        m = left
        for i in range(left, right):
            t = x[i]
            x[i] = x[m]
            x[m] = t
            m += t < pivot
        if k < m:
            right = m
            continue
        left = m
        for i in range(left, right):
            t = x[i]
            x[i] = x[m]
            x[m] = t
            m += t <= pivot
        if k < m:
            break  # x[k] is the pivot
        left = m
    upper = x[k]
    if odd:
        return upper
    lower = x[0]
    for i in range(1, k):
        lower = max(lower, x[i])
    return 0.5 * (lower + upper)


@inner
def _median(x, n, low, high, work):
    """Median of x[:n]; fast if it lies between `low` and `high`, a guess."""
    below = m = 0
    for i in range(n):
        t = x[i]
        below += t < low
        work[m] = t
        m += (t >= low) & (t <= high)
    k = n // 2
    odd = n % 2 == 1
    if below <= (k if odd else k - 1) and k < below + m:
        return _middle(work, m, k - below, odd)
    work[:n] = x[:n]
    return _middle(work, n, k, odd)


@inner
def _usable(bars, begin, end):
    """Rows with a trade if every row is usable, else -1."""
    o, h, lo = bars.open[begin:end], bars.high[begin:end], bars.low[begin:end]
    c, v = bars.close[begin:end], bars.volume[begin:end]
    good = traded = 0
    for s in range(len(o)):
        tol = 1e-6 * h[s]
        silent = (v[s] >= 0) & (v[s] < SILENT)
        good += silent | (
            (o[s] > 0)
            & (lo[s] > 0)
            & (c[s] > 0)
            & (v[s] > 0)
            & (v[s] < np.inf)
            & (h[s] < np.inf)
            & (o[s] <= h[s] + tol)
            & (c[s] <= h[s] + tol)
            & (o[s] >= lo[s] - tol)
            & (c[s] >= lo[s] - tol)
        )
        traded += not silent
    if bars.has_amount:
        a = bars.amount[begin:end]
        for s in range(len(o)):
            good += (a[s] >= 0) & (a[s] < np.inf)
        good -= len(o)
    return traded if good == len(o) else -1


@inner
def _same_clock(stamp, midnight, pattern):
    same = 0
    for s in range(len(stamp)):
        same += stamp[s] - midnight == pattern[s]
    return same == len(stamp)


@inner(fastmath=_FAST)
def _extremes(h, lo):
    high, low = h[0], lo[0]
    for s in range(len(h)):
        high = max(high, h[s])
        low = min(low, lo[s])
    return high, low


@inner
def _status(bars, i, minute, table):
    """Status code of row i, stamped in that minute of its day."""
    if table[minute] < 0:
        return 1
    v = bars.volume[i]
    if not (0 <= v < np.inf) or (
        bars.has_amount and not (0 <= bars.amount[i] < np.inf)
    ):
        return 4
    if v < SILENT:
        return 0
    o, h, lo, c = bars.open[i], bars.high[i], bars.low[i], bars.close[i]
    if not (o > 0 and 0 < h < np.inf and lo > 0 and c > 0):
        return 7 if c > 0 and h > 0 and not (o > 0) else 2
    # Sources round prices; a millionth is no disagreement.
    tol = 1e-6 * h
    top, low = max(o, c), min(o, c)
    if h < lo - tol or top > h + tol or low < lo - tol:
        return 3
    return 0


@inner(fastmath=_FAST)
def _returns(p, day_open, n, r):
    """Log returns; r[0] from the day's open. Returns the sum of |r|.

    log(p/q) = 2·artanh(z), z = (p−q)/(p+q); the series is exact to rounding for moves
    below 2 %, larger ones take the logarithm.
    """
    r[0] = (p[0] - day_open) / (p[0] + day_open)
    # Slices, and one thing a loop: so each runs on whole vectors.
    later, before, tail = p[1:n], p[: n - 1], r[1:n]
    for s in range(n - 1):
        tail[s] = (later[s] - before[s]) / (later[s] + before[s])
    most = 0.0
    for s in range(n):
        most = max(most, abs(r[s]))
    for s in range(n):
        w = r[s] * r[s]
        # The next term, w⁵/11, is below 1e-21.
        r[s] *= 2 * (1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9)))))
    if most > 0.01:
        last = day_open
        for s in range(n):
            if abs(p[s] - last) > 0.01 * (p[s] + last):
                r[s] = np.log(p[s] / last)
            last = p[s]
    total = 0.0
    for s in range(n):
        total += abs(r[s])
    return total


@inner(fastmath=_FAST)
def _total(x, first, last):
    total = 0.0
    for s in range(first, last):
        total += x[s]
    return total


@inner(fastmath=_FAST)
def _powers(r, n):
    """Sum r, r², r³, r⁴, and r² where r < 0."""
    s1 = s2 = s3 = s4 = down = 0.0
    for s in range(n):
        x = r[s]
        q = x * x
        s1 += x
        s2 += q
        s3 += q * x
        s4 += q * q
        down += q if x < 0 else 0.0
    return s1, s2, s3, s4, down


@inner(fastmath=_FAST)
def _illiquidity(r, a, n):
    """Sum a, and |r|/a where a > 0; count those bars."""
    total = ratio = 0.0
    count = 0
    for s in range(n):
        some = a[s] > 0
        total += a[s]
        ratio += abs(r[s]) / (a[s] if some else 1.0) if some else 0.0
        count += some
    return total, ratio, count


@inner(fastmath=_FAST)
def _range(x, n):
    low, high = x[0], x[0]
    for s in range(n):
        low = min(low, x[s])
        high = max(high, x[s])
    return low, high


@inner(fastmath=_FAST)
def _co_moments(p, v, r, n, mean_p, mean_v, mean_ar):
    """Sum over centred p, v, |r|: pp, vv, |r||r|, pv, |r|v; and v² itself."""
    pp = vv = rr = pv = rv = v2 = 0.0
    for s in range(n):
        dp, dv, dr = p[s] - mean_p, v[s] - mean_v, abs(r[s]) - mean_ar
        pp += dp * dp
        vv += dv * dv
        rr += dr * dr
        pv += dp * dv
        rv += dr * dv
        v2 += v[s] * v[s]
    return pp, vv, rr, pv, rv, v2


@inner(fastmath=_FAST)
def _lagged(r, v, mean_r, mean_v):
    """Correlation of two arrays around given means."""
    rr = vv = rv = 0.0
    for s in range(len(r)):
        dr, dv = r[s] - mean_r, v[s] - mean_v
        rr += dr * dr
        vv += dv * dv
        rv += dr * dv
    return rv / np.sqrt(rr * vv)


@inner(fastmath=_FAST)
def _beyond(r, n, bound):
    total = 0.0
    for s in range(n):
        total += r[s] if abs(r[s]) > bound else 0.0
    return total


@inner
def _drawdown(p, n):
    """Largest fall from a peak; one division, not n: ratios compared crosswise."""
    peak = low = top = p[0]
    for s in range(1, n):
        x = p[s]
        if x > peak:
            peak = x
        elif x * top < low * peak:
            low, top = x, peak
    return 1.0 - low / top


class Bars(NamedTuple):
    """Columns of the source, grouped by stock-day; `status` is written."""

    stamp: Any
    status: Any
    open: Any
    high: Any
    low: Any
    close: Any
    volume: Any
    amount: Any
    factor: Any  # empty means 1
    has_amount: Any


class Clock(NamedTuple):
    """Where stamps lie in the session."""

    table: Any  # minute of the day to slot, -1 outside
    half: Any  # slots in 30 minutes
    slots: Any  # of a full session
    day_slots: Any  # of each day from `day0`
    day0: Any
    begin: Any  # minute of the day where an interval begins, and where one ends
    end: Any


class Out(NamedTuple):
    """One row a stock-day, all written."""

    counts: Any  # rows of each status, and last those without trade
    edge: Any  # trades in bars stamped at `begin` and at `end`
    facts: Any
    values: Any


@inner
def _summary(p, v, a, r, d, work, n, half, has_amount, day_open, high, low):
    """Summarise the n bars of a day: p filled, v and a 0 without a trade."""
    abs_r = _returns(p, day_open, n, r)
    r1, r2, r3, r4, down = _powers(r, n)
    sum_v = _total(v, 0, n)
    mean_p, mean_v, mean_ar = _total(p, 0, n) / n, sum_v / n, abs_r / n
    pp, vv, rr, pv, rv, v2 = _co_moments(p, v, r, n, mean_p, mean_v, mean_ar)
    p_min, p_max = _range(p, n)
    v_min, v_max = _range(v, n)
    # Most minutes move little: the medians are looked for near 0 and near their usual
    # share of the mean move, and anywhere else only if they are not there.
    middle = _median(r, n, -0.25 * mean_ar, 0.25 * mean_ar, work)
    for s in range(n):
        d[s] = abs(r[s] - middle)
    mad = _median(d, n, 0.45 * mean_ar, 1.05 * mean_ar, work)
    for s in range(n):
        d[s] = abs(r[s])
    r_min, r_max = _range(d, n)
    sum_a, illiq, n_illiq = np.nan, 0.0, 0
    if has_amount:
        sum_a, illiq, n_illiq = _illiquidity(r, a, n)
    return _Day(
        p=p,
        v=v,
        r=r,
        n=n,
        open=day_open,
        high=high,
        low=low,
        r1=r1,
        r2=r2,
        r3=r3,
        r4=r4,
        down=down,
        jump=_beyond(r, n, 3 * 1.4826 * mad),
        abs_r=abs_r,
        first_r=_total(r, 0, min(half, n)),
        last_r=_total(r, max(n - half, 0), n),
        middle=n > 2 * half,
        first_v=_total(v, 0, min(half, n)),
        last_v=_total(v, max(n - half, 0), n),
        sum_v=sum_v,
        sum_a=sum_a,
        illiq=illiq,
        n_illiq=n_illiq,
        mean_p=mean_p,
        mean_v=mean_v,
        pp=pp,
        vv=vv,
        rr=rr,
        pv=pv,
        rv=rv,
        v2=v2,
        p_moves=p_max > p_min,
        v_moves=v_max > v_min,
        r_moves=r_max > r_min,
    )


@inner
def _traded_at(minute, midnight, stamp, volume):
    """Whether a bar of that minute holds a trade; stamps are sorted."""
    when = midnight + minute * 60_000_000
    low, high = 0, len(stamp)
    while low < high:
        middle = (low + high) // 2
        if stamp[middle] < when:
            low = middle + 1
        else:
            high = middle
    return low < len(stamp) and stamp[low] == when and volume[low] >= SILENT


@nb.njit(nogil=True, cache=True)
def reduce_days(first, last, starts, days, bars, clock, out):
    """Check and reduce stock-days first…last to one row each.

    A day with all its bars, stamped as a whole day before it, needs no look at single
    rows.
    """
    slots, table = clock.slots, clock.table
    p = np.empty(slots)
    v = np.empty(slots)
    a = np.zeros(slots)
    r = np.empty(slots)
    d = np.empty(slots)
    work = np.empty(slots)
    pattern = np.full(slots, -1, dtype=np.int64)
    for g in range(first, last):
        begin, end = starts[g], starts[g + 1]
        midnight = days[g] * 86_400_000_000
        n = clock.day_slots[days[g] - clock.day0]
        whole = end - begin == slots == n
        traded = -1
        if whole and _same_clock(bars.stamp[begin:end], midnight, pattern):
            traded = _usable(bars, begin, end)
        day_open = np.nan
        high, low = -np.inf, np.inf
        last_slot = -1
        factor = np.nan
        stamp, volume = bars.stamp[begin:end], bars.volume[begin:end]
        out.edge[g, 0] = _traded_at(clock.begin, midnight, stamp, volume)
        out.edge[g, 1] = _traded_at(clock.end, midnight, stamp, volume)
        if traded >= 0:
            out.counts[g, 0] = slots
            out.counts[g, -1] = slots - traded
            p[:] = bars.close[begin:end]
            v[:] = bars.volume[begin:end]
            if bars.has_amount:
                a[:] = bars.amount[begin:end]
            factor = bars.factor[begin] if len(bars.factor) else 1.0
            if traded == slots:
                high, low = _extremes(bars.high[begin:end], bars.low[begin:end])
                day_open = bars.open[begin]
                last_slot = n - 1
            else:
                for s in range(n):
                    if v[s] < SILENT:
                        v[s] = 0.0
                        a[s] = 0.0
                        continue
                    if last_slot < 0:
                        day_open = bars.open[begin + s]
                    last_slot = s
                    high = max(high, bars.high[begin + s])
                    low = min(low, bars.low[begin + s])
        else:
            v[:] = 0.0
            a[:] = 0.0
            traded = 0
            before = -1
            in_order = whole
            for i in range(begin, end):
                t = bars.stamp[i]
                if t < 0:
                    bars.status[i] = 6
                    in_order = False
                    continue
                minute = (t - midnight) // 60_000_000
                k = _status(bars, i, minute, table)
                again = (
                    before >= 0 and t == bars.stamp[before] and bars.status[before] == 0
                )
                if again and k == 0:
                    k = 5  # of equal stamps the first usable row stays
                bars.status[i] = k
                out.counts[g, k] += 1
                if k == 5:
                    in_order = False
                    continue
                before = i
                if k != 0:
                    in_order = False
                    continue
                s = min(table[minute], n - 1)
                in_order = in_order and s == i - begin
                if np.isnan(factor):
                    factor = bars.factor[i] if len(bars.factor) else 1.0
                if bars.volume[i] < SILENT:
                    out.counts[g, -1] += 1
                    continue
                if traded == 0:
                    day_open = bars.open[i]
                if v[s] == 0:
                    traded += 1
                last_slot = s
                p[s] = bars.close[i]
                v[s] += bars.volume[i]
                if bars.has_amount:
                    a[s] += bars.amount[i]
                high = max(high, bars.high[i])
                low = min(low, bars.low[i])
            if in_order:
                for s in range(slots):
                    pattern[s] = bars.stamp[begin + s] - midnight
        facts = out.facts[g]
        if traded == 0:
            facts.bars = 0
            continue
        if traded < n:
            price = day_open
            for s in range(n):
                if v[s] == 0:
                    p[s] = price
                price = p[s]
        day = _summary(
            p, v, a, r, d, work, n, clock.half, bars.has_amount, day_open, high, low
        )
        _fill(day, out.values[g])
        facts.open = day_open
        facts.high = high
        facts.low = low
        facts.close = p[n - 1]
        facts.volume = day.sum_v
        facts.amount = day.sum_a
        facts.factor = factor
        facts.bars = traded
        facts.last_slot = last_slot
