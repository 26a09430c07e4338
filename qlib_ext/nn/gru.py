"""`nn.GRU` as compiled loops on the CPU: the same weights and values, in half the time.

torch's own spends most of its time outside the matrix products, on an operation for
each gate and day. Here a day is its products and one loop over what stands between
them, forward and back; what one makes the other finds in the cache.

Glossary: l days, n stocks, f features, d hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlib_ext.nn import kernels
from qlib_ext.nn.selective_scan import compiled, cut

__all__ = ["GRU"]

# Stocks whose gates of a day stay in the second-level cache, 64 wide: 1 MiB.
_STOCKS = 1024


class GRU(nn.GRU):
    """Read x [l, n, f] as `nn.GRU` does, whose arguments, weights and names it has.

    In float32 on the CPU the layers are compiled loops, equal to torch's up to rounding
    and differentiable once; elsewhere it is `nn.GRU`.
    """

    def forward(self, x, hx=None) -> Any:  # type: ignore[override]
        """Map x [l, n, f] and the state to (h [l, n, d or 2 d], state after day l)."""
        if not compiled(x) or x.dim() != 3 or self.batch_first or not self.bias:
            return super().forward(x, hx)
        ways = 2 if self.bidirectional else 1
        last: list[torch.Tensor] = []
        if hx is None:
            hx = x.new_zeros(self.num_layers * ways, x.shape[1], self.hidden_size)
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            sides = []
            for way in range(ways):
                weights = self.all_weights[layer * ways + way]
                h = _layer(x.flip(0) if way else x, hx[len(last)], weights)
                last.append(h[-1])
                sides.append(h.flip(0) if way else h)
            x = sides[0] if ways == 1 else torch.cat(sides, dim=-1)
        return x, torch.stack(last)


def _layer(x: torch.Tensor, state: torch.Tensor, weights) -> torch.Tensor:
    """Run one layer, whose rows of weights are those of r, z and n."""
    of_x, of_h, bias_x, bias_h = weights
    d = of_h.shape[1]
    # In the order n, r, z, with what h adds to n behind it, the products of x are the
    # first three quarters of the columns and those of h the last three.
    of_x, bias_x = of_x.roll(d, 0), bias_x.roll(d)
    bias = torch.cat([bias_x[:d], bias_x[d:] + bias_h[: 2 * d], bias_h[2 * d :]])
    given = x, state, of_x, of_h, bias
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in given)
    with torch.autocast("cpu", enabled=False):
        return _CompiledGRU.apply(keep, *given)


class _CompiledGRU(torch.autograd.Function):
    """Products of each day, then `kernels.gru_day`, and their gradients."""

    @staticmethod
    def forward(ctx, keep, x, state, of_x, of_h, bias):
        length, (n, d) = len(x), state.shape
        y, state = x.new_empty(length, n, d), state.contiguous()
        gates = x.new_empty(length if keep else 1, n, 4 * d)
        for rows in cut(n, _STOCKS):
            before = state[rows]
            for t in range(length):
                made, h = gates[t if keep else 0, rows], y[t, rows]
                made[:, 3 * d :] = bias[3 * d :]
                ours = made[:, : 3 * d]
                torch.addmm(bias[: 3 * d], x[t, rows], of_x.t(), out=ours)
                made[:, d:].addmm_(before, of_h.t())
                kernels.gru_day(made.numpy(), before.numpy(), h.numpy())
                before = h
        ctx.save_for_backward(x, state, of_x, of_h, y, gates)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, state, of_x, of_h, y, gates = ctx.saved_tensors
        length, n, d = y.shape
        dy, dstate = dy.contiguous(), torch.zeros_like(state)
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dof_x, dof_h = x.new_zeros(x.shape[2], 3 * d), torch.zeros_like(of_h)
        dbias = dy.new_zeros(4 * d)
        for rows in cut(n, _STOCKS):
            dh = dstate[rows]
            grads, ones = dy.new_empty(len(dh), 4 * d), dy.new_ones(len(dh))
            grads_x, grads_h = grads[:, : 3 * d], grads[:, d:]
            for t in range(length - 1, -1, -1):
                before = y[t - 1, rows] if t else state[rows]
                given = gates[t, rows], before, dy[t, rows], dh, grads
                kernels.gru_day_backward(*(v.numpy() for v in given))
                dh.addmm_(grads_h, of_h)
                dof_h.addmm_(grads_h.t(), before)
                dof_x.addmm_(x[t, rows].t(), grads_x)
                dbias.addmv_(grads.t(), ones)
                if dx is not None:
                    torch.mm(grads_x, of_x, out=dx[t, rows])
        return None, dx, dstate, dof_x.t(), dof_h, dbias
