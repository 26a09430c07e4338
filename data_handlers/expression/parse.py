"""Qlib expressions as trees: reading text, and what a tree needs.

Qlib hands the text of an expression to Python's `eval`. Here the text is only ever
parsed (`ast`), never run, and a tree holds nothing but fields, numbers and operators.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from data_handlers.expression.operators import OPERATORS

__all__ = ["ExpressionError", "Node", "Unsupported", "parse"]


class ExpressionError(ValueError):
    """A text that is no expression, with the place at fault."""


class Unsupported(ValueError):
    """An expression of Qlib's that only Qlib's own engine can evaluate."""


@dataclass(frozen=True, eq=False)
class Node:
    """A tree: a field (``$close``), a number, or an operator with its trees.

    Attributes
    ----------
    op : str
        Name of the field with ``$``, of the operator, or empty for a number.
    args : tuple of Node
    numbers : tuple of float
        Windows and levels of an operator; the number itself.
    """

    op: str
    args: tuple[Node, ...] = ()
    numbers: tuple[float, ...] = ()

    @cached_property
    def text(self) -> str:
        """The Qlib expression."""
        if not self.args:
            return self.op or repr(self.numbers[0])
        parts = [a.text for a in self.args]
        if self.op == "IfGreater":
            return f"If(Gt({parts[0]},{parts[1]}),{parts[2]},{parts[3]})"
        return f"{self.op}({','.join(parts + [str(v) for v in self.numbers])})"

    @cached_property
    def size(self) -> int:
        """Number of nodes."""
        return 1 + sum(a.size for a in self.args)

    @cached_property
    def depth(self) -> int:
        """Levels of operators; 0 for a field."""
        return 1 + max(a.depth for a in self.args) if self.args else 0

    @property
    def own_back(self) -> int:
        """Days before t that the operator itself looks back; negative: ahead."""
        kind = OPERATORS[self.op].numbers if self.args else ""
        return 0 if not kind else int(self.numbers[0]) - (kind != "lag")

    @cached_property
    def look_back(self) -> int:
        """Days before t whose values the value of t uses."""
        return max(0, self.own_back) + max((a.look_back for a in self.args), default=0)

    @cached_property
    def look_ahead(self) -> int:
        """Days after t whose values the value of t uses."""
        own = max((a.look_ahead for a in self.args), default=0)
        return max(0, -self.own_back) + own

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of its fields, with ``$``, in order of appearance."""
        found = [n.op for _, n in self.walk() if n.op.startswith("$")]
        return tuple(dict.fromkeys(found))

    def walk(self) -> Iterator[tuple[tuple[int, ...], Node]]:
        """Every node with its path from the root, the root first."""
        yield (), self
        for k, child in enumerate(self.args):
            for path, node in child.walk():
                yield (k, *path), node


_BINARY: Mapping[type, tuple[str, object]] = {
    ast.Add: ("Add", operator.add),
    ast.Sub: ("Sub", operator.sub),
    ast.Mult: ("Mul", operator.mul),
    ast.Div: ("Div", operator.truediv),
    ast.Pow: ("Power", operator.pow),
    ast.BitAnd: ("And", None),
    ast.BitOr: ("Or", None),
}
_COMPARE: Mapping[type, str] = {
    ast.Gt: "Gt",
    ast.GtE: "Ge",
    ast.Lt: "Lt",
    ast.LtE: "Le",
    ast.Eq: "Eq",
    ast.NotEq: "Ne",
}
_FIELD = re.compile(r"\$[^\W\d]\w*")
_WORD = re.compile(r"[\w.^-]{1,40}")
# What Qlib registers itself; operators that a user added come from Qlib's registry.
_QLIBS = frozenset(
    "ChangeInstrument Rolling Ref Max Min Sum Mean Std Var Skew Kurt Med Mad Slope "
    "Rsquare Resi Rank Quantile Count EMA WMA Corr Cov Delta Abs Sign Log Power Add "
    "Sub Mul Div Greater Less And Or Not Gt Ge Lt Le Eq Ne Mask IdxMax IdxMin If "
    "TResample P PRef".split()
)


