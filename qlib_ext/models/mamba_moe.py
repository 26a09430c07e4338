"""MambaMoE: cross-validated Mamba sub-models, fused equally or by a gated mixture.

Northeast Securities, machine learning series 9 (2025-05). Experts are
Mamba models of different labels (Mamba-10, Mamba-5) and tasks. Each is trained once a
fold with a stretch of days left out; its score of a training day comes from the fold
that did not see the day, its score of a later day is the average over folds. A gate on
stock features and market state weights the experts and keeps the top k.

`[gap]` What the report leaves open. Folds are consecutive stretches of the training
segment; days whose label overlaps a label of the stretch are left out on both sides
(purge), and some more after it (embargo). The gate is a small MLP of the stock's
features of the day and of the market state: mean and spread of every feature over the
day's stocks, today and averaged over 20 days. It starts at equal weights and is trained
on out-of-fold scores only. Load balance is that of Switch Transformers.

Glossary: t days, n instruments, f features, c scored days, e experts, k experts kept,
m market-state inputs, d hidden width.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from qlib.data.dataset import DatasetH
from qlib.log import get_module_logger
from qlib.model.base import Model
from torch import nn

from data_handlers.arguments import (
    Count,
    NamedArguments,
    NonNegative,
    Positive,
    Share,
    Text,
    Whole,
)
from qlib_ext.dataset import Panel, handler_label_reach
from qlib_ext.losses import day_mse, over_days
from qlib_ext.models._base import Batch, Network, TorchModel, check_fit
from qlib_ext.models.batches import memory_kept
from qlib_ext.models.checkpoints import Checkpoints
from qlib_ext.models.description import described
from qlib_ext.models.mamba import TASKS, Mamba, default_task, neutral_labels
from qlib_ext.nn.cross_section import masked_mean, standardize

__all__ = ["GateNetwork", "MambaMoE", "fold_days", "load_balance", "market_state"]

logger = get_module_logger("qlib_ext.models")

STATE_DAYS = 20  # of the slow half of the market state


class GateNetwork(Network):
    """Weights of the experts from stock features and market state, top k kept.

    Parameters
    ----------
    d_feat : int
        Features `f` of a stock.
    hidden_size, num_experts, num_experts_per_tok : int
        `d`, `e`, `k`.
    dropout : float
    experts : float32 Tensor [t, n, e]
        Standardised scores of the panel at hand; no parameter.
    state : float32 Tensor [t, m]
        Market state of the panel at hand; no parameter.
    """

    def __init__(
        self,
        d_feat: int,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        dropout: float,
        experts: torch.Tensor,
        state: torch.Tensor,
    ) -> None:
        super().__init__()
        self.encoder = _Today()
        self.num_experts_per_tok = num_experts_per_tok
        self.experts, self.state = experts, state
        last = nn.Linear(hidden_size, num_experts)
        # Equal weights to begin with; what moves them must be in the data.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(
            nn.Linear(d_feat + state.shape[1], hidden_size),
            nn.SiLU(),
            nn.Dropout(dropout),
            last,
        )

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Score [c, n], weights and router logits [c, n, e]."""
        state = self.state[batch.days].to(h.device).unsqueeze(1)  # [c, 1, m]
        inputs = torch.cat([h.float(), state.expand(-1, h.shape[1], -1)], dim=-1)
        logits = self.gate(inputs)  # [c, n, e]
        # A little noise in training lets an expert that is not kept be tried again.
        noise = 0.1 * torch.randn_like(logits) if self.training else 0.0
        kept = (logits + noise).topk(self.num_experts_per_tok, dim=-1).indices
        hidden = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
        weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
        if self.num_experts_per_tok == 1:
            # The weight of a single expert is 1 whatever its logit. The gate learns as
            # if it mixed them all (straight-through estimator).
            soft = torch.softmax(logits, dim=-1)
            weights = weights.detach() + (soft - soft.detach())
        experts = batch.of(self.experts)
        mixed = (weights * experts).sum(-1, keepdim=True)  # [c, n, 1]
        return {
            "score": standardize(mixed, batch.mask).squeeze(-1),
            "weights": weights,
            "router_logits": logits,
        }


class _Today(nn.Module):
    """Pass the features of each day through: the gate has no memory of its own."""

    def forward(self, x: torch.Tensor, state=None):
        return x, None


