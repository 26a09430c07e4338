"""Compiled loops behind the layers of this package, for the CPU.

torch pays for every operation with a pass over memory and some microseconds; a loop
that is written out keeps what it works on in registers. The layers hold the same
arithmetic in torch operations too, for accelerators and as the reference of the tests.
All functions release the interpreter's lock, run in the calling thread and give the
same result each time.

Glossary: e edges, h heads, m nodes, p channels of a head; for the scan as in
`qlib_ext.nn.selective_scan`.
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "Inputs",
    "attend",
    "attend_backward",
    "attention_logits",
    "gated",
    "gated_backward",
    "scan",
    "scan_backward",
    "sort_edges",
]

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


# ---------------------------------------------------------------- selective scan

# The loops over channels run over rows of a fixed length, taken from two buffers at
# fixed distances by unsigned positions: only so does the compiler know that the rows do
# not overlap and turn a loop into vector instructions.
_LANES = 64
_U = np.uint64
_ROW = [_U(i * _LANES) for i in range(7)]
_ROW_1, _ROW_2, _ROW_3, _ROW_4, _ROW_5, _ROW_6 = _ROW[1:]
_vector = nb.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")


@_vector
def _expm1(y):
    """exp(8 y) - 1 for y <= 0, in float32.

    With the series of Bernoulli's numbers, ``exp(y) - 1 = y / (1 - y / 2 + y^2 / 12 -
    y^4 / 720 + ...)``, the relative error is y^6 / 30240. Doubling, ``exp(2 y) - 1 =
    (exp(y) - 1) (exp(y) + 1)``, never enlarges a relative error and shrinks it where
    exp(y) is small. Below -17 the result is -1 in float32.
    """
    low = np.float32(-17 / 8)
    y = low if y < low else y  # NaN stays
    square = y * y
    series = np.float32(1) - np.float32(1 / 2) * y + np.float32(1 / 12) * square
    e = y / (series - np.float32(1 / 720) * square * square)
    e = e * (e + np.float32(2))
    e = e * (e + np.float32(2))
    return e * (e + np.float32(2))


@_vector
def _forward_zoh(p, r, o, b, c):
    """Advance one state of one stock; p: x, delta, y; r: h, A / 8, 1 / A."""
    for j in range(_ROW_1):
        e = _expm1(p[_ROW_1 + j] * r[o + _ROW_1 + j])
        h = r[o + j]
        h += e * (h + b * p[j] * r[o + _ROW_2 + j])
        r[o + j] = h
        p[_ROW_2 + j] += c * h


@_vector
def _forward_euler(p, r, o, b, c):
    """As `_forward_zoh`; p: delta x, delta, y."""
    for j in range(_ROW_1):
        e = _expm1(p[_ROW_1 + j] * r[o + _ROW_1 + j])
        h = r[o + j]
        h += e * h + b * p[j]
        r[o + j] = h
        p[_ROW_2 + j] += c * h


class Inputs(NamedTuple):
    """What a scan reads, or the gradients of it; contiguous.

    Attributes
    ----------
    x, delta : array [l, n, d]
    rates : array [s, d]
        A, transposed.
    B, C : array [l, n, s]
    """

    x: np.ndarray
    delta: np.ndarray
    rates: np.ndarray
    B: np.ndarray
    C: np.ndarray


@_vector
def scan(given, zoh, state, y, first, end):
    """Run stocks `first` to `end`: write y [l, n, d], advance state [n, s, d].

    All float32; `given` are `Inputs`.
    """
    x, delta, rates, B, C = given
    length, _, channels = x.shape
    states = len(rates)
    r = np.empty((states, 3, _LANES), np.float32)
    p = np.empty((3, _LANES), np.float32)
    flat_r, flat_p = r.reshape(-1), p.reshape(-1)
    for i in range(first, end):
        for start in range(0, channels, _LANES):
            width = min(_LANES, channels - start)
            flat_r[:], flat_p[:] = 0, 0
            for k in range(states):
                for j in range(width):
                    r[k, 0, j] = state[i, k, start + j]
                    r[k, 1, j] = rates[k, start + j] / np.float32(8)
                    r[k, 2, j] = np.float32(1) / rates[k, start + j]
            for t in range(length):
                for j in range(width):
                    p[1, j] = delta[t, i, start + j]
                    p[0, j] = x[t, i, start + j]
                    p[2, j] = 0
                    if not zoh:
                        p[0, j] *= p[1, j]
                for k in range(states):
                    o = _U(3 * _LANES * k)
                    if zoh:
                        _forward_zoh(flat_p, flat_r, o, B[t, i, k], C[t, i, k])
                    else:
                        _forward_euler(flat_p, flat_r, o, B[t, i, k], C[t, i, k])
                for j in range(width):
                    y[t, i, start + j] = p[2, j]
            for k in range(states):
                for j in range(width):
                    state[i, k, start + j] = r[k, 0, j]


@_vector
def _again_zoh(p, r, o, b):
    """Advance and keep E in row 5 of p and the new state in row 6."""
    for j in range(_ROW_1):
        e = _expm1(p[o + _ROW_1 + j] * r[_ROW_1 + j])
        h = r[j]
        h += e * (h + b * p[o + j] * r[_ROW_2 + j])
        r[j] = h
        p[o + _ROW_5 + j] = e
        p[o + _ROW_6 + j] = h


@_vector
def _again_euler(p, r, o, b):
    """Advance and keep E in row 5 of p and the old state in row 6."""
    for j in range(_ROW_1):
        e = _expm1(p[o + _ROW_1 + j] * r[_ROW_1 + j])
        h = r[j]
        p[o + _ROW_5 + j] = e
        p[o + _ROW_6 + j] = h
        r[j] = h + (e * h + b * p[o + j])


@_vector
def _back_zoh(p, r, o, b, c):
    """Go one step back; return the gradients of b and c."""
    db, dc = np.float32(0), np.float32(0)
    for j in range(_ROW_1):
        x, dy, h = p[o + j], p[o + _ROW_2 + j], p[o + _ROW_6 + j]
        g = r[j] + c * dy
        bx = b * x
        # g (h + B x / A) times A: the gradient of delta, state by state.
        v = g * (r[_ROW_3 + j] * h + bx)
        p[o + _ROW_4 + j] += v
        dc += h * dy
        u = g * p[o + _ROW_5 + j]
        r[j] = g + u
        u *= r[_ROW_2 + j]  # g E / A: the gradient of B x
        p[o + _ROW_3 + j] += b * u
        db += u * x
        r[_ROW_4 + j] += v * p[o + _ROW_1 + j] - u * bx
    return db, dc


@_vector
def _back_euler(p, r, o, b, c):
    """As `_back_zoh`, with gradients of delta x in the place of those of x."""
    db, dc = np.float32(0), np.float32(0)
    for j in range(_ROW_1):
        x, dy, h = p[o + j], p[o + _ROW_2 + j], p[o + _ROW_6 + j]
        e = p[o + _ROW_5 + j]
        g = r[j] + c * dy
        dc += (h + (e * h + b * x)) * dy
        p[o + _ROW_3 + j] += b * g
        db += g * x
        g += g * e
        r[j] = g
        v = g * h
        r[_ROW_4 + j] += v * p[o + _ROW_1 + j]
        p[o + _ROW_4 + j] += v * r[_ROW_3 + j]
    return db, dc


@_vector
def scan_backward(given, zoh, state, dy, dstate, grads, first, end):
    """Write the gradients of `scan`: those of x and delta are set, others added to.

    `grads` are `Inputs`, its rates in float64. dstate [n, s, d] is the gradient of the
    last state, and becomes that of the first. One state of 64 channels is run again
    over all days, from `state`, and back: what that needs stays in the second-level
    cache.
    """
    x, delta, rates, B, C = given
    dx, ddelta, drates, dB, dC = grads
    length, _, channels = x.shape
    states = len(rates)
    step = 7 * _LANES
    days = np.empty((length, 7, _LANES), np.float32)  # x, delta, dy, dx, ddelta, E, h
    rows = np.empty((5, _LANES), np.float32)  # h, then dh; A / 8, 1 / A, A; of A
    p, r = days.reshape(-1), rows.reshape(-1)
    for i in range(first, end):
        for start in range(0, channels, _LANES):
            width = min(_LANES, channels - start)
            p[:] = 0
            for t in range(length):
                for j in range(width):
                    days[t, 0, j] = x[t, i, start + j]
                    days[t, 1, j] = delta[t, i, start + j]
                    days[t, 2, j] = dy[t, i, start + j]
                    if not zoh:
                        days[t, 0, j] *= days[t, 1, j]
            for k in range(states):
                r[:] = 0
                for j in range(width):
                    rows[0, j] = state[i, k, start + j]
                    rows[1, j] = rates[k, start + j] / np.float32(8)
                    rows[2, j] = np.float32(1) / rates[k, start + j]
                    rows[3, j] = rates[k, start + j]
                for t in range(length):
                    if zoh:
                        _again_zoh(p, r, _U(step * t), B[t, i, k])
                    else:
                        _again_euler(p, r, _U(step * t), B[t, i, k])
                for j in range(_LANES):
                    rows[0, j] = dstate[i, k, start + j] if j < width else 0
                for back in range(length):
                    t = length - 1 - back
                    o, b, c = _U(step * t), B[t, i, k], C[t, i, k]
                    if zoh:
                        db, dc = _back_zoh(p, r, o, b, c)
                    else:
                        db, dc = _back_euler(p, r, o, b, c)
                    dB[t, i, k] += db
                    dC[t, i, k] += dc
                for j in range(width):
                    dstate[i, k, start + j] = rows[0, j]
                    of_rate = rows[4, j] * rows[2, j] if zoh else rows[4, j]
                    drates[k, start + j] += of_rate
            for t in range(length):
                for j in range(width):
                    of_x, of_delta = days[t, 3, j], days[t, 4, j]
                    if not zoh:
                        of_delta += of_x * x[t, i, start + j]
                        of_x *= days[t, 1, j]
                    dx[t, i, start + j] = of_x
                    ddelta[t, i, start + j] = of_delta


# ----------------------------------------------------------- linear gated recurrence


@_vector
def _sigmoid(x):
    """1 / (1 + exp(-x)) in float32.

    With Bernoulli's numbers ``exp(z) = u(z) / u(-z)`` for ``u(z) = z / 2 + z coth(z /
    2) / 2``, whose series ends here at z^6. For z = x / 8 that is one division, and off
    by less than 1e-7 everywhere.
    """
    top = np.float32(17)
    x = top if x > top else x  # NaN stays
    x = -top if x < -top else x
    z = np.float32(1 / 8) * x
    square = z * z
    even = np.float32(-1 / 720) + np.float32(1 / 30240) * square
    even = np.float32(1) + square * (np.float32(1 / 12) + square * even)
    u, w = even + np.float32(0.5) * z, even - np.float32(0.5) * z
    u, w = u * u, w * w
    u, w = u * u, w * w
    u, w = u * u, w * w
    return u / (u + w)


@_vector
def _gated_day(p, h):
    """Advance 64 channels of a stock; p: f, a, o, then 1 - s(f), a, s(o), y."""
    for j in range(_ROW_1):
        a, before = p[_ROW_1 + j], h[j]
        s, w = _sigmoid(-p[j]), _sigmoid(p[_ROW_2 + j])
        h[j] = before + s * (a * _sigmoid(a) - before)
        p[j], p[_ROW_2 + j], p[_ROW_3 + j] = s, w, w * h[j]


@_vector
def _gated_day_back(p, r, k):
    """Go a day back; p: 1 - s(f), a, s(o), dy, h before.

    r holds from k on dh, and what the gradients of f, o and a add up to. The gradients
    replace f, a, o.
    """
    one = np.float32(1)
    for j in range(_ROW_1):
        s, a, w = p[j], p[_ROW_1 + j], p[_ROW_2 + j]
        dy, before, v = p[_ROW_3 + j], p[_ROW_4 + j], _sigmoid(a)
        apart = a * v - before
        dh = r[k + j] + w * dy
        df = -dh * apart * s * (one - s)
        da = dh * s * v * (one + a * (one - v))
        do = dy * (before + s * apart) * w * (one - w)
        p[j], p[_ROW_1 + j], p[_ROW_2 + j] = df, da, do
        r[k + _ROW_1 + j] += df
        r[k + _ROW_2 + j] += do
        r[k + _ROW_3 + j] += da
        r[k + j] = dh * (one - s)


@_vector
def _divide(p):
    """Make h of y and s(o)."""
    for j in range(_ROW_1):
        p[_ROW_4 + j] /= p[_ROW_5 + j]


@intrinsic
def _copy_row(typingctx, to, o, values, first):
    """Copy 64 values between float32 vectors, in vector registers.

    As a loop, that takes five times as long: the arrays could overlap.
    """

    def codegen(context, builder, signature, given):
        def row(i):
            array = context.make_array(signature.args[i])(context, builder, given[i])
            return builder.gep(array.data, [given[i + 1]])

        count = context.get_constant(nb.types.intp, _LANES)
        cgutils.raw_memcpy(builder, row(0), row(2), count, 4)
        return context.get_dummy_value()

    return nb.types.void(to, o, values, first), codegen


@_vector
def _move(to, o, values, first, width):
    """Copy up to 64 values; most rows are whole."""
    if width == _LANES:
        _copy_row(to, o, values, first)  # type: ignore[call-arg]
    else:
        for j in range(_U(width)):
            to[o + j] = values[first + j]


@_vector
def gated(gates, a, at, state, y, first, end):
    """Run stocks `first` to `end` of `nn.recurrent.gated_layer` behind its products.

    gates [l, n, 2 d] are f and o, a [l, n, at + d] from column `at` on the candidate,
    all before their functions; they may be one array. Writes y [l, n, d] and, over the
    gates, what `gated_backward` needs of them: 1 - s(f) and s(o), s the logistic
    function; advances state [n, d]. All float32 and contiguous.
    """
    length, stocks, channels = y.shape
    g, c, h, out = gates.reshape(-1), a.reshape(-1), state.reshape(-1), y.reshape(-1)
    p, r = np.zeros(5 * _LANES, np.float32), np.zeros(_LANES, np.float32)
    # Day by day, as the values lie in memory; the states stay in the cache.
    for t in range(length):
        for i in range(first, end):
            row = t * stocks + i
            for start in range(0, channels, _LANES):
                width = min(_LANES, channels - start)
                f, o = _U(row * gates.shape[2] + start), _U(i * channels + start)
                _move(r, _U(0), h, o, width)
                _move(p, _U(0), g, f, width)
                _move(p, _ROW_1, c, _U(row * a.shape[2] + at + start), width)
                _move(p, _ROW_2, g, f + _U(channels), width)
                _gated_day(p, r)
                _move(h, o, r, _U(0), width)
                _move(g, f, p, _U(0), width)
                _move(g, f + _U(channels), p, _ROW_2, width)
                _move(out, _U(row * channels + start), p, _ROW_3, width)


@_vector
def gated_backward(gates, a, at, state, y, dy, dstate, dgates, da, sums, first, end):
    """Write the gradients of `gated`, from what it wrote and the first state.

    dstate is the gradient of the last state, then that of the first. To sums [3 d] the
    gradients of f, o and a are added. Since y = s(o) h, it tells h.
    """
    length, stocks, channels = dy.shape
    g, c, out, h = gates.reshape(-1), a.reshape(-1), y.reshape(-1), state.reshape(-1)
    given, dh = dy.reshape(-1), dstate.reshape(-1)
    of_g, of_c = dgates.reshape(-1), da.reshape(-1)
    p = np.zeros(6 * _LANES, np.float32)
    r = np.zeros(4 * (channels + _LANES), np.float32)
    for back in range(length):
        t = length - 1 - back
        for i in range(first, end):
            row = t * stocks + i
            for start in range(0, channels, _LANES):
                width = min(_LANES, channels - start)
                k = _U(4 * start)
                f, o = _U(row * gates.shape[2] + start), _U(row * channels + start)
                v = _U(row * a.shape[2] + at + start)
                _move(p, _U(0), g, f, width)
                _move(p, _ROW_1, c, v, width)
                _move(p, _ROW_2, g, f + _U(channels), width)
                _move(p, _ROW_3, given, o, width)
                if t > 0:
                    past = f + _U(channels) - _U(stocks * gates.shape[2])
                    _move(p, _ROW_4, out, o - _U(stocks * channels), width)
                    _move(p, _ROW_5, g, past, width)
                    _divide(p)
                else:
                    _move(p, _ROW_4, h, o, width)
                _move(r, k, dh, _U(i * channels + start), width)
                _gated_day_back(p, r, k)
                _move(dh, _U(i * channels + start), r, k, width)
                _move(of_g, f, p, _U(0), width)
                _move(of_c, v, p, _ROW_1, width)
                _move(of_g, f + _U(channels), p, _ROW_2, width)
    for j in range(channels):
        lane = 4 * (j - j % _LANES) + j % _LANES
        for part in range(3):
            sums[part * channels + j] += r[lane + (part + 1) * _LANES]
