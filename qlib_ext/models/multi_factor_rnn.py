"""Multi-factor RNN: a recurrent network that mines one or K low-correlated factors.

Orient Securities, factor series 91 (2023-06). Differences, where the
report leaves a choice: batch normalisation has no affine part (with one, the network
could evade the penalty by shrinking its units) and uses the day's own statistics in
prediction too.

Glossary: t days, n instruments of the day, l look-back days, f features, c scored days,
d hidden width, k factor units.
"""

from __future__ import annotations

import weakref
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from qlib.data.dataset import DatasetH
from torch import nn

from data_handlers.arguments import Count, NonNegative, Share, Whole, check_whole
from data_handlers.risk import RISK_HINT
from qlib_ext.dataset import Panel
from qlib_ext.losses import long_mse, orthogonality, over_days
from qlib_ext.models._base import Batch, Network, TorchModel, logger
from qlib_ext.nn.attributes import DayAttributes
from qlib_ext.nn.cross_section import standardize
from qlib_ext.nn.recurrent import ENCODERS, Encoder, RNNEncoder

__all__ = ["FactorRNN", "MultiFactorRNN", "RNNEncoder", "same_names"]


class FactorRNN(Network):
    """Recurrent encoder, then K linear units a stock and their mean.

    Parameters
    ----------
    encoder : Encoder
    n_factors : int
        Units `k`.
    head_size : int, default 0
        Width of a fully connected layer before the units; 0 is none.
    attributes : float32 Tensor [t, n, q], optional
        Standardised attributes of the panel at hand, NaN unknown; no parameter. They
        join the encoder's state before the units.
    """

    def __init__(
        self,
        encoder: Encoder,
        n_factors: int,
        head_size: int = 0,
        attributes: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self._end_with(encoder.width, n_factors, head_size, attributes)

    def _end_with(
        self,
        width: int,
        n_factors: int,
        head_size: int,
        attributes: torch.Tensor | None,
    ) -> None:
        """Make what stands behind the encoder's `width` outputs."""
        self.attributes = attributes
        if attributes is not None:
            self.financial = DayAttributes(attributes.shape[2])
            width += self.financial.width
        if not head_size:
            self.linear: nn.Module = nn.Linear(width, n_factors)
            return
        hidden = nn.Linear(width, head_size)
        self.linear = nn.Sequential(hidden, nn.ELU(), nn.Linear(head_size, n_factors))

    def beside(self, batch: Batch) -> list[torch.Tensor]:
        """Give the outputs [c, n, width] of the attributes' block as a list, or []."""
        if self.attributes is None:
            return []
        return [self.financial(batch.of(self.attributes))]

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Units [c, n, k] standardised over the day, and the score [c, n]."""
        if self.attributes is not None:
            h = torch.cat([h.float(), *self.beside(batch)], dim=-1)
        h = self.linear(h)  # [c, n, k]
        z = standardize(h.float(), batch.mask)
        c = z.mean(-1, keepdim=True)  # [c, n, 1]
        score = standardize(c, batch.mask).squeeze(-1)  # [c, n]
        return {"score": score, "units": z}


class MultiFactorRNN(TorchModel):
    """Mine one factor, or K factors of low mutual correlation, with a recurrent net.

    The score of a day is the standardised mean of the units; the units themselves come
    from `predict_units`. Loss of a day with N stocks, over which z and c are
    standardised: ``mean (c_i - y_i)^2 + lamb / (N K^2) ||Z'Z||_F``, the second term
    only if K > 1.

    Parameters
    ----------
    hidden_size, num_layers : int, default 64, 2
    dropout : float, optional
        Default 0.1 for one unit, 0 for several: the noise of dropout differs from unit
        to unit and is gone in prediction, so that units trained with it look apart to
        the correlation penalty and are alike when used (docs/results.md).
    n_factors : int, default 64
        Units K; 1 is the single-factor model.
    lamb : float, default 10.0
        Weight of the correlation penalty.
    rnn : {"GRU", "LSTM", "AGRU", "ALSTM", "ResidualAttentionLSTM", "DecompGRU"}, \
default "GRU"
        Encoder; see docs/systems/recurrent.md. The three with attention read a whole
        window, so that `mode` is "windows".
    bidirectional : bool, default False
        Whether AGRU reads the window in both directions; each day in it is known at t.
    head_size : int, default 0
        Width of a fully connected layer between encoder and units: 10 for the reports'
        "GRU(50,2)+NN(10)". 0 is none.
    size_groups : int, default 20
        Of DecompGRU: groups by market cap, from `log_mcap` of the risk group, within
        whose stocks of the day layers beyond the first compare. 0: every stock by
        itself. Without effect on the other encoders.
    every : int, default 1
        Days a step: of a window the last day and every `every`-th before it are read.
        5 with features of five days is a window of weeks.
    parts : int, default 1
        Steps a day. The features are then those of each part of the day, feature by
        feature and the first part first, as `IntradayHandler` makes them.
    categories : dict of str to int, optional
        Features that are codes 1, 2, … of a state (0 unknown), and how many codes each
        has; they are embedded. See `TECHNICAL_STATES` and `FLOW_STATES` of the
        handlers. The handler must leave them unstandardised.
    embedding_size : int, default 4
        Length of the vector that stands for a code.
    long_weight : float, default 1.0
        Weight in the loss of stocks above the day's 80 % quantile of the label, against
        1 for the others: what a long-only user holds; see `qlib_ext.losses.long_side`.
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
        dropout: Share | None = None,
        n_factors: Count = 64,
        lamb: NonNegative = 10.0,
        rnn: Literal[
            "GRU", "LSTM", "AGRU", "ALSTM", "ResidualAttentionLSTM", "DecompGRU"
        ] = "GRU",
        categories: dict | None = None,
        embedding_size: Count = 4,
        attributes: bool = False,
        bidirectional: bool = False,
        head_size: Whole = 0,
        size_groups: Whole = 20,
        every: Count = 1,
        parts: Count = 1,
        long_weight: Annotated[float, Ge(1)] = 1.0,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if dropout is None:
            self.dropout = 0.1 if n_factors == 1 else 0.0
        elif dropout > 0 and n_factors > 1:
            logger.warning(
                f"`dropout` is {dropout:g}: {n_factors} units can look apart by its "
                "noise in training and be alike in use. 0 lets `lamb` act."
            )
        for name, count in (categories or {}).items():
            check_whole(f"categories.{name}", count, 1)
        if bidirectional and rnn != "AGRU":
            raise ValueError(
                f"`bidirectional` needs `rnn: AGRU`, got {rnn!r}: read backwards, the "
                "last day's output of the others has seen that day only."
            )
        if self.step_len < every:
            raise ValueError(
                f"`step_len` {self.step_len} is shorter than a step of `every` {every} "
                "days: lengthen the window."
            )
        if self._compares and (self.block_size or self.stock_parts != 1):
            name = "block_size" if self.block_size else "stock_parts"
            raise ValueError(
                f"`{name}` is {getattr(self, name)}, but DecompGRU compares all stocks "
                "of a day: leave it out, or set `size_groups` to 0."
            )
        if parts > 1 and (categories or self._compares):
            other = "categories" if categories else "size_groups"
            raise ValueError(
                f"`parts` {parts} and `{other}` exclude each other: leave one out "
                "(`size_groups: 0`)."
            )
        self.categories = dict(categories or {})
        # Learnt: position and number of codes of each.
        self.category_at_: list[tuple[int, int]] = []
        self.attribute_names_: list[str] | None = None

    # Of models recorded before these arguments were there.
    attributes, bidirectional, head_size, size_groups = False, False, 0, 20
    every, parts, long_weight = 1, 1, 1.0

    # What belongs to a panel is rebuilt from it and not pickled.
    _attributes: torch.Tensor | None = None
    _groups: torch.Tensor | None = None
    _groups_of: Any = None

    def forget(self) -> None:
        """Drop what an earlier `fit` has learnt."""
        self.attribute_names_ = None

    @property
    def _compares(self) -> bool:
        """Whether the encoder looks across the day's stocks."""
        return self.rnn == "DecompGRU" and self.num_layers > 1 and self.size_groups > 0

    @property
    def streams(self) -> bool:
        """Whether the encoder gives every day of a run in one pass."""
        return ENCODERS[self.rnn].streams and self.every == 1

    def on_panel(self, panel: Panel) -> None:
        """Check steps, take attributes and size groups, find the categories."""
        if self.step_len_ < self.every:
            raise ValueError(
                f"windows of {self.step_len_} days are shorter than a step of `every` "
                f"{self.every} days: lengthen them."
            )
        if self._width(panel) % self.parts:
            raise ValueError(
                f"`parts` is {self.parts}, but the data has {self._width(panel)} "
                "features a day, which is no multiple of it."
            )
        if self._compares and (self._groups is None or self._groups_of() is not panel):
            if self._flat(panel):
                raise ValueError(
                    "`size_groups` need features of one day; this data's rows are "
                    "windows. Set it to 0."
                )
            self._groups = size_groups(panel, self.size_groups)
            self._groups_of = weakref.ref(panel)
        self._attributes = None
        if self.attributes:
            if panel.attributes is None:
                raise ValueError(
                    "`attributes` is true, but the handler has no column group "
                    "`attribute`: give it a source of `attributes`, or use one that "
                    "has, such as ConvertibleHandler."
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
        return not (self.attributes or self._compares)

    def day_inputs(self, panel: Panel, days: slice) -> torch.Tensor | None:
        """Size groups [l, n, 1], if the encoder compares within them."""
        if not self._compares:
            return None
        assert self._groups is not None  # by on_panel
        return self._groups[days]

    def build_encoder(self, d_feat: int) -> Encoder:
        """Make an untrained encoder for `d_feat` features a day."""
        return ENCODERS[self.rnn](
            d_feat,
            self.hidden_size,
            self.num_layers,
            self.dropout,
            self.rnn,
            self.category_at_,
            self.embedding_size,
            self.every,
            self.parts,
            bidirectional=self.bidirectional,
            size_groups=self.size_groups,
        )

    def build_network(self, d_feat: int) -> FactorRNN:
        """Make an untrained network for `d_feat` features a day."""
        return FactorRNN(
            self.build_encoder(d_feat), self.n_factors, self.head_size, self._attributes
        )

    def loss(self, out, batch):
        """Mean over the batch's days of the error and the correlation penalty."""
        label = batch.label[..., batch.panel.label_index(self.label)]
        error, counted = long_mse(out["score"], label, batch.mask, self.long_weight)
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
        return self._unit_frame(*self.infer(dataset, segment, ("units",)))

    def predict_units_and_parts(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Give `predict_units` and `predict_parts` of one pass through the network."""
        inferred = self.infer(dataset, segment, ("units", "score"))
        return self._unit_frame(*inferred), self._part_frame(*inferred)

    def _unit_frame(self, out, panel, days) -> pd.DataFrame:
        width = max(2, len(str(self.n_factors - 1)))
        names = [f"unit_{k:0{width}d}" for k in range(self.n_factors)]
        if len(out) > 1:
            names = [f"seed{self.seed + s}_{u}" for s in range(len(out)) for u in names]
        made = [o.pop("units") for o in out]
        units = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
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


def size_groups(panel: Panel, count: int) -> torch.Tensor:
    """Divide each day's stocks into groups of equal number by market cap.

    Returns
    -------
    float32 Tensor [t, n, 1]
        1, the smallest stocks, to `count`; `count` + 1 where the size is unknown, 0
        where the stock is absent.

    Raises
    ------
    ValueError
        If the risk group has no `log_mcap`.
    """
    size = panel.risk_column("log_mcap")
    if size is None:
        raise ValueError(
            f"`size_groups` {count} need `log_mcap` in the risk group, which has "
            f"{panel.risk_names}: add a market cap to the store, or set "
            f"`size_groups` to 0. {RISK_HINT}"
        )
    here = panel.present.numpy()
    known = here & np.isfinite(size)
    order = np.argsort(np.where(known, size, np.inf), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    total = np.maximum(known.sum(axis=1, keepdims=True), 1)
    group = np.where(known, 1 + rank * count // total, count + 1)
    return torch.from_numpy(np.where(here, group, 0)[..., None].astype(np.float32))
