"""Losses: pure functions of tensors, one value per scored day.

Shapes: c scored days, n instruments, k factor units or risk factors.
"""

from __future__ import annotations

import torch

from qlib_ext.nn.cross_section import masked_mean

__all__ = [
    "day_ic",
    "day_mse",
    "exposure_penalty",
    "long_mse",
    "long_side",
    "orthogonality",
    "over_days",
]


def day_mse(
    score: torch.Tensor,
    label: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of each day over the stocks that have a label.

    Parameters
    ----------
    score : Tensor [c, n]
    label : Tensor [c, n]
        NaN is no label; such stocks do not count.
    mask : bool Tensor [c, n]
        Presence.
    weight : Tensor [c, n], optional
        Of each stock's error, against 1; the mean is over the sum of weights.

    Returns
    -------
    loss : Tensor [c]
        0 on a day without labels.
    counted : bool Tensor [c]
        Days with at least two labelled stocks.
    """
    labelled = mask & torch.isfinite(label)
    # NaN must be replaced before the subtraction: 0 * NaN in the backward pass is NaN.
    error = (score - torch.where(labelled, label, 0.0)).square()
    if weight is None:
        loss = masked_mean(error.unsqueeze(-1), labelled)[:, 0, 0]
    else:
        weight = torch.where(labelled, weight, 0.0)
        loss = (weight * error).sum(1) / weight.sum(1).clamp_min(1e-12)
    return loss, labelled.sum(1) >= 2


def long_side(
    label: torch.Tensor, mask: torch.Tensor, weight: float = 2.0, quantile: float = 0.8
) -> torch.Tensor:
    """Weights that favour the stocks one would hold: `weight` above a quantile, else 1.

    Parameters
    ----------
    label : Tensor [c, n]
        NaN is no label; such stocks do not count.
    mask : bool Tensor [c, n]
        Presence.
    weight : float, default 2.0
        Of labels above the day's `quantile`.
    quantile : float, default 0.8

    Returns
    -------
    Tensor [c, n]

    References
    ----------
    Minsheng Securities (2025-08), loss of Meta_Master, whose weights are not public;
    docs/systems/adaptive.md.
    """
    known = torch.where(mask, label, float("nan"))
    border = known.nanquantile(quantile, dim=1, keepdim=True)
    return torch.where(known > border, weight, 1.0)


def long_mse(
    score: torch.Tensor, label: torch.Tensor, mask: torch.Tensor, long_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`day_mse` with `long_side`'s weights; at a weight of 1, `day_mse` itself."""
    weight = long_side(label, mask, long_weight) if long_weight > 1 else None
    return day_mse(score, label, mask, weight)


def day_ic(
    score: torch.Tensor, label: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlation of score and label of each day, over the stocks that have a label.

    Parameters
    ----------
    score, label, mask
        As in `day_mse`.

    Returns
    -------
    ic : Tensor [c]
        Pearson's; 0 where one of the two does not vary.
    counted : bool Tensor [c]
        Days with at least two labelled stocks.
    """
    labelled = mask & torch.isfinite(label)
    pair = torch.stack([score, torch.where(labelled, label, 0.0)], dim=-1)  # [c, n, 2]
    pair = torch.where(labelled.unsqueeze(-1), pair - masked_mean(pair, labelled), 0.0)
    covariance = pair.prod(-1).sum(1)
    # The small constant only matters where one of the two does not vary at all.
    size = (pair.square().sum(1) + 1e-12).sqrt().prod(-1)
    return covariance / size, labelled.sum(1) >= 2


def over_days(value: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean of value [c] over the counted days; 0 if there is none."""
    return (value * counted).sum() / counted.sum().clamp_min(1)


def orthogonality(units: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Penalty on correlated factor units, ``||Z'Z||_F / (N K^2)`` of each day.

    Parameters
    ----------
    units : Tensor [c, n, k]
        Units standardised over the day (`standardize`), 0 where absent.
    mask : bool Tensor [c, n]

    Returns
    -------
    Tensor [c]
        K^-1.5 when the units are uncorrelated, 1 / K when they are all equal.

    References
    ----------
    Orient Securities, factor series 91, multi-factor loss; docs/systems/rnn.md.
    """
    n_units = units.shape[-1]
    gram = units.transpose(1, 2) @ units
    count = mask.sum(1).clamp_min(1).to(units.dtype)
    return torch.linalg.matrix_norm(gram) / (count * n_units**2)


def exposure_penalty(
    score: torch.Tensor, factors: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean over risk factors of the squared correlation with the score, each day.

    Parameters
    ----------
    score : Tensor [c, n]
    factors : Tensor [c, n, k]
        NaN is unknown; such a stock does not count for that factor.
    mask : bool Tensor [c, n]
        Presence.

    Returns
    -------
    Tensor [c]
        Between 0 and 1. A factor that fewer than three stocks know, or that is equal
        for all of them, counts as 0.

    References
    ----------
    docs/systems/mamba_moe.md, the last term of the loss without its weight.
    """
    known = mask.unsqueeze(-1) & torch.isfinite(factors)  # [c, n, k]
    count = known.sum(1).clamp_min(1).to(score.dtype)  # [c, k]

    def centred(x):
        x = torch.where(known, x, 0.0)
        mean = x.sum(1, keepdim=True) / count.unsqueeze(1)
        return torch.where(known, x - mean, 0.0)

    s, f = centred(score.unsqueeze(-1)), centred(factors)
    variance = (s.square().sum(1) / count) * (f.square().sum(1) / count)
    covariance = (s * f).sum(1) / count
    # The small constant only matters where one of the two does not vary at all.
    squared = covariance.square() / (variance + 1e-12)
    return torch.where(known.sum(1) >= 3, squared, 0.0).mean(-1)
