"""Selective scan: the state-space recurrence of Mamba, exact and lean on any device.

Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752), section 3, equations 2-4.
For each stock, channel and state::

    h' = exp(delta A) h + b x,      y = sum over states of C h + D x

`zoh` holds the input between two days, ``b = (delta A)^-1 (exp(delta A) - 1) delta B``,
as the paper's equation 4; `euler`, ``b = delta B``, is what its published CUDA kernel
computes. Difference from that kernel: the backward pass is written by hand too, and
there are three forms of both. On the CPU, in float32, a compiled loop takes one stock
and 64 channels through all days, with the state in the first-level cache; the backward
pass runs each state again and keeps no more than a cacheful. On CUDA, in float32, a
Triton kernel does the same (`scan_triton`), once a trial on the device has found it to
agree. Elsewhere it is one fused pass a time step in plain PyTorch operations.

Why the last is built like this. The products [l, n, d, s] are 16 times the input and
are never stored: the forward pass keeps the state at every sqrt(l)-th step only, and
the backward pass recomputes a stretch of steps at a time from there. The `zoh`
recurrence runs on ``k = A h``, where it reads ``k' = k + E (k + B x)`` with ``E =
exp(delta A) - 1``, so that A is divided by only where values leave.

Glossary: l look-back days, n instruments, d channels, s states, k steps
between two kept states. A, B, C, D, delta and h are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from qlib.log import get_module_logger
from torch.autograd.function import once_differentiable

from qlib_ext.nn import kernels

__all__ = [
    "compiled",
    "cut",
    "each_block",
    "selective_scan",
    "triton_scan",
]

logger = get_module_logger("qlib_ext.nn.selective_scan")

_FORMS = ("zoh", "euler")
# Stocks of a compiled call: gradients of A are summed block by block, so that they do
# not depend on the number of threads.
_BLOCK = 16
# |A| below this is taken as this: 1 / A must stay finite, and the limit is reached.
_SMALLEST_A = 1e-18
# Triton's kernels and steps differ by rounding, some 1e-6 of the largest value.
_AGREEMENT = 1e-4


def selective_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    discretisation: str = "zoh",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the selective state-space recurrence over time.

    Differentiable once in every tensor argument. NaN propagates to all later steps of
    its stock. Values are computed in float64 if `x` is float64, else in float32, also
    under autocast.

    Parameters
    ----------
    x : Tensor [l, n, d]
        Input.
    delta : Tensor [l, n, d]
        Step sizes, at least 0 (after softplus).
    A : Tensor [d, s]
        Decay rates, negative: Mamba's ``-exp(A_log)``. Gradients reach `A` with an
        absolute rounding error that grows as 1 / A, which is harmless through A_log.
    B, C : Tensor [l, n, s]
        Input and output weights of each step.
    D : Tensor [d], optional
        Weight of the direct path from x to y.
    state : Tensor [n, d, s], optional
        State before the first step; default zero.
    discretisation : {"zoh", "euler"}, default "zoh"

    Returns
    -------
    y : Tensor [l, n, d]
    state : Tensor [n, d, s]
        State after the last step: pass it on to go on where this call ended.

    Raises
    ------
    ValueError
        On shapes that do not belong together, or an unknown discretisation.

    Notes
    -----
    On the CPU call ``torch.set_flush_denormal(True)`` before threads start, as
    `TorchModel` does: decaying states become subnormal numbers, which are slow.

    References
    ----------
    Gu and Dao (2023), Mamba: linear-time sequence modeling with selective state
    spaces, section 3.2; https://arxiv.org/abs/2312.00752.
    """
    _check(x, delta, A, B, C, D, state, discretisation)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state is None:
        state = x.new_zeros((x.shape[1], *A.shape), dtype=dtype)
    zoh = discretisation == "zoh"
    with torch.autocast(x.device.type, enabled=False):
        if zoh:  # the gradient passes
            tiny = torch.where(A.abs() < _SMALLEST_A, -_SMALLEST_A - A, 0.0)
            A = A + tiny.detach()
        given = [v.to(dtype) for v in (x, delta, A, B, C, state)]
        y, state = _scan_of(given[0]).apply(*given, zoh, torch.is_grad_enabled())
        if D is not None:
            y = torch.addcmul(y, given[0], D.to(dtype))
    return y, state


