"""Operators that compare the stocks of one day.

Nothing but the day's own values enters, and of those only the universe's members'.
"""

from __future__ import annotations

import numba as nb
import numpy as np

__all__ = ["cross_section"]


def cross_section(
    op: str, columns: np.ndarray, member: np.ndarray | None = None
) -> np.ndarray:
    """Value of a cross-sectional operator.

    Parameters
    ----------
    op : {"CSRank", "CSZScore", "CSDemean", "CSScale"}
        Average rank over the number of known values, in (0, 1]; distance from the mean
        in standard deviations (n - 1); distance from the mean; share of the sum of
        absolute values. Infinite values count as missing.
    columns : float32 array [1 or 2, t, n]
        Values, and each stock's group. Stocks of one group are compared; a stock
        without a group has no value.
    member : bool array [t, n], optional
        Members of the universe; others have no value and count for nothing.

    Returns
    -------
    float32 array [t, n]
        NaN where the value is missing; a deviation of zero gives NaN, and so does a
        sum of zero.
    """
    x = columns[0].astype(np.float64)
    x[np.isinf(x)] = np.nan
    if member is not None:
        x[~member] = np.nan
    groups = np.zeros_like(x) if len(columns) == 1 else columns[1].astype(np.float64)
    x[~np.isfinite(groups)] = np.nan
    out = np.full(x.shape, np.nan, np.float32)
    _days(x, groups, ("CSRank", "CSZScore", "CSDemean", "CSScale").index(op), out)
    return out


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _days(x, groups, mode, out):
    n = x.shape[1]
    for t in range(x.shape[0]):
        known = np.flatnonzero(x[t] == x[t])
        if len(known) == 0:
            continue
        values = x[t][known]
        label = groups[t][known]
        # By group, then value; equal keys keep the order of stocks.
        order = np.argsort(values, kind="mergesort")
        order = order[np.argsort(label[order], kind="mergesort")]
        first = 0
        while first < len(order):
            last = first
            while last < len(order) and label[order[last]] == label[order[first]]:
                last += 1
            m = last - first
            if mode == 0:
                a = first
                while a < last:
                    b = a
                    while b < last and values[order[b]] == values[order[a]]:
                        b += 1
                    rank = (a + b - 1) / 2.0 - first + 1.0
                    for i in range(a, b):
                        out[t, known[order[i]]] = rank / m
                    a = b
            else:
                total = 0.0
                for i in range(first, last):
                    v = values[order[i]]
                    total += abs(v) if mode == 3 else v
                mean = total / m
                spread = 0.0
                for i in range(first, last):
                    spread += (values[order[i]] - mean) ** 2
                deviation = np.sqrt(spread / (m - 1.0))
                flat = values[order[first]] == values[order[last - 1]]
                for i in range(first, last):
                    v = values[order[i]]
                    if mode == 1:
                        z = np.nan if flat else (v - mean) / deviation
                    elif mode == 2:
                        z = v - mean
                    else:
                        z = v / total if total > 0.0 else np.nan
                    out[t, known[order[i]]] = z
            first = last
    return n
