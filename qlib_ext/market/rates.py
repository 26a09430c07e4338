r"""Treasury-bond futures of the embedded market: a rate, and a signal in its minutes.

`make_futures` writes a store of its own in the layout of `qlib-ext ingest`: simulated
files of all contracts and of the minute bars of the one that counts go through the same
roll, the same checks and the same build as real ones.

The yield y of each product reverts slowly to 3 %; its log returns are::

    night(t) = sqrt(0.1) * sigma * e1(t)
    day(t)   = strength * sigma * s(t-1) + sqrt(0.9 - strength^2) * sigma * e2(t)
               + duration * 0.002 * (y(t) - 3 %)

with s, e1 and e2 standard normal, drawn anew each day. s(t) stands in the minutes of
day t alone: the volume of its bars is ``exp(0.25 s g + 0.4 e3)`` with g 1 in the last
12 bars of five minutes, -1 in the first 12 and 0 between, scaled to the day's volume.
No daily bar knows it. The expected return from the open of t+1 to that of t+2 is
``strength * sigma * s(t)``, the oracle; who knows s is right on a share of
``1/2 + arcsin(strength) / pi`` of the days.

Contracts deliver in March, June, September and December. Each trades for 9 months at
its own distance from the product's price; the open interest moves from one to the next
in the month before delivery.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, Le
from scipy.special import expit

from data_handlers.aggregate.build import build
from data_handlers.aggregate.schema import CFFEX_BONDS
from data_handlers.arguments import Whole, checked
from data_handlers.files import write_parquet
from data_handlers.vendor.mapping import parse_mapping
from qlib_ext.ingest.run import ingest
from qlib_ext.market.calendar import trading_days
from qlib_ext.market.draws import draw
from qlib_ext.market.make import oracle_path

__all__ = ["make_futures"]

#: Product: daily volatility, duration in years, tick, lots a day.
PRODUCTS = {
    "CFFEX.T": (0.0022, 8.0, 0.005, 60_000.0),
    "CFFEX.TL": (0.0060, 18.0, 0.01, 40_000.0),
}
_MULTIPLIER = 10_000
_BARS, _EDGE, _TILT, _NOISE = 51, 12, 0.25, 0.4
_KAPPA, _MEAN = 0.002, 0.03
_NIGHT = 0.1  # share of a day's variance that lies between close and open


@checked
def make_futures(
    out: str | os.PathLike[str],
    *,
    years: Annotated[int, Ge(1), Le(30)] = 8,
    seed: Whole = 0,
    strength: Annotated[float, Ge(0), Le(0.9)] = 0.35,
    overwrite: bool = False,
) -> Path:
    """Simulate the products and write their store, with ``bars/`` and the oracle.

    Parameters
    ----------
    out : path
        Directory of the store.
    years : int, default 8
        Calendar years up to 2020-12-31, 1 to 30.
    seed : int, default 0
    strength : float, default 0.35
        Correlation of the signal with the next day's return; 0 is a market without.
    overwrite : bool, default False
        Replace an existing store in `out`.

    Returns
    -------
    Path
        `out`. Beside it ``<out>.oracle.parquet``: datetime, instrument, total.

    Raises
    ------
    ValueError
        If an argument is out of range, or `out` is a store already.
    """
    out = Path(out)
    days = trading_days(years)
    made = [_product(name, days, seed, strength) for name in PRODUCTS]
    plan = parse_mapping(_MAPPING, "market")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        files = Path(folder)
        for part in ("daily", "minute"):
            (files / part).mkdir()
        for name, (daily, minute, _) in zip(PRODUCTS, made, strict=True):
            daily.to_parquet(files / "daily" / f"{name}.parquet")
            minute.to_parquet(files / "minute" / f"{name}.parquet")
        ingest(out, plan, data=files, overwrite=overwrite)
        build("bars", files / "minute", out, _MAPPING, progress=False)
    write_parquet(oracle_path(out), pd.concat([oracle for *_, oracle in made]))
    return out


def _mapping() -> dict[str, Any]:
    names = ("open", "high", "low", "close", "volume", "open_interest", "contract")
    lots = dict.fromkeys(PRODUCTS, _MULTIPLIER)
    columns = {"instrument": "instrument", **{name: name for name in names}}
    return {
        "vendor": "qlib_ext.market",
        "prices": "raw",
        "factor": "preclose",
        "codes": "futures",
        "session": CFFEX_BONDS.name,
        "sources": {
            "daily": {
                "kind": "futures",
                "files": ["daily/*"],
                "columns": {**columns, "date": "date", "amount": "amount"},
                "multiplier": lots,
            },
            "minute": {
                "kind": "minute",
                "columns": {**columns, "datetime": "datetime"},
                "stamp": "end",
                "bar_minutes": 5,
                "multiplier": lots,
            },
        },
        "notes": ["simulated; the oracle stands beside the store"],
    }


_MAPPING = _mapping()


def _product(
    name: str, days: pd.DatetimeIndex, seed: int, strength: float
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Day bars of all contracts, minute bars of the one that counts, and the oracle."""
    sigma, duration, tick, lots = PRODUCTS[name]
    rng = draw(seed, "futures", name)
    t = len(days)
    s, e1, e2 = rng.standard_normal((3, t))
    night = sigma * np.sqrt(_NIGHT) * e1
    before = np.r_[0.0, s[:-1]]
    day = sigma * (strength * before + np.sqrt(1 - _NIGHT - strength**2) * e2)
    y = _MEAN
    for k in range(t):
        day[k] += duration * _KAPPA * (y - _MEAN)
        y -= (night[k] + day[k]) / duration
    # Bars: a random walk that ends where the day does.
    steps = sigma * np.sqrt((1 - _NIGHT) / _BARS) * rng.standard_normal((t, _BARS))
    steps += (day / _BARS)[:, None] - steps.mean(1, keepdims=True)
    opened = np.log(100) + np.cumsum(night + day) - day
    close = opened[:, None] + np.cumsum(steps, axis=1)  # [t, bars], log
    g = np.r_[-np.ones(_EDGE), np.zeros(_BARS - 2 * _EDGE), np.ones(_EDGE)]
    volume = np.exp(_TILT * s[:, None] * g + _NOISE * rng.standard_normal((t, _BARS)))
    total = lots * np.exp(0.3 * rng.standard_normal(t))
    volume = np.maximum(
        np.round(volume / volume.sum(1, keepdims=True) * total[:, None]), 1
    )
    reach = np.abs(rng.standard_normal((2, t, _BARS))) * sigma / np.sqrt(_BARS) / 3
    months, share, offset = _contracts(days, rng)
    daily, minute = [], []
    for c, month in enumerate(months):
        live = share[:, c] > 0
        price = [np.exp(x + offset[c]) for x in (close, opened)]
        last = np.round(price[0] / tick) * tick
        first = np.c_[np.round(price[1] / tick) * tick, last[:, :-1]]
        high = np.maximum(first, last) + np.round(last * reach[0] / tick) * tick
        low = np.minimum(first, last) - np.round(last * reach[1] / tick) * tick
        traded = np.maximum(np.round(volume * share[:, [c]]), 1)
        interest = np.round(2 * lots * share[:, [c]]) + np.cumsum(
            (np.arange(_BARS) % 2 * 2 - 1) * np.minimum(traded, 20), axis=1
        )
        bars = {"instrument": name, "contract": f"{name.partition('.')[2]}{month}"}
        daily.append(
            pd.DataFrame(
                {
                    **bars,
                    "date": days,
                    "open": first[:, 0],
                    "high": high.max(1),
                    "low": low.min(1),
                    "close": last[:, -1],
                    "volume": traded.sum(1),
                    "amount": (traded * last).sum(1) * _MULTIPLIER,
                    "open_interest": interest[:, -1],
                }
            )[live]
        )
        main = np.flatnonzero(_counts(share)[:, c])
        stamps = days.to_numpy()[main, None] + _clock()
        minute.append(
            pd.DataFrame(
                {
                    **bars,
                    "datetime": stamps.ravel(),
                    "open": first[main].ravel(),
                    "high": high[main].ravel(),
                    "low": low[main].ravel(),
                    "close": last[main].ravel(),
                    "volume": traded[main].ravel(),
                    "open_interest": interest[main].ravel(),
                }
            )
        )
    oracle = pd.DataFrame(
        {"datetime": days, "instrument": name, "total": strength * sigma * s}
    )
    return pd.concat(daily), pd.concat(minute), oracle


