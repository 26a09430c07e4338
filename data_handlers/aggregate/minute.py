"""Minute bars of one day reduced to one row: the 22 `ms` features.

Notation, per stock and day, over the N bars of the session: p close of a bar, v its
volume (shares), a its amount (CNY), r = log(p_i / p_{i-1}) with the day's open O in
place of p_0; O, H, L, C open, high, low, close of the day. `MINUTE_FEATURES` defines
each feature with unit, range, NaN rule and the moment at which it is known.

The reports name 22 features and list only some; the list is this project's (SPEC
§1.2). What it leaves open is decided here:

- N counts the minutes of the session, not the rows of the file. A minute without a
  row, or with zero volume, is a bar without trade: the price carries over (the day's
  open before the first trade), r = v = a = 0. So vendors that omit empty minutes and
  vendors that repeat the last price give the same row.
- Bars stamped in the opening auction join the first bar, so O is the auction's price.
- A day on which no instrument trades in the last half-hour ends early (US half days,
  circuit breakers), if at least `MIN_INSTRUMENTS` trade at all: N ends with the last
  traded half-hour. `Session.early_close` says so explicitly. The first and last 30
  minutes are those of the shortened day.
- A stock without any trade has no row that day.
- Standard deviations and correlations are those of the population (divide by N).
- A ratio is NaN where its denominator is zero, a correlation where one side does
  not vary; never 0 or infinite.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numba as nb
import numpy as np
import pandas as pd
import pyarrow as pa

from data_handlers.aggregate.schema import BARS, FeatureDef, Session, get_session

__all__ = [
    "MINUTE_FEATURES",
    "MINUTE_NAMES",
    "REJECT_REASONS",
    "DayRows",
    "StockDays",
    "aggregate_minutes",
    "carry_overnight",
    "join_stock_days",
    "minute_features",
    "overnight_returns",
    "reduce_minutes",
]

_INF = float("inf")
_NO_MOVE = "no price change all day (Σr² = 0)"

#: The features in the order of their columns.
MINUTE_FEATURES: tuple[FeatureDef, ...] = (
    FeatureDef("ms_rv", "sqrt(Σr²)", "log return a day", 0, _INF, "never"),
    FeatureDef("ms_skew", "sqrt(N)·Σr³/(Σr²)^1.5", "1", -_INF, _INF, _NO_MOVE),
    FeatureDef("ms_kurt", "N·Σr⁴/(Σr²)²", "1", 1, _INF, _NO_MOVE),
    FeatureDef("ms_down_ratio", "Σr²[r<0]/Σr²", "share", 0, 1, _NO_MOVE),
    FeatureDef(
        "ms_jump",
        "Σr over |r| > 3·1.4826·median(|r − median(r)|); a MAD of 0 (most minutes "
        "without a move) makes every move extreme",
        "log return",
        -_INF,
        _INF,
        "never",
    ),
    FeatureDef(
        "ms_mom",
        "ms_overnight + Σr over the remaining, moderate r",
        "log return",
        -_INF,
        _INF,
        "no earlier day of the stock in the source",
    ),
    FeatureDef(
        "ms_overnight",
        "log(O_t·f_t / (C_{t-1}·f_{t-1})), f the adjustment factor, t-1 the stock's "
        "previous traded day",
        "log return",
        -_INF,
        _INF,
        "no earlier day of the stock in the source",
        known="open",
    ),
    FeatureDef(
        "ms_ret_open30",
        "Σr, first 30 minutes",
        "log return",
        -_INF,
        _INF,
        "never",
        known="30 minutes after the open",
    ),
    FeatureDef(
        "ms_ret_mid",
        "Σr, between the first and the last 30 minutes",
        "log return",
        -_INF,
        _INF,
        "session shorter than 61 minutes",
        known="30 minutes before the close",
    ),
    FeatureDef(
        "ms_ret_last30", "Σr, last 30 minutes", "log return", -_INF, _INF, "never"
    ),
    FeatureDef(
        "ms_vol_open30", "Σv of the first 30 minutes / Σv", "share", 0, 1, "never"
    ),
    FeatureDef(
        "ms_vol_last30", "Σv of the last 30 minutes / Σv", "share", 0, 1, "never"
    ),
    FeatureDef("ms_vhhi", "Σ(v/Σv)²", "1", 0, 1, "never"),
    FeatureDef("ms_vvol", "std(v)/mean(v)", "1", 0, _INF, "never"),
    FeatureDef(
        "ms_apb",
        "log(mean(p) / (Σa/Σv))",
        "log ratio",
        -_INF,
        _INF,
        "no amount",
        needs=("amount",),
    ),
    FeatureDef(
        "ms_arpp",
        "(mean(p) − L)/(H − L), every minute weighs the same",
        "share",
        0,
        1,
        "H = L",
    ),
    FeatureDef(
        "ms_corr_pv", "corr(p, v)", "correlation", -1, 1, "p or v does not vary"
    ),
    FeatureDef(
        "ms_corr_rv", "corr(|r|, v)", "correlation", -1, 1, "|r| or v does not vary"
    ),
    FeatureDef(
        "ms_corr_lag",
        "corr(r_i, v_{i-1}), i = 2…N",
        "correlation",
        -1,
        1,
        "r or lagged v does not vary",
    ),
    FeatureDef(
        "ms_illiq",
        "mean(|r|/a) over bars with a > 0",
        "1/CNY",
        0,
        _INF,
        "no bar with an amount",
        needs=("amount",),
    ),
    FeatureDef("ms_trend", "|log(C/O)|/Σ|r|", "share", 0, 1, "Σ|r| = 0"),
    FeatureDef(
        "ms_mdd", "max over i ≤ j of 1 − p_j/p_i", "fraction of price", 0, 1, "never"
    ),
)
MINUTE_NAMES = [f.name for f in MINUTE_FEATURES]

#: Why a row of a source is not used, by status code; 0 means it is.
REJECT_REASONS = {
    1: "outside the session",
    2: "price not positive",
    3: "open, close, high and low disagree",
    4: "volume or amount negative or unknown",
    5: "duplicate (instrument, datetime)",
    6: "no time",
}
#: Fewest traded instruments of a day for an early close to be inferred.
MIN_INSTRUMENTS = 5
_REJECTS = len(REJECT_REASONS) + 1
_EXTRA = [
    *("open", "high", "low", "close", "volume", "amount", "factor", "bars"),
    "last_slot",
]
_N = len(MINUTE_NAMES)


@dataclass
class DayRows:
    """Rows of the aggregate and the account of the input rows.

    Attributes
    ----------
    frame : DataFrame
        Sorted by datetime, instrument: those two columns, the day's open, high, low,
        close, volume, amount, factor, bars (traded bars), then the features. Without
        earlier data `ms_overnight` is NaN and `ms_mom` holds the moderate part only;
        `carry_overnight` completes both.
    rows_in, rows_used : int
        Rows of the input; rows that entered a feature.
    no_trade : int
        Rows without volume (accepted, they change nothing).
    rejected : dict
        Reason to number of rows.
    notes : dict
        Other facts and how often: unsorted rows, stock-days without a trade, days
        that end early.
    """

    frame: pd.DataFrame
    rows_in: int
    rows_used: int
    no_trade: int
    rejected: dict[str, int]
    notes: dict[str, Any]


@dataclass
class StockDays:
    """What `DayRows` holds, as arrays: the form in which a build passes rows on.

    Attributes
    ----------
    labels : object array
        Instruments, sorted.
    code, day : int array, shape (k,)
        Index into `labels` and days since 1970 of each stock-day, in any order.
    extra : float64[k, 9]
        The day's open, high, low, close, volume, amount, factor, traded bars, and the
        last slot with a trade.
    values : float64[k, 22]
        The features.
    rows_in, rows_used, no_trade, rejected, notes
        As in `DayRows`.
    """

    labels: np.ndarray
    code: np.ndarray
    day: np.ndarray
    extra: np.ndarray
    values: np.ndarray
    rows_in: int
    rows_used: int
    no_trade: int
    rejected: dict[str, int]
    notes: dict[str, Any]

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns of `DayRows.frame` without the keys."""
        out = {k: self.extra[:, i] for i, k in enumerate(_EXTRA)}
        return out | {k: self.values[:, i] for i, k in enumerate(MINUTE_NAMES)}

    def take(self, rows: np.ndarray) -> StockDays:
        """Return some of the stock-days, with the account of all."""
        return replace(
            self,
            code=self.code[rows],
            day=self.day[rows],
            extra=self.extra[rows],
            values=self.values[rows],
        )

    def by_day(self) -> StockDays:
        """Return the stock-days sorted by day, then instrument."""
        return self.take(np.lexsort((self.code, self.day)))


