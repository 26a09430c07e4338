r"""Convertible bonds on an embedded market's shares, with a mispricing that closes.

`make_bonds` writes a store of bonds beside a market's, in the layout of `qlib-ext
ingest`: the simulated files go through the same join and the same checks. Its draws are
streams of their own, so the market below it is not changed by it.

Price of a bond, CNY per 100 of face value, before its call is announced::

    C = 100 S / K                            conversion value
    F = sum_k flow_k / (1 + y)^(t_k - t)     pure-bond value, y by rating
    P = C N(d1) + F N(d2')                   an option to exchange F for C (Margrabe)
    d1 = (log(C / F) + v^2 / 2) / v,  d2' = v - d1,  v = sigma sqrt(years left)
    price = P exp(m)

`sigma` is half the share's volatility of the last 250 days and half 0.30. The
mispricing m is an AR(1) process of each bond's own, with a daily persistence of 0.93
and a standard deviation of 1.5 %: the expected log return from the close of t+1 to that
of t+6 is ``(0.93^6 - 0.93) m(t)``, the oracle. With a market without signal there is
no m.

Events, each announced before the open of the day that it is dated:

- **Call**: after half a year, where C was 130 or more on 15 of the last 30 days, the
  company calls (one in three) or says that it will not for 60 days. A called bond
  trades at ``max(C, 100.5)`` and is redeemed 20 trading days later.
- **Revision**: where C was below 75 on 20 of 30 days the board may propose to lower K
  to the share's price; it does so 15 trading days later, and the price knows it now.
- **Ex-dates** of the share lower K with it. Bonds are converted while their premium is
  below 1 %.

Glossary: t days, n bonds, k payments.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, Le
from scipy.special import ndtr

from data_handlers.arguments import checked
from data_handlers.convertible import pool_spans
from data_handlers.files import write_parquet
from data_handlers.panel import scatter
from data_handlers.vendor.mapping import parse_mapping
from qlib_ext.ingest.bonds import EQUAL_INDEX, bond_frame, equal_index
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.store import (
    check_target,
    is_store,
    read_calendar,
    read_meta,
    read_table,
    write_store,
)
from qlib_ext.market.draws import ar1, draw
from qlib_ext.market.make import oracle_path

__all__ = ["HORIZON", "bond_value", "make_bonds"]

HORIZON = 5
"""Days of the oracle's return: close of t+1 to close of t+6."""

PERSISTENCE, MISPRICING = 0.93, 0.015
CALL_PRICE = 100.5
_COUPONS = np.array([0.4, 0.6, 1.0, 1.5, 1.8, 2.0])
_REDEMPTION = 110.0  # with the last coupon
_YIELDS = {"AAA": 0.030, "AA+": 0.035, "AA": 0.045, "AA-": 0.060, "A+": 0.080}
_RATING_SHARE = (0.1, 0.15, 0.4, 0.25, 0.1)
_CALL_NOTICE, _REVISION_NOTICE, _WAIT = 20, 15, 60  # trading days

_MAPPING: dict[str, Any] = {
    "prices": "raw",
    "factor": "one",
    "sources": {
        "daily": {
            "kind": "bonds",
            "columns": {
                name: name
                for name in (
                    *("instrument", "date", "open", "high", "low", "close", "volume"),
                    *("amount", "stock", "stock_close", "stock_factor", "bond_floor"),
                    *("remain_size", "rating"),
                )
            },
        },
        "conversion": {
            "kind": "bond_conversion",
            "columns": {k: k for k in ("instrument", "date", "conv_price")},
        },
        "terms": {
            "kind": "bond_terms",
            "columns": {
                k: k
                for k in (
                    *("instrument", "stock", "listed", "matures", "coupons"),
                    *("redemption", "issue_size"),
                )
            },
        },
        "events": {
            "kind": "bond_events",
            "columns": {k: k for k in ("instrument", "announced", "event")},
            "events": {k: k for k in ("call", "no_call", "revision")},
        },
    },
}


def bonds_path(market: str | os.PathLike[str]) -> Path:
    """Where the bonds on the shares of a market are kept."""
    market = Path(market)
    return market.with_name(market.name + ".bonds")


