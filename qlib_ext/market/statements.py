"""Quarterly statements of the embedded market, with the dates they were announced.

Shape letters: q quarters, n stocks, t trading days.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from qlib_ext.market.draws import ar1

__all__ = ["RATIOS", "Statements", "as_announced", "make_statements"]

ITEMS = (
    "revenue",
    "gross_profit",
    "net_profit",
    "operating_cash_flow",
    "rd_expense",
    "total_assets",
    "total_liabilities",
    "equity",
    "long_term_debt",
    "current_assets",
    "current_liabilities",
    "inventory",
    "receivables",
    "goodwill",
)
"""CNY. The first five are flows of the single quarter, the others stand at its end."""

RATIOS = (
    "earnings_growth",
    "revenue_growth",
    "debt_to_assets",
    "book_leverage",
    "roe",
    "gross_margin",
    "asset_turnover",
    "current_ratio",
    "accruals",
    "goodwill_to_assets",
    "rd_to_revenue",
)
"""Announced indicators in the store: fractions, flows over the trailing year."""

_HISTORY = 9  # quarters before the first day: year-on-year of trailing-year sums
# (first, last) day of announcement after the quarter's end, by quarter
_WINDOWS = {1: (12, 30), 2: (25, 62), 3: (10, 31), 4: (25, 118)}


@dataclass
class Statements:
    """All statements of a market, announced or not yet.

    Attributes
    ----------
    period_end : DatetimeIndex, shape (q,)
        Quarter ends.
    announced : ndarray of datetime64, shape (q, n)
        Day of publication; never decreasing along q.
    items : dict of str to ndarray, shape (q, n)
        The `ITEMS`, CNY.
    """

    period_end: pd.DatetimeIndex
    announced: np.ndarray
    items: dict[str, np.ndarray]


def make_statements(
    rng: np.random.Generator,
    days: pd.DatetimeIndex,
    listed: np.ndarray,
    cap: np.ndarray,
) -> Statements:
    """Draw statements whose scale fits each company's market cap at its listing.

    Parameters
    ----------
    rng : Generator
        Source of all draws.
    days : DatetimeIndex, shape (t,)
        Trading days of the market.
    listed : ndarray of int, shape (n,)
        Slot of the first trading day.
    cap : ndarray, shape (n,)
        Total market cap at that day, CNY.
    """
    n = len(listed)
    last = days[-1] + pd.offsets.QuarterEnd(0)
    first = days[0] - pd.offsets.QuarterEnd(_HISTORY)
    ends = pd.date_range(first, last, freq="QE")
    q = len(ends)
    # the quarter that anchors a company: the last one ended before its first day
    anchor = np.maximum(ends.searchsorted(days[listed]) - 1, 4)
    at = (anchor, np.arange(n))

    growth = 0.02 + 0.03 * ar1(rng, q, (n,), 0.8) + 0.01 * rng.standard_normal(n)
    season = 0.08 * rng.standard_normal((4, n)) + np.array([[-0.12], [0.0], [0], [0.1]])
    log_rev = np.cumsum(growth, axis=0) + season[ends.quarter.to_numpy() - 1]
    margin = 0.07 + 0.05 * rng.standard_normal(n) + 0.035 * ar1(rng, q, (n,), 0.85)
    pb = np.exp(np.log(2.4) + 0.45 * rng.standard_normal(n))
    ps = np.exp(np.log(2.6) + 0.6 * rng.standard_normal(n))
    # four quarters of anchor revenue = cap / ps
    revenue = np.exp(log_rev - log_rev[at]) * (cap / ps / 4)
    profit = revenue * margin
    equity = np.zeros((q, n))
    retained = np.cumsum(0.65 * profit, axis=0)
    equity = cap / pb + retained - retained[at]
    equity = np.maximum(equity, 0.15 * cap / pb)  # capital is raised before ruin
    lev = np.exp(
        np.log(0.9) + 0.5 * rng.standard_normal(n) + 0.1 * ar1(rng, q, (n,), 0.9)
    )
    liabilities = equity * lev
    assets = equity + liabilities
    share = lambda mid, spread: np.clip(  # noqa: E731 - a share, slowly varying
        mid + spread * (rng.standard_normal(n) + 0.3 * ar1(rng, q, (n,), 0.9)),
        0.01,
        0.9,
    )
    has_goodwill = rng.random(n) < 0.4
    does_rd = rng.random(n) < 0.6
    current = assets * share(0.5, 0.12)
    items = {
        "revenue": revenue,
        "gross_profit": profit + revenue * share(0.18, 0.06),
        "net_profit": profit,
        "operating_cash_flow": profit * (0.9 + 0.3 * rng.standard_normal((q, n)))
        + 0.02 * revenue * rng.standard_normal((q, n)),
        "rd_expense": revenue * share(0.05, 0.03) * does_rd,
        "total_assets": assets,
        "total_liabilities": liabilities,
        "equity": equity,
        "long_term_debt": liabilities * share(0.2, 0.08),
        "current_assets": current,
        "current_liabilities": liabilities * share(0.6, 0.08),
        "inventory": current * share(0.3, 0.08),
        "receivables": current * share(0.25, 0.08),
        "goodwill": equity * share(0.08, 0.05) * has_goodwill,
    }
    items = {name: np.round(items[name]) for name in ITEMS}

    lo = np.array([_WINDOWS[k][0] for k in ends.quarter])[:, None]
    hi = np.array([_WINDOWS[k][1] for k in ends.quarter])[:, None]
    delay = np.floor(lo + (hi + 1 - lo) * rng.random((q, n)) ** 0.7)
    announced = ends.to_numpy().astype("datetime64[D]")[:, None] + delay.astype(
        "timedelta64[D]"
    )
    # an annual report and the next first quarter may come together, never reversed
    announced = np.maximum.accumulate(announced, axis=0)
    # the prospectus publishes a new company's history on its first day
    first_day = days[listed].to_numpy().astype("datetime64[D]")
    is_new = listed > 0
    announced = np.where(is_new, np.maximum(announced, first_day), announced)
    return Statements(ends, announced.astype("datetime64[ns]"), items)


def as_announced(st: Statements, days: pd.DatetimeIndex) -> dict[str, np.ndarray]:
    """Return what each day's reader knows: trailing-year sums, growth, leverage.

    A statement counts from its announcement day on. NaN until a company has announced
    enough quarters.

    Returns
    -------
    dict of str to ndarray, shape (t, n)
        ``equity``, ``profit_ttm``, ``revenue_ttm``, ``cash_ttm`` in CNY, and the
        `RATIOS`.
    """
    q, n = st.announced.shape

    def ttm(name: str) -> np.ndarray:
        total = np.cumsum(st.items[name], axis=0)
        out = np.full((q, n), np.nan)
        out[3] = total[3]
        out[4:] = total[4:] - total[:-4]
        return out

    def yoy(x: np.ndarray) -> np.ndarray:
        out = np.full((q, n), np.nan)
        # a base near zero says nothing about growth; loss-makers move by their loss
        out[4:] = (x[4:] - x[:-4]) / np.abs(x[:-4])
        return np.clip(out, -5, 5)

    profit, revenue = ttm("net_profit"), ttm("revenue")
    cash, assets = ttm("operating_cash_flow"), st.items["total_assets"]
    by_quarter = {
        "equity": st.items["equity"],
        "profit_ttm": profit,
        "revenue_ttm": revenue,
        "cash_ttm": cash,
        "earnings_growth": yoy(profit),
        "revenue_growth": yoy(revenue),
        "debt_to_assets": st.items["total_liabilities"] / assets,
        # Barra's book leverage: (book equity + long-term debt) / book equity
        "book_leverage": 1 + st.items["long_term_debt"] / st.items["equity"],
        "roe": profit / st.items["equity"],
        "gross_margin": ttm("gross_profit") / revenue,
        "asset_turnover": revenue / assets,
        "current_ratio": st.items["current_assets"] / st.items["current_liabilities"],
        "accruals": (profit - cash) / assets,
        "goodwill_to_assets": st.items["goodwill"] / assets,
        "rd_to_revenue": ttm("rd_expense") / revenue,
    }
    dates = days.to_numpy().astype("datetime64[ns]")
    slot = np.empty((len(days), n), dtype=np.int64)
    for i in range(n):
        slot[:, i] = np.searchsorted(st.announced[:, i], dates, side="right") - 1
    known = slot >= 0
    slot = np.maximum(slot, 0)
    cols = np.arange(n)[None, :]
    return {k: np.where(known, v[slot, cols], np.nan) for k, v in by_quarter.items()}
