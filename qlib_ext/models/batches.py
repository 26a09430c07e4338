"""What a network reads and what its training keeps: batches, epochs, progress.

Glossary: t days of the panel, n instruments of the batch, f features, l look-back days,
c scored days of a batch, d hidden width, q labels, r risk columns.
"""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from qlib_ext.dataset import Panel
from qlib_ext.graphs import EdgeSeries
from qlib_ext.nn.graph_attention import Neighbors

__all__ = [
    "WATCHERS",
    "Batch",
    "Draw",
    "Epoch",
    "Network",
    "Progress",
    "Stream",
    "cpu_state",
    "descend",
    "few_threads",
    "for_all",
    "mean_state",
    "memory_kept",
    "watch_epochs",
]


@dataclass
class Batch:
    """The stocks of `c` consecutive days.

    Attributes
    ----------
    days : int array [c]
        Positions of the scored days in the panel.
    stocks : int array [n]
        Positions of the instruments in the panel.
    x : float32 Tensor [l + c - 1, n, f]
        Features, time first; shorter at the beginning of the panel. None when the
        state is carried through a stream.
    mask : bool Tensor [c, n]
        Presence on the scored day.
    label, raw_label : float32 Tensor [c, n, q]
        NaN is no label.
    risk : float32 Tensor [c, n, r] or None
    panel : Panel
        All the data, for graphs. A model may read days up to the scored one only.
    """

    days: np.ndarray
    stocks: np.ndarray
    x: torch.Tensor | None
    mask: torch.Tensor
    label: torch.Tensor
    raw_label: torch.Tensor
    risk: torch.Tensor | None
    panel: Panel

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Take the part [c, n, ...] of what the panel has [t, n, ...] beside it."""
        return values[self.days][:, self.stocks].to(self.mask.device)

    def neighbors(
        self, graphs: Sequence[EdgeSeries], self_loops: bool = True
    ) -> list[Neighbors]:
        """Edges of each graph between the stocks of each day."""
        return [
            Neighbors.of(
                graph.batch(self.days, self.stocks, self.mask),
                self.mask.numel(),
                self_loops=self_loops,
            ).to(self.mask.device)
            for graph in graphs
        ]


class Draw(NamedTuple):
    """What a training batch is made of.

    Attributes
    ----------
    days : int array [c]
        Positions of the scored days in the panel.
    stocks : int array or None
        Positions of the instruments it may hold; None is all.
    """

    days: np.ndarray
    stocks: np.ndarray | None = None


@dataclass
class Stream:
    """State of an encoder that is carried through a stream."""

    state: Any = None


class Network(nn.Module):
    """A sequence encoder, then a head that may look across the day's stocks.

    Subclasses set `encoder`, whose ``forward(x[l, n, f], state)`` returns
    ``(h[l, n, d], state)``, in `windows` mode at least h of the last day, and treats
    every stock alike and by itself, but for what `TorchModel.day_inputs` tells it of
    the day; and define `head`.
    """

    encoder: nn.Module

    def head(self, h: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the outputs of the scored days.

        Parameters
        ----------
        h : Tensor [c, n, d]
        batch : Batch
            `x` may be None when predicting in a stream.

        Returns
        -------
        dict of str to Tensor [c, n, ...]
            At least `score` [c, n].
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Epoch:
    """An epoch of training that is about to begin; see `watch_epochs`.

    Attributes
    ----------
    model : TorchModel
    network : Network
        As the epoch before has left it.
    panel : Panel
    number : int
        From 0 on.
    batches : list of Draw
        In the order of training.
    device : torch.device
    """

    model: Any
    network: Network
    panel: Panel
    number: int
    batches: list[Draw]
    device: torch.device

    def batch(self, draw: Draw) -> Batch:
        """Load a batch."""
        return self.model._batch(self.panel, draw.days, self.device, draw.stocks)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Encode a batch: hidden states [c, n, d] of its scored days."""
        assert batch.x is not None
        return self.model._encode(self.network, batch.x, len(batch.days))


WATCHERS: list[Callable[[Epoch], None]] = []


@contextmanager
def watch_epochs(watch: Callable[[Epoch], None]) -> Iterator[None]:
    """Call `watch` before every epoch of every `TorchModel` meanwhile.

    It may look at batches and network, and must leave the network's weights as they
    are.
    """
    WATCHERS.append(watch)
    try:
        yield
    finally:
        WATCHERS.remove(watch)


