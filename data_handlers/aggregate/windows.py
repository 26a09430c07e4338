"""Minute bars of one day kept side by side in one row: the minute channel of timing.

Per instrument and day, over the b bars of the session, three numbers a bar:

| column | formula | unit |
|---|---|---|
| ``bar_00_return`` | log(close / close before; the open for the first bar) | log |
| ``bar_00_range`` | log(high / low) | log |
| ``bar_00_volume`` | volume / mean volume of the day's bars - 1 | ratio |

All lie within one day and one contract, so no roll can enter. A bar without a row or
without a trade is one without a move: return and range 0, volume -1. Everything is
known at the close.

A day is left out, and counted by its reason, where more than a tenth of its bars have
no row, two rows of one bar disagree, it names two contracts, or the open interest
changes by more than the bar's volume, which only a change of the contract can do. (A
contract's open interest changes by at most one lot for each lot traded.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from data_handlers.aggregate.columns import dictionary_codes, microseconds
from data_handlers.aggregate.minute import (
    REJECT_REASONS,
    check_lost,
    check_session,
    check_stamp,
)
from data_handlers.aggregate.schema import SILENT, FeatureDef, Session

__all__ = ["BAR_FEATURES", "bar_features", "day_windows"]

BAR_FEATURES = ("return", "range", "volume")
#: A day with a larger share of bars without a row is left out.
MOST_MISSING = 0.1
_INF = float("inf")
_SOURCE = ("open", "high", "low", "close", "volume")


def bar_features(slots: int) -> tuple[FeatureDef, ...]:
    """Definitions of all columns of a day of that many bars, in their order."""
    width = len(str(slots - 1))
    rules = {
        "return": ("log(close / close before)", "log return", -_INF, _INF),
        "range": ("log(high / low)", "log ratio", 0.0, _INF),
        "volume": ("volume / mean volume - 1", "ratio", -1.0, _INF),
    }
    return tuple(
        FeatureDef(f"bar_{k:0{width}d}_{name}", *rules[name], "never")  # type: ignore[arg-type]
        for k in range(slots)
        for name in BAR_FEATURES
    )


@dataclass
class DayWindows:
    """One row an instrument and day, and the account of the input rows.

    Attributes
    ----------
    labels : object array
        Instruments, sorted.
    code, day : int array [k]
        Index into `labels`, and days since 1970.
    close, volume : float64 [k]
        Of the day, to be checked against a day store.
    values : float64 [k, columns]
        In the order of `bar_features`.
    rows_in : int
    rejected : dict of str to int
        Rows of the input that are in no window, by reason.
    left_out : dict of str to list of str
        Days left out, by reason, each "instrument date".
    """

    labels: np.ndarray
    code: np.ndarray
    day: np.ndarray
    close: np.ndarray
    volume: np.ndarray
    values: np.ndarray
    rows_in: int
    rejected: dict[str, int]
    left_out: dict[str, list[str]]


def day_windows(
    bars: pa.Table, session: Session, bar_minutes: int, stamp: str
) -> DayWindows:
    """Put each day's bars side by side.

    Parameters
    ----------
    bars : pyarrow.Table
        Columns of `schema.FUTURES_BARS`, any order of rows.
    session : Session
    bar_minutes : {1, 5, 15}
        Length of the bars of the result; shorter ones of the source are merged.
    stamp : {"start", "end"}

    Raises
    ------
    ValueError
        For a missing column, or rows most of which lie outside the session or
        contradict `stamp`.
    """
    missing = {"instrument", "datetime", *_SOURCE} - set(bars.column_names)
    if missing:
        raise ValueError(f"Bars have no column {min(missing)!r}: {bars.column_names}.")
    slots = session.slots(bar_minutes)
    labels, code = dictionary_codes(bars.column("instrument"))
    when = microseconds(bars.column("datetime"), "datetime")
    minute = when // 60_000_000 % 1440
    table = session.minute_of_session(stamp == "end")
    frame = pd.DataFrame(
        {
            "code": code,
            "day": when // 86_400_000_000,
            "when": when,
            "slot": np.where(when < 0, -1, table[np.where(when < 0, 0, minute)])
            // bar_minutes,
            **{
                name: bars.column(name).to_numpy().astype(np.float64)
                for name in (*_SOURCE, "open_interest")
                if name in bars.column_names
            },
        }
    )
    if "contract" in bars.column_names:
        frame["contract"] = pd.factorize(bars.column("contract").to_pandas())[0]
    status = _status(frame)
    begin, end = session.edges()
    traded = (status == 0) & (frame["volume"] > SILENT)
    begins, ends = (int((traded & (minute == at)).sum()) for at in (begin, end))
    check_session(int((status == 1).sum()), len(frame), session)
    check_stamp(begins, ends, stamp, session)
    rejected = {
        why: int((status == k).sum())
        for k, why in REJECT_REASONS.items()
        if (status == k).any()
    }
    days = frame[["code", "day"]]
    bad = days[np.isin(status, [2, 3, 4])].drop_duplicates()
    good = days[status == 0].drop_duplicates()
    gone = bad.merge(good, how="left", indicator=True)["_merge"].eq("left_only")
    check_lost(int(gone.sum()), 0, len(good), rejected)
    frame = frame[status == 0].sort_values(["code", "day", "when"], kind="stable")
    twice = frame.duplicated()
    if twice.any():
        rejected["the same row again (one kept)"] = int(twice.sum())
        frame = frame[~twice]
    why = _bad_days(frame, slots, bar_minutes)
    left_out: dict[str, list[str]] = {}
    for (at, day), reason in why.items():
        date = np.datetime64(int(day), "D")
        left_out.setdefault(reason, []).append(f"{labels[at]} {date}")
    keys = pd.MultiIndex.from_frame(frame[["code", "day"]])
    lost = keys.isin(list(why)) if why else np.zeros(len(frame), dtype=bool)
    if lost.any():
        rejected["of days that are left out"] = int(lost.sum())
    return _windows(frame[~lost], slots, labels, len(when), rejected, left_out)


def _status(frame: pd.DataFrame) -> np.ndarray:
    """Code of `REJECT_REASONS` of each row, 0 for a good one."""
    o, h, lo, c, v = (frame[name].to_numpy() for name in _SOURCE)
    tol = 1e-6 * h
    bound = (np.maximum(o, c) <= h + tol) & (np.minimum(o, c) >= lo - tol)
    out = np.zeros(len(frame), dtype=np.int8)
    with np.errstate(invalid="ignore"):
        positive = (o > 0) & (lo > 0) & (c > 0) & (h > 0) & np.isfinite(h)
        out[~(bound & (h >= lo - tol))] = 3
        out[~positive] = 2
        out[(v == 0) & (c > 0)] = 0
        out[~((v >= 0) & np.isfinite(v))] = 4
    out[frame["slot"] < 0] = 1
    out[frame["when"] < 0] = 6
    return out


def _bad_days(
    frame: pd.DataFrame, slots: int, bar_minutes: int
) -> dict[tuple[int, int], str]:
    """Reason of each (code, day) that is left out; the first that holds."""
    by = frame.groupby(["code", "day"], sort=True)
    reasons: list[tuple[str, pd.Series]] = []
    repeated = frame.duplicated(["code", "day", "when"])
    again = repeated.groupby([frame["code"], frame["day"]]).any()
    reasons.append(("two rows of one bar disagree", again))
    if "contract" in frame:
        reasons.append(("two contracts in one day", by["contract"].nunique() > 1))
    if "open_interest" in frame:
        moved = by["open_interest"].diff().abs() > frame["volume"] + 0.5
        mixed = moved.groupby([frame["code"], frame["day"]]).any()
        reasons.append(
            ("two contracts in one day: open interest moves beyond the volume", mixed)
        )
    have = by["slot"].nunique()
    reasons.append(("bars are missing", have < (1 - MOST_MISSING) * slots))
    reasons.append(("no trade", by["volume"].sum() <= 0))
    out: dict[tuple[int, int], str] = {}
    for reason, mask in reasons:
        for key in mask.index[mask]:
            out.setdefault((int(key[0]), int(key[1])), reason)
    return out


def _windows(
    frame: pd.DataFrame,
    slots: int,
    labels: np.ndarray,
    rows_in: int,
    rejected: dict[str, int],
    left_out: dict[str, list[str]],
) -> DayWindows:
    traded = frame[frame["volume"] > SILENT]
    bars = traded.groupby(["code", "day", "slot"], sort=True).agg(
        open=("open", "first"),
        high=("high", "max"),
        low=("low", "min"),
        close=("close", "last"),
        volume=("volume", "sum"),
    )
    index: Any = bars.index
    days = index.droplevel("slot").unique()
    row = days.get_indexer(index.droplevel("slot"))
    slot = bars.index.get_level_values("slot").to_numpy()

    def grid(name: str, empty: float) -> np.ndarray:
        out = np.full((len(days), slots), empty)
        out[row, slot] = bars[name].to_numpy()
        return out

    first = bars.groupby(row)["open"].first().to_numpy() if len(days) else np.empty(0)
    close = np.concatenate([first[:, None], grid("close", np.nan)], axis=1)
    close = pd.DataFrame(close).ffill(axis=1).to_numpy()
    volume = grid("volume", 0.0)
    values = np.stack(
        [
            np.diff(np.log(close), axis=1),
            np.log(grid("high", 1.0) / grid("low", 1.0)),
            volume / volume.mean(axis=1, keepdims=True) - 1,
        ],
        axis=-1,
    )
    codes: Any = days.get_level_values("code")
    return DayWindows(
        labels,
        codes.to_numpy(),
        days.get_level_values("day").to_numpy(),
        close[:, -1] if len(days) else np.empty(0),
        volume.sum(axis=1),
        values.reshape(len(days), slots * len(BAR_FEATURES)),
        rows_in,
        rejected,
        left_out,
    )
