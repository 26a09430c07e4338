"""DualChannel: daily bars and the minute bars of the last day, for timing.

Guotai Junan Futures, treasury-bond futures timing: LSTM or GRU on 20 daily bars and on
the previous day's minute bars, fused to the direction of the next day. Differences: the
two networks are joined by one linear unit; both are trained together.

A single instrument has no cross-section, so nothing is standardised over the day: the
score of a day is the network's own number, above 0 for long.

Glossary: n instruments, l look-back days, f features, c scored days of a batch, b bars
of a day, w features of a bar, d hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from data_handlers.arguments import Count, Share
from qlib_ext.dataset import Panel
from qlib_ext.models._base import Batch, Network, TorchModel
from qlib_ext.nn.cross_section import standardize
from qlib_ext.nn.recurrent import RNNEncoder

__all__ = ["DualChannel", "DualChannelNetwork", "WindowEncoder"]

# Columns of a day's bars, as `qlib-ext build bars` names them: bar_00_return, ...
_BAR = re.compile(r"bar_(\d+)_(\w+)")


class DualChannelNetwork(Network):
    """Last state of the day channel, last state of the minute channel, one unit.

    Parameters
    ----------
    day_at : sequence of int
        Positions of the day channel among the features.
    bars_at : int Tensor [b, w] or None
        Positions of each bar's features; None leaves the minute channel out.
    step_len, hidden_size, num_layers, dropout, rnn, compares
        As in `DualChannel`.
    """

    def __init__(
        self,
        day_at: Sequence[int],
        bars_at: torch.Tensor | None,
        step_len: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        rnn: str,
        compares: str,
    ) -> None:
        super().__init__()

        def channel(width: int) -> RNNEncoder:
            return RNNEncoder(width, hidden_size, num_layers, dropout, rnn)

        self.compares = compares
        self.bars_at = bars_at
        self.encoder = WindowEncoder(channel(len(day_at)), day_at, step_len)
        channels = 1
        if bars_at is not None:
            self.minute = channel(bars_at.shape[1])
            channels = 2
        self.linear = nn.Linear(channels * hidden_size, 1)

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Score [c, n] from the day channel's h [c, n, d] and the day's own bars."""
        if self.bars_at is not None:
            features = batch.panel.features[batch.days][:, batch.stocks]  # [c, n, f]
            bars = features[..., self.bars_at].to(h.device)  # [c, n, b, w]
            c, n, b, w = bars.shape
            read, _ = self.minute(bars.reshape(c * n, b, w).transpose(0, 1))
            h = torch.cat([h, read[-1].view(c, n, -1).to(h.dtype)], dim=-1)
        score = self.linear(h).float()  # [c, n, 1]
        if self.compares == "day":
            score = standardize(score, batch.mask)
        return {"score": torch.where(batch.mask, score.squeeze(-1), 0.0)}


class WindowEncoder(nn.Module):
    """An encoder that forgets what is older than its window.

    Each day's state is that of a sequence of `step_len` days from a zero state, in
    training and in a stream alike; days before the panel are zeros, the mean.

    Parameters
    ----------
    encoder : Module
        Maps [l, n, f] to ([l, n, d], state).
    columns : sequence of int
        Features that it reads.
    step_len : int
        Look-back `l`.
    """

    def __init__(
        self, encoder: nn.Module, columns: Sequence[int], step_len: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.columns = list(columns)
        self.step_len = step_len

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None):
        """Map x [t, n, f] to (h [t, n, d], the last l - 1 days)."""
        t, n, _ = x.shape
        x = x[..., self.columns]
        if state is None:
            state = x.new_zeros(self.step_len - 1, n, x.shape[-1])
        x = torch.cat([state, x])
        windows = x.unfold(0, self.step_len, 1)  # [t, n, f, l]
        windows = windows.permute(3, 0, 1, 2).reshape(self.step_len, t * n, -1)
        h, _ = self.encoder(windows)
        return h[-1].view(t, n, -1), x[len(x) - self.step_len + 1 :]