def parse(text: str, operators: Sequence[str] = ()) -> Node:
    """Read a Qlib expression.

    Parameters
    ----------
    text : str
        Fields (``$close``), numbers, ``+ - * / ** > >= < <= == != & |``, Qlib's
        operators and the cross-sectional ones of `data_handlers.expression`.
    operators : sequence of str
        Further names that Qlib knows (its `custom_ops`).

    Raises
    ------
    ExpressionError
        If Qlib would not read it either, or it holds anything else: names, attributes,
        strings that are no code. The message shows the place.
    Unsupported
        If Qlib reads it but this engine cannot: point-in-time fields, other
        instruments, windows of 0 or fractions, operators that are not in the table.

    Examples
    --------
    >>> parse("$close / Ref($close, 5) - 1").text
    'Sub(Div($close,Ref($close,5)),1)'
    """
    if not isinstance(text, str) or not text.strip():
        raise ExpressionError(f"an expression must be text, got {text!r}.")
    if "\0" in text:
        raise ExpressionError("an expression must not hold the character \\0.")
    lead = len(text) - len(text.lstrip())
    # A field is an ordinary name to Python once its sign is one of a name's letters.
    plain = text.strip()
    try:
        tree = ast.parse(plain.replace("$", "_"), mode="eval").body
    except SyntaxError as error:
        at = (error.offset or 1) - 1 + lead
        raise ExpressionError(_place(text, at, error.msg or "syntax")) from None
    except (RecursionError, MemoryError):
        raise ExpressionError("the expression is nested too deeply.") from None
    reader = _Reader(text, plain, lead, _QLIBS.union(operators))
    try:
        node = reader.read(tree)
    except RecursionError:
        raise ExpressionError("the expression is nested too deeply.") from None
    if not node.args and not node.op:
        raise ExpressionError(f"{text!r} is a number, not an expression of fields.")
    if reader.unsupported:
        raise Unsupported(f"{text!r}: {reader.unsupported[0]}.")
    return node


def _place(text: str, at: int, what: str) -> str:
    at = max(0, min(at, len(text)))
    near = text[max(0, at - 8) : at + 12]
    return f"{text[:200]!r}: {what} at position {at} (…{near!r})."


