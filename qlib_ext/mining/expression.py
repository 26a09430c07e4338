"""The expressions that mining tries: its operators, scale, growing and variation.

Trees and their values are those of `data_handlers.expression`; this file says which of
them are written. Text from a file is read by `parse`, which knows nothing else.

**Table.** Qlib's names, Qlib's meaning. Left out, and why:

- `EMA`: Qlib starts it at the first day a query loads, so its value depends on where
  the query begins, not on the day alone;
- `Skew`, `Kurt`: online sums of third and fourth powers in pandas that lose digits;
- `WMA`, `Mad`, `IdxMax`, `IdxMin`, `Count`: rules for missing values that depend on
  where a stock's file begins;
- `Delta` is read and evaluated but never written: Qlib loads a day too few for it, so
  the first day of a query would lack a value. `Sub(x,Ref(x,n))` takes its place;
- windows of 0 (since the first day) and below (the future).

The cross-sectional operators, which Qlib lacks, are written where a search asks for
them (`CROSSED`).

**Scale.** Adjusted prices carry a factor that depends on the vendor: prices adjusted
backwards from today know every later split. A factor must not depend on it. Each tree
therefore has a scale, the power of that factor: 1 for a price, -1 for adjusted volume,
0 for amounts, rates and ratios. What is added or compared has one scale, and a finished
expression has scale 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from numpy.random import RandomState

from data_handlers import expression as engine
from data_handlers.arguments import NamedArguments
from data_handlers.expression import ExpressionError, Node

__all__ = [
    "CROSSED",
    "OPERATORS",
    "QUANTILES",
    "WINDOWS",
    "Grammar",
    "Node",
    "crossover",
    "mutate",
    "parse",
]

#: Days of a rolling window.
WINDOWS = (2, 3, 5, 10, 20, 40, 60)
#: Levels of `Quantile`.
QUANTILES = (0.2, 0.8)
#: Days of `Ref` and `Delta`.
_LAGS = (1, 2, 3, 5, 10, 20)
_MAX_WINDOW = 250

_PRICES = ("open", "high", "low", "close", "vwap", "pre_close", "preclose")
_VOLUMES = ("volume",)


@dataclass(frozen=True)
class Writing:
    """How an operator is used, and what it does to scale.

    Attributes
    ----------
    scale : str
        ``same``: of its trees, which must agree; ``zero``: 0 whatever they are;
        ``sum``, ``difference``: of its two trees; ``pure``: both 0; ``if``: the first
        two agree, the last two agree and give it.
    least : int
        Smallest window.
    symmetric : bool
        Exchanging its two trees changes nothing.
    """

    scale: str
    least: int = 2
    symmetric: bool = False


#: The operators that mined expressions are made of. `IfGreater(a,b,c,d)` is written
#: ``If(Gt(a,b),c,d)``.
OPERATORS: dict[str, Writing] = {
    **dict.fromkeys(("Ref", "Delta"), Writing("same", 1)),
    **dict.fromkeys(
        ("Mean", "Sum", "Std", "Max", "Min", "Med", "Quantile"), Writing("same")
    ),
    "Rank": Writing("zero"),
    "Slope": Writing("same", 3),
    "Resi": Writing("same", 3),
    "Rsquare": Writing("zero", 5),
    "Corr": Writing("zero", 5, True),
    "Cov": Writing("sum", 5, True),
    "Abs": Writing("same"),
    "Sign": Writing("zero"),
    "Log": Writing("pure"),
    "Add": Writing("same", symmetric=True),
    "Sub": Writing("same"),
    "Mul": Writing("sum", symmetric=True),
    "Div": Writing("difference"),
    "Greater": Writing("same", symmetric=True),
    "Less": Writing("same", symmetric=True),
    "IfGreater": Writing("if"),
}

#: Comparisons of the day's members, which a grammar draws if asked; of ratios, as the
#: stocks' factors of adjustment differ. A second tree, if there is one, is the group.
CROSSED: dict[str, Writing] = dict.fromkeys(
    ("CSRank", "CSZScore", "CSDemean"), Writing("pure")
)
_RULES = OPERATORS | CROSSED

# How often an operator is drawn; 1 where nothing is said.
_WEIGHTS = {"Div": 4.0, "Sub": 2.5, "Mean": 2.5, "Corr": 2.0, "Std": 1.5, "Rank": 1.5}
_WEIGHTS |= {"IfGreater": 0.5, "Sign": 0.5, "Med": 0.5, "Quantile": 0.5, "Cov": 0.5}


def scale_of(node: Node) -> int | None:
    """Power of the adjustment factor, None where trees do not fit together."""
    if not node.args:
        return field_scale(node.op)
    scales = [scale_of(a) for a in node.args]
    values = [s for s in scales if s is not None]
    if len(values) < len(scales):
        return None
    rule = _RULES[node.op].scale
    if rule == "zero":
        return 0
    if rule == "sum":
        return sum(values)
    if rule == "difference":
        return values[0] - values[1]
    if rule == "if":
        fits = values[0] == values[1] and values[2] == values[3]
        return values[2] if fits else None
    if rule == "pure":
        return 0 if not any(values) else None
    return values[0] if len(set(values)) == 1 else None


def replaced(node: Node, path: Sequence[int], new: Node) -> Node:
    """Copy with another tree at `path`."""
    if not path:
        return new
    args = list(node.args)
    args[path[0]] = replaced(args[path[0]], path[1:], new)
    return make(node.op, args, node.numbers)


def field_scale(name: str) -> int:
    """Power of the adjustment factor in a field: 1 a price, -1 volume, else 0."""
    bare = name.removeprefix("$")
    return 1 if bare in _PRICES else -1 if bare in _VOLUMES else 0


def make(op: str, args: Sequence[Node], numbers: Sequence[float] = ()) -> Node:
    """Node in canonical order."""
    trees = list(args)
    if _RULES[op].symmetric:
        trees.sort(key=lambda a: a.text)
    return Node(op, tuple(trees), tuple(numbers))


def _written(op: str, args: Sequence[Node], numbers: Sequence[float] = ()) -> Node:
    """Node as new expressions have it: a difference in place of `Delta`."""
    if op == "Delta":
        return make("Sub", [args[0], make("Ref", args, numbers)])
    return make(op, args, numbers)


# ------------------------------------------------------------------------- reading

_FIELD = re.compile(r"\$[A-Za-z][A-Za-z0-9_]*")


def parse(text: str) -> Node:
    """Read an expression that this package could have written.

    Parameters
    ----------
    text : str
        Fields, operators of `OPERATORS` and their positive windows; spaces do not
        count.

    Returns
    -------
    Node
        Its ``text`` has the same meaning as what was read.

    Raises
    ------
    ValueError
        If anything else is in the text: another operator, a number of its own, a
        window below 1 (which would look ahead) or above 250 days.

    Examples
    --------
    >>> parse("Div($close, Ref($close, 5))").text
    'Div($close,Ref($close,5))'
    """
    if isinstance(text, str) and (sign := re.search(r"[-+*/<>=&|]", text)):
        raise ExpressionError(
            f"{text[:120]!r}: expected operators by name and positive numbers, found "
            f"{sign.group()!r} at position {sign.start()}."
        )
    return _canonical(engine.parse(text), text)


def _canonical(node: Node, text: str) -> Node:
    if not node.args:
        if not _FIELD.fullmatch(node.op):
            raise ExpressionError(f"{text!r}: a number of its own, {node.text}.")
        return node
    args = node.args
    op = node.op
    if op == "If":
        if args[0].op != "Gt":
            raise ExpressionError(f"{text!r}: the condition of If must be Gt(a,b).")
        op, args = "IfGreater", (*args[0].args, *args[1:])
    if op not in _RULES:
        raise ExpressionError(
            f"{text!r}: {op!r} is not one of the operators "
            f"{', '.join(k for k in _RULES if k != 'IfGreater')}, If."
        )
    least = _RULES[op].least
    if node.numbers:
        if not least <= node.numbers[0] <= _MAX_WINDOW:
            raise ExpressionError(
                f"`{op}`: a window is a whole number of days from {least} to "
                f"{_MAX_WINDOW}, got {node.numbers[0]}."
            )
    return make(op, [_canonical(a, text) for a in args], node.numbers)


# ------------------------------------------------------------------------- growing


class Grammar(NamedArguments):
    """Draws trees of a given scale from fields and the operator table.

    Parameters
    ----------
    fields : sequence of str
        With or without ``$``.
    max_depth : int
        Levels of operators.
    max_size : int
        Nodes.
    max_look_back : int
        Days.
    cross : bool, default False
        Draw the operators of `CROSSED` too.
    group : str, optional
        Field that holds each stock's group, such as industry, for them alone.

    Raises
    ------
    ValueError
        If there is no field, a name is not one, or no expression of scale 0 exists.
    """

    def __init__(
        self,
        fields: Sequence[str],
        max_depth: Annotated[int, Ge(2)] = 5,
        max_size: Annotated[int, Ge(3)] = 16,
        max_look_back: Annotated[int, Ge(2)] = 250,
        cross: bool = False,
        group: str | None = None,
    ) -> None:
        names = list(dict.fromkeys("$" + f.removeprefix("$") for f in fields))
        for name in names:
            if not _FIELD.fullmatch(name):
                raise ValueError(f"`fields`: {name!r} is not the name of a field.")
        if not names:
            raise ValueError("`fields` is empty: name at least one, such as close.")
        self.fields = {
            s: [Node(n) for n in names if field_scale(n) == s] for s in (-1, 0, 1)
        }
        self._group = None if group is None else "$" + group.removeprefix("$")
        self.ops = list(_RULES if cross else OPERATORS)
        total = sum(_WEIGHTS.get(op, 1.0) for op in self.ops)
        self._weights = [_WEIGHTS.get(op, 1.0) / total for op in self.ops]

    def fits(self, node: Node) -> bool:
        """Whether a finished expression obeys scale, depth, size and look-back."""
        return (
            scale_of(node) == 0
            and bool(node.args)
            and node.depth <= self.max_depth
            and node.size <= self.max_size
            and node.look_back <= self.max_look_back
            and not any(_pointless(n) for _, n in node.walk())
            and self._grouped(node)
        )

    def _grouped(self, node: Node) -> bool:
        """Whether groups are where they belong, and nowhere else."""
        if node.op in CROSSED:
            tree, *groups = node.args
            return self._grouped(tree) and all(g.op == self._group for g in groups)
        return node.op != self._group and all(self._grouped(a) for a in node.args)

    def draw(self, rng: RandomState) -> Node:
        """One finished expression."""
        while True:
            depth = int(rng.randint(2, min(4, self.max_depth) + 1))
            node = self.grow(rng, 0, depth)
            if node is not None and self.fits(node):
                return node

    def grow(self, rng: RandomState, scale: int, depth: int) -> Node | None:
        """Draw a tree of at most `depth` levels; None where the draw led nowhere."""
        here = self.fields[scale]
        # A store may have one field of scale 0, such as amount: drawn as often as the
        # prices it would be in every tree.
        stop = 0.25 if scale else 0.08
        if here and (depth <= 0 or rng.random_sample() < stop):
            return here[rng.randint(len(here))]
        if depth <= 0:
            return None
        for _ in range(8):
            op = self.ops[rng.choice(len(self.ops), p=self._weights)]
            wanted = self._scales(rng, op, scale)
            if wanted is None:
                continue
            args = [self.grow(rng, s, depth - 1) for s in wanted]
            trees = [a for a in args if a is not None]
            if len(trees) == len(args):
                if op in CROSSED and self._group and rng.random_sample() < 0.5:
                    trees.append(Node(self._group))
                return _written(op, trees, draw_numbers(rng, op))
        return here[rng.randint(len(here))] if here else None

    def _scales(self, rng: RandomState, op: str, scale: int) -> list[int] | None:
        """Scales of the trees that give `op` the scale wanted; None where none do."""
        operator = _RULES[op]
        free = lambda: int(rng.randint(-1, 2))  # noqa: E731
        if operator.scale == "same":
            return [scale] * _arity(op)
        if operator.scale == "zero":
            return [free() for _ in range(_arity(op))] if scale == 0 else None
        if operator.scale == "pure":
            return [0] if scale == 0 else None
        if operator.scale == "if":
            test = free()
            return [test, test, scale, scale]
        first = free()
        second = scale - first if operator.scale == "sum" else first - scale
        return [first, second] if -1 <= second <= 1 else None


def _arity(op: str) -> int:
    rule = engine.OPERATORS[op]
    return rule.arity - rule.optional


def draw_numbers(rng: RandomState, op: str) -> tuple[float, ...]:
    """Window and level of an operator."""
    kind = engine.OPERATORS[op].numbers
    if kind == "":
        return ()
    if kind == "lag":
        return (_LAGS[rng.randint(len(_LAGS))],)
    windows = [w for w in WINDOWS if w >= _RULES[op].least]
    window = windows[rng.randint(len(windows))]
    if kind == "quantile":
        return (window, QUANTILES[rng.randint(len(QUANTILES))])
    return (window,)


def _pointless(node: Node) -> bool:
    """Whether a node is a constant or its tree by another name."""
    if node.op in ("Add", "Sub", "Div", "Corr", "Greater", "Less", "Cov"):
        return node.args[0].text == node.args[1].text
    if node.op == "IfGreater":
        a, b, c, d = (x.text for x in node.args)
        return a == b or c == d
    if node.op in ("Abs", "Sign"):
        return node.args[0].op in ("Abs", "Sign", "Std", "Rsquare", "Rank")
    if node.op in ("Max", "Min", "Mean", "Med"):
        return node.args[0].op == "Sign" and node.numbers[0] < 5
    return False


# ------------------------------------------------------------------------- variation


def crossover(grammar: Grammar, rng: RandomState, a: Node, b: Node) -> Node:
    """Replace one of the trees of `a` by a tree of `b` of the same scale."""
    donors = [n for _, n in b.walk()]
    places = list(a.walk())[1:]
    for _ in range(8):
        path, old = places[rng.randint(len(places))]
        fitting = [
            n for n in donors if scale_of(n) == scale_of(old) and n.text != old.text
        ]
        if not fitting:
            continue
        child = replaced(a, path, fitting[rng.randint(len(fitting))])
        if grammar.fits(child):
            return child
    return a


def mutate(grammar: Grammar, rng: RandomState, node: Node) -> Node:
    """Change one thing: a number, a field, an operator, a tree, or a wrapper."""
    kinds = ("number", "number", "field", "operator", "tree", "wrap", "hoist")
    for _ in range(12):
        kind = kinds[rng.randint(len(kinds))]
        child = _changed(grammar, rng, node, kind)
        if child is not None and child.text != node.text and grammar.fits(child):
            return child
    return grammar.draw(rng)


def _changed(grammar: Grammar, rng: RandomState, root: Node, kind: str) -> Node | None:
    places = list(root.walk())
    if kind == "number":
        places = [p for p in places if p[1].numbers]
    elif kind == "field":
        places = [p for p in places if not p[1].args]
    elif kind == "operator":
        places = [p for p in places if p[1].args]
    if not places:
        return None
    path, node = places[rng.randint(len(places))]
    scale = scale_of(node)
    if scale is None:
        return None
    if kind == "number":
        new: Node | None = make(node.op, node.args, draw_numbers(rng, node.op))
    elif kind == "field":
        others = grammar.fields[scale]
        new = others[rng.randint(len(others))]
    elif kind == "operator":
        alike = [
            op for op in grammar.ops if _arity(op) == len(node.args) and op != node.op
        ]
        if not alike:
            return None
        op = alike[rng.randint(len(alike))]
        kinds = engine.OPERATORS
        same_kind = kinds[op].numbers == kinds[node.op].numbers
        numbers = node.numbers if same_kind else draw_numbers(rng, op)
        if same_kind and numbers and numbers[0] < _RULES[op].least != 2:
            numbers = draw_numbers(rng, op)
        new = _written(op, node.args, numbers)
    elif kind == "tree":
        new = grammar.grow(rng, scale, int(rng.randint(1, 3)))
    elif kind == "wrap":
        single = [op for op in grammar.ops if _arity(op) == 1]
        op = single[rng.randint(len(single))]
        new = _written(op, [node], draw_numbers(rng, op))
    else:
        below = [n for _, n in node.walk() if scale_of(n) == scale][1:]
        new = below[rng.randint(len(below))] if below else None
    return None if new is None else replaced(root, path, new)
