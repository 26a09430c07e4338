"""Daily fields of a store as blocks of stocks, and the evaluation of trees on them.

Glossary: t days; n stocks; k expressions; m dates of the fitness. A block is
``[t, 64]``, small enough for a core's cache; stocks are spread over blocks by a
checksum of their code, so every block is a random sample of the market that does not
depend on which other stocks there are.
"""

from __future__ import annotations

import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data_handlers.labels import forward_return, label_reach
from qlib_ext.metrics import non_overlapping
from qlib_ext.mining import kernels
from qlib_ext.mining.expression import Node

__all__ = ["BLOCK", "Evaluator", "MiningPanel", "apply", "load_panel"]

#: Stocks in a block.
BLOCK = 64


@dataclass
class MiningPanel:
    """Fields, forward returns and dates of the fitness.

    Attributes
    ----------
    days : DatetimeIndex [t]
        Trading days; those before the fitness' first day only feed look-back windows.
    instruments : list of str [n]
        In the order of their blocks.
    fields : dict of str to float32 [t, n]
        By name with ``$``; NaN where a stock has no value.
    dates : int array [m]
        Positions of the fitness' dates, `horizon` days apart: labels do not overlap.
    label : Tensor [m, n]
        Forward returns of traded members of the universe, else NaN. Days whose return
        would end after the panel's last day have none.
    member : bool array [m, n]
        Traded members of the universe.
    """

    days: pd.DatetimeIndex
    instruments: list[str]
    fields: dict[str, np.ndarray]
    dates: np.ndarray
    label: Tensor
    member: np.ndarray

    @property
    def checksum(self) -> str:
        """Short text that changes with the data."""
        value = zlib.crc32(",".join(self.instruments).encode())
        for name in sorted(self.fields):
            value = zlib.crc32(name.encode(), value)
            value = zlib.crc32(np.ascontiguousarray(self.fields[name]).data, value)
        value = zlib.crc32(np.ascontiguousarray(self.label.numpy()).data, value)
        return f"{value:08x}"


def load_panel(
    fields: Sequence[str],
    universe: Any,
    start: Any,
    end: Any,
    *,
    horizon: int = 10,
    price: str = "close",
    look_back: int = 250,
    freq: str = "day",
) -> MiningPanel:
    """Read fields and returns through Qlib; nothing after `end` is read into them.

    Parameters
    ----------
    fields : sequence of str
        Names without ``$``.
    universe : str
        Market; membership counts day by day.
    start, end : date-like
        First and last day of the fitness, inclusive.
    horizon, price : int, str
        Label, see `data_handlers.labels.forward_return`.
    look_back : int
        Trading days read before `start`, as many as the longest expression needs.
    freq : str
        Qlib's frequency.

    Raises
    ------
    ValueError
        If the market has no member, the range no trading day, a field no value, or no
        date has a label.
    """
    from qlib.data import D

    from data_handlers.loaders import membership_mask

    days = pd.DatetimeIndex(D.calendar(freq=freq))
    start, end = pd.Timestamp(start), pd.Timestamp(end)
    first, last = days.searchsorted(start), days.searchsorted(end, side="right") - 1
    if start > end or last < first:
        raise ValueError(
            f"the store has no trading day from {start.date()} to {end.date()}; its "
            f"calendar runs from {days[0].date()} to {days[-1].date()}."
        )
    begin = max(0, first - look_back)
    days = days[begin : last + 1]
    spans = D.list_instruments(
        D.instruments(universe), start, end, freq=freq, as_list=False
    )
    if not spans:
        raise ValueError(
            f"`universe` {universe!r} has no member from {start.date()} to "
            f"{end.date()}."
        )
    codes = sorted(spans, key=lambda c: (zlib.crc32(c.encode()), c))
    names = ["$" + f.removeprefix("$") for f in fields]
    if "$close" not in names:
        names = [*names, "$close"]
    wanted = [*names, forward_return(horizon, price)]
    data = D.features(codes, wanted, days[0], days[-1], freq=freq)
    cube = _cube(data, days, codes)
    for k, name in enumerate(names):
        if not np.isfinite(cube[k]).any():
            raise ValueError(f"`fields`: the store has no value of {name} there.")
    reach = label_reach(horizon)
    label = cube[-1].copy()
    label[-reach:] = np.nan
    member = membership_mask(spans, days, codes)
    member &= np.isfinite(cube[names.index("$close")])
    label[~member] = np.nan
    known = np.isfinite(label).sum(1).astype(float)
    known[: first - begin] = 0
    dates = non_overlapping(
        torch.from_numpy(np.where(known >= 2, known, np.nan)), horizon
    ).numpy()
    if len(dates) < 3:
        raise ValueError(
            f"from {start.date()} to {end.date()} there are {len(dates)} dates with "
            f"{horizon}-day returns that do not overlap; at least 3 are needed."
        )
    return MiningPanel(
        days=days,
        instruments=codes,
        fields={name: cube[k] for k, name in enumerate(names)},
        dates=dates,
        label=torch.from_numpy(np.ascontiguousarray(label[dates])),
        member=member[dates],
    )


