"""Minute bars of one day reduced to one row: the 22 `ms` features.

Notation, per stock and day, over the N bars of the session: p close of a bar, v its
volume (shares), a its amount (CNY), r = log(p_i / p_{i-1}) with the day's open O in
place of p_0; O, H, L, C open, high, low, close of the day. `MINUTE_FEATURES` defines
each feature with unit, range, NaN rule and the moment at which it is known.

The reports name 22 features and list only some; the list is this project's.
What it leaves open is decided here:

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
- A stock-day that lacks bars for half an hour or more, where its other bars make that
  no chance, was halted or lost rows: a build gives it features of NaN, and the next day
  no overnight return. Rows of zero volume are bars.
- Standard deviations and correlations are those of the population (divide by N).
- A ratio is NaN where its denominator is zero, a correlation where one side does
  not vary; never 0 or infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from data_handlers.aggregate.columns import (
    dictionary_codes,
    frozen,
    in_threads,
    microseconds,
)
from data_handlers.aggregate.minute_kernels import (
    FACTS,
    MINUTE_FEATURES,
    MINUTE_NAMES,
    REJECT_REASONS,
    REJECTS,
    Bars,
    Clock,
    Out,
    reduce_days,
    split_days,
)
from data_handlers.aggregate.schema import BARS, Session, get_session
from data_handlers.aggregate.units import (
    LEAST_GAP,
    check_rising,
    other_level,
    silence,
    swapped,
)

__all__ = [
    "LACKING",
    "LOST",
    "MINUTE_FEATURES",
    "MINUTE_NAMES",
    "REJECT_REASONS",
    "SPOILT",
    "StockDays",
    "check_lost",
    "first_values",
    "join_stock_days",
    "overnight_returns",
    "reduce_minutes",
]


#: Note on stock-days of which no bar could be used.
LOST = "stock-days all of whose bars were rejected (no row)"
#: Note on stock-days too many of whose bars were rejected.
SPOILT = "stock-days a tenth of whose bars were rejected (features NaN)"
#: Note on stock-days with a stretch of half an hour or more without bars that is not
#: by chance, or with a tenth of their bars rejected.
LACKING = "stock-days that lack bars (a halt, or lost or rejected rows); features NaN"
_REJECTED = 0.1
_DAYS = 10  # of stocks, before what is rejected in most is an error
_ROWS = 100  # of a stock, before its own clock is judged
_SWAPPED_ROWS = 50_000  # that are looked at
_FIRST_ROWS, _FIRST_DAYS = 100_000, 100  # of a piece that are looked at together
_CLOSING = 14 * 60 + 57  # of A-shares
_OF_VALUES = [2, 3, 4, 7, 8]  # of `REJECT_REASONS`: what stands in a bar
#: Fewest traded instruments of a day for an early close to be inferred.
MIN_INSTRUMENTS = 5


@dataclass
class StockDays:
    """One row of features a stock and day, and the account of the input rows.

    Attributes
    ----------
    labels : object array
        Instruments, sorted.
    code, day : int array, shape (k,)
        Index into `labels` and days since 1970 of each stock-day, in any order.
    facts : structured array, shape (k,)
        The day's open, high, low, close, volume, amount, factor, traded bars, and the
        last slot with a trade.
    values : float64[k, features]
        The features. `ms_overnight` is NaN and `ms_mom` holds the moderate part only:
        `overnight_returns` completes both.
    rows_in, rows_used : int
        Rows of the input; rows that entered a feature.
    no_trade : int
        Rows without volume (accepted, they change nothing).
    rejected : dict
        Reason to number of rows.
    edges : (int, int)
        Stock-days with a trade in a bar stamped where an interval of the session
        begins, and where it ends; see `check_stamp`.
    notes : dict
        Other facts and how often: unsorted rows, stock-days without a trade, days
        that end early.
    lacking : bool array, shape (k,)
        Stock-days that lack bars; see `blank`.
    """

    labels: np.ndarray
    code: np.ndarray
    day: np.ndarray
    facts: np.ndarray
    values: np.ndarray
    rows_in: int
    rows_used: int
    no_trade: int
    rejected: dict[str, int]
    edges: tuple[int, int]
    notes: dict[str, Any]
    lacking: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """Return facts and features by name."""
        out = {k: self.facts[k] for k in FACTS.names or ()}
        return out | {k: self.values[:, i] for i, k in enumerate(MINUTE_NAMES)}

    def take(self, rows: np.ndarray) -> StockDays:
        """Return some of the stock-days, with the account of all."""
        return replace(
            self,
            code=self.code[rows],
            day=self.day[rows],
            facts=self.facts[rows],
            values=self.values[rows],
            lacking=self.lacking[rows],
        )

    def blank(self) -> None:
        """Take features, open and close from days that lack bars, in place; note it."""
        if not self.lacking.any():
            return
        self.values[self.lacking] = np.nan
        for name in ("open", "close"):
            self.facts[name][self.lacking] = np.nan
        self.notes[LACKING] = [
            f"{self.labels[c]} {np.datetime64(int(d), 'D')}"
            for c, d in zip(
                self.code[self.lacking], self.day[self.lacking], strict=True
            )
        ]

    def by_day(self) -> StockDays:
        """Return the stock-days sorted by day, then instrument."""
        return self.take(np.lexsort((self.code, self.day)))


def join_stock_days(pieces: Sequence[StockDays]) -> StockDays:
    """Put stock-days of several sources below one another, and add the accounts."""
    labels, where = np.unique(
        np.concatenate([x.labels for x in pieces]).astype(object), return_inverse=True
    )
    base = np.cumsum([0, *(len(x.labels) for x in pieces)])
    rejected: dict[str, int] = {}
    notes: dict[str, Any] = {}
    for piece in pieces:
        for why, n in piece.rejected.items():
            rejected[why] = rejected.get(why, 0) + n
        for note, n in piece.notes.items():
            if isinstance(n, int):
                notes[note] = notes.get(note, 0) + n
    return StockDays(
        labels,
        np.concatenate(
            [where[b + x.code] for b, x in zip(base[:-1], pieces, strict=True)]
        ),
        np.concatenate([x.day for x in pieces]),
        np.concatenate([x.facts for x in pieces]),
        np.concatenate([x.values for x in pieces]),
        sum(x.rows_in for x in pieces),
        sum(x.rows_used for x in pieces),
        sum(x.no_trade for x in pieces),
        rejected,
        (sum(x.edges[0] for x in pieces), sum(x.edges[1] for x in pieces)),
        notes,
        np.concatenate([x.lacking for x in pieces]),
    )


# -- kernels


def reduce_minutes(
    bars: pa.Table | pd.DataFrame,
    session: str | Session = "a_share",
    bar_minutes: int = 1,
    stamp: str = "start",
    amount: str = "exact",
    threads: int | None = None,
    infer_early: bool = True,
    check: bool = True,
) -> StockDays:
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
    StockDays
        One row a stock and traded day, and the account of the input.

    Raises
    ------
    ValueError
        For a missing column, a time zone, bars longer than `bar_minutes`, or a
        source most of whose rows lie outside the session or contradict `stamp`.
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
        cols["amount"] = cols["volume"]  # numba wants an array; never read
    if cols["factor"] is None:
        cols["factor"] = np.empty(0)  # means 1
    else:
        cols["factor"] = np.where(cols["factor"] > 0, cols["factor"], np.nan)
    minutes = session.minute_of_session(stamp == "end")
    table = minutes // bar_minutes
    starts = np.empty(rows_in + 1, dtype=np.int64)
    days = np.empty(rows_in + 1, dtype=np.int64)
    code, when = frozen(code), frozen(when)
    n_groups, unsorted, no_time, ascend = split_days(code, when, starts, days)
    if unsorted or not ascend:
        order = np.lexsort((when, code))
        code, when = frozen(code[order]), frozen(when[order])
        cols = {k: x[order] if len(x) else x for k, x in cols.items()}
        n_groups, _, no_time, _ = split_days(code, when, starts, days)
    starts, days = starts[: n_groups + 1], days[:n_groups]
    day0 = int(days.min()) if n_groups else 0
    day1 = int(days.max()) if n_groups else 0
    day_slots = np.full(day1 - day0 + 1, slots, dtype=np.int64)
    for date, n in _early_slots(session, bar_minutes).items():
        if day0 <= date <= day1:
            day_slots[date - day0] = n
    status = np.zeros(rows_in, dtype=np.int8)
    strange = _strange(cols, starts, has_amount)
    if len(strange):  # without a close the kernel rejects them
        cols["close"] = cols["close"].copy()
        cols["close"][strange] = np.nan
    source = Bars(
        stamp=when,
        status=status,
        has_amount=has_amount,
        **{k: frozen(x) for k, x in cols.items()},
    )
    begin, end = session.edges()
    clock = Clock(
        table=table,
        half=30 // bar_minutes,
        slots=slots,
        day_slots=day_slots,
        day0=day0,
        begin=begin,
        end=end,
    )
    counts = np.zeros((n_groups, REJECTS + 1), dtype=np.int64)
    edge = np.zeros((n_groups, 2), dtype=np.int64)
    facts = np.full(n_groups, np.nan, dtype=FACTS)
    out = np.full((n_groups, len(MINUTE_NAMES)), np.nan)
    args = (starts, days, source, clock, Out(counts, edge, facts, out))
    in_threads(reduce_days, n_groups, args, threads)
    if infer_early:
        short = early_days(days, facts["last_slot"], slots, clock.half)
        if short:
            for date, n in short.items():
                day_slots[date - day0] = n
            counts[:], edge[:], facts[:], out[:] = 0, 0, np.nan, np.nan
            in_threads(reduce_days, n_groups, args, threads)
    gone = strange[np.isin(status[strange], (2, 3))]
    of = np.searchsorted(starts, gone, "right") - 1
    for reason in (2, 3):
        np.subtract.at(counts[:, reason], of[status[gone] == reason], 1)
    np.add.at(counts[:, 8], of, 1)
    status[gone] = 8
    total = counts.sum(axis=0)
    total[6] = no_time
    edges = edge.sum(axis=0)
    if check:
        check_session(int(total[1]), rows_in, session)
        check_stamp(int(edges[0]), int(edges[1]), stamp, session)
    _check_parts(code[starts[:-1]], days, labels, counts, edge, stamp, session)
    step = _check_length(code, when, status, bar_minutes)
    within = np.ones(min(int(starts[-1]), _SWAPPED_ROWS), dtype=bool)
    within[starts[:-1][starts[:-1] < len(within)]] = False
    if swapped(cols["open"][: len(within)], cols["close"][: len(within)], within):
        raise ValueError(
            "opens lie farther from the close before than closes from the open before: "
            "are the columns `open` and `close` swapped?"
        )
    told = _of_many(starts, when, status, cols, table, session)
    few = np.diff(starts)
    if n_groups >= 5 and few.max() <= 2 < slots:
        raise ValueError(
            f"no stock-day has more than {int(few.max())} bar(s), where a day has "
            f"{slots} of {bar_minutes} minutes: are these bars of days?"
        )
    rejected = {why: int(total[k]) for k, why in REJECT_REASONS.items() if total[k]}
    notes: dict[str, Any] = dict(told)
    if unsorted:
        notes["rows out of time order (sorted)"] = int(unsorted)
    ends = np.flatnonzero(day_slots < slots)
    if len(ends):
        notes["days that end early"] = [
            str(np.datetime64(int(day0 + k), "D")) for k in ends
        ]
    keep = facts["bars"] > 0
    gone = counts[:, _OF_VALUES].sum(axis=1)
    lost = int((~keep & (gone > 0)).sum())
    check_rising(cols["volume"], starts)
    lacking = keep & (gone > _REJECTED * (gone + counts[:, 0]))
    spoilt = int(lacking.sum())
    whole = day_slots[days - day0] * bar_minutes
    usable = np.where(lacking, 0, counts[:, 0])
    lacking |= _with_holes(
        starts, when, status, usable, minutes, whole, step, bar_minutes
    )
    other = int(first_values(cols, np.flatnonzero(status == 5), rows_in).sum())
    if other:
        notes["rows given twice with other values (first kept)"] = other
    if len(cols["factor"]) and (blind := int(np.isnan(facts["factor"][keep]).sum())):
        notes["stock-days without a factor above 0 (no overnight return)"] = blind
    if check:
        check_lost(lost, spoilt, int(keep.sum()), rejected)
    if lost:
        notes[LOST] = lost
    if spoilt:
        notes[SPOILT] = spoilt
    halted = int((~keep).sum()) - lost
    if halted:
        notes["stock-days without a trade (no row)"] = halted
    no_trade = int(total[-1])
    return StockDays(
        labels,
        code[starts[:-1][keep]],
        days[keep],
        facts[keep],
        out[keep],
        rows_in,
        int(total[0]) - no_trade,
        no_trade,
        rejected,
        (int(edges[0]), int(edges[1])),
        notes,
        lacking[keep],
    )


def _strange(
    cols: Mapping[str, np.ndarray], starts: np.ndarray, has_amount: bool
) -> np.ndarray:
    """Rows whose price, or amount over volume, is of another level than their day's.

    Stock-days that are so as a whole are left to `units.check_units`.
    """
    close, volume = cols["close"], cols["volume"]
    out = other_level(close, starts)
    with np.errstate(invalid="ignore", over="ignore"):
        traded = (volume >= 1) & (close > 0)
        out |= traded & (
            (cols["high"] > 8 * close) | ((8 * cols["low"] < close) & (cols["low"] > 0))
        )
        if has_amount:
            value, amount = volume * close, cols["amount"]
            off = (amount > 8 * value) | ((amount < value / 8) & (amount > 0))
            rows = np.flatnonzero(off & traded)
            of = np.searchsorted(starts, rows, "right") - 1
            share = np.bincount(of, minlength=len(starts) - 1) / np.diff(starts)
            out[rows[share[of] <= 0.5]] = True
    return np.flatnonzero(out)


def overnight_returns(
    code: np.ndarray,
    day: np.ndarray,
    opened: np.ndarray,
    closed: np.ndarray,
    before: np.ndarray | None = None,
) -> np.ndarray:
    """Log return from each stock's previous traded close to the open.

    Parameters
    ----------
    code, day : array, shape (k,)
        Number of the stock, and something that orders its days.
    opened, closed : float64[k]
        Adjusted open and close of each stock-day.
    before : float64[stocks], optional
        Adjusted close of each stock before its first day here, NaN if unknown.

    Returns
    -------
    float64[k]
        In the order of the input; NaN on a stock's first day without `before`.
    """
    order = np.lexsort((day, code))
    stock, last = code[order], closed[order]
    previous = np.full(len(order), np.nan)
    same = stock[1:] == stock[:-1]
    previous[1:][same] = last[:-1][same]
    if before is not None and len(order):
        first = np.r_[True, ~same]
        previous[first] = before[stock[first]]
    out = np.empty(len(order))
    out[order] = np.log(opened[order] / previous)
    return out


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
    if cols["amount"] is not None and np.isnan(cols["amount"]).all():
        cols["amount"] = None  # a column that the vendor leaves empty
    return labels, code, when, cols


def _check_parts(
    code: np.ndarray,
    day: np.ndarray,
    labels: np.ndarray,
    counts: np.ndarray,
    edge: np.ndarray,
    stamp: str,
    session: Session,
) -> None:
    """Refuse single stocks, and days, whose clock or stamps are not the others'."""
    if not len(code):
        return
    first = int(day.min())
    for of, names in ((code, labels), (day - first, None)):
        size, rows = np.bincount(of), np.bincount(of, counts[:, :-1].sum(axis=1))
        outside = np.bincount(of, counts[:, 1])
        begins, ends = (np.bincount(of, edge[:, k]) for k in (0, 1))
        own, other = (begins, ends) if stamp == "start" else (ends, begins)
        for k in np.flatnonzero((outside > 0.4 * rows) | (other > own + 0.4 * size)):
            name = names[k] if names is not None else np.datetime64(first + int(k), "D")
            if names is not None and session.name == "a_share" and rows[k] >= _ROWS:
                check_session(int(outside[k]), int(rows[k]), session, f" of {name}")
            if other[k] > own[k] + 0.4 * size[k]:
                check_stamp(int(begins[k]), int(ends[k]), stamp, session, f" of {name}")


