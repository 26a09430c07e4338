"""GRU+GAT_SA: a recurrent encoder, then attention over several stock graphs.

Kaiyuan Securities, market microstructure 32 (2026-01). The GRU reads a
stock's own history; graph attention, one network a relation, reads its neighbours'. An
MLP on recent style-factor returns weights the relations, one softmax a day. Financial
indicators may join both at the output layer.

`[gap]` What the report leaves open: style returns enter as sums over 5, 20 and 60 days
in units of their own trailing standard deviation; the output layer sees the GRU's
state, the graphs' and the indicators' side by side, so that an isolated stock is scored
by its own history.

Glossary: t days, n instruments, l look-back days, f features, c scored days, d hidden
width, k factor units, r relations, s inputs from style returns, q indicators.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset import DatasetH
from qlib.log import get_module_logger
from torch import nn

from data_handlers.arguments import Count, check_number
from data_handlers.risk import financial_config
from qlib_ext.dataset import Panel, segment_dates
from qlib_ext.graphs import (
    EdgeSeries,
    as_of,
    load_columns,
    make_graphs,
    standard_profile,
)
from qlib_ext.models._base import Batch
from qlib_ext.models.multi_factor_rnn import FactorRNN, MultiFactorRNN, same_names
from qlib_ext.models.styles import style_gate, style_returns, style_state
from qlib_ext.nn.cross_section import standardize
from qlib_ext.nn.graph_attention import RelationalAttention
from qlib_ext.nn.recurrent import Encoder

__all__ = ["GRUGAT", "GraphRNN"]

logger = get_module_logger("qlib_ext.models")

FIN_AGE = 400  # trading days an indicator may be carried forward


@dataclass
class Relations:
    """What the network reads beside the features, for one panel.

    Attributes
    ----------
    graphs : list of r EdgeSeries
    style : float32 Tensor [t, s] or None
        State of the style returns.
    style_returns : DataFrame or None
        Daily style returns, for plots.
    financials : float32 Tensor [t, n, q] or None
        Standardised indicators, NaN unknown.
    """

    graphs: list[EdgeSeries]
    style: torch.Tensor | None = None
    style_returns: pd.DataFrame | None = None
    financials: torch.Tensor | None = None


class GraphRNN(FactorRNN):
    """Recurrent encoder, graph attention, indicators, and K linear units a stock.

    Parameters
    ----------
    encoder, n_factors, head_size, attributes
        See `FactorRNN`; the indicators are attributes.
    relations : Relations
        Data of the panel at hand; no parameter.
    weighting : {"sa", "equal", "learned"}
    heads : int
    dropout : float
        Of the attention.
    """

    def __init__(
        self,
        encoder: Encoder,
        n_factors: int,
        head_size: int,
        relations: Relations,
        weighting: str,
        heads: int,
        dropout: float,
        attributes: torch.Tensor | None = None,
    ) -> None:
        super().__init__(encoder, n_factors, head_size)
        self.relations = relations
        self.weighting = weighting
        count = len(relations.graphs)
        width = own = encoder.width
        if count:
            self.attention = RelationalAttention(own, own, count, heads, dropout)
            width += own
        if count and weighting == "sa":
            assert relations.style is not None
            self.gate = style_gate(relations.style.shape[1], count)
        elif count and weighting == "learned":
            self.gate_logits = nn.Parameter(torch.zeros(count))
        self._end_with(width, n_factors, head_size, attributes)

    def relation_weights(self, days: np.ndarray, device) -> torch.Tensor:
        """Weights [c, r] of the relations, summing to 1 each day."""
        count = len(self.relations.graphs)
        if self.weighting == "sa":
            style = self.relations.style
            assert style is not None
            logits = self.gate(style[days].to(device))
        elif self.weighting == "learned":
            logits = self.gate_logits.expand(len(days), -1)
        else:
            logits = torch.zeros(len(days), count, device=device)
        return torch.softmax(logits.float(), dim=-1)

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Units [c, n, k] standardised over the day, and the score [c, n]."""
        parts, out = [h.float()], {}
        if self.relations.graphs:
            near = batch.neighbors(self.relations.graphs)
            out["weights"] = self.relation_weights(batch.days, h.device)  # [c, r]
            mixed = self.attention(h.float(), near, out["weights"])  # [c, n, d]
            parts.append(nn.functional.elu(mixed))
        parts += self.beside(batch)
        units = self.linear(torch.cat(parts, dim=-1))  # [c, n, k]
        z = standardize(units.float(), batch.mask)
        mean = z.mean(-1, keepdim=True)
        out["score"] = standardize(mean, batch.mask).squeeze(-1)  # [c, n]
        out["units"] = z
        return out


