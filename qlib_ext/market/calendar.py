"""Trading calendar of the embedded market: weekdays without the usual holidays."""

import pandas as pd

__all__ = ["trading_days", "weekdays"]

LAST_DAY = pd.Timestamp("2020-12-31")
"""Every embedded market ends here, so that one set of segments fits them all."""


def trading_days(years: int) -> pd.DatetimeIndex:
    """Return the trading days of the `years` calendar years that end on 2020-12-31.

    Weekdays without 1 January, a week for the Spring Festival (first full week of
    February: the lunar date is not modelled), the tomb-sweeping day, 1-3 May and
    1-7 October; about 246 days a year, as on the Shanghai exchange.

    Parameters
    ----------
    years : int
        Number of years, at least 1.
    """
    first = pd.Timestamp(year=LAST_DAY.year - years + 1, month=1, day=1)
    days = weekdays(first, LAST_DAY)
    month, day = days.month, days.day
    monday = day - days.dayofweek  # day of month of that week's Monday
    closed = (
        ((month == 1) & (day == 1))
        | ((month == 2) & (monday >= 1) & (monday <= 7))
        | ((month == 4) & (day == 5))
        | ((month == 5) & (day <= 3))
        | ((month == 10) & (day <= 7))
    )
    return days[~closed]


def weekdays(first: pd.Timestamp, last: pd.Timestamp) -> pd.DatetimeIndex:
    """Monday to Friday, both ends included; `pd.bdate_range` steps day by day."""
    days = pd.date_range(first, last)
    return days[days.dayofweek < 5]
