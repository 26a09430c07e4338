"""Mamba: a risk-neutral alpha and a nonlinear risk factor, learnt together.

Northeast Securities, machine learning series 9 (2025-05). A selective
state-space encoder reads each stock's own history and gives the alpha. A graph network
reads the linear risk factors of a stock and its neighbours and gives the risk factor.
The loss of a day is::

    MSE(alpha, y1) + MSE(risk, y2) + penalty / (d_R + 1) · sum_i rho(alpha, R_i)^2

y1 is the industry-neutral return, y2 the industry- and style-neutral one, R the d_R
linear factors and the learnt one, rho the day's cross-sectional correlation.

`[gap]` What the report leaves open: alpha and risk are standardised over the day before
they enter the loss, and so are the labels; no gradient reaches the risk factor through
the penalty (`penalty_through_risk` lets it); a stock whose exposures are unknown forms
a group of its own when labels are neutralised; the graph network is one hidden layer
wide on each side of one convolution; of a stock's correlations above 0.7 the 30 highest
are edges; the epoch kept is, for every task, that of the best validation RankIC against
the raw return.

Glossary: t days, n instruments, l look-back days, f features, c scored days, d hidden
width, r relations, k linear risk factors (the report's d_R).
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset import DatasetH
from qlib.log import get_module_logger
from torch import nn

from data_handlers.arguments import Count, NonNegative, Share
from data_handlers.cross_section import neutralize
from data_handlers.risk import RAW_RISK, RISK_HINT, STYLES
from qlib_ext.dataset import Panel
from qlib_ext.graphs import EdgeSeries, make_graphs
from qlib_ext.losses import day_mse, exposure_penalty, over_days
from qlib_ext.models._base import Batch, Network, TorchModel
from qlib_ext.nn.cross_section import standardize
from qlib_ext.nn.graph_attention import RelationalConv
from qlib_ext.nn.mamba import MambaEncoder

__all__ = ["DualNetwork", "Mamba", "RiskNetwork", "neutral_labels"]

logger = get_module_logger("qlib_ext.models")

TASKS = ("alpha_raw", "alpha_neutral", "dual")


class DualNetwork(Network):
    """Mamba encoder with a linear score, and beside it the risk factor's network.

    Parameters
    ----------
    encoder : MambaEncoder
    d_model : int
        Width of its output.
    risk : RiskNetwork or None
        None: the score alone.
    """

    def __init__(
        self, encoder: MambaEncoder, d_model: int, risk: RiskNetwork | None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(d_model, 1)
        self.risk = risk

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Score [c, n] and risk factor [c, n], each standardised over the day."""
        alpha = self.linear(h).float()  # [c, n, 1]
        out = {"score": standardize(alpha, batch.mask).squeeze(-1)}
        if self.risk is not None:
            risk = self.risk(batch).float()  # [c, n, 1]
            out["risk"] = standardize(risk, batch.mask).squeeze(-1)
        return out


