"""Rolling windows over blocks ``[days, stocks]``, with Qlib's rules.

Each window is summed anew, from its last day back, so a value depends on the days of
its window alone: not on where the data begin, nor on the other stocks of the block.
Windows of several lengths that end on one day are prefixes of one another and share
the work. The loop over stocks is innermost and has no branches, so the compiler takes
several stocks per instruction: sixty additions cost less than one branch that is
guessed wrongly.

- The window counts days; a value is there from its first known day (min_periods=1).
- Moments are taken about the last known value, which lies inside the window: what
  cancels then cancels exactly, and a window of one repeated value has deviation 0.

Every function takes `x` float64 ``[lead + rows, n]``, NaN where unknown, `windows`
ascending, and fills `out` ``[windows, rows, n]``.

References
----------
pyqlib 0.9.7, ``qlib/data/ops.py``; pandas documentation, "Windowing operations".
"""

from __future__ import annotations

import numba as nb
import numpy as np

__all__ = [
    "CONSTANT",
    "co_moments",
    "deviations",
    "extremes",
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


@_compiled
def sums(x, lead, windows, mean, out):
    """Sum or mean of the known values; NaN where none is known."""
    n = x.shape[1]
    total, count = np.empty(n), np.empty(n)
    for r in range(out.shape[1]):
        t = lead + r
        total[:] = 0.0
        count[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = x[t - k]
                for s in range(n):
                    known = row[s] == row[s]
                    total[s] += row[s] if known else 0.0
                    count[s] += 1.0 if known else 0.0
                k += 1
            to = out[j, r]
            if mean:
                for s in range(n):
                    to[s] = total[s] / count[s]
            else:
                for s in range(n):
                    to[s] = total[s] if count[s] > 0.0 else np.nan


@_compiled
def _centre(x, lead, reach):
    """Last known value of the `reach` days before row `lead`, by stock."""
    centre = np.full(x.shape[1], np.nan)
    for t in range(max(0, lead - reach + 1), min(lead, len(x))):
        for s in range(x.shape[1]):
            centre[s] = x[t, s] if x[t, s] == x[t, s] else centre[s]
    return centre


@_compiled
def variances(x, lead, windows, out):
    """Variance (n - 1); NaN for fewer than two known values."""
    n = x.shape[1]
    count, one, two = np.empty(n), np.empty(n), np.empty(n)
    centre = _centre(x, lead, windows[-1])
    for r in range(out.shape[1]):
        t = lead + r
        for s in range(n):
            centre[s] = x[t, s] if x[t, s] == x[t, s] else centre[s]
        count[:] = 0.0
        one[:] = 0.0
        two[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = x[t - k]
                for s in range(n):
                    known = row[s] == row[s]
                    d = row[s] - centre[s] if known else 0.0
                    count[s] += 1.0 if known else 0.0
                    one[s] += d
                    two[s] += d * d
                k += 1
            to = out[j, r]
            for s in range(n):
                m = count[s]
                value = (two[s] - one[s] * one[s] / m) / (m - 1.0)
                value = 0.0 if value < 0.0 else value
                to[s] = value if m > 1.0 else np.nan


@_compiled
def co_moments(x, y, lead, windows, out):
    """Correlation and covariance (n - 1) ``[2, windows, rows, n]`` of known pairs.

    `x` and `y` are NaN on the same days. The correlation is NaN where one of them
    hardly moves.
    """
    n = x.shape[1]
    count, a1, b1, a2, b2, ab = (
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
    )
    mid_x, mid_y = _centre(x, lead, windows[-1]), _centre(y, lead, windows[-1])
    for r in range(out.shape[2]):
        t = lead + r
        for s in range(n):
            mid_x[s] = x[t, s] if x[t, s] == x[t, s] else mid_x[s]
            mid_y[s] = y[t, s] if y[t, s] == y[t, s] else mid_y[s]
        for part in (count, a1, b1, a2, b2, ab):
            part[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                p, q = x[t - k], y[t - k]
                for s in range(n):
                    known = p[s] == p[s]
                    a = p[s] - mid_x[s] if known else 0.0
                    b = q[s] - mid_y[s] if known else 0.0
                    count[s] += 1.0 if known else 0.0
                    a1[s] += a
                    b1[s] += b
                    a2[s] += a * a
                    b2[s] += b * b
                    ab[s] += a * b
                k += 1
            for s in range(n):
                m = count[s]
                va = (a2[s] - a1[s] * a1[s] / m) / (m - 1.0)
                vb = (b2[s] - b1[s] * b1[s] / m) / (m - 1.0)
                cov = (ab[s] - a1[s] * b1[s] / m) / (m - 1.0)
                moves = (np.sqrt(va) > 2e-5) & (np.sqrt(vb) > 2e-5) & (m > 1.0)
                out[0, j, r, s] = cov / np.sqrt(va * vb) if moves else np.nan
                out[1, j, r, s] = cov if m > 1.0 else np.nan


@_compiled
def regressions(x, lead, windows, slots, out):
    """Least squares of the known values on the day's number.

    `slots` says where in `out` ``[., windows, rows, n]`` the slope, the R² and today's
    residual go; -1 is nowhere. Infinite values count as known.
    """
    n = x.shape[1]
    m_, k1, k2, y1, y2, ky = (
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
        np.empty(n),
    )
    centre = _centre(x, lead, windows[-1])
    for r in range(out.shape[2]):
        t = lead + r
        for s in range(n):
            centre[s] = x[t, s] if x[t, s] == x[t, s] else centre[s]
        for part in (m_, k1, k2, y1, y2, ky):
            part[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = x[t - k]
                step = -float(k)
                square = step * step
                for s in range(n):
                    known = row[s] == row[s]
                    y = row[s] - centre[s] if known else 0.0
                    m_[s] += 1.0 if known else 0.0
                    k1[s] += step if known else 0.0
                    k2[s] += square if known else 0.0
                    y1[s] += y
                    y2[s] += y * y
                    ky[s] += step * y
                k += 1
            for s in range(n):
                m = m_[s]
                up = m * ky[s] - k1[s] * y1[s]
                down = m * k2[s] - k1[s] * k1[s]
                slope = up / down
                if slots[0] >= 0:
                    out[slots[0], j, r, s] = slope
                if slots[1] >= 0:
                    spread = m * y2[s] - y1[s] * y1[s]
                    root = up / np.sqrt(down * spread)
                    moves = np.sqrt(spread / (m * (m - 1.0))) > 2e-5
                    out[slots[1], j, r, s] = root * root if moves else np.nan
                if slots[2] >= 0:
                    start = y1[s] / m - slope * (k1[s] / m)
                    out[slots[2], j, r, s] = x[t, s] - centre[s] - start


@_compiled
def extremes(key, lead, windows, sign, out):
    """Largest key of the window times `sign`; the key of what is missing is -inf."""
    n = key.shape[1]
    best = np.empty(n)
    for r in range(out.shape[1]):
        t = lead + r
        best[:] = -np.inf
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = key[t - k]
                for s in range(n):
                    best[s] = row[s] if row[s] > best[s] else best[s]
                k += 1
            to = out[j, r]
            for s in range(n):
                to[s] = sign * best[s] if best[s] > -np.inf else np.nan


@_compiled
def positions(key, known, lead, windows, since, out):
    """Place of the first largest key in the window, from 1.

    Keys: +inf what is missing, -inf before the series begins, with `since`.
    """
    n = key.shape[1]
    best, back, count = np.empty(n), np.empty(n), np.empty(n)
    for r in range(out.shape[1]):
        t = lead + r
        best[:] = -np.inf
        back[:] = 0.0
        count[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row, there = key[t - k], known[t - k]
                days = float(k)
                for s in range(n):
                    wins = (row[s] >= best[s]) & (row[s] > -np.inf)
                    best[s] = row[s] if wins else best[s]
                    back[s] = days if wins else back[s]
                    count[s] += 1.0 if there[s] else 0.0
                k += 1
            to = out[j, r]
            for s in range(n):
                length = float(min(windows[j], t - since[s] + 1))
                to[s] = length - back[s] if count[s] > 0.0 else np.nan


@_compiled
def ranks(x, lead, windows, out):
    """Average rank of today's value, over the number of known values."""
    n = x.shape[1]
    below, equal, count = np.empty(n), np.empty(n), np.empty(n)
    for r in range(out.shape[1]):
        t = lead + r
        now = x[t]
        below[:] = 0.0
        equal[:] = 0.0
        count[:] = 0.0
        k = 0
        for j in range(len(windows)):
            while k < min(windows[j], t + 1):
                row = x[t - k]
                for s in range(n):
                    below[s] += 1.0 if row[s] < now[s] else 0.0
                    equal[s] += 1.0 if row[s] == now[s] else 0.0
                    count[s] += 1.0 if row[s] == row[s] else 0.0
                k += 1
            to = out[j, r]
            for s in range(n):
                rank = (below[s] + (equal[s] + 1.0) / 2.0) / count[s]
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

    The level -1 is the median. Each stock's window is kept sorted.
    """
    order = np.empty(w)
    for s in range(x.shape[1]):
        m = 0
        first = max(0, lead - w + 1)
        for t in range(first, lead + out.shape[1]):
            new = x[t, s]
            old = x[t - w, s] if t - w >= first else np.nan
            k = m
            if old == old:
                # The new value slides from the place of the one that leaves.
                k = 0
                while order[k] < old:
                    k += 1
                if not new == new:
                    m -= 1
                    while k < m:
                        order[k] = order[k + 1]
                        k += 1
            elif new == new:
                m += 1
            if new == new:
                while k > 0 and order[k - 1] > new:
                    order[k] = order[k - 1]
                    k -= 1
                while k < m - 1 and order[k + 1] < new:
                    order[k] = order[k + 1]
                    k += 1
                order[k] = new
            if t < lead:
                continue
            for q in range(len(levels)):
                if m == 0:
                    out[q, t - lead, s] = np.nan
                elif m == 1:
                    out[q, t - lead, s] = order[0]
                elif levels[q] < 0.0 and m % 2 == 0:
                    out[q, t - lead, s] = (order[m // 2 - 1] + order[m // 2]) / 2.0
                else:
                    level = 0.5 if levels[q] < 0.0 else levels[q]
                    place = level * (m - 1)
                    at = int(place)
                    low = order[at]
                    high = order[min(at + 1, m - 1)]
                    gap = (high - low) * (place - at)
                    out[q, t - lead, s] = low if place == at else low + gap
