r"""Funds of the embedded market, whose holdings tell latent attributes of stocks.

Each stock has three latent attributes and each fund a taste for them: a fund holds the
stocks it likes best. With `attribute_alpha` one attribute earns at a time while the
other two lose half as much, so that none pays in the long run; the hidden regime of
about 60 days shows only in which stocks rise. The strength is the std of the expected
10-day return.

Reports are as the law has them: ten largest positions every quarter, within 15 trading
days; all positions at half-years and years, within 60 and 90 days.
"""

import numpy as np
import pandas as pd

from data_handlers.arguments import check_whole
from qlib_ext.market.draws import draw
from qlib_ext.market.links import regime_chance, regimes

__all__ = ["ATTRIBUTES", "attribute_returns", "holdings", "latent_attributes"]

ATTRIBUTES = 3
POSITIONS, TOP = 30, 10
_INVESTED = 0.85
_NOISE = 0.7  # of a fund's opinion of a stock, beside a taste of length about 1.7


def latent_attributes(seed: int, n: int) -> np.ndarray:
    """Draw the attributes of stocks, [n, 3], independent and of unit variance."""
    return draw(seed, "attributes").standard_normal((n, ATTRIBUTES))


def attribute_returns(
    seed: int, t: int, n: int, strength: float, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the attributes earn on each day, and the oracle, each [t, n].

    The oracle is the expected log return from the close of t+1 to the close of
    t+1+horizon given the regime of day t.
    """
    premium = (1.5 * np.eye(ATTRIBUTES) - 0.5) / np.sqrt(1.5)
    now = latent_attributes(seed, n) @ premium[regimes(seed, t, "attribute regime")].T
    chance = [regime_chance(k) for k in range(2, horizon + 2)]
    daily = strength / sum(same - other for same, other in chance)
    return daily * now.T, strength * now.T


def holdings(
    seed: int, days: pd.DatetimeIndex, codes: list[str], alive: np.ndarray, funds: int
) -> pd.DataFrame:
    """Make all reports that are out by the last day, as `qlib-ext ingest` writes them.

    Parameters
    ----------
    seed : int
    days : DatetimeIndex [t]
    codes : list of str [n]
    alive : bool ndarray [t, n]
        Listed stocks.
    funds : int
        10 to 5,000.

    Returns
    -------
    DataFrame
        ``fund``, ``period_end``, ``announced``, ``instrument``, ``weight``.
    """
    check_whole("funds", funds, 10, 5000)
    rng = draw(seed, "funds")
    latent = latent_attributes(seed, len(codes))
    liked = rng.standard_normal((funds, ATTRIBUTES)) @ latent.T
    liked += _NOISE * rng.standard_normal(liked.shape)
    names = np.array([f"{i:06d}" for i in range(1, funds + 1)])
    parts = []
    for end in pd.date_range(days[0], days[-1], freq="QE"):
        slot = days.searchsorted(end, "right") - 1
        opinion = liked + 0.2 * rng.standard_normal(liked.shape)
        quick = slot + rng.integers(10, 16, funds)
        lag = {6: (40, 61), 12: (60, 91)}.get(end.month)
        late = rng.integers(*(lag or (1, 2)), funds)
        listed = np.flatnonzero(alive[slot])
        order = listed[np.argsort(-opinion[:, listed], axis=1)[:, :POSITIONS]]
        size = np.exp(0.5 * np.take_along_axis(opinion, order, axis=1))
        weight = _INVESTED * size / size.sum(axis=1, keepdims=True)
        done = quick < len(days)
        if done.any():
            at = days[np.minimum(quick, len(days) - 1)].to_numpy()
            parts.append((done, end, at, order[:, :TOP], weight[:, :TOP]))
        if lag:
            at = (end + pd.to_timedelta(late, "D")).to_numpy()
            parts.append((at <= days[-1].to_numpy(), end, at, order, weight))
    frames = [
        pd.DataFrame(
            {
                "fund": np.repeat(names[done], order.shape[1]),
                "period_end": end,
                "announced": np.repeat(at[done], order.shape[1]),
                "instrument": np.array(codes)[order[done]].ravel(),
                "weight": weight[done].ravel(),
            }
        )
        for done, end, at, order, weight in parts
    ]
    table = pd.concat(frames)
    keys = ["fund", "period_end", "announced", "instrument"]
    return table.sort_values(keys, ignore_index=True)
