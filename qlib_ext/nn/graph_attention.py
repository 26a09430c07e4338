"""Message passing over several relations between the stocks of a day.

`RelationalAttention` is graph attention (GAT, Veličković et al. 2018, section 2.1),
`RelationalConv` a mean convolution (R-GCN, Schlichtkrull et al. 2018, section 2.1; one
weight set a relation). Both differ from the papers in that the caller may weight the
relations, day by day.

Attention logits are split, a_src·h_j + a_dst·h_i, so no array is larger than edges x
heads. On a CPU compiled loops walk the edges of each target; elsewhere values are
gathered by sparse matrix products, and their gradients by products sampled at the
edges. torch-geometric's GATConv computes the same numbers and is the reference in the
tests; it keeps edges x hidden floats and takes 1.7 to 3.2 times as long with 10
neighbours a stock, 3.9 to 4.9 times with 30 (300 to 5,000 stocks, pass by pass in turn
on one CPU thread; `benchmarks/graph.py`).
The convolutions of `RelationalConv` are torch-geometric's own.

Glossary: c scored days, n instruments, m = c·n nodes, d hidden width, e edges, h heads,
p = d / h channels of a head, r relations. Paper symbols: `att_src`, `att_dst` are the
two halves of a, `weight` is W.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qlib_ext.nn import kernels

__all__ = ["GraphAttention", "Neighbors", "RelationalAttention", "RelationalConv"]


with warnings.catch_warnings():
    # torch says once a process that its sparse rows are "in beta state"; say it here,
    # where nobody has to read it.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))


class Neighbors(NamedTuple):
    """Edges sorted by target, then source.

    Attributes
    ----------
    row, col : int32 Tensor [e]
        Target and source of each edge.
    ptr : int32 Tensor [m + 1]
        Where each target's edges begin.
    """

    row: torch.Tensor
    col: torch.Tensor
    ptr: torch.Tensor

    @classmethod
    def of(
        cls, edge_index: torch.Tensor, size: int, self_loops: bool = True
    ) -> Neighbors:
        """Sort an edge list.

        Parameters
        ----------
        edge_index : int64 Tensor [2, e]
            Row 0 sources, row 1 targets, each pair at most once and no self-loop.
        size : int
            Nodes m.
        self_loops : bool, default True
            Let every node be its own neighbour too, so that none is without.
        """
        edges = edge_index.cpu().contiguous().numpy()
        near = kernels.sort_edges(*edges, size, self_loops)  # type: ignore[call-arg]
        return cls(*map(torch.from_numpy, near)).to(edge_index.device)

    def to(self, device: torch.device) -> Neighbors:
        """Move to a device."""
        return Neighbors(*(x.to(device) for x in self))

    @property
    def size(self) -> int:
        """Number of nodes m."""
        return len(self.ptr) - 1

    def transposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sort the edges by source.

        Returns
        -------
        row_t : int32 Tensor [e]
            Their targets.
        ptr_t : int32 Tensor [m + 1]
            Where each source's edges begin.
        perm : int64 Tensor [e]
            Their positions among the edges sorted by target.
        """
        col, perm = torch.sort(self.col, stable=True)
        nodes = torch.arange(self.size + 1, dtype=col.dtype, device=col.device)
        return self.row[perm], torch.searchsorted(col, nodes, out_int32=True), perm