def bond_value(
    conv_value: np.ndarray, floor: np.ndarray, sigma: np.ndarray, years: np.ndarray
) -> np.ndarray:
    """Price by the rule above, without mispricing: Margrabe's exchange option.

    Parameters
    ----------
    conv_value, floor : ndarray
        CNY per 100 of face value.
    sigma : ndarray
        Volatility of the share, a year.
    years : ndarray
        To maturity.

    Returns
    -------
    ndarray
        At least the larger of `conv_value` and `floor`.
    """
    v = np.maximum(sigma * np.sqrt(np.maximum(years, 0.0)), 1e-9)
    d1 = (np.log(conv_value / floor) + v**2 / 2) / v
    return conv_value * ndtr(d1) + floor * ndtr(v - d1)


@checked
def make_bonds(
    market: str | os.PathLike[str],
    *,
    bonds: Annotated[int, Ge(20), Le(900)] = 100,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Simulate bonds on the shares of a market and write them as a store.

    Beside the store goes ``<out>.oracle.parquet``, as beside a market. The markets
    `equity_biased`, `balanced` and `debt_biased` change by day; the index ``CBEQUAL``
    is the mean return of the bonds.

    Parameters
    ----------
    market : path
        Store written by `make_market`; its seed and signal are those of the bonds.
    bonds : int, default 100
        Bonds ever listed, 20 to 900; about three in five list later. A share may have
        several.
    out : path, optional
        Directory of the bonds' store; default ``<market>.bonds``.
    overwrite : bool, default False
        Replace an existing store in `out`.

    Returns
    -------
    Path
        The bonds' store.

    Raises
    ------
    ValueError
        If `market` is no embedded market, or `out` is not empty.
    """
    market = Path(market)
    made = read_meta(market).get("market") if is_store(market) else None
    if made is None:
        raise ValueError(f"`market`={market} is no embedded market; make one first.")
    out = bonds_path(market) if out is None else Path(out)
    check_target(out)
    if is_store(out) and not overwrite:
        raise ValueError(f"`out`={out} is a store already; pass `overwrite`.")
    read, states = _simulate(market, made, bonds)
    report = Report()
    plan = parse_mapping(_MAPPING, "embedded bonds")
    bars, tables = bond_frame(plan, read, report)
    report.stop_on_errors()
    markets = pool_spans(bars)
    write_store(
        out,
        pd.concat([bars, equal_index(bars)], ignore_index=True),
        markets=markets,
        index_codes=[EQUAL_INDEX],
        tables=tables,
        meta={
            "source": "qlib_ext.market",
            "simulated": True,
            "market": {**made, "bonds": bonds},
        },
        calendar=read_calendar(market),
    )
    gain = PERSISTENCE ** (HORIZON + 1) - PERSISTENCE
    traded = bars.loc[bars["close"].notna(), ["datetime", "instrument"]]
    oracle = traded.merge(states, on=["datetime", "instrument"], how="left")
    oracle["total"] = oracle["mispricing"] = gain * oracle.pop("m")
    write_parquet(oracle_path(out), oracle, index=False)
    return out


def _simulate(
    market: Path, made: dict[str, Any], bonds: int
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Run the bonds day by day; the files of a vendor, and the mispricing."""
    seed, days = int(made["seed"]), read_calendar(market)
    raw = read_table(market, "daily_raw").set_index(["datetime", "instrument"])
    codes = raw.index.unique("instrument").sort_values()
    close, factor = (
        scatter(raw[name], days, codes, what=name) for name in ("close", "adj_factor")
    )
    rng = draw(seed, "bonds", "terms")
    at = np.sort(rng.integers(0, len(codes), bonds))
    share, factor = close[:, at], factor[:, at]
    traded = np.isfinite(share)
    t, n = share.shape
    first_of_share = traded.argmax(0)
    last_of_share = t - 1 - traded[::-1].argmax(0)
    # listed before the store begins, or some time in it, once the share has a history
    old = (rng.random(n) < 0.4) & (first_of_share == 0)
    listed = np.where(old, 0, rng.integers(20, max(21, t - 80), n))
    listed = np.where(old, 0, np.maximum(listed, first_of_share + 20))
    age = np.where(old, rng.uniform(0.3, 3.0, n), 0.05)
    rating = rng.choice(len(_YIELDS), n, p=_RATING_SHARE)
    y = np.array(list(_YIELDS.values()))[rating]
    issue = np.round(np.exp(np.log(8e8) + 0.8 * rng.standard_normal(n)), -6)
    moneyness = np.exp(np.where(old, 0.25, 0.05) * rng.standard_normal(n))
    whim = rng.random((t, n, 2))
    m = MISPRICING * ar1(draw(seed, "bonds", "mispricing"), t, (n,), PERSISTENCE)
    if made["signal"] == "none":
        m[:] = 0.0

    whole = pd.DataFrame(share * factor).ffill()
    moves = pd.DataFrame(np.log(whole)).diff()
    vol = moves.rolling(250, min_periods=20).std().to_numpy() * np.sqrt(252)
    sigma = 0.5 * np.clip(np.where(np.isfinite(vol), vol, 0.3), 0.1, 0.8) + 0.15
    held = pd.DataFrame(share).ffill().to_numpy()
    # an ex-date's step stands on the first day on which the share trades after it
    step = pd.DataFrame(factor).ffill()
    step = np.nan_to_num((step.shift() / step).to_numpy(), nan=1.0)

    start = days[np.minimum(listed, t - 1)]
    issued = start - pd.to_timedelta(np.round(age * 365), "D")
    dues = np.stack([issued + pd.DateOffset(years=k) for k in range(1, 7)], axis=1)
    dues = dues.astype("datetime64[D]")
    amounts = np.append(_COUPONS[:-1], _REDEMPTION)
    stamps = days.to_numpy().astype("datetime64[D]")

    k_price = np.full(n, np.nan)
    size = issue.copy()
    called, end = np.full(n, t), np.full(n, t)  # slots: news of a call; last day + 1
    revision = np.full(n, t + _REVISION_NOTICE)
    wait = np.zeros(n, dtype=int)
    above, below = np.zeros((t, n), bool), np.zeros((t, n), bool)
    price, floor, left = (np.full((t, n), np.nan) for _ in range(3))
    news: list[tuple[int, int, str]] = []
    terms_k: list[tuple[int, int, float]] = []
    for d in range(t):
        begins = listed == d
        k_price[begins] = np.round(held[d, begins] * moneyness[begins], 2)
        change = begins.copy()
        exday = (listed < d) & (np.abs(step[d] - 1) > 1e-9)
        k_price[exday] = np.round(k_price[exday] * step[d, exday], 2)
        lower = (revision == d) & (listed < d)
        k_price[lower] = np.round(np.maximum(held[d, lower], 0.01), 2)
        change |= exday | lower
        terms_k += [(d, int(j), k_price[j]) for j in np.flatnonzero(change)]
        years = (dues[:, -1] - stamps[d]).astype(float) / 365
        end = np.where((years <= 0) & (listed < d), np.minimum(end, d), end)
        live = (listed <= d) & (d < end) & (d <= last_of_share) & traded[d]
        if not live.any():
            continue
        gone = (dues - stamps[d]).astype(float) / 365
        pays = np.where(gone > 0, amounts * (1 + y[:, None]) ** -gone, 0.0)
        f = pays.sum(1)
        conv = 100 * held[d] / k_price
        pending = (revision > d) & (revision - d <= _REVISION_NOTICE)
        seen = np.where(pending, 100.0, conv)
        p = bond_value(np.where(live, seen, 100), np.maximum(f, 1), sigma[d], years)
        p = np.where(d >= called, np.maximum(conv, CALL_PRICE), p * np.exp(m[d]))
        price[d] = np.where(live, np.round(p, 3), np.nan)
        floor[d], left[d] = f, size
        above[d], below[d] = live & (conv >= 130), live & (conv < 75)
        cheap = live & (price[d] < 1.01 * conv) & (d - listed > 125)
        size = np.where(cheap, np.maximum(size * 0.985, 1e6), size)
        window = slice(max(0, d - 29), d + 1)
        free = live & (called == t) & (d >= wait) & (d + 1 < t)
        hot = free & (above[window].sum(0) >= 15) & (d - listed > 125)
        does = hot & (whim[d, :, 0] < 1 / 3)
        called[does] = d + 1
        end[does] = d + 1 + _CALL_NOTICE
        wait[hot & ~does] = d + _WAIT
        news += [(d + 1, int(j), "call") for j in np.flatnonzero(does)]
        news += [(d + 1, int(j), "no_call") for j in np.flatnonzero(hot & ~does)]
        cold = free & (below[window].sum(0) >= 20)
        cold &= (d > revision) | (revision >= t)
        does = cold & (whim[d, :, 1] < 0.02) & (d + 1 + _REVISION_NOTICE < t)
        revision[does] = d + 1 + _REVISION_NOTICE
        news += [(d + 1, int(j), "revision") for j in np.flatnonzero(does)]
    names = np.array([_code(codes[j], rank) for rank, j in enumerate(at)])
    rows = np.nonzero(np.isfinite(price))
    who, when = names[rows[1]], days[rows[0]]
    bars = _bars(draw(seed, "bonds", "bars"), price, left, m)
    daily = pd.DataFrame(
        {
            "instrument": who,
            "date": when,
            **{name: value[rows] for name, value in bars.items()},
            "stock": np.asarray(codes[at])[rows[1]],
            "stock_close": share[rows],
            "stock_factor": factor[rows],
            "bond_floor": floor[rows],
            "remain_size": left[rows],
            "rating": np.array(list(_YIELDS))[rating][rows[1]],
        }
    )
    there = np.isfinite(price).any(0)
    text = [
        ";".join(
            f"{pd.Timestamp(a):%Y%m%d}-{pd.Timestamp(b):%Y%m%d}:{c}%"
            for a, b, c in zip(
                [issued[j], *dues[j, :-1]], dues[j], _COUPONS, strict=True
            )
        )
        for j in range(n)
    ]
    first = np.where(old, issued + pd.Timedelta(days=30), start)
    terms = pd.DataFrame(
        {
            "instrument": names,
            "stock": np.asarray(codes[at]),
            "listed": pd.DatetimeIndex(first),
            "matures": pd.DatetimeIndex(dues[:, -1].astype("datetime64[ns]")),
            "coupons": text,
            "redemption": _REDEMPTION,
            "issue_size": issue,
        }
    )[there]
    moves_k = [(names[j], days[d], value) for d, j, value in terms_k if there[j]]
    events = [(names[j], days[d], what) for d, j, what in news if there[j]]
    read = {
        "daily": daily,
        "terms": terms,
        "conversion": pd.DataFrame(
            moves_k, columns=["instrument", "date", "conv_price"]
        ),
        "events": pd.DataFrame(events, columns=["instrument", "announced", "event"]),
    }
    # a called bond's price has no mispricing
    known = np.where(np.arange(t)[:, None] + 1 < called, m, 0.0)
    states = pd.DataFrame({"datetime": when, "instrument": who, "m": known[rows]})
    return read, states


def _code(share: str, rank: int) -> str:
    """Code of a bond, of its share's exchange."""
    return f"SH113{rank:03d}" if share.startswith("SH") else f"SZ123{rank:03d}"


def _bars(
    rng: np.random.Generator, price: np.ndarray, size: np.ndarray, m: np.ndarray
) -> dict[str, np.ndarray]:
    """Open, high, low, volume and amount around given closes, each [t, n]."""
    shape = price.shape
    before = pd.DataFrame(price).ffill().shift().to_numpy()
    move = np.nan_to_num(np.log(price / before))
    open_ = price * np.exp(-move * rng.uniform(0.4, 1.0, shape))
    spread = 0.004 * np.abs(rng.standard_normal((2, *shape)))
    high = np.maximum(open_, price) * np.exp(spread[0])
    low = np.minimum(open_, price) * np.exp(-spread[1])
    level = 0.8 * rng.standard_normal(shape[1]) + 0.5 * rng.standard_normal(shape)
    turn = np.minimum(0.01 * np.exp(level) * (1 + 30 * np.abs(move)), 3.0)
    volume = np.maximum(np.round(turn * size / 100 / 10) * 10, 10)
    open_, high, low = (np.round(x, 3) for x in (open_, high, low))
    mean = (open_ + high + low + price) / 4
    return {
        "open": open_,
        "high": high,
        "low": low,
        "close": price,
        "volume": volume,
        "amount": np.round(volume * mean, 2),
    }
