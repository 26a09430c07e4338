"""Write minute bars and ticks below the day bars of an embedded market.

Both are drawn from the market's seed, its day bars (``tables/daily_raw.parquet``) and
one random stream per stock-day, so any selection of stocks and days gives the same rows
as the whole, at any time, in any order. Files are the normalised tables of
`data_handlers.aggregate.schema`: bars one file a month, ticks one file a day.
"""

import datetime as dt
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numba as nb
import numpy as np
import pandas as pd
import pyarrow as pa
from annotated_types import Ge, Le
from qlib.log import get_module_logger
from tqdm import tqdm

from data_handlers.aggregate.schema import (
    BARS,
    FLOW_CLASSES,
    FLOW_FIELDS,
    ORDERS,
    TRADES,
    quotes_schema,
)
from data_handlers.arguments import checked
from data_handlers.compiled import inner
from data_handlers.files import write_parquet, write_text
from qlib_ext.ingest.store import read_instruments, read_meta
from qlib_ext.market.calendar import trading_days
from qlib_ext.market.links import flow_traits
from qlib_ext.market.orders import LEVELS, draw_orders, draw_quotes
from qlib_ext.market.simulate import ALPHAS, alpha_states, make_universe
from qlib_ext.market.tape import (
    TRADE_TIMES,
    clock_us,
    draw_trades,
    most_trades,
    stream_keys,
)

__all__ = ["FLOW_CLASSES", "FLOW_FIELDS", "flow_table", "make_minute", "make_ticks"]

QUOTE_SECONDS = 300
_TRADES, _ORDERS = 1, 2  # purposes of the streams
_TYPICAL_TURNOVER = 0.011

logger = get_module_logger("qlib_ext.market")

Selection = None | str | int | Sequence[str]


