"""Write the embedded market as an ordinary Qlib day store, and its oracle beside it."""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Le
from qlib.log import get_module_logger

from data_handlers.arguments import check_whole, checked
from data_handlers.codes import CODE
from data_handlers.files import write_parquet
from data_handlers.universe import membership_spans
from qlib_ext.ingest.store import is_store, read_meta, write_store
from qlib_ext.market.calendar import trading_days
from qlib_ext.market.etfs import basket_bars, make_etfs
from qlib_ext.market.funds import holdings
from qlib_ext.market.intraday import FLOW_FIELDS, flow_table, make_minute, make_ticks
from qlib_ext.market.links import GRAPHS, Switches
from qlib_ext.market.simulate import INDUSTRIES, STYLES, Bars, make_universe, simulate
from qlib_ext.market.statements import RATIOS

__all__ = ["INDICES", "build_market", "describe_market", "make_market", "oracle_path"]

INDICES = {
    # market: (code, first rank, last rank as shares of the listed stocks)
    "csi300": ("SH000300", 0.0, 0.2),
    "csi500": ("SH000905", 0.2, 0.5),
    "csi1000": ("SH000852", 0.5, 0.9),
}
"""The real indices' names, with sizes in proportion to the number of stocks."""

logger = get_module_logger("qlib_ext.market")


def oracle_path(out: str | os.PathLike[str]) -> Path:
    """Where the true expected returns of the market in `out` are kept."""
    out = Path(out)
    return out.with_name(out.name + ".oracle.parquet")


