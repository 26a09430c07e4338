"""Operations on one day's stocks, batched over days and masked by presence.

Shapes: c scored days, n instruments, k columns.
"""

from __future__ import annotations

import torch

__all__ = ["masked_mean", "standardize"]


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over instruments where `mask` holds; 0 on a day without any.

    Parameters
    ----------
    x : Tensor [c, n, k]
        Must be finite where `mask` holds.
    mask : bool Tensor [c, n]

    Returns
    -------
    Tensor [c, 1, k]
    """
    weight = mask.unsqueeze(-1).to(x.dtype)
    total = torch.where(mask.unsqueeze(-1), x, 0.0).sum(1, keepdim=True)
    return total / weight.sum(1, keepdim=True).clamp_min(1.0)


def standardize(x: torch.Tensor, mask: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Batch normalisation over one day's stocks, without affine parameters.

    The same statistics, those of the day itself, serve training and prediction, so a
    score does not depend on which days happened to share a batch, and needs no running
    average. A day with one stock has no cross-section: its score is 0.

    Parameters
    ----------
    x : Tensor [c, n, k]
    mask : bool Tensor [c, n]
        Stocks that count; the others come out as 0.
    eps : float
        Added to the variance, as in batch normalisation.

    Returns
    -------
    Tensor [c, n, k]
    """
    centred = torch.where(mask.unsqueeze(-1), x - masked_mean(x, mask), 0.0)
    variance = masked_mean(centred.square(), mask)
    return centred * torch.rsqrt(variance + eps)