def _stacked(index: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    """Repeat node numbers [e] for every head, each head's nodes after the last's."""
    shift = torch.arange(heads, device=index.device, dtype=index.dtype) * size
    return (index + shift[:, None]).flatten()


def _stacked_pointer(ptr: torch.Tensor, heads: int) -> torch.Tensor:
    edges = int(ptr[-1])
    return torch.cat(
        [_stacked(ptr[:-1], heads, edges), ptr.new_tensor([heads * edges])]
    )


def _matrix(ptr, col, value):
    size = len(ptr) - 1
    return torch.sparse_csr_tensor(
        ptr, col, value, (size, size), check_invariants=False
    )


def _sampled(row, col, ptr, g, x):
    """Dot products g[row] · x[col] at the edges: [e]."""
    if not x.is_cuda:  # torch lacks it on CPUs without MKL
        return (g.index_select(0, row) * x.index_select(0, col)).sum(-1)
    pattern = _matrix(ptr, col, x.new_zeros(len(col)))
    return torch.sparse.sampled_addmm(pattern, g, x.t(), beta=0.0).values()


def _segment_sum(value, ptr):
    return torch.segment_reduce(value, "sum", offsets=ptr.long(), axis=0, initial=0.0)


class _Attend(torch.autograd.Function):
    """Softmax attention over neighbours, from split logits, with its own backward.

    x [m, h, p], src and dst [m, h], keep [h, e] or None; the attention is [h, e].
    """

    @staticmethod
    def forward(ctx, x, src, dst, keep, slope, near):
        x, src, dst = x.contiguous(), src.contiguous(), dst.contiguous()
        col, ptr = near.col.numpy(), near.ptr.numpy()
        slope = src.numpy().dtype.type(slope)
        alpha = x.new_empty(x.shape[1], len(col))
        args = src.numpy(), dst.numpy(), col, ptr, slope, alpha.numpy()
        kernels.attention_logits(*args)
        alpha.exp_()
        out = torch.empty_like(x)
        factor = x.new_empty(0, 0) if keep is None else keep
        args = x.numpy(), factor.numpy(), col, ptr, alpha.numpy(), out.numpy()
        kernels.attend(*args)
        ctx.save_for_backward(x, src, dst, factor, alpha)
        ctx.near, ctx.slope = near, slope
        ctx.mark_non_differentiable(alpha)
        return out, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        x, src, dst, keep, alpha = ctx.saved_tensors
        grads = [torch.zeros_like(v) for v in (x, src, dst)]
        kernels.attend_backward(  # type: ignore[call-arg]
            *(v.numpy() for v in (x, src, dst, keep, ctx.near.col, ctx.near.ptr)),
            ctx.slope,
            *(v.numpy() for v in (alpha, g.contiguous(), *grads)),
        )
        return *grads, None, None, None


class _AttendSparse(torch.autograd.Function):
    """`_Attend` in torch operations, for accelerators.

    The heads are stacked into one graph of h·m nodes, so that every step is one
    operation.
    """

    @staticmethod
    def forward(ctx, x, src, dst, keep, slope, near):
        size, heads, _ = x.shape
        x = x.transpose(0, 1).contiguous()  # [h, m, p]
        row, col = (_stacked(i, heads, size) for i in (near.row, near.col))
        ptr = _stacked_pointer(near.ptr, heads)
        logit = src.t().flatten().index_select(0, col)
        logit = logit + dst.t().flatten().index_select(0, row)
        positive = logit > 0
        logit = torch.where(positive, logit, slope * logit)
        top = torch.segment_reduce(
            logit, "max", offsets=ptr.long(), axis=0, initial=-torch.inf
        )
        alpha = (logit - top.index_select(0, row)).exp_()
        alpha /= _segment_sum(alpha, ptr).index_select(0, row)
        weight = alpha if keep is None else alpha * keep.flatten()
        ctx.save_for_backward(x, alpha, positive, keep)
        ctx.near, ctx.slope = near, slope
        out = (_matrix(ptr, col, weight) @ x.flatten(0, 1)).view_as(x)
        shown = alpha.view(heads, -1)
        ctx.mark_non_differentiable(shown)
        return out.transpose(0, 1), shown

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        x, alpha, positive, keep = ctx.saved_tensors
        near, heads, size = ctx.near, x.shape[0], x.shape[1]
        row, col = (_stacked(i, heads, size) for i in (near.row, near.col))
        ptr = _stacked_pointer(near.ptr, heads)
        row_t, ptr_t, perm = near.transposed()
        row_t, ptr_t = _stacked(row_t, heads, size), _stacked_pointer(ptr_t, heads)
        perm = _stacked(perm, heads, len(near.col))
        g = g.transpose(0, 1).contiguous().flatten(0, 1)
        weight = alpha if keep is None else alpha * keep.flatten()
        grad_x = _matrix(ptr_t, row_t, weight.index_select(0, perm)) @ g
        grad = _sampled(row, col, ptr, g, x.flatten(0, 1))  # of the weights
        if keep is not None:
            grad = grad * keep.flatten()
        mean = _segment_sum(alpha * grad, ptr).index_select(0, row)
        grad = alpha * (grad - mean)  # of the logits
        grad = torch.where(positive, grad, ctx.slope * grad)
        grad_dst = _segment_sum(grad, ptr).view(heads, size)
        grad_src = _segment_sum(grad.index_select(0, perm), ptr_t).view(heads, size)
        grad_x = grad_x.view_as(x).transpose(0, 1)
        return grad_x, grad_src.t(), grad_dst.t(), None, None, None


class GraphAttention(nn.Module):
    """Multi-head attention of each stock over its neighbours, one relation.

    Parameters
    ----------
    d_in, d_out : int
        Widths; `d_out` is divided among the heads.
    heads : int, default 4
    dropout : float, default 0
        Share of attention weights dropped in training.
    negative_slope : float, default 0.2
        Of the leaky ReLU on the logits.

    References
    ----------
    Veličković et al. (2018), Graph Attention Networks, equations 1 to 6.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        heads: int = 4,
        dropout: float = 0.0,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        if d_out % heads:
            raise ValueError(f"`d_out` {d_out} must be a multiple of `heads` {heads}.")
        self.heads = heads
        self.dropout = dropout
        self.negative_slope = negative_slope
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.att_src = nn.Parameter(torch.empty(heads, d_out // heads))
        self.att_dst = nn.Parameter(torch.empty(heads, d_out // heads))
        self.bias = nn.Parameter(torch.zeros(d_out))
        nn.init.xavier_uniform_(self.weight)
        bound = math.sqrt(6 / (heads + d_out // heads))
        nn.init.uniform_(self.att_src, -bound, bound)
        nn.init.uniform_(self.att_dst, -bound, bound)

    def forward(
        self, x: torch.Tensor, near: Neighbors, return_attention: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Mix each node's neighbours.

        Parameters
        ----------
        x : Tensor [m, d_in]
        near : Neighbors
        return_attention : bool, default False
            Also return the attention [e, h] (before dropout, without gradient), edges
            in the order of `near`.

        Returns
        -------
        Tensor [m, d_out]
        """
        # Sparse products know no half precision.
        with torch.autocast(x.device.type, enabled=False):
            z = x.to(self.weight.dtype) @ self.weight.T
            z = z.unflatten(-1, (self.heads, -1))  # [m, h, p]
            src = (z * self.att_src).sum(-1)  # [m, h]
            dst = (z * self.att_dst).sum(-1)
            keep = None
            if self.training and self.dropout > 0:
                keep = torch.rand(self.heads, len(near.col), device=x.device)
                keep = (keep >= self.dropout).to(z.dtype) / (1 - self.dropout)
            attend = _Attend if x.device.type == "cpu" else _AttendSparse
            out, alpha = attend.apply(z, src, dst, keep, self.negative_slope, near)
            out = out.flatten(1) + self.bias
            alpha = alpha.T
        return (out, alpha) if return_attention else out


class RelationalAttention(nn.Module):
    """Graph attention over several relations, summed with the caller's weights.

    Parameters
    ----------
    d_in, d_out : int
    relations : int
        Relations r, each with a weight set of its own.
    heads, dropout, negative_slope
        See `GraphAttention`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        relations: int,
        heads: int = 4,
        dropout: float = 0.0,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        if relations < 1:
            raise ValueError(f"`relations` must be at least 1, got {relations}.")
        self.attention = nn.ModuleList(
            GraphAttention(d_in, d_out, heads, dropout, negative_slope)
            for _ in range(relations)
        )

    def forward(
        self,
        h: torch.Tensor,
        near: Sequence[Neighbors],
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix each stock's neighbours within the day.

        Parameters
        ----------
        h : Tensor [c, n, d_in]
        near : sequence of r Neighbors
            Over m = c·n nodes, day after day; with self-loops, an isolated stock
            listens to itself alone.
        weights : Tensor [c, r], optional
            Weight of each relation on each day; None: equal, summing to 1.

        Returns
        -------
        Tensor [c, n, d_out]
        """
        _check_relations(near, len(self.attention), h)
        c, n, _ = h.shape
        weights = _equal(weights, h, len(near))
        x = h.flatten(0, 1)  # [m, d_in]
        mixed = [
            weights[:, i, None, None] * attention(x, near[i]).unflatten(0, (c, n))
            for i, attention in enumerate(self.attention)
        ]
        return torch.stack(mixed).sum(0)


class RelationalConv(nn.Module):
    """Heterogeneous mean convolution: one weight set a relation, and one for oneself.

    out_i = W_0 h_i + b + sum over relations of w_r W_r mean(h_j, j neighbour of i). A
    stock without neighbours in a relation gets nothing from it.

    Parameters
    ----------
    d_in, d_out : int
    relations : int
        Relations r.
    """

    def __init__(self, d_in: int, d_out: int, relations: int) -> None:
        super().__init__()
        if relations < 1:
            raise ValueError(f"`relations` must be at least 1, got {relations}.")
        # Its import costs seconds, which only those who use it should pay.
        from torch_geometric.nn import HeteroConv, SAGEConv

        self.root = nn.Linear(d_in, d_out)
        self.conv = HeteroConv(
            {
                ("stock", str(i), "stock"): SAGEConv(
                    d_in, d_out, aggr="sum", root_weight=False, bias=False
                )
                for i in range(relations)
            },
            aggr=None,
        )
        self.relations = relations

    def forward(
        self,
        h: torch.Tensor,
        near: Sequence[Neighbors],
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix each stock's neighbours within the day.

        Takes and returns what `RelationalAttention.forward` does; `near` is made
        without self-loops, since a stock's own share has a weight set of its own.
        """
        _check_relations(near, self.relations, h)
        c, n, _ = h.shape
        weights = _equal(weights, h, len(near))
        with torch.autocast(h.device.type, enabled=False):
            x = h.flatten(0, 1).to(self.root.weight.dtype)
            # Rows that sum to 1 make the sum a mean.
            edges = {
                ("stock", str(i), "stock"): _mean_matrix(each, x.dtype)
                for i, each in enumerate(near)
            }
            mixed = self.conv({"stock": x}, edges)["stock"]  # [m, r, d_out]
            mixed = mixed.unflatten(0, (c, n))
            return self.root(h.to(x.dtype)) + torch.einsum(
                "cr,cnrd->cnd", weights.to(x.dtype), mixed
            )


def _mean_matrix(near: Neighbors, dtype: torch.dtype) -> torch.Tensor:
    degree = torch.diff(near.ptr).to(dtype)
    return torch.sparse_csr_tensor(
        near.ptr.long(),
        near.col.long(),
        (1 / degree).index_select(0, near.row),
        (near.size, near.size),
        check_invariants=False,
    )


def _check_relations(near: Sequence[Neighbors], relations: int, h: torch.Tensor):
    if len(near) != relations:
        raise ValueError(f"`near` must give {relations} relations, got {len(near)}.")
    nodes = h.shape[0] * h.shape[1]
    for each in near:
        if each.size != nodes:
            raise ValueError(
                f"`near` joins {each.size} nodes, but `h` {tuple(h.shape)} has {nodes}."
            )


def _equal(weights, h, relations):
    if weights is None:
        return h.new_full((h.shape[0], relations), 1 / relations)
    if weights.shape != (h.shape[0], relations):
        raise ValueError(
            f"`weights` must be {(h.shape[0], relations)}, got {tuple(weights.shape)}."
        )
    return weights
