"""The days at which copies of a store part: where the calendar tempts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["Parting", "partings"]


@dataclass(frozen=True)
class Parting:
    """A day at which copies part.

    Attributes
    ----------
    day : Timestamp
    why : str
        What makes it worth a look.
    test : bool
        In the test segment, so that scores are compared too.
    """

    day: pd.Timestamp
    why: str
    test: bool


def partings(
    calendar: pd.DatetimeIndex,
    before: pd.DatetimeIndex,
    test: pd.DatetimeIndex,
    suspended: pd.Series,
    count: int,
) -> list[Parting]:
    """Choose days after period ends, at starts and ends of weeks and months.

    A year's or quarter's first day lies after the period's end and before its
    announcement, and a value taken over a whole quarter, month or week shows on its
    first day; what is filled back from a resumption shows on a day of suspensions.

    Parameters
    ----------
    calendar : DatetimeIndex
        Trading days.
    before, test : DatetimeIndex
        Trading days from the start of train to that of test, and of test.
    suspended : Series
        Stocks without a bar that come back, by day.
    count : int
        Most days.

    Returns
    -------
    list of Parting
        Most telling first, without twins.
    """
    day = calendar.to_series()
    week, month, quarter, year = (day.dt.to_period(p) for p in ("W", "M", "Q", "Y"))
    starts = {
        name: set(day[period != period.shift()].iloc[1:])
        for name, period in (
            ("week", week), ("month", month), ("quarter", quarter), ("year", year)
        )
    }  # fmt: skip
    ends = {
        name: set(day[period != period.shift(-1)].iloc[:-1])
        for name, period in (("week", week), ("month", month), ("quarter", quarter))
    }
    found: list[Parting] = []

    def add(days: pd.DatetimeIndex, where: float, *choices: tuple[str, set]) -> None:
        """Add the day of the first choice that has one, near a share of the days."""
        inside = days[int(0.1 * len(days)) : int(0.95 * len(days))]
        taken = {p.day for p in found}
        for why, wanted in choices:
            hits = [d for d in inside if d in wanted and d not in taken]
            if hits:
                at = min(int(where * len(hits)), len(hits) - 1)
                found.append(Parting(hits[at], why, days is test))
                return

    first = [
        ("first day of a year", starts["year"]),
        ("first day of a quarter", starts["quarter"]),
        ("first day of a month", starts["month"]),
        ("first day of a week", starts["week"]),
    ]
    gaps = suspended.reindex(calendar).fillna(0.0)
    most = {
        d
        for part in (before, test)
        if len(part) and gaps[part].max() > 0
        for d in [gaps[part[int(0.1 * len(part)) : int(0.95 * len(part))]].idxmax()]
    }
    add(test, 0.5, *first)
    add(before, 0.5, *first)
    add(test, 0.0, ("most suspensions", most))
    # Statements of each quarter are announced at another time of the year.
    for number in (1, 4, 7, 10):
        begins = {d for d in starts["quarter"] if d.month == number}
        for days in (test, before):
            if not begins & {p.day for p in found}:
                add(days, 0.5, ("first day of a quarter", begins))
    add(test, 0.8, ("last day of a month", ends["month"] - ends["quarter"]))
    add(before, 0.3, ("first day of a week", starts["week"] - starts["month"]))
    add(test, 0.2, ("first day of a week", starts["week"] - starts["month"]))
    add(before, 0.7, ("last day of a quarter", ends["quarter"]))
    add(test, 0.6, ("last day of a week", ends["week"] - ends["month"]))
    return found[:count]


def suspensions(bars: pd.DataFrame, calendar: pd.DatetimeIndex) -> pd.Series:
    """Stocks without a close between two bars, by day."""
    known = bars.loc[bars["close"].notna(), ["datetime", "instrument"]]
    day = calendar.get_indexer(pd.DatetimeIndex(known["datetime"]))
    stock, names = pd.factorize(known["instrument"])
    there = np.zeros((len(calendar), len(names)), dtype=bool)
    there[day[day >= 0], stock[day >= 0]] = True
    alive = np.maximum.accumulate(there) & np.maximum.accumulate(there[::-1])[::-1]
    return pd.Series((alive & ~there).sum(axis=1), index=calendar)
