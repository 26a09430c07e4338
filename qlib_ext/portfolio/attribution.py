"""Where the return over an index came from, day by day.

    net excess = country + styles + industries + alpha + trading - cost

Country, a style and the industries are the active exposure at the last close times the
day's factor return. Alpha is what the factors leave of the active stocks' returns, the
specific part. Trading is the difference between the account's return and that of the
last close's holdings: what prices did between close and fill. The parts add up exactly.

Glossary: t days, n stocks, k factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_handlers.expression.loading import read_values
from qlib_ext.metrics import DAYS_PER_YEAR
from qlib_ext.portfolio.risk_model import COUNTRY, INDUSTRY, RiskModel, bias_statistic

__all__ = [
    "attribute",
    "benchmark_returns",
    "daily_returns",
    "holdings_frame",
    "tracking_table",
    "traded_closes",
]


def traded_closes(codes: Any, start: Any, end: Any) -> pd.DataFrame:
    """Read adjusted last closes [t, n], from well before `start`.

    So a stock that is suspended at the start has a last close.
    """
    begin = pd.Timestamp(start) - pd.Timedelta(days=400)
    frame = read_values(codes, ["Traded($close)"], begin, end)
    return frame.iloc[:, 0].unstack("instrument")


def daily_returns(closes: pd.DataFrame) -> pd.DataFrame:
    """Arithmetic returns [t, n] from the last known close; 0 on a day without one."""
    held = closes.ffill()
    return (closes / held.shift() - 1).fillna(0.0)


def benchmark_returns(weights: pd.DataFrame, returns: pd.DataFrame) -> pd.Series:
    """Return of an index from its members: weights at t-1 times returns of t.

    With adjusted prices this is a total return: dividends are reinvested. Suspended
    members return 0.

    Parameters
    ----------
    weights : DataFrame [t, n]
        At the close of t, rows summing to 1.
    returns : DataFrame [t, n]

    Returns
    -------
    Series [t]
        NaN on the first day.
    """
    returns = returns.reindex(index=weights.index, columns=weights.columns).fillna(0.0)
    before = weights.shift()
    out = (before * returns).sum(axis=1)
    out[before.isna().all(axis=1)] = np.nan
    return out


def holdings_frame(positions: Mapping[Any, Any]) -> pd.DataFrame:
    """Weights [t, n] at each close in the whole account, from Qlib's positions."""
    rows = {
        pd.Timestamp(day): position.get_stock_weight_dict()
        for day, position in positions.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").sort_index()
    return frame.fillna(0.0)


def attribute(
    model: RiskModel,
    holdings: pd.DataFrame,
    benchmark: pd.DataFrame,
    returns: pd.DataFrame,
    account: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split the daily return over the index.

    Parameters
    ----------
    model : RiskModel
        Exposures and factor returns of every day.
    holdings, benchmark : DataFrame [t, n]
        Weights at the close of t.
    returns : DataFrame [t, n]
        See `daily_returns`.
    account : DataFrame [t]
        ``return`` (before costs), ``bench`` and ``cost`` of each day.

    Returns
    -------
    parts : DataFrame [t]
        ``country``, each style, ``industries``, ``alpha``, ``trading``, ``cost``
        (negative) and their sum ``excess``.
    exposures : DataFrame [t, k]
        Active exposures at the close of t-1, unknown ones counted as 0.
    """
    i = model.inputs
    days = account.index
    names = i.instruments.union(holdings.columns).union(benchmark.columns)

    def panel(frame: pd.DataFrame) -> np.ndarray:
        return frame.reindex(index=days, columns=names).fillna(0.0).to_numpy()

    held, index, r = panel(holdings), panel(benchmark), panel(returns)
    at = names.get_indexer(i.instruments)
    rows = i.days.get_indexer(days)
    factors = model.factors
    styles = list(i.styles)
    industries = [f"{INDUSTRY}{code:g}" for code in factors.codes]
    part_rows, exposure_rows = [], []
    for t in range(len(days)):
        excess = account["return"].iloc[t] - account["bench"].iloc[t]
        cost = account["cost"].iloc[t]
        if t == 0 or rows[t] < 1:
            # Bought today: nothing was held at the last close.
            active, moved = np.zeros(len(names)), 0.0
        else:
            active = held[t - 1] - index[t - 1]
            moved = float(active @ r[t])
        x = np.nan_to_num(i.exposures[rows[t] - 1].astype(float))
        own = active[at]
        code = i.industry[rows[t] - 1]
        by_style = own @ x
        by_industry = np.array([own[code == c].sum() for c in factors.codes])
        f_style = np.nan_to_num(factors.style[rows[t]])
        f_industry = np.nan_to_num(factors.industry[rows[t]])
        country = float(active.sum() * np.nan_to_num(factors.country[rows[t]]))
        style_part = by_style * f_style
        industry_part = float(by_industry @ f_industry)
        alpha = moved - country - style_part.sum() - industry_part
        part_rows.append(
            {
                COUNTRY: country,
                **dict(zip(styles, style_part, strict=True)),
                "industries": industry_part,
                "alpha": alpha,
                "trading": excess - moved,
                "cost": -cost,
                "excess": excess - cost,
            }
        )
        exposure_rows.append(
            dict(zip([*styles, *industries], [*by_style, *by_industry], strict=True))
        )
    parts = pd.DataFrame(part_rows, index=days).rename_axis("datetime")
    exposures = pd.DataFrame(exposure_rows, index=days).rename_axis("datetime")
    return parts, exposures


def tracking_table(excess: pd.Series, history: pd.DataFrame) -> pd.DataFrame:
    """Realised against predicted tracking error, by year and in total.

    Parameters
    ----------
    excess : Series [t]
        Daily net return over the index.
    history : DataFrame
        Of `IndexEnhancementStrategy.history_frame`: predicted, by trading day.

    Returns
    -------
    DataFrame
        ``predicted`` (mean over rebalancings) and ``realised`` tracking error, both
        annualised; their ``ratio``; ``bias`` of the weekly returns with the band
        ``low`` to ``high`` of a right forecast.
    """
    predicted = history["tracking_error"].dropna() if len(history) else pd.Series()
    place = np.searchsorted(predicted.index, excess.index, "right") - 1
    # The day of the fill is partly the old portfolio's: weeks run from fill to fill.
    week = pd.Series(place, excess.index)
    grouped = excess[place >= 0].groupby(week[place >= 0])
    weekly = pd.DataFrame({"realised": grouped.sum(), "days": grouped.size()})
    weekly["predicted"] = predicted.to_numpy()[weekly.index] * np.sqrt(
        weekly["days"] / DAYS_PER_YEAR
    )
    weekly.index = predicted.index[weekly.index]
    rows = {}
    year_of = [pd.DatetimeIndex(x.index).year for x in (excess, weekly, predicted)]
    years = sorted(set(year_of[0]))
    for name in [*map(str, years), "total"]:
        if name == "total":
            part, weeks, told = excess, weekly, predicted
        else:
            part = excess[year_of[0] == int(name)]
            weeks = weekly[year_of[1] == int(name)]
            told = predicted[year_of[2] == int(name)]
        bias = bias_statistic(
            weeks["realised"].to_numpy(), weeks["predicted"].to_numpy()
        )
        realised = float(part.std() * np.sqrt(DAYS_PER_YEAR))
        rows[name] = {
            "days": len(part),
            "predicted": float(told.mean()),
            "realised": realised,
            "ratio": realised / float(told.mean()) if len(told) else np.nan,
            "bias": bias.value,
            "low": bias.low,
            "high": bias.high,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("period")
