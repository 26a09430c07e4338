"""Bars of a vendor, in store units, to the fields of the store.

Where the factor is anchored: 1 on a stock's first traded day in the store, growing with
each dividend and split after it. A new ex-date therefore changes new days only, and an
update never rewrites history. A vendor who re-anchors at every delivery (forward
adjustment) is brought back to this anchor through the days both deliveries share.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_handlers.aggregate.schema import FLOW_FIELDS
from data_handlers.vendor.mapping import VendorMapping

__all__ = ["STATE_COLUMNS", "index_bars", "industry_of", "member_spans", "stock_bars"]

STATE_COLUMNS = [
    "instrument",
    "date",
    "factor",
    "vendor_factor",
    "close",
    "vendor_close",
    "float_shares",
]
_OHLC = ("open", "high", "low", "close")
_AS_GIVEN = ("pb", "pe_ttm", "ps_ttm", "pcf_ttm", "is_st", "open_interest")


def stock_bars(
    raw: pd.DataFrame, mapping: VendorMapping, state: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Adjust prices and derive the store's fields.

    Parameters
    ----------
    raw : DataFrame
        Roles in store units, sorted by instrument and date, no duplicates, with a
        boolean ``traded``.
    mapping : VendorMapping
        How prices are adjusted and where the factor is from.
    state : DataFrame, optional
        `STATE_COLUMNS` of the store that is continued, one row per instrument: the
        last traded day and what the next day needs from it.

    Returns
    -------
    bars : DataFrame
        ``datetime``, ``instrument`` and the fields; a suspended day is all NaN.
    state : DataFrame
        The same for the store after these bars.

    Raises
    ------
    ValueError
        If a factor is missing on a traded day, or a re-anchored vendor shares no day
        with the store.
    """
    n = len(raw)
    inst = raw["instrument"].to_numpy()
    traded = raw["traded"].to_numpy()
    new_stock = np.ones(n, dtype=bool)
    new_stock[1:] = inst[1:] != inst[:-1]
    group = np.cumsum(new_stock) - 1
    stocks = inst[new_stock]
    old = _align_state(state, stocks)
    dates = raw["date"].to_numpy()
    # the row of the store's last traded day, where the new files repeat it
    overlap = np.full(len(stocks), -1)
    at = np.flatnonzero((dates == old["date"].to_numpy()[group]) & traded)
    overlap[group[at]] = at

    factor, vendor_factor = _factor(raw, mapping, group, old, overlap)
    # prices the vendor adjusted himself: our factor stays 1 and only the base moves
    base = _base_of_adjusted(raw, mapping, group, old, overlap)

    def where_traded(values: np.ndarray) -> np.ndarray:
        return np.where(traded, values, np.nan)

    price = factor * base
    out: dict[str, np.ndarray] = {}
    for name in _OHLC:
        out[name] = where_traded(raw[name].to_numpy() * price)
    volume = raw["volume"].to_numpy() if "volume" in raw else None
    amount = raw["amount"].to_numpy() if "amount" in raw else None
    if "vwap" in raw:
        out["vwap"] = where_traded(raw["vwap"].to_numpy() * price)
    elif mapping.prices == "raw" and volume is not None and amount is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(volume > 0, amount / volume, np.nan)
        out["vwap"] = where_traded(mean * price)
    out["factor"] = where_traded(factor)
    if volume is not None:
        out["volume"] = where_traded(volume / factor)
    if amount is not None:
        out["amount"] = where_traded(amount)
    out["change"] = _change(out["close"], group, traded, old, overlap)
    if "turnover" in raw:
        out["turnover"] = where_traded(raw["turnover"].to_numpy())
    shares = _float_shares(raw, group, traded, old)
    if "turnover" not in raw and "float_shares" in raw and volume is not None:
        assert shares is not None
        out["turnover"] = where_traded(volume / shares)
    if "market_cap" in raw:
        out["market_cap"] = where_traded(raw["market_cap"].to_numpy())
    elif shares is not None and mapping.prices == "raw":
        out["market_cap"] = where_traded(raw["close"].to_numpy() * shares)
    for name in ("limit_up", "limit_down"):
        if name in raw:
            out[name] = where_traded(raw[name].to_numpy() * price)
    for name in (*_AS_GIVEN, *FLOW_FIELDS):
        if name in raw:
            out[name] = where_traded(raw[name].to_numpy())
    bars = pd.DataFrame({"datetime": raw["date"], "instrument": inst, **out})
    final = _last_state(
        stocks, group, traded, dates, old,
        factor=factor, vendor_factor=vendor_factor, close=out["close"],
        vendor_close=raw["close"].to_numpy(), float_shares=shares,
    )  # fmt: skip
    return bars, final


