"""Rolling operators over blocks ``[days, stocks]``, with Qlib's rules.

Qlib hands its rolling operators to pandas (`Mean`, `Sum`, `Std`, `Corr`, …) or to
compiled loops of its own (`Slope`, `Rsquare`, `Resi`), one stock at a time. These
kernels take a block of stocks at once, day by day, and repeat the same arithmetic in
the same order, so that sums that cancel leave the same last digits behind: Kahan sums
and Welford updates with a compensation each for what enters and what leaves the window,
and windows of one repeated value answered exactly. What looks like an accident is kept:

- the window counts days, a value is there from its first known day (min_periods=1);
- pandas takes infinite values for missing, Qlib's regressions do not: there an infinite
  value spoils the running sums, and every later value of the stock is NaN.

Glossary: t days; n stocks; w window in days. Everything is float64.

References
----------
Welford (1962); Kahan (1965), as pandas' rolling windows use them (pandas documentation,
"Windowing operations"); pyqlib 0.9.7, ``qlib/data/ops.py``.
"""

from __future__ import annotations

import numba as nb
import numpy as np

__all__ = [
    "rolling_corr",
    "rolling_cov",
    "rolling_extreme",
    "rolling_mean",
    "rolling_quantile",
    "rolling_rank",
    "rolling_regression",
    "rolling_std",
    "rolling_sum",
    "shift",
]

_MODES = {"slope": 0, "rsquare": 1, "resi": 2}
# Qlib calls a series constant where its rolling deviation is below this.
_CONSTANT = 2e-5


def shift(x: np.ndarray, w: int) -> np.ndarray:
    """Values of `w` days earlier, ``[t, n]``; NaN on the first days."""
    out = np.full_like(x, np.nan)
    if w < len(x):
        out[w:] = x[: len(x) - w]
    return out


def rolling_sum(x: np.ndarray, w: int) -> np.ndarray:
    """Sum of the known values of the last `w` days; NaN where none is known."""
    return _sums(_finite(x), w, False)


def rolling_mean(x: np.ndarray, w: int) -> np.ndarray:
    """Mean of the known values of the last `w` days; NaN where none is known."""
    return _sums(_finite(x), w, True)


def rolling_std(x: np.ndarray, w: int) -> np.ndarray:
    """Take the standard deviation (n - 1); NaN for fewer than two known values."""
    return np.sqrt(_variance(_finite(x), w))


def rolling_extreme(x: np.ndarray, w: int, largest: bool) -> np.ndarray:
    """Largest or smallest known value of the last `w` days."""
    # An infinity that never wins stands for what is missing: numpy's maximum is several
    # times as fast as its fmax, which passes over NaN.
    never = -np.inf if largest else np.inf
    pick = np.maximum if largest else np.minimum
    out = x.astype(np.float64)
    out[~np.isfinite(out)] = never
    covered = 1
    # The extreme of 2k days is that of two runs of k: log2(w) passes.
    while covered < w:
        step = min(covered, w - covered)
        if step >= len(out):
            break
        longer = out.copy()
        pick(out[step:], out[:-step], out=longer[step:])
        out = longer
        covered += step
    out[out == never] = np.nan
    return out


def rolling_rank(x: np.ndarray, w: int) -> np.ndarray:
    """Average rank of today's value among the last `w` days, over their number."""
    return _ranks(_finite(x), w)


def rolling_quantile(x: np.ndarray, w: int, q: float) -> np.ndarray:
    """Quantile of the last `w` days' known values, linear between neighbours."""
    return np.ascontiguousarray(
        _quantiles(np.ascontiguousarray(_finite(x).T), w, float(q)).T
    )


def rolling_regression(x: np.ndarray, w: int, figure: str) -> np.ndarray:
    """Least squares of the known values on the day's number 1 … `w`.

    `figure`: "slope", "rsquare" or "resi" (today's residual).
    """
    out = _regression(np.ascontiguousarray(x, np.float64), w, _MODES[figure])
    if figure == "rsquare":
        with np.errstate(invalid="ignore"):
            out[rolling_std(x, w) <= _CONSTANT] = np.nan
    return out