class GRUGAT(MultiFactorRNN):
    """Mine factors with a GRU and attention over stock graphs.

    Without graphs and financials it is `MultiFactorRNN`. Training, modes, seeds, loss
    and units are those of that model.

    Parameters
    ----------
    graphs : list, optional
        Relations: names ("industry", "financial", "flow", "correlation") for defaults,
        or configs with `class`, `kwargs` and, outside `qlib_ext.graphs`, `module_path`.
        Default: industry, financial, flow, or none where the data has no risk group, as
        with Qlib's Alpha158; the log says so. Empty: no graph.
    weighting : {"sa", "equal", "learned"}, default "sa"
        Weights of the relations: from the recent style returns, day by day; 1 / r; or
        learnt constants.
    financials : bool or list of str, default False
        Whether financial indicators join at the output layer; a list names panel
        features or Qlib expressions, True takes what the store holds.
    heads : int, default 4
        Attention heads; must divide `hidden_size`.
    n_factors : int, default 1
    hidden_size, num_layers, dropout, lamb, rnn, bidirectional, head_size, \
size_groups, every, parts, categories, embedding_size, attributes
        See `MultiFactorRNN`.
    d_feat, step_len, mode, chunk, day_stride, n_epochs, early_stop, lr, clip_value, \
n_seeds, seed, label, GPU, amp, block_size, checkpoint_dir
        See `TorchModel`.

    Raises
    ------
    ValueError
        On any argument out of range, or data that a graph or the weighting needs and
        the store lacks, naming it.

    References
    ----------
    docs/systems/gru_gat.md; Veličković et al. (2018), Graph Attention Networks.
    """

    def __init__(
        self,
        graphs: list | None = None,
        weighting: Literal["sa", "equal", "learned"] = "sa",
        financials: bool | list = False,
        heads: Count = 4,
        n_factors: Count = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_factors=n_factors, **kwargs)
        check_number("dropout", self.dropout, low=0.0, high=0.99)
        if self.hidden_size % heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} must be a multiple of `heads` "
                f"{heads}."
            )
        if not isinstance(financials, (bool, list)):
            raise ValueError(
                f"`financials` must be true, false or a list, got {financials!r}."
            )
        if graphs is not None:
            make_graphs(graphs)  # raises early
            graphs = list(graphs)
        self.graphs = graphs
        # What the fitted weights belong to.
        self.graphs_: list | None = graphs
        self.relation_names_: list[str] = []
        self.style_names_: list[str] | None = None
        self.financial_names_: list[str] | None = None

    # What belongs to a panel is rebuilt from it and not pickled.
    _relations: Relations | None = None
    _relations_of: Any = None

    def forget(self) -> None:
        """Drop what an earlier `fit` has learnt."""
        super().forget()
        self.style_names_ = self.financial_names_ = None
        self.graphs_ = self.graphs
        self._relations = None

    def on_panel(self, panel: Panel) -> None:
        """Build graphs, style state and indicators, once a panel."""
        super().on_panel(panel)
        if self._relations is not None and self._relations_of() is panel:
            self._join(self._relations)
            return
        if self.graphs_ is None:
            self.graphs_ = _default_graphs(panel)
        graphs = make_graphs(self.graphs_)
        self.relation_names_ = [graph.name for graph in graphs]
        relations = Relations([graph.build(panel) for graph in graphs])
        if relations.graphs and self.weighting == "sa":
            table = style_returns(panel)
            self.style_names_ = same_names(
                "style", self.style_names_, [str(c) for c in table]
            )
            relations.style_returns = table
            relations.style = torch.from_numpy(style_state(table.to_numpy()))
        if self.financials:
            fields = financial_config()[0] if self.financials is True else None
            fields = list(self.financials) if fields is None else fields  # type: ignore
            if not fields:
                raise ValueError(
                    "`financials` is true, but the store has no financial indicator; "
                    "set it to false or list fields."
                )
            names = same_names("indicator", self.financial_names_, fields)
            self.financial_names_ = names
            relations.financials = _financials(panel, names)
        self._relations, self._relations_of = relations, weakref.ref(panel)
        self._join(relations)

    def _join(self, relations: Relations) -> None:
        """Let the indicators join where the attributes do, behind them."""
        if relations.financials is not None:
            both = [self._attributes, relations.financials]
            known = [part for part in both if part is not None]
            self._attributes = torch.cat(known, dim=-1)

    @property
    def reads_features_only(self) -> bool:
        """Whether there is no graph, and what `MultiFactorRNN` says."""
        alone = not (self.graphs_ or self.financials)
        return alone and super().reads_features_only

    def build_network(self, d_feat: int) -> GraphRNN:
        """Make an untrained network for `d_feat` features a day."""
        if self._relations is None:
            raise ValueError("call `on_panel` before `build_network`.")
        return GraphRNN(
            self.build_encoder(d_feat),
            self.n_factors,
            self.head_size,
            self._relations,
            self.weighting,
            self.heads,
            self.dropout,
            self._attributes,
        )

    def loss(self, out, batch):
        """Add the mean weight of each relation to what is logged."""
        loss, parts = super().loss(out, batch)
        if "weights" in out:
            mean = out["weights"].detach().mean(0)
            parts |= {
                f"weight_{name}": mean[i] for i, name in enumerate(self.relation_names_)
            }
        return loss, parts

    def predict_weights(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.DataFrame:
        """Return the daily weights of the relations, averaged over seeds.

        Returns
        -------
        DataFrame
            Rows datetime, columns (group, name): `weight` with one column a relation,
            and with `weighting: sa` `style_return` with the daily style returns. Row t
            is known at the close of t.
        """
        if not self.states_:
            raise ValueError("the model is not fitted; call `fit` first.")
        panel = Panel.from_dataset(dataset)
        days = panel.days(segment_dates(dataset, segment))
        self.on_panel(panel)
        relations = self._relations
        if relations is None or not relations.graphs:
            raise ValueError("the model has no graph, so there are no weights.")
        total = torch.zeros(len(days), len(relations.graphs))
        for state in self.states_:
            network = self.rebuild_network(state)
            assert isinstance(network, GraphRNN)
            with torch.no_grad():
                total += network.relation_weights(days, torch.device("cpu"))
        table = pd.DataFrame(
            (total / len(self.states_)).numpy(),
            index=panel.dates[days],
            columns=pd.MultiIndex.from_product([["weight"], self.relation_names_]),
        )
        if relations.style_returns is not None:
            styles = relations.style_returns.iloc[days]
            styles.columns = pd.MultiIndex.from_product([["style_return"], styles])
            table = pd.concat([table, styles], axis=1)
        return table.rename_axis("datetime")

    def graph_statistics(self, dataset: DatasetH) -> pd.DataFrame:
        """Return each relation's daily statistics over the dataset's whole range.

        Returns
        -------
        DataFrame
            Rows datetime, columns (relation, statistic); see `EdgeSeries.statistics`.
        """
        panel = Panel.from_dataset(dataset)
        self.on_panel(panel)
        assert self._relations is not None
        present = panel.present.numpy()
        tables = {g.name: g.statistics(present) for g in self._relations.graphs}
        if not tables:
            raise ValueError("the model has no graph.")
        return pd.concat(tables, axis=1).rename_axis("datetime")


def _default_graphs(panel: Panel) -> list[str]:
    if not panel.risk_names:
        logger.info("the data has no risk group: `graphs` is empty, a GRU alone.")
        return []
    wanted = {
        "industry": "industry" in panel.risk_names,
        "financial": bool(financial_config()[0]),
        "flow": True,
    }
    found = [name for name, there in wanted.items() if there]
    if absent := [name for name in wanted if name not in found]:
        logger.info(f"the store has no data for {absent}: `graphs` is {found}.")
    return found


def _financials(panel: Panel, fields: list[str]) -> torch.Tensor:
    """Standardise the indicators [t, n, q] as of each day over its stocks."""
    values, h = load_columns(panel, fields, FIN_AGE, 0)
    values = as_of(values, FIN_AGE)[h:]
    out = np.full(values.shape, np.nan, np.float32)
    for day in range(len(values)):
        z, row = standard_profile(values[day].astype(np.float64), 0.0)
        out[day, row] = np.where(np.isfinite(values[day, row]), z, np.nan)
    return torch.from_numpy(out)