def _cube(data: pd.DataFrame, days: pd.DatetimeIndex, codes: list[str]) -> np.ndarray:
    """Float32 ``[columns, t, n]`` of a frame indexed by instrument and datetime."""
    stock = pd.Index(codes).get_indexer(data.index.get_level_values("instrument"))
    day = days.get_indexer(data.index.get_level_values("datetime"))
    out = np.full((data.shape[1], len(days), len(codes)), np.nan, np.float32)
    out[:, day, stock] = data.to_numpy(np.float32).T
    return out


def apply(node: Node, values: Sequence[np.ndarray]) -> np.ndarray:
    """Value of one operator from the values of its trees, each ``[t, n]``.

    Element-wise operators keep float32 where Qlib keeps it; rolling ones give float64.
    """
    op, numbers = node.op, node.numbers
    x = values[0]
    w = int(numbers[0]) if numbers else 0
    with np.errstate(all="ignore"):
        if op == "Ref":
            return kernels.shift(x, w)
        if op == "Delta":
            return x - kernels.shift(x, w)
        if op == "Mean":
            return kernels.rolling_mean(x, w)
        if op == "Sum":
            return kernels.rolling_sum(x, w)
        if op == "Std":
            return kernels.rolling_std(x, w)
        if op in ("Max", "Min"):
            return kernels.rolling_extreme(x, w, op == "Max")
        if op == "Med":
            return kernels.rolling_quantile(x, w, 0.5)
        if op == "Quantile":
            return kernels.rolling_quantile(x, w, numbers[1])
        if op == "Rank":
            return kernels.rolling_rank(x, w)
        if op in ("Slope", "Resi", "Rsquare"):
            return kernels.rolling_regression(x, w, op.lower())
        if op == "Abs":
            return np.abs(x)
        if op == "Sign":
            return np.sign(x.astype(np.float32))
        if op == "Log":
            return np.log(x)
        y = values[1]
        if op == "Corr":
            return kernels.rolling_corr(x, y, w)
        if op == "Cov":
            return kernels.rolling_cov(x, y, w)
        if op == "Add":
            return x + y
        if op == "Sub":
            return x - y
        if op == "Mul":
            return x * y
        if op == "Div":
            return x / y
        if op == "Greater":
            return np.maximum(x, y)
        if op == "Less":
            return np.minimum(x, y)
        if op == "IfGreater":
            return np.where(x > y, values[2], values[3])
    raise ValueError(f"operator {op!r} is not in the table.")