@checked
def make_minute(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    bar_minutes: Literal[1, 5, 15] = 15,
    stocks: Selection = None,
    start: str | dt.date | None = None,
    end: str | dt.date | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write minute bars that add up to the day bars of `store`.

    Every slot of the session has a row, stamped at its start; without a trade it has
    volume 0 and the price before it. The auctions belong to the first and last slot.
    Bars of 5 and 15 minutes are sums of the 1-minute bars.

    Parameters
    ----------
    store : path
        A store written by `make_market`.
    out : path, optional
        Directory of the files; default ``<store>.minute<bar_minutes>``.
    bar_minutes : {1, 5, 15}, default 15
        Length of a bar.
    stocks : None, str, int or sequence of str
        All stocks, a market's name ("csi300": everything that ever was a member), the
        first so many codes, or codes.
    start, end : date, optional
        First and last day, both included.
    overwrite : bool, default False
        Replace files of another selection. Files of the same one are completed.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        If `store` is no embedded market, the selection is empty or unknown, or `out`
        holds something else.
    """
    rows = _select(store, stocks, start, end)
    out = Path(out) if out is not None else _beside(store, f"minute{bar_minutes}")
    months = rows["datetime"].dt.strftime("%Y-%m")
    parts = [(key, part) for key, part in rows.groupby(months, sort=True)]
    label = {"kind": "minute", "bar_minutes": bar_minutes, "stamp": "start"}
    slots = 240 // bar_minutes

    def write(part: pd.DataFrame) -> dict[str, pa.Table]:
        prices = np.empty((4, len(part) * slots))
        volume, amount = np.empty(len(part) * slots), np.empty(len(part) * slots)
        stamp = np.empty(len(part) * slots, dtype=np.int64)
        days = _days_of(part)
        _minute_bars(days, TRADE_TIMES, bar_minutes, stamp, prices, volume, amount)
        names, code = np.unique(part["instrument"].to_numpy(), return_inverse=True)
        columns = [
            _labels(names, np.repeat(code, slots)),
            pa.array(stamp, pa.int64()).cast(pa.timestamp("us")),
            *(pa.array(x) for x in prices),
            pa.array(volume),
            pa.array(amount),
            pa.array(np.repeat(part["adj_factor"].to_numpy(), slots)),
        ]
        return {"": pa.table(columns, schema=BARS.arrow())}

    _write_all(store, out, label, rows, parts, write, overwrite, progress, "month")
    return out


@checked
def make_ticks(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    stocks: Selection = None,
    start: str | dt.date | None = None,
    end: str | dt.date | None = None,
    quote_seconds: Annotated[int, Ge(3), Le(3600)] = QUOTE_SECONDS,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write trades, orders and quotes that add up to the day bars of `store`.

    Parameters
    ----------
    store : path
        A store written by `make_market`; its ``trades`` sets their number.
    out : path, optional
        Directory of ``trades/``, ``orders/`` and ``quotes/``; default
        ``<store>.ticks``.
    stocks, start, end, overwrite, progress
        As in `make_minute`.
    quote_seconds : int, default 300
        Time between snapshots of the book, 3 to 3,600 seconds.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        As in `make_minute`.
    """
    rows = _select(store, stocks, start, end)
    out = Path(out) if out is not None else _beside(store, "ticks")
    days = rows["datetime"].dt.strftime("%Y-%m-%d")
    parts = [(key, part) for key, part in rows.groupby(days, sort=True)]
    label = {"kind": "ticks", "quote_seconds": quote_seconds}
    snapshots = 14_220 // quote_seconds + 1

    def write(part: pd.DataFrame) -> dict[str, pa.Table]:
        days = _days_of(part)
        most = int((4 * days.mean + 8).sum())
        trade = np.empty((7, most), dtype=np.int64)
        order = np.empty((7, 5 * most + 8 * len(part)), dtype=np.int64)
        quote = np.empty((2, snapshots * len(part)), dtype=np.int64)
        prices = np.empty((snapshots * len(part), 2, LEVELS), dtype=np.int64)
        volumes = np.empty_like(prices)
        a, b, c = _ticks(
            days,
            ~part["instrument"].str.startswith("SH").to_numpy(),
            TRADE_TIMES,
            1000 * quote_seconds,
            trade,
            order,
            (quote, prices, volumes),
        )
        names = part["instrument"].to_numpy()
        when = pa.timestamp("us")
        trade, order, quote = trade[:, :a], order[:, :b], quote[:, :c]
        trades = [
            _labels(names, trade[0]),
            pa.array(trade[1]).cast(when),
            pa.array(trade[2] / 100),
            pa.array(100 * trade[3]),
            pa.array(trade[5]),
            pa.array(trade[6]),
            pa.array(trade[4].astype(np.int8)),
        ]
        orders = [
            _labels(names, order[0]),
            pa.array(order[1]).cast(when),
            pa.array(order[2] / 100),
            pa.array(100 * order[3]),
            pa.array(order[4].astype(np.int8)),
            pa.array(order[5]),
            pa.array(order[6].astype(np.int8)),
        ]
        quotes = [_labels(names, quote[0]), pa.array(quote[1]).cast(when)]
        for s in range(2):
            quotes += [pa.array(prices[:c, s, k] / 100) for k in range(LEVELS)]
            quotes += [pa.array(volumes[:c, s, k] * 1.0) for k in range(LEVELS)]
        return {
            "trades": pa.table(trades, schema=TRADES.arrow()),
            "orders": pa.table(orders, schema=ORDERS.arrow()),
            "quotes": pa.table(quotes, schema=quotes_schema(LEVELS).arrow()),
        }

    _write_all(store, out, label, rows, parts, write, overwrite, progress, "day")
    return out


# ------------------------------------------------------------------ rows and streams


def _beside(store: str | os.PathLike[str], suffix: str) -> Path:
    store = Path(store)
    return store.with_name(f"{store.name}.{suffix}")


def _select(
    store: str | os.PathLike[str],
    stocks: Selection,
    start: str | dt.date | None,
    end: str | dt.date | None,
) -> pd.DataFrame:
    """Day bars of the selection, with states and expected numbers of trades."""
    meta = read_meta(store)
    if "market" not in meta or meta.get("source") != "qlib_ext.market":
        raise ValueError(
            f"`store`={store} was not written by `qlib-ext market make`; intraday data "
            "exist for embedded markets only."
        )
    made = meta["market"]
    rows = pd.read_parquet(Path(store) / "tables" / "daily_raw.parquet")
    rows = rows[_in_selection(store, rows["instrument"], stocks)]
    for name, bound in (("start", start), ("end", end)):
        if bound is None:
            continue
        try:
            day = pd.Timestamp(bound)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`{name}` must be a date, for example 2020-01-31, got {bound!r}."
            ) from error
        after = rows["datetime"] >= day if name == "start" else rows["datetime"] <= day
        rows = rows[after]
    if rows.empty:
        raise ValueError(
            f"`stocks`={stocks!r}, `start`={start}, `end`={end} select no stock-day of "
            f"{store}, which runs from {meta['start']} to {meta['end']}."
        )
    return _with_states(rows, made)