class DualChannel(TorchModel):
    """Time one or a few instruments from daily bars and the last day's minute bars.

    The minute channel reads the columns ``bar_<number>_<feature>`` of the scored day,
    which are complete at its close; the day channel all others. In `stream` mode a
    batch is `chunk` consecutive days, each with its own window of `step_len` days.

    Parameters
    ----------
    hidden_size, num_layers : int, default 16, 1
    dropout : float, default 0.1
    rnn : {"LSTM", "GRU", "RNN"}, default "LSTM"
        Of both channels.
    channels : {"dual", "day"}, default "dual"
        "day" leaves the minute bars out.
    target : {"sign", "return"}, default "sign"
        "sign" learns the direction: the score is the log odds of a rise, the loss
        logistic. "return" learns the label itself by its squared error; its scale
        should be about 1, which `FuturesHandler` sees to.
    compares : {"time", "day"}, default "time"
        What a score compares with: the same instrument's on other days, or the other
        instruments' on its day. "day" standardises over the day, as the models of stock
        selection do, and makes nothing of a single instrument.
    d_feat, step_len, mode, chunk, day_stride, n_epochs, early_stop, lr, clip_value, \
n_seeds, seed, label, GPU, amp, block_size, checkpoint_dir
        Of every model's training; see `TorchModel`. `step_len` is 20 by default.

    Raises
    ------
    ValueError
        On any argument out of range, or bars that are missing or not the same features
        each.

    References
    ----------
    Guotai Junan Futures, treasury-bond futures timing; docs/systems/treasury.md.
    """

    def __init__(
        self,
        hidden_size: Count = 16,
        num_layers: Count = 1,
        dropout: Share = 0.1,
        rnn: Literal["LSTM", "GRU", "RNN"] = "LSTM",
        channels: Literal["dual", "day"] = "dual",
        target: Literal["sign", "return"] = "sign",
        compares: Literal["time", "day"] = "time",
        step_len: Count = 20,
        **training: Any,
    ) -> None:
        super().__init__(step_len=step_len, **training)
        # Learnt: where the two channels lie among the features.
        self.day_at_: list[int] = []
        self.bars_at_: list[list[int]] = []

    @property
    def reads_features_only(self) -> bool:
        """Whether a score needs nothing but the features of its own stock and day's."""
        return True

    def on_panel(self, panel: Panel) -> None:
        """Find the two channels among the features."""
        if self._flat(panel):
            self.day_at_, self.bars_at_ = list(range(self.d_feat or 0)), []
            found = False
        else:
            self.day_at_, self.bars_at_ = _channels(panel.feature_names)
            found = bool(self.bars_at_)
        if self.channels == "dual" and not found:
            raise ValueError(
                "the data has no minute bars, columns such as `bar_00_return`: build "
                "them with `qlib-ext build bars` and read them by `FuturesHandler`, or "
                "set `channels: day`."
            )
        if not self.day_at_:
            raise ValueError(
                f"the data has minute bars only; the day channel needs other features: "
                f"{panel.feature_names[:3]}, …"
            )

    def build_network(self, d_feat: int) -> DualChannelNetwork:
        """Make an untrained network."""
        dual = self.channels == "dual"
        return DualChannelNetwork(
            self.day_at_,
            torch.tensor(self.bars_at_) if dual else None,
            self.step_len_ or self.step_len,
            self.hidden_size,
            self.num_layers,
            self.dropout,
            self.rnn,
            self.compares,
        )

    def loss(self, out, batch):
        """Mean over the batch's labelled days and instruments."""
        label = batch.label[..., batch.panel.label_index(self.label)]
        known = batch.mask & torch.isfinite(label)
        y = torch.where(known, label, 0.0)
        if self.target == "sign":
            # No move at all is half a rise.
            each = F.binary_cross_entropy_with_logits(
                out["score"], (torch.sign(y) + 1) / 2, reduction="none"
            )
        else:
            each = (out["score"] - y).square()
        loss = (each * known).sum() / known.sum().clamp_min(1)
        return loss, {self.target: loss.detach()}


def _channels(names: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Positions of the day features, and of the features of each bar in order."""
    days: list[int] = []
    bars: dict[int, dict[str, int]] = {}
    for at, name in enumerate(names):
        match = _BAR.fullmatch(name)
        if match is None:
            days.append(at)
        else:
            bars.setdefault(int(match[1]), {})[match[2]] = at
    if sorted(bars) != list(range(len(bars))):
        raise ValueError(
            f"the bars of a day must be numbered from 0 on, got {sorted(bars)}."
        )
    features = [sorted(of) for of in bars.values()]
    if any(of != features[0] for of in features):
        raise ValueError(
            f"every bar needs the same features; bar 0 has {features[0]}, another "
            f"{next(of for of in features if of != features[0])}."
        )
    return days, [[bars[k][what] for what in features[0]] for k in sorted(bars)]
