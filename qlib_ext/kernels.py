"""Compiled ranks and correlations of rows, for the CPU.

A radix sort passes a few times over a row that stays in the first-level cache; that is
a third of the cost of numpy's vectorised argsort. `qlib_ext.metrics` holds the same in
torch operations, for accelerators and as the reference of the tests. All functions
release the interpreter's lock and run in the calling thread.

Glossary: m rows, n values of a row. `bits` are values as unsigned integers of their
size (``x.view(np.uint32)``).
"""

from __future__ import annotations

import numba as nb
import numpy as np

from data_handlers.compiled import inner

__all__ = ["correlate_rows", "rank_rows"]

# Sums may be taken in vector lanes.
_FAST = {"reassoc", "contract"}


@nb.njit(nogil=True, cache=True)
def rank_rows(x, bits, out):
    """Write average ranks of the finite values of each row [m, n], NaN elsewhere."""
    n = x.shape[1]
    work = _workspace(bits, n)
    place, found = np.empty(n, np.int64), np.empty(n, bits.dtype)
    ranks = np.empty(n)
    for i in range(len(x)):
        count = 0
        for j in range(n):
            out[i, j] = np.nan
            if x[i, j] - x[i, j] == 0:
                place[count], found[count] = j, bits[i, j]
                count += 1
        _rank(found[:count], work, ranks)
        for j in range(count):
            out[i, place[j]] = ranks[j]


@nb.njit(nogil=True, cache=True)
def correlate_rows(a, b, a_bits, b_bits, ranked, count, cov, var_a, var_b):
    """Write pairs that count and sums of centred products of each row, all [m]."""
    n = a.shape[1]
    x, y = np.empty(n), np.empty(n)
    work_a, work_b = _workspace(a_bits, n), _workspace(b_bits, n)
    found_a, found_b = np.empty(n, a_bits.dtype), np.empty(n, b_bits.dtype)
    for i in range(len(a)):
        k = 0
        for j in range(n):
            # NaN and infinity less themselves are NaN. Written in any case and
            # overwritten if the pair does not count: no branch to guess wrong.
            if ranked:
                found_a[k], found_b[k] = a_bits[i, j], b_bits[i, j]
            else:
                x[k], y[k] = a[i, j], b[i, j]
            k += (a[i, j] - a[i, j]) + (b[i, j] - b[i, j]) == 0
        count[i] = k
        if ranked:
            ties_a = _rank(found_a[:k], work_a, x)
            ties_b = _rank(found_b[:k], work_b, y)
            # The variance of ranks follows from count and ties.
            cube = float(k) ** 3 - k
            cov[i] = _products(x[:k], y[:k], (k + 1) / 2, (k + 1) / 2)
            var_a[i], var_b[i] = (cube - ties_a) / 12, (cube - ties_b) / 12
        else:
            mean_a, mean_b = _centre(x[:k]), _centre(y[:k])
            cov[i] = _products(x[:k], y[:k], mean_a, mean_b)
            var_a[i] = _products(x[:k], x[:k], mean_a, mean_a)
            var_b[i] = _products(y[:k], y[:k], mean_b, mean_b)


@inner(fastmath=_FAST)
def _centre(x):
    """Take the first value off x, in place, and return the mean of what is left.

    A constant row then has exactly no variance, where a rounded mean would leave some.
    """
    total = 0.0
    if len(x):
        pivot = x[0]
        for j in range(len(x)):
            x[j] -= pivot
            total += x[j]
    return total / max(len(x), 1)


@inner(fastmath=_FAST)
def _products(x, y, mean_x, mean_y):
    total = 0.0
    for j in range(len(x)):
        total += (x[j] - mean_x) * (y[j] - mean_y)
    return total


@inner
def _workspace(bits, n):
    """Keys and positions, each twice, and the counts of each digit."""
    return (
        np.empty((2, n), bits.dtype),
        np.empty((2, n), np.uint32),
        np.empty((bits.itemsize, 256), np.uint32),
    )


@inner
def _rank(bits, work, ranks):
    """Write average ranks of finite values, given as bits [n].

    Returns the sum of l^3 - l over the runs of l equal values, which is 12 times what
    ties take off the ranks' sum of squares.
    """
    keys, places, counts = work
    n, digits = len(bits), len(counts)
    sign = bits.dtype.type(1 << (8 * digits - 1))
    counts[:] = 0
    for j in range(n):
        # Unsigned integers in the order of the numbers; minus zero is zero.
        key = bits[j]
        if key == sign:
            key = bits.dtype.type(0)
        key = ~key if key & sign else key | sign
        keys[0, j], places[0, j] = key, j
        for d in range(digits):
            counts[d, (key >> bits.dtype.type(8 * d)) & bits.dtype.type(255)] += 1
    now = 0
    for d in range(digits):
        shift, low = bits.dtype.type(8 * d), bits.dtype.type(255)
        if n == 0 or counts[d, (keys[now, 0] >> shift) & low] == n:
            continue  # all alike
        begin = 0
        for v in range(256):
            size = counts[d, v]
            counts[d, v] = begin
            begin += size
        for j in range(n):
            key = keys[now, j]
            digit = (key >> shift) & low
            to = counts[d, digit]
            counts[d, digit] = to + 1
            keys[1 - now, to], places[1 - now, to] = key, places[now, j]
        now = 1 - now
    ties = 0.0
    first = 0
    while first < n:
        end = first + 1
        while end < n and keys[now, end] == keys[now, first]:
            end += 1
        size = end - first
        rank = first + (size + 1) / 2
        for j in range(first, end):
            ranks[places[now, j]] = rank
        if size > 1:
            ties += float(size) ** 3 - size
        first = end
    return ties
