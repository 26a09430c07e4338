"""IncrementalModel: a network that goes on learning, from labels that are known.

Naive incremental learning, and DoubleAdapt: Zhao, Kong and Shen (2023), "DoubleAdapt: A
Meta-learning Approach to Incremental Learning for Stock Trend Forecasting", KDD;
https://arxiv.org/abs/2306.09862. Differences: labels count only from the day on which
they are known, whatever the interval (the published code learns from the step before
at once, some of whose labels lie ahead as soon as the interval is at most the horizon);
gradients are of first order throughout. See docs/systems/adaptive.md.

A step is `r` trading days that are scored with the same weights. `R` is the reach of
the label of t: its last price is that of t + R. Before a step that begins on day s the
newest days to learn from are the `r` days up to s - R - 1.

Glossary: l look-back days, c scored days, n instruments, f features.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset import DatasetH
from qlib.utils import init_instance_by_config
from torch import nn

from data_handlers.arguments import Count, NonNegative, Positive
from qlib_ext.dataset import Panel, handler_label_reach
from qlib_ext.models._base import Batch, Draw, Epoch, TorchModel, check_fit
from qlib_ext.models.adaptive import Adaptive, Weights
from qlib_ext.models.description import described
from qlib_ext.models.walk import Walk
from qlib_ext.nn.adapters import DataAdapters
from qlib_ext.recorders import active_recorder, save_files

__all__ = ["Adaptive", "IncrementalModel"]

#: Artifact: the last label that touched each day's score.
LABELS = "last_labels.parquet"


class IncrementalModel(Walk):
    """Train a model of this package, then let it learn on as labels become known.

    Training is the model's own (`double_adapt`: on tasks, see below); `predict` walks
    the days since the start of segment `valid` in steps of `interval` days, and so does
    the validation that stops training. Before each step:

    - "none": nothing. The model as trained once.
    - "naive": one pass of Adam over the newest `interval` days with known labels.
    - "double_adapt": the forecaster takes one step on those days, their features and
      labels adapted; the step's days are scored with it. Before that, the starting
      point of such steps and the adapters learn from the newest task whose scored days
      have known labels by now. A task is `interval` days to learn from and as many to
      score, `R` + 1 days later; training draws tasks from segment `train`.

    Parameters
    ----------
    model : dict
        ``{class, module_path, kwargs}`` of a model of this package; its arguments
        decide training, seeds and device.
    adapt : {"naive", "double_adapt", "none"}, default "naive"
    interval : int, default 20
        Trading days `r` of a step.
    delay : bool, default False
        Must be set if `interval` is not above the horizon: what is learnt from then
        lies more than one step behind.
    reach : int, optional
        Trading days `R` after t that the label of t uses; by default what the handler
        says, which must be given only for handlers that can't tell.
    step_lr : float, default 0.001
        Rate of the steps on a task's first days, and of naive learning in `predict`.
    adapter_lr : float, default 0.01
        Rate of the adapters.
    label_weight : float, default 0.5
        Weight of the squared change that the label adapter makes.
    num_heads, temperature : int, float, default 8, 10.0
        Of the adapters.

    Raises
    ------
    ValueError
        On an argument out of range; a model with a training of its own; an interval
        not above the horizon without `delay`; a reach that is not known, or shorter
        than the handler's; fewer than two tasks in `train`.

    References
    ----------
    Zhao, Kong and Shen (2023); docs/systems/adaptive.md.
    """

    def __init__(
        self,
        model: dict,
        adapt: Literal["naive", "double_adapt", "none"] = "naive",
        interval: Count = 20,
        delay: bool = False,
        reach: Count | None = None,
        step_lr: Positive = 0.001,
        adapter_lr: Positive = 0.01,
        label_weight: NonNegative = 0.5,
        num_heads: Count = 8,
        temperature: Positive = 10.0,
    ) -> None:
        if not isinstance(model, dict) or "class" not in model:
            raise ValueError(
                "`model` must be a dict of class, module_path and kwargs, got "
                f"{model!r}."
            )
        self.model = {"module_path": "qlib_ext.models", **model}
        base = init_instance_by_config(self.model)
        own = ("fit", "_fit_seed", "_train_epoch", "infer", "_forward")
        if not isinstance(base, TorchModel) or any(
            getattr(type(base), name) is not getattr(TorchModel, name) for name in own
        ):
            raise ValueError(
                f"`model` must be a model of this package that is trained as all are, "
                f"such as MultiFactorRNN, got {type(base).__name__}."
            )
        if adapt == "double_adapt" and base.block_size:
            raise ValueError(
                f"`block_size` must be 0 with `adapt: double_adapt`, got "
                f"{base.block_size}; a smaller `chunk` bounds memory as well."
            )
        self.base_ = base
        names = list(inspect.signature(TorchModel.__init__).parameters)[1:]
        super().__init__(**{name: getattr(base, name) for name in names})
        self.compares = base.compares
        # Learnt: reach of the label; first day of the walk; last days whose labels
        # trained the network and chose among the epochs.
        self.reach_ = 0
        self.anchor_ = self.trained_to_ = self.selected_to_ = pd.Timestamp(0)

    # ---- training ------------------------------------------------------------------

    @described
    def fit(
        self,
        dataset: DatasetH,
        evals_result: dict | None = None,
        reweighter: Any = None,
    ) -> None:
        """Train on segment `train`; stop early on `valid`, walked as it will be.

        Takes what `TorchModel.fit` takes.
        """
        check_fit(dataset, reweighter)
        panel = Panel.from_dataset(dataset)
        self.reach_ = self._known_reach(dataset.handler)
        train, valid = (panel.days(dataset.segments[k]) for k in ("train", "valid"))
        if len(train) and len(valid):  # else the base says what is wrong
            self._check_interval(train)
            self.anchor_ = pd.Timestamp(panel.dates[valid[0]])
            self.trained_to_ = pd.Timestamp(panel.dates[train[-1]])
            self.selected_to_ = pd.Timestamp(panel.dates[valid[-1]])
        super().fit(dataset, evals_result, reweighter)

    def _known_reach(self, handler: Any) -> int:
        found = handler_label_reach(handler)
        if found is None and self.reach is None:
            raise ValueError(
                "`reach` must be given: it can't be told from the handler how many "
                "trading days after t the label of t uses (11 for the 10-day return "
                "from the close of t+1)."
            )
        if found is not None and self.reach is not None and self.reach < found:
            raise ValueError(
                f"`reach` must be at least the {found} trading days that the handler's "
                f"label uses, got {self.reach}: leave it out."
            )
        return self.reach or found or 1

    def _check_interval(self, train: np.ndarray) -> None:
        if self.adapt == "none":
            return
        if self.interval < self.reach_ and not self.delay:
            raise ValueError(
                f"`interval` must be above the horizon of {self.reach_ - 1} days, got "
                f"{self.interval}: the labels of the step before are not known when "
                "the next begins. Lengthen it, or set `delay: true` to learn from "
                "older steps."
            )
        if (count := len(self._tasks(train, 0))) < 2:
            raise ValueError(
                f"segment `train` of {len(train)} days holds {count} task(s) of "
                f"`interval` {self.interval} and reach {self.reach_}, at least two are "
                "needed: shorten the interval or begin `train` earlier."
            )

    def build_network(self, d_feat: int) -> Adaptive:
        """Make an untrained forecaster with its adapters."""
        adapters = None
        if self.adapt == "double_adapt":
            adapters = DataAdapters(
                d_feat, self.step_len_, self.num_heads, self.temperature
            )
        return Adaptive(self.base_.build_network(d_feat), adapters)

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        """Adam, with a rate of their own for the adapters."""
        assert isinstance(network, Adaptive)
        groups = [{"params": list(network.network.parameters())}]
        if network.adapters is not None:
            groups.append(
                {"params": list(network.adapters.parameters()), "lr": self.adapter_lr}
            )
        return torch.optim.Adam(groups, lr=self.lr)

    def loss(self, out, batch):
        """Loss of the model."""
        return self.base_.loss(out, batch)

    def forget(self) -> None:
        """Let the model drop what it has learnt."""
        self.base_.forget()

    def on_panel(self, panel: Panel) -> None:
        """Let the model look at the data."""
        for name in ("d_feat_", "step_len_", "feature_names_"):
            setattr(self.base_, name, getattr(self, name))
        self.base_.on_panel(panel)

    @property
    def streams(self) -> bool:
        """Whether the model's encoder can go on from a state."""
        return self.base_.streams

    def day_inputs(self, panel: Panel, days: slice) -> torch.Tensor | None:
        """Columns that the model's encoder reads beside the features."""
        return self.base_.day_inputs(panel, days)

    def training_days(self, panel: Panel, days: np.ndarray) -> np.ndarray:
        """Days that the model chooses."""
        return self.base_.training_days(panel, days)

    def _batches(self, days: np.ndarray, generator, stocks: int = 0) -> list[Draw]:
        if self.adapt != "double_adapt":
            return super()._batches(days, generator, stocks)
        tasks = self._tasks(days, int(generator.integers(self.interval)))
        return [Draw(tasks[i]) for i in generator.permutation(len(tasks))]

    def _tasks(self, days: np.ndarray, offset: int) -> list[np.ndarray]:
        """First days of the tasks that fit into `days`, scored days included."""
        r = self.interval
        end = days[-1] - (2 * r + self.reach_) + 2
        return [np.arange(s, s + r) for s in range(days[0] + offset, end, r)]

    def _train_epoch(self, epoch: Epoch, optimiser, average=None) -> dict[str, float]:
        network, panel = epoch.network, epoch.panel
        assert isinstance(network, Adaptive)
        if self.adapt == "double_adapt":
            losses = []
            for task in epoch.batches:
                losses.append(
                    self._meta_step(network, optimiser, panel, task.days, epoch.device)
                )
                if average is not None:
                    average.update_parameters(network)
            row = {"train_loss": float(np.mean(losses))}
        else:
            row = super()._train_epoch(epoch, optimiser, average)
        network.keep(optimiser)
        if average is not None:
            for mean, own in zip(
                average.module.buffers(), network.buffers(), strict=True
            ):
                mean.copy_(own)
        return row

    # ---- one task ------------------------------------------------------------------

    def _pieces(self, days: np.ndarray, every: int = 1) -> list[np.ndarray]:
        """Batches of consecutive days, in order."""
        if self.mode == "windows":
            return [days[i : i + 1] for i in range(0, len(days), every)]
        return [days[i : i + self.chunk] for i in range(0, len(days), self.chunk)]

    def _to_learn(self, panel, days, device) -> list[tuple[Batch, float]]:
        """Batches of the days, each with its share."""
        parts = self._pieces(days, self.day_stride)
        total = sum(map(len, parts))
        return [(self._batch(panel, p, device), len(p) / total) for p in parts]

    def _meta_step(self, network, optimiser, panel, days, device) -> float:
        """Learn from a task: its first days, and those scored `R` + 1 days later.

        The gradient at the weights that the step on the first days leads to stands for
        that at the starting point (first order).
        """
        weights = self._step(network, panel, days, device)
        fast = {k: v.detach().requires_grad_() for k, v in weights.items()}
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for batch, share in self._to_learn(
            panel, days + self.interval + self.reach_, device
        ):
            out = self._outputs(network, batch, fast)
            loss = share * self.loss(out, batch)[0]
            if not torch.isfinite(loss):
                day = panel.dates[batch.days[0]]
                raise ValueError(
                    f"the loss is {loss.item()} on {day:%Y-%m-%d}: lower "
                    f"`lr` ({self.lr}) or `step_lr` ({self.step_lr}), or look for "
                    "extreme features there."
                )
            loss.backward()
            total += float(loss.detach())
        at = panel.label_index(self.label)
        for batch, share in self._to_learn(panel, days, device):
            label = batch.label[..., at]
            change = (network.adapted_label(label, batch.x) - label).square()
            known = batch.mask & torch.isfinite(label)
            if known.any():
                (self.label_weight * share * change[known].mean()).backward()
        for name, parameter in network.network.named_parameters():
            parameter.grad = fast[f"network.{name}"].grad
        if self.clip_value > 0:
            nn.utils.clip_grad_value_(network.parameters(), self.clip_value)
        optimiser.step()
        return total

    def _step(self, network: Adaptive, panel, days, device) -> Weights:
        """Weights after one step of a new Adam on all of these days at once."""
        network.train()
        start = {
            f"network.{k}": v.detach().requires_grad_()
            for k, v in network.network.named_parameters()
        }
        gradient = {k: torch.zeros_like(v) for k, v in start.items()}
        at = panel.label_index(self.label)
        for batch, share in self._to_learn(panel, days, device):
            with torch.no_grad():
                label = batch.label.clone()
                assert batch.x is not None
                label[..., at] = network.adapted_label(label[..., at], batch.x)
            out = self._outputs(network, batch, start, inverse=False)
            loss = share * self.loss(out, replace(batch, label=label))[0]
            if not loss.requires_grad:
                continue
            found = torch.autograd.grad(loss, list(start.values()), allow_unused=True)
            for total, part in zip(gradient.values(), found, strict=True):
                if part is not None:
                    total += part
        clip = self.clip_value or math.inf
        with torch.no_grad():
            # Adam's first step, whose moments are this gradient and its square.
            return {
                k: v - self.step_lr * (g := gradient[k].clamp(-clip, clip))
                / (g.abs() + 1e-8)
                for k, v in start.items()
            }  # fmt: skip

    def _outputs(
        self,
        network: Adaptive,
        batch: Batch,
        weights: Weights | None = None,
        inverse: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Compute a batch, by weights in place of the forecaster's own."""
        with self._autocast(batch.mask.device):
            return torch.func.functional_call(
                network, weights or {}, (batch, self._encode, inverse)
            )

    # ---- Qlib's interface ----------------------------------------------------------

    def predict(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.Series:
        """Score a segment, learning on from known labels.

        Parameters
        ----------
        dataset : PanelDataset, TSDatasetH or DatasetH
            From segment `valid` on, or from where `take_up` has put the model.
        segment : str or slice or (start, end)

        Returns
        -------
        Series
            `score` by (datetime, instrument), as `TorchModel.predict`. An active
            recorder gets ``last_labels.parquet``, see `last_labels`.
        """
        score = super().predict(dataset, segment)
        if (recorder := active_recorder()) is not None:
            panel = Panel.from_dataset(dataset)
            days = pd.DatetimeIndex(score.index.unique("datetime"))
            save_files(recorder, {LABELS: self.last_labels(panel.dates, days)})
        return score