def join_stock_days(pieces: Sequence[StockDays]) -> StockDays:
    """Put stock-days of several sources below one another, and add the accounts."""
    labels, where = np.unique(
        np.concatenate([x.labels for x in pieces]).astype(object), return_inverse=True
    )
    base = np.cumsum([0, *(len(x.labels) for x in pieces)])
    rejected: dict[str, int] = {}
    notes: dict[str, Any] = {}
    for piece in pieces:
        for why, n in piece.rejected.items():
            rejected[why] = rejected.get(why, 0) + n
        for note, n in piece.notes.items():
            if isinstance(n, int):
                notes[note] = notes.get(note, 0) + n
    return StockDays(
        labels,
        np.concatenate(
            [where[b + x.code] for b, x in zip(base[:-1], pieces, strict=True)]
        ),
        np.concatenate([x.day for x in pieces]),
        np.concatenate([x.extra for x in pieces]),
        np.concatenate([x.values for x in pieces]),
        sum(x.rows_in for x in pieces),
        sum(x.rows_used for x in pieces),
        sum(x.no_trade for x in pieces),
        rejected,
        notes,
    )


# -- kernels


#: Sums may be taken in any order, and what reaches these loops is finite: only so can
#: they run on whole vectors. Loops that meet unchecked values do without.
_FAST = {"reassoc", "contract", "arcp", "nsz", "nnan", "ninf"}