def _sequential_scan(x, delta, A, B, C, D=None, state=None, discretisation="zoh"):
    """Run one plain step after the other, gradients by autograd: the oracle."""
    h = x.new_zeros((x.shape[1], *A.shape)) if state is None else state
    outputs = []
    for t in range(len(x)):
        z = delta[t].unsqueeze(-1) * A  # [n, d, s]
        if discretisation == "zoh":
            b = torch.expm1(z) / A * B[t].unsqueeze(1)
        else:
            b = delta[t].unsqueeze(-1) * B[t].unsqueeze(1)
        h = torch.exp(z) * h + b * x[t].unsqueeze(-1)
        outputs.append((h * C[t].unsqueeze(1)).sum(-1))
    y = torch.stack(outputs)
    return (y if D is None else y + D * x), h


def compiled(x: torch.Tensor) -> bool:
    """Whether the compiled loops are for this tensor."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def _scan_of(x: torch.Tensor) -> type[torch.autograd.Function]:
    if compiled(x):
        return _CompiledScan
    if x.device.type == "cuda" and x.dtype == torch.float32:
        return triton_scan(x.device) or _SelectiveScan
    return _SelectiveScan


@cache
def triton_scan(device: torch.device) -> type[torch.autograd.Function] | None:
    """Triton's kernels, if they are there and agree with plain steps on this device.

    Whoever has no Triton, or a device on which its kernels do not compile or do not
    give the values and gradients of the steps, gets the steps, and is told.
    """
    try:
        from qlib_ext.nn.scan_triton import TritonScan
    except ImportError as error:
        logger.info(
            f"selective scan: steps of torch, since there is no Triton ({error})"
        )
        return None
    try:
        shares = [
            (a - b).abs().max() / b.abs().max()
            for zoh in (True, False)
            for a, b in zip(
                _trial(TritonScan, device, zoh),
                _trial(_SelectiveScan, device, zoh),
                strict=True,
            )
        ]
        off = float(torch.stack(shares).max())  # NaN if one of them is
        trouble = "" if off < _AGREEMENT else f"values differ by a share of {off:.1e}"
    except Exception as error:  # of a compiler, a driver, a missing C compiler
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        logger.warning(
            "selective scan: steps of torch, since Triton's kernels do not work on "
            f"{device}: {trouble}"
        )
        return None
    logger.info(f"selective scan: Triton's kernels, equal to steps within {off:.1e}")
    return TritonScan


def _trial(scan, device: torch.device, zoh: bool) -> list[torch.Tensor]:
    """Values and gradients of a small input."""
    g = torch.Generator().manual_seed(0)
    shapes = (11, 3, 70), (11, 3, 70), (70, 5), (11, 3, 5), (11, 3, 5), (3, 70, 5)
    given = [torch.randn(shape, generator=g) for shape in shapes]
    given[1], given[2] = given[1].abs(), -given[2].exp()
    given = [v.to(device).requires_grad_() for v in given]
    with torch.enable_grad():
        made = scan.apply(*given, zoh, True)
        loss = sum((v * v).sum() for v in made)
        return [v.detach() for v in (*made, *torch.autograd.grad(loss, given))]


def cut(n: int, size: int) -> list[slice]:
    """Cut n stocks or days into blocks of `size`, the last one shorter."""
    return [slice(i, min(n, i + size)) for i in range(0, n, size)]


def each_block(call: Callable[[int, slice], None], n: int, size: int = _BLOCK) -> None:
    """Call with the number and the stocks of each block, on torch's threads."""
    blocks = cut(n, size)
    threads = min(torch.get_num_threads(), len(blocks))
    if threads < 2:
        for i, block in enumerate(blocks):
            call(i, block)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, range(len(blocks)), blocks))


