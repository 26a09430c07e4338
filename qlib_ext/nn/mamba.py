"""Mamba encoder for stock panels: blocks of convolution, selective scan and gate.

Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752), figure 3 and section 3.4.
Differences: time comes first, [l, n, d], as in `nn.GRU`; both states (the last inputs
of the convolution, the state of the scan) go in and come out, so that a stream of days
can be read in pieces; B is discretised by zero-order hold as the paper's equation 4
says (its kernel uses Euler's rule, here `discretisation: euler`).

Glossary: l look-back days, n instruments of the day, f features, d model width,
e channels inside a block (`expand` times d), s states, r rank of the step projection,
w width of the convolution.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlib_ext.nn.selective_scan import selective_scan

__all__ = ["CausalConv", "MambaBlock", "MambaEncoder"]

State = tuple[torch.Tensor, torch.Tensor]


class MambaEncoder(nn.Module):
    """Linear input, `num_layers` residual Mamba blocks, norm.

    Parameters
    ----------
    d_feat : int
        Features `f`.
    d_model : int, default 32
        Width `d` of the residual path and of the output.
    num_layers : int, default 1
    d_state, d_conv, expand : int, default 16, 4, 2
        States `s` of a channel, days `w` the convolution sees, channels `e` over `d`.
    dt_rank : int, optional
        Rank `r` of the step projection; default d / 16, rounded up.
    dropout : float, default 0.0
        After each block and after the last norm.
    discretisation : {"zoh", "euler"}, default "zoh"
    """

    def __init__(
        self,
        d_feat: int,
        d_model: int = 32,
        num_layers: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dropout: float = 0.0,
        discretisation: str = "zoh",
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(d_feat, d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(num_layers))
        self.blocks = nn.ModuleList(
            MambaBlock(d_model, d_state, d_conv, expand, dt_rank, discretisation)
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        # As GPT-2 and Mamba do: the sum of the blocks starts no larger than one block.
        for name, weight in self.named_parameters():
            if name.endswith("project_out.weight"):
                weight.data /= math.sqrt(num_layers)

    def forward(
        self, x: torch.Tensor, state: list[State] | None = None
    ) -> tuple[torch.Tensor, list[State]]:
        """Map x [l, n, f] to (h [l, n, d], state after the last day)."""
        h = self.embed(x)  # [l, n, d]
        states = []
        for i, (norm, block) in enumerate(zip(self.norms, self.blocks, strict=True)):
            out, last = block(norm(h), None if state is None else state[i])
            h = h + self.dropout(out)
            states.append(last)
        return self.dropout(self.norm(h)), states


class MambaBlock(nn.Module):
    """Project, convolve, scan, gate, project back.

    Parameters are those of `MambaEncoder`. The initial values are the official ones: A
    is -1 … -s in every channel, D is 1, steps are log-uniform in [0.001, 0.1].
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        discretisation: str = "zoh",
    ) -> None:
        super().__init__()
        width = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.sizes = [rank, d_state, d_state]
        self.discretisation = discretisation
        self.project_in = nn.Linear(d_model, 2 * width, bias=False)
        self.conv = CausalConv(width, d_conv)
        self.project_x = nn.Linear(width, sum(self.sizes), bias=False)
        self.project_dt = nn.Linear(rank, width)
        self.project_out = nn.Linear(width, d_model, bias=False)
        rates = torch.arange(1.0, d_state + 1).repeat(width, 1)  # [e, s]
        self.A_log = nn.Parameter(rates.log())
        self.D = nn.Parameter(torch.ones(width))
        nn.init.uniform_(self.project_dt.weight, -(rank**-0.5), rank**-0.5)
        step = torch.exp(torch.empty(width).uniform_(math.log(1e-3), math.log(0.1)))
        step = step.clamp_min(1e-4)
        with torch.no_grad():  # the inverse of softplus
            self.project_dt.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self, x: torch.Tensor, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Map x [l, n, d] to (y [l, n, d], (inputs [w - 1, n, e], h [n, e, s]))."""
        seen, h = (None, None) if state is None else state
        u, gate = self.project_in(x).chunk(2, dim=-1)  # [l, n, e] each
        u, seen = self.conv(u, seen)
        u = F.silu(u)
        dt, B, C = self.project_x(u).split(self.sizes, dim=-1)
        delta = F.softplus(self.project_dt(dt))  # [l, n, e]
        A = -torch.exp(self.A_log.float())
        y, h = selective_scan(u, delta, A, B, C, self.D, h, self.discretisation)
        y = y.to(gate.dtype) * F.silu(gate)
        return self.project_out(y), (seen, h)


class CausalConv(nn.Module):
    """Depthwise convolution over days that looks back only, time first.

    Parameters
    ----------
    width : int
        Channels.
    days : int
        Days seen, the current one included.
    """

    def __init__(self, width: int, days: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(days, width))  # the oldest day first
        self.bias = nn.Parameter(torch.empty(width))
        bound = days**-0.5  # as nn.Conv1d, whose fan-in is one channel's days
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: torch.Tensor, seen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve x [l, n, e]; `seen` are the inputs [w - 1, n, e] of earlier days."""
        before = len(self.weight) - 1
        if seen is None:
            seen = x.new_zeros(before, *x.shape[1:])
        padded = torch.cat([seen.to(x.dtype), x])  # [l + w - 1, n, e]
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = _Convolve.apply(padded, weight, bias)
        return y, padded[len(padded) - before :]


class _Convolve(torch.autograd.Function):
    """Sum of shifted products, in place; autograd would keep one array a day seen."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        length = len(x) - len(weight) + 1
        y = torch.addcmul(bias, x[:length], weight[0])
        for k in range(1, len(weight)):
            y.addcmul_(x[k : k + length], weight[k])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        length = len(dy)
        dx, dweight = torch.zeros_like(x), torch.empty_like(weight)
        for k in range(len(weight)):
            dx[k : k + length].addcmul_(dy, weight[k])
            product = (x[k : k + length] * dy).flatten(0, 1)
            torch.sum(product, 0, out=dweight[k])
        return dx, dweight, dy.sum((0, 1))
