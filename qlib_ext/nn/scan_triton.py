"""Selective scan on a GPU: one Triton program a stock and block of channels.

Imported only by `selective_scan`, for float32 tensors on CUDA; Triton comes with
PyTorch's CUDA builds. A program holds the state [s, channels] in registers and walks
through all days, so that nothing of the size [l, n, d, s] is ever stored: the forward
pass keeps the state at every sqrt(l)-th day, and the backward pass runs a stretch again
from there into a scratch of sqrt(l) states. Sums over channels and stocks are written
block by block and added afterwards: no atomics, so the same input gives the same bits.

Never run on a GPU. Tested in Triton's interpreter against the plain loop, values and
gradients, and compiled for compute capability 8.0 and 9.0.

Glossary as in `selective_scan`: l days, n instruments, d channels, s states, k days
between two kept states.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

__all__ = ["TritonScan", "backward_kernel", "forward_kernel"]

_CHANNELS = 64  # of a program


@triton.jit
def _expm1(z):  # z <= 0; exp(z) - 1 loses digits near 0, where the series is exact
    series = z * (
        1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    )
    return tl.where(z > -0.35, series, tl.exp(z) - 1)


@triton.jit
def _step(h, x, delta, rates, inverse, b, zoh: tl.constexpr):
    """State after a day."""
    z = delta[None, :] * rates
    bx = b[:, None] * x[None, :]
    if zoh:
        grown = _expm1(z)
        h = h + grown * h + grown * inverse * bx
    else:
        h = tl.exp(z) * h + delta[None, :] * bx
    return h


@triton.jit
def _tile(rates, d, s, S: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels and states of a program, which of them there are, and their rates."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.arange(0, S)
    has_c, has_s = channel < d, j < s
    both = has_s[:, None] & has_c[None, :]
    at = j[:, None] * d + channel[None, :]
    rate = tl.load(rates + at, both, other=-1.0)
    return channel, has_c, j, has_s, at, both, rate


@triton.jit
def forward_kernel(
    x, delta, rates, B, C, state, y, kept, last,
    length, n, d, s, stretch,
    keep: tl.constexpr, zoh: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write y [l, n, d], the last state [n, s, d] and `kept` [ceil(l / k), n, s, d]."""
    stock = tl.program_id(0).to(tl.int64)
    channel, has_c, j, has_s, at, both, rate = _tile(rates, d, s, S, CHANNELS)
    inverse = 1 / rate
    h = tl.load(state + stock * s * d + at, both, other=0.0)
    for t in range(length):
        if keep:
            if t % stretch == 0:
                row = (t // stretch) * n + stock
                tl.store(kept + row * s * d + at, h, both)
        row = t * n + stock
        xt = tl.load(x + row * d + channel, has_c, other=0.0)
        dt = tl.load(delta + row * d + channel, has_c, other=0.0)
        bt = tl.load(B + row * s + j, has_s, other=0.0)
        ct = tl.load(C + row * s + j, has_s, other=0.0)
        h = _step(h, xt, dt, rate, inverse, bt, zoh)
        tl.store(y + row * d + channel, tl.sum(ct[:, None] * h, 0), has_c)
    tl.store(last + stock * s * d + at, h, both)


@triton.jit
def backward_kernel(
    x, delta, rates, B, C, kept, dy, dlast, scratch,
    dx, ddelta, dB, dC, drates, dstate,
    length, n, d, s, stretch, stretches,
    zoh: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients; `scratch` [k, n, s, d] holds the states of a stretch."""
    stock, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, has_c, j, has_s, at, both, rate = _tile(rates, d, s, S, CHANNELS)
    inverse = 1 / rate
    dh = tl.load(dlast + stock * s * d + at, both, other=0.0)
    of_rates = tl.zeros((S, CHANNELS), tl.float32)
    for back in range(stretches):
        part = stretches - 1 - back
        first = part * stretch
        days = tl.minimum(stretch, length - first)
        h = tl.load(kept + (part * n + stock) * s * d + at, both, other=0.0)
        for i in range(days):
            row = (first + i) * n + stock
            xt = tl.load(x + row * d + channel, has_c, other=0.0)
            dt = tl.load(delta + row * d + channel, has_c, other=0.0)
            bt = tl.load(B + row * s + j, has_s, other=0.0)
            h = _step(h, xt, dt, rate, inverse, bt, zoh)
            tl.store(scratch + (i * n + stock) * s * d + at, h, both)
        # What one thread wrote another may read.
        tl.debug_barrier()
        for i in range(days):
            t = days - 1 - i
            row = (first + t) * n + stock
            xt = tl.load(x + row * d + channel, has_c, other=0.0)
            dt = tl.load(delta + row * d + channel, has_c, other=0.0)
            bt = tl.load(B + row * s + j, has_s, other=0.0)
            ct = tl.load(C + row * s + j, has_s, other=0.0)
            dyt = tl.load(dy + row * d + channel, has_c, other=0.0)
            h = tl.load(scratch + (t * n + stock) * s * d + at, both, other=0.0)
            dh += ct[:, None] * dyt[None, :]
            sums = (block * length * n + row) * s + j
            tl.store(dC + sums, tl.sum(h * dyt[None, :], 1), has_s)
            bx = bt[:, None] * xt[None, :]
            z = dt[None, :] * rate
            if zoh:
                grown = _expm1(z)
                of_input = dh * grown * inverse
                # dh (h + B x / A) times A: the gradient of delta, state by state.
                of_delta = dh * (rate * h + bx)
                of_rates += of_delta * dt[None, :] - of_input * bx
                dh += dh * grown
            else:
                of_input = dh * dt[None, :]
                decayed = h - dt[None, :] * bx
                of_delta = dh * (rate * decayed + bx)
                of_rates += dh * decayed * dt[None, :]
                dh = dh * tl.exp(z)
            tl.store(ddelta + row * d + channel, tl.sum(of_delta, 0), has_c)
            tl.store(dx + row * d + channel, tl.sum(of_input * bt[:, None], 0), has_c)
            tl.store(dB + sums, tl.sum(of_input * xt[None, :], 1), has_s)
        tl.debug_barrier()
    if zoh:
        of_rates = of_rates * inverse
    tl.store(drates + stock * s * d + at, of_rates, both)
    tl.store(dstate + stock * s * d + at, dh, both)


class TritonScan(torch.autograd.Function):
    """As `selective_scan._SelectiveScan`: the same arguments and results."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state, zoh, with_grad):
        """Give y [l, n, d] and the last state [n, d, s]."""
        x, delta, B, C = (v.contiguous() for v in (x, delta, B, C))
        (length, n, d), s = x.shape, A.shape[1]
        rates = A.t().contiguous()  # [s, d]
        state = state.transpose(1, 2).contiguous()
        stretch = math.ceil(math.sqrt(length))
        keep = with_grad and any(ctx.needs_input_grad)
        stretches = math.ceil(length / stretch)
        kept = x.new_empty(stretches if keep else 0, n, s, d)
        y, last = torch.empty_like(x), torch.empty_like(state)
        with torch.cuda.device_of(x):
            forward_kernel[_grid(n, d)](
                x, delta, rates, B, C, state, y, kept, last,
                length, n, d, s, stretch, keep=keep, zoh=zoh, **_sizes(s, d),
            )  # fmt: skip
        ctx.save_for_backward(x, delta, rates, B, C, kept)
        ctx.zoh, ctx.stretch = zoh, stretch
        return y, last.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        """Give the gradients of the arguments."""
        x, delta, rates, B, C, kept = ctx.saved_tensors
        (length, n, d), s = x.shape, len(rates)
        grid = _grid(n, d)
        dx, ddelta = torch.empty_like(x), torch.empty_like(x)
        # A row of each block of channels, added below.
        dB, dC = (x.new_empty(grid[1], length, n, s) for _ in range(2))
        drates, dstate = (x.new_empty(n, s, d) for _ in range(2))
        scratch = x.new_empty(ctx.stretch, n, s, d)
        with torch.cuda.device_of(x):
            backward_kernel[grid](
                x, delta, rates, B, C, kept, dy.contiguous(),
                dlast.transpose(1, 2).contiguous(), scratch,
                dx, ddelta, dB, dC, drates, dstate,
                length, n, d, s, ctx.stretch, len(kept), zoh=ctx.zoh, **_sizes(s, d),
            )  # fmt: skip
        grads = dx, ddelta, drates.sum(0).t(), dB.sum(0), dC.sum(0)
        return *grads, dstate.transpose(1, 2), None, None


def _grid(n: int, d: int) -> tuple[int, int]:
    return n, triton.cdiv(d, _CHANNELS)


def _sizes(s: int, d: int) -> dict[str, int]:
    channels = min(_CHANNELS, triton.next_power_of_2(d))
    return {"S": triton.next_power_of_2(s), "CHANNELS": channels}