def rolling_corr(x: np.ndarray, y: np.ndarray, w: int) -> np.ndarray:
    """Correlation of the days on which both are known.

    NaN where one of them, taken alone, hardly moves: a deviation up to 2e-5.
    """
    a, b = _pairs(x, y)
    var_a, var_b = _variance(a, w), _variance(b, w)
    with np.errstate(all="ignore"):
        out = _co_moment(a, b, w) / np.sqrt(var_a * var_b)
        for alone, pair, var in ((x, a, var_a), (y, b, var_b)):
            alone = _finite(alone)
            if not np.array_equal(alone == alone, pair == pair):
                var = _variance(alone, w)
            out[np.sqrt(var) <= _CONSTANT] = np.nan
    return out


def rolling_cov(x: np.ndarray, y: np.ndarray, w: int) -> np.ndarray:
    """Covariance (n - 1) of the days on which both are known."""
    return _co_moment(*_pairs(x, y), w)


def _pairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore"):
        return _finite(x + 0 * y), _finite(y + 0 * x)


def _co_moment(x: np.ndarray, y: np.ndarray, w: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        product = x * y
        product[np.isinf(product)] = np.nan
        count = _counts(x, w)
        mean = _sums(product, w, True) - _sums(x, w, True) * _sums(y, w, True)
        return mean * (count / (count - 1))


def _finite(x: np.ndarray) -> np.ndarray:
    out = x.astype(np.float64)
    out[np.isinf(out)] = np.nan
    return out


# Each day's loop over stocks is cut into short ones without branches: the compiler then
# takes several stocks per instruction.


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _sums(x, w, mean):
    t_all, n = x.shape
    out = np.empty((t_all, n))
    total, count, same, negative = np.zeros((4, n))
    comp_in, comp_out = np.zeros((2, n))
    last = x[0].copy()
    for t in range(t_all):
        if t >= w:
            for s in range(n):
                old = x[t - w, s]
                known = old == old
                y = -old - comp_out[s]
                z = total[s] + y
                comp_out[s] = z - total[s] - y if known else comp_out[s]
                total[s] = z if known else total[s]
                count[s] -= 1.0 if known else 0.0
                negative[s] -= 1.0 if known and np.copysign(1.0, old) < 0.0 else 0.0
        for s in range(n):
            new = x[t, s]
            known = new == new
            y = new - comp_in[s]
            z = total[s] + y
            comp_in[s] = z - total[s] - y if known else comp_in[s]
            total[s] = z if known else total[s]
            count[s] += 1.0 if known else 0.0
            negative[s] += 1.0 if known and np.copysign(1.0, new) < 0.0 else 0.0
            run = same[s] + 1.0 if new == last[s] else 1.0
            same[s] = run if known else same[s]
            last[s] = new if known else last[s]
        if mean:
            for s in range(n):
                m = count[s]
                value = total[s] / m
                value = 0.0 if (negative[s] == 0.0) & (value < 0.0) else value
                value = 0.0 if (negative[s] == m) & (value > 0.0) else value
                value = last[s] if same[s] >= m else value
                out[t, s] = value if m > 0.0 else np.nan
        else:
            for s in range(n):
                m = count[s]
                value = last[s] * m if same[s] >= m else total[s]
                out[t, s] = value if m > 0.0 else np.nan
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _variance(x, w):
    t_all, n = x.shape
    out = np.empty((t_all, n))
    mean, squares, count, same = np.zeros((4, n))
    comp_in, comp_out = np.zeros((2, n))
    last = x[0].copy()
    for t in range(t_all):
        if t >= w:
            for s in range(n):
                old = x[t - w, s]
                known = old == old
                m = count[s] - 1.0
                some = known and m > 0.0
                before = mean[s] - comp_out[s]
                y = old - comp_out[s]
                z = y - mean[s]
                comp_out[s] = z + mean[s] - y if some else comp_out[s]
                middle = mean[s] - z / m
                left = squares[s] - (old - before) * (old - middle)
                mean[s] = middle if some else (0.0 if known else mean[s])
                squares[s] = left if some else (0.0 if known else squares[s])
                count[s] = m if known else count[s]
        for s in range(n):
            new = x[t, s]
            known = new == new
            m = count[s] + 1.0
            before = mean[s] - comp_in[s]
            y = new - comp_in[s]
            z = y - mean[s]
            comp_in[s] = z + mean[s] - y if known else comp_in[s]
            middle = mean[s] + z / m
            more = squares[s] + (new - before) * (new - middle)
            mean[s] = middle if known else mean[s]
            squares[s] = more if known else squares[s]
            count[s] = m if known else count[s]
        for s in range(n):
            new = x[t, s]
            known = new == new
            run = same[s] + 1.0 if new == last[s] else 1.0
            same[s] = run if known else same[s]
            last[s] = new if known else last[s]
            m = count[s]
            value = 0.0 if same[s] >= m else squares[s] / (m - 1.0)
            value = 0.0 if value < 0.0 else value
            out[t, s] = value if m > 1.0 else np.nan
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _counts(x, w):
    t_all, n = x.shape
    out = np.empty((t_all, n))
    count = np.zeros(n)
    for t in range(t_all):
        if t >= w:
            for s in range(n):
                count[s] -= 1.0 if x[t - w, s] == x[t - w, s] else 0.0
        for s in range(n):
            count[s] += 1.0 if x[t, s] == x[t, s] else 0.0
            out[t, s] = count[s]
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _ranks(x, w):
    t_all, n = x.shape
    out = np.empty((t_all, n))
    for t in range(t_all):
        below = np.zeros(n)
        equal = np.zeros(n)
        known = np.zeros(n)
        for d in range(max(0, t - w + 1), t + 1):
            for s in range(n):
                old, new = x[d, s], x[t, s]
                below[s] += 1.0 if old < new else 0.0
                equal[s] += 1.0 if old == new else 0.0
                known[s] += 1.0 if old == old else 0.0
        for s in range(n):
            rank = below[s] + (equal[s] + 1.0) / 2.0
            out[t, s] = rank / known[s] if x[t, s] == x[t, s] else np.nan
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _quantiles(x, w, q):
    n, t_all = x.shape
    out = np.empty((n, t_all))
    order = np.empty(w)
    for s in range(n):
        m = 0
        for t in range(t_all):
            new = x[s, t]
            old = x[s, t - w] if t >= w else np.nan
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
            if m == 0:
                out[s, t] = np.nan
            elif m == 1:
                out[s, t] = order[0]
            elif q == 0.5 and m % 2 == 0:
                out[s, t] = (order[m // 2 - 1] + order[m // 2]) / 2.0
            else:
                place = q * (m - 1)
                at = int(place)
                low = order[at]
                high = order[min(at + 1, m - 1)]
                out[s, t] = low if place == at else low + (high - low) * (place - at)
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _regression(x, w, mode):
    t_all, n = x.shape
    out = np.empty((t_all, n))
    i_sum, x_sum, x2_sum, y_sum, y2_sum, xy_sum = np.zeros((6, n))
    wide = float(w)
    for t in range(t_all):
        for s in range(n):
            xy_sum[s] -= y_sum[s]
            x2_sum[s] = x2_sum[s] + i_sum[s] - 2.0 * x_sum[s]
            x_sum[s] -= i_sum[s]
        if t >= w:
            for s in range(n):
                old = x[t - w, s]
                known = old == old
                i_sum[s] -= 1.0 if known else 0.0
                y_sum[s] -= old if known else 0.0
                y2_sum[s] -= old * old if known else 0.0
        for s in range(n):
            new = x[t, s]
            known = new == new
            y_sum[s] += new if known else 0.0
            y2_sum[s] += new * new if known else 0.0
            xy_sum[s] += wide * new if known else 0.0
        for s in range(n):
            known = x[t, s] == x[t, s]
            i_sum[s] += 1.0 if known else 0.0
            x_sum[s] += wide if known else 0.0
            x2_sum[s] += wide * wide if known else 0.0
        for s in range(n):
            m = i_sum[s]
            up = m * xy_sum[s] - x_sum[s] * y_sum[s]
            down = m * x2_sum[s] - x_sum[s] * x_sum[s]
            if mode == 1:
                r = up / np.sqrt(down * (m * y2_sum[s] - y_sum[s] * y_sum[s]))
                out[t, s] = r * r
            elif mode == 0:
                out[t, s] = up / down
            else:
                slope = up / down
                start = y_sum[s] / m - slope * (x_sum[s] / m)
                out[t, s] = x[t, s] - (slope * wide + start)
    return out