def _with_states(rows: pd.DataFrame, made: dict[str, Any]) -> pd.DataFrame:
    """Add what the streams need: stock numbers, states, traits, trade counts."""
    days = trading_days(made["years"])
    universe = make_universe(made["seed"], days, made["stocks"])
    slot = days.get_indexer(pd.DatetimeIndex(rows["datetime"]))
    stock = pd.Index(universe.codes).get_indexer(pd.Index(rows["instrument"]))
    rows = rows.assign(stock=stock, seed=made["seed"])
    for alpha in ALPHAS:
        if alpha.name != "day":
            s, _ = alpha_states(made["seed"], alpha, len(days), made["stocks"])
            rows[f"state_{alpha.name}"] = s[slot, stock]
    traits = np.zeros((len(rows), 2))
    if made["order_flow"]:
        paths = flow_traits(made["seed"], len(days), made["stocks"])
        traits = paths[slot, stock]
    rows["pressure"], rows["size_pressure"] = traits.T
    # more turnover, more trades
    turnover = rows["volume"] / rows["float_shares"]
    busy = (turnover / _TYPICAL_TURNOVER) ** 0.4
    rows["mean_trades"] = made["trades"] * busy.clip(0.25, 4.0)
    return rows.reset_index(drop=True)


def flow_table(raw: pd.DataFrame, made: dict[str, Any]) -> pd.DataFrame:
    """Sum a market's ticks into the daily flow by order size, as vendors publish it.

    A trade counts for its aggressor: on the side, and in the size class, of the
    aggressor's parent order (all trades of its id that day). Auction trades count on
    neither side. The sums are those of the files that `make_ticks` writes.

    Parameters
    ----------
    raw : DataFrame
        Day bars as in ``tables/daily_raw.parquet``.
    made : dict
        The market's settings as in ``meta.json``.

    Returns
    -------
    DataFrame
        ``instrument, datetime`` and `FLOW_FIELDS`, CNY, in the order of `raw`.
    """
    rows = _with_states(raw, made)
    out = np.zeros((len(rows), 2, len(FLOW_CLASSES)))
    bounds = np.array(list(FLOW_CLASSES.values())[:-1])
    _flow(_days_of(rows), TRADE_TIMES, bounds, out)
    table = pd.DataFrame(out.reshape(len(rows), -1), columns=list(FLOW_FIELDS))
    table.insert(0, "datetime", rows["datetime"].to_numpy())
    table.insert(0, "instrument", rows["instrument"].to_numpy())
    return table


def _in_selection(
    store: str | os.PathLike[str], codes: pd.Series, stocks: Selection
) -> np.ndarray:
    if stocks is None:
        return np.ones(len(codes), dtype=bool)
    known = sorted(codes.unique())
    if isinstance(stocks, str):
        wanted = read_instruments(store, stocks)["instrument"].unique().tolist()
    elif isinstance(stocks, int) and not isinstance(stocks, bool):
        if not 1 <= stocks <= len(known):
            raise ValueError(
                f"`stocks` must be from 1 to {len(known)} as a number, got {stocks}."
            )
        wanted = known[:stocks]
    elif isinstance(stocks, Sequence):
        wanted = [str(code).upper() for code in stocks]
        strange = sorted(set(wanted) - set(known))
        if strange:
            raise ValueError(f"`stocks` {strange} are not in {store}.")
    else:
        raise ValueError(
            f"`stocks` must be None, a market, a number or codes, got {stocks!r}."
        )
    return codes.isin(wanted).to_numpy()


def _cents(x: pd.Series) -> np.ndarray:
    return np.rint(x.to_numpy() * 100).astype(np.int64)


class _Days(NamedTuple):
    """Stock-days as arrays."""

    keys: Any  # of the streams of trades, and of orders
    order_keys: Any
    day: Any  # since 1970
    bars: Any  # int64 [6, rows]: prices in cents, lots, CNY
    up: Any  # limit prices, cents
    down: Any
    mean: Any  # trades expected
    state_minute: Any
    state_tick: Any
    traits: Any


