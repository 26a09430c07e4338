"""The one engine for Qlib expressions: parse, operators, panel, evaluation."""

from data_handlers.expression.evaluate import BLOCK, Evaluator
from data_handlers.expression.operators import CROSS, OPERATORS
from data_handlers.expression.panel import FieldPanel, read_panel
from data_handlers.expression.parse import ExpressionError, Node, Unsupported, parse

__all__ = [
    "BLOCK",
    "CROSS",
    "OPERATORS",
    "Evaluator",
    "ExpressionError",
    "FieldPanel",
    "Node",
    "Unsupported",
    "parse",
    "read_panel",
]
