"""ML_C: factors of several feature families in one score, with weights learnt.

Kaiyuan Securities, market microstructure 32 (2026-01): the factors of
the families PV, G, C, HF and DP are combined by SA weighting and by weighting with
their long-only returns. `[gap]` What the report leaves open:

- SA: the MLP of GRU+GAT_SA, from the state of the style returns to a softmax over the
  families, one set of weights a day. It is learnt on the scores of a segment that the
  families' own models were not trained on (`segment`, by default `valid`), to bring the
  combined score near the label; the segment's last fifth decides when to stop.
- Long-only: a family's weight of day t is its mean long-only excess return over the
  last `window` days whose returns are known at the close of t, 0 where that is
  negative.
- Both: the mean of the two combined scores, each standardised over the day.

Glossary: t days, n instruments, k families (sources), s inputs from style returns.
"""

from __future__ import annotations

import operator
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Gt, Le
from qlib.data.dataset import DatasetH
from qlib.log import get_module_logger

from data_handlers.arguments import Count, NonNegative, Positive, Whole
from data_handlers.panel import scatter
from qlib_ext.dataset import Panel, handler_label_reach, segment_dates
from qlib_ext.losses import day_mse, over_days
from qlib_ext.models._base import Progress, cpu_state, descend
from qlib_ext.models.description import described
from qlib_ext.models.score_average import (
    Missing,
    NoScore,
    ScoreAverage,
    standardize_scores,
)
from qlib_ext.models.styles import style_gate, style_returns, style_state
from qlib_ext.nn.cross_section import standardize

__all__ = ["FamilyComposite", "long_only_weights"]

logger = get_module_logger("qlib_ext.models")


