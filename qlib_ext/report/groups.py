"""Scores of groups of stocks (industries, indices, ETFs), and rotation between them.

    level[t, g]  = sum_i w[t, g, i] x[t, i] / sum_i w[t, g, i]    over the known x
    change[t, g] = level[t, g] less, or over, level[t - 5, g]

A weight of day t must be known at the close of day t: weights of a basket count from
the day on which it was announced.

Glossary: t trading days, n stocks, g groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qlib_ext import metrics

__all__ = [
    "Groups",
    "Rotation",
    "basket_weights",
    "code_weights",
    "group_levels",
    "member_closes",
    "rotate",
    "weekly_change",
]

# Trading days in a week.
WEEK = 5


@dataclass
class Groups:
    """Levels and prices of groups.

    Attributes
    ----------
    levels : DataFrame [t, g]
        Weighted mean of the stocks' values; NaN below the least cover.
    covers : DataFrame [t, g]
        Share of the weight whose value was known.
    closes : DataFrame [t, g]
        What a holder's money would have become.
    notes : list of str
        What the reader must know: groups without a basket, and from when they have one.
    """

    levels: pd.DataFrame
    covers: pd.DataFrame
    closes: pd.DataFrame
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rotation:
    """Daily returns of the k best groups, bought weekly, and of all.

    Attributes
    ----------
    returns : DataFrame [t]
        ``best`` after costs, ``best before costs``, ``all`` (equal weight, without
        costs) and ``excess``, best less all; NaN up to the first fill.
    turnover : float
        Mean one-sided turnover of a week.
    held : DataFrame [w, k]
        Names of the groups wanted at each fill, the best first.
    """

    returns: pd.DataFrame
    turnover: float
    held: pd.DataFrame


def code_weights(
    codes: np.ndarray, weight: np.ndarray, names: Mapping[float, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Weights [t, n] of each group of stocks that carry one code on the day.

    Parameters
    ----------
    codes : ndarray [t, n]
        Group of each stock at the close of t, NaN for none.
    weight : ndarray [t, n]
        Size of each stock; ones for equal weights.
    names : mapping of float to str
        Code to group, for the codes that are wanted.
    """
    for code, name in names.items():
        yield name, np.where(codes == code, weight, 0.0)


