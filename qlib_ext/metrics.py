"""Evaluation figures as pure functions of panels, one for trainer and records.

Glossary of shapes: t days; n instruments; k factors; g groups (layers); h horizon in
days. A panel is ``[t, n]``: one row a day, one column an instrument, NaN where unknown.
Functions pool one day's cross-section at a time unless they say otherwise, so no value
of one day can depend on another day.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["cs_rank", "ic", "rank_ic"]

# Elements worked on at once: on a CPU a block should stay in the cache, on an
# accelerator it should be large enough to fill the device.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 24


def cs_rank(x: Tensor) -> Tensor:
    """Rank each row, 1 for the smallest; ties share the average of their ranks.

    Pools one row (one day's cross-section). NaN and infinite values get NaN and do not
    count. Equals ``scipy.stats.rankdata(row[finite], method="average")``.

    Parameters
    ----------
    x : Tensor [..., n]
        Values of any real type, on any device.

    Returns
    -------
    Tensor [..., n]
        Ranks; float64 where `x` is float64, else float32.

    Examples
    --------
    >>> cs_rank(torch.tensor([[0.3, float("nan"), 0.1, 0.3]]))
    tensor([[2.5000,    nan, 1.0000, 2.5000]])
    """
    if not x.is_floating_point():
        x = x.to(torch.float64 if x.dtype == torch.int64 else torch.float32)
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    rows = _as_rows(x.detach())
    out = torch.empty_like(rows)
    for part in _blocks(rows):
        block = rows[part]
        finite = torch.isfinite(block)
        out[part] = _rank_rows(torch.where(finite, block, torch.nan)).masked_fill_(
            ~finite, torch.nan
        )
    return out.reshape(x.shape)


def ic(score: Tensor, label: Tensor, min_count: int = 2) -> Tensor:
    """Pearson correlation of score and label, one a day.

    Pools one day. A pair counts where both values are finite. Computed in float64.

    Parameters
    ----------
    score, label : Tensor [..., n]
        Broadcast against each other, so k factors ``[k, t, n]`` meet one label
        ``[t, n]``.
    min_count : int, default 2
        Fewest pairs, in instruments per day, for a day to count.

    Returns
    -------
    Tensor [...]
        float64; NaN on days with fewer than `min_count` pairs or without variance in
        either.

    Raises
    ------
    ValueError
        If `min_count` is below 2 or the shapes do not broadcast.
    """
    return _correlate(score, label, min_count, ranked=False)


def rank_ic(score: Tensor, label: Tensor, min_count: int = 2) -> Tensor:
    """Spearman correlation of score and label, one a day (RankIC).

    Pools one day. A pair counts where both values are finite and ranks are taken among
    the pairs that count, ties sharing their average rank.

    Parameters
    ----------
    score, label : Tensor [..., n]
        Broadcast against each other.
    min_count : int, default 2
        Fewest pairs, in instruments per day, for a day to count.

    Returns
    -------
    Tensor [...]
        float64; NaN on days with fewer than `min_count` pairs or without variance in
        either.

    Raises
    ------
    ValueError
        If `min_count` is below 2 or the shapes do not broadcast.

    Examples
    --------
    >>> score = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> rank_ic(score, torch.tensor([[0.1, 0.2, 0.4, 0.3]]))
    tensor([0.8000], dtype=torch.float64)
    """
    return _correlate(score, label, min_count, ranked=True)


def _correlate(score: Tensor, label: Tensor, min_count: int, ranked: bool) -> Tensor:
    if min_count < 2:
        raise ValueError(f"`min_count` must be at least 2, got {min_count}.")
    try:
        score, label = torch.broadcast_tensors(score.detach(), label.detach())
    except RuntimeError as error:
        raise ValueError(
            "`score` and `label` must broadcast against each other, got shapes "
            f"{tuple(score.shape)} and {tuple(label.shape)}."
        ) from error
    shape = score.shape[:-1]
    score, label = _as_rows(score), _as_rows(label)
    out = score.new_full((score.shape[0],), torch.nan, dtype=torch.float64)
    if not score.numel():
        return out.reshape(shape)
    for part in _blocks(score):
        out[part] = _correlate_rows(score[part], label[part], min_count, ranked)
    return out.reshape(shape)


def _correlate_rows(a: Tensor, b: Tensor, min_count: int, ranked: bool) -> Tensor:
    both = torch.isfinite(a) & torch.isfinite(b)
    count = both.sum(-1)
    if ranked:
        # Average ranks of m values always have the mean (m + 1) / 2.
        mean = ((count + 1) / 2).unsqueeze(-1)
        a, b = (
            torch.where(both, _rank_rows(torch.where(both, x, torch.nan)) - mean, 0.0)
            for x in (a, b)
        )
        a, b = a.double(), b.double()
    else:
        a, b = (_centre_rows(x, both, count) for x in (a, b))
    cov = torch.linalg.vecdot(a, b)
    var = torch.linalg.vecdot(a, a) * torch.linalg.vecdot(b, b)
    defined = (count >= min_count) & (var > 0)
    return torch.where(defined, cov / var.sqrt(), torch.nan).clamp(-1.0, 1.0)


def _centre_rows(x: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    x = x.double()
    # A value of the row is taken off first: a constant row then has exactly no
    # variance, where a rounded mean would leave some and give a false correlation.
    pivot = x.gather(-1, mask.int().argmax(-1, keepdim=True))
    x = torch.where(mask, x - pivot, 0.0)
    mean = x.sum(-1, keepdim=True) / count.clamp(min=1).unsqueeze(-1)
    return torch.where(mask, x - mean, 0.0)


def _rank_rows(x: Tensor) -> Tensor:
    """Average ranks [m, n] of rows whose NaN (all last) get meaningless ranks."""
    m, n = x.shape
    if x.device.type == "cpu":
        # numpy sorts with SIMD instructions, five times as fast as torch on a CPU.
        order = torch.from_numpy(np.argsort(x.numpy(), axis=-1))
    else:
        order = x.argsort(-1)
    ordered = x.gather(-1, order)
    ranks = torch.arange(1, n + 1, dtype=x.dtype, device=x.device).repeat(m, 1)
    tied = torch.zeros(m, n, dtype=torch.bool, device=x.device)
    torch.eq(ordered[:, 1:], ordered[:, :-1], out=tied[:, :-1])
    # `pair` holds the flat positions that equal their right neighbour. The last column
    # is never one, so a run of consecutive positions stays within its row.
    pair = tied.flatten().nonzero().squeeze(-1)
    if pair.numel():
        first = torch.ones_like(pair, dtype=torch.bool)
        first[1:] = pair[1:] != pair[:-1] + 1
        run = first.cumsum(0) - 1
        extra = torch.bincount(run)  # members of the run beyond its first
        mean = (pair[first] % n + 1 + extra / 2).to(x.dtype)[run]
        flat = ranks.view(-1)
        flat[pair] = mean
        flat[pair + 1] = mean
    return torch.empty_like(ranks).scatter_(-1, order, ranks)


def _as_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _blocks(x: Tensor) -> list[slice]:
    size = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, size // max(1, x.shape[-1]))
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]
