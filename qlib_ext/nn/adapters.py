"""Adapters of features and labels that change over time: G and H of DoubleAdapt.

Zhao, Kong and Shen (2023), "DoubleAdapt: A Meta-learning Approach to Incremental
Learning for Stock Trend Forecasting", KDD, section 4.2; https://arxiv.org/abs/2306.09862.
Differences: both maps begin as the identity (weights `W`, `b`, `beta` 0, `gamma` 1), so
that training starts from the forecaster alone; the paper leaves the start open.

Glossary: l days of the features, c scored days, n instruments, f features, k heads.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["DataAdapters", "FeatureAdapter", "LabelAdapter", "gates"]

_HIDDEN = 32  # of the label adapter's gates


def gates(x: torch.Tensor, heads: torch.Tensor, temperature: float) -> torch.Tensor:
    """Weights of the heads: softmax of the cosines over `temperature`.

    Parameters
    ----------
    x : Tensor [..., f]
    heads : Tensor [k, f]
        Prototypes p.
    temperature : float
        Tau; the larger, the more equal the weights.

    Returns
    -------
    Tensor [..., k]
        Sums to 1. A row of zeros has equal weights.
    """
    cosine = functional.normalize(x, dim=-1) @ functional.normalize(heads, dim=-1).T
    return torch.softmax(cosine / temperature, dim=-1)


class FeatureAdapter(nn.Module):
    """Map features of each day and stock: ``G(x) = x + sum_i s_i (W_i x + b_i)``.

    Parameters
    ----------
    d_feat : int
        Features `f`.
    num_heads : int
        `k`.
    temperature : float
    """

    def __init__(self, d_feat: int, num_heads: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.prototypes = nn.Parameter(torch.empty(num_heads, d_feat))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)
        self.weight = nn.Parameter(torch.zeros(num_heads, d_feat, d_feat))
        self.bias = nn.Parameter(torch.zeros(num_heads, d_feat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., f] to G(x) [..., f]."""
        s = gates(x, self.prototypes, self.temperature)  # [..., k]
        k, f, _ = self.weight.shape
        mapped = x @ self.weight.reshape(k * f, f).T  # [..., k * f]: W_i x of all heads
        mapped = mapped.unflatten(-1, (k, f)) + self.bias
        return x + (s.unsqueeze(-1) * mapped).sum(-2)


class LabelAdapter(nn.Module):
    """Map labels, ``H(y) = sum_i s_i (gamma_i y + beta_i)``, and scores back.

    The weights s come from a bias-free linear map of the stock's whole window to 32
    numbers. The way back is ``sum_i s_i (y - beta_i) / gamma_i``, as in the paper: the
    inverse of each head, which is that of H only where all weight is on one head.

    Parameters
    ----------
    d_feat, step_len : int
        Features `f` and look-back days of a window.
    num_heads : int
        `k`.
    temperature : float
    """

    def __init__(
        self, d_feat: int, step_len: int, num_heads: int, temperature: float
    ) -> None:
        super().__init__()
        self.step_len, self.temperature = step_len, temperature
        self.linear = nn.Linear(step_len * d_feat, _HIDDEN, bias=False)
        self.prototypes = nn.Parameter(torch.empty(num_heads, _HIDDEN))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)
        self.gamma = nn.Parameter(torch.ones(num_heads))
        self.beta = nn.Parameter(torch.zeros(num_heads))

    def weights(self, x: torch.Tensor, days: int) -> torch.Tensor:
        """Gates [c, n, k] of the last `days` days of x [l, n, f].

        Days before the first of x count as 0, the mean.
        """
        missing = self.step_len + days - 1 - len(x)
        if missing > 0:
            x = torch.cat([x.new_zeros(missing, *x.shape[1:]), x])
        x = x[-(self.step_len + days - 1) :]
        # The linear map of all windows as a convolution over the days.
        kernel = self.linear.weight.unflatten(1, (self.step_len, x.shape[-1]))
        window = functional.conv1d(x.permute(1, 2, 0), kernel.transpose(1, 2))
        return gates(window.permute(2, 0, 1), self.prototypes, self.temperature)

    def forward(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Map y [c, n] to H(y) [c, n]; NaN stays NaN."""
        return (weights * (self.gamma * y.unsqueeze(-1) + self.beta)).sum(-1)

    def inverse(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Map scores y [c, n] back to the scale of raw labels."""
        # The published code adds the same tiny number against a division by zero.
        return (weights * (y.unsqueeze(-1) - self.beta) / (self.gamma + 1e-9)).sum(-1)


class DataAdapters(nn.Module):
    """The two adapters of a forecaster's data.

    Parameters
    ----------
    d_feat, step_len, num_heads : int
    temperature : float
    """

    def __init__(
        self, d_feat: int, step_len: int, num_heads: int = 8, temperature: float = 10.0
    ) -> None:
        super().__init__()
        self.feature = FeatureAdapter(d_feat, num_heads, temperature)
        self.label = LabelAdapter(d_feat, step_len, num_heads, temperature)
