"""Many expressions on a panel: shared work, blocks that fit a cache, one pass.

The trees of all expressions become one plan: equal subtrees once, rolling operators
that differ in their windows alone as one step, each step with the number of days
before and after that later steps look at. The plan is run for one block at a time, so
many stocks and so many days, and what is no longer needed goes at once. No value
depends on where a block begins or ends.

Glossary: t days; n stocks; k expressions; m days asked for.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numba as nb
import numpy as np
from tqdm import tqdm

from data_handlers.expression.operators import (
    CROSS,
    GROUPS,
    elementwise,
    lagged,
    rolling,
)
from data_handlers.expression.panel import FieldPanel
from data_handlers.expression.parse import Node, Unsupported

__all__ = ["BLOCK", "Evaluator", "Plan"]

#: Stocks of a block that holds all days, as mining asks for them.
BLOCK = 64
# Cells of a block of a table, whose arrays are to fit into a cache, and its fewest
# stocks: rows of a day lie together.
_CELLS, _WIDE = 2**17, 320
_FIELDS = re.compile(r"\$(\w+\()")


@dataclass
class Step:
    """One call: the operators that share their trees and a kernel."""

    group: str
    nodes: list[Node]
    inputs: tuple[str, ...]


@dataclass
class Plan:
    """Steps in an order in which each finds its inputs.

    Attributes
    ----------
    roots : list of Node [k]
    steps : list of Step
    back, ahead : dict of str to int
        Days before and after a block that a subtree is needed on.
    uses : Counter
        How many steps and roots read a subtree.
    """

    roots: list[Node]
    steps: list[Step] = field(default_factory=list)
    back: Counter[str] = field(default_factory=Counter)
    ahead: Counter[str] = field(default_factory=Counter)
    uses: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, roots: Sequence[Node]) -> Plan:
        """Plan for some expressions."""
        plan = cls(list(roots))
        order: dict[str, Node] = {}
        for root in roots:
            _collect(root, order)
        level: dict[str, int] = {}
        groups: dict[tuple, Step] = {}
        for text, node in order.items():
            level[text] = 1 + max((level[a.text] for a in node.args), default=0)
            if not node.args:
                continue
            inputs = tuple(a.text for a in node.args)
            group = GROUPS.get(node.op, "")
            key = (group, inputs) if group else (text,)
            if key not in groups:
                groups[key] = Step(group, [], inputs)
            groups[key].nodes.append(node)
        # Depth first for what is left: a step runs just before its first reader.
        made: set[str] = set()
        of_text = {n.text: s for s in groups.values() for n in s.nodes}

        def add(text: str) -> None:
            step = of_text.get(text)
            if step is None or text in made:
                return
            made.update(n.text for n in step.nodes)
            for name in step.inputs:
                add(name)
            plan.steps.append(step)

        for root in roots:
            add(root.text)
        for step in plan.steps:
            plan.uses.update(set(step.inputs))
        plan.uses.update(r.text for r in roots)
        for text in sorted(level, key=lambda name: -level[name]):
            node = order[text]
            for child in node.args:
                back = plan.back[text] + max(0, node.own_back)
                plan.back[child.text] = max(plan.back[child.text], back)
                ahead = plan.ahead[text] + max(0, -node.own_back)
                plan.ahead[child.text] = max(plan.ahead[child.text], ahead)
        return plan


def _collect(node: Node, order: dict[str, Node]) -> None:
    if node.text in order:
        return
    for child in node.args:
        _collect(child, order)
    order[node.text] = node


_compiled = nb.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _place(values, runs, out):
    """Write a block's values to a column; a run is (day, first stock, last, row)."""
    for t, a, b, row in runs:
        to, x = out[row : row + b - a], values[t, a:b]
        for s in range(len(to)):
            to[s] = x[s]


@_compiled
def _place_quotient(values, others, runs, out):
    for t, a, b, row in runs:
        to, x, y = out[row : row + b - a], values[t, a:b], others[t, a:b]
        for s in range(len(to)):
            to[s] = x[s] / y[s]


@_compiled
def _place_difference(values, others, runs, out):
    for t, a, b, row in runs:
        to, x, y = out[row : row + b - a], values[t, a:b], others[t, a:b]
        for s in range(len(to)):
            to[s] = x[s] - y[s]


