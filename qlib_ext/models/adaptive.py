"""A forecaster with the adapters of its data and Adam's moments, as one state.

Glossary: l look-back days, c scored days, n instruments, f features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qlib_ext.models._base import Batch, Network
from qlib_ext.nn.adapters import DataAdapters

__all__ = ["Adaptive", "Weights"]


Weights = dict[str, torch.Tensor]


class Adaptive(Network):
    """A forecaster, the adapters of its data and Adam's moments: one state.

    Parameters
    ----------
    network : Network
        The forecaster.
    adapters : DataAdapters, optional
    """

    def __init__(self, network: Network, adapters: DataAdapters | None = None) -> None:
        super().__init__()
        self.network, self.adapters = network, adapters
        self.register_buffer("steps", torch.zeros(()))
        for i, parameter in enumerate(list(self.parameters())):
            self.register_buffer(f"mean_{i}", torch.zeros_like(parameter))
            self.register_buffer(f"square_{i}", torch.zeros_like(parameter))

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """The forecaster's."""
        return self.network.encoder

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Apply the forecaster's head."""
        return self.network.head(h, batch)

    def forward(
        self, batch: Batch, encode: Any, inverse: bool = True
    ) -> dict[str, torch.Tensor]:
        """Compute the scored days; `score` is back on the labels' scale."""
        days, adapters = len(batch.days), self.adapters
        if adapters is None:
            return self.network.head(encode(self.network, batch.x, days), batch)
        assert batch.x is not None
        # What joins the features (`TorchModel.day_inputs`) stays as it is.
        d = adapters.feature.bias.shape[1]
        x = torch.cat([adapters.feature(batch.x[..., :d]), batch.x[..., d:]], dim=-1)
        out = self.network.head(encode(self.network, x, days), replace(batch, x=x))
        if inverse:
            weights = adapters.label.weights(batch.x[..., :d], days)
            out = {**out, "score": adapters.label.inverse(out["score"], weights)}
        return out

    def adapted_label(self, label: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """H of labels [c, n]; NaN, which is no label, stays so."""
        assert self.adapters is not None
        adapter, known = self.adapters.label, torch.isfinite(label)
        # NaN must go before the product: 0 * NaN in the backward pass is NaN.
        d = self.adapters.feature.bias.shape[1]
        weights = adapter.weights(x[..., :d], len(label))
        there = adapter(torch.where(known, label, 0.0), weights)
        return torch.where(known, there, float("nan"))

    def keep(self, optimiser: torch.optim.Optimizer) -> None:
        """Take Adam's moments over into the state."""
        for i, parameter in enumerate(self.parameters()):
            if (state := optimiser.state.get(parameter)) is not None:
                self.get_buffer(f"mean_{i}").copy_(state["exp_avg"])
                self.get_buffer(f"square_{i}").copy_(state["exp_avg_sq"])
                self.get_buffer("steps").copy_(state["step"])

    def restore(self, optimiser: torch.optim.Optimizer) -> None:
        """Give a new Adam the moments of the state."""
        if not self.get_buffer("steps"):
            return
        for i, parameter in enumerate(self.parameters()):
            optimiser.state[parameter] = {
                "step": self.get_buffer("steps").detach().cpu().clone(),
                "exp_avg": self.get_buffer(f"mean_{i}").clone(),
                "exp_avg_sq": self.get_buffer(f"square_{i}").clone(),
            }
