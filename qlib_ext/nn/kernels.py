"""Compiled loops behind the layers of this package, for the CPU.

torch pays for every operation with a pass over memory and some microseconds; a loop
that is written out keeps what it works on in registers. The layers hold the same
arithmetic in torch operations too, for accelerators and as the reference of the tests.
All functions release the interpreter's lock, run in the calling thread and give the
same result each time.

Glossary: e edges, h heads, m nodes, p channels of a head.
"""

from __future__ import annotations

import numba as nb
import numpy as np

__all__ = ["attend", "attend_backward", "attention_logits", "sort_edges"]

# Sums may be taken in vector lanes. NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@nb.njit(nogil=True, cache=True)
def sort_edges(source, target, size, self_loops):
    """Sort int64 edges [e] by target, then source: row, col and ptr, all int32.

    Two counting sorts, the last of them stable; with `self_loops` each of the `size`
    nodes gets an edge to itself too.
    """
    loop = 1 if self_loops else 0
    count = len(source) + loop * size
    starts, ptr = np.zeros(size + 1, np.int32), np.zeros(size + 1, np.int32)
    for e in range(len(source)):
        j, i = source[e], target[e]
        if min(i, j) < 0 or max(i, j) >= size:
            raise ValueError("An edge names a node that is not there.")
        starts[j + 1] += 1
        ptr[i + 1] += 1
    for i in range(size):
        starts[i + 1] += starts[i] + loop
        ptr[i + 1] += ptr[i] + loop
    by_source = np.empty((count, 2), np.int32)
    for e in range(count):
        j = source[e] if e < len(source) else e - len(source)
        i = target[e] if e < len(source) else e - len(source)
        by_source[starts[j], 0], by_source[starts[j], 1] = i, j
        starts[j] += 1
    row, col = np.empty(count, np.int32), np.empty(count, np.int32)
    place = ptr[:-1].copy()
    for e in range(count):
        i = by_source[e, 0]
        row[place[i]], col[place[i]] = i, by_source[e, 1]
        place[i] += 1
    return row, col, ptr


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def attention_logits(src, dst, col, ptr, slope, out):
    """Write leaky logits less the largest of their target, [h, e]; src, dst [m, h]."""
    for h in range(out.shape[0]):
        for i in range(len(ptr) - 1):
            top = out.dtype.type(-np.inf)
            for e in range(ptr[i], ptr[i + 1]):
                value = src[col[e], h] + dst[i, h]
                if value <= 0:
                    value *= slope
                out[h, e] = value
                top = max(top, value)
            for e in range(ptr[i], ptr[i + 1]):
                out[h, e] -= top


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def attend(x, keep, col, ptr, alpha, out):
    """Scale alpha [h, e] to sum to 1 at each target and sum x [m, h, p] with it.

    keep [h, e] multiplies the weights of the sum; empty: none.
    """
    channels = x.shape[2]
    for i in range(len(ptr) - 1):
        first, end = ptr[i], ptr[i + 1]
        for h in range(len(alpha)):
            total = x.dtype.type(0)
            for e in range(first, end):
                total += alpha[h, e]
            mixed = out[i, h]
            mixed[:] = 0
            for e in range(first, end):
                alpha[h, e] /= total
                weight = alpha[h, e]
                if keep.size:
                    weight *= keep[h, e]
                near = x[col[e], h]
                for c in range(channels):
                    mixed[c] += weight * near[c]


@nb.njit(nogil=True, cache=True, fastmath=_FAST)
def attend_backward(
    x, src, dst, keep, col, ptr, slope, alpha, g, grad_x, grad_src, grad_dst
):
    """Add gradients to grad_x [m, h, p], grad_src and grad_dst [m, h], zero before.

    g [m, h, p] is the gradient of the output of `attend`.
    """
    channels = x.shape[2]
    grad = np.empty(len(col), x.dtype)
    for i in range(len(ptr) - 1):
        first, end = ptr[i], ptr[i + 1]
        for h in range(len(alpha)):
            y = g[i, h]
            mean = x.dtype.type(0)
            for e in range(first, end):
                near, to = x[col[e], h], grad_x[col[e], h]
                weight = alpha[h, e]
                if keep.size:
                    weight *= keep[h, e]
                dot = x.dtype.type(0)
                for c in range(channels):
                    dot += near[c] * y[c]
                    to[c] += weight * y[c]
                grad[e] = dot * keep[h, e] if keep.size else dot
                mean += weight * dot
            total = x.dtype.type(0)
            for e in range(first, end):
                j = col[e]
                of_logit = alpha[h, e] * (grad[e] - mean)
                if src[j, h] + dst[i, h] <= 0:
                    of_logit *= slope
                grad_src[j, h] += of_logit
                total += of_logit
            grad_dst[i, h] = total