# What most expressions do last is done while their values are written.
_LAST = {"Div": _place_quotient, "Sub": _place_difference}


@_compiled
def _runs(rows):
    """Stocks of a day side by side whose rows are so as well; row -1 is nowhere."""
    found = [(0, 0, 0, rows[0, 0])]  # so that a block without rows has a type
    for t in range(rows.shape[0]):
        a = 0
        while a < rows.shape[1]:
            b = a + 1
            if rows[t, a] >= 0:
                while b < rows.shape[1] and rows[t, b] == rows[t, b - 1] + 1:
                    b += 1
                found.append((t, a, b, rows[t, a]))
            a = b
    return np.array(found)[1:]


class Evaluator:
    """Evaluates expressions on a panel, block by block.

    Parameters
    ----------
    panel : FieldPanel, or mapping of str to float32 [t, n]
        Fields by name with ``$``.
    cache_mib : float, default 0
        Memory for subtrees that more than one expression used, kept for later calls;
        the least recently used goes first. With one, a block holds all days.
    block : int, optional
        Stocks at once; default at least 320, more for few days.
    threads : int, default 1

    Attributes
    ----------
    n_blocks : int
    shared, computed : int
        Operators taken from shared results, and calculated, per block.
    """

    def __init__(
        self,
        panel: FieldPanel | Mapping[str, np.ndarray],
        cache_mib: float = 0.0,
        block: int | None = None,
        threads: int = 1,
    ) -> None:
        fields = panel.fields if isinstance(panel, FieldPanel) else panel
        self._panel = panel if isinstance(panel, FieldPanel) else None
        self._fields = dict(fields)
        self.shape = next(iter(self._fields.values())).shape
        block = block or max(_WIDE, _CELLS // max(1, self.shape[0]))
        self.slices = [
            slice(i, min(i + block, self.shape[1]))
            for i in range(0, self.shape[1], block)
        ]
        self.n_blocks = len(self.slices)
        self.threads = threads
        self._kept: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._room = int(cache_mib * 2**20)
        self._keeps = cache_mib > 0
        self.shared = self.computed = 0
        self._unstable: set[str] = set()
        self._crossed: dict[str, tuple[str, ...]] = {}

    def is_unstable(self, node: Node) -> bool:
        """Whether a regression in it met an infinite value.

        Qlib's running sums never recover from one, so all its later values would depend
        on where a query begins.
        """
        # A comparison stands in its tree as a field.
        unstable = {_FIELDS.sub(r"\1", text) for text in self._unstable}
        return bool(unstable) and any(n.text in unstable for _, n in node.walk())

    def forget(self) -> None:
        """Drop the cross-sections that earlier calls made."""
        for name in self._crossed:
            del self._fields[name]
        self._crossed.clear()

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
        chosen = list(range(self.n_blocks) if blocks is None else blocks)
        days = np.arange(self.shape[0]) if dates is None else np.asarray(dates)
        widths = [self.slices[b].stop - self.slices[b].start for b in chosen]
        starts = dict(zip(chosen, np.cumsum([0, *widths]), strict=False))
        out = np.empty((len(nodes), len(days), sum(widths)), np.float32)

        def put(k: int, b: int, first: int, value: np.ndarray) -> None:
            rows: Any
            if dates is None:
                rows, part = slice(first, first + len(value)), value
            else:
                here = (days >= first) & (days < first + len(value))
                rows, part = np.flatnonzero(here), value[days[here] - first]
            with np.errstate(over="ignore"):
                out[k, rows, starts[b] : starts[b] + value.shape[1]] = part

        self._run(nodes, chosen, (0, self.shape[0]), put)
        return out

    def fill(
        self, nodes: Sequence[Node], rows: np.ndarray, first: int, out: np.ndarray
    ) -> None:
        """Write values to the rows of a table.

        Parameters
        ----------
        nodes : sequence of Node [k]
        rows : int array [m, n]
            Row of the table for day ``first + i`` and a stock; -1 where there is none.
        first : int
            First day, as a row of the panel.
        out : float32 array [k, rows]
        """
        runs: dict[tuple[int, int], np.ndarray] = {}

        def put(k: int, b: int, at: int, value: np.ndarray, *other: Any) -> None:
            if (b, at) not in runs:
                part = rows[at - first : at - first + len(value), self.slices[b]]
                runs[b, at] = _runs(part)
            place: Callable[..., None] = _LAST[other[0]] if other else _place
            place(value, *other[1:], runs[b, at], out[k])

        days = first, first + len(rows)
        self._run(nodes, range(self.n_blocks), days, put, tuple(_LAST))

    # ------------------------------------------------------------------ the passes

    def _run(
        self,
        nodes: Sequence[Node],
        blocks: Sequence[int],
        days: tuple[int, int],
        put: Callable[..., None],
        last: tuple[str, ...] = (),
    ) -> None:
        self._check(nodes)
        plain = [self._without_cross(n) for n in nodes]
        plan = Plan.of(plain)
        width = self.slices[0].stop if self.slices else 1
        step = self.shape[0] if self._keeps else max(1, _CELLS // width)
        length = days[1] - days[0]
        if length > step:  # as many blocks for each thread
            turns = -(-length // (step * self.threads))
            step = -(-length // (turns * self.threads))
        jobs = [
            (b, a, min(a + step, days[1])) for b in blocks for a in range(*days, step)
        ]

        def one(job: tuple[int, int, int]) -> None:
            with np.errstate(all="ignore"):
                for k, *value in self._block(plan, *job, last):
                    put(k, *job[:2], *value)

        # Seen by a user who waits, not in a log, nor for a few stocks.
        bar = tqdm(
            total=len(jobs), desc="expressions", delay=3, disable=None, leave=False
        )
        with bar, ThreadPoolExecutor(self.threads) as pool:
            alone = self.threads == 1 or len(jobs) == 1 or self._keeps
            for _ in map(one, jobs) if alone else pool.map(one, jobs):
                bar.update()

    def _check(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            for name in node.fields:
                if name not in self._fields:
                    raise ValueError(f"{node.text}: the panel has no field {name}.")

    def _block(
        self, plan: Plan, b: int, first: int, last: int, open_: tuple[str, ...]
    ) -> Iterator[tuple]:
        """Values by number; of operators in `open_`, what they are to be made of."""
        part = self.slices[b]
        whole = self.shape[0]
        left = Counter(plan.uses)
        values: dict[str, np.ndarray | float] = {}
        wide: dict[str, np.ndarray] = {}
        places: dict[str, list[int]] = {}
        for k, root in enumerate(plan.roots):
            places.setdefault(root.text, []).append(k)

        spans: dict[str, tuple[int, int]] = {}

        def bounds(text: str) -> tuple[int, int]:
            if text not in spans:
                lo, hi = max(0, first - plan.back[text]), last + plan.ahead[text]
                spans[text] = (0, whole) if self._keeps else (lo, min(whole, hi))
            return spans[text]

        def fetch(node: Node) -> np.ndarray | float:
            text = node.text
            if text not in values:
                if not node.op:
                    values[text] = node.numbers[0]
                elif not node.args:
                    lo, hi = bounds(text)
                    values[text] = np.ascontiguousarray(
                        self._fields[node.op][lo:hi, part]
                    )
            return values[text]

        def release(text: str) -> None:
            left[text] -= 1
            if left[text] <= 0:
                values.pop(text, None)
                wide.pop(text, None)

        def inputs(node: Node) -> list[np.ndarray | float]:
            """Float32 that meets float64 is made so: numpy would do it each time."""
            found = [fetch(a) for a in node.args]
            kinds = [x.dtype if isinstance(x, np.ndarray) else None for x in found]
            if np.float64 in kinds and np.float32 in kinds:
                for k, arg in enumerate(node.args):
                    if kinds[k] == np.float32 and arg.text not in wide:
                        wide[arg.text] = found[k].astype(np.float64)  # type: ignore[union-attr]
                    found[k] = wide.get(arg.text, found[k])
            return found

        def lows(node: Node) -> list[int]:
            return [bounds(a.text)[0] for a in node.args]

        for root in plan.roots:
            if not root.args:
                lo, _ = bounds(root.text)
                value = np.asarray(fetch(root))
                for k in places.pop(root.text, []):
                    yield k, value[first - lo : last - lo]
        needed = self._needed(plan, b) if self._keeps else None
        for step in plan.steps:
            if needed is not None and not any(n.text in needed for n in step.nodes):
                continue
            node = step.nodes[0]
            if node.op in open_ and left[node.text] == len(places.get(node.text, ())):
                x, y = _cut(inputs(node), lows(node), first, last)
                if _alike(x, y):
                    for k in places[node.text]:
                        yield k, x, node.op, y
                    for name in set(step.inputs):
                        release(name)
                    continue
            results = self._step(plan, step, b, fetch, inputs, lows, bounds)
            for node, result in zip(step.nodes, results, strict=True):
                if left[node.text] > 0:
                    values[node.text] = result
                for k in places.get(node.text, []):
                    lo, _ = bounds(node.text)
                    yield k, result[first - lo : last - lo]
                    left[node.text] -= 1
                if left[node.text] <= 0:
                    values.pop(node.text, None)
            for name in set(step.inputs):
                release(name)

    def _needed(self, plan: Plan, b: int) -> set[str]:
        """Subtrees that this block still has to calculate or to take up."""
        found: set[str] = set()

        def visit(node: Node) -> None:
            if not node.args or node.text in found:
                return
            found.add(node.text)
            if (b, node.text) not in self._kept:
                for child in node.args:
                    visit(child)

        for root in plan.roots:
            visit(root)
        return found

    def _step(self, plan, step, b, fetch, inputs, lows, bounds):
        kept = {n.text: self._kept.get((b, n.text)) for n in step.nodes}
        if self._keeps and all(v is not None for v in kept.values()):
            for text in kept:
                self._kept.move_to_end((b, text))
            self.shared += len(kept)
            return list(kept.values())
        nodes = step.nodes
        spans = [bounds(n.text) for n in nodes]
        lo, hi = min(s[0] for s in spans), max(s[1] for s in spans)
        begins = lows(nodes[0])
        self.computed += len(nodes)
        if step.group:
            common = max(begins)
            found = [fetch(a) for a in nodes[0].args]
            starts = [x[common - low :] for x, low in zip(found, begins, strict=True)]
            ends = min(len(x) for x in starts)
            starts = [x[:ends] for x in starts]
            since = self._since(nodes[0], b) - common
            wanted = [(n.op, n.numbers) for n in nodes]
            if step.group == "Slope" and np.isinf(starts[0]).any():
                self._unstable.update(n.text for n in nodes)
            made = rolling(
                step.group,
                wanted,
                [
                    self._masked(a, x, b, common)
                    for a, x in zip(nodes[0].args, starts, strict=True)
                ],
                lo - common,
                hi - lo,
                np.maximum(since, 0),
            )
            results = [
                m[s[0] - lo : s[1] - lo] for m, s in zip(made, spans, strict=True)
            ]
        else:
            results = [self._plain(nodes[0], inputs(nodes[0]), begins, lo, hi, b)]
        if self._keeps:
            for node, result in zip(nodes, results, strict=True):
                if plan.uses[node.text] > 1:
                    self._keep((b, node.text), result)
        return results

    def _plain(self, node, inputs, lows, lo, hi, b):
        if node.op in ("Ref", "Delta"):
            x = inputs[0]
            if x.dtype == bool:
                raise Unsupported(f"{node.text}: {node.op} of a comparison.")
            return lagged(node.op, x, lo - lows[0], hi - lo, int(node.numbers[0]))
        cut = _cut(inputs, lows, lo, hi)
        try:
            out = elementwise(node.op, cut)
        except TypeError as error:
            raise ValueError(f"{node.text}: {error}") from None
        bools = any(isinstance(x, np.ndarray) and x.dtype == bool for x in cut)
        if out.dtype != bool and (bools or node.op in ("If", "IfGreater")):
            # A comparison outside a stock's series is False, not missing.
            if not np.issubdtype(out.dtype, np.floating):
                out = out.astype(np.float64)
            out[~self._inside(node, b, lo, hi)] = np.nan
        return out

    def _masked(self, node: Node, x: np.ndarray, b: int, lo: int) -> np.ndarray:
        """Comparisons as numbers: NaN outside the stock's series."""
        if x.dtype != bool:
            return x
        out = x.astype(np.float64)
        out[~self._inside(node, b, lo, lo + len(x))] = np.nan
        return out

    def _span(self, node: Node, b: int) -> np.ndarray:
        names = [m for n in node.fields for m in self._crossed.get(n, (n,))]
        if self._panel is None:
            n = self.slices[b].stop - self.slices[b].start
            return np.stack([np.zeros(n, int), np.full(n, self.shape[0])])
        return self._panel.span(names)[:, self.slices[b]]

    def _since(self, node: Node, b: int) -> np.ndarray:
        return self._span(node, b)[0]

    def _inside(self, node: Node, b: int, lo: int, hi: int) -> np.ndarray:
        first, last = self._span(node, b)
        row = np.arange(lo, hi)[:, None]
        return (row >= first) & (row < last)

    def _keep(self, key: tuple[int, str], value: np.ndarray) -> None:
        if value.nbytes > self._room + sum(v.nbytes for v in self._kept.values()):
            return
        if key in self._kept:
            self._room += self._kept.pop(key).nbytes
        self._room -= value.nbytes
        self._kept[key] = value
        while self._room < 0:
            self._room += self._kept.popitem(last=False)[1].nbytes

    # ------------------------------------------------------------------ cross-sections

    def _without_cross(self, node: Node) -> Node:
        """Tree in which what needs all stocks, or all days, has become a field."""
        silent = None if self._panel is None else self._panel.silent
        whole = (*CROSS, "LastTraded", *(() if silent is None else ("Traded",)))
        if not any(n.op in whole for _, n in node.walk()):
            return node
        args = tuple(self._without_cross(a) for a in node.args)
        plain = Node(node.op, args, node.numbers)
        if node.op in ("LastTraded", "Traded") and node.op in whole:
            return self._traded(plain)
        if node.op not in CROSS:
            return plain
        name = f"${node.text}"
        if name not in self._fields:
            from data_handlers.expression.cross import cross_section

            columns = self.evaluate(args)
            member = None if self._panel is None else self._panel.member
            self._fields[name] = cross_section(node.op, columns, member)
            self._crossed[name] = tuple(
                m for n in plain.fields for m in self._crossed.get(n, (n,))
            )
        return Node(name)

    def _traded(self, node: Node) -> Node:
        (tree,) = node.args
        name = f"${node.op}({tree.text})"
        if name not in self._fields:
            values = self._fields[tree.op] if tree.op in self._fields else None
            if values is None:
                values = self.evaluate([tree])[0]
            before = None
            if self._panel is not None:
                before = self._panel.before.get(tree.op)
                if self._panel.silent is not None:
                    none = values.dtype.type(np.nan)
                    values = np.where(self._panel.silent, none, values)
            if node.op == "LastTraded":
                values = _carried(values, before)
            else:
                values = elementwise("Traded", [values])
            self._fields[name] = values
            self._crossed[name] = tuple(
                m for n in tree.fields for m in self._crossed.get(n, (n,))
            )
        if node.op == "Traded":
            return Node(name)
        return Node("Ref", (Node(name),), node.numbers)


def _cut(
    inputs: Sequence[np.ndarray | float], lows: Sequence[int], lo: int, hi: int
) -> list[np.ndarray | float]:
    """Days `lo` to `hi` of what begins at `lows`."""
    return [
        x[lo - low : hi - low] if isinstance(x, np.ndarray) else x
        for x, low in zip(inputs, lows, strict=True)
    ]


def _alike(x: np.ndarray | float, y: np.ndarray | float) -> bool:
    """Whether both are arrays of numbers of one kind."""
    both = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
    return both and x.dtype == y.dtype != bool  # type: ignore[union-attr]


def _carried(values: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Last value above 0 up to each day ``[t, n]``; `before` ``[n]`` precedes them."""
    held = np.where(values > 0, values, values.dtype.type(np.nan))
    last = np.full(held.shape[1], np.nan, held.dtype) if before is None else before
    for row in held:
        last = np.where(row > 0, row, last)
        row[:] = last
    return held