def _clock() -> np.ndarray:
    """Give the ends of the day's bars of five minutes."""
    out = []
    for start, end in CFFEX_BONDS.intervals:
        first, last = (60 * x.hour + x.minute for x in (start, end))
        out += list(range(first + 5, last + 1, 5))
    return np.array(out).astype("timedelta64[m]")


def _contracts(
    days: pd.DatetimeIndex, rng: np.random.Generator
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Delivery months, each one's share of the open interest [t, c], and its offset."""
    ends = pd.date_range(days[0], days[-1] + pd.DateOffset(months=7), freq="MS")
    ends = ends[ends.month.isin([3, 6, 9, 12])]
    ages = (ends.to_numpy()[None] - days.to_numpy()[:, None]).astype("timedelta64[D]")
    left = ages.astype(float)  # days to delivery
    near = expit((left - 15) / 3)  # gives way half a month before
    nearest = np.argmin(np.where(left > 0, left, np.inf), axis=1)
    share = np.zeros_like(left)
    rows = np.arange(len(days))
    own = near[rows, nearest]
    share[rows, nearest] = own
    share[rows, nearest + 1] = 1 - own
    share = np.where(share > 1e-3, share, 0.0)
    offset = np.cumsum(rng.normal(-0.002, 0.003, len(ends)))
    return [f"{d:%y%m}" for d in ends], share, offset


def _counts(share: np.ndarray) -> np.ndarray:
    """Which contract counts on each day: the largest of the close before."""
    out = np.zeros(share.shape, dtype=bool)
    out[np.arange(1, len(share)), np.argmax(share[:-1], axis=1)] = True
    return out
