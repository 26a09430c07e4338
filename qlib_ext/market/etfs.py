"""ETFs of the embedded market: baskets that are known, and bars that follow them.

Each fund tracks one industry (a broad fund after the last): up to 30 of its largest
stocks at the review, square roots of float caps times a lognormal taste for weights.
Baskets are held unchanged from quarter to quarter and drift with prices; the report of
a quarter end is announced 15 to 25 days later. A fund's return is its basket's, less a
fee of 0.5 % a year, plus tracking noise of two basis points a day.

Shape letters: t trading days, n stocks.
"""

import numpy as np
import pandas as pd

from qlib_ext.market.draws import draw
from qlib_ext.market.simulate import INDUSTRIES, Bars

__all__ = ["basket_bars", "make_etfs"]

_MOST = 30
_FEE, _NOISE = 0.005, 2e-4


def basket_bars(
    bars: Bars, code: str, weight: np.ndarray, on: np.ndarray, level: float = 1000.0
) -> pd.DataFrame:
    """Bars of what returns as its members do, weighted before the day.

    Parameters
    ----------
    bars : Bars
    code : str
    weight : ndarray [t, n]
        At the close before t, rows summing to 1 (or 0).
    on : ndarray of bool [t, n]
        Members whose trade makes the volume.
    level : float
        Close on the day before the first.
    """
    ref = np.maximum(bars.ref, 1)
    move = {
        name: (weight * np.where(bars.traded, getattr(bars, name) / ref - 1, 0.0)).sum(
            1
        )
        for name in ("open", "high", "low", "close")
    }
    close = level * np.cumprod(1 + move["close"])
    last = close / (1 + move["close"])
    top, bottom = (f(move["open"], move["close"]) for f in (np.maximum, np.minimum))
    shares = np.where(on, bars.lots * 100, 0).sum(1).astype(float)
    amount = np.where(on, bars.amount, 0).sum(1).astype(float)
    return pd.DataFrame(
        {
            "datetime": bars.universe.days,
            "instrument": code,
            "open": last * (1 + move["open"]),
            # members do not peak together: halfway to the mean of their extremes
            "high": last * (1 + top + 0.5 * np.maximum(move["high"] - top, 0)),
            "low": last * (1 + bottom + 0.5 * np.minimum(move["low"] - bottom, 0)),
            "close": close,
            "volume": shares,
            "amount": amount,
            "factor": 1.0,
            "change": np.where(np.arange(len(close)) == 0, np.nan, move["close"]),
        }
    )


def make_etfs(
    seed: int, bars: Bars, count: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Draw ETFs.

    Parameters
    ----------
    seed : int
        Of the market; the funds have a stream of their own.
    bars : Bars
    count : int
        Funds, coded from SH510001 on.

    Returns
    -------
    bars : DataFrame
        Day bars of every fund, as those of the indices.
    holdings : DataFrame
        ``fund, period_end, announced, instrument, weight``: every report public by the
        last day, whole baskets, weights of a report summing to 1.
    names : DataFrame
        ``instrument, name``.
    """
    rng = draw(seed, "etf")
    days, codes = bars.universe.days, np.array(bars.universe.codes)
    price = np.where(bars.traded, bars.close / 100 * bars.factor, np.nan)
    price = pd.DataFrame(price).ffill().to_numpy()
    slots = np.arange(len(days))[:, None]
    listed = (slots >= bars.universe.listed) & (slots < bars.universe.delisted)
    cap = np.where(listed, price * bars.float_shares / bars.factor, 0.0)
    quarter = days.to_period("Q")
    starts = np.flatnonzero(np.append(True, quarter[1:] != quarter[:-1]))
    frames, reports, names = [], [], []
    for number in range(count):
        code = f"SH{510001 + number}"
        theme = number % (len(INDUSTRIES) + 1)
        broad = theme == len(INDUSTRIES)
        names.append((code, f"{[*INDUSTRIES, 'broad'][theme]} ETF {number + 1}"))
        taste = np.exp(0.3 * rng.standard_normal(len(codes)))
        lags = rng.integers(15, 26, len(starts) + 1)
        noise = _NOISE * rng.standard_normal(len(days))
        weight = np.zeros_like(cap)
        for i, start in enumerate(starts):
            stop = starts[i + 1] if i + 1 < len(starts) else len(days)
            seen = max(int(start) - 1, 0)
            inside = listed[seen] & (broad | (bars.universe.industry[seen] == theme))
            size = np.where(inside, np.nan_to_num(cap[seen]), 0.0)
            best = np.argsort(-size, kind="stable")[:_MOST]
            chosen = np.zeros_like(size)
            chosen[best] = np.sqrt(size[best]) * taste[best]
            # Bought at the close before the quarter, at the open on the first day.
            units = np.divide(
                chosen, price[seen], out=np.zeros_like(chosen), where=chosen > 0
            )
            before = np.concatenate([[seen], np.arange(start, stop - 1)])
            value = units * np.nan_to_num(price[before])
            weight[start:stop] = value / np.maximum(value.sum(1, keepdims=True), 1e-12)
            end = units * np.nan_to_num(price[stop - 1])
            period = quarter[int(start)].end_time.normalize()
            if i == 0:
                # What it held before the first day is known on it.
                early = (days[0] - pd.Timedelta(days=40)).to_period("Q") - 1
                reports.append((code, early.end_time, days[0], codes, chosen))
            reports.append(
                (code, period, period + pd.Timedelta(days=int(lags[i])), codes, end)
            )
        frame = basket_bars(bars, code, weight, weight > 0, level=1.0)
        cost = np.cumprod(1 + noise - _FEE / 252)
        for name in ("open", "high", "low", "close"):
            frame[name] *= cost
        frame["change"] = frame["close"].pct_change()
        share = 0.002 * np.exp(0.5 * rng.standard_normal(len(days)))
        frame["amount"] *= share
        frame["volume"] = np.round(frame["amount"] / frame["close"], -2)
        frames.append(frame)
    holdings = pd.concat(
        pd.DataFrame(
            {
                "fund": code,
                "period_end": period.normalize(),
                "announced": announced,
                "instrument": held[value > 0],
                "weight": value[value > 0] / value.sum(),
            }
        )
        for code, period, announced, held, value in reports
        if announced <= days[-1] and value.sum() > 0
    )
    return (
        pd.concat(frames, ignore_index=True),
        holdings.reset_index(drop=True),
        pd.DataFrame(names, columns=["instrument", "name"]),
    )
