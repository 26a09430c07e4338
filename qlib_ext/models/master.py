"""MASTER: market-guided attention over a stock's days and over the stocks of each day.

Li et al. (2024), "MASTER: Market-Guided Stock Transformer for Stock Price Forecasting",
AAAI; https://arxiv.org/abs/2312.15235. Differences: both attentions are scaled by the
root of the width of a head (the published code scales only that between stocks), and
stocks that did not trade on a day of the window are attended by nobody on it.

Glossary: t days of the panel, n instruments of the day, l look-back days, f features,
d hidden width, m numbers of the market's state, c scored days (1).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import nn
from torch.nn import functional

from data_handlers.arguments import Count, Positive, Share
from qlib_ext.dataset import Panel
from qlib_ext.losses import long_mse, over_days
from qlib_ext.models._base import Batch, Network, TorchModel

__all__ = ["MASTER", "MarketGate", "MasterNetwork"]


class MasterNetwork(Network):
    """Gate, temporal attention, attention between stocks, pooling, one number.

    Parameters
    ----------
    d_feat, d_market : int
        `f` and `m`; without `m` (0) there is no gate.
    d_model : int
        `d`.
    t_heads, s_heads : int
        Heads of the attention over days and over stocks.
    dropout : float
    beta : float
        Temperature of the gate.
    """

    def __init__(
        self,
        d_feat: int,
        d_market: int,
        d_model: int,
        t_heads: int,
        s_heads: int,
        dropout: float,
        beta: float,
    ) -> None:
        super().__init__()
        self.d_feat = d_feat
        self.encoder = _Window()
        self.gate = MarketGate(d_feat, d_market, beta) if d_market else None
        self.linear = nn.Linear(d_feat, d_model)
        self.over_days = AttentionBlock(d_model, t_heads, dropout)
        self.over_stocks = AttentionBlock(d_model, s_heads, dropout)
        self.pooling = nn.Linear(d_model, d_model, bias=False)
        self.last = nn.Linear(d_model, 1)

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Score [1, n] of the day from windows h [1, n, l * f]."""
        panel, day = batch.panel, int(batch.days[-1])
        x = h[0].unflatten(-1, (-1, self.d_feat))  # [n, l, f]
        if self.gate is not None:
            assert panel.market is not None
            x = self.gate(x, panel.market[day].to(x.device))
        x = self.linear(x)  # [n, l, d]
        x = x + positions(*x.shape[1:]).to(x)
        x = self.over_days(x)
        there = panel.present[max(0, day - x.shape[1] + 1) : day + 1][:, batch.stocks]
        x = self.over_stocks(x.transpose(0, 1), there.to(x.device))  # [l, n, d]
        # The last day asks how much each day of the window matters.
        x = self.pooling(x)
        weights = torch.softmax((x * x[-1]).sum(-1), dim=0)  # [l, n]
        x = (weights.unsqueeze(-1) * x).sum(0)  # [n, d]
        return {"score": self.last(x).squeeze(-1).unsqueeze(0)}


class _Window(nn.Module):
    """Hand the window on as one step: the stocks meet before it is summed up."""

    def forward(self, x: torch.Tensor, state=None):
        """Map x [l, n, f] to [1, n, l * f]."""
        return x.transpose(0, 1).flatten(1).unsqueeze(0), None


class MarketGate(nn.Module):
    """Weigh the features by the market: ``f softmax((W m + b) / beta)`` times x.

    Parameters
    ----------
    d_feat, d_market : int
    beta : float
    """

    def __init__(self, d_feat: int, d_market: int, beta: float) -> None:
        super().__init__()
        self.linear, self.beta = nn.Linear(d_market, d_feat), beta

    def forward(self, x: torch.Tensor, market: torch.Tensor) -> torch.Tensor:
        """Gated features x [..., f], by the state market [m]."""
        weights = torch.softmax(self.linear(market) / self.beta, dim=-1)
        return x * (len(weights) * weights)


