r"""Convertible bonds: series of bond and share, attributes of the day, pools.

The store is an ordinary Qlib day store whose instruments are bonds; `qlib-ext ingest`
and `qlib-ext market make --bonds` write it. Its prices are full prices per 100 CNY of
face value, as traded (`$factor` is 1). Formulas: docs/systems/convertible.md.

| feature (of the series) | formula | unit |
|---|---|---|
| price | log(close / 100) | log |
| return | close / last close before - 1 | return |
| volume | log(volume / its mean over 20 days) | log |
| turnover | log(amount / (remaining size x close / 100)) | log |
| premium | log(close / conversion value) | log |
| floor_premium | log(close / pure-bond value) | log |
| stock_return | `$stock_return` | return |
| stock_vol | std of `$stock_return` over 20 days x sqrt(252) | fraction a year |

| attribute (of the day) | formula | unit |
|---|---|---|
| conv_value | log(conversion value / 100) | log |
| conv_premium | log(close / conversion value) | log |
| log_size | log(remaining size) | log CNY |
| years | years to maturity | years |
| rating | 1 (C) to 21 (AAA) | ordinal |
| ytm | yield to maturity of the full price | fraction a year |
| age | log(1 + days since listing) | log days |
| called | 1 once an early redemption was announced | 0, 1 |

All are known at the close of t and NaN on days without a trade. What the store has not
is left out, and the log says so.

Glossary: t days, n bonds.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from qlib.log import get_module_logger

from data_handlers.arguments import NonNegative, Universe
from data_handlers.cross_section import column_values
from data_handlers.handler import FeatureHandler, on_traded_days, own_processor
from data_handlers.processor import FrameProcessor
from data_handlers.traded import DAILY_RETURN
from data_handlers.universe import membership_spans

__all__ = [
    "ATTRIBUTES",
    "EQUITY_ABOVE",
    "POOLS",
    "RATINGS",
    "SERIES",
    "ConvertibleHandler",
    "TradableBonds",
    "pool_numbers",
    "pool_spans",
    "rating_number",
    "yield_to_maturity",
]

logger = get_module_logger("data_handlers")

#: Feature -> Qlib expression.
SERIES = {
    "price": "Log($close / 100)",
    "return": DAILY_RETURN,
    "volume": "Log($volume / Mean($volume, 20))",
    "turnover": "Log($amount / ($remain_size * $close / 100))",
    "premium": "Log($close / $conv_value)",
    "floor_premium": "Log($close / $bond_floor)",
    "stock_return": "$stock_return",
    "stock_vol": "Std($stock_return, 20) * 15.8745",
}
#: Attribute of the day -> Qlib expression.
ATTRIBUTES = {
    "conv_value": "Log($conv_value / 100)",
    "conv_premium": "Log($close / $conv_value)",
    "log_size": "Log($remain_size)",
    "years": "$years_to_maturity",
    "rating": "$rating",
    "ytm": "$ytm",
    "age": "Log(1 + $days_listed)",
    "called": "$call_state",
}

#: Pools by parity, conversion value over pure-bond value less 1; also markets' names.
POOLS = ("equity_biased", "balanced", "debt_biased")
EQUITY_ABOVE, DEBT_BELOW = 0.2, -0.2

#: Ratings of Chinese agencies, worst first.
RATINGS = tuple(
    "C CC CCC- CCC CCC+ B- B B+ BB- BB BB+ BBB- BBB BBB+ A- A A+ AA- AA AA+ AAA".split()
)
_RANK = {name: number for number, name in enumerate(RATINGS, 1)}
_FIELD = re.compile(r"\$(\w+)")


def rating_number(rating: str | None) -> float:
    """Return the number of a rating: 1 (C) to 21 (AAA); NaN where it is none.

    Examples
    --------
    >>> [rating_number(r) for r in ("AAA", "aa+", "A-1", None)]
    [21.0, 20.0, nan, nan]
    """
    if not isinstance(rating, str):
        return np.nan
    text = rating.strip().upper()
    text = text[:-3] if text.endswith(("STI", "SPC")) else text
    return float(_RANK.get(text, np.nan))


def pool_numbers(conv_value: np.ndarray, bond_floor: np.ndarray) -> np.ndarray:
    """Pool of each bond by parity: conversion value over pure-bond value, less 1.

    Parameters
    ----------
    conv_value, bond_floor : ndarray
        Of the same day, CNY per 100 of face value.

    Returns
    -------
    int8 ndarray
        Position in `POOLS`: above +20 % equity-biased, below -20 % debt-biased, else
        balanced; -1 where a value is unknown.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        parity = np.asarray(conv_value, float) / np.asarray(bond_floor, float) - 1
        number = np.where(parity > EQUITY_ABOVE, 0, np.where(parity < DEBT_BELOW, 2, 1))
    return np.where(np.isfinite(parity), number, -1).astype(np.int8)


