"""Forward returns as Qlib expressions, and how far into the future they reach.

A signal of day t is known at the close of t and traded on t+1 at the earliest, so every
label starts at a price of t+1, on which the stock must trade. Who bought then holds the
stock whatever becomes of it: where it is suspended on the day of exit, the price of its
last trade up to that day stands, and where it was delisted inside the horizon, that of
its last trade at all. Beyond the store's last day there is no label
(docs/conventions.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from qlib.data.data import ExpressionD

import data_handlers.traded  # noqa: F401 - registers the operators with Qlib
from data_handlers.arguments import Count, checked
from data_handlers.expression.loading import node_of
from data_handlers.expression.operators import OPERATORS
from data_handlers.expression.parse import Node, Unsupported

__all__ = [
    "PRICES",
    "check_labels",
    "days_ahead",
    "forward_return",
    "given_labels",
    "holding_days",
    "label_config",
    "label_name",
    "label_reach",
    "named_horizon",
]

Price = Literal["close", "open", "vwap"]
PRICES: tuple[str, ...] = get_args(Price)


@checked
def forward_return(
    horizon: Count = 10, price: Price = "close", carry: bool = True
) -> str:
    """Qlib expression of the arithmetic return from t+1 to t+1+`horizon`.

    Parameters
    ----------
    horizon : int, default 10
        Holding period in trading days.
    price : {"close", "open", "vwap"}, default "close"
        Adjusted price at both ends.
    carry : bool, default True
        On days without a trade at the end, take the last traded price. False: such a
        label is NaN.

    Returns
    -------
    str
        NaN where the stock does not trade at t+1: it cannot be bought.

    Examples
    --------
    >>> forward_return()
    'LastTraded($close, -11) / Ref(Traded($close), -1) - 1'
    """
    exit_ = f"LastTraded(${price}, -{horizon + 1})"
    if not carry:
        exit_ = f"Ref(Traded(${price}), -{horizon + 1})"
    return f"{exit_} / Ref(Traded(${price}), -1) - 1"


@checked
def label_name(horizon: Count = 10, price: Price = "close") -> str:
    """Column name of a label, `RET10` or `RET10_open`."""
    return f"RET{horizon}" + ("" if price == "close" else f"_{price}")


def named_horizon(name: str) -> int | None:
    """Trading days that a name of `label_name` tells; None of another name.

    Examples
    --------
    >>> [named_horizon(name) for name in ("RET10", "RET5_open", "LABEL0")]
    [10, 5, None]
    """
    found = re.fullmatch(rf"RET(\d+)(_({'|'.join(PRICES)}))?", name)
    return int(found[1]) if found else None


@checked
def label_reach(horizon: Count = 10) -> int:
    """Trading days after t whose prices the label of t uses."""
    return horizon + 1


def given_labels(label: Any) -> tuple[list[str], list[str], int]:
    """Read labels that are Qlib expressions, such as `qlib.contrib.rolling` sets.

    Parameters
    ----------
    label : str, list of str, or (list of str, list of str)
        Expressions, or expressions and names; without names LABEL0, LABEL1, ... as in
        Qlib's own handlers.

    Returns
    -------
    expressions, names : list of str
    reach : int
        Trading days after t that the farthest looks ahead.

    Examples
    --------
    >>> given_labels(["Ref($close, -21) / Ref($close, -1) - 1"])[1:]
    (['LABEL0'], 21)
    """
    sequence = isinstance(label, (list, tuple))
    expressions: Any = list(label) if sequence else [label]
    names: Any = [f"LABEL{k}" for k in range(len(expressions))]
    if len(expressions) == 2 and all(isinstance(x, (list, tuple)) for x in expressions):
        expressions, names = (list(x) for x in expressions)
    texts = all(isinstance(x, str) for x in [*expressions, *names])
    if not expressions or not texts or len(names) != len(expressions):
        raise ValueError(
            "`label` must be Qlib expressions, or a list of these and one of as many "
            f"names, got {label!r}."
        )
    reach = days_ahead(expressions)
    if reach < 1:
        raise ValueError(f"`label` looks no day ahead: {expressions}.")
    return expressions, names, reach


def days_ahead(expressions: Iterable[str]) -> int:
    """Trading days after t that some Qlib expressions use on day t."""
    ahead = [0]
    for text in expressions:
        try:
            ahead.append(node_of(text).look_ahead)
        except Unsupported:  # an operator that only Qlib has
            parsed = ExpressionD.get_expression_instance(text)
            ahead.append(int(parsed.get_extended_window_size()[1]))
    return max(ahead)


def holding_days(expression: str) -> int:
    """Trading days between the two prices of a label that is a Qlib expression.

    Examples
    --------
    >>> [holding_days(f"{x} - 1") for x in ("Ref($close,-6)/Ref($close,-1)",
    ...     "Ref($close,-5)/$close", "Ref($close/Ref($close,5),-6)")]
    [5, 5, 5]
    """
    try:
        node = node_of(expression)
    except Unsupported:
        return max(1, days_ahead([expression]) - 1)
    return _between(node) or max(1, node.look_ahead - 1)


def _between(node: Node) -> int:
    """Days between what a return divides, or takes away; 0 if it does neither."""
    leads = [_lead(part) for part in node.args]
    farthest = max((x for x in leads if x is not None), default=0)
    for part, lead in zip(node.args, leads, strict=True):
        if lead == farthest and (found := _between(part)):
            return found
    if node.op in ("Div", "Sub") and None not in leads:
        return max(0, leads[0] - leads[1])  # type: ignore[operator]
    return 0


def _lead(node: Node) -> int | None:
    """Days after t of the last value that a tree uses; None of a number."""
    if not node.args:
        return 0 if node.op else None
    leads = [x for part in node.args if (x := _lead(part)) is not None]
    if not leads:
        return None
    shift = int(node.numbers[0]) if OPERATORS[node.op].numbers == "lag" else 0
    return max(leads) - (min(shift, 0) if node.op == "Delta" else shift)


def check_labels(frame: pd.DataFrame, group: str = "label") -> None:
    """Refuse infinite labels of a handler's raw frame: returns from a price of 0.

    Raises
    ------
    ValueError
        Naming the label, how many there are, and the first row.
    """
    if frame.columns.nlevels < 2 or group not in frame.columns.get_level_values(0):
        return
    for name, values in frame[group].items():
        wrong = np.isinf(values.to_numpy(np.float64, na_value=np.nan))
        if wrong.any():
            row = dict(zip(frame.index.names, frame.index[wrong.argmax()], strict=True))
            raise ValueError(
                f"label {name!r} is infinite in {int(wrong.sum())} row(s), first "
                f"{row.get('instrument')} on {row.get('datetime'):%Y-%m-%d}: the store "
                "has prices of 0, as some write suspensions. Take prices of traded "
                "days: `horizon` in place of `label`, or Traded($close) for $close in "
                "its expression."
            )


def label_config(
    horizon: int | list[int] | tuple[int, ...] = 10,
    price: Any = "close",
    carry: bool = True,
) -> tuple[list[str], list[str]]:
    """Loader configuration of one label group, one column per horizon.

    Parameters
    ----------
    horizon : int or list of int, default 10
        Holding periods in trading days; the first is the main label.
    price : {"close", "open", "vwap"} or a list of these, default "close"
        Adjusted price at both ends; as a list, one for each horizon.
    carry : bool, default True
        See `forward_return`.

    Returns
    -------
    (list of str, list of str)
        Expressions and column names, as `QlibDataLoader` takes them.

    Raises
    ------
    ValueError
        If the lists are empty, of different lengths, or name a label twice.

    Examples
    --------
    >>> label_config([10, 5])[1]
    ['RET10', 'RET5']
    >>> label_config(1, ["close", "open"])[1]
    ['RET1', 'RET1_open']
    """
    horizons = list(horizon) if isinstance(horizon, (list, tuple)) else [horizon]
    prices = list(price) if isinstance(price, (list, tuple)) else [price]
    if not horizons:
        raise ValueError("`horizon` is an empty list; give at least one, such as 10.")
    if len(prices) == 1:
        prices *= len(horizons)
    elif len(horizons) == 1 and prices:
        horizons *= len(prices)
    if len(prices) != len(horizons):
        raise ValueError(
            f"`price` must be one price, or one for each of `horizon` {horizons}, got "
            f"{price!r}."
        )
    names = [label_name(h, p) for h, p in zip(horizons, prices, strict=True)]
    if len(set(names)) < len(names):
        what = "a period" if len(set(prices)) == 1 else "a label"
        raise ValueError(f"`horizon` names {what} twice: {horizons}, prices {prices}.")
    return (
        [forward_return(h, p, carry) for h, p in zip(horizons, prices, strict=True)],
        names,
    )