class AttentionBlock(nn.Module):
    """Pre-norm attention and a feed-forward layer, each added to its normed input.

    Parameters
    ----------
    d_model, heads : int
    dropout : float
    """

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.norm, self.norm_ff = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_model, d_model),
            nn.Dropout(dropout),
        )

    def forward(
        self, x: torch.Tensor, there: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend along the middle axis of x [b, k, d].

        `there` [b, k] says who may be attended; where nobody is, all may be.
        """
        x = self.norm(x)
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=-2)
        mask = None
        if there is not None:
            there = there | ~there.any(1, keepdim=True)
            mask = there[:, None, None, :]  # [b, 1, 1, k]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        p = self.p if self.training else 0.0
        if mask is not None and 0 < p < 0.99 and x.device.type == "cpu":
            days = zip(q, k, v, mask, strict=True)
            mixed = torch.stack([_attend(*day, p) for day in days])
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, p)
        x = self.norm_ff(x + mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


def _attend(q, k, v, there, dropout: float) -> torch.Tensor:
    """Attend on one day, with dropout of the weights; q, k, v [heads, k, width].

    torch's own takes 2.7 times as long for eight days of 1,500 stocks: it holds the
    weights of all of them at once and draws four bytes for each, where one is enough.
    """
    w = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    w = torch.softmax(w.masked_fill(~there, -math.inf), dim=-1)
    words = -(-w.numel() // 4)
    drawn = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32)
    lost = round(256 * dropout)
    kept = drawn.view(torch.uint8)[: w.numel()].view_as(w) >= lost
    return (w * kept * (256 / (256 - lost))) @ v


def positions(steps: int, width: int) -> torch.Tensor:
    """Sinusoidal positions [steps, width]."""
    at = torch.arange(steps).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    out = torch.zeros(steps, width)
    out[:, 0::2] = torch.sin(at * rate)
    out[:, 1::2] = torch.cos(at * rate)[:, : width // 2]
    return out


class MASTER(TorchModel):
    """Market-guided stock transformer.

    Its features are weighed by the state of the market, which the handler's group
    `market` holds (option `market` of this package's handlers, or the processor
    `data_handlers.market_state.MarketState` in any other).

    Parameters
    ----------
    d_model : int, default 256
    t_heads, s_heads : int, default 4, 2
        Heads of the attention over days and over stocks; they must divide `d_model`.
    dropout : float, default 0.5
    beta : float, default 5.0
        Temperature of the gate: the smaller, the more it prefers some features. The
        paper has 5 for CSI 300 and 2 for CSI 800.
    gate : bool, default True
        False leaves the gate out, and needs no state.
    long_weight : float, default 1.0
        Weight in the loss of stocks above the day's 80 % quantile of the label, against
        1 for the others; see `qlib_ext.losses.long_side`.
    step_len : int, default 8
        Look-back `l` in trading days.
    d_feat, mode, chunk, day_stride, stock_parts, n_epochs, early_stop, stop_on, ema, \
best_epochs, tilt, tilt_styles, lr, clip_value, n_seeds, seed, label, GPU, amp, \
block_size, checkpoint_dir
        Of every model's training; see `TorchModel`.

    Raises
    ------
    ValueError
        On any argument out of range, naming it; in `fit`, if there is no group
        `market` for the gate.

    References
    ----------
    Li et al. (2024); docs/systems/adaptive.md.
    """

    def __init__(
        self,
        d_model: Count = 256,
        t_heads: Count = 4,
        s_heads: Count = 2,
        dropout: Share = 0.5,
        beta: Positive = 5.0,
        gate: bool = True,
        long_weight: Annotated[float, Ge(1)] = 1.0,
        step_len: Count = 8,
        **training: Any,
    ) -> None:
        super().__init__(step_len=step_len, **training)
        for name, heads in (("t_heads", t_heads), ("s_heads", s_heads)):
            if d_model % heads:
                raise ValueError(
                    f"`{name}` must divide `d_model`, {d_model}, got {heads}."
                )
        if self.stock_parts != 1:
            raise ValueError(
                f"`stock_parts` must be 1, got {self.stock_parts}: MASTER compares the "
                "stocks of a day with each other."
            )
        # Learnt: names of the market's state, in the order of the gate's inputs.
        self.market_names_: list[str] | None = None

    @property
    def streams(self) -> bool:
        """Attention over a window shares no pass between days."""
        return False

    def forget(self) -> None:
        """Drop what an earlier `fit` has learnt."""
        self.market_names_ = None

    def on_panel(self, panel: Panel) -> None:
        """Look for the market's state."""
        if not self.gate:
            return
        if panel.market is None:
            raise ValueError(
                "`gate` is true, but the data have no group `market`: give the handler "
                "`market: {}`, or set `gate: false`."
            )
        if self.market_names_ not in (None, panel.market_names):
            raise ValueError(
                f"the model was fitted with the market state {self.market_names_}, the "
                f"data has {panel.market_names}."
            )
        self.market_names_ = list(panel.market_names)

    def build_network(self, d_feat: int) -> MasterNetwork:
        """Make an untrained network for `d_feat` features a day."""
        return MasterNetwork(
            d_feat,
            len(self.market_names_ or ()),
            self.d_model,
            self.t_heads,
            self.s_heads,
            self.dropout,
            self.beta,
        )

    def loss(self, out, batch):
        """Mean over the batch's days of the squared error, the long side weighted."""
        label = batch.label[..., batch.panel.label_index(self.label)]
        error, counted = long_mse(out["score"], label, batch.mask, self.long_weight)
        mse = over_days(error, counted)
        return mse, {"mse": mse.detach()}