def _align_state(state: pd.DataFrame | None, stocks: np.ndarray) -> pd.DataFrame:
    if state is None:
        state = pd.DataFrame(columns=STATE_COLUMNS)
    old = state.set_index("instrument").reindex(stocks)
    old["date"] = pd.to_datetime(old["date"])
    for column in STATE_COLUMNS[2:]:
        old[column] = old[column].astype("float64")
    return old


def _first_traded(group: np.ndarray, traded: np.ndarray, stocks: int) -> np.ndarray:
    """Row of each stock's first traded day, -1 where there is none."""
    first = np.full(stocks, -1)
    rows = np.flatnonzero(traded)
    first[group[rows[::-1]]] = rows[::-1]
    return first


def _factor(
    raw: pd.DataFrame,
    mapping: VendorMapping,
    group: np.ndarray,
    old: pd.DataFrame,
    overlap: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return our factor and the vendor's, one value a row."""
    n, stocks = len(raw), len(old)
    traded = raw["traded"].to_numpy()
    if mapping.factor == "one":
        return np.ones(n), np.ones(n)
    known = old["factor"].notna().to_numpy()
    if mapping.factor == "column":
        vendor = raw["factor"].to_numpy()
        bad = traded & ~(vendor > 0)
        if bad.any():
            row = raw.iloc[int(np.argmax(bad))]
            raise ValueError(
                f"`factor` is missing or not positive on {int(bad.sum())} traded "
                f"day(s), first {row['instrument']} {row['date']:%Y-%m-%d}."
            )
    else:
        # from one traded day to the next: what stands on a suspended day (nothing,
        # zeros, the last price) must not matter
        preclose = np.where(traded, raw["preclose"].to_numpy(), np.nan)
        close = pd.Series(np.where(traded, raw["close"].to_numpy(), np.nan))
        before = close.groupby(group).ffill().groupby(group).shift().to_numpy()
        # a stock's first day continues the store where it does not repeat its last day
        first = _first_traded(group, traded, stocks)
        has = first >= 0
        before[first[has]] = np.where(overlap < 0, old["vendor_close"], np.nan)[has]
        with np.errstate(divide="ignore", invalid="ignore"):
            step = before / preclose
        step = np.where(np.isfinite(step) & (step > 0), step, 1.0)
        # behind the store's last day its factor goes on, product by product as in one
        # run over all files
        late = np.arange(n) > overlap[group]
        begin = _first_traded(group, traded & late, stocks)
        on = known & (begin >= 0)
        step[begin[on]] *= old["factor"].to_numpy()[on]
        vendor = pd.Series(step).groupby(2 * group + late).cumprod().to_numpy()
        scale = np.where(overlap >= 0, old["factor"] / vendor[overlap], 1.0)
        factor = vendor * np.where(late, 1.0, scale[group])
        return factor, factor
    # 1 on the first traded day, or what the store has on its last day
    rows = _first_traded(group, traded, stocks)
    base = np.where(rows >= 0, vendor[rows], 1.0)
    shared = overlap >= 0
    base = np.where(shared & known, vendor[overlap] / old["factor"], base)
    alone = known & ~shared
    if alone.any():
        if mapping.factor_history == "fixed":
            base = np.where(alone, old["vendor_factor"] / old["factor"], base)
        else:
            _need_overlap(old, alone)
    # to twelve digits: taken back from its quotients it is the same
    base = np.array([float(f"{x:.12g}") for x in base])
    return vendor / base[group], vendor


def _base_of_adjusted(
    raw: pd.DataFrame,
    mapping: VendorMapping,
    group: np.ndarray,
    old: pd.DataFrame,
    overlap: np.ndarray,
) -> np.ndarray:
    if mapping.prices == "raw":
        return np.ones(len(raw))
    known = old["close"].notna().to_numpy()
    alone = known & (overlap < 0)
    if alone.any() and mapping.factor_history == "rebased":
        _need_overlap(old, alone)
    shared = known & (overlap >= 0)
    ratio = np.where(shared, old["close"] / raw["close"].to_numpy()[overlap], 1.0)
    # the same base up to the float32 of the store is the same base
    ratio = np.where(np.abs(ratio - 1) < 1e-6, 1.0, ratio)
    return ratio[group]


def _need_overlap(old: pd.DataFrame, alone: np.ndarray) -> None:
    dates = old.loc[alone, "date"]
    raise ValueError(
        f"{len(dates)} stock(s) have no row on the day on which the store has them "
        f"traded last, first {dates.index[0]} on {dates.iloc[0]:%Y-%m-%d}; this vendor "
        "re-anchors its prices (`factor_history`: rebased), so new files must repeat "
        f"that day: deliver these stocks from {dates.min():%Y-%m-%d} on."
    )


def _change(
    close: np.ndarray,
    group: np.ndarray,
    traded: np.ndarray,
    old: pd.DataFrame,
    overlap: np.ndarray,
) -> np.ndarray:
    """Return on the previous traded close; NaN on a stock's first day."""
    rows = np.flatnonzero(traded)
    out = np.full(len(close), np.nan)
    if not len(rows):
        return out
    previous = np.empty(len(rows))
    previous[0] = np.nan
    previous[1:] = close[rows[:-1]]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = group[rows[1:]] != group[rows[:-1]]
    continues = np.where(overlap < 0, old["close"], np.nan)
    previous[first] = continues[group[rows[first]]]
    out[rows] = close[rows] / previous - 1
    return out


def _float_shares(
    raw: pd.DataFrame, group: np.ndarray, traded: np.ndarray, old: pd.DataFrame
) -> np.ndarray | None:
    """Tradable shares; the last known value where turnover is rounded to nothing."""
    if "float_shares" in raw:
        shares = raw["float_shares"].to_numpy().copy()
    elif "turnover" in raw and "volume" in raw:
        turnover, volume = raw["turnover"].to_numpy(), raw["volume"].to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where((turnover > 0) & (volume > 0), volume / turnover, np.nan)
    else:
        return None
    shares[~traded] = np.nan
    filled = pd.Series(shares).groupby(group).ffill().to_numpy()
    return np.where(np.isnan(filled), old["float_shares"].to_numpy()[group], filled)


def _last_state(
    stocks: np.ndarray,
    group: np.ndarray,
    traded: np.ndarray,
    dates: np.ndarray,
    old: pd.DataFrame,
    **columns: np.ndarray | None,
) -> pd.DataFrame:
    last = np.full(len(stocks), -1)
    rows = np.flatnonzero(traded)
    last[group[rows]] = rows  # later rows win
    has = last >= 0
    frame = old.reset_index(names="instrument")
    frame["date"] = pd.Series(dates[last]).where(has, frame["date"])
    for name, values in columns.items():
        if values is not None:
            frame[name] = np.where(has, values[last], frame[name])
    return frame[STATE_COLUMNS]


def index_bars(
    raw: pd.DataFrame, calendar: pd.DatetimeIndex, state: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Bars of indices on the days of the calendar: prices as they are, and ``change``.

    ``change`` of an index's first row needs the row before it, as `state`
    (``instrument``, ``datetime``, ``close``), and is NaN without. It is of the closes
    as they are stored, in float32: an update has no others.
    """
    frame = raw.sort_values(["instrument", "date"], kind="stable")
    frame = frame.assign(close=frame["close"].astype(np.float32).astype(np.float64))
    previous = frame.groupby("instrument")["close"].shift()
    if state is not None:
        last = state.set_index("instrument")
        continues = ~frame["instrument"].duplicated() & (
            frame["date"] > frame["instrument"].map(last["datetime"])
        )
        previous = previous.where(~continues, frame["instrument"].map(last["close"]))
    frame = frame.assign(change=frame["close"] / previous - 1)
    frame = frame[frame["date"].isin(calendar)]
    frame = frame.rename(columns={"date": "datetime"})
    names = ("open", "high", "low", "close", "volume", "amount", "change")
    return frame[["datetime", "instrument", *[c for c in names if c in frame]]]


def industry_of(
    history: pd.DataFrame, dates: pd.Series, instruments: pd.Series
) -> np.ndarray:
    """Industry code in force on a day: the last row that started by then.

    Parameters
    ----------
    history : DataFrame
        ``instrument``, ``start``, ``code`` (number) and optionally ``end`` (the last
        day it held); a row without ``end`` holds until the stock's next row.
    dates, instruments : Series
        The days asked for.

    Returns
    -------
    ndarray
        float64, NaN before a stock's first row: a later industry is never used.
    """
    ask = pd.DataFrame(
        {
            "date": dates.to_numpy(),
            "instrument": instruments.to_numpy(),
            "row": np.arange(len(dates)),
        }
    ).sort_values("date", kind="stable")
    known = history.sort_values("start", kind="stable")
    found = pd.merge_asof(
        ask, known, left_on="date", right_on="start", by="instrument"
    ).sort_values("row")
    code = found["code"].to_numpy(dtype=np.float64, copy=True)
    if "end" in found:
        code[(found["end"] < found["date"]).to_numpy()] = np.nan
    return code


def member_spans(
    lists: pd.DataFrame, calendar: pd.DatetimeIndex
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Turn dated lists of one index into spans and weights.

    A list holds from the first trading day on or after its date until the day before
    the next list takes effect; the last one holds to the end of the calendar. Nothing
    is known before the first list.

    Parameters
    ----------
    lists : DataFrame
        ``date``, ``instrument``, ``weight`` (any scale; NaN for all of a list means
        equal weights).
    calendar : DatetimeIndex
        Trading days.

    Returns
    -------
    spans : DataFrame
        ``instrument``, ``start``, ``end``; consecutive lists are joined.
    periods : DataFrame
        ``instrument``, ``first``, ``last`` (calendar slots), ``weight`` per list.
    """
    days = np.sort(lists["date"].unique())
    begin = calendar.searchsorted(pd.DatetimeIndex(days))
    end = np.append(begin[1:], len(calendar)) - 1
    order = {day: i for i, day in enumerate(pd.DatetimeIndex(days))}
    number = lists["date"].map(order).to_numpy()
    periods = pd.DataFrame(
        {
            "instrument": lists["instrument"].to_numpy(),
            "first": begin[number],
            "last": end[number],
            "weight": lists["weight"].to_numpy(dtype=np.float64),
        }
    )
    periods = periods[periods["first"] <= periods["last"]]
    equal = periods.groupby("first")["weight"].transform("count") == 0
    periods["weight"] = periods["weight"].where(~equal, 1.0)
    periods = periods.sort_values(["instrument", "first"], kind="stable")
    periods = periods.reset_index(drop=True)
    joined = (
        periods["instrument"].eq(periods["instrument"].shift())
        & periods["first"].eq(periods["last"].shift() + 1)
    )  # fmt: skip
    run = (~joined).cumsum()
    spans = periods.groupby(run).agg(
        instrument=("instrument", "first"), start=("first", "min"), end=("last", "max")
    )
    for column in ("start", "end"):
        spans[column] = calendar[spans[column].to_numpy()]
    return spans.reset_index(drop=True), periods