@checked
def make_market(
    out: str | os.PathLike[str],
    *,
    stocks: Annotated[int, Ge(20), Le(5000)] = 300,
    years: Annotated[int, Ge(1), Le(30)] = 8,
    seed: Annotated[int, Ge(0), Le(2**31 - 1)] = 0,
    signal: Literal["planted", "none"] = "planted",
    trades: Annotated[int, Ge(20), Le(20_000)] = 240,
    style_alpha: float = 0.0,
    lead_lag: float = 0.0,
    fundamental_alpha: float = 0.0,
    order_flow: bool = False,
    funds: int = 0,
    attribute_alpha: float = 0.0,
    turning: int = 0,
    etfs: Annotated[int, Ge(0), Le(999)] = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Simulate a market and write it to `out`.

    The calendar ends on 2020-12-31 whatever its length. Beside the store goes
    ``<out>.oracle.parquet``: ``datetime, instrument, day, minute, tick, total``, the
    true expected log return from the close of t+1 to the close of t+11 given the state
    of the market at the close of t, for every traded stock-day.

    Parameters
    ----------
    out : path
        Directory of the store.
    stocks : int, default 300
        Companies ever listed, 20 to 5,000. About a fifth list later, a few leave.
    years : int, default 8
        Calendar years, 1 to 30.
    seed : int, default 0
        Every draw depends on it.
    signal : {"planted", "none"}, default "planted"
        "none" draws the same market without alpha: the oracle is zero.
    trades : int, default 240
        Mean number of trades of a stock-day, 20 to 20,000, for the minute bars and
        ticks that `make_minute` and `make_ticks` draw below this market's day bars.
    style_alpha, lead_lag, fundamental_alpha : float, default 0
        Further sources of return, as expected 10-day returns (0.01 is 1 %); each adds
        a column to the oracle. See `qlib_ext.market.links`. With a lead-lag,
        ``<out>.regime.parquet`` says which graph counts on each day.
    order_flow : bool, default False
        Put slow traits into the order flow and a daily flow table into the store
        (fields ``flow_*`` and ``tables/flow.parquet``). Implied by `lead_lag`.
    funds : int, default 0
        Funds whose reports go into ``tables/holdings.parquet``, 10 to 5,000; 0 is none.
    attribute_alpha : float, default 0
        A further source of return: attributes that the funds' holdings tell, see
        `qlib_ext.market.funds`. Needs `funds`.
    turning : int, default 0
        Trading days in which the day alpha turns into its opposite and back; 0 never.
    etfs : int, default 0
        Funds with bars and known baskets, ``tables/etf_holdings.parquet`` and
        ``tables/etf_names.parquet``; see `qlib_ext.market.etfs`. Up to 999.
    overwrite : bool, default False
        Replace an existing store in `out`.
    progress : bool, default False
        Show progress bars.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        If an argument is out of range, or `out` is not empty and `overwrite` is False.
    """
    out = Path(out)
    switches = Switches(
        style_alpha, lead_lag, fundamental_alpha, order_flow, attribute_alpha, turning
    )
    if funds:
        check_whole("funds", funds, 10, 5000)
    elif attribute_alpha:
        raise ValueError(
            f"`attribute_alpha` {attribute_alpha} needs `funds`, whose holdings show "
            "the attributes: 200, say."
        )
    _check_out(out, overwrite)
    made = {
        "stocks": stocks,
        "years": years,
        "seed": seed,
        "signal": signal,
        "trades": trades,
        **switches.as_dict(),
        **({"funds": funds} if funds else {}),
        # A market without them is described as it was before there were any.
        **({"etfs": etfs} if etfs else {}),
    }

    universe = make_universe(seed, trading_days(years), stocks)
    bars = simulate(
        seed,
        universe,
        planted=signal == "planted",
        switches=switches,
        progress=progress,
    )
    codes, days = universe.codes, universe.days
    rows = np.nonzero(bars.traded)
    frame = stock_frame(bars)
    markets, weights, index_bars = _indices(bars)
    # a halted member keeps its weight: rows with nothing but weights
    halted = ~bars.traded & np.any([np.isfinite(w) for w in weights.values()], axis=0)
    extra = pd.DataFrame(
        {"datetime": days[np.nonzero(halted)[0]], "instrument": _take(codes, halted)}
    )
    for name, weight in weights.items():
        frame[f"weight_{name}"] = weight[rows]
        extra[f"weight_{name}"] = weight[halted]
    st = bars.statements
    last = days[np.minimum(bars.universe.delisted, len(days)) - 1].to_numpy()
    q, n = st.announced.shape
    statements = pd.DataFrame(
        {
            "instrument": np.tile(codes, q),
            "period_end": np.repeat(st.period_end.to_numpy(), n),
            "announced": st.announced.ravel(),
            **{name: value.ravel() for name, value in st.items.items()},
        }
    )
    # published by the last day of the store, and while the company is listed
    public = (st.announced <= last).ravel()
    statements = statements[public].sort_values(["instrument", "period_end"])
    raw = pd.DataFrame(
        {
            "datetime": days[rows[0]],
            "instrument": np.array(codes)[rows[1]],
            **{
                k: getattr(bars, k)[rows] / 100
                for k in ("open", "high", "low", "close")
            },
            "preclose": bars.ref[rows] / 100,
            "volume": bars.lots[rows] * 100,
            "amount": bars.amount[rows],
            "limit_up": bars.up[rows] / 100,  # 0 on a first day: none
            "limit_down": bars.down[rows] / 100,
            "float_shares": bars.float_shares[rows],
            "adj_factor": bars.factor[rows],
        }
    )
    tables: dict[str, pd.DataFrame] = {}
    if switches.order_flow:
        tables["flow"] = flow_table(raw, made)
        for name in FLOW_FIELDS:
            frame[name] = tables["flow"][name].to_numpy()
    if funds:
        slots = np.arange(len(days))[:, None]
        alive = (bars.universe.listed <= slots) & (slots < bars.universe.delisted)
        tables["holdings"] = holdings(seed, days, codes, alive, funds)
    raw = raw.sort_values(["instrument", "datetime"])
    fund_bars = []
    if etfs:
        bars_of_funds, tables["etf_holdings"], names = make_etfs(seed, bars, etfs)
        tables["etf_names"] = names
        fund_bars.append(bars_of_funds)
    write_store(
        out,
        pd.concat([frame, extra, index_bars, *fund_bars], ignore_index=True),
        markets=markets,
        index_codes=[
            *(code for code, _, _ in INDICES.values()),
            *(code for x in fund_bars for code in x["instrument"].unique()),
        ],
        industry_names={str(i): name for i, name in enumerate(INDUSTRIES)},
        tables={
            "statements": statements.reset_index(drop=True),
            "daily_raw": raw.reset_index(drop=True),
            **tables,
            "style_returns": pd.DataFrame(
                bars.style_returns, index=days, columns=list(STYLES)
            )
            .rename_axis("datetime")
            .reset_index(),
        },
        meta={
            "source": "qlib_ext.market",
            "simulated": True,
            "market": made,
            "adjusted": "prices are raw x factor; factor is 1 at listing and rises",
        },
        calendar=days,
        progress=progress,
    )
    _write_oracle(out, bars)
    return out


def build_market(
    out: str | os.PathLike[str],
    market: Mapping[str, Any],
    *,
    minute: int | None = None,
    ticks: bool = False,
    tick_stocks: str | None = None,
    tick_days: str | None = None,
    keep: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Path]:
    """Make a market with its intraday data; what the command line calls.

    A store with the same numbers is kept when minute bars or ticks are asked for.

    Parameters
    ----------
    out : path
        Directory of the store.
    market : mapping
        Arguments of `make_market` by name: stocks, years, seed ….
    minute : int, optional
        Length of minute bars, see `make_minute`.
    ticks : bool, default False
        Write ticks, see `make_ticks`.
    tick_stocks : str, optional
        A market, a number, or codes separated by commas.
    tick_days : str, optional
        First and last day, separated by a colon; either may be empty.
    keep : bool, default False
        Keep a store with the same numbers also without minute bars and ticks.
    overwrite, progress : bool
        As in `make_market`.

    Returns
    -------
    dict of str to Path
        What was written: "store", "minute", "ticks".
    """
    unknown = sorted(set(market) - set(_options()))
    if unknown:
        raise ValueError(f"`market` has {unknown}, which make_market does not know.")
    if not ticks and (tick_stocks is not None or tick_days is not None):
        raise ValueError("`tick_stocks` and `tick_days` need `ticks` (--ticks).")
    start, end = _day_range(tick_days)
    written: dict[str, Path] = {}
    if overwrite or not (minute or ticks or keep) or not _is_same(Path(out), market):
        written["store"] = make_market(
            out, overwrite=overwrite, progress=progress, **market
        )
    more: dict[str, Any] = {"overwrite": overwrite, "progress": progress}
    if minute:
        written["minute"] = make_minute(out, bar_minutes=minute, **more)
    if ticks:
        stocks = _which(tick_stocks)
        written["ticks"] = make_ticks(out, stocks=stocks, start=start, end=end, **more)
    return written


def _is_same(out: Path, market: Mapping[str, Any]) -> bool:
    """Whether `out` holds the market that these arguments would make."""
    if not is_store(out) or not oracle_path(out).is_file():
        return False
    made = read_meta(out).get("market", {})
    default = _options()
    names = {*made, *market}
    asked = {k: market.get(k, default.get(k)) for k in names}
    if asked.get("lead_lag"):
        asked["order_flow"] = True
    return bool(made) and {k: made.get(k, default.get(k)) for k in names} == asked


def _options() -> dict[str, Any]:
    """Options of `make_market` with their defaults."""
    every = inspect.signature(make_market).parameters.values()
    return {p.name: p.default for p in every if p.kind is p.KEYWORD_ONLY}


def _day_range(text: str | None) -> tuple[str | None, str | None]:
    if text is None:
        return None, None
    first, colon, last = text.partition(":")
    if not colon:
        raise ValueError(
            f"`tick_days` must be FIRST:LAST, for example 2020-01-01:2020-12-31, got "
            f"{text!r}."
        )
    return first or None, last or None


def _which(text: str | None) -> str | int | list[str] | None:
    if text is None:
        return None
    if text.isdigit():
        return int(text)
    codes = [code.strip() for code in text.split(",")]
    # a market's name has no exchange in front
    is_code = len(codes) > 1 or CODE.fullmatch(text.strip().upper()) is not None
    return codes if is_code else text


def describe_market(
    out: str | os.PathLike[str], written: Mapping[str, Path] | None = None
) -> str:
    """Say in a few lines what a market's directory holds and what to do next."""
    meta, oracle = read_meta(out), pd.read_parquet(oracle_path(out))
    made = meta["market"]
    parts = [str(c) for c in oracle if c not in ("datetime", "instrument", "total")]
    spread = oracle.groupby("datetime")[parts].std().mean()
    alpha = ", ".join(f"{name} {100 * spread[name]:.2f} %" for name in parts)
    lines = [
        f"{out}: {meta['instruments']} stocks, {meta['days']} days, {meta['start']}"
        f" to {meta['end']}, seed {made['seed']}, signal {made['signal']}",
        f"  markets   {', '.join(meta['markets'])}",
        f"  fields    {', '.join(meta['fields'])}",
        f"  tables    {', '.join(meta['tables'])}",
        f"{oracle_path(out)}: true expected 10-day return, spread over a day's "
        f"stocks by source: {alpha}",
    ]
    for name, what in (("minute", "minute bars"), ("ticks", "ticks")):
        if written and name in written:
            folder = written[name]
            files = list(folder.rglob("*.parquet"))
            size = sum(f.stat().st_size for f in files) / 2**20
            lines.append(f"{folder}: {what}, {len(files)} files, {size:,.0f} MiB")
    builds = []
    if written and "minute" in written:
        label = json.loads((written["minute"] / "market.json").read_text())
        builds.append(
            f"qlib-ext build ms --source {written['minute']} --out {out} "
            f"--bar-minutes {label['bar_minutes']}"
        )
    if written and "ticks" in written:
        builds.append(f"qlib-ext build l2 --source {written['ticks']} --out {out}")
    use = f'qlib.init(provider_uri="{out}", region="cn")'
    lines += [
        f"Next: {step}" for step in builds or [f"{use}, or qlib-ext run workflows/…"]
    ]
    return "\n".join(lines)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise ValueError(f"`out`={out} is a file; name a directory.")
    if out.is_dir() and any(out.iterdir()):
        if not is_store(out):
            raise ValueError(
                f"`out`={out} is not empty and no Qlib store; name a new directory."
            )
        if not overwrite:
            raise ValueError(
                f"`out`={out} already holds a store; pass `overwrite` (--overwrite) to "
                "replace it, or name a new directory."
            )


def _take(codes: list[str], mask: np.ndarray) -> np.ndarray:
    return np.array(codes)[np.nonzero(mask)[1]]


def stock_frame(bars: Bars) -> pd.DataFrame:
    """Return the store's fields of every traded stock-day, one row each."""
    u, rows = bars.universe, np.nonzero(bars.traded)
    take = lambda x: np.asarray(x, dtype=float)[rows]  # noqa: E731
    factor, price = take(bars.factor), take(bars.close) / 100
    shares, amount = take(bars.lots) * 100, take(bars.amount)
    total_cap = price * take(bars.total_shares)
    first = bars.up[rows] == 0
    limit = lambda x: np.where(first, np.nan, take(x) / 100 * factor)  # noqa: E731
    known = {name: value[rows] for name, value in bars.known.items()}
    columns = {
        "datetime": u.days[rows[0]],
        "instrument": np.array(u.codes)[rows[1]],
        **{
            name: take(getattr(bars, name)) / 100 * factor
            for name in ("open", "high", "low", "close")
        },
        "vwap": amount / shares * factor,
        "volume": shares / factor,
        "amount": amount,
        "factor": factor,
        "change": np.where(first, np.nan, take(bars.change)),
        "turnover": shares / take(bars.float_shares),
        "market_cap": price * take(bars.float_shares),
        "industry": u.industry[rows].astype(float),
        "limit_up": limit(bars.up),
        "limit_down": limit(bars.down),
        "pb": total_cap / known["equity"],
        "pe_ttm": total_cap / known["profit_ttm"],
        "ps_ttm": total_cap / known["revenue_ttm"],
        "pcf_ttm": total_cap / known["cash_ttm"],
        **{name: known[name] for name in RATIOS},
    }
    return pd.DataFrame(columns)


def _indices(
    bars: Bars,
) -> tuple[dict[str, pd.DataFrame], dict[str, np.ndarray], pd.DataFrame]:
    """Membership spans, weights [t, n], and the indices' own bars.

    Members are chosen by rank of the trailing mean float cap at the last close before
    the review, on the first day and on the second Monday of June and December. Weights
    are float caps at that day's close; a halted member counts with its last price.
    """
    u = bars.universe
    t, n = bars.traded.shape
    slots = np.arange(t)[:, None]
    listed = (slots >= u.listed) & (slots < u.delisted)
    price = np.where(bars.traded, bars.close / 100, np.nan)
    price = pd.DataFrame(price).ffill().to_numpy()
    cap = np.where(listed, price * bars.float_shares, np.nan)
    mean_cap = pd.DataFrame(cap).rolling(120, min_periods=1).mean().to_numpy()
    day, month = u.days.day, u.days.month
    monday = (u.days.dayofweek == 0) & (day > 7) & (day <= 14)
    review = np.flatnonzero(np.isin(month, (6, 12)) & monday)
    review = np.unique(np.concatenate([[0], review]))

    markets, weights, frames = {}, {}, []
    for name, (code, begin, end) in INDICES.items():
        member = np.zeros((t, n), dtype=bool)
        for i in range(len(review)):
            start = int(review[i])
            stop = int(review[i + 1]) if i + 1 < len(review) else t
            seen = max(start - 1, 0)
            order = np.argsort(
                -np.nan_to_num(np.where(listed[start], mean_cap[seen], 0))
            )
            count = int(listed[start].sum())
            member[start:stop, order[int(begin * count) : int(end * count)]] = True
        member &= listed
        value = np.where(member, cap, 0.0)
        weights[name] = np.where(member, value / value.sum(1, keepdims=True), np.nan)
        frames.append(_index_bars(bars, code, member, cap))
        markets[name] = membership_spans(member, u.codes, u.days)
    return markets, weights, pd.concat(frames, ignore_index=True)


def _index_bars(
    bars: Bars, code: str, member: np.ndarray, cap: np.ndarray
) -> pd.DataFrame:
    """Bars of an index whose return is that of its members, weighted by last cap."""
    before = np.vstack([cap[:1], cap[:-1]])
    # a share unlock is no return: weigh by yesterday's cap
    w = np.where(member & np.isfinite(before), before, 0.0)
    w /= w.sum(axis=1, keepdims=True)
    return basket_bars(bars, code, w, member & bars.traded)


def _write_oracle(out: Path, bars: Bars) -> None:
    rows = np.nonzero(bars.traded)
    parts = {name: value[rows] for name, value in bars.oracle.items()}
    frame = pd.DataFrame(
        {
            "datetime": bars.universe.days[rows[0]],
            "instrument": np.array(bars.universe.codes)[rows[1]],
            **parts,
            "total": np.sum(list(parts.values()), axis=0),
        }
    )
    write_parquet(oracle_path(out), frame, index=False)
    regime = oracle_path(out).with_name(f"{out.name}.regime.parquet")
    regime.unlink(missing_ok=True)
    if bars.regime is not None:
        graph = np.array(GRAPHS)[bars.regime]
        frame = pd.DataFrame({"datetime": bars.universe.days, "graph": graph})
        write_parquet(regime, frame, index=False)