def check_session(outside: int, rows: int, session: Session, of: str = "") -> None:
    """Refuse a source whose clock is not the exchange's."""
    # extended hours of US bars are 60 % of a day's; here lunch may be filled, 27 %
    most = 0.4 if session.name == "a_share" else 0.7
    if rows >= 20 and outside > most * rows:
        # files of UTC days: the evening of a Friday is a Saturday's
        alone = outside == rows and session.auction is None
        raise ValueError(
            f"{outside} of {rows} rows{of} lie outside the session {session.name!r} "
            f"({session.intervals[0][0]}-{session.intervals[-1][1]}, {session.tz}); "
            "the times look like another time zone or exchange: set `tz` or `session`"
            + (", or leave out a file that has only extended hours." if alone else ".")
        )


def check_lost(lost: int, spoilt: int, kept: int, rejected: Mapping[str, int]) -> None:
    """Refuse a source of which more is lost to rejected bars than is kept.

    Parameters
    ----------
    lost, spoilt, kept : int
        Stock-days without a row, with a row of NaN, and with a row. A few spoilt ones
        may be all that a small source has.
    rejected : mapping
        Reason to rows, for the message.
    """
    if kept >= _DAYS:
        lost, kept = lost + spoilt, kept - spoilt
    if lost <= kept:
        return
    why = ", ".join(
        f"{n:,} x {reason}"
        for reason, n in sorted(rejected.items(), key=lambda x: -x[1])
    )
    raise ValueError(
        f"{lost:,} of {lost + kept:,} stock-days have bars and none, or too few, that "
        f"can be used; rejected: {why}. Mend these columns, or leave such days out of "
        "the source."
    )