@nb.njit(nogil=True, cache=True)
def _split(code, stamp, starts, days):
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


@nb.njit(nogil=True, cache=True)
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


@nb.njit(nogil=True, cache=True)
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


@nb.njit(nogil=True, cache=True)
def _usable(o, h, lo, c, v, a, has_amount):
    """Rows with a trade if every row is usable, else -1."""
    good = traded = 0
    for s in range(len(o)):
        tol = 1e-6 * h[s]
        silent = v[s] == 0
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
    if has_amount:
        for s in range(len(o)):
            good += (a[s] >= 0) & (a[s] < np.inf)
        good -= len(o)
    return traded if good == len(o) else -1


@nb.njit(nogil=True, cache=True)
def _same_clock(stamp, midnight, pattern):
    same = 0
    for s in range(len(stamp)):
        same += stamp[s] - midnight == pattern[s]
    return same == len(stamp)


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def _extremes(h, lo):
    high, low = h[0], lo[0]
    for s in range(len(h)):
        high = max(high, h[s])
        low = min(low, lo[s])
    return high, low


@nb.njit(nogil=True, cache=True)
def _status(t, midnight, o, h, lo, c, v, a, has_amount, table):
    """Status code of one row with a time."""
    if table[(t - midnight) // 60_000_000] < 0:
        return 1
    if not (0 <= v < np.inf) or (has_amount and not (0 <= a < np.inf)):
        return 4
    if v == 0:
        return 0
    if not (o > 0 and 0 < h < np.inf and lo > 0 and c > 0):
        return 2
    # Sources round prices; a millionth is no disagreement.
    tol = 1e-6 * h
    top, low = max(o, c), min(o, c)
    if h < lo - tol or top > h + tol or low < lo - tol:
        return 3
    return 0


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
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


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def _total(x, first, last):
    total = 0.0
    for s in range(first, last):
        total += x[s]
    return total


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
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


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
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


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def _range(x, n):
    low, high = x[0], x[0]
    for s in range(n):
        low = min(low, x[s])
        high = max(high, x[s])
    return low, high


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
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


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def _lagged(r, v, mean_r, mean_v):
    """Correlation of two arrays around given means."""
    rr = vv = rv = 0.0
    for s in range(len(r)):
        dr, dv = r[s] - mean_r, v[s] - mean_v
        rr += dr * dr
        vv += dv * dv
        rv += dr * dv
    return rv / np.sqrt(rr * vv)


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def _beyond(r, n, bound):
    total = 0.0
    for s in range(n):
        total += r[s] if abs(r[s]) > bound else 0.0
    return total


@nb.njit(nogil=True, cache=True)
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


@nb.njit(nogil=True, cache=True)
def _features(p, v, a, r, d, work, n, half, day_open, high, low, has_amount, row):
    """Fill one row from the n bars of a day: p filled, v and a 0 without a trade."""
    absr = _returns(p, day_open, n, r)
    s1, s2, s3, s4, down = _powers(r, n)
    sum_v = _total(v, 0, n)
    mean_p, mean_v, mean_ar = _total(p, 0, n) / n, sum_v / n, absr / n
    pp, vv, rr, pv, rv, v2 = _co_moments(p, v, r, n, mean_p, mean_v, mean_ar)
    p_min, p_max = _range(p, n)
    v_min, v_max = _range(v, n)
    # Most minutes move little: the medians are looked for near 0 and near their usual
    # share of the mean move, and anywhere else only if they are not there.
    middle = _median(r, n, -0.25 * mean_ar, 0.25 * mean_ar, work)
    for s in range(n):
        d[s] = abs(r[s] - middle)
    mad = _median(d, n, 0.45 * mean_ar, 1.05 * mean_ar, work)
    jump = _beyond(r, n, 3 * 1.4826 * mad)
    first_r, last_r = _total(r, 0, min(half, n)), _total(r, max(n - half, 0), n)
    row[0] = np.sqrt(s2)
    if s2 > 0:
        row[1] = np.sqrt(n) * s3 / (s2 * np.sqrt(s2))
        row[2] = n * s4 / (s2 * s2)
        row[3] = down / s2
    row[4] = jump
    row[5] = s1 - jump
    row[7] = first_r
    if n > 2 * half:
        row[8] = s1 - first_r - last_r
    row[9] = last_r
    row[10] = _total(v, 0, min(half, n)) / sum_v
    row[11] = _total(v, max(n - half, 0), n) / sum_v
    row[12] = v2 / (sum_v * sum_v)
    row[13] = np.sqrt(vv / n) / mean_v
    sum_a = np.nan
    if has_amount:
        sum_a, illiq, n_illiq = _illiquidity(r, a, n)
        if sum_a > 0:
            row[14] = np.log(mean_p / (sum_a / sum_v))
        if n_illiq > 0:
            row[19] = illiq / n_illiq
    if high > low:
        row[15] = (mean_p - low) / (high - low)
    if p_max > p_min and v_max > v_min:
        row[16] = pv / np.sqrt(pp * vv)
    for s in range(n):
        d[s] = abs(r[s])
    r_min, r_max = _range(d, n)
    if r_max > r_min and v_max > v_min:
        row[17] = rv / np.sqrt(rr * vv)
    if n > 2:
        late, early = r[1:n], v[: n - 1]
        r_min, r_max = _range(late, n - 1)
        v_min, v_max = _range(early, n - 1)
        if r_max > r_min and v_max > v_min:
            mean_r = (s1 - r[0]) / (n - 1)
            row[18] = _lagged(late, early, mean_r, (sum_v - v[n - 1]) / (n - 1))
    if absr > 0:
        row[20] = abs(np.log(p[n - 1] / day_open)) / absr
    row[21] = _drawdown(p, n)
    return sum_v, sum_a


@nb.njit(nogil=True, cache=True)
def _reduce(
    first,
    last,
    starts,
    days,
    stamp,
    status,
    o,
    h,
    lo,
    c,
    v,
    a,
    f,
    has_amount,
    table,
    half,
    slots,
    day_slots,
    day0,
    counts,
    extra,
    out,
):
    """Check and reduce stock-days first…last to one row each.

    `counts` gets the rows of each status, and last those without trade, by stock-day.
    A day with all its bars, stamped as a whole day before it, needs no look at single
    rows.
    """
    p = np.empty(slots)
    v_of = np.empty(slots)
    a_of = np.zeros(slots)
    r = np.empty(slots)
    d = np.empty(slots)
    work = np.empty(slots)
    pattern = np.full(slots, -1, dtype=np.int64)
    for g in range(first, last):
        begin, end = starts[g], starts[g + 1]
        midnight = days[g] * 86_400_000_000
        n = day_slots[days[g] - day0]
        whole = end - begin == slots == n
        traded = -1
        if whole and _same_clock(stamp[begin:end], midnight, pattern):
            traded = _usable(
                o[begin:end],
                h[begin:end],
                lo[begin:end],
                c[begin:end],
                v[begin:end],
                a[begin:end],
                has_amount,
            )
        day_open = np.nan
        high, low = -np.inf, np.inf
        last_slot = -1
        factor = np.nan
        if traded >= 0:
            counts[g, 0] = slots
            counts[g, 7] = slots - traded
            p[:] = c[begin:end]
            v_of[:] = v[begin:end]
            if has_amount:
                a_of[:] = a[begin:end]
            factor = f[begin] if len(f) else 1.0
            if traded == slots:
                high, low = _extremes(h[begin:end], lo[begin:end])
                day_open = o[begin]
                last_slot = n - 1
            else:
                for s in range(n):
                    if v_of[s] == 0:
                        a_of[s] = 0.0
                        continue
                    if last_slot < 0:
                        day_open = o[begin + s]
                    last_slot = s
                    high = max(high, h[begin + s])
                    low = min(low, lo[begin + s])
        else:
            v_of[:] = 0.0
            a_of[:] = 0.0
            traded = 0
            before = -1
            in_order = whole
            for i in range(begin, end):
                t = stamp[i]
                if t < 0:
                    status[i] = 6
                    in_order = False
                    continue
                k = _status(
                    t, midnight, o[i], h[i], lo[i], c[i], v[i], a[i], has_amount, table
                )
                again = before >= 0 and t == stamp[before] and status[before] == 0
                if again and k == 0:
                    k = 5  # of equal stamps the first usable row stays
                status[i] = k
                counts[g, k] += 1
                if k == 5:
                    in_order = False
                    continue
                before = i
                if k != 0:
                    in_order = False
                    continue
                s = min(table[(t - midnight) // 60_000_000], n - 1)
                in_order = in_order and s == i - begin
                if np.isnan(factor):
                    factor = f[i] if len(f) else 1.0
                if v[i] == 0:
                    counts[g, 7] += 1
                    continue
                if traded == 0:
                    day_open = o[i]
                if v_of[s] == 0:
                    traded += 1
                last_slot = s
                p[s] = c[i]
                v_of[s] += v[i]
                if has_amount:
                    a_of[s] += a[i]
                high = max(high, h[i])
                low = min(low, lo[i])
            if in_order:
                for s in range(slots):
                    pattern[s] = stamp[begin + s] - midnight
        if traded == 0:
            extra[g, 7] = 0
            continue
        if traded < n:
            price = day_open
            for s in range(n):
                if v_of[s] == 0:
                    p[s] = price
                price = p[s]
        sum_v, sum_a = _features(
            p, v_of, a_of, r, d, work, n, half, day_open, high, low, has_amount, out[g]
        )
        extra[g, 0] = day_open
        extra[g, 1] = high
        extra[g, 2] = low
        extra[g, 3] = p[n - 1]
        extra[g, 4] = sum_v
        extra[g, 5] = sum_a
        extra[g, 6] = factor
        extra[g, 7] = traded
        extra[g, 8] = last_slot


def aggregate_minutes(
    bars: pa.Table | pd.DataFrame,
    session: str | Session = "a_share",
    bar_minutes: int = 1,
    stamp: str = "start",
    amount: str = "exact",
    threads: int | None = None,
    infer_early: bool = True,
    check: bool = True,
) -> DayRows:
    """Reduce minute bars to one row a stock and day.

    Parameters
    ----------
    bars : pyarrow.Table or DataFrame
        Columns of `schema.BARS`; any order of rows (sorted input is fastest).
    session : str or Session, default "a_share"
        When the exchange trades.
    bar_minutes : {1, 5, 15}, default 1
        Length of the bars the features are computed from; shorter bars of the source
        are merged.
    stamp : {"start", "end"}, default "start"
        What `datetime` of a bar is.
    amount : {"exact", "typical"}, default "exact"
        Without an amount column the features that need it are NaN; "typical" uses
        volume × (high + low + close)/3 instead.
    threads : int, optional
        Threads, default all cores the process may use.
    infer_early : bool, default True
        Whether to find days that end early from the rows (see the module's head).
    check : bool, default True
        Whether to refuse rows most of which lie outside the session; off for a piece
        of a source, whose whole is judged by `check_session`.

    Returns
    -------
    DayRows
        One row a stock and traded day, and the account of the input.

    Raises
    ------
    ValueError
        For a missing column, a time zone, bars longer than `bar_minutes`, or a
        source most of whose rows lie outside the session.
    """
    days = reduce_minutes(
        *(bars, session, bar_minutes, stamp, amount, threads, infer_early, check)
    ).by_day()
    data: dict[str, Any] = {
        "datetime": midnights(days.day),
        "instrument": days.labels[days.code],
    }
    return DayRows(
        pd.DataFrame(data | days.columns()),
        *(days.rows_in, days.rows_used, days.no_trade, days.rejected, days.notes),
    )


def reduce_minutes(
    bars: pa.Table | pd.DataFrame,
    session: str | Session = "a_share",
    bar_minutes: int = 1,
    stamp: str = "start",
    amount: str = "exact",
    threads: int | None = None,
    infer_early: bool = True,
    check: bool = True,
) -> StockDays:
    """Do what `aggregate_minutes` does, and return arrays."""
    session = get_session(session)
    slots = session.slots(bar_minutes)
    if stamp not in ("start", "end"):
        raise ValueError(f"`stamp` must be 'start' or 'end', got {stamp!r}.")
    if amount not in ("exact", "typical"):
        raise ValueError(f"`amount` must be 'exact' or 'typical', got {amount!r}.")
    labels, code, when, cols = _arrays(bars)
    rows_in = len(code)
    has_amount = cols["amount"] is not None
    if not has_amount and amount == "typical":
        cols["amount"] = (
            cols["volume"] * (cols["high"] + cols["low"] + cols["close"]) / 3
        )
        has_amount = True
    if cols["amount"] is None:
        cols["amount"] = cols["volume"]  # numba wants an array; never read
    if cols["factor"] is None:
        cols["factor"] = np.empty(0)  # means 1
    table = session.minute_of_session(stamp == "end") // bar_minutes
    starts = np.empty(rows_in + 1, dtype=np.int64)
    days = np.empty(rows_in + 1, dtype=np.int64)
    code, when = frozen(code), frozen(when)
    n_groups, unsorted, no_time, ascend = _split(code, when, starts, days)
    if unsorted or not ascend:
        order = np.lexsort((when, code))
        code, when = frozen(code[order]), frozen(when[order])
        cols = {k: x[order] if len(x) else x for k, x in cols.items()}
        n_groups, _, no_time, _ = _split(code, when, starts, days)
    starts, days = starts[: n_groups + 1], days[:n_groups]
    status = np.zeros(rows_in, dtype=np.int8)
    counts = np.zeros((n_groups, _REJECTS + 1), dtype=np.int64)
    extra = np.full((n_groups, len(_EXTRA)), np.nan)
    out = np.full((n_groups, _N), np.nan)
    day0 = int(days.min()) if n_groups else 0
    day1 = int(days.max()) if n_groups else 0
    day_slots = np.full(day1 - day0 + 1, slots, dtype=np.int64)
    for date, n in _early_slots(session, bar_minutes).items():
        if day0 <= date <= day1:
            day_slots[date - day0] = n
    names = ("open", "high", "low", "close", "volume", "amount", "factor")
    args = (
        *(starts, days, when, status, *(frozen(cols[k]) for k in names)),
        *(has_amount, table, 30 // bar_minutes, slots, day_slots, day0),
        *(counts, extra, out),
    )
    _in_threads(_reduce, n_groups, args, threads)
    if infer_early:
        short = early_days(days, extra[:, 8], slots, 30 // bar_minutes)
        if short:
            for date, n in short.items():
                day_slots[date - day0] = n
            counts[:], extra[:], out[:] = 0, np.nan, np.nan
            _in_threads(_reduce, n_groups, args, threads)
    total = counts.sum(axis=0)
    total[6] = no_time
    if check:
        check_session(int(total[1]), rows_in, session)
    _check_length(code, when, status, bar_minutes)
    rejected = {why: int(total[k]) for k, why in REJECT_REASONS.items() if total[k]}
    notes: dict[str, Any] = {}
    if unsorted:
        notes["rows out of time order (sorted)"] = int(unsorted)
    ends = np.flatnonzero(day_slots < slots)
    if len(ends):
        notes["days that end early"] = [
            str(np.datetime64(int(day0 + k), "D")) for k in ends
        ]
    keep = extra[:, 7] > 0
    halted = int((~keep).sum())
    if halted:
        notes["stock-days without a trade (no row)"] = halted
    no_trade = int(total[-1])
    return StockDays(
        labels,
        code[starts[:-1][keep]],
        days[keep],
        extra[keep],
        out[keep],
        rows_in,
        int(total[0]) - no_trade,
        no_trade,
        rejected,
        notes,
    )


def carry_overnight(
    days: pd.DataFrame, factors: pd.Series | None = None
) -> pd.DataFrame:
    """Complete `ms_overnight` and `ms_mom` from each stock's previous traded day.

    Parameters
    ----------
    days : DataFrame
        `DayRows.frame`, or several of them below one another.
    factors : Series, optional
        Adjustment factor by (datetime, instrument); replaces the `factor` column
        where it has a value. A factor must hold for the close and the open of its
        day, as Qlib's `$factor` does.

    Returns
    -------
    DataFrame
        Sorted by datetime, instrument, in a new frame.
    """
    factor = days["factor"].to_numpy()
    if factors is not None:
        key = pd.MultiIndex.from_frame(days[["datetime", "instrument"]])
        given = factors.reindex(key).to_numpy(dtype=float)
        factor = np.where(np.isfinite(given), given, factor)
    overnight = overnight_returns(
        pd.factorize(days["instrument"])[0],
        days["datetime"].to_numpy(),
        days["open"].to_numpy() * factor,
        days["close"].to_numpy() * factor,
    )
    days = days.assign(
        factor=factor,
        ms_overnight=overnight,
        ms_mom=days["ms_mom"].to_numpy() + overnight,
    )
    return days.sort_values(["datetime", "instrument"], ignore_index=True)


def overnight_returns(
    code: np.ndarray,
    day: np.ndarray,
    opened: np.ndarray,
    closed: np.ndarray,
    before: np.ndarray | None = None,
) -> np.ndarray:
    """Log return from each stock's previous traded close to the open.

    Parameters
    ----------
    code, day : array, shape (k,)
        Number of the stock, and something that orders its days.
    opened, closed : float64[k]
        Adjusted open and close of each stock-day.
    before : float64[stocks], optional
        Adjusted close of each stock before its first day here, NaN if unknown.

    Returns
    -------
    float64[k]
        In the order of the input; NaN on a stock's first day without `before`.
    """
    order = np.lexsort((day, code))
    stock, last = code[order], closed[order]
    previous = np.full(len(order), np.nan)
    same = stock[1:] == stock[:-1]
    previous[1:][same] = last[:-1][same]
    if before is not None and len(order):
        first = np.r_[True, ~same]
        previous[first] = before[stock[first]]
    out = np.empty(len(order))
    out[order] = np.log(opened[order] / previous)
    return out


def minute_features(
    bars: pa.Table | pd.DataFrame,
    factors: pd.Series | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Compute the 22 features of every stock and day of `bars` in memory.

    Parameters
    ----------
    bars, options
        See `aggregate_minutes`.
    factors : Series, optional
        See `carry_overnight`.

    Returns
    -------
    DataFrame
        Index (datetime, instrument), float64 columns `MINUTE_NAMES`.
    """
    rows = aggregate_minutes(bars, **options)
    frame = carry_overnight(rows.frame, factors)
    return frame.set_index(["datetime", "instrument"])[MINUTE_NAMES]


def early_days(
    day: np.ndarray, last_slot: np.ndarray, slots: int, half: int
) -> dict[int, int]:
    """Find days on which no instrument trades in the last half-hour.

    Parameters
    ----------
    day : int array
        Day since 1970 of each stock-day.
    last_slot : float array
        Last slot with a trade of each stock-day, NaN without one.
    slots, half : int
        Slots of a full session and of half an hour.

    Returns
    -------
    dict
        Day to the number of slots up to the end of the last traded half-hour. Days
        with fewer than `MIN_INSTRUMENTS` traded instruments are left alone: one stock
        halted in the afternoon is no early close.
    """
    known = np.isfinite(last_slot)
    days, where = np.unique(day[known], return_inverse=True)
    latest = np.full(len(days), -1.0)
    np.maximum.at(latest, where, last_slot[known])
    count = np.bincount(where, minlength=len(days))
    short = (latest < slots - half) & (count >= MIN_INSTRUMENTS)
    return {
        int(d): int((last // half + 1) * half)
        for d, last in zip(days[short], latest[short], strict=True)
    }


def _early_slots(session: Session, bar_minutes: int) -> dict[int, int]:
    """Slots of the days that `Session.early_close` names, by day since 1970."""
    table = session.minute_of_session(end_stamped=True)
    out = {}
    for date, time in session.early_close.items():
        minute = table[time.hour * 60 + time.minute]
        if minute < 0:
            raise ValueError(
                f"`early_close` of {date} must lie in the session, got {time}."
            )
        day = int(np.datetime64(date, "D").astype(np.int64))
        out[day] = int(minute + 1) // bar_minutes
    return out


def _in_threads(
    kernel: Callable, n: int, args: tuple, threads: int | None = None
) -> None:
    """Run kernel(first, last, *args) over 0…n in threads; it must hold no GIL."""
    threads = threads or len(os.sched_getaffinity(0))
    if threads == 1 or n < 64:
        kernel(0, n, *args)
        return
    edges = np.linspace(0, n, 4 * threads + 1).astype(np.int64)
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(kernel, int(lo), int(hi), *args)
            for lo, hi in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()


def _arrays(
    bars: pa.Table | pd.DataFrame,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Turn a table into instrument labels, codes, stamps (µs) and value arrays."""
    names = bars.column_names if isinstance(bars, pa.Table) else list(bars.columns)
    for name in BARS.required:
        if name not in names:
            raise ValueError(
                f"Bars have no column {name!r}; they need {BARS.required} and have "
                f"{names[:12]}. Name your columns in a mapping file."
            )
    if isinstance(bars, pd.DataFrame):
        use = [n for n in BARS.names if n in names]
        bars = pa.Table.from_pandas(bars[use], preserve_index=False)
    labels, code = dictionary_codes(bars.column("instrument"))
    when = microseconds(bars.column("datetime"), "datetime")
    cols: dict[str, Any] = {}
    for name in ("open", "high", "low", "close", "volume", "amount", "factor"):
        cols[name] = None
        if name in names:
            column = bars.column(name)
            if not (
                pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
            ):
                raise ValueError(
                    f"Bars: column {name!r} must hold numbers, got {column.type}."
                )
            cols[name] = column.to_numpy().astype(np.float64, copy=False)
    return labels, code, when, cols


def dictionary_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Labels, sorted, and the int32 code of each row in them."""
    if not pa.types.is_dictionary(column.type):
        if not (
            pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        ):
            raise ValueError(
                f"Column 'instrument' must hold text such as SH600000, got "
                f"{column.type}."
            )
        column = column.dictionary_encode()
    if column.null_count:
        raise ValueError(
            f"Column 'instrument' is empty in {column.null_count} rows; every row "
            "needs its code."
        )
    column = column.unify_dictionaries()
    if column.num_chunks == 0:
        return np.empty(0, dtype=object), np.empty(0, dtype=np.int32)
    labels = np.asarray(column.chunk(0).dictionary.to_pylist(), dtype=object)
    parts = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    code = parts[0] if len(parts) == 1 else np.concatenate(parts)
    code = code.astype(np.int32, copy=False)
    order = np.argsort(labels, kind="stable")
    if not np.array_equal(order, np.arange(len(labels))):
        rank = np.empty(len(labels), dtype=np.int32)
        rank[order] = np.arange(len(labels), dtype=np.int32)
        labels, code = labels[order], rank[code]
    return labels, code


def microseconds(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Stamps as int64 microseconds since 1970 of exchange-local time, NaT negative."""
    kind = column.type
    if not pa.types.is_timestamp(kind):
        raise ValueError(
            f"Column {name!r} must be a timestamp, got {kind}; a mapping file can say "
            "how to read it (`time_format`)."
        )
    if kind.tz is not None:
        raise ValueError(
            f"Column {name!r} has the time zone {kind.tz}; give exchange-local times "
            "without a zone, or set `tz` in a mapping file to have them translated."
        )
    values = column.to_numpy().astype("datetime64[us]", copy=False)
    return values.view(np.int64)


def check_session(outside: int, rows: int, session: Session) -> None:
    """Refuse a source whose clock is not the exchange's."""
    if rows >= 20 and outside > 0.7 * rows:
        raise ValueError(
            f"{outside} of {rows} rows lie outside the session {session.name!r} "
            f"({session.intervals[0][0]}-{session.intervals[-1][1]}, {session.tz}); "
            "the times look like another time zone or exchange: set `tz` or "
            "`session`."
        )


def _check_length(
    code: np.ndarray, when: np.ndarray, status: np.ndarray, bar_minutes: int
) -> None:
    """Refuse bars longer than the features should be computed from."""
    ok = np.flatnonzero(status[:20000] == 0)
    if len(ok) < 8:
        return
    step = np.diff(when[ok])[(np.diff(code[ok]) == 0)]
    step = step[(step > 0) & (step < 4 * 3_600_000_000)] // 60_000_000
    if len(step) >= 8 and step.min() > bar_minutes:
        raise ValueError(
            f"The bars are {int(step.min())} minutes apart, longer than `bar_minutes` "
            f"= {bar_minutes}; set it to the length of the source's bars."
        )


def frozen(x: np.ndarray) -> np.ndarray:
    """Return a contiguous read-only view: the one type that kernels are compiled for.

    Arrays from Arrow are read-only and numpy's own are not; each mixture of the two
    would be compiled anew.
    """
    view = np.ascontiguousarray(x).view()
    view.flags.writeable = False
    return view


def midnights(day: np.ndarray) -> np.ndarray:
    """Days since 1970 as datetime64[ns]."""
    return day.astype("datetime64[D]").astype("datetime64[ns]")


def early_closes(text: Mapping[str, Any]) -> dict:
    """Parse ``{"2025-07-03": "13:00"}`` of a mapping file for `Session.early_close`."""
    out = {}
    for date, time in text.items():
        try:
            out[pd.Timestamp(str(date)).date()] = pd.Timestamp(str(time)).time()
        except ValueError as error:
            raise ValueError(
                f"`early_close` must be {{date: HH:MM}}, got {date!r}: {time!r}."
            ) from error
    return out
