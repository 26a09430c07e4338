"""Timing of one instrument: long, flat or short by its score, and what that earned.

The score of day t is known at its close and traded at the open of t+1. All lots change
hands there. On a roll the lots held are moved from one contract to the next at the
closes of the day before: the store's factor says how the two prices relate, so the
account is that of the contracts, not of an adjusted series.

Account of day d, with the lots p held from its open and q held into it:

==========  =========================================================================
night       q x (open - close before of the same contract) x multiplier
day         p x (close - open) x multiplier
cost        (lots traded at the open + two for each lot rolled) x cost a lot and side
return      profit after cost / (lots x close before x multiplier): without leverage
==========  =========================================================================

Prices are those of the contract, to the tick. Docs: docs/systems/treasury.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Gt
from scipy.stats import binomtest

from data_handlers.arguments import Count, NonNegative, Positive, check_arguments
from qlib_ext.metrics import performance

__all__ = ["Timing", "by_group", "permutation_test", "regimes", "summary", "trade"]

#: Multiplier (CNY a point and lot) and tick of the contracts. 0.001 holds every tick
#: that the four had: 0.005, 0.002 and 0.01.
CONTRACTS = {
    "CFFEX.T": (10_000.0, 0.001),
    "CFFEX.TF": (10_000.0, 0.001),
    "CFFEX.TS": (20_000.0, 0.001),
    "CFFEX.TL": (10_000.0, 0.001),
}
_YEAR = 252


@dataclass(frozen=True)
class Timing:
    """How scores become positions, and what trading costs.

    Attributes
    ----------
    band : float
        Scores within [-band, band] take no new position.
    inside : {"flat", "hold"}
        What happens there: nothing is held, or the position stays.
    short : bool
        Whether lots may be sold short; else a negative score is flat.
    lots : int
        Lots held when long or short.
    cost : float
        CNY a lot and side: commission and half the spread. A tick of T is 50 CNY.
    multiplier, tick : float, optional
        CNY a point and lot, and the least price step; `CONTRACTS` knows some.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    band: NonNegative = 0.0
    inside: Literal["flat", "hold"] = "flat"
    short: bool = True
    lots: Count = 1
    cost: NonNegative = 28.0
    multiplier: Annotated[float, Gt(0)] | None = None
    tick: Positive | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_arguments(type(self), vars(self))

    def contract(self, instrument: str) -> tuple[float, float]:
        """Multiplier and tick of an instrument.

        Raises
        ------
        ValueError
            If neither the arguments nor `CONTRACTS` tell.
        """
        known = CONTRACTS.get(instrument, (None, None))
        multiplier = self.multiplier or known[0]
        tick = self.tick or known[1]
        if multiplier is None or tick is None:
            raise ValueError(
                f"`multiplier` and `tick` of {instrument} are not known: give them; "
                f"known are {sorted(CONTRACTS)}."
            )
        return multiplier, tick

    def positions(self, score: np.ndarray) -> np.ndarray:
        """Lots wanted after each score; NaN is flat."""
        side = np.where(score > self.band, 1, np.where(score < -self.band, -1, 0))
        if self.inside == "hold":
            within = np.abs(score) <= self.band
            side = (
                pd.Series(np.where(within, np.nan, side)).ffill().fillna(0).to_numpy()
            )
        if not self.short:
            side = np.maximum(side, 0)
        return self.lots * side.astype(int)


def trade(
    score: pd.Series, bars: pd.DataFrame, how: Timing, instrument: str
) -> pd.DataFrame:
    """Account of one instrument, day by day.

    Parameters
    ----------
    score : Series
        By day.
    bars : DataFrame
        By day, all days of the store around the scores: adjusted ``open`` and
        ``close``, and ``factor``. Days without a trade are left out.
    how : Timing
    instrument : str
        For the contract's multiplier and tick.

    Returns
    -------
    DataFrame
        One row a day after the first score, columns ``score`` (of the day before),
        ``position`` (lots from the open), ``next_return`` (open to the next open, per
        lot long; NaN on the last day), ``rolled`` (lots), ``traded`` (lots at the
        open), ``night``, ``day``, ``cost``, ``profit`` (CNY), ``return``, ``long`` (the
        return of one lot held all along, without cost).

    Raises
    ------
    ValueError
        If the bars hold fewer than two days after the first score.
    """
    multiplier, tick = how.contract(instrument)
    bars = bars[bars["close"].notna() & bars["open"].notna()]
    factor = bars["factor"].to_numpy(float)

    def raw(prices: np.ndarray) -> np.ndarray:
        return np.round(prices / tick) * tick

    opened = raw(bars["open"].to_numpy(float) / factor)
    closed = raw(bars["close"].to_numpy(float) / factor)
    # The close before of the contract that counts today.
    before = np.full(len(bars), np.nan)
    before[1:] = raw(bars["close"].to_numpy(float)[:-1] / factor[1:])
    wanted = how.positions(score.reindex(bars.index).to_numpy(float))
    position = np.r_[0, wanted[:-1]]  # from today's open on
    held = np.r_[0, position[:-1]]  # into today's open
    roll = np.zeros(len(bars), dtype=bool)
    # float32 in the store: an equal factor may differ in its last bit
    roll[1:] = np.abs(factor[1:] / factor[:-1] - 1) > 1e-6
    rolled = np.where(roll, np.abs(held), 0)
    traded = np.abs(position - held)
    night = held * (opened - before) * multiplier
    day = position * (closed - opened) * multiplier
    cost = (traded + 2 * rolled) * how.cost
    capital = how.lots * before * multiplier
    ahead = bars["open"].to_numpy(float)
    frame = pd.DataFrame(
        {
            "score": score.reindex(bars.index).shift().to_numpy(),
            "position": position,
            "next_return": np.r_[ahead[1:] / ahead[:-1] - 1, np.nan],
            "rolled": rolled,
            "traded": traded,
            "night": np.nan_to_num(night),
            "day": day,
            "cost": cost,
            "profit": np.nan_to_num(night) + day - cost,
            "return": (np.nan_to_num(night) + day - cost) / capital,
            "long": closed / before - 1,
        },
        index=bars.index,
    )
    start = bars.index.searchsorted(score.index.min(), side="right")
    frame = frame.iloc[max(start, 1) :]
    if len(frame) < 2:
        raise ValueError(
            f"{instrument} has {len(frame)} day(s) in the store after its first score; "
            "two are needed."
        )
    return frame