def _days_of(part: pd.DataFrame) -> _Days:
    day = part["datetime"].to_numpy().astype("datetime64[D]").astype(np.int64)
    seed, stock = int(part["seed"].iloc[0]), part["stock"].to_numpy()
    bars = [
        *(_cents(part[k]) for k in ("open", "high", "low", "close")),
        part["volume"].to_numpy().astype(np.int64) // 100,
        np.rint(part["amount"].to_numpy()).astype(np.int64),
    ]
    return _Days(
        keys=stream_keys(seed, _TRADES, stock, day),
        order_keys=stream_keys(seed, _ORDERS, stock, day),
        day=day,
        bars=np.stack(bars),
        up=_cents(part["limit_up"]),
        down=_cents(part["limit_down"]),
        mean=part["mean_trades"].to_numpy(),
        state_minute=part["state_minute"].to_numpy(),
        state_tick=part["state_tick"].to_numpy(),
        # One memory layout, so that kernels are compiled once.
        traits=np.ascontiguousarray(part[["pressure", "size_pressure"]].to_numpy()),
    )


def _labels(names: np.ndarray, code: np.ndarray) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(
        pa.array(code.astype(np.int32)), pa.array(names, pa.string())
    )


# --------------------------------------------------------------------------- kernels


@inner
def _scratch(size):
    return (
        np.empty(size, dtype=np.int64),
        np.empty(size, dtype=np.int64),
        np.empty(size, dtype=np.int64),
        np.empty(size, dtype=np.float64),
        np.empty(size, dtype=np.bool_),
    )


@inner
def _draw(days, i, inverse, tape):
    """Trades of stock-day i on the tape; their number."""
    o, h, low, c, v, a = days.bars[:, i]
    mean, state = days.mean[i], days.state_minute[i]
    return draw_trades(days.keys[i], o, h, low, c, v, a, mean, state, inverse, tape)


@nb.njit(cache=True, nogil=True)
def _minute_bars(days, inverse, bar_minutes, stamp, prices, volume, amount):
    """Sum each stock-day's trades into bars; rows stock-day by stock-day."""
    slots = 240 // bar_minutes
    tape = _scratch(most_trades(days.mean.max()))
    ms, price, lots = tape[0], tape[1], tape[2]
    for i in range(len(days.keys)):
        n = _draw(days, i, inverse, tape)
        base = i * slots
        k, last = 0, price[0]
        for s in range(slots):
            r = base + s
            begin = s * bar_minutes * 60_000
            until = begin + bar_minutes * 60_000
            if s == slots - 1:
                until += 1  # the closing auction
            stamp[r] = days.day[i] * 86_400_000_000 + clock_us(begin)
            top = bottom = first = last
            total = money = 0
            while k < n and ms[k] < until:
                if total == 0:
                    top = bottom = first = price[k]
                last = price[k]
                top, bottom = max(top, last), min(bottom, last)
                total += lots[k]
                money += lots[k] * last
                k += 1
            prices[0, r], prices[1, r] = first / 100, top / 100
            prices[2, r], prices[3, r] = bottom / 100, last / 100
            volume[r], amount[r] = 100 * total, money


@nb.njit(cache=True, nogil=True)
def _ticks(days, publishes_all, inverse, every_ms, trade, order, book):
    """Fill the three tables of one day, stock by stock; return their lengths."""
    quote, prices, volumes = book
    size = most_trades(days.mean.max())
    tape = _scratch(size)
    ms, price, lots = tape[0], tape[1], tape[2]
    a = b = c = 0
    for i in range(len(days.keys)):
        n = _draw(days, i, inverse, tape)
        midnight = days.day[i] * 86_400_000_000
        bounds = (days.bars[1, i], days.bars[2, i], days.up[i], days.down[i])
        sides = (trade[4, a : a + n], trade[5, a : a + n], trade[6, a : a + n])
        messages = (
            order[1, b:],
            order[2, b:],
            order[3, b:],
            order[4, b:],
            order[5, b:],
            order[6, b:],
        )
        shown = (ms, price, lots)
        m = draw_orders(
            days.order_keys[i],
            n,
            shown,
            bounds,
            days.state_tick[i],
            (days.traits[i, 0], days.traits[i, 1]),
            publishes_all[i],
            sides,
            messages,
        )
        q = draw_quotes(
            n,
            shown,
            sides[0],
            bounds,
            days.state_tick[i],
            every_ms,
            quote[1, c:],
            prices[c:],
            volumes[c:],
        )
        for k in range(n):
            trade[0, a + k] = i
            trade[1, a + k] = midnight + clock_us(ms[k])
            trade[2, a + k], trade[3, a + k] = price[k], lots[k]
        for k in range(m):
            order[0, b + k] = i
            order[1, b + k] = midnight + clock_us(order[1, b + k])
        for k in range(q):
            quote[0, c + k] = i
            quote[1, c + k] = midnight + clock_us(quote[1, c + k])
        a, b, c = a + n, b + m, c + q
    return a, b, c


