"""Rolling windows over blocks ``[days, stocks]``, with Qlib's rules.

Each window is summed anew, from its last day back, so a value depends on the days of
its window alone: not on where the data begin, nor on the other stocks of the block.
Windows of several lengths that end on one day are prefixes of one another and share
the work. The loop over stocks is innermost and has no branches, so the compiler takes
several stocks per instruction: sixty additions cost less than one branch that is
guessed wrongly. (It does so for a choice between two values only if they are no bare
loads: hence some ``+ 0.0``, which changes nothing but the sign of zero.)

- The window counts days; a value is there from its first known day (min_periods=1).
- Counts are whole numbers, and an order is one of values: both may be carried along
  without losing a digit, so they depend on the window alone as well.
- Moments are taken about the last known value, which lies inside the window: what
  cancels then cancels exactly, and a window of one repeated value has deviation 0.

Every function takes `x` float64 ``[lead + rows, n]`` (where values are only compared,
float32 will do, at half the time), NaN where unknown, `windows` ascending, and fills
`out` ``[windows, rows, n]``.

References
----------
pyqlib 0.9.7, ``qlib/data/ops.py``; pandas documentation, "Windowing operations".
"""

from __future__ import annotations

import numba as nb
import numpy as np

from data_handlers.compiled import inner

__all__ = [
    "CONSTANT",
    "co_moments",
    "deviations",
    "extremes",
    "finite",
    "positions",
    "quantiles",
    "ranks",
    "regressions",
    "sums",
    "variances",
    "weighted",
]

# Qlib calls a series constant where its rolling deviation is at most this.
CONSTANT = 2e-5

_compiled = nb.njit(nogil=True, cache=True, error_model="numpy")
_inner = inner(error_model="numpy")


@_compiled
def finite(x, out):
    """Copy in which infinite values are missing, as pandas' windows take them."""
    for t in range(len(x)):
        row, to = x[t], out[t]
        for s in range(len(to)):
            v = row[s]
            to[s] = v if abs(v) < np.inf else np.nan


@_inner
def _count(x, t, windows, count):
    """Known values of each window that ends at row `t`; whole numbers, so exact.

    `count` ``[windows, n]`` holds those of row ``t - 1``; at the first call, nothing.
    """
    for j in range(len(windows)):
        to = count[j]
        if t >= windows[j]:
            new, old = x[t], x[t - windows[j]]
            for s in range(len(to)):
                v, u = new[s], old[s]
                to[s] += (1.0 if v == v else 0.0) - (1.0 if u == u else 0.0)
        else:
            new = x[t]
            for s in range(len(to)):
                v = new[s]
                to[s] += 1.0 if v == v else 0.0


@_inner
def _first_count(x, lead, windows):
    """Count before row `lead`, ``[windows, n]``."""
    count = np.zeros((len(windows), x.shape[1]))
    for j in range(len(windows)):
        for t in range(max(0, lead - windows[j]), lead):
            for s in range(x.shape[1]):
                count[j, s] += 1.0 if x[t, s] == x[t, s] else 0.0
    return count


@_inner
def _add_five(total, x, t):
    """Add rows t, t - 1, … t - 4, in this order, with one pass over the totals."""
    a, b, c, d, e = x[t], x[t - 1], x[t - 2], x[t - 3], x[t - 4]
    for s in range(len(total)):
        total[s] = total[s] + a[s] + b[s] + c[s] + d[s] + e[s]


@_compiled
def sums(x, lead, windows, mean, out):
    """Sum or mean of the known values; NaN where none is known."""
    n = x.shape[1]
    clean = np.empty_like(x)
    for t in range(len(x)):
        row, to = x[t], clean[t]
        for s in range(n):
            v = row[s]
            to[s] = v if v == v else 0.0
    total = np.empty(n)
    count = _first_count(x, lead, windows)
    for r in range(out.shape[1]):
        t = lead + r
        _count(x, t, windows, count)
        total[:] = 0.0
        k = 0
        for j in range(len(windows)):
            stop = min(windows[j], t + 1)
            while k + 5 <= stop:
                _add_five(total, clean, t - k)
                k += 5
            while k < stop:
                row = clean[t - k]
                for s in range(n):
                    total[s] += row[s]
                k += 1
            to, known = out[j, r], count[j]
            if mean:
                for s in range(n):
                    to[s] = total[s] / known[s]
            else:
                for s in range(n):
                    v = total[s]
                    to[s] = v if known[s] > 0.0 else np.nan


