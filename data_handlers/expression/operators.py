"""The operators of the engine: how each is written, and its values on a block.

A block is an array ``[days, stocks]``. Element-wise operators are numpy's, as in Qlib,
so float32 stays float32 where Qlib keeps it; rolling ones give float64.

Departures from Qlib, all of them where Qlib's value depends on where a query begins:

- sums over a window are taken anew each day. pandas carries running sums along, whose
  last digits depend on the day on which they began; the difference is float64 rounding.
- an infinite value inside a regression (`Slope`, `Resi`, `Rsquare`) spoils the windows
  that hold it; Qlib's running sums never recover. `Evaluator.is_unstable` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_handlers.expression import kernels

__all__ = ["CROSS", "OPERATORS", "Operator", "elementwise", "lagged", "rolling"]


@dataclass(frozen=True)
class Operator:
    """How an operator is written.

    Attributes
    ----------
    arity : int
        Trees it takes.
    numbers : str
        What follows the trees: ``""``, ``lag``, ``window`` or ``quantile`` (a window
        and a level).
    constants : bool
        Some of its trees may be numbers.
    optional : int
        Trees that may be left out.
    """

    arity: int
    numbers: str = ""
    constants: bool = False
    optional: int = 0


_UFUNCS: dict[str, Any] = {
    "Abs": np.abs,
    "Log": np.log,
    "Not": np.bitwise_not,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Power": np.power,
    "Greater": np.maximum,
    "Less": np.minimum,
    "Gt": np.greater,
    "Ge": np.greater_equal,
    "Lt": np.less,
    "Le": np.less_equal,
    "Eq": np.equal,
    "Ne": np.not_equal,
    "And": np.bitwise_and,
    "Or": np.bitwise_or,
}
_ROLLING = (
    "Mean Sum Count Std Var Max Min IdxMax IdxMin Med Mad WMA Rank Slope Resi Rsquare"
).split()

#: Cross-sectional operators: one day of the universe's members at a time. The second
#: tree, where given, holds a number for each stock's group.
CROSS = ("CSRank", "CSZScore", "CSDemean", "CSScale")

#: Every operator of the engine. `IfGreater(a,b,c,d)` is how mining keeps
#: ``If(Gt(a,b),c,d)``.
OPERATORS: dict[str, Operator] = {
    **{
        n: Operator(1 if f.nin == 1 else 2, constants=f.nin == 2)
        for n, f in _UFUNCS.items()
    },
    "Sign": Operator(1),
    "Traded": Operator(1),
    "If": Operator(3, constants=True),
    "IfGreater": Operator(4, constants=True),
    "Ref": Operator(1, "lag"),
    "LastTraded": Operator(1, "lag"),
    "Delta": Operator(1, "lag"),
    **{name: Operator(1, "window") for name in _ROLLING},
    "Quantile": Operator(1, "quantile"),
    "Corr": Operator(2, "window"),
    "Cov": Operator(2, "window"),
    **{name: Operator(2, optional=1) for name in CROSS},
}


def elementwise(op: str, values: Sequence[np.ndarray | float]) -> np.ndarray:
    """Value of an operator that looks at one day and one stock only."""
    if op == "Sign":
        return np.sign(np.asarray(values[0]).astype(np.float32))
    if op == "Traded":
        x = np.asarray(values[0])
        return np.where(x > 0, x, x.dtype.type(np.nan))
    if op == "If":
        return np.where(*values)  # type: ignore[call-overload]
    if op == "IfGreater":
        return np.where(values[0] > values[1], values[2], values[3])  # type: ignore[operator]
    return _UFUNCS[op](*values)


def lagged(op: str, x: np.ndarray, lead: int, rows: int, days: int) -> np.ndarray:
    """`Ref` or `Delta`; row r of the result is row ``lead + r`` of `x`."""
    out = np.full((rows, x.shape[1]), np.nan, x.dtype)
    first, last = max(0, lead - days), min(len(x), lead + rows - days)
    if last > first:
        at = first + days - lead
        out[at : at + last - first] = x[first:last]
    return out if op == "Ref" else x[lead : lead + rows] - out


def finite(x: np.ndarray, single: bool = False) -> np.ndarray:
    """Copy in which infinite values are missing, as pandas' windows take them.

    Float64; with `single`, float32 stays so.
    """
    kind = np.float32 if single and x.dtype == np.float32 else np.float64
    out = np.empty(x.shape, kind)
    if x.dtype == bool:
        out[:] = x
    else:
        kernels.finite(x, out)
    return out


def rolling(
    group: str,
    wanted: Sequence[tuple[str, tuple[float, ...]]],
    values: Sequence[np.ndarray],
    lead: int,
    rows: int,
    since: np.ndarray,
) -> list[np.ndarray]:
    """Values of rolling operators of one group on the same trees, ``[rows, n]`` each.

    Parameters
    ----------
    group : str
        What `GROUPS` gives for their names.
    wanted : sequence of (name, numbers)
    values : sequence of arrays [lead + rows, n]
    lead, rows : int
        Days before the first day asked for, and days asked for.
    since : int array [n]
        Row of `values` at which the series of a stock begins.
    """
    x = values[0]
    windows = np.array(sorted({int(numbers[0]) for _, numbers in wanted}))
    place = {w: k for k, w in enumerate(windows.tolist())}

    def at(name_numbers: tuple[str, tuple[float, ...]]) -> int:
        return place[int(name_numbers[1][0])]

    shape = (len(windows), rows, x.shape[1])
    out = np.empty(shape)
    if group == "Count":
        known = finite(~np.isnan(x) if x.dtype != bool else np.ones_like(x))
        known[np.arange(len(x))[:, None] < since] = np.nan
        kernels.sums(known, lead, windows, False, out)
    elif group in ("Sum", "Mean"):
        kernels.sums(finite(x), lead, windows, group == "Mean", out)
    elif group == "Std":
        kernels.variances(finite(x), lead, windows, out)
        roots = np.sqrt(out) if any(n == "Std" for n, _ in wanted) else out
        return [(roots if w[0] == "Std" else out)[at(w)] for w in wanted]
    elif group in ("Max", "Min"):
        key = finite(x, True)
        sign = 1.0 if group == "Max" else -1.0
        key *= sign
        kernels.extremes(key, lead, windows, sign, out)
    elif group in ("IdxMax", "IdxMin"):
        key = finite(x, True)
        known = key.copy()
        if group == "IdxMin":
            np.negative(key, out=key)
        # numpy's argmax stops at the first NaN.
        key[np.isnan(known)] = np.inf
        key[np.arange(len(x))[:, None] < since] = -np.inf
        kernels.positions(key, known, lead, windows, since, out)
    elif group == "Rank":
        kernels.ranks(finite(x, True), lead, windows, out)
    elif group == "Mad":
        kernels.deviations(finite(x), lead, windows, out)
    elif group == "WMA":
        kernels.weighted(finite(x), lead, windows, since, out)
    elif group == "Quantile":
        clean = finite(x, True)
        results: dict[tuple[int, float], np.ndarray] = {}
        for w in place:
            levels = sorted(
                {n[1] if op == "Quantile" else -1.0 for op, n in wanted if n[0] == w}
            )
            part = np.empty((len(levels), rows, x.shape[1]))
            kernels.quantiles(clean, lead, w, np.array(levels, float), part)
            results |= {(w, q): part[k] for k, q in enumerate(levels)}
        return [
            results[int(n[0]), n[1] if op == "Quantile" else -1.0] for op, n in wanted
        ]
    elif group == "Slope":
        names = ("Slope", "Rsquare", "Resi")
        modes = np.array([any(n == m for n, _ in wanted) for m in names])
        figures = np.empty((3, *shape)) if modes.sum() > 1 else np.empty((1, *shape))
        slots = np.cumsum(modes) - 1
        slots[~modes] = -1
        kernels.regressions(x.astype(np.float64), lead, windows, slots, figures)
        return [figures[slots[names.index(w[0])], at(w)] for w in wanted]
    elif group == "Corr":
        return _paired(wanted, values, lead, windows, place)
    else:
        raise ValueError(f"operator {group!r} is not in the table.")
    return [out[at(w)] for w in wanted]


def _paired(wanted, values, lead, windows, place):
    x, y = finite(values[0]), finite(values[1])
    lone = []
    known = ~np.isnan(x) & ~np.isnan(y)
    rows = len(x) - lead if len(x) > lead else 0
    shape = (len(windows), rows, x.shape[1])
    for k, own in enumerate((x, y)):
        # Qlib looks at each series' own deviation, on days when the other is missing
        # as well.
        if not np.array_equal(~np.isnan(own), known):
            alone = np.empty(shape)
            kernels.variances(own, lead, windows, alone)
            lone.append(alone)
            if k:
                y = np.where(known, y, np.nan)
            else:
                x = np.where(known, x, np.nan)
    figures = np.empty((1 + any(op == "Cov" for op, _ in wanted), *shape))
    kernels.co_moments(x, y, lead, windows, figures)
    for alone in lone:
        figures[0][np.sqrt(alone) <= kernels.CONSTANT] = np.nan
    return [figures[0 if op == "Corr" else 1, place[int(n[0])]] for op, n in wanted]


#: Rolling operators that one kernel gives together, by name.
GROUPS = {name: name for name in _ROLLING} | {
    "Var": "Std",
    "Med": "Quantile",
    "Quantile": "Quantile",
    "Resi": "Slope",
    "Rsquare": "Slope",
    "Corr": "Corr",
    "Cov": "Corr",
}