def load_balance(
    logits: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Auxiliary loss that keeps the gate from always choosing the same experts.

    Parameters
    ----------
    logits : Tensor [c, n, e]
    weights : Tensor [c, n, e]
        After top k: 0 where an expert is not kept.
    mask : bool Tensor [c, n]

    Returns
    -------
    Tensor []
        e times the sum over experts of (share of choices) x (mean probability): 1 when
        balanced, e when one expert takes all.

    References
    ----------
    Fedus, Zoph and Shazeer (2021), Switch Transformers, equations 4-6.
    """
    chosen = (weights > 0)[mask].to(logits.dtype)
    if not len(chosen):
        return logits.sum() * 0.0
    share = chosen.mean(0) / chosen.sum(-1).mean()
    probability = torch.softmax(logits, dim=-1)[mask].mean(0)
    return logits.shape[-1] * (share * probability).sum()


def market_state(panel: Panel) -> torch.Tensor:
    """Describe the market of each day by its stocks' features.

    Returns
    -------
    float32 Tensor [t, 4 f]
        Mean and standard deviation of each feature over the day's stocks, and both
        averaged over the last 20 days. Row t uses days up to t only.
    """
    mean = torch.cat([masked_mean(x[None], p[None])[0] for x, p in _days(panel)])
    square = torch.cat(
        [masked_mean(x[None].square(), p[None])[0] for x, p in _days(panel)]
    )
    spread = (square - mean.square()).clamp_min(0.0).sqrt()
    today = torch.cat([mean, spread], dim=-1)  # [t, 2 f]
    slow = pd.DataFrame(today.numpy()).rolling(STATE_DAYS, min_periods=1).mean()
    return torch.cat([today, torch.from_numpy(slow.to_numpy(np.float32))], dim=-1)


def _days(panel: Panel):
    return zip(panel.features, panel.present, strict=True)


def fold_days(
    days: np.ndarray, fold: int, n_folds: int, purge: int, embargo: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split the days of a training segment for one fold.

    Parameters
    ----------
    days : int array [t]
        Consecutive positions.
    fold, n_folds : int
    purge : int
        Trading days that a label reaches ahead: a day this near to the stretch, on
        either side, shares returns with one of its labels.
    embargo : int
        Further days left out after the stretch.

    Returns
    -------
    train, held_out : int array
    """
    held_out = np.array_split(days, n_folds)[fold]
    before = days < held_out[0] - purge
    after = days > held_out[-1] + purge + embargo
    return days[before | after], held_out


class _FoldMamba(Mamba):
    """Mamba that leaves a fold out. `fold` is (fold, n_folds, purge, embargo)."""

    fold: tuple[int, int, int, int]

    def training_days(self, panel: Panel, days: np.ndarray) -> np.ndarray:
        train, held_out = fold_days(days, *self.fold)
        if not len(train):
            raise ValueError(
                f"fold {self.fold[0] + 1} of {self.fold[1]} has no training day left "
                f"of {len(days)}: take a longer segment `train`, fewer `n_folds`, or a "
                f"smaller `embargo`."
            )
        first, last = panel.dates[held_out[[0, -1]]]
        logger.info(
            f"fold {self.fold[0] + 1}/{self.fold[1]}: {len(train)} training days, "
            f"{first:%Y-%m-%d} to {last:%Y-%m-%d} held out"
        )
        return train


class _Gate(TorchModel):
    """Trains a `GateNetwork` in the common loop on the experts' scores."""

    def __init__(
        self, hidden_size, num_experts_per_tok, aux, dropout, task, **training
    ):
        super().__init__(
            d_feat=None,
            step_len=1,
            mode="stream",
            day_stride=1,
            block_size=0,
            amp=False,
            **training,
        )
        self.mean_: torch.Tensor | None = None
        self.std_: torch.Tensor | None = None

    # Data of a panel: set by `MambaMoE`, not pickled.
    _experts: torch.Tensor | None = None
    _state: torch.Tensor | None = None
    _target: torch.Tensor | None = None
    _train: np.ndarray | None = None

    def training_days(self, panel, days):
        self._train = days
        return days

    def on_panel(self, panel):
        state = market_state(panel)
        if self.mean_ is None or self.std_ is None:
            fitted = state[self._train]
            self.mean_, self.std_ = fitted.mean(0), fitted.std(0).clamp_min(1e-6)
        self._state = ((state - self.mean_) / self.std_).clamp(-4, 4)
        self._target = None

    def build_network(self, d_feat):
        assert self._experts is not None and self._state is not None
        return GateNetwork(
            d_feat,
            self.hidden_size,
            self._experts.shape[-1],
            self.num_experts_per_tok,
            self.dropout,
            self._experts,
            self._state,
        )

    def loss(self, out, batch):
        if self._target is None:
            label = batch.panel.label_index(self.label)
            self._target = neutral_labels(batch.panel, label, self.task)[0]
        error, counted = day_mse(out["score"], batch.of(self._target), batch.mask)
        mse = over_days(error, counted)
        balance = load_balance(out["router_logits"], out["weights"], batch.mask)
        return mse + self.aux * balance, {
            "mse": mse.detach(),
            "balance": balance.detach(),
        }


class MambaMoE(NamedArguments, Model):
    """Fuse cross-validated Mamba sub-models, equally or by a gated mixture of experts.

    Every pair of a label and a task is an expert, trained `n_folds` times.

    Parameters
    ----------
    labels : list of str, optional
        Label columns, e.g. [RET10, RET5]; default all of the dataset.
    tasks : list of str, optional
        See `Mamba`; default one, ["dual"], or ["alpha_raw"] where the data has no risk
        group.
    fusion : {"moe", "equal"}, default "moe"
    n_folds : int, default 4
        Stretches of the training segment; each is left out once.
    purge : int, optional
        Trading days left out on both sides of a stretch. Default: what the handler's
        labels reach ahead.
    embargo : int, default 5
        Further days left out after it.
    num_experts_per_tok : int, optional
        Experts `k` that the gate keeps for a stock; default 2, if there are as many.
    router_aux_loss_coef : float, default 0.01
        Weight of the load-balance term.
    gate_hidden_size, gate_n_epochs, gate_early_stop : int, default 32, 50, 10
    gate_lr, gate_dropout : float, default 0.001, 0.1
    label : str, optional
        What the gate learns, and by whose RankIC it stops; default the first of
        `labels`, of the dataset where that is not given.
    penalty, penalty_through_risk, graphs, d_model, num_layers, d_state, d_conv, \
expand, dt_rank, discretisation, dropout
        Of every sub-model; see `Mamba`.
    d_feat, step_len, mode, chunk, day_stride, n_epochs, early_stop, lr, clip_value, \
n_seeds, seed, GPU, amp, block_size
        Of every sub-model; see `TorchModel`.
    checkpoint_dir : str, optional
        Where finished sub-models and epochs are kept, so that a killed `fit` with
        equal arguments and data goes on where it was. Emptied when training ends.

    Raises
    ------
    ValueError
        On any argument out of range, naming it.

    References
    ----------
    docs/systems/mamba_moe.md; Fedus, Zoph and Shazeer (2021), Switch Transformers;
    Lopez de Prado (2018), Advances in Financial Machine Learning, chapter 7 (purge and
    embargo).
    """

    _receiver = Mamba
    _kept_back = frozenset({"task"})

    def __init__(
        self,
        labels: list | None = None,
        tasks: list | None = None,
        fusion: Literal["moe", "equal"] = "moe",
        n_folds: Annotated[int, Ge(2)] = 4,
        purge: Whole | None = None,
        embargo: Whole = 5,
        num_experts_per_tok: Count | None = None,
        router_aux_loss_coef: NonNegative = 0.01,
        gate_hidden_size: Count = 32,
        gate_n_epochs: Count = 50,
        gate_early_stop: Count = 10,
        gate_lr: Positive = 0.001,
        gate_dropout: Share = 0.1,
        label: Text | None = None,
        **sub_model: Any,
    ) -> None:
        for name, value in (("labels", labels), ("tasks", tasks)):
            if value is not None and (not isinstance(value, list) or not value):
                raise ValueError(f"`{name}` must be a list of names, got {value!r}.")
            if value is not None and len({str(v) for v in value}) < len(value):
                raise ValueError(f"`{name}` must not repeat a name, got {value!r}.")
        if wrong := [task for task in tasks or () if task not in TASKS]:
            raise ValueError(f"`tasks` must be among {TASKS}, got {wrong[0]!r}.")
        self.label = labels[0] if label is None and labels is not None else label
        common = Mamba(**sub_model)  # raises early
        self.checkpoint_dir = sub_model.pop("checkpoint_dir", None)
        self.sub_model = sub_model
        self.gate: dict[str, Any] = {
            "hidden_size": gate_hidden_size,
            "aux": router_aux_loss_coef,
            "dropout": gate_dropout,
            "n_epochs": gate_n_epochs,
            "early_stop": gate_early_stop,
            "lr": gate_lr,
            "clip_value": common.clip_value,
            "n_seeds": common.n_seeds,
            "seed": common.seed,
            "GPU": common.GPU,
            "chunk": 20,
            "label": self.label,
            "checkpoint_dir": None,
        }
        # Learnt: names of the experts, their sub-models (a list of folds each), gate.
        self.expert_names_: list[str] = []
        self.experts_: list[list[_FoldMamba]] = []
        self.gate_: _Gate | None = None

    # ---- Qlib's interface ----------------------------------------------------------

    @described
    def fit(
        self,
        dataset: DatasetH,
        evals_result: dict | None = None,
        reweighter: Any = None,
    ) -> None:
        """Train every expert on every fold, then the gate on out-of-fold scores.

        Parameters
        ----------
        dataset : PanelDataset, TSDatasetH or DatasetH
            A `PanelDataset` spares building its panel once a sub-model.
        evals_result : dict, optional
            Filled with histories: `experts` {name: one history a fold} and `gate`.
        reweighter : None
            Not supported.
        """
        check_fit(dataset, reweighter)
        panel = Panel.from_dataset(dataset)
        labels = panel.label_names if self.labels is None else self.labels
        for label in labels:
            panel.label_index(label)  # raises, naming it
        tasks = self.tasks or [default_task(panel)]
        pairs = [(label, task) for label in labels for task in tasks]
        kept = self.num_experts_per_tok or min(2, len(pairs))
        if self.fusion == "moe" and kept > len(pairs):
            raise ValueError(
                f"`num_experts_per_tok` is {kept}, but `labels` x "
                f"`tasks` make only {len(pairs)} expert(s): {pairs}."
            )
        if self.fusion == "moe" and kept == len(pairs) > 1:
            logger.info(
                f"all {len(pairs)} experts are kept for every stock: the gate weighs "
                "them and chooses none; lower `num_experts_per_tok` or add `tasks` to "
                "let it choose."
            )
        purge = self._purge(dataset)
        train = panel.days(dataset.segments["train"])
        if len(train) < self.n_folds:
            raise ValueError(
                f"`n_folds` is {self.n_folds}, but segment `train` has {len(train)} "
                "days."
            )
        scores = torch.full((*panel.present.shape, len(pairs)), float("nan"))
        self.expert_names_ = [f"{label}_{task}" for label, task in pairs]
        self.experts_, self.gate_ = [], None
        histories: dict[str, list] = {}
        with memory_kept(), Checkpoints(self, panel, dataset.segments) as store:
            for i, (label, task) in enumerate(pairs):
                name = self.expert_names_[i]
                folds: list[_FoldMamba] = []
                self.experts_.append(folds)
                for fold in range(self.n_folds):
                    logger.info(
                        f"expert {name} ({i + 1}/{len(pairs)}), "
                        f"fold {fold + 1}/{self.n_folds}"
                    )
                    sub = _FoldMamba(task=task, label=label, **self.sub_model)
                    sub.fold = (fold, self.n_folds, purge, self.embargo)
                    sub._log_prefix = f"{name}_fold{fold}_"
                    self._share(sub, panel)
                    self._fit_or_load(sub, store, f"{name}_fold{fold}", dataset)
                    histories.setdefault(name, []).append(sub.history_)
                    if self.fusion == "moe":
                        _, held_out = fold_days(train, *sub.fold)
                        span = tuple(panel.dates[held_out[[0, -1]]])
                        scores[held_out, :, i] = _score(sub, dataset, span)[0]
                    folds.append(sub)
            if self.fusion == "moe":
                valid = panel.days(dataset.segments["valid"])
                scores[valid] = self._scores(dataset, "valid")[0]
                task = (
                    "alpha_neutral" if "industry" in panel.risk_names else "alpha_raw"
                )
                self.gate_ = _Gate(task=task, num_experts_per_tok=kept, **self.gate)
                self.gate_._experts = scores
                self.gate_._log_prefix = "gate_"
                self.gate_.fit(dataset)
        if evals_result is not None:
            evals_result["experts"] = histories
            if self.gate_ is not None:
                evals_result["gate"] = self.gate_.history_

    def predict(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.Series:
        """Score of every instrument present on every day of a segment."""
        score, _, _, panel, days = self._fuse(dataset, segment)
        return panel.series(score.unsqueeze(-1), days, ["score"])["score"]

    def predict_experts(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.DataFrame:
        """Return the experts' weights and scores by day and stock.

        Returns
        -------
        DataFrame
            Rows (datetime, instrument), columns `weight_<expert>`, which sum to 1, and
            `score_<expert>`, standardised over the day. Row t is known at its close.
        """
        _, weights, scores, panel, days = self._fuse(dataset, segment)
        names = [f"{k}_{e}" for k in ("weight", "score") for e in self.expert_names_]
        return panel.series(torch.cat([weights, scores], dim=-1), days, names)

    @property
    def learns_risk(self) -> bool:
        """Whether `predict_risk` has a factor to give."""
        if self.tasks is not None:
            return "dual" in self.tasks
        return any(folds[0].learns_risk for folds in self.experts_)

    def predict_risk(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.Series:
        """Return the learnt risk factor, averaged over the dual experts and folds."""
        subs = [m for folds in self.experts_ for m in folds if m.task == "dual"]
        if not subs:
            raise ValueError(
                "no expert is of task 'dual', so no risk factor is learnt."
            )
        panel = Panel.from_dataset(dataset)
        for sub in subs:
            self._share(sub, panel)
        each = [sub.predict_risk(dataset, segment) for sub in subs]
        return pd.concat(each, axis=1).mean(axis=1).rename("risk")

    # ---- parts ---------------------------------------------------------------------

    def _purge(self, dataset: DatasetH) -> int:
        if self.purge is not None:
            return self.purge
        reach = handler_label_reach(dataset.handler)
        if reach is None:
            raise ValueError(
                "`purge` must be given: it cannot be told from this handler how many "
                "trading days its labels reach ahead (11 for a 10-day return)."
            )
        return reach

    def _fit_or_load(self, sub, store, name, dataset) -> None:
        """Fit a sub-model, or read it if an earlier `fit` was killed after it."""

        def take(saved):
            for attribute in _LEARNT:
                setattr(sub, attribute, saved[attribute])

        if store.load(name, take):
            for seed, history in enumerate(sub.history_, sub.seed):
                sub._log_history(seed, history)
            logger.info(f"{name} read from {store.folder}")
            return
        sub.checkpoint_dir = store.folder
        sub.fit(dataset)
        sub.checkpoint_dir = self.checkpoint_dir
        store.save(name, {name: getattr(sub, name) for name in _LEARNT})

    def _share(self, sub: Mamba, panel: Panel) -> None:
        """Give a sub-model the graphs that another has built for this panel."""
        if sub._edges is not None and sub._panel() is panel:
            return
        for other in (m for folds in self.experts_ for m in folds):
            if other._edges is not None and other._panel() is panel:
                sub.share_graphs(other)
                return

    def _scores(self, dataset, segment):
        """Scores of the experts [c, n, e], averaged over folds."""
        panel = Panel.from_dataset(dataset)
        scores: list[torch.Tensor] = []
        days = np.empty(0, int)
        for folds in self.experts_:
            each = []
            for sub in folds:
                self._share(sub, panel)
                value, _, days = _score(sub, dataset, segment)
                each.append(value)
            mask = panel.present[days]
            mean = torch.stack(each).mean(0).unsqueeze(-1)
            scores.append(standardize(mean, mask).squeeze(-1))
        return torch.stack(scores, dim=-1), panel, days

    def _fuse(self, dataset, segment):
        if not self.experts_:
            raise ValueError("the model is not fitted; call `fit` first.")
        scores, panel, days = self._scores(dataset, segment)
        mask = panel.present[days]
        if self.gate_ is None:
            weights = torch.full_like(scores, 1 / scores.shape[-1])
            mixed = standardize(scores.mean(-1, keepdim=True), mask).squeeze(-1)
            return mixed, weights, scores, panel, days
        experts = torch.zeros(*panel.present.shape, scores.shape[-1])
        experts[days] = scores
        self.gate_._experts = experts
        out, _, _ = self.gate_.infer(dataset, segment, ("score", "weights"))
        score = torch.stack([o["score"] for o in out]).mean(0).unsqueeze(-1)
        weights = torch.stack([o["weights"] for o in out]).mean(0)
        return standardize(score, mask).squeeze(-1), weights, scores, panel, days


_LEARNT = ("states_", "d_feat_", "step_len_", "history_", "factor_names_")


def _score(sub: Mamba, dataset, segment):
    """Score [c, n] of one sub-model: the average over seeds, standardised."""
    out, panel, days = sub.infer(dataset, segment, ("score",))
    mask = panel.present[days]
    each = [standardize(o["score"].unsqueeze(-1), mask) for o in out]
    score = standardize(torch.stack(each).mean(0), mask).squeeze(-1)
    return score, panel, days