class _CompiledScan(torch.autograd.Function):
    """The loops of `kernels`, for the CPU; inside, states are [n, s, d]."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state, zoh, _):
        x, delta, B, C = (v.contiguous() for v in (x, delta, B, C))
        rates = A.t().contiguous()  # [s, d]
        state = state.transpose(1, 2).contiguous()
        y, last = torch.empty_like(x), state.clone()
        given = kernels.Inputs(*(v.numpy() for v in (x, delta, rates, B, C)))

        def run(_, block):
            kernels.scan(given, zoh, last.numpy(), y.numpy(), block.start, block.stop)

        each_block(run, x.shape[1])
        ctx.save_for_backward(x, delta, rates, B, C, state)
        ctx.zoh = zoh
        return y, last.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, delta, rates, B, C, state = ctx.saved_tensors
        n, zoh = x.shape[1], ctx.zoh
        dstate = dlast.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        dx, ddelta = torch.empty_like(x), torch.empty_like(x)
        dB, dC = torch.zeros_like(B), torch.zeros_like(C)
        parts = rates.new_zeros(-(-n // _BLOCK), *rates.shape, dtype=torch.float64)
        given = kernels.Inputs(*(v.numpy() for v in (x, delta, rates, B, C)))
        states = state.numpy(), dy.contiguous().numpy(), dstate.numpy()

        def run(i, block):
            each = (v.numpy() for v in (dx, ddelta, parts[i], dB, dC))
            grads = kernels.Inputs(*each)
            kernels.scan_backward(given, zoh, *states, grads, block.start, block.stop)

        each_block(run, n)
        drates = parts.sum(0).to(rates.dtype)
        return dx, ddelta, drates.t(), dB, dC, dstate.transpose(1, 2), None, None


class _SelectiveScan(torch.autograd.Function):
    """Fused steps forward, recomputed stretches backward; inside, states are [n, s, d].

    That order makes the inner dimension of every operation the contiguous channels,
    and the sums over states, channels and stocks matrix products.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state, zoh, with_grad):
        x, delta, B, C = (v.contiguous() for v in (x, delta, B, C))
        length, n, _ = x.shape
        rates = A.t().contiguous()  # [s, d]
        stretch = max(1, math.ceil(math.sqrt(length)))
        kept = None
        if with_grad and any(ctx.needs_input_grad):
            kept = x.new_empty(math.ceil(length / stretch), n, *rates.shape)
        y = torch.empty_like(x)
        last = x.new_empty(n, *rates.shape)
        given = x, delta, rates, B, C, state.transpose(1, 2)
        _forward_steps(*given, zoh, stretch, y, kept, last)
        ctx.save_for_backward(x, delta, rates, B, C, kept)
        ctx.zoh, ctx.stretch = zoh, stretch
        return y, last.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, delta, rates, B, C, kept = ctx.saved_tensors
        dy = dy.contiguous()
        dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        drates = torch.zeros_like(rates)
        dstate = torch.empty_like(kept[0])
        with torch.autocast(x.device.type, enabled=False):
            given = x, delta, rates, B, C, kept, dy, dlast.transpose(1, 2)
            grads = dx, ddelta, dB, dC, drates, dstate
            _backward_steps(*given, ctx.zoh, ctx.stretch, *grads)
        return dx, ddelta, drates.t(), dB, dC, dstate.transpose(1, 2), None, None