def regimes(close: pd.Series, days: int = 60, size: float = 1.0) -> pd.Series:
    """Name the market of each day by what is known at its close.

    Rising (falling) where the log return of the last `days` days is above `size`
    (below -`size`) of what a random walk of their own daily volatility gives, as one
    standard deviation; else sideways; unknown before so many days.

    Parameters
    ----------
    close : Series
        Adjusted close by day.
    days : int, default 60
    size : float, default 1

    Returns
    -------
    Series of str
    """
    r = np.log(close).diff()
    size_of = r.rolling(days).sum() / (r.rolling(days).std() * np.sqrt(days))
    names = np.select(
        [size_of.isna(), size_of > size, size_of < -size],
        ["unknown", "rising", "falling"],
        "sideways",
    )
    return pd.Series(names, index=close.index, name="regime")


def permutation_test(position: np.ndarray, ahead: np.ndarray) -> float:
    """One-sided p-value of the hit rate among all shifts of the positions in time.

    Every circular shift keeps how long positions last and how often they are long, so
    neither a trend nor slow positions make a rate look good. Days without a return or
    a move take part with their position but count no hit.

    Parameters
    ----------
    position, ahead : array [t]
        Side held, and the return that it met.

    Returns
    -------
    float
        Share of shifts, the true one included, with at least its hit rate; NaN where
        no position met a move.
    """
    side, move = np.sign(position), np.sign(np.nan_to_num(ahead))
    n = len(side)
    rows = (np.arange(n)[None] - np.arange(n)[:, None]) % n
    shifted = side[rows]
    met = (shifted * move != 0).sum(1)
    rate = (shifted * move > 0).sum(1) / np.maximum(met, 1)
    if met[0] == 0:
        return float("nan")
    return float((rate >= rate[0] - 1e-12).mean())


def summary(account: pd.DataFrame, whole: bool = True) -> dict[str, float]:
    """Figures of an account, or of some of its days.

    Parameters
    ----------
    account : DataFrame
        Of `trade`.
    whole : bool, default True
        Whether these are consecutive days: drawdown and permutation test need them.

    Returns
    -------
    dict
        ``days``, ``calls`` (days with a position and a move), ``hit_rate`` and its
        95 % Clopper-Pearson interval ``low``, ``high``, ``long_hit_rate`` (of a
        position that is always long), ``annual_return`` (geometric, 252 days, on the
        unleveraged value), ``sharpe`` (no interest), ``max_drawdown``, ``long_return``
        (geometric, held all along), ``turnover`` (sides a year and lot), ``profit`` and
        ``cost`` (CNY), ``p_value`` (`permutation_test`).
    """
    met = np.sign((account["position"] * account["next_return"]).to_numpy())
    calls, hits = int(np.sum(np.abs(met) > 0)), int(np.sum(met > 0))
    moves = np.sign(account["next_return"].to_numpy())
    span = binomtest(hits, calls).proportion_ci() if calls else None
    result = performance(torch.tensor(account["return"].to_numpy()))
    lots = max(int(account["position"].abs().max()), 1)
    out: dict[str, float] = {
        "days": len(account),
        "calls": calls,
        "hit_rate": hits / calls if calls else np.nan,
        "low": span.low if span else np.nan,
        "high": span.high if span else np.nan,
        "long_hit_rate": float((moves > 0).sum() / max((np.abs(moves) > 0).sum(), 1)),
        "annual_return": result.annual_return,
        "sharpe": result.sharpe,
        "long_return": performance(
            torch.tensor(account["long"].to_numpy())
        ).annual_return,
        "turnover": float(
            (account["traded"] + 2 * account["rolled"]).mean() * _YEAR / lots
        ),
        "profit": float(account["profit"].sum()),
        "cost": float(account["cost"].sum()),
    }
    if whole:
        out["max_drawdown"] = result.max_drawdown
        out["p_value"] = permutation_test(
            account["position"].to_numpy(), account["next_return"].to_numpy()
        )
    return out


def by_group(account: pd.DataFrame, names: np.ndarray) -> pd.DataFrame:
    """Figures of groups of days, a row each."""
    rows = {n: summary(part, whole=False) for n, part in account.groupby(names)}
    return pd.DataFrame(rows).T
