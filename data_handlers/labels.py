"""Forward returns as Qlib expressions, and how far into the future they reach.

A signal of day t is known at the close of t and traded on t+1 at the earliest, so every
label starts at a price of t+1 (SPEC section 2).
"""

from __future__ import annotations

from typing import Literal, get_args

from data_handlers.arguments import Count, checked

__all__ = ["PRICES", "forward_return", "label_config", "label_name", "label_reach"]

Price = Literal["close", "open", "vwap"]
PRICES: tuple[str, ...] = get_args(Price)


@checked
def forward_return(horizon: Count = 10, price: Price = "close") -> str:
    """Qlib expression of the arithmetic return from t+1 to t+1+`horizon`.

    Parameters
    ----------
    horizon : int, default 10
        Holding period in trading days.
    price : {"close", "open", "vwap"}, default "close"
        Adjusted price at both ends.

    Returns
    -------
    str
        NaN where either price is missing: a stock that is suspended at t+1 cannot be
        bought.

    Examples
    --------
    >>> forward_return()
    'Ref($close, -11) / Ref($close, -1) - 1'
    """
    return f"Ref(${price}, -{horizon + 1}) / Ref(${price}, -1) - 1"


@checked
def label_name(horizon: Count = 10, price: Price = "close") -> str:
    """Column name of a label, `RET10` or `RET10_open`."""
    return f"RET{horizon}" + ("" if price == "close" else f"_{price}")


@checked
def label_reach(horizon: Count = 10) -> int:
    """Trading days after t whose prices the label of t uses."""
    return horizon + 1


def label_config(
    horizon: int | list[int] | tuple[int, ...] = 10, price: Price = "close"
) -> tuple[list[str], list[str]]:
    """Loader configuration of one label group, one column per horizon.

    Parameters
    ----------
    horizon : int or list of int, default 10
        Holding periods in trading days; the first is the main label.
    price : {"close", "open", "vwap"}, default "close"
        Adjusted price at both ends.

    Returns
    -------
    (list of str, list of str)
        Expressions and column names, as `QlibDataLoader` takes them.

    Examples
    --------
    >>> label_config([10, 5])[1]
    ['RET10', 'RET5']
    """
    horizons = list(horizon) if isinstance(horizon, (list, tuple)) else [horizon]
    if not horizons:
        raise ValueError("`horizon` is an empty list; give at least one, such as 10.")
    if len(set(horizons)) < len(horizons):
        raise ValueError(f"`horizon` names a period twice: {horizons}.")
    return (
        [forward_return(h, price) for h in horizons],
        [label_name(h, price) for h in horizons],
    )