def pool_spans(bars: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Membership of the three pools as markets of a store, day by day.

    A bond belongs to the pool of the values at the close of the same day, so a list
    holds nothing that was not known then.

    Parameters
    ----------
    bars : DataFrame
        ``datetime``, ``instrument``, ``conv_value``, ``bond_floor``.

    Returns
    -------
    dict of str to DataFrame
        ``instrument``, ``start``, ``end`` by pool; pools that never had a member are
        left out.
    """
    if not {"conv_value", "bond_floor"} <= set(bars):
        return {}
    number = pool_numbers(bars["conv_value"].to_numpy(), bars["bond_floor"].to_numpy())
    days = pd.DatetimeIndex(np.sort(bars["datetime"].unique()))
    codes = sorted(bars["instrument"].unique())
    row = days.get_indexer(pd.DatetimeIndex(bars["datetime"]))
    column = pd.Index(codes).get_indexer(bars["instrument"])
    table = np.full((len(days), len(codes)), -1, np.int8)
    table[row, column] = number
    found = {
        name: membership_spans(table == k, codes, days) for k, name in enumerate(POOLS)
    }
    return {name: spans for name, spans in found.items() if len(spans)}


def yield_to_maturity(
    price: np.ndarray, years: np.ndarray, flows: np.ndarray
) -> np.ndarray:
    """Annual yield at which the flows to come are worth the full price.

    Parameters
    ----------
    price : ndarray [r]
        Full price, CNY per 100 of face value.
    years : ndarray [r, k]
        Years until each payment; payments at or before 0 are over, NaN is none.
    flows : ndarray [r, k]
        CNY per 100 of face value, the redemption among them.

    Returns
    -------
    ndarray [r]
        Annually compounded, within -95 % and 100 %; NaN without a price or a payment to
        come.

    Examples
    --------
    >>> years, flows = np.array([[1.0, 2.0]]), np.array([[5.0, 105.0]])
    >>> yield_to_maturity(np.array([100.0]), years, flows).round(6)
    array([0.05])
    """
    due = np.isfinite(years) & (years > 0) & np.isfinite(flows)
    years, flows = np.where(due, years, 0.0), np.where(due, flows, 0.0)
    low, high = np.full(len(price), -0.95), np.full(len(price), 1.0)
    for _ in range(40):  # to 2e-12
        middle = (low + high) / 2
        value = (flows * (1 + middle[:, None]) ** -years).sum(1)
        above = value > price
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(due.any(1) & (price > 0), (low + high) / 2, np.nan)


class TradableBonds(FrameProcessor):
    """Drop bonds that are called or nearly all converted, as of the day.

    After an early redemption is announced a bond trades for a few weeks more at its
    conversion value; bonds of small remaining size trade at prices of their own. Looks
    at the day's own row and never at a label; keeps no state.

    Parameters
    ----------
    min_size : float, default 0
        Least remaining size, CNY; unknown sizes pass.
    called : bool, default False
        Whether called bonds stay. Where they go, so does the column ``called``, which
        is then 0 throughout.
    """

    by_day = True

    def __init__(self, min_size: NonNegative = 0.0, called: bool = False) -> None:
        pass

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of bonds that may be bought."""
        keep = np.ones(len(df), bool)
        size: Any = ("attribute", "log_size")
        called: Any = ("attribute", "called")
        if self.min_size and size in df:
            at = df.columns.tolist().index(size)
            with np.errstate(divide="ignore", invalid="ignore"):
                keep &= ~(column_values(df, at) < np.log(self.min_size) - 1e-6)
        if called in df and not self.called:
            keep &= ~(column_values(df, df.columns.tolist().index(called)) > 0)
            df = df.drop(columns=[called])
        return df if keep.all() else df[keep]


class ConvertibleHandler(FeatureHandler):
    """Bond and share series as features, attributes of the day as their own group.

    The group `attribute` is standardised over the day and joins a recurrent model
    before its last layer (`attributes: true` of `MultiFactorRNN`). Labels are returns
    of the full price, standardised over the day; who holds a bond that is redeemed
    inside the horizon keeps its last price.

    Parameters
    ----------
    instruments : str, list or dict, default "all"
        "equity_biased", "balanced" and "debt_biased" are the pools by parity. A bond
        enters them without its past; train on all and judge by pool.
    min_size : float, default 30e6
        Least remaining size, CNY; see `TradableBonds`.
    called : bool, default False
        Whether bonds stay once their redemption was announced.
    horizon : int or list of int, default 5
    start_time, end_time, fit_start_time, fit_end_time, …
        As in `FeatureHandler`, without `features` and what concerns risk.

    Raises
    ------
    ValueError
        If the store lacks `$close`, `$conv_value` or `$stock_return`.

    References
    ----------
    Minsheng Securities' factor reports on convertible bonds, and
    docs/systems/convertible.md.
    """

    def __init__(
        self,
        instruments: Universe = "all",
        min_size: NonNegative = 3e7,
        called: bool = False,
        horizon: Any = 5,
        learn_processors: list | None = None,
        shared_processors: list | None = None,
        **kwargs: Any,
    ) -> None:
        expressions = {**SERIES, **ATTRIBUTES}
        fields = [f for e in expressions.values() for f in _FIELD.findall(e)]
        known = set(self.known(list(dict.fromkeys(fields)), instruments, kwargs))
        for need in ("close", "conv_value", "stock_return"):
            if need not in known:
                raise ValueError(
                    f"the store has no `${need}` for `instruments` {instruments!r}: "
                    "ConvertibleHandler needs a store of bonds, such as `qlib-ext "
                    "ingest --preset tushare_cb` or `qlib-ext market make --bonds` "
                    "write."
                )
        absent = sorted(set(fields) - known)
        if absent:
            logger.warning(
                f"the store has no {absent}: features and attributes made of them are "
                "left out"
            )

        def source(table: dict[str, str]) -> dict[str, list[str]]:
            have = {k: e for k, e in table.items() if set(_FIELD.findall(e)) <= known}
            return {
                "expressions": [on_traded_days(e) for e in have.values()],
                "names": list(have),
            }

        if shared_processors is None:
            shared_processors = [
                own_processor(
                    "TradableBonds", "convertible", min_size=min_size, called=called
                ),
                own_processor("DropSuspended"),
            ]
        if learn_processors is None:
            learn_processors = [own_processor("CSZScore", fields_group="label")]
        super().__init__(
            features=source(SERIES),
            attributes=source(ATTRIBUTES),
            instruments=instruments,
            horizon=horizon,
            styles=[],
            learn_processors=learn_processors,
            shared_processors=shared_processors,
            **kwargs,
        )