class _Reader:
    """Turns Python's tree into ours, and keeps what only Qlib can do."""

    def __init__(self, text: str, plain: str, lead: int, known: frozenset[str]):
        self.text, self.lead, self.known = text, lead, known
        self.lines = [line.encode() for line in plain.splitlines()]
        self.starts = [0]
        for line in plain.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.unsupported: list[str] = []

    def at(self, node: ast.AST) -> int:
        line, column = node.lineno - 1, node.col_offset  # type: ignore[attr-defined]
        before = self.lines[line][:column].decode(errors="replace")
        return self.lead + self.starts[line] + len(before)

    def fail(self, node: ast.AST, what: str) -> ExpressionError:
        return ExpressionError(_place(self.text, self.at(node), what))

    def read(self, node: ast.expr) -> Node:
        if isinstance(node, ast.Constant):
            return self._number(node)
        if isinstance(node, ast.Name):
            return self._field(node)
        if isinstance(node, ast.UnaryOp):
            inner = self.read(node.operand)
            if inner.op or not isinstance(node.op, (ast.USub, ast.UAdd)):
                raise self.fail(
                    node, "a sign before anything but a number; write 0 - … or Not(…)"
                )
            sign = -1 if isinstance(node.op, ast.USub) else 1
            return Node("", (), (sign * inner.numbers[0],))
        if isinstance(node, ast.BinOp):
            return self._binary(node)
        if isinstance(node, ast.Compare):
            if len(node.ops) > 1 or type(node.ops[0]) not in _COMPARE:
                raise self.fail(node, "one comparison at a time; join them with &")
            sides = (self.read(node.left), self.read(node.comparators[0]))
            if not any(s.op for s in sides):
                raise self.fail(node, "a comparison of two numbers")
            # Qlib asks the right side when the left one is a number, and turns it.
            name = _COMPARE[type(node.ops[0])]
            if not sides[0].op:
                turned = {"Gt": "Lt", "Lt": "Gt", "Ge": "Le", "Le": "Ge"}
                return Node(turned.get(name, name), sides[::-1])
            return Node(name, sides)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BoolOp):
            raise self.fail(node, "`and` and `or` know no series; write & and |")
        raise self.fail(node, f"{type(node).__name__} is no part of an expression")

    def _number(self, node: ast.Constant) -> Node:
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            raise self.fail(node, f"{node.value!r} is no number")
        return Node("", (), (node.value,))

    def _field(self, node: ast.Name) -> Node:
        at = self.at(node)
        if self.text[at : at + 2] == "$$":
            self.unsupported.append("point-in-time fields ($$)")
            return Node("$" + node.id.lstrip("_"))
        found = _FIELD.match(self.text, at)
        if not found:
            raise self.fail(node, f"{node.id!r} is no field; write ${node.id}")
        return Node(found.group())

    def _binary(self, node: ast.BinOp) -> Node:
        known = _BINARY.get(type(node.op))
        if known is None:
            raise self.fail(node, f"{type(node.op).__name__} is no operator of Qlib's")
        left, right = self.read(node.left), self.read(node.right)
        if not left.op and not right.op:
            if known[1] is None:
                raise self.fail(node, "numbers joined by & or |")
            if isinstance(node.op, ast.Pow) and abs(right.numbers[0]) > 64:
                raise self.fail(node, "a power above 64")
            try:
                value = known[1](left.numbers[0], right.numbers[0])  # type: ignore[operator]
            except (ArithmeticError, ValueError) as error:
                raise self.fail(node, str(error)) from None
            return self._number(ast.copy_location(ast.Constant(value), node))
        return Node(known[0], (left, right))

    def _call(self, node: ast.Call) -> Node:
        if not isinstance(node.func, ast.Name) or node.keywords:
            raise self.fail(node, "only operators can be called, by place")
        name = node.func.id
        rule = OPERATORS.get(name)
        if name == "IfGreater" or (rule is None and name not in self.known):
            raise self.fail(node, f"{name!r} is no operator")
        if rule is None:
            self.unsupported.append(f"operator {name}")
            return self._foreign(node, name)
        args = [self.read(a) for a in node.args]
        most = rule.arity + {"": 0, "quantile": 2}.get(rule.numbers, 1)
        fewest = most - rule.optional
        if not fewest <= len(args) <= most:
            takes = str(most) if most == fewest else f"{fewest} to {most}"
            raise self.fail(node, f"{name} takes {takes} arguments, got {len(args)}")
        trees = args[: rule.arity] if rule.numbers else args
        numbers = args[rule.arity :] if rule.numbers else []
        for tree, source in zip(trees, node.args, strict=False):
            if not tree.op and not (rule.constants and any(t.op for t in trees)):
                raise self.fail(source, f"{name} needs an expression of fields")
        given = []
        for place, number in enumerate(numbers):
            source = node.args[rule.arity + place]
            if number.op:
                raise self.fail(source, f"{name} needs a number")
            given.append(self._checked(name, place, number.numbers[0], source))
        return Node(name, tuple(trees), tuple(given))

    def _checked(self, name: str, place: int, value: float, source: ast.expr) -> float:
        if place:
            if not 0 <= value <= 1:
                raise self.fail(source, f"{name}: a level lies between 0 and 1")
            return value
        ref = OPERATORS[name].numbers == "lag" and name != "Delta"
        if isinstance(value, int) and (value > 0 or (ref and value)):
            return value
        if value < 0:
            raise self.fail(source, f"{name}: a window must not be negative")
        self.unsupported.append(f"{name} with the window {value}")
        return 1

    def _foreign(self, node: ast.Call, name: str) -> Node:
        """Check what Qlib alone evaluates: it may hold codes as text."""
        trees = []
        for argument in node.args:
            text = argument.value if isinstance(argument, ast.Constant) else None
            if isinstance(text, str):
                if not _WORD.fullmatch(text):
                    raise self.fail(argument, f"{text!r} is no code")
            else:
                trees.append(self.read(argument))
        return Node(name, tuple(trees))