def _columns(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[l, m, c] as l views [m, 1, c]; made at once, since a view costs like a step."""
    return v.unsqueeze(2).unbind(0)


def _rows(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[l, m, c] as l views [m, c, 1]."""
    return v.unsqueeze(3).unbind(0)


def _forward_steps(
    x, delta, rates, B, C, state, zoh, stretch, y, kept, last
) -> None:  # writes y [l, m, d], kept [ceil(l / k), m, s, d] and last [m, s, d]
    decay = torch.empty_like(state, memory_format=torch.contiguous_format)
    scratch = torch.empty_like(decay)
    deltas, Bs, Cs, ys = _columns(delta), _rows(B), _columns(C), _columns(y)
    if zoh:
        h = (state * rates).contiguous()  # k = A h
        inputs = _columns(x)
        inverse = 1 / rates
    else:
        h = state.clone(memory_format=torch.contiguous_format)
        inputs = _columns(x * delta)
    for t in range(len(x)):
        if kept is not None and t % stretch == 0:
            kept[t // stretch].copy_(h)
        if zoh:
            torch.mul(deltas[t], rates, out=decay)
            decay.expm1_()
            torch.addcmul(h, Bs[t], inputs[t], out=scratch)
            h.addcmul_(decay, scratch)
            torch.mul(h, inverse, out=scratch)
            torch.bmm(Cs[t], scratch, out=ys[t])
        else:
            torch.mul(deltas[t], rates, out=decay)
            decay.exp_()
            h.mul_(decay).addcmul_(Bs[t], inputs[t])
            torch.bmm(Cs[t], h, out=ys[t])
    torch.mul(h, inverse, out=last) if zoh else last.copy_(h)


def _backward_steps(
    x,
    delta,
    rates,
    B,
    C,
    kept,
    dy,
    dlast,
    zoh,
    stretch,
    dx,
    ddelta,
    dB,
    dC,
    drates,
    dstate,
) -> None:  # writes dx, ddelta, dB, dC, dstate; adds to drates
    length, m, d = x.shape
    shape = kept.shape[1:]  # [m, s, d]
    hs = x.new_empty(stretch + 1, *shape).unbind(0)
    decays = x.new_empty(stretch, *shape).unbind(0)
    scratch = x.new_empty(shape)
    of_rates = x.new_zeros(shape)
    dh = dlast.clone(memory_format=torch.contiguous_format)
    ones_d, ones_s = x.new_ones(d), x.new_ones(m, 1, shape[1])
    deltas, dys = _columns(delta), _columns(dy)
    B_rows, B_columns, C_rows = _rows(B), _columns(B), _rows(C)
    dxs, ddeltas = _columns(dx), _columns(ddelta)
    # Sums over channels are one matrix-vector product for all stocks and states.
    dBs, dCs = (v.view(length, -1).unbind(0) for v in (dB, dC))
    if zoh:
        inputs = _columns(x)
        inverse = 1 / rates
    else:
        inputs = _columns(x * delta)
    for first in reversed(range(0, length, stretch)):
        end = min(length, first + stretch)
        hs[0].copy_(kept[first // stretch])
        for i, t in enumerate(range(first, end)):
            if zoh:
                torch.mul(deltas[t], rates, out=decays[i])
                decays[i].expm1_()
                torch.addcmul(hs[i], B_rows[t], inputs[t], out=scratch)
                torch.addcmul(hs[i], decays[i], scratch, out=hs[i + 1])
            else:
                torch.mul(deltas[t], rates, out=decays[i])
                decays[i].exp_()
                torch.mul(hs[i], decays[i], out=hs[i + 1])
                hs[i + 1].addcmul_(B_rows[t], inputs[t])
        for t in reversed(range(first, end)):
            decay, h = decays[t - first], hs[t - first + 1]
            dh.addcmul_(C_rows[t], dys[t])
            if zoh:
                # dh (h + B x / A) times A: the gradient of delta, state by state.
                torch.addcmul(h, B_rows[t], inputs[t], out=scratch)
                scratch.mul_(dh)
                torch.bmm(ones_s, scratch, out=ddeltas[t])
                of_rates.addcmul_(scratch, deltas[t])
                h.mul_(inverse).mul_(dys[t])
                torch.mv(h.view(-1, d), ones_d, out=dCs[t])
                # dh E / A: the gradient of B x.
                decay.mul_(dh)
                dh.add_(decay)
                decay.mul_(inverse)
                torch.bmm(B_columns[t], decay, out=dxs[t])
                decay.mul_(inputs[t])
                torch.mv(decay.view(-1, d), ones_d, out=dBs[t])
                of_rates.addcmul_(decay, B_rows[t], value=-1)
            else:
                h.mul_(dys[t])
                torch.mv(h.view(-1, d), ones_d, out=dCs[t])
                torch.bmm(B_columns[t], dh, out=dxs[t])  # of delta x, until the end
                torch.mul(dh, inputs[t], out=scratch)
                torch.mv(scratch.view(-1, d), ones_d, out=dBs[t])
                dh.mul_(decay)
                torch.mul(dh, hs[t - first], out=scratch)
                of_rates.addcmul_(scratch, deltas[t])
                scratch.mul_(rates)
                torch.bmm(ones_s, scratch, out=ddeltas[t])
    if zoh:
        of_rates.mul_(inverse)
    else:
        ddelta.addcmul_(dx, x)
        dx.mul_(delta)
    drates.add_(of_rates.sum(0))
    dstate.copy_(dh)


def _check(x, delta, A, B, C, D, state, discretisation) -> None:
    if discretisation not in _FORMS:
        raise ValueError(
            f"`discretisation` must be one of {_FORMS}, got {discretisation!r}."
        )
    if x.dim() != 3 or len(x) == 0:
        raise ValueError(f"`x` must be [l, n, d] with l >= 1, got {tuple(x.shape)}.")
    length, n, d = x.shape
    if A.dim() != 2 or A.shape[0] != d:
        raise ValueError(
            f"`A` must be [d, s] with d = {d} as in `x`, got {tuple(A.shape)}."
        )
    s = A.shape[1]
    for name, value, shape in (
        ("delta", delta, (length, n, d)),
        ("B", B, (length, n, s)),
        ("C", C, (length, n, s)),
        ("D", D, (d,)),
        ("state", state, (n, d, s)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"`{name}` must be {shape}, got {tuple(value.shape)}.")