def first_values(
    columns: Mapping[str, np.ndarray], again: np.ndarray, rows: int
) -> np.ndarray:
    """Whether rows that repeat the key of the row before hold other values.

    Parameters
    ----------
    columns : mapping of str to ndarray
        ``close`` and ``volume``, in order.
    again : int ndarray
        Rows that repeat a key.
    rows : int
        Of the source.

    Raises
    ------
    ValueError
        If it is more than one in a hundred: two deliveries that disagree.
    """
    other = np.zeros(len(again), dtype=bool)
    for name in ("close", "volume"):
        was, now = columns[name][again - 1], columns[name][again]
        other |= np.abs(was - now) > 1e-6 * np.abs(was)
    if other.sum() > 0.01 * rows:
        raise ValueError(
            f"{int(other.sum()):,} of {rows:,} are given twice with different values: "
            "two vendors in one folder, or a revised file beside the old one? Keep one."
        )
    return other


def _of_many(
    starts: np.ndarray,
    when: np.ndarray,
    status: np.ndarray,
    cols: Mapping[str, np.ndarray],
    table: np.ndarray,
    session: Session,
) -> dict[str, int]:
    """Say what is odd about all of the first stock-days, where each looks right.

    Parameters
    ----------
    starts, when, status
        See `_with_holes`.
    cols : mapping
        Columns of the source.
    table : int ndarray [1441]
        Slot of the session by minute of the day.

    Returns
    -------
    dict of str to int
        Note to the stock-days, or bars, that were looked at.
    """
    days = min(len(starts) - 1, int(np.searchsorted(starts, _FIRST_ROWS)))
    if days < _FIRST_DAYS:
        return {}
    good = np.flatnonzero(status[: starts[days]] == 0)
    found = {}
    slot = table[when[good] // 60_000_000 % 1440]
    count = np.bincount(slot[slot >= 0], minlength=int(table.max()) + 1)
    usual = np.flatnonzero(count > 0.3 * days)
    silent = np.flatnonzero(count == 0)
    if len(usual):
        silent = silent[(silent > usual[0]) & (silent < usual[-1])]
    for k in silent if len(usual) else ():
        minute = int(np.argmax(table == k))
        # Chinese vendors leave out what lies in the closing auction
        if session.auction is None or minute < _CLOSING:
            clock = f"{minute // 60:02d}:{minute % 60:02d}"
            found[f"stock-days none of which has a bar at {clock}: rows lost?"] = days
    traded = good[cols["volume"][good] > 0]
    bar = [cols[name][traded] for name in ("open", "high", "low", "close")]
    flat = np.logical_and.reduce([x == bar[0] for x in bar[1:]])
    if len(traded) >= _FIRST_ROWS // 100 and flat.mean() > 0.99:
        what = "bars whose open, high, low and close are one price: closes alone?"
        found[what] = int(flat.sum())
    return found


def _with_holes(
    starts: np.ndarray,
    when: np.ndarray,
    status: np.ndarray,
    usable: np.ndarray,
    minutes: np.ndarray,
    whole: np.ndarray,
    step: int,
    bar_minutes: int,
) -> np.ndarray:
    """Stock-days with a stretch without bars that is not by chance.

    Parameters
    ----------
    starts : int ndarray [k + 1]
        Where each stock-day begins.
    when, status : ndarray [n]
        Stamps (µs) and status of rows.
    usable, whole : int ndarray [k]
        Usable rows, and minutes, of each stock-day.
    minutes : int ndarray [1441]
        Minute of the session by minute of the day.
    step : int
        Minutes of the source's bars.
    bar_minutes : int
        Minutes of the bars that are wanted.

    Raises
    ------
    ValueError
        If some stock-days have longer bars than that.
    """
    out = np.zeros(len(usable), dtype=bool)
    few = np.flatnonzero((usable > 0) & (usable * step < 0.9 * whole))
    if not len(few):
        return out
    length = np.diff(starts)[few]
    offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    rows = np.repeat(starts[few], length) + offset
    good = status[rows] == 0
    group = np.repeat(np.arange(len(few)), length)[good]
    minute = minutes[when[rows[good]] // 60_000_000 % 1440].astype(np.int64)
    first = np.searchsorted(group, np.arange(len(few)))
    last = np.append(first[1:], len(group)) - 1
    moves = np.diff(minute, prepend=0)
    moves[first] = 0
    grain = np.gcd.reduceat(moves, first)
    coarse = (grain > bar_minutes) & (usable[few] * np.log(np.maximum(grain, 1)) > 20.0)
    if coarse.any():
        raise ValueError(
            f"{int(coarse.sum())} stock-days have bars of {int(grain[coarse][0])} "
            f"minutes, longer than `bar_minutes` = {bar_minutes}; build them by "
            "themselves with their own, or fetch the shorter ones."
        )
    head, tail = minute[first] + 1, whole[few] - 1 - minute[last]
    longest = np.maximum.reduceat(moves, first) // step - 1
    gap = np.maximum(longest, np.maximum(head // step - 1, tail // step))
    found = silence(usable[few], gap, whole[few] // step)
    out[few] = found & (gap * step >= LEAST_GAP)
    return out


def check_stamp(
    begins: int, ends: int, stamp: str, session: Session, of: str = ""
) -> None:
    """Refuse a source whose first and last stamps contradict `stamp`.

    Parameters
    ----------
    begins, ends : int
        `StockDays.edges`: a bar stamped 13:00 holds a trade only where stamps are
        starts, one stamped 11:30 only where they are ends.
    of : str
        Of which stock or day, for the message.
    """
    own, other = (begins, ends) if stamp == "start" else (ends, begins)
    if other < 2 or own > 0.2 * other:
        return
    first, last = (f"{m // 60:02d}:{m % 60:02d}" for m in session.edges())
    have, lack = (first, last) if stamp == "end" else (last, first)
    right = "end" if stamp == "start" else "start"
    raise ValueError(
        f"`stamp` = {stamp!r} contradicts the bars{of}: {other} stock-days have a "
        f"trade in a bar stamped {have} and {own} in one stamped {lack}, so their "
        f"times are the {right}s of the bars. Set `--stamp {right}` (`stamp: {right}` "
        "in a mapping file"
        + ("; if other files are not so, one for these alone)." if of else ").")
    )


def _check_length(
    code: np.ndarray, when: np.ndarray, status: np.ndarray, bar_minutes: int
) -> int:
    """Refuse bars longer than the features should be computed from; return theirs."""
    ok = np.flatnonzero(status[:20000] == 0)
    if len(ok) < 8:
        return bar_minutes
    step = np.diff(when[ok])[(np.diff(code[ok]) == 0)]
    step = step[(step > 0) & (step < 4 * 3_600_000_000)] // 60_000_000
    if len(step) >= 8 and step.min() > bar_minutes:
        raise ValueError(
            f"The bars are {int(step.min())} minutes apart, longer than `bar_minutes` "
            f"= {bar_minutes}; set it to the length of the source's bars."
        )
    return int(step.min()) if len(step) >= 8 and step.min() > 0 else 1


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
