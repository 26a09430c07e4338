"""What a torch model's fit gets: which days a batch holds, and what rows share.

The outermost module calls of the first batches are recorded while `fit` runs. Rows are
traced back to their day by their values, which works whatever sampler or loader made
the batch. Whether a module computes across the batch is tried out: other rows are
changed, and the score of the first must stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset import DatasetH, TSDataSampler
from torch import nn
from torch.nn.modules import module as hooks

from qlib_ext.models._base import Batch, Epoch, watch_epochs

__all__ = ["BatchTrace"]

CALLS = 12  # outermost module calls that are kept
SAME = 1e-4  # of the outputs' spread: below it two outputs are one, but for rounding


@dataclass
class BatchTrace:
    """Batches of a fit.

    Attributes
    ----------
    own : list of dict
        For models of this package: `model`, `days` in a batch, `consecutive`,
        `difference` between a day's scores in the batch and alone (in their spread).
    calls : list of (Module, args)
        Outermost calls in training, with the module as it is after the fit.
    sources : list of (rows, days)
        Feature rows that the fit asked the data set for.
    learn_windows : bool
        Whether the fit got windows over the learning frame.
    """

    own: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[nn.Module, tuple]] = field(default_factory=list)
    sources: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    learn_windows: bool = False
    _tables: dict[int, dict[bytes, int]] = field(default_factory=dict)

    @contextmanager
    def watching(self, dataset: DatasetH) -> Iterator[None]:
        """Record what happens meanwhile."""
        depth = 0
        original = dataset.prepare

        def prepare(*args, **kwargs):
            found = original(*args, **kwargs)
            for part in found if isinstance(found, list) else [found]:
                self._note_rows(part)
                if isinstance(part, TSDataSampler):
                    self.learn_windows |= kwargs.get("data_key") == "learn"
            return found

        def enter(layer, args):
            nonlocal depth
            depth += 1
            if depth > 1 or not layer.training or len(self.calls) >= CALLS:
                return
            x = first_tensor(args)
            if x is not None and x.ndim >= 2 and len(x) > 1:
                kept = [
                    a.detach().clone() if isinstance(a, torch.Tensor) else a
                    for a in args
                ]
                self.calls.append((layer, tuple(kept)))

        def leave(layer, args, output):
            nonlocal depth
            depth -= 1

        def first(epoch: Epoch) -> None:
            if epoch.number == 0:
                self._try_own(epoch)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(dataset, "prepare", prepare))
            stack.enter_context(watch_epochs(first))
            before = hooks.register_module_forward_pre_hook(enter)
            stack.callback(before.remove)
            after = hooks.register_module_forward_hook(leave, always_call=True)
            stack.callback(after.remove)
            yield

    # ---- rows and their days -------------------------------------------------------

    def _note_rows(self, part: Any) -> None:
        """Keep the feature rows of prepared data, with their days."""
        if isinstance(part, TSDataSampler):
            table = part.idx_df
            cell = table.to_numpy(dtype=float)
            row, _ = np.nonzero(np.isfinite(cell))
            number = cell[np.isfinite(cell)].astype(int)
            days = np.full(len(part.data_arr), -1)
            days[number] = row
            stamps = pd.DatetimeIndex(table.index).asi8
            known = days >= 0
            self.sources.append(
                (part.data_arr[known].astype(np.float32), stamps[days[known]])
            )
        elif isinstance(part, pd.DataFrame) and part.index.nlevels == 2:
            frame = part
            if frame.columns.nlevels > 1:
                groups = frame.columns.get_level_values(0)
                if "feature" in groups:
                    frame = frame.loc[:, groups == "feature"]
            values = frame.to_numpy(dtype=np.float32)
            days = pd.DatetimeIndex(part.index.get_level_values("datetime")).asi8
            self.sources.append((values, days))

    def days_of(self, x: torch.Tensor) -> tuple[np.ndarray, int]:
        """Days of the rows of a batch that could be traced, and how many rows it has.

        Of a batch of windows [n, l, f] the last day's rows are looked up, of flat rows
        [n, f] the rows themselves.
        """
        last = x[:, -1, :] if x.ndim == 3 else x.reshape(len(x), -1)
        rows = last.detach().cpu().float().numpy()
        days = self._days(rows)
        if (days < 0).mean() > 0.5 and x.ndim == 3:  # features before days
            days = self._days(x[:, :, -1].detach().cpu().float().numpy())
        return days[days >= 0], len(rows)

    def _days(self, rows: np.ndarray) -> np.ndarray:
        width = rows.shape[1]
        if width not in self._tables:
            self._tables[width] = self._table(width)
        table = self._tables[width]
        rows = np.ascontiguousarray(rows)
        return np.array([table.get(row.tobytes(), -1) for row in rows], np.int64)

    def _table(self, width: int) -> dict[bytes, int]:
        """Day by the bytes of a row's first features; -1 where two days share them."""
        table: dict[bytes, int] = {}
        for values, days in self.sources:
            if values.shape[1] < width:
                continue
            block = np.ascontiguousarray(values[:, :width])
            for row, day in zip(block, days, strict=True):
                key = row.tobytes()
                if table.setdefault(key, int(day)) != day:
                    table[key] = -1
        return table

    # ---- do rows share? ------------------------------------------------------------

    @staticmethod
    @torch.no_grad()
    def crosses(layer: nn.Module, args: tuple, training: bool) -> float:
        """How far a row's output moves, in spreads, when the other rows change.

        Parameters
        ----------
        training : bool
            Whether batch statistics are taken from the batch; dropout is off anyway.
        """
        was = {m: m.training for m in layer.modules()}
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        try:
            layer.eval()
            if training:
                for m in layer.modules():
                    if isinstance(m, nn.modules.batchnorm._BatchNorm):
                        m.train()
            at = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
            x = args[at]
            one = first_tensor(layer(*args))
            worst = 0.0
            for row in (0, len(x) // 2):
                other = 1.7 * x.flip(0) + 0.3
                other[row] = x[row]
                changed = (*args[:at], other, *args[at + 1 :])
                two = first_tensor(layer(*changed))
                if one is None or two is None or len(one) != len(x):
                    return float("nan")
                move = (one[row] - two[row]).abs().max()
                worst = max(worst, float(move / one.float().std().clamp_min(1e-12)))
            return worst
        finally:
            layer.load_state_dict(state)
            for m, mode in was.items():
                m.training = mode

    @torch.no_grad()
    def _try_own(self, epoch: Epoch) -> None:
        """Score the days of a batch together and one by one."""
        draw = max(epoch.batches, key=lambda one: len(one.days))
        network = epoch.network
        network.eval()
        batch = epoch.batch(draw)
        h = epoch.hidden(batch)
        if len(h) != len(batch.days):
            # A task of windows: its model encodes each day by itself, so ask one.
            draw = draw._replace(days=draw.days[-1:])
            batch = epoch.batch(draw)
            h = epoch.hidden(batch)
        days = draw.days
        together = network.head(h, batch)["score"]
        worst = 0.0
        for j in range(len(days)):
            here = slice(j, j + 1)
            one = Batch(
                days=batch.days[here],
                stocks=batch.stocks,
                x=None,
                mask=batch.mask[here],
                label=batch.label[here],
                raw_label=batch.raw_label[here],
                risk=None if batch.risk is None else batch.risk[here],
                panel=epoch.panel,
            )
            alone = network.head(h[here], one)["score"]
            known = batch.mask[j]
            if known.any():
                move = (alone[0] - together[j])[known].abs().max()
                worst = max(worst, float(move))
        spread = float(together[batch.mask].std().clamp_min(1e-12))
        network.train()
        self.own.append(
            {
                "model": type(epoch.model).__name__.lstrip("_"),
                "days": len(days),
                "consecutive": bool((np.diff(days) == 1).all()),
                "difference": worst / spread,
            }
        )


def first_tensor(value: Any) -> torch.Tensor | None:
    """First floating tensor of nested arguments or outputs."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, (list, tuple)):
        for item in value:
            if (found := first_tensor(item)) is not None:
                return found
    if isinstance(value, dict):
        return first_tensor(list(value.values()))
    return None