class RiskNetwork(nn.Module):
    """Risk factor from the linear exposures of a stock and of its neighbours.

    Parameters
    ----------
    columns : list of int
        Where the k linear factors lie in the risk group.
    width : int
    graphs : list of r EdgeSeries
        Of the panel at hand; no parameter. Empty: own exposures alone.
    dropout : float
    """

    def __init__(
        self, columns: list[int], width: int, graphs: list[EdgeSeries], dropout: float
    ) -> None:
        super().__init__()
        self.columns, self.graphs = columns, graphs
        # Exposures, and which of them are known.
        self.embed = nn.Linear(2 * len(columns), width)
        self.mix = (
            RelationalConv(width, width, len(graphs))
            if graphs
            else nn.Linear(width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Map the batch's exposures [c, n, k] to [c, n, 1]."""
        assert batch.risk is not None
        factors = batch.risk[..., self.columns]  # [c, n, k]
        known = torch.isfinite(factors) & batch.mask.unsqueeze(-1)
        both = torch.cat([torch.where(known, factors, 0.0), known.float()], dim=-1)
        h = nn.functional.elu(self.embed(both))  # [c, n, d]
        if self.graphs:
            near = batch.neighbors(self.graphs, self_loops=False)
            mixed = self.mix(h, near)  # [c, n, d]
        else:
            mixed = self.mix(h)
        return self.linear(self.dropout(nn.functional.elu(mixed) + h))


class Mamba(TorchModel):
    """Learn a risk-neutral alpha with a selective state-space model.

    Parameters
    ----------
    task : {"dual", "alpha_neutral", "alpha_raw"}, optional
        Default "dual", or "alpha_raw" where the data has no risk group, as with Qlib's
        Alpha158; the log says so.
        "alpha_raw": the score alone, against the raw return. "alpha_neutral": against
        the industry-neutral return. "dual": that, the risk factor against the
        style-neutral return, and the penalty. All are made from the raw label and the
        risk group and standardised over the day; the handler's own learn processors
        play no part.
    penalty : float, default 1.0
        Weight of the squared correlations between score and risk factors; `dual` only.
    penalty_through_risk : bool, default False
        Whether the penalty also moves the learnt risk factor.
    graphs : list, optional
        Relations of the risk network, as `GRUGAT` takes them. Default: industry and
        correlation (30 days, above 0.7). Empty: none.
    d_model, num_layers, d_state, d_conv, expand : int, default 32, 1, 16, 4, 2
        See `MambaEncoder`. `d_model` is the risk network's width too.
    dt_rank : int, optional
        Default `d_model` / 16.
    discretisation : {"zoh", "euler"}, default "zoh"
    dropout : float, default 0.1
    label : str, optional
        Label column: "RET10" makes Mamba-10, "RET5" Mamba-5; by default the first.
    d_feat, step_len, mode, chunk, day_stride, n_epochs, early_stop, lr, clip_value, \
n_seeds, seed, GPU, amp, block_size, checkpoint_dir
        See `TorchModel`.

    Raises
    ------
    ValueError
        On any argument out of range, or a risk group that lacks what the task needs.

    References
    ----------
    Northeast Securities, machine learning series 9; docs/systems/mamba_moe.md.
    """

    def __init__(
        self,
        task: Literal["alpha_raw", "alpha_neutral", "dual"] | None = None,
        penalty: NonNegative = 1.0,
        penalty_through_risk: bool = False,
        graphs: list | None = None,
        d_model: Count = 32,
        num_layers: Count = 1,
        d_state: Count = 16,
        d_conv: Count = 4,
        expand: Count = 2,
        dt_rank: Count | None = None,
        discretisation: Literal["zoh", "euler"] = "zoh",
        dropout: Share = 0.1,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        graphs = ["industry", "correlation"] if graphs is None else graphs
        make_graphs(graphs)  # raises early
        self.graphs = list(graphs)
        # What was learnt, where `task` left it to the data.
        self.task_: str | None = task
        # Linear factors that the fitted weights belong to.
        self.factor_names_: list[str] | None = None

    # What belongs to a panel is rebuilt from it and not pickled.
    _panel: Any = None
    _edges: list[EdgeSeries] | None = None
    _targets: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forget(self) -> None:
        """Drop what an earlier `fit` has learnt."""
        self.factor_names_, self.task_ = None, self.task

    def on_panel(self, panel: Panel) -> None:
        """Find the linear factors, and build the graphs once a panel."""
        if self._panel is None or self._panel() is not panel:
            self._panel = weakref.ref(panel)
            self._edges = self._targets = None
        if self.task_ is None:
            self.task_ = default_task(panel)
        if self.task_ != "dual":
            return
        found = _some_factors(panel)
        if self.factor_names_ not in (None, found):
            raise ValueError(
                f"the model was fitted with risk factors {self.factor_names_}, the "
                f"data has {found}."
            )
        self.factor_names_ = found
        if self._edges is None:
            self._edges = [graph.build(panel) for graph in make_graphs(self.graphs)]

    def share_graphs(self, other: Mamba) -> None:
        """Take the graphs that `other`, of equal `graphs`, has built for its panel."""
        if other._edges is not None and other.graphs == self.graphs:
            self._panel, self._edges, self._targets = other._panel, other._edges, None

    @property
    def reads_features_only(self) -> bool:
        """Whether no risk network, with exposures and graphs, is learnt."""
        return self.task_ != "dual"

    def build_network(self, d_feat: int) -> DualNetwork:
        """Make an untrained network for `d_feat` features a day."""
        encoder = MambaEncoder(
            d_feat,
            self.d_model,
            self.num_layers,
            self.d_state,
            self.d_conv,
            self.expand,
            self.dt_rank,
            self.dropout,
            self.discretisation,
        )
        risk = None
        if self.task_ == "dual":
            panel = None if self._panel is None else self._panel()
            if panel is None or self._edges is None or self.factor_names_ is None:
                raise ValueError("call `on_panel` before `build_network`.")
            columns = [panel.risk_names.index(name) for name in self.factor_names_]
            risk = RiskNetwork(columns, self.d_model, self._edges, self.dropout)
        return DualNetwork(encoder, self.d_model, risk)

    def loss(self, out, batch):
        """Mean over the batch's days of the module docstring's loss; logs each term."""
        alpha_label, risk_label = self._labels_of(batch)
        error, counted = day_mse(out["score"], alpha_label, batch.mask)
        loss = over_days(error, counted)
        parts = {"mse_alpha": loss.detach()}
        if self.task_ != "dual":
            return loss, parts
        error, counted = day_mse(out["risk"], risk_label, batch.mask)
        risk = over_days(error, counted)
        columns = [batch.panel.risk_names.index(n) for n in self.factor_names_ or []]
        learnt = out["risk"] if self.penalty_through_risk else out["risk"].detach()
        factors = torch.cat([batch.risk[..., columns], learnt.unsqueeze(-1)], dim=-1)
        penalty = over_days(
            exposure_penalty(out["score"], factors, batch.mask), batch.mask.sum(1) >= 3
        )
        parts |= {"mse_risk": risk.detach(), "penalty": penalty.detach()}
        return loss + risk + self.penalty * penalty, parts

    def _labels_of(self, batch: Batch):
        """Return y1 and y2 of the batch [c, n], from the panel's raw label and risk."""
        if self._targets is None:
            label = batch.panel.label_index(self.label)
            assert self.task_ is not None  # by on_panel
            self._targets = neutral_labels(batch.panel, label, self.task_)
        return tuple(None if y is None else batch.of(y) for y in self._targets)

    @property
    def learns_risk(self) -> bool:
        """Whether `predict_risk` has a factor to give."""
        return self.task_ == "dual"

    def predict_risk(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.Series:
        """Return the learnt risk factor of a segment, the average over seeds.

        Returns
        -------
        Series
            `risk` by (datetime, instrument), standardised over the day. The value of t
            uses exposures and graphs known at the close of t.
        """
        if self.task_ != "dual":
            raise ValueError(
                f"`task` is {self.task_!r}, which learns no risk factor; set it to "
                "'dual'."
            )
        out, panel, days = self.infer(dataset, segment, ("risk",))
        mask = panel.present[days]
        risk = torch.stack([standardize(o["risk"].unsqueeze(-1), mask) for o in out])
        return panel.series(risk.mean(0), days, ["risk"])["risk"]


def linear_factors(panel: Panel) -> list[str]:
    """Names of the linear factors: the risk group without industry and raw size.

    `log_mcap` counts only where the standardised `size` is absent.
    """
    names = [name for name in panel.risk_names if name != "industry"]
    if "size" in names and "log_mcap" in names:
        names.remove("log_mcap")
    return names


def default_task(panel: Panel) -> str:
    """Say what Mamba learns by default, and log it if that is less than all."""
    if panel.risk_names:
        return "dual"
    logger.info(
        "the data has no risk group: `task` is 'alpha_raw', without a risk factor and "
        "graphs."
    )
    return "alpha_raw"


def _some_factors(panel: Panel) -> list[str]:
    names = linear_factors(panel)
    styles = [name for name in names if name in STYLES]
    raw = [n for n in names if n in RAW_RISK and not (n == "log_mcap" and styles)]
    if not names or raw:
        what = f"raw descriptors {raw}" if raw else f"columns {panel.risk_names}"
        raise ValueError(
            f"`task: dual` needs style exposures in the risk group, which has {what}: "
            f"set the handler's `styles`, or `task` to 'alpha_raw'. {RISK_HINT}"
        )
    return names


def neutral_labels(
    panel: Panel, label: int, task: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels of the two tasks, standardised over the day.

    Parameters
    ----------
    panel : Panel
    label : int
        Position of the label column.
    task : {"alpha_raw", "alpha_neutral", "dual"}

    Returns
    -------
    alpha : float32 Tensor [t, n]
        The raw return, or its residual on industries; NaN where there is none.
    risk : float32 Tensor [t, n] or None
        Residual on industries and linear factors; `dual` only. Exposures that are
        unknown have indicators of their own.
    """
    raw = torch.where(panel.present, panel.raw_labels[..., label], float("nan"))
    if task == "alpha_raw":
        return _standard_label(raw), None
    industry = panel.risk_column("industry")
    if industry is None:
        raise ValueError(
            f"`task: {task}` needs the column `industry` in the risk group, which has "
            f"{panel.risk_names}: ingest industries, or set `task` to 'alpha_raw'. "
            + RISK_HINT
        )
    values = raw.unsqueeze(-1).numpy()
    alpha = _residual(values, industry, None)
    if task == "alpha_neutral":
        return alpha, None
    assert panel.risk is not None
    columns = [panel.risk_names.index(name) for name in _some_factors(panel)]
    return alpha, _residual(values, industry, panel.risk[..., columns].numpy())


def _residual(values: np.ndarray, industry, styles) -> torch.Tensor:
    residual = neutralize(values, industry, styles, missing="unknown")
    return _standard_label(torch.from_numpy(residual[..., 0]))


def _standard_label(y: torch.Tensor) -> torch.Tensor:
    known = torch.isfinite(y)
    z = standardize(torch.where(known, y, 0.0).unsqueeze(-1), known, eps=1e-12)
    return torch.where(known, z.squeeze(-1), float("nan"))
