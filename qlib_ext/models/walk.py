"""The walk of a model that learns on: steps of days, scored and then learnt from.

Glossary: l look-back days, c scored days, n instruments, f features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from qlib_ext.dataset import Panel
from qlib_ext.models._base import Stream, TorchModel, cpu_state, descend, for_all

__all__ = ["Walk"]


class Walk(TorchModel):
    """Base of `IncrementalModel`: how `predict` goes through the days, and its state.

    A step scores `interval` days with the same weights; before it the model learns from
    the newest days whose labels are known by then.
    """

    @property
    def _late(self) -> int:
        """Steps between a step and the newest one whose labels it may use."""
        return 1 + math.ceil(self.reach_ / self.interval)

    def _learnable(self, panel: Panel, first: int) -> np.ndarray:
        """Newest days to learn from before the step that begins on day `first`."""
        end = first - self.reach_
        return np.arange(max(0, end - self.interval), max(0, end))

    def _update(self, network, optimiser, panel, first, device) -> None:
        """Learn what has become known before the step that begins on day `first`."""
        if self.adapt == "none":
            return
        with repeatable(panel.dates[first]):
            if self.adapt == "double_adapt":
                scored = first - self._late * self.interval
                days = self._learnable(panel, scored)
                whole = scored >= 0 and len(days) == self.interval
                if whole and panel.dates[scored] >= self.anchor_:
                    self._meta_step(network, optimiser, panel, days, device)
                return
            days = self._learnable(panel, first)
            network.train()
            for batch, _ in self._to_learn(
                panel, days[panel.dates[days] > self.trained_to_], device
            ):
                loss, _ = self.loss(self._outputs(network, batch), batch)
                if loss.requires_grad:
                    descend(loss, optimiser, self.clip_value)

    def _forward(
        self,
        network,
        panel,
        days,
        keys,
        device,
        stream: Stream | None = None,
        first: int = 0,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Walk to the last of `days`, learning on the way; yield what is asked for."""
        stream = stream or Stream()
        network = copy.deepcopy(network)
        begin = self.anchor_
        if stream.state is not None:
            begin = stream.state["step"]
            network.load_state_dict(stream.state["network"])
        if panel.dates[0] > begin or (stream.state and panel.dates[days[0]] < begin):
            raise ValueError(
                f"the walk goes on from {begin:%Y-%m-%d}, the data begin "
                f"{panel.dates[0]:%Y-%m-%d} and the segment "
                f"{panel.dates[days[0]]:%Y-%m-%d}."
            )
        optimiser = self.optimiser(network)
        if self.adapt == "naive":
            for group in optimiser.param_groups:
                group["lr"] = self.step_lr
        network.restore(optimiser)
        at = int(panel.dates.searchsorted(begin))
        # Days before the walk are scored by what was trained.
        yield from self._scored(
            network, None, panel, days[days < at], days, keys, device
        )
        resumed = stream.state is not None
        first = at
        for first in range(at, int(days[-1]) + 1, self.interval):
            if not (resumed and first == at):
                self._update(network, optimiser, panel, first, device)
            step = np.arange(first, min(first + self.interval, int(days[-1]) + 1))
            if step[-1] < days[0]:
                continue
            weights = None
            if self.adapt == "double_adapt":
                learnable = self._learnable(panel, first)
                if len(learnable):
                    with repeatable(panel.dates[first]):
                        weights = self._step(network, panel, learnable, device)
            yield from self._scored(network, weights, panel, step, days, keys, device)
        if days[-1] >= at:
            network.keep(optimiser)
            stream.state = {"step": panel.dates[first], "network": cpu_state(network)}

    @torch.no_grad()
    def _scored(self, network, weights, panel, step, days, keys, device):
        """Yield the outputs of those of `days` that are in a step."""
        network.eval()
        for part in self._pieces(step):
            wanted = np.isin(part, days)
            if not wanted.any():
                continue
            batch = self._batch(panel, part, device)
            out = for_all(self._outputs(network, batch, weights), batch, keys)
            yield {k: v[torch.from_numpy(wanted)] for k, v in out.items()}

    def _streams(self) -> list[Stream]:
        begin = self.__dict__.pop("_begin", None)
        # Not pickled: it belongs to the last prediction, not to what was trained.
        self._walked = [Stream(s) for s in begin or [None] * len(self.states_)]
        return self._walked

    def last_labels(
        self, dates: pd.DatetimeIndex, days: pd.DatetimeIndex
    ) -> pd.DataFrame:
        """Last label that touched the scores of each day.

        Parameters
        ----------
        dates : DatetimeIndex
            Trading days, from the start of segment `valid` or earlier.
        days : DatetimeIndex
            Scored days.

        Returns
        -------
        DataFrame
            By datetime: `label`, the last day whose labels had a say, be it that an
            epoch was chosen by them; `known`, the day of their last price.
        """
        at, anchor = dates.get_indexer(days), int(dates.searchsorted(self.anchor_))
        step = anchor + (at - anchor) // self.interval * self.interval
        label = np.full(
            len(at), int(dates.searchsorted(self.selected_to_, "right")) - 1
        )
        if self.adapt != "none":
            walked = np.where(at >= anchor, step - self.reach_ - 1, -1)
            label = np.maximum(label, walked)
        known = np.minimum(label + self.reach_, len(dates) - 1)
        return pd.DataFrame(
            {"label": dates[label], "known": dates[known]},
            index=pd.DatetimeIndex(days, name="datetime"),
        )

    def online_state(self) -> dict[str, Any] | None:
        """State at the end of the last prediction, to be taken up; None without one.

        Returns
        -------
        dict
            `step`, the first day of the step in force as ISO text, and `networks`, a
            state dict a seed.
        """
        states = [s.state for s in self.__dict__.get("_walked", ())]
        if not states or any(s is None for s in states):
            return None
        return {
            "step": states[0]["step"].isoformat(),
            "networks": [s["network"] for s in states],
        }

    def take_up(self, state: dict[str, Any]) -> None:
        """Let the next prediction go on from a state that `online_state` gave.

        Raises
        ------
        ValueError
            If it is of another number of seeds.
        """
        if len(state["networks"]) != len(self.states_):
            raise ValueError(
                f"`state` has {len(state['networks'])} networks, the model "
                f"{len(self.states_)}."
            )
        step = pd.Timestamp(state["step"])
        self._begin = [{"step": step, "network": n} for n in state["networks"]]


@contextmanager
def repeatable(day: pd.Timestamp) -> Iterator[None]:
    """Random numbers that depend on the day only: a resumed walk draws the same."""
    # Without a device PyTorch would queue a call, with its traceback, for each kind.
    everywhere = torch.cuda.is_initialized()
    seed = torch.manual_seed if everywhere else torch.default_generator.manual_seed
    with torch.random.fork_rng(devices=[]):
        seed(day.toordinal())
        yield
