"""Multi-factor RNN: a recurrent network that mines one or K low-correlated factors.

Orient Securities, factor series 91 (2023-06). Differences, where the
report leaves a choice: batch normalisation has no affine part (with one, the network
could evade the penalty by shrinking its units) and uses the day's own statistics in
prediction too.

Glossary: t days, n instruments of the day, l look-back days, f features, c scored days,
d hidden width, k factor units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import torch
from qlib.data.dataset import DatasetH
from torch import nn

from data_handlers.arguments import Count, NonNegative, Share, check_whole
from qlib_ext.dataset import Panel
from qlib_ext.losses import day_mse, orthogonality, over_days
from qlib_ext.models._base import Batch, Network, TorchModel
from qlib_ext.nn.attributes import DayAttributes
from qlib_ext.nn.cross_section import standardize

__all__ = ["FactorRNN", "MultiFactorRNN", "RNNEncoder", "same_names"]


class FactorRNN(Network):
    """Recurrent encoder, then K linear units a stock and their mean.

    Parameters
    ----------
    d_feat, hidden_size, num_layers : int
    dropout : float
    n_factors : int
        Units `k`.
    rnn : {"GRU", "LSTM"}
    categories, embedding_size
        See `RNNEncoder`.
    attributes : float32 Tensor [t, n, q], optional
        Standardised attributes of the panel at hand, NaN unknown; no parameter. They
        join the encoder's state before the units.
    """

    def __init__(
        self,
        d_feat: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        n_factors: int,
        rnn: str,
        categories: Sequence[tuple[int, int]] = (),
        embedding_size: int = 4,
        attributes: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoder = RNNEncoder(
            d_feat, hidden_size, num_layers, dropout, rnn, categories, embedding_size
        )
        self._end_with(hidden_size, n_factors, attributes)

    def _end_with(
        self, width: int, n_factors: int, attributes: torch.Tensor | None
    ) -> None:
        """Make what stands behind the encoder's `width` outputs."""
        self.attributes = attributes
        if attributes is not None:
            self.financial = DayAttributes(attributes.shape[2])
            width += self.financial.width
        self.linear = nn.Linear(width, n_factors)

    def beside(self, batch: Batch) -> list[torch.Tensor]:
        """Give the outputs [c, n, width] of the attributes' block as a list, or []."""
        if self.attributes is None:
            return []
        values = self.attributes[batch.days][:, batch.stocks]
        return [self.financial(values.to(batch.mask.device))]

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Units [c, n, k] standardised over the day, and the score [c, n]."""
        if self.attributes is not None:
            h = torch.cat([h.float(), *self.beside(batch)], dim=-1)
        h = self.linear(h)  # [c, n, k]
        z = standardize(h.float(), batch.mask)
        c = z.mean(-1, keepdim=True)  # [c, n, 1]
        score = standardize(c, batch.mask).squeeze(-1)  # [c, n]
        return {"score": score, "units": z}


class RNNEncoder(nn.Module):
    """GRU or LSTM with dropout between the layers and after the last.

    Parameters
    ----------
    d_feat, hidden_size, num_layers, dropout, rnn
        As in `MultiFactorRNN`.
    categories : sequence of (int, int)
        Position among the features, and number of codes, of each feature that is a
        code of a state; it is replaced by a learnt vector, code 0 by zeros.
    embedding_size : int
        Length of these vectors.
    """

    def __init__(
        self,
        d_feat: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        rnn: str,
        categories: Sequence[tuple[int, int]] = (),
        embedding_size: int = 4,
    ) -> None:
        super().__init__()
        between = dropout if num_layers > 1 else 0.0
        cell = nn.GRU if rnn == "GRU" else nn.LSTM
        self.coded = [at for at, _ in categories]
        self.numbers = [at for at in range(d_feat) if at not in self.coded]
        width = len(self.numbers) + embedding_size * len(self.coded)
        self.rnn = cell(width, hidden_size, num_layers, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.embeddings = nn.ModuleList(
            nn.Embedding(count + 1, embedding_size, padding_idx=0)
            for _, count in categories
        )

    def forward(self, x: torch.Tensor, state=None):
        """Map x [l, n, f] to (h [l, n, d], state after the last day)."""
        if self.coded:
            vectors = [
                embed(x[..., at].long())
                for embed, at in zip(self.embeddings, self.coded, strict=True)
            ]
            x = torch.cat([x[..., self.numbers], *vectors], dim=-1)
        h, state = self.rnn(x, state)
        return self.dropout(h), state


class MultiFactorRNN(TorchModel):
    """Mine one factor, or K factors of low mutual correlation, with a GRU.

    The score of a day is the standardised mean of the units; the units themselves come
    from `predict_units`. Loss of a day with N stocks, over which z and c are
    standardised: ``mean (c_i - y_i)^2 + lamb / (N K^2) ||Z'Z||_F``, the second term
    only if K > 1.

    Parameters
    ----------
    hidden_size, num_layers : int, default 64, 2
    dropout : float, default 0.1
    n_factors : int, default 64
        Units K; 1 is the single-factor model.
    lamb : float, default 10.0
        Weight of the correlation penalty.
    rnn : {"GRU", "LSTM"}, default "GRU"
    categories : dict of str to int, optional
        Features that are codes 1, 2, … of a state (0 unknown), and how many codes each
        has; they are embedded. See `TECHNICAL_STATES` and `FLOW_STATES` of the
        handlers. The handler must leave them unstandardised.
    embedding_size : int, default 4
        Length of the vector that stands for a code.
    attributes : bool, default False
        Whether the handler's column group `attribute` joins before the units, by its
        values of the day alone; see `qlib_ext.nn.attributes`.
    d_feat, step_len, mode, chunk, day_stride, n_epochs, early_stop, lr, clip_value, \