@_inner
def _centre(x, lead, reach):
    """Last known value of the `reach` days before row `lead`, by stock."""
    centre = np.full(x.shape[1], np.nan)
    for t in range(max(0, lead - reach + 1), min(lead, len(x))):
        _follow(x[t], centre)
    return centre


@_inner
def _follow(row, centre):
    for s in range(len(row)):
        v, c = row[s] + 0.0, centre[s] + 0.0
        centre[s] = v if v == v else c


@_compiled
def variances(x, lead, windows, out):
    """Variance (n - 1); NaN for fewer than two known values."""
    n = x.shape[1]
    one, two = np.empty(n), np.empty(n)
    centre = _centre(x, lead, windows[-1])
    count = _first_count(x, lead, windows)
    for r in range(out.shape[1]):
        t = lead + r
        _count(x, t, windows, count)
        _follow(x[t], centre)
        one[:] = 0.0
        two[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = x[t - k]
                for s in range(n):
                    d = row[s] - centre[s]
                    d = d if d == d else 0.0
                    one[s] += d
                    two[s] += d * d
                k += 1
            to, known = out[j, r], count[j]
            for s in range(n):
                m = known[s]
                value = (m * two[s] - one[s] * one[s]) / (m * (m - 1.0))
                value = 0.0 if value < 0.0 else value
                to[s] = value if m > 1.0 else np.nan


@_compiled
def co_moments(x, y, lead, windows, out):
    """Correlation and covariance (n - 1) ``[., windows, rows, n]`` of known pairs.

    `x` and `y` are NaN on the same days. The correlation is NaN where one of them
    hardly moves. The covariance only if `out` has room for it.
    """
    n = x.shape[1]
    a1, b1, a2, b2, ab = (
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
    )
    mid_x, mid_y = _centre(x, lead, windows[-1]), _centre(y, lead, windows[-1])
    count = _first_count(x, lead, windows)
    for r in range(out.shape[2]):
        t = lead + r
        _count(x, t, windows, count)
        _follow(x[t], mid_x)
        _follow(y[t], mid_y)
        for part in (a1, b1, a2, b2, ab):
            part[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                p, q = x[t - k], y[t - k]
                for s in range(n):
                    a = p[s] - mid_x[s]
                    a = a if a == a else 0.0
                    b = q[s] - mid_y[s]
                    b = b if b == b else 0.0
                    a1[s] += a
                    b1[s] += b
                    a2[s] += a * a
                    b2[s] += b * b
                    ab[s] += a * b
                k += 1
            known, corr = count[j], out[0, j, r]
            for s in range(n):
                m = known[s]
                va = m * a2[s] - a1[s] * a1[s]
                vb = m * b2[s] - b1[s] * b1[s]
                c = m * ab[s] - a1[s] * b1[s]
                least = CONSTANT * CONSTANT * (m * (m - 1.0))
                moves = (va > least) & (vb > least)
                value = c / np.sqrt(va * vb)
                corr[s] = value if moves & (m > 1.0) else np.nan
            if len(out) > 1:
                cov = out[1, j, r]
                for s in range(n):
                    m = known[s]
                    c = (m * ab[s] - a1[s] * b1[s]) / (m * (m - 1.0))
                    cov[s] = c if m > 1.0 else np.nan


@_inner
def _ages(x, t, windows, ages):
    """Count the known values of each window that ends at row `t`, and add their ages.

    `ages` ``[3, windows, n]`` holds number, sum and sum of squares in days of row
    ``t - 1``, whole numbers, so exact; at the first call, nothing.
    """
    for j in range(len(windows)):
        number, one, two = ages[0, j], ages[1, j], ages[2, j]
        full = t >= windows[j]
        age = float(windows[j]) if full else 0.0
        new, old = x[t], x[t - windows[j]] if full else x[t]
        for s in range(len(number)):
            u, v = old[s], new[s]
            gone, come = 1.0 if u == u else 0.0, 1.0 if v == v else 0.0
            m, k = number[s], one[s]
            two[s] += 2.0 * k + m - gone * age * age
            one[s] = k + m - gone * age
            number[s] = m + come - (gone if full else 0.0)


@_compiled
def regressions(x, lead, windows, slots, out):
    """Least squares of the known values on the day's number.

    `slots` says where in `out` ``[., windows, rows, n]`` the slope, the R² and today's
    residual go; -1 is nowhere. Infinite values count as known.
    """
    n = x.shape[1]
    y1, y2, ky, slope = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    centre = _centre(x, lead, windows[-1])
    ages = np.zeros((3, len(windows), n))
    first = max(0, lead - windows[-1])
    for t in range(first, lead):
        _ages(x[first:], t - first, windows, ages)
    for r in range(out.shape[2]):
        t = lead + r
        _ages(x, t, windows, ages)
        _follow(x[t], centre)
        for part in (y1, y2, ky):
            part[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = x[t - k]
                age = float(k)
                for s in range(n):
                    y = row[s] - centre[s]
                    y = y if y == y else 0.0
                    y1[s] += y
                    y2[s] += y * y
                    ky[s] += age * y
                k += 1
            number, one, two = ages[0, j], ages[1, j], ages[2, j]
            for s in range(n):  # days run against ages: hence the signs
                m, k1 = number[s], one[s]
                up = k1 * y1[s] - m * ky[s]
                slope[s] = up / (m * two[s] - k1 * k1)
            if slots[0] >= 0:
                out[slots[0], j, r] = slope
            if slots[1] >= 0:
                to = out[slots[1], j, r]
                for s in range(n):
                    m = number[s]
                    up = one[s] * y1[s] - m * ky[s]
                    spread = m * y2[s] - y1[s] * y1[s]
                    moves = spread > CONSTANT * CONSTANT * (m * (m - 1.0))
                    to[s] = slope[s] * up / spread if moves else np.nan
            if slots[2] >= 0:
                to, now = out[slots[2], j, r], x[t]
                for s in range(n):
                    start = (y1[s] + slope[s] * one[s]) / number[s]
                    to[s] = now[s] - centre[s] - start


@_compiled
def extremes(key, lead, windows, sign, out):
    """Largest key of the window times `sign`."""
    n = key.shape[1]
    best, none = np.empty(n, key.dtype), key.dtype.type(0)
    for r in range(out.shape[1]):
        t = lead + r
        best[:] = -np.inf
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = key[t - k]
                for s in range(n):
                    v, b = row[s] + none, best[s] + none
                    best[s] = v if v > b else b  # never one that is missing
                k += 1
            to = out[j, r]
            for s in range(n):
                b = best[s]
                to[s] = sign * b if b > -np.inf else np.nan


@_compiled
def positions(key, known, lead, windows, since, out):
    """Place of the first largest key in the window, from 1.

    Keys: +inf what is missing, -inf before the series begins, with `since`; `known` is
    NaN where the value is missing.
    """
    n = key.shape[1]
    best, back = np.empty(n, key.dtype), np.empty(n, key.dtype)
    none = key.dtype.type(0)
    count = _first_count(known, lead, windows)
    for r in range(out.shape[1]):
        t = lead + r
        _count(known, t, windows, count)
        best[:] = -np.inf
        back[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = key[t - k]
                days = key.dtype.type(k)
                for s in range(n):
                    v, b, d = row[s] + none, best[s] + none, back[s] + none
                    wins = v >= b
                    best[s] = v if wins else b
                    back[s] = days if wins else d
                k += 1
            to, there = out[j, r], count[j]
            for s in range(n):
                length = float(min(windows[j], t - since[s] + 1))
                to[s] = length - back[s] if there[s] > 0.0 else np.nan


@_compiled
def ranks(x, lead, windows, out):
    """Average rank of today's value, over the number of known values."""
    n = x.shape[1]
    score = np.empty(n, x.dtype)
    half, none = x.dtype.type(0.5), x.dtype.type(0)
    count = _first_count(x, lead, windows)
    for r in range(out.shape[1]):
        t = lead + r
        _count(x, t, windows, count)
        now = x[t]
        score[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = x[t - k]
                for s in range(n):
                    v, u = row[s], now[s]
                    # A smaller value counts 1, an equal one a half.
                    score[s] += (half if v < u else none) + (half if v <= u else none)
                k += 1
            to, known = out[j, r], count[j]
            for s in range(n):
                rank = (score[s] + 0.5) / known[s]
                to[s] = rank if now[s] == now[s] else np.nan


@_compiled
def deviations(x, lead, windows, out):
    """Mean distance from the window's mean."""
    sums(x, lead, windows, True, out)
    n = x.shape[1]
    total, count = np.empty(n), np.empty(n)
    for r in range(out.shape[1]):
        t = lead + r
        for j in range(len(windows)):
            total[:] = 0.0
            count[:] = 0.0
            for k in range(min(windows[j], t + 1)):
                for s in range(n):
                    v = x[t - k, s]
                    total[s] += abs(v - out[j, r, s]) if v == v else 0.0
                    count[s] += 1.0 if v == v else 0.0
            for s in range(n):
                out[j, r, s] = total[s] / count[s]


@_compiled
def weighted(x, lead, windows, since, out):
    """Mean of the known values times their day's weight, 1, 2, … up to today.

    The weights of all days of the window, missing ones included, add up to 1; the mean
    is over the known ones, as Qlib has it.
    """
    n = x.shape[1]
    for r in range(out.shape[1]):
        t = lead + r
        for j in range(len(windows)):
            for s in range(n):
                length = min(windows[j], t - since[s] + 1)
                total = 0.0
                count = 0.0
                for k in range(length):
                    v = x[t - k, s]
                    total += (length - k) * v if v == v else 0.0
                    count += 1.0 if v == v else 0.0
                whole = length * (length + 1) / 2.0
                out[j, r, s] = total / whole / count if count > 0.0 else np.nan


@_compiled
def quantiles(x, lead, w, levels, out):
    """Quantiles of the known values, linear between neighbours, ``[levels, rows, n]``.

    The level -1 is the median. A window is kept in order, the missing at its end; a day
    goes through it once: today's value pushes the larger ones back by a place, and
    those above the one that leaves move forward.
    """
    n, kind = x.shape[1], x.dtype
    first = max(0, lead - w + 1)
    none = kind.type(np.inf)
    new, old, held = np.empty(n, kind), np.empty(n, kind), np.empty(n, kind)
    order, count = np.full((w + 1, n), none), np.zeros(n)
    for t in range(first, lead + out.shape[1]):
        now, gone = x[t], x[max(first, t - w)]
        leaves = t - w >= first
        for s in range(n):
            new[s] = now[s] if now[s] == now[s] else none
        for s in range(n):
            old[s] = gone[s] if leaves & (gone[s] == gone[s]) else none
        known = 0.0
        for s in range(n):
            count[s] += (1.0 if new[s] < none else 0.0) - (
                1.0 if old[s] < none else 0.0
            )
            known += count[s]
        row = order[0]
        for s in range(n):
            held[s] = row[s] if row[s] < new[s] else new[s]
        for i in range(w):
            row, above = order[i], order[i + 1]
            for s in range(n):
                a, v, u = held[s], new[s], above[s]
                low = u if u < v else v
                b = low if low > row[s] else row[s]
                row[s] = a if a < old[s] else b
                held[s] = b
        if t < lead:
            continue
        for q in range(len(levels)):
            to = out[q, t - lead]
            level = 0.5 if levels[q] < 0.0 else levels[q]
            if known == w * n:
                at = int(np.floor(level * (w - 1.0)))
                part = level * (w - 1.0) - at
                low_, high = order[at], order[at + 1]
                for s in range(n):
                    to[s] = _between(low_[s], high[s], part, levels[q])
                continue
            for s in range(n):
                at = int(np.floor(level * (count[s] - 1.0)))
                part = level * (count[s] - 1.0) - at
                to[s] = np.nan
                if at >= 0:
                    to[s] = _between(order[at, s], order[at + 1, s], part, levels[q])


@_inner
def _between(low, high, part, level):
    a, b = np.float64(low), np.float64(high)
    value = (a + b) / 2.0 if level < 0.0 else a + (b - a) * part
    return a if part == 0.0 else value
