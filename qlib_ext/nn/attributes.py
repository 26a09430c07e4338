"""Attributes of the day: what is known of each instrument besides its series.

A recurrent encoder reads histories; a credit rating, a remaining size or a financial
indicator says what it has to say by its value of the day. Such values join the
encoder's state before the last linear layer: the financial indicators of GRU+GAT_SA
(Kaiyuan Securities, microstructure 32, block "FIN") and the terms of a convertible bond
(docs/systems/convertible.md) by this one block.

Glossary: c scored days, n instruments, q attributes.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["DayAttributes"]


class DayAttributes(nn.Sequential):
    """Linear layer and ReLU over the attributes and whether each is known.

    Parameters
    ----------
    q : int
        Number of attributes.
    width : int, default 16
        Outputs an instrument.
    """

    def __init__(self, q: int, width: int = 16) -> None:
        super().__init__(nn.Linear(2 * q, width), nn.ReLU())
        self.width = width

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map values [c, n, q], NaN where unknown, to [c, n, width]."""
        known = torch.isfinite(values)
        both = torch.cat([torch.where(known, values, 0.0), known.float()], dim=-1)
        return super().forward(both)