n_seeds, seed, label, GPU, amp, block_size, checkpoint_dir
        Of every model's training; see `TorchModel`.

    Raises
    ------
    ValueError
        On any argument out of range, naming it.

    References
    ----------
    Orient Securities, factor series 91 (2023-06); docs/systems/rnn.md.
    """

    def __init__(
        self,
        hidden_size: Count = 64,
        num_layers: Count = 2,
        dropout: Share = 0.1,
        n_factors: Count = 64,
        lamb: NonNegative = 10.0,
        rnn: Literal["GRU", "LSTM"] = "GRU",
        categories: dict | None = None,
        embedding_size: Count = 4,
        attributes: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if not isinstance(categories or {}, dict):
            raise ValueError(
                "`categories` must map feature names to their number of codes, got "
                f"{categories!r}."
            )
        for name, count in (categories or {}).items():
            check_whole(f"categories.{name}", count, 1)
        self.categories = dict(categories or {})
        # Learnt: position and number of codes of each.
        self.category_at_: list[tuple[int, int]] = []
        self.attribute_names_: list[str] | None = None

    # What belongs to a panel is rebuilt from it and not pickled.
    _attributes: torch.Tensor | None = None

    def forget(self) -> None:
        """Drop what an earlier `fit` has learnt."""
        self.attribute_names_ = None

    def on_panel(self, panel: Panel) -> None:
        """Take the attributes, and find and check the categories' codes."""
        self._attributes = None
        if self.attributes:
            if panel.attributes is None:
                raise ValueError(
                    "`attributes` is true, but the handler has no column group "
                    "`attribute`: use one that has, such as ConvertibleHandler."
                )
            names = same_names(
                "attribute", self.attribute_names_, panel.attribute_names
            )
            self.attribute_names_ = names
            self._attributes = panel.attributes
        if not self.categories:
            return
        if self._flat(panel):
            raise ValueError(
                "`categories` need features of one day; this data's rows are windows."
            )
        found = []
        for name, count in self.categories.items():
            if name not in panel.feature_names:
                raise ValueError(
                    f"`categories` names {name!r}; the data has {panel.feature_names}."
                )
            at = panel.feature_names.index(name)
            codes = panel.features[..., at]
            if codes.min() < 0 or codes.max() > count or (codes != codes.round()).any():
                raise ValueError(
                    f"feature {name!r} must hold codes 0 to {count}, got values from "
                    f"{float(codes.min()):g} to {float(codes.max()):g}: correct its "
                    "number in `categories`, and keep the handler from standardising "
                    "it (`categories` there, `exclude` of RobustClipZScore)."
                )
            found.append((at, count))
        self.category_at_ = found

    @property
    def reads_features_only(self) -> bool:
        """Whether a score needs nothing but the features of its own stock and day's."""
        return not self.attributes

    def build_network(self, d_feat: int) -> FactorRNN:
        """Make an untrained network for `d_feat` features a day."""
        return FactorRNN(
            d_feat,
            self.hidden_size,
            self.num_layers,
            self.dropout,
            self.n_factors,
            self.rnn,
            self.category_at_,
            self.embedding_size,
            self._attributes,
        )

    def loss(self, out, batch):
        """Mean over the batch's days of the error and the correlation penalty."""
        label = batch.label[..., batch.panel.label_index(self.label)]
        error, counted = day_mse(out["score"], label, batch.mask)
        mse = over_days(error, counted)
        if self.n_factors == 1:
            return mse, {"mse": mse.detach()}
        penalty = over_days(orthogonality(out["units"], batch.mask), counted)
        loss = mse + self.lamb * penalty
        return loss, {"mse": mse.detach(), "penalty": penalty.detach()}

    def predict_units(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.DataFrame:
        """Return the factor units of a segment.

        Returns
        -------
        DataFrame
            Rows (datetime, instrument), columns `unit_00`, `unit_01`, …, standardised
            over the day; with several seeds `seed0_unit_00`, …: units of different
            seeds have nothing to do with each other, so they are not averaged.
        """
        out, panel, days = self.infer(dataset, segment, ("units",))
        width = max(2, len(str(self.n_factors - 1)))
        names = [f"unit_{k:0{width}d}" for k in range(self.n_factors)]
        if len(out) > 1:
            names = [f"seed{self.seed + s}_{u}" for s in range(len(out)) for u in names]
        units = torch.cat([o["units"] for o in out], dim=-1)
        return panel.series(units, days, names)


def same_names(what: str, fitted: list[str] | None, found: list[str]) -> list[str]:
    """Return the names of what joins the network, which must be those of the fit.

    Raises
    ------
    ValueError
        If they are others.
    """
    if fitted is not None and fitted != found:
        raise ValueError(
            f"the model was fitted with {what}s {fitted}, the data has {found}."
        )
    return found