class FamilyComposite(ScoreAverage):
    """Combine the factors of feature families with weights learnt on the past.

    Parameters
    ----------
    sources : dict
        Family to source, as in `ScoreAverage`, without `weight`.
    weighting : {"both", "sa", "long_only"}, default "both"
    segment : str, default "valid"
        Segment of the workflow's data set on which the weights are learnt: behind the
        training of the sources, before the test. A source that is a recorder must have
        scores there for SA weighting (`SignalRecord` keeps the test segment only).
    missing, min_sources
        Rule for a stock-day without a score of some source; see `ScoreAverage`.
    absent : {"raise", "skip"}, default "raise"
        What becomes of a family that has no score at all where one is asked for, or
        whose recorder is not there: an error, or a combination of the others, with a
        warning. At least two must be left.
    top : float, default 0.1
        Share of a day's scored stocks in the long-only portfolio.
    window, min_days : int, default 250, 60
        Days of long-only returns that count, and fewest of them. Before that, a source
        has the mean weight of those that have enough; all are equal if none has.
    n_epochs, early_stop, lr, weight_decay, seed
        Training of the SA weights with Adam; an epoch is one step on all days.
    label_reach : int, optional
        Trading days after t whose prices the label of t uses; by default what the data
        set's handler says.

    Raises
    ------
    ValueError
        On any argument out of range, a data set without styles (SA), or a source
        without scores.

    Examples
    --------
    In a workflow, after one run a family::

        model:
          class: FamilyComposite
          module_path: qlib_ext.models
          kwargs:
            weighting: long_only
            sources:
              pv: {experiment: pv_gru_gat_sa, recorder: latest}
              g: {experiment: g_gru_gat_sa, recorder: latest}
    """

    def __init__(
        self,
        sources: dict,
        weighting: Literal["both", "sa", "long_only"] = "both",
        segment: str = "valid",
        missing: Missing = "zero",
        min_sources: Count = 1,
        absent: Literal["raise", "skip"] = "raise",
        top: Annotated[float, Gt(0), Le(0.5)] = 0.1,
        window: Count = 250,
        min_days: Count = 60,
        n_epochs: Count = 300,
        early_stop: Count = 30,
        lr: Positive = 0.003,
        weight_decay: NonNegative = 0.001,
        seed: Whole = 0,
        label_reach: Count | None = None,
    ) -> None:
        super().__init__(sources, missing, min_sources)
        for name, source in self.sources.items():
            if "weight" in source:
                raise ValueError(
                    f"`sources.{name}.weight`: the weights are learnt here; use "
                    "ScoreAverage for fixed ones."
                )
        if min_days > window:
            raise ValueError(
                f"`min_days` must be at most `window` {window}, got {min_days}."
            )
        # Learnt: the gate, what its inputs and outputs are, where history starts.
        self.gate_: dict[str, torch.Tensor] | None = None
        self.style_names_: list[str] = []
        self.source_names_: list[str] = []
        self.learn_start_: pd.Timestamp | None = None

    # ---- Qlib's interface ----------------------------------------------------------

    @described
    def fit(
        self,
        dataset: DatasetH,
        evals_result: dict | None = None,
        reweighter: Any = None,
    ) -> None:
        """Train the sources that are models, then the weights.

        Takes what `ScoreAverage.fit` takes; the data set has the labels, styles and
        segments of the weights too, and `evals_result` their history under `weights`.
        """
        if self.segment not in dataset.segments:
            raise ValueError(
                f"`segment` must be one of {sorted(dataset.segments)}, got "
                f"{self.segment!r}."
            )
        super().fit(dataset, evals_result, reweighter)
        self.gate_ = None
        panel = Panel.from_dataset(dataset)
        days = panel.days(dataset.segments[self.segment])
        if len(days) == 0:
            raise ValueError(
                f"segment {self.segment!r} {dataset.segments[self.segment]} holds no "
                "day of the data."
            )
        self.learn_start_ = panel.dates[days[0]]
        self._reach(dataset)  # raises early
        if self.weighting == "long_only":
            return
        parts = self._known(self.predict_units(dataset, self.segment))
        self.source_names_ = [str(name) for name in parts]
        history = self._learn_gate(panel, days, parts, self._reach(dataset))
        if evals_result is not None:
            evals_result["weights"] = history

    def predict(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.Series:
        """Combine the sources' scores over a segment.

        Parameters
        ----------
        dataset : DatasetH
        segment : str or slice or (start, end)

        Returns
        -------
        Series
            `score` by (datetime, instrument), for stock-days with enough sources.
        """
        weights, parts = self._weights(dataset, segment)
        scores = [
            standardize_scores(self.combine(parts, table)) for table in weights.values()
        ]
        if len(scores) == 1:
            return scores[0].rename("score")
        return (sum(scores[1:], scores[0]) / len(scores)).rename("score")

    def predict_weights(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.DataFrame:
        """Return the daily weights of the families.

        Returns
        -------
        DataFrame
            Rows datetime, columns (weighting, family); each weighting's row sums to 1.
            Row t is known at the close of t.
        """
        weights, _ = self._weights(dataset, segment)
        return pd.concat(weights, axis=1).rename_axis("datetime")

    # ---- weights -------------------------------------------------------------------

    def _weights(self, dataset, segment):
        """Weights by weighting, and the segment's standardised scores."""
        if self.learn_start_ is None:
            raise ValueError("the model is not fitted; call `fit` first.")
        panel = Panel.from_dataset(dataset)
        start, end = segment_dates(dataset, segment)
        start = panel.dates[0] if start is None else start
        end = panel.dates[-1] if end is None else end
        # The long-only returns begin where learning began, whatever is asked for.
        first = min(self.learn_start_, start)
        every = self._known(self.predict_units(dataset, (first, end)))
        when = every.index.get_level_values("datetime")
        parts = every[when >= start]
        dates = panel.dates[panel.days((start, end))]
        out = {}
        if self.weighting in ("both", "sa"):
            out["sa"] = self._sa_weights(panel, dates, list(every))
        if self.weighting in ("both", "long_only"):
            returns = self._long_only(panel, every[when >= self.learn_start_])
            table = long_only_weights(
                returns, self._reach(dataset), self.window, self.min_days
            )
            equal = 1.0 / every.shape[1]
            out["long_only"] = table.reindex(dates).fillna(equal)
        return out, parts

    def _known(self, parts: pd.DataFrame) -> pd.DataFrame:
        """Leave sources without any score out, if the rule allows it."""
        there = parts.columns[parts.notna().any()]
        if len(there) < min(2, len(self.sources)):
            raise ValueError(
                f"only {list(there)} of {list(self.sources)} have scores: nothing to "
                "combine."
            )
        return parts[there]

    def _reach(self, dataset: DatasetH) -> int:
        reach = self.label_reach
        if reach is None:
            reach = handler_label_reach(dataset.handler)
        if reach is None:
            raise ValueError(
                "how far the labels look ahead is not known of this data set; give "
                "`label_reach`, 11 for a 10-day label."
            )
        return reach

    def _long_only(self, panel: Panel, parts: pd.DataFrame) -> pd.DataFrame:
        """Raw return of each source's best stocks minus that of all, by day."""
        assert self.learn_start_ is not None
        dates = panel.dates[panel.dates >= self.learn_start_]
        at = panel.dates.get_indexer(dates)
        raw = panel.raw_labels[at][..., 0].numpy().astype(np.float64)
        out = {}
        for name in parts:
            score = scatter(parts[name], dates, panel.instruments)
            out[name] = _top_excess(score, raw, self.top)
        return pd.DataFrame(out, index=dates)

    def _sa_weights(self, panel, dates, names) -> pd.DataFrame:
        if self.gate_ is None:
            raise ValueError("the SA weights are not learnt; call `fit` first.")
        gone = [n for n in self.source_names_ if n not in names]
        state = self._style_state(panel)[panel.dates.get_indexer(dates)]
        gate = style_gate(state.shape[1], len(self.source_names_))
        gate.load_state_dict(self.gate_)
        with torch.no_grad():
            logits = gate(state)
        table = pd.DataFrame(
            torch.softmax(logits, -1).numpy().astype(float),
            index=dates,
            columns=self.source_names_,
        )
        if gone:
            logger.warning(f"SA weights of {gone} go to the others: no scores here")
            table = table.drop(columns=gone)
        # A source that came up only now was never weighed: it gets the mean weight.
        for name in names:
            if name not in table:
                table[name] = table[self.source_names_].mean(axis=1)
        table = table[names]
        return table.div(table.sum(axis=1), axis=0)

    def _style_state(self, panel: Panel) -> torch.Tensor:
        table = style_returns(panel)
        names = [str(c) for c in table]
        if self.style_names_ and names != self.style_names_:
            raise ValueError(
                f"the weights were learnt with styles {self.style_names_}, the data "
                f"has {names}."
            )
        self.style_names_ = names
        return torch.from_numpy(style_state(table.to_numpy()))

    def _learn_gate(self, panel, days, parts, reach) -> list[dict[str, float]]:
        """Learn the SA weights on the days of the segment; returns the history."""
        self.style_names_ = []
        dates = panel.dates[days]
        scores = np.stack(
            [scatter(parts[n], dates, panel.instruments) for n in parts], axis=-1
        )
        mask = torch.from_numpy(np.isfinite(scores).any(-1)) & panel.present[days]
        z = torch.from_numpy(np.nan_to_num(scores)).float()  # [t, n, k]
        label = panel.labels[days][..., 0]
        state = self._style_state(panel)[days]
        # Labels of the first part must not reach into the days that decide.
        late = np.arange(len(days)) >= len(days) - max(len(days) // 5, 1)
        early = np.arange(len(days)) < np.flatnonzero(late)[0] - reach
        labelled = (mask & torch.isfinite(label)).sum(1).numpy() >= 2
        early, late = early & labelled, late & labelled
        torch.manual_seed(self.seed)
        gate = style_gate(state.shape[1], z.shape[2])
        self.gate_ = cpu_state(gate)
        if early.sum() < self.min_days or not late.any():
            logger.warning(
                f"segment {self.segment!r} has {int(early.sum())} labelled days to "
                f"learn SA weights on, fewer than `min_days` {self.min_days}: they "
                "stay equal"
            )
            return []
        optimiser = torch.optim.Adam(
            gate.parameters(), lr=self.lr, weight_decay=self.weight_decay
        )

        def error(at):
            weight = torch.softmax(gate(state[at]), -1)  # [t, k]
            mixed = (z[at] * weight.unsqueeze(1)).sum(-1, keepdim=True)  # [t, n, 1]
            score = standardize(mixed, mask[at]).squeeze(-1)
            return over_days(*day_mse(score, label[at], mask[at]))

        with torch.no_grad():
            progress = Progress(
                "held_out_mse",
                operator.lt,
                kept={-1: cpu_state(gate)},
                untrained=float(error(late)),
            )
        for _ in progress.epochs(self.n_epochs, self.early_stop):
            loss = error(early)
            descend(loss, optimiser)
            with torch.no_grad():
                held = float(error(late))
            row = {"train_mse": float(loss.detach()), "held_out_mse": held}
            progress.add(row, gate)
        self.gate_ = progress.best
        logger.info(
            f"SA weights of {list(parts)}: best epoch {progress.best_epoch} of "
            f"{len(progress.history)}, held-out error {progress.best_value:.4f}"
            + (" (equal weights)" if progress.best_epoch < 0 else "")
        )
        return progress.history

    def absent_source(self, name: str, why: NoScore) -> None:
        """Raise, or leave the source out, by the rule `absent`."""
        if self.absent == "raise":
            raise why
        logger.warning("family %s is left out: %s", name, why)


def long_only_weights(
    returns: pd.DataFrame, reach: int, window: int, min_days: int
) -> pd.DataFrame:
    """Turn long-only returns into weights that know the past only.

    Parameters
    ----------
    returns : DataFrame
        Rows datetime (consecutive trading days), a column a source: what its portfolio
        of the day earned until `reach` days later. NaN unknown.
    reach : int
        Trading days after t at whose close the return of t is known.
    window, min_days : int
        Days that count, and fewest known ones among them.

    Returns
    -------
    DataFrame
        Same shape; rows sum to 1. Row t is made of returns of rows up to t - `reach`.
        A mean below 0 gives the weight 0; a source with fewer than `min_days` known
        returns gets the mean weight of the others; a row without any is equal.
    """
    past = returns.shift(reach)
    mean = past.rolling(window, min_periods=1).mean()
    enough = past.notna().rolling(window, min_periods=1).sum() >= min_days
    weight = mean.clip(lower=0.0).where(enough)
    weight = weight.apply(lambda column: column.fillna(weight.mean(axis=1)))
    total = weight.sum(axis=1)
    return weight.div(total.where(total > 0), axis=0).fillna(1.0 / returns.shape[1])


def _top_excess(score: np.ndarray, raw: np.ndarray, top: float) -> np.ndarray:
    """Mean return of the day's best minus that of all scored stocks, [t]."""
    out = np.full(len(score), np.nan)
    for day in range(len(score)):
        known = np.isfinite(score[day])
        count = int(known.sum() * top)
        if count < 1:
            continue
        # The portfolio is chosen by score alone; one that cannot be bought earns
        # nothing known and is left out of the mean.
        order = np.argsort(np.where(known, -score[day], np.inf), kind="stable")
        best = raw[day, order[:count]]
        every = raw[day, known]
        if np.isfinite(best).any() and np.isfinite(every).any():
            out[day] = np.nanmean(best) - np.nanmean(every)
    return out
