"""Minute bars of one day reduced to one row: the 22 `ms` features.

Notation, per stock and day, over the N bars of the session: p close of a bar, v its
volume (shares), a its amount (CNY), r = log(p_i / p_{i-1}) with the day's open O in
place of p_0; O, H, L, C open, high, low, close of the day. `MINUTE_FEATURES` defines
each feature with unit, range, NaN rule and the moment at which it is known.

The reports name 22 features and list only some; the list is this project's (SPEC
§1.2). What it leaves open is decided here:

- N counts the minutes of the session, not the rows of the file. A minute without a
  row, or with zero volume, is a bar without trade: the price carries over (the day's
  open before the first trade), r = v = a = 0. So vendors that omit empty minutes and
  vendors that repeat the last price give the same row.
- Bars stamped in the opening auction join the first bar, so O is the auction's price.
- A day on which no instrument trades in the last half-hour ends early (US half days,
  circuit breakers), if at least `MIN_INSTRUMENTS` trade at all: N ends with the last
  traded half-hour. `Session.early_close` says so explicitly. The first and last 30
  minutes are those of the shortened day.
- A stock without any trade has no row that day.
- Standard deviations and correlations are those of the population (divide by N).
- A ratio is NaN where its denominator is zero, a correlation where one side does
  not vary; never 0 or infinite.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
import pandas as pd
import pyarrow as pa

from data_handlers.aggregate.schema import BARS, FeatureDef, Session, get_session

__all__ = [
    "MINUTE_FEATURES",
    "MINUTE_NAMES",
    "REJECT_REASONS",
    "DayRows",
    "aggregate_minutes",
    "carry_overnight",
    "minute_features",
]

_INF = float("inf")
_NO_MOVE = "no price change all day (Σr² = 0)"

#: The features in the order of their columns.
MINUTE_FEATURES: tuple[FeatureDef, ...] = (
    FeatureDef("ms_rv", "sqrt(Σr²)", "log return a day", 0, _INF, "never"),
    FeatureDef("ms_skew", "sqrt(N)·Σr³/(Σr²)^1.5", "1", -_INF, _INF, _NO_MOVE),
    FeatureDef("ms_kurt", "N·Σr⁴/(Σr²)²", "1", 1, _INF, _NO_MOVE),
    FeatureDef("ms_down_ratio", "Σr²[r<0]/Σr²", "share", 0, 1, _NO_MOVE),
    FeatureDef(
        "ms_jump",
        "Σr over |r| > 3·1.4826·median(|r − median(r)|); a MAD of 0 (most minutes "
        "without a move) makes every move extreme",
        "log return",
        -_INF,
        _INF,
        "never",
    ),
    FeatureDef(
        "ms_mom",
        "ms_overnight + Σr over the remaining, moderate r",
        "log return",
        -_INF,
        _INF,
        "no earlier day of the stock in the source",
    ),
    FeatureDef(
        "ms_overnight",
        "log(O_t·f_t / (C_{t-1}·f_{t-1})), f the adjustment factor, t-1 the stock's "
        "previous traded day",
        "log return",
        -_INF,
        _INF,
        "no earlier day of the stock in the source",
        known="open",
    ),
    FeatureDef(
        "ms_ret_open30",
        "Σr, first 30 minutes",
        "log return",
        -_INF,
        _INF,
        "never",
        known="30 minutes after the open",
    ),
    FeatureDef(
        "ms_ret_mid",
        "Σr, between the first and the last 30 minutes",
        "log return",
        -_INF,
        _INF,
        "session shorter than 61 minutes",
        known="30 minutes before the close",
    ),
    FeatureDef(
        "ms_ret_last30", "Σr, last 30 minutes", "log return", -_INF, _INF, "never"
    ),
    FeatureDef(
        "ms_vol_open30", "Σv of the first 30 minutes / Σv", "share", 0, 1, "never"
    ),
    FeatureDef(
        "ms_vol_last30", "Σv of the last 30 minutes / Σv", "share", 0, 1, "never"
    ),
    FeatureDef("ms_vhhi", "Σ(v/Σv)²", "1", 0, 1, "never"),
    FeatureDef("ms_vvol", "std(v)/mean(v)", "1", 0, _INF, "never"),
    FeatureDef(
        "ms_apb",
        "log(mean(p) / (Σa/Σv))",
        "log ratio",
        -_INF,
        _INF,
        "no amount",
        needs=("amount",),
    ),
    FeatureDef(
        "ms_arpp",
        "(mean(p) − L)/(H − L), every minute weighs the same",
        "share",
        0,
        1,
        "H = L",
    ),
    FeatureDef(
        "ms_corr_pv", "corr(p, v)", "correlation", -1, 1, "p or v does not vary"
    ),
    FeatureDef(
        "ms_corr_rv", "corr(|r|, v)", "correlation", -1, 1, "|r| or v does not vary"
    ),
    FeatureDef(
        "ms_corr_lag",
        "corr(r_i, v_{i-1}), i = 2…N",
        "correlation",
        -1,
        1,
        "r or lagged v does not vary",
    ),
    FeatureDef(
        "ms_illiq",
        "mean(|r|/a) over bars with a > 0",
        "1/CNY",
        0,
        _INF,
        "no bar with an amount",
        needs=("amount",),
    ),
    FeatureDef("ms_trend", "|log(C/O)|/Σ|r|", "share", 0, 1, "Σ|r| = 0"),
    FeatureDef(
        "ms_mdd", "max over i ≤ j of 1 − p_j/p_i", "fraction of price", 0, 1, "never"
    ),
)
MINUTE_NAMES = [f.name for f in MINUTE_FEATURES]

#: Why a row of a source is not used, by status code; 0 means it is.
REJECT_REASONS = {
    1: "outside the session",
    2: "price not positive",
    3: "open, close, high and low disagree",
    4: "volume or amount negative or unknown",
    5: "duplicate (instrument, datetime)",
    6: "no time",
}
#: Fewest traded instruments of a day for an early close to be inferred.
MIN_INSTRUMENTS = 5
_REJECTS = len(REJECT_REASONS) + 1
_DAY_US = 86_400_000_000
_EXTRA = [
    *("open", "high", "low", "close", "volume", "amount", "factor", "bars"),
    "last_slot",
]
_I = {name: k for k, name in enumerate(MINUTE_NAMES)}
_N = len(MINUTE_NAMES)


@dataclass
class DayRows:
    """Rows of the aggregate and the account of the input rows.

    Attributes
    ----------
    frame : DataFrame
        Sorted by datetime, instrument: those two columns, the day's open, high, low,
        close, volume, amount, factor, bars (traded bars), then the features. Without
        earlier data `ms_overnight` is NaN and `ms_mom` holds the moderate part only;
        `carry_overnight` completes both.
    rows_in, rows_used : int
        Rows of the input; rows that entered a feature.
    no_trade : int
        Rows without volume (accepted, they change nothing).
    rejected : dict
        Reason to number of rows.
    notes : dict
        Other facts and how often: unsorted rows, stock-days without a trade, days
        that end early.
    """

    frame: pd.DataFrame
    rows_in: int
    rows_used: int
    no_trade: int
    rejected: dict[str, int]
    notes: dict[str, Any]


@nb.njit(nogil=True, cache=True)
def _classify(code, stamp, o, h, lo, c, v, a, has_amount, table, status):
    """Give every row its status; count rows out of order."""
    unsorted = 0
    grouped = True
    for i in range(len(code)):
        t = stamp[i]
        if i > 0 and code[i] == code[i - 1] and t < stamp[i - 1]:
            unsorted += 1
        if i > 0 and code[i] < code[i - 1]:
            grouped = False
        if t < 0:
            status[i] = 6
            continue
        minute = (t % 86_400_000_000) // 60_000_000
        if table[minute] < 0:
            status[i] = 1
            continue
        if not (v[i] >= 0) or (has_amount and not (a[i] >= 0)):
            status[i] = 4
            continue
        if v[i] == 0:
            continue
        if not (o[i] > 0 and h[i] > 0 and lo[i] > 0 and c[i] > 0):
            status[i] = 2
            continue
        # Sources round prices; a ten-thousandth is no disagreement.
        tol = 1e-6 * h[i]
        top = max(o[i], c[i])
        low = min(o[i], c[i])
        if h[i] < lo[i] - tol or top > h[i] + tol or low < lo[i] - tol:
            status[i] = 3
    return unsorted, grouped


@nb.njit(nogil=True, cache=True)
def _groups(code, stamp, status, v, starts, counts):
    """Mark duplicates and find where each stock-day starts. Rows are sorted.

    `counts` gets the rows of each status, and last the rows without trade.
    """
    g = 0
    day = -1
    last = -1
    for i in range(len(code)):
        if status[i] == 6:
            counts[6] += 1
            continue
        d = stamp[i] // 86_400_000_000
        if g == 0 or code[i] != code[starts[g - 1]] or d != day:
            starts[g] = i
            g += 1
            day = d
        elif stamp[i] == stamp[last] and status[i] != 1:
            # Of equal stamps the first usable row stays.
            if status[last] == 0 and status[i] == 0:
                status[i] = 5
                counts[5] += 1
                continue
        counts[status[i]] += 1
        if status[i] == 0 and v[i] == 0:
            counts[-1] += 1
        last = i
    starts[g] = len(code)
    return g


@nb.njit(nogil=True, cache=True)
def _median(x, n):
    """Median of x[:n]; reorders x.

    Quickselect whose inner loops have no branch: on random returns half of all branches
    would be guessed wrong, which costs more than the rest of the features together.
    Values equal to the pivot are gathered apart, so that a silent day (all returns 0)
    takes one step, not n.
    """
    k = n // 2
    left, right = 0, n
    while right - left > 1:
        a, b, c = x[left], x[(left + right) // 2], x[right - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        m = left
        for i in range(left, right):
            t = x[i]
            x[i] = x[m]
            x[m] = t
            m += t < pivot
        if k < m:
            right = m
            continue
        left = m
        for i in range(left, right):
            t = x[i]
            x[i] = x[m]
            x[m] = t
            m += t <= pivot
        if k < m:
            break  # x[k] is the pivot
        left = m
    upper = x[k]
    if n % 2 == 1:
        return upper
    lower = x[0]
    for i in range(1, k):
        lower = max(lower, x[i])
    return 0.5 * (lower + upper)


@nb.njit(nogil=True, cache=True)
def _log_ratio(p, q):
    """log(p/q); for moves below 2 % by 2·artanh((p−q)/(p+q)), exact to rounding."""
    z = (p - q) / (p + q)
    if abs(z) > 0.01:
        return np.log(p / q)
    w = z * z
    # The next term, w⁵/11, is below 1e-21.
    return 2 * z * (1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9)))))


@nb.njit(nogil=True, cache=True)
def _reduce(
    first,
    last,
    starts,
    stamp,
    status,
    o,
    h,
    lo,
    c,
    v,
    a,
    f,
    has_amount,
    table,
    half,
    slots,
    day_slots,
    day0,
    extra,
    out,
):
    """Reduce stock-days first…last to one row each."""
    sp = np.empty(slots)
    sv = np.empty(slots)
    sa = np.empty(slots)
    r = np.empty(slots)
    work = np.empty(slots)
    for g in range(first, last):
        begin, end = starts[g], starts[g + 1]
        n = 0
        # -- bars of the session, merged where several rows share a slot
        sv[:] = 0.0
        sa[:] = 0.0
        day_open = np.nan
        high, low = -np.inf, np.inf
        traded = 0
        last_slot = -1
        factor = 1.0
        for i in range(begin, end):
            if status[i] != 0:
                continue
            if n == 0:
                n = day_slots[stamp[i] // 86_400_000_000 - day0]
                factor = f[i]
            if v[i] <= 0:
                continue
            s = table[(stamp[i] % 86_400_000_000) // 60_000_000]
            if s >= n:
                s = n - 1
            if traded == 0:
                day_open = o[i]
            if sv[s] == 0:
                traded += 1
            last_slot = s
            sp[s] = c[i]
            sv[s] += v[i]
            if has_amount:
                sa[s] += a[i]
            high = max(high, h[i])
            low = min(low, lo[i])
        if traded == 0:
            extra[g, 7] = 0
            continue
        # -- moments, one pass
        prev = day_open
        s1 = s2 = s3 = s4 = down = absr = 0.0
        sum_v = sum_v2 = sum_a = sum_p = 0.0
        first_r = last_r = first_v = last_v = 0.0
        illiq = 0.0
        n_illiq = 0
        peak = 0.0
        mdd = 0.0
        p_min, p_max, v_min, v_max = np.inf, -np.inf, np.inf, -np.inf
        for s in range(n):
            vs = sv[s]
            if vs == 0:
                sp[s] = prev
                rs = 0.0
            else:
                rs = _log_ratio(sp[s], prev)
                prev = sp[s]
            ps = sp[s]
            r[s] = rs
            q = rs * rs
            ar = abs(rs)
            s1 += rs
            s2 += q
            s3 += q * rs
            s4 += q * q
            absr += ar
            if rs < 0:
                down += q
            if s < half:
                first_r += rs
                first_v += vs
            if s >= n - half:
                last_r += rs
                last_v += vs
            sum_v += vs
            sum_p += ps
            if sa[s] > 0:
                sum_a += sa[s]
                illiq += ar / sa[s]
                n_illiq += 1
            peak = max(peak, ps)
            mdd = max(mdd, 1.0 - ps / peak)
            p_min, p_max = min(p_min, ps), max(p_max, ps)
            v_min, v_max = min(v_min, vs), max(v_max, vs)
        # -- second moments around the means
        mean_p, mean_v, mean_ar = sum_p / n, sum_v / n, absr / n
        vpp = vvv = vrr = cpv = crv = 0.0
        ar_min, ar_max = np.inf, -np.inf
        for s in range(n):
            dp, dv, dr = sp[s] - mean_p, sv[s] - mean_v, abs(r[s]) - mean_ar
            vpp += dp * dp
            vvv += dv * dv
            vrr += dr * dr
            cpv += dp * dv
            crv += dr * dv
            sum_v2 += sv[s] * sv[s]
            ar_min, ar_max = min(ar_min, abs(r[s])), max(ar_max, abs(r[s]))
        lag = np.nan
        if n > 2:
            m_r, m_v = (s1 - r[0]) / (n - 1), (sum_v - sv[n - 1]) / (n - 1)
            lrr = lvv = lrv = 0.0
            r_min, r_max, w_min, w_max = r[1], r[1], sv[0], sv[0]
            for s in range(1, n):
                dr, dv = r[s] - m_r, sv[s - 1] - m_v
                lrr += dr * dr
                lvv += dv * dv
                lrv += dr * dv
                r_min, r_max = min(r_min, r[s]), max(r_max, r[s])
                w_min, w_max = min(w_min, sv[s - 1]), max(w_max, sv[s - 1])
            if r_max > r_min and w_max > w_min:
                lag = lrv / np.sqrt(lrr * lvv)
        # -- extreme returns
        work[:n] = r[:n]
        med = _median(work, n)
        for s in range(n):
            work[s] = abs(r[s] - med)
        bound = 3 * 1.4826 * _median(work, n)
        jump = 0.0
        for s in range(n):
            if abs(r[s]) > bound:
                jump += r[s]
        # -- the row
        close = sp[n - 1]
        extra[g, 0] = day_open
        extra[g, 1] = high
        extra[g, 2] = low
        extra[g, 3] = close
        extra[g, 4] = sum_v
        extra[g, 5] = sum_a if has_amount else np.nan
        extra[g, 6] = factor
        extra[g, 7] = traded
        extra[g, 8] = last_slot
        row = out[g]
        row[0] = np.sqrt(s2)
        if s2 > 0:
            row[1] = np.sqrt(n) * s3 / s2**1.5
            row[2] = n * s4 / (s2 * s2)
            row[3] = down / s2
        row[4] = jump
        row[5] = s1 - jump
        row[7] = first_r
        if n > 2 * half:
            row[8] = s1 - first_r - last_r
        row[9] = last_r
        row[10] = first_v / sum_v
        row[11] = last_v / sum_v
        row[12] = sum_v2 / (sum_v * sum_v)
        row[13] = np.sqrt(vvv / n) / mean_v
        if has_amount and sum_a > 0:
            row[14] = np.log(mean_p / (sum_a / sum_v))
        if high > low:
            row[15] = (mean_p - low) / (high - low)
        if p_max > p_min and v_max > v_min:
            row[16] = cpv / np.sqrt(vpp * vvv)
        if ar_max > ar_min and v_max > v_min:
            row[17] = crv / np.sqrt(vrr * vvv)
        row[18] = lag
        if has_amount and n_illiq > 0:
            row[19] = illiq / n_illiq
        if absr > 0:
            row[20] = abs(np.log(close / day_open)) / absr
        row[21] = mdd


def aggregate_minutes(
    bars: pa.Table | pd.DataFrame,
    session: str | Session = "a_share",
    bar_minutes: int = 1,
    stamp: str = "start",
    amount: str = "exact",
    threads: int | None = None,
    infer_early: bool = True,
    check: bool = True,
) -> DayRows:
    """Reduce minute bars to one row a stock and day.

    Parameters
    ----------
    bars : pyarrow.Table or DataFrame
        Columns of `schema.BARS`; any order of rows (sorted input is fastest).
    session : str or Session, default "a_share"
        When the exchange trades.
    bar_minutes : {1, 5, 15}, default 1
        Length of the bars the features are computed from; shorter bars of the source
        are merged.
    stamp : {"start", "end"}, default "start"
        What `datetime` of a bar is.
    amount : {"exact", "typical"}, default "exact"
        Without an amount column the features that need it are NaN; "typical" uses
        volume × (high + low + close)/3 instead.
    threads : int, optional
        Threads, default all cores the process may use.
    infer_early : bool, default True
        Whether to find days that end early from the rows (see the module's head).
    check : bool, default True
        Whether to refuse rows most of which lie outside the session; off for a piece
        of a source, whose whole is judged by `check_session`.

    Returns
    -------
    DayRows
        One row a stock and traded day, and the account of the input.

    Raises
    ------
    ValueError
        For a missing column, a time zone, bars longer than `bar_minutes`, or a
        source most of whose rows lie outside the session.
    """
    session = get_session(session)
    slots = session.slots(bar_minutes)
    if stamp not in ("start", "end"):
        raise ValueError(f"`stamp` must be 'start' or 'end', got {stamp!r}.")
    if amount not in ("exact", "typical"):
        raise ValueError(f"`amount` must be 'exact' or 'typical', got {amount!r}.")
    labels, code, when, cols = _arrays(bars)
    rows_in = len(code)
    has_amount = cols["amount"] is not None
    if not has_amount and amount == "typical":
        cols["amount"] = (
            cols["volume"] * (cols["high"] + cols["low"] + cols["close"]) / 3
        )
        has_amount = True
    if cols["amount"] is None:
        cols["amount"] = cols["volume"]  # placeholder, not read
    if cols["factor"] is None:
        cols["factor"] = np.ones(rows_in)
    table = session.minute_of_session(stamp == "end") // bar_minutes
    status = np.zeros(rows_in, dtype=np.int8)
    names = ("open", "high", "low", "close", "volume", "amount")
    code, when = frozen(code), frozen(when)
    columns = tuple(frozen(cols[k]) for k in names)
    first_args: tuple = (code, when, *columns, has_amount, table, status)
    unsorted, grouped = _classify(*first_args)
    if unsorted or not grouped:
        order = np.lexsort((when, code))
        code, when, status = code[order], when[order], status[order]
        cols = {k: x[order] for k, x in cols.items()}
    code, when = frozen(code), frozen(when)
    starts = np.empty(rows_in + 1, dtype=np.int64)
    counts = np.zeros(_REJECTS + 1, dtype=np.int64)
    n_groups = _groups(code, when, status, frozen(cols["volume"]), starts, counts)
    starts = starts[: n_groups + 1]
    if check:
        check_session(int(counts[1]), rows_in, session)
    _check_length(code, when, status, bar_minutes)
    rejected = {why: int(counts[k]) for k, why in REJECT_REASONS.items() if counts[k]}
    notes: dict[str, Any] = {}
    if unsorted:
        notes["rows out of time order (sorted)"] = int(unsorted)
    if n_groups == 0:
        return DayRows(_frame(labels, code[:0], when[:0]), rows_in, 0, 0, rejected, {})
    good = when if counts[6] == 0 else when[when >= 0]
    day0, day1 = int(good.min() // _DAY_US), int(good.max() // _DAY_US)
    day_slots = np.full(day1 - day0 + 1, slots, dtype=np.int64)
    for date, n in _early_slots(session, bar_minutes).items():
        if day0 <= date <= day1:
            day_slots[date - day0] = n
    extra = np.full((n_groups, len(_EXTRA)), np.nan)
    out = np.full((n_groups, _N), np.nan)
    args = (
        starts,
        when,
        status,
        *(frozen(cols[k]) for k in names),
        frozen(cols["factor"]),
        has_amount,
        table,
        30 // bar_minutes,
        slots,
        day_slots,
        day0,
        extra,
        out,
    )
    _in_threads(_reduce, n_groups, args, threads)
    if infer_early:
        day = when[starts[:-1]] // _DAY_US
        short = early_days(day, extra[:, 8], slots, 30 // bar_minutes)
        if short:
            for date, n in short.items():
                day_slots[date - day0] = n
            extra[:], out[:] = np.nan, np.nan
            _in_threads(_reduce, n_groups, args, threads)
    ends = np.flatnonzero(day_slots < slots)
    if len(ends):
        notes["days that end early"] = [
            str(np.datetime64(int(day0 + k), "D")) for k in ends
        ]
    keep = extra[:, 7] > 0
    halted = int((~keep).sum())
    if halted:
        notes["stock-days without a trade (no row)"] = halted
    heads = starts[:-1][keep]
    frame = _frame(labels, code[heads], when[heads], extra[keep], out[keep])
    no_trade = int(counts[-1])
    used = int(counts[0]) - no_trade
    return DayRows(frame, rows_in, used, no_trade, rejected, notes)


def carry_overnight(
    days: pd.DataFrame, factors: pd.Series | None = None
) -> pd.DataFrame:
    """Complete `ms_overnight` and `ms_mom` from each stock's previous traded day.

    Parameters
    ----------
    days : DataFrame
        `DayRows.frame`, or several of them below one another.
    factors : Series, optional
        Adjustment factor by (datetime, instrument); replaces the `factor` column
        where it has a value. A factor must hold for the close and the open of its
        day, as Qlib's `$factor` does.

    Returns
    -------
    DataFrame
        Sorted by datetime, instrument, in a new frame.
    """
    days = days.sort_values(["instrument", "datetime"], kind="stable")
    factor = days["factor"].to_numpy()
    if factors is not None:
        key = pd.MultiIndex.from_frame(days[["datetime", "instrument"]])
        given = factors.reindex(key).to_numpy(dtype=float)
        factor = np.where(np.isfinite(given), given, factor)
    first = days["open"].to_numpy() * factor
    last = days["close"].to_numpy() * factor
    same = days["instrument"].to_numpy()[1:] == days["instrument"].to_numpy()[:-1]
    overnight = np.full(len(days), np.nan)
    overnight[1:][same] = np.log(first[1:][same] / last[:-1][same])
    days = days.assign(
        factor=factor,
        ms_overnight=overnight,
        ms_mom=days["ms_mom"].to_numpy() + overnight,
    )
    return days.sort_values(["datetime", "instrument"], ignore_index=True)


def minute_features(
    bars: pa.Table | pd.DataFrame,
    factors: pd.Series | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Compute the 22 features of every stock and day of `bars` in memory.

    Parameters
    ----------
    bars, options
        See `aggregate_minutes`.
    factors : Series, optional
        See `carry_overnight`.

    Returns
    -------
    DataFrame
        Index (datetime, instrument), float64 columns `MINUTE_NAMES`.
    """
    rows = aggregate_minutes(bars, **options)
    frame = carry_overnight(rows.frame, factors)
    return frame.set_index(["datetime", "instrument"])[MINUTE_NAMES]


def early_days(
    day: np.ndarray, last_slot: np.ndarray, slots: int, half: int
) -> dict[int, int]:
    """Find days on which no instrument trades in the last half-hour.

    Parameters
    ----------
    day : int array
        Day since 1970 of each stock-day.
    last_slot : float array
        Last slot with a trade of each stock-day, NaN without one.
    slots, half : int
        Slots of a full session and of half an hour.

    Returns
    -------
    dict
        Day to the number of slots up to the end of the last traded half-hour. Days
        with fewer than `MIN_INSTRUMENTS` traded instruments are left alone: one stock
        halted in the afternoon is no early close.
    """
    known = np.isfinite(last_slot)
    days, where = np.unique(day[known], return_inverse=True)
    latest = np.full(len(days), -1.0)
    np.maximum.at(latest, where, last_slot[known])
    count = np.bincount(where, minlength=len(days))
    short = (latest < slots - half) & (count >= MIN_INSTRUMENTS)
    return {
        int(d): int((last // half + 1) * half)
        for d, last in zip(days[short], latest[short], strict=True)
    }


def _early_slots(session: Session, bar_minutes: int) -> dict[int, int]:
    """Slots of the days that `Session.early_close` names, by day since 1970."""
    table = session.minute_of_session(end_stamped=True)
    out = {}
    for date, time in session.early_close.items():
        minute = table[time.hour * 60 + time.minute]
        if minute < 0:
            raise ValueError(
                f"`early_close` of {date} must lie in the session, got {time}."
            )
        day = int(np.datetime64(date, "D").astype(np.int64))
        out[day] = int(minute + 1) // bar_minutes
    return out


def _in_threads(
    kernel: Callable, n: int, args: tuple, threads: int | None = None
) -> None:
    """Run kernel(first, last, *args) over 0…n in threads; it must hold no GIL."""
    threads = threads or len(os.sched_getaffinity(0))
    if threads == 1 or n < 64:
        kernel(0, n, *args)
        return
    edges = np.linspace(0, n, 4 * threads + 1).astype(np.int64)
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(kernel, int(lo), int(hi), *args)
            for lo, hi in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()


def _arrays(
    bars: pa.Table | pd.DataFrame,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Turn a table into instrument labels, codes, stamps (µs) and value arrays."""
    names = bars.column_names if isinstance(bars, pa.Table) else list(bars.columns)
    for name in BARS.required:
        if name not in names:
            raise ValueError(
                f"Bars have no column {name!r}; they need {BARS.required} and have "
                f"{names[:12]}. Name your columns in a mapping file."
            )
    if isinstance(bars, pd.DataFrame):
        use = [n for n in BARS.names if n in names]
        bars = pa.Table.from_pandas(bars[use], preserve_index=False)
    labels, code = dictionary_codes(bars.column("instrument"))
    when = microseconds(bars.column("datetime"), "datetime")
    cols: dict[str, Any] = {}
    for name in ("open", "high", "low", "close", "volume", "amount", "factor"):
        cols[name] = None
        if name in names:
            column = bars.column(name)
            if not (
                pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
            ):
                raise ValueError(
                    f"Bars: column {name!r} must hold numbers, got {column.type}."
                )
            cols[name] = column.to_numpy().astype(np.float64, copy=False)
    return labels, code, when, cols


def dictionary_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Labels, sorted, and the int32 code of each row in them."""
    if not pa.types.is_dictionary(column.type):
        if not (
            pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        ):
            raise ValueError(
                f"Column 'instrument' must hold text such as SH600000, got "
                f"{column.type}."
            )
        column = column.dictionary_encode()
    if column.null_count:
        raise ValueError(
            f"Column 'instrument' is empty in {column.null_count} rows; every row "
            "needs its code."
        )
    column = column.unify_dictionaries()
    if column.num_chunks == 0:
        return np.empty(0, dtype=object), np.empty(0, dtype=np.int32)
    labels = np.asarray(column.chunk(0).dictionary.to_pylist(), dtype=object)
    parts = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    code = parts[0] if len(parts) == 1 else np.concatenate(parts)
    code = code.astype(np.int32, copy=False)
    order = np.argsort(labels, kind="stable")
    if not np.array_equal(order, np.arange(len(labels))):
        rank = np.empty(len(labels), dtype=np.int32)
        rank[order] = np.arange(len(labels), dtype=np.int32)
        labels, code = labels[order], rank[code]
    return labels, code


def microseconds(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Stamps as int64 microseconds since 1970 of exchange-local time, NaT negative."""
    kind = column.type
    if not pa.types.is_timestamp(kind):
        raise ValueError(
            f"Column {name!r} must be a timestamp, got {kind}; a mapping file can say "
            "how to read it (`time_format`)."
        )
    if kind.tz is not None:
        raise ValueError(
            f"Column {name!r} has the time zone {kind.tz}; give exchange-local times "
            "without a zone, or set `tz` in a mapping file to have them translated."
        )
    values = column.to_numpy().astype("datetime64[us]", copy=False)
    return values.view(np.int64)


def check_session(outside: int, rows: int, session: Session) -> None:
    """Refuse a source whose clock is not the exchange's."""
    if rows >= 20 and outside > 0.7 * rows:
        raise ValueError(
            f"{outside} of {rows} rows lie outside the session {session.name!r} "
            f"({session.intervals[0][0]}-{session.intervals[-1][1]}, {session.tz}); "
            "the times look like another time zone or exchange: set `tz` or "
            "`session`."
        )


def _check_length(
    code: np.ndarray, when: np.ndarray, status: np.ndarray, bar_minutes: int
) -> None:
    """Refuse bars longer than the features should be computed from."""
    ok = np.flatnonzero(status[:20000] == 0)
    if len(ok) < 8:
        return
    step = np.diff(when[ok])[(np.diff(code[ok]) == 0)]
    step = step[(step > 0) & (step < 4 * 3_600_000_000)] // 60_000_000
    if len(step) >= 8 and step.min() > bar_minutes:
        raise ValueError(
            f"The bars are {int(step.min())} minutes apart, longer than `bar_minutes` "
            f"= {bar_minutes}; set it to the length of the source's bars."
        )


def _frame(
    labels: np.ndarray,
    code: np.ndarray,
    when: np.ndarray,
    extra: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> pd.DataFrame:
    extra = np.empty((0, len(_EXTRA))) if extra is None else extra
    out = np.empty((0, _N)) if out is None else out
    data: dict[str, Any] = {
        "datetime": day_of(when),
        "instrument": labels[code] if len(code) else np.empty(0, dtype=object),
    }
    data.update({k: extra[:, i] for i, k in enumerate(_EXTRA)})
    data.update({k: out[:, i] for i, k in enumerate(MINUTE_NAMES)})
    frame = pd.DataFrame(data)
    return frame.sort_values(["datetime", "instrument"], ignore_index=True)


def frozen(x: np.ndarray) -> np.ndarray:
    """Return a contiguous read-only view: the one type that kernels are compiled for.

    Arrays from Arrow are read-only and numpy's own are not; each mixture of the two
    would be compiled anew.
    """
    view = np.ascontiguousarray(x).view()
    view.flags.writeable = False
    return view


def day_of(stamp: np.ndarray) -> np.ndarray:
    """Midnights, datetime64[ns], of stamps in microseconds since 1970."""
    return (stamp // _DAY_US).astype("datetime64[D]").astype("datetime64[ns]")


def feature_table(features: tuple[FeatureDef, ...]) -> str:
    """Definitions as a Markdown table, for reports and `--help`."""
    lines = ["| feature | formula | unit | range | NaN | known | needs |"]
    lines.append("|---|---|---|---|---|---|---|")
    for d in features:
        low = "−∞" if d.low == -_INF else f"{d.low:g}"
        high = "∞" if d.high == _INF else f"{d.high:g}"
        needs = ", ".join(d.needs)
        lines.append(
            f"| {d.name} | {d.formula} | {d.unit} | {low} … {high} | {d.nan} | "
            f"{d.known} | {needs} |"
        )
    return "\n".join(lines)


def early_closes(text: Mapping[str, Any]) -> dict:
    """Parse ``{"2025-07-03": "13:00"}`` of a mapping file for `Session.early_close`."""
    out = {}
    for date, time in text.items():
        try:
            out[pd.Timestamp(str(date)).date()] = pd.Timestamp(str(time)).time()
        except ValueError as error:
            raise ValueError(
                f"`early_close` must be {{date: HH:MM}}, got {date!r}: {time!r}."
            ) from error
    return out