class Evaluator:
    """Evaluates batches of trees, block by block, each shared subtree once.

    Parameters
    ----------
    fields : mapping of str to float32 [t, n]
        By name with ``$``.
    cache_mib : float, default 512
        Memory for subtrees that more than one expression used, kept for later batches;
        the least recently used goes first.
    block : int, default 64
        Stocks at once.

    Attributes
    ----------
    n_blocks : int
    shared, computed : int
        Operators taken from shared results, and calculated, per block.
    """

    def __init__(
        self,
        fields: Mapping[str, np.ndarray],
        cache_mib: float = 512.0,
        block: int = BLOCK,
    ) -> None:
        self.shape = next(iter(fields.values())).shape
        self.slices = [
            slice(i, min(i + block, self.shape[1]))
            for i in range(0, self.shape[1], block)
        ]
        self.n_blocks = len(self.slices)
        self._fields = [
            {name: np.ascontiguousarray(x[:, part]) for name, x in fields.items()}
            for part in self.slices
        ]
        self._kept: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._room = int(cache_mib * 2**20)
        self.shared = self.computed = 0
        self._unstable: set[str] = set()

    def is_unstable(self, node: Node) -> bool:
        """Whether a regression in it met an infinite value.

        Qlib's running sums never recover from one, so all later values would depend on
        where a query begins.
        """
        return bool(self._unstable) and any(
            n.text in self._unstable for n in _below(node)
        )

    def evaluate(
        self,
        nodes: Sequence[Node],
        dates: np.ndarray | None = None,
        blocks: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Values as Qlib would give them.

        Parameters
        ----------
        nodes : sequence of Node [k]
        dates : int array [m], optional
            Days to return; default all.
        blocks : sequence of int, optional
            Blocks to evaluate, default all.

        Returns
        -------
        float32 array [k, m, n]
            n the stocks of the blocks, in their order.

        Raises
        ------
        ValueError
            If a tree has a field that the panel lacks.
        """
        chosen = range(self.n_blocks) if blocks is None else blocks
        for node in nodes:
            for _, leaf in node.walk():
                if not leaf.args and leaf.op not in self._fields[0]:
                    raise ValueError(f"{node.text}: the panel has no field {leaf.op}.")
        uses = Counter(n.text for root in nodes for n in _below(root))
        days = self.shape[0] if dates is None else len(dates)
        widths = [self.slices[b].stop - self.slices[b].start for b in chosen]
        out = np.empty((len(nodes), days, sum(widths)), np.float32)
        at = 0
        for b, width in zip(chosen, widths, strict=True):
            left = Counter(uses)
            local: dict[str, np.ndarray] = {}
            for k, node in enumerate(nodes):
                value = self._value(node, b, local, left, uses)
                with np.errstate(over="ignore"):
                    out[k, :, at : at + width] = (
                        value if dates is None else value[dates]
                    )
            at += width
        return out

    def _value(
        self,
        node: Node,
        b: int,
        local: dict[str, np.ndarray],
        left: Counter[str],
        uses: Counter[str],
    ) -> np.ndarray:
        if not node.args:
            return self._fields[b][node.op]
        text = node.text
        left[text] -= 1
        found = local.get(text)
        if found is None:
            found = self._kept.get((b, text))
            if found is not None:
                self._kept.move_to_end((b, text))
        if found is not None:
            self.shared += 1
            for inner in _below(node)[1:]:
                left[inner.text] -= 1
                if left[inner.text] <= 0:
                    local.pop(inner.text, None)
            if left[text] <= 0:
                local.pop(text, None)
            return found
        values = [self._value(a, b, local, left, uses) for a in node.args]
        if node.op in ("Slope", "Resi", "Rsquare") and np.isinf(values[0]).any():
            self._unstable.add(text)
        result = apply(node, values)
        self.computed += 1
        if left[text] > 0:
            local[text] = result
        if uses[text] > 1:
            self._keep((b, text), result)
        return result

    def _keep(self, key: tuple[int, str], value: np.ndarray) -> None:
        if value.nbytes > self._room:
            return
        self._room -= value.nbytes
        self._kept[key] = value
        while self._room < 0:
            self._room += self._kept.popitem(last=False)[1].nbytes


def _below(root: Node) -> list[Node]:
    """Operators of a tree as `Evaluator` meets them where nothing is shared."""
    return [n for _, n in root.walk() if n.args]