@dataclass
class Progress:
    """How far training has come: the epochs, and the best weights among them.

    Attributes
    ----------
    measure : str
        What decides, a key of each epoch's row.
    better : function
        ``better(new, best)``, by default `operator.gt`.
    keep : int
        How many of the best epochs are kept.
    history : list of dict
        One row an epoch.
    kept : dict of int to dict of str to Tensor
        Weights after the best epochs, the best first, on the CPU; -1 is before the
        first, if that counts.
    untrained : float or None
        Value of -1.
    """

    measure: str
    better: Callable[[float, float], bool] = operator.gt
    keep: int = 1
    history: list[dict[str, float]] = field(default_factory=list)
    kept: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    untrained: float | None = None

    @property
    def best(self) -> dict[str, torch.Tensor]:
        """Mean of the weights after the best epochs."""
        return mean_state(list(self.kept.values()))

    @property
    def best_epoch(self) -> int:
        """The best epoch; -1 before the first."""
        return next(iter(self.kept), -1)

    @property
    def best_value(self) -> float | None:
        """Value of the best epoch; None before there is one."""
        return self._value(self.best_epoch) if self.kept else None

    def _value(self, epoch: int) -> float:
        if epoch >= 0:
            return self.history[epoch][self.measure]
        assert self.untrained is not None  # given with the weights of -1
        return self.untrained

    def epochs(self, n_epochs: int, early_stop: int) -> Iterator[int]:
        """Give the epochs to come, until `early_stop` of them were no better."""
        for epoch in range(len(self.history), n_epochs):
            if epoch - self.best_epoch > early_stop:
                return
            yield epoch

    def add(self, row: dict[str, float], network: nn.Module) -> None:
        """Take an epoch's row, and the weights if they are among the best so far."""
        self.history.append(row)
        new, order = len(self.history) - 1, list(self.kept)
        # Behind all that it does not beat: of two alike the earlier is the better.
        value = row[self.measure]
        order.insert(sum(not self.better(value, self._value(e)) for e in order), new)
        if new in (order := order[: self.keep]):
            states = {**self.kept, new: cpu_state(network)}
            self.kept = {epoch: states[epoch] for epoch in order}


def descend(
    loss: torch.Tensor, optimiser: torch.optim.Optimizer, clip_value: float = 0.0
) -> None:
    """Take one step down the gradient of `loss`; `clip_value` 0 is off."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if clip_value > 0:
        for group in optimiser.param_groups:
            nn.utils.clip_grad_value_(group["params"], clip_value)
    optimiser.step()


def for_all(out: dict, batch: Batch, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Spread a batch's outputs [c, n, ...] over all instruments, on the CPU."""
    stocks, for_all = torch.from_numpy(batch.stocks), {}
    for key in keys:
        value = out[key].float().cpu()
        full = torch.zeros(
            len(batch.days), len(batch.panel.instruments), *value.shape[2:]
        )
        full[:, stocks] = value
        for_all[key] = full
    return for_all


def cpu_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Copy a network's weights to the CPU."""
    return {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}


def mean_state(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Average the weights of several states; what is no fraction is the first's."""
    mean = dict(states[0])
    for name, value in mean.items():
        if value.is_floating_point():
            mean[name] = torch.stack([state[name] for state in states]).mean(0)
    return mean


_SMALL = 300_000  # weights; a GRU of two layers of 64 has 50,000, MASTER 740,000
# Of glibc's mallopt: from which size on a block is given back at once, and how much
# free memory at the end of the heap is; and the most that either grows to by itself.
_BLOCK, _HEAP, _USUAL = -3, -1, 32 << 20


@contextmanager
def few_threads(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Train a small network on one thread of the processor, until the end.

    A second thread gains about a sixth on products of this size, and costs two thirds
    and more where other programs want the cores (docs/operating.md). A rule, no trial:
    last digits depend on the number of threads, and scores must not on what else ran.
    Who sets OMP_NUM_THREADS is obeyed.
    """
    before = torch.get_num_threads()
    small = sum(p.numel() for p in network.parameters()) <= _SMALL
    if small and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep the memory that a batch frees for the next one, until the end.

    glibc gives blocks of more than 32 MiB back, and each batch fetches them anew, page
    by page: a tenth to a sixth of training on 1,200 stocks. Without glibc nothing is
    done.
    """
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    kept = hasattr(libc, "mallopt") and libc.mallopt(_BLOCK, 1 << 30)
    if kept:
        libc.mallopt(_HEAP, 1 << 30)
    try:
        yield
    finally:
        if kept:
            libc.mallopt(_BLOCK, _USUAL)
            libc.mallopt(_HEAP, 2 * _USUAL)
            libc.malloc_trim(0)