@nb.njit(cache=True, nogil=True)
def _flow(days, inverse, bounds_of_class, out):
    """Add each stock-day's trades by aggressor's side and parent's size to `out`."""
    size = most_trades(days.mean.max())
    tape = _scratch(size)
    shown = (tape[0], tape[1], tape[2])
    room = 5 * size + 8
    sides = (
        np.empty(size, dtype=np.int64),
        np.empty(size, dtype=np.int64),
        np.empty(size, dtype=np.int64),
    )
    messages = (
        np.empty(room, dtype=np.int64),
        np.empty(room, dtype=np.int64),
        np.empty(room, dtype=np.int64),
        np.empty(room, dtype=np.int64),
        np.empty(room, dtype=np.int64),
        np.empty(room, dtype=np.int64),
    )
    parent = np.empty(room, dtype=np.int64)
    publishes_all = np.ones(1, dtype=np.bool_)  # a constant is compiled apart
    for i in range(len(days.keys)):
        n = _draw(days, i, inverse, tape)
        draw_orders(
            days.order_keys[i],
            n,
            shown,
            (days.bars[1, i], days.bars[2, i], days.up[i], days.down[i]),
            days.state_tick[i],
            (days.traits[i, 0], days.traits[i, 1]),
            publishes_all[0],
            sides,
            messages,
        )
        side, buy, sell = sides
        parent[:] = 0
        # an id is either a buy or a sell order
        for k in range(n):
            amount = tape[1][k] * tape[2][k]
            parent[buy[k]] += amount
            parent[sell[k]] += amount
        for k in range(n):
            if side[k] == 0:
                continue
            total = parent[buy[k]] if side[k] > 0 else parent[sell[k]]
            c = 0
            while c < len(bounds_of_class) and total >= bounds_of_class[c]:
                c += 1
            out[i, 0 if side[k] > 0 else 1, c] += tape[1][k] * tape[2][k]


# --------------------------------------------------------------------------- writing


def _write_all(
    store: str | os.PathLike[str],
    out: Path,
    label: dict[str, Any],
    rows: pd.DataFrame,
    parts: list[tuple[Any, pd.DataFrame]],
    write: Callable[[pd.DataFrame], dict[str, pa.Table]],
    overwrite: bool,
    progress: bool,
    unit: str,
) -> None:
    """Write one file a part and table, skipping those that are there already."""
    stocks = rows["instrument"].unique()
    label = {
        **label,
        "market": read_meta(store)["market"],
        "stocks": sorted(stocks.tolist()),
        "start": f"{rows['datetime'].min():%Y-%m-%d}",
        "end": f"{rows['datetime'].max():%Y-%m-%d}",
    }
    _claim(out, label, overwrite)
    bar = tqdm(parts, desc=label["kind"], unit=unit, disable=None if progress else True)
    for key, part in bar:
        done = out / ".done" / str(key)
        if done.exists():
            continue
        for table, data in write(part).items():
            file = out / table / f"{key}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(file, data)
        done.touch()


def _claim(out: Path, label: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ours: new, or begun with the same label, or to be replaced."""
    file = out / "market.json"
    if out.is_file():
        raise ValueError(f"`out`={out} is a file; name a directory.")
    if out.is_dir() and any(out.iterdir()):
        if not file.is_file():
            raise ValueError(
                f"`out`={out} is not empty and not written by this command; name a "
                "new directory."
            )
        if json.loads(file.read_text(encoding="utf-8")) == label:
            (out / ".done").mkdir(exist_ok=True)
            return
        if not overwrite:
            raise ValueError(
                f"`out`={out} holds another market or selection; pass `overwrite` "
                "(--overwrite) to replace it, or name a new directory."
            )
        shutil.rmtree(out)
    (out / ".done").mkdir(parents=True)
    write_text(file, json.dumps(label, indent=1) + "\n")
