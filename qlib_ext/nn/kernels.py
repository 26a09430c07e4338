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

from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numba.extending import intrinsic

__all__ = [
    "Inputs",
    "attend",
    "attend_backward",
    "attention_logits",
    "gated",
    "gated_backward",
    "gru_day",
    "gru_day_backward",
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


_intrinsic: Any = intrinsic(prefer_literal=True)
# Rows that the loops below work on; what is only read may share one.
_F, _O, _A, _H, _SUM_F, _SUM_O, _SUM_A, _READ = range(8)


def _row(context, builder, signature, given):
    """Give a pointer to an element, and a function that marks its use with its row.

    The marks say that no two rows overlap. Without them what is written to one could
    be read from another, and loops over several rows become no vector instructions.
    """
    array = context.make_array(signature.args[0])(context, builder, given[0])
    node, own = builder.module.add_metadata, signature.args[2].literal_value
    rows = [node([f"row {i}", node(["rows"])]) for i in range(_READ + 1)]

    def mark(instruction):
        instruction.set_metadata("alias.scope", node([rows[own]]))
        instruction.set_metadata("noalias", node(rows[:own] + rows[own + 1 :]))
        return instruction

    return builder.gep(array.data, [given[1]]), mark


@_intrinsic
def _get(typingctx, values, at, row):
    """Read an element by its place in memory, as one of this row."""

    def codegen(context, builder, signature, given):
        pointer, mark = _row(context, builder, signature, given)
        return mark(builder.load(pointer))

    return values.dtype(values, nb.types.intp, row), codegen


@_intrinsic
def _put(typingctx, values, at, row, value):
    """Write what `_get` reads."""

    def codegen(context, builder, signature, given):
        pointer, mark = _row(context, builder, signature, given)
        mark(builder.store(given[3], pointer))
        return context.get_dummy_value()

    return nb.types.void(values, nb.types.intp, row, values.dtype), codegen


@_vector
def gated(gates, a, at, state, y, first, end):
    """Run stocks `first` to `end` of `nn.recurrent.gated_layer` behind its products.

    gates [l, n, 2 d] are f and o, a [l, n, at + d] from column `at` on the candidate,
    all before their functions; they may be one array. Writes y [l, n, d] and, over the
    gates, what `gated_backward` needs of them: 1 - s(f) and s(o), s the logistic
    function; advances state [n, d]. All float32 and contiguous.
    """
    length, stocks, d = y.shape
    # Day by day, as the values lie in memory; the states stay in the cache.
    for t in range(length):
        for i in range(first, end):
            row = t * stocks + i
            f, k = row * gates.shape[2], row * a.shape[2] + at
            for j in range(d):
                h, c = _get(state, i * d + j, _H), _get(a, k + j, _READ)
                s = _sigmoid(-_get(gates, f + j, _F))
                w = _sigmoid(_get(gates, f + d + j, _O))
                h += s * (c * _sigmoid(c) - h)
                _put(state, i * d + j, _H, h)
                _put(gates, f + j, _F, s)
                _put(gates, f + d + j, _O, w)
                _put(y, row * d + j, _A, w * h)


@_vector
def gated_backward(gates, a, at, state, y, dy, dstate, dgates, da, sums, first, end):
    """Write the gradients of `gated`, from what it wrote and the first state.

    dstate is the gradient of the last state, then that of the first. To sums [n / 64, 3
    d] the gradients of f, o and a are added, 64 stocks to a row. Since y = s(o) h, it
    tells h.
    """
    length, stocks, d = dy.shape
    one, before = np.float32(1), np.empty(d, np.float32)
    for t in range(length - 1, -1, -1):
        for i in range(first, end):
            if t > 0:
                for j in range(d):
                    before[j] = y[t - 1, i, j] / gates[t - 1, i, d + j]
            else:
                before[:] = state[i]
            row = t * stocks + i
            f, k = row * gates.shape[2], row * a.shape[2] + at
            total = i // _LANES * 3 * d
            for j in range(d):
                s, w = _get(gates, f + j, _READ), _get(gates, f + d + j, _READ)
                c, h = _get(a, k + j, _READ), _get(before, j, _READ)
                v, given = _sigmoid(c), _get(dy, row * d + j, _READ)
                apart = c * v - h
                dh = _get(dstate, i * d + j, _H) + w * given
                df = -dh * apart * s * (one - s)
                do = given * (h + s * apart) * w * (one - w)
                dc = dh * s * v * (one + c * (one - v))
                _put(dgates, f + j, _F, df)
                _put(dgates, f + d + j, _O, do)
                _put(da, k + j, _A, dc)
                _put(dstate, i * d + j, _H, dh * (one - s))
                j += total
                _put(sums, j, _SUM_F, _get(sums, j, _SUM_F) + df)
                _put(sums, d + j, _SUM_O, _get(sums, d + j, _SUM_O) + do)
                _put(sums, 2 * d + j, _SUM_A, _get(sums, 2 * d + j, _SUM_A) + dc)


# ------------------------------------------------------------------------------- GRU


@_vector
def gru_day(gates, before, h):
    """Run a day of a GRU behind its products.

    gates [n, 4 d] are n's part of x, r, z, and n's part of h, all before their
    functions; n, r and z are written over. Writes h [n, d] from that of the day before.
    All float32 and contiguous.
    """
    stocks, d = h.shape
    one, two = np.float32(1), np.float32(2)
    for i in range(stocks):
        row, k = 4 * d * i, d * i
        for j in range(d):
            r = _sigmoid(_get(gates, row + d + j, _O))
            z = _sigmoid(_get(gates, row + 2 * d + j, _A))
            n = _get(gates, row + j, _F) + r * _get(gates, row + 3 * d + j, _READ)
            n = two * _sigmoid(two * n) - one  # tanh
            _put(gates, row + j, _F, n)
            _put(gates, row + d + j, _O, r)
            _put(gates, row + 2 * d + j, _A, z)
            _put(h, k + j, _H, n + z * (_get(before, k + j, _READ) - n))


@_vector
def gru_day_backward(gates, before, dy, dh, grads):
    """Write the gradients of `gru_day`'s products, [n, 4 d], from what it wrote.

    dh [n, d] is the gradient that the next day gave, then the direct part of that of
    the day before.
    """
    stocks, d = dh.shape
    one = np.float32(1)
    for i in range(stocks):
        row, k = 4 * d * i, d * i
        for j in range(d):
            n, r = _get(gates, row + j, _READ), _get(gates, row + d + j, _READ)
            z = _get(gates, row + 2 * d + j, _READ)
            a = _get(gates, row + 3 * d + j, _READ)
            g = _get(dh, k + j, _H) + _get(dy, k + j, _READ)
            dn = g * (one - z) * (one - n * n)
            _put(grads, row + j, _F, dn)
            _put(grads, row + d + j, _O, dn * a * r * (one - r))
            dz = g * (_get(before, k + j, _READ) - n) * z * (one - z)
            _put(grads, row + 2 * d + j, _A, dz)
            _put(grads, row + 3 * d + j, _SUM_F, dn * r)
            _put(dh, k + j, _H, g * z)