def basket_weights(
    holdings: pd.DataFrame,
    wanted: Iterable[str],
    days: pd.DatetimeIndex,
    instruments: pd.Index,
    *,
    skip: bool = False,
    notes: list[str] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Weights [t, n] of funds by their latest report announced up to each day.

    Parameters
    ----------
    holdings : DataFrame
        ``fund``, ``period_end``, ``announced``, ``instrument``, ``weight``: see
        `data_handlers.holdings.read_holdings`. A fund's report replaces the one before;
        a report announced later about an earlier period is left aside.
    wanted : iterable of str
        Funds.
    days, instruments
        Rows and columns. What a basket holds beyond `instruments` counts as unknown.
    skip : bool, default False
        Leave out a fund without basket, and begin a fund's weights with its first one;
        each such gap is put into `notes`. False: both are errors.
    notes : list of str, optional
        Gets the gaps.

    Yields
    ------
    name, weights
        Rows sum to the share of the basket that `instruments` hold; 0 before the first
        basket.

    Raises
    ------
    ValueError
        If a report is announced by the end of its period, a weight is not positive, or,
        unless `skip`, a fund has no basket on the first day.
    """
    early = holdings["announced"] <= holdings["period_end"]
    if early.any():
        raise ValueError(
            f"`holdings` of {holdings.loc[early, 'fund'].iloc[0]} are dated by the end "
            "of their period; a basket counts from the day it was public."
        )
    if not (holdings["weight"] > 0).all():
        raise ValueError("`holdings` must have positive weights only; drop the others.")
    by_fund = dict(list(holdings.groupby("fund")))
    for name in wanted:
        reports = by_fund.get(name)
        first: Any = None if reports is None else reports["announced"].min()
        gap = ""
        if first is None or first > days[-1]:
            gap = f"{name} has no basket up to {days[-1]:%Y-%m-%d}"
        elif first > days[0]:
            gap = f"{name} has no basket before {first:%Y-%m-%d}"
        if gap and not skip:
            raise ValueError(
                f"`groups`: {gap}, and {days[0]:%Y-%m-%d} is the first day; leave it "
                "out, begin later, or set `gaps: name` to have it named instead."
            )
        if gap and notes is not None:
            notes.append(f"{gap}.")
        if reports is None or first > days[-1]:
            continue
        yield name, _latest(reports, days, instruments)


def _latest(
    reports: pd.DataFrame, days: pd.DatetimeIndex, instruments: pd.Index
) -> np.ndarray:
    out = np.zeros((len(days), len(instruments)))
    newest = pd.Timestamp.min
    by_report: Any = reports.groupby(["announced", "period_end"])
    for (announced, period), part in by_report:
        if period < newest:
            continue
        newest = period
        at = instruments.get_indexer(part["instrument"])
        weight = part["weight"].to_numpy(float) / part["weight"].sum()
        row = np.zeros(len(instruments))
        np.add.at(row, at[at >= 0], weight[at >= 0])
        out[days.searchsorted(announced) :] = row
    return out


def group_levels(
    values: np.ndarray, weight: np.ndarray, total: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of the known values of one group, and the share of its weight.

    Parameters
    ----------
    values : ndarray [t, n]
        NaN unknown.
    weight : ndarray [t, n]
        Not negative; 0 for no member.
    total : ndarray [t], optional
        Weight of the whole group. Default: the sum of `weight`.

    Returns
    -------
    level, cover : ndarray [t]
        NaN, and 0, where nothing is known.
    """
    known = np.isfinite(values)
    inside = np.where(known, weight, 0.0)
    sums = inside.sum(1)
    some = sums > 0
    whole = weight.sum(1) if total is None else total
    level = (inside * np.where(known, values, 0.0)).sum(1) / np.where(some, sums, 1.0)
    return (
        np.where(some, level, np.nan),
        np.where(some, sums / np.where(whole > 0, whole, 1.0), 0.0),
    )


def member_closes(close: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Value of a group that holds its members by the weights of the day before.

    Parameters
    ----------
    close : ndarray [t, n]
        Adjusted, NaN without a trade: the member then stands still.
    weight : ndarray [t, n]

    Returns
    -------
    ndarray [t]
        1 on the first day with a member, NaN before.
    """
    held = metrics.forward_fill(torch.from_numpy(close)).numpy()
    moved = np.zeros_like(held)
    moved[1:] = np.nan_to_num(held[1:] / held[:-1] - 1)
    before = np.zeros_like(weight)
    before[1:] = weight[:-1]
    total = before.sum(1)
    returns = (before * moved).sum(1) / np.where(total > 0, total, 1.0)
    started = np.maximum.accumulate(weight.sum(1) > 0)
    return np.where(started, np.cumprod(1 + returns), np.nan)


def weekly_change(levels: pd.DataFrame, rate: bool) -> pd.DataFrame:
    """Change over five trading days: a difference, or with `rate` a ratio less 1.

    Raises
    ------
    ValueError
        If a rate is asked for of levels that are not positive.
    """
    before = levels.shift(WEEK)
    if not rate:
        return levels - before
    if (levels <= 0).any(axis=None):
        name = levels.columns[(levels <= 0).any()][0]
        raise ValueError(
            f"`ranked`: {name} has levels of 0 or less, of which there is no rate of "
            "change; set `ranked: true` to average the day's ranks."
        )
    return levels / before - 1


def rotate(
    signal: pd.DataFrame,
    closes: pd.DataFrame,
    k: int,
    buy_cost: float,
    sell_cost: float,
) -> Rotation:
    """Hold the k groups with the highest signal at equal weight, chosen weekly.

    The signal of the week's last day is filled at the next close, as layers are; a
    group without close that day can be neither bought nor sold.

    Parameters
    ----------
    signal, closes : DataFrame [t, g]
    k : int
        Groups held; fewer than there are.
    buy_cost, sell_cost : float
        Fractions of the amount traded.

    Raises
    ------
    ValueError
        If `k` is not below the number of groups.
    """
    count = signal.shape[1]
    if not 1 <= k < count:
        raise ValueError(f"`k` must lie between 1 and {count - 1}, got {k}.")
    days = pd.DatetimeIndex(signal.index)
    close = torch.from_numpy(closes.to_numpy(float).copy())
    score = torch.from_numpy(signal.to_numpy(float).copy())
    ends = metrics.week_ends(days)
    ends = ends[(torch.isfinite(score[ends]).sum(1) > k) & (ends + 1 < len(days))]
    if not len(ends):
        raise ValueError(f"no week has signals of more than `k` = {k} groups.")
    members = [_best_and_all(row, k) for row in score[ends]]
    free = metrics.portfolio_backtest(members, close, ends + 1, 2)
    paid = metrics.portfolio_backtest(
        members, close, ends + 1, 2, buy_cost=buy_cost, sell_cost=sell_cost
    )
    best = paid.returns[:, 0]
    returns = pd.DataFrame(
        {
            "best": best.numpy(),
            "best before costs": free.returns[:, 0].numpy(),
            "all": free.returns[:, 1].numpy(),
            "excess": (best - free.returns[:, 1]).numpy(),
        },
        days,
    ).rename_axis("datetime")
    names = np.asarray(signal.columns.astype(str))
    order = torch.where(torch.isfinite(score[ends]), score[ends], -torch.inf)
    picked = order.sort(dim=1, descending=True, stable=True).indices[:, :k].numpy()
    held = pd.DataFrame(
        names[picked], days[(ends + 1).numpy()], [str(i + 1) for i in range(k)]
    )
    return Rotation(returns, float(free.turnover[:, 0].nanmean()), held)


def _best_and_all(row: Tensor, k: int) -> Tensor:
    """Members [2, g] of the k best, equal signals in the columns' order, and of all."""
    known = torch.isfinite(row)
    order = torch.where(known, row, -torch.inf)
    order = order.sort(dim=0, descending=True, stable=True).indices
    best = torch.zeros_like(known)
    best[order[:k]] = True
    return torch.stack([best & known, known])
