"""Whether the days of a build can be right: in CNY and shares, as traded, not twice.

A slip of the unit is a power of ten that nearly all stock-days share. It shows against
the day bars of the store, between amount, volume and price of the bars themselves, and,
as far as nothing else is known, in the level of A-share prices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from data_handlers.aggregate.closes import Closes

__all__ = [
    "FEW_SHARES",
    "LEAST_GAP",
    "against_days",
    "check_rising",
    "check_units",
    "copies",
    "exchanged_pair",
    "fixed_holidays",
    "is_thin",
    "odd_lots",
    "of_few",
    "other_level",
    "price_level",
    "repeated_days",
    "repeats",
    "silence",
    "swapped",
    "unexplained_weekdays",
    "usual_rows",
]

_COLUMNS = ["datetime", "instrument", "close", "volume", "amount"]
#: A-shares: no price was ever above 3,000 CNY, and no market's median above 300 or
#: below 0.3. The second rule needs that many stocks.
_HIGHEST, _MEDIAN, _MANY = 3000.0, (0.3, 300.0), 10
#: Their tick is 0.01, so whole prices alone, on days that move, are not CNY; said from
#: that level on, which is 1 CNY in fen.
_WHOLE = 100.0
#: How far a stock-day may be from the power of ten: closes are equal, volumes and
#: amounts differ by what one of the sources leaves out.
_TOLERANCE = {"price": 0.03, "volume": 0.3, "amount": 0.3}
_SHARE = 0.8
#: A close is another one from here on: two ticks of the 10-year bond future.
_OTHER = 1e-4
_OTHER_CLOSE = (
    "days that end at another close than the store's (of another stock or day?)"
)
_PRICES = ["open", "high", "low", "close"]
#: Chinese public holidays fall into these spans of month and day.
_HOLIDAYS = (
    (1230, 1231), (101, 104), (118, 228), (402, 408), (427, 508), (525, 627),
    (902, 905), (908, 1010),
)  # fmt: skip
_FIXED = [101, 501, 1001, 1002, 1003]
_SPRING_FESTIVAL = 4  # weekdays in a row that it takes at least
_FEWEST_STEPS = 10  # of a day whose volume rises; by chance one in 10! days does
_RISING_DAYS = 200  # stock-days that are looked at
#: Swapped, a gap is about five times a bar of days and more times one of minutes.
_FARTHER = 2.5
#: Minutes without bars or trades that may be a halt or lost rows.
LEAST_GAP = 30
_CHANCE = -np.log(1e-9)  # what is less likely is not by chance
_FIELDS = {"price": "close", "volume": "volume", "amount": "amount"}
#: No market's median stock trades fewer shares a day.
FEW_SHARES = 1e5
_LEVEL = 8.0  # no price of a day is so many times another
#: How many times the day before's the median stock's is in another unit; volumes rise
#: by twelve on the day after one on which ten stocks were locked at their limit.
_STEP = {"close": 1.6, "volume": 30.0}
#: More stocks of a day in another unit than others, or stock-days, are an error.
_OF_MANY = 0.01
_FEW = 3  # days with another's bars may be chance
#: No stock moves so far in a day but on its first, at ex-dates and after a long halt.
_NO_LIMIT, _DAY_MOVE = np.log(1.35), np.log(1.11)
_LONGEST_HALT = pd.Timedelta(days=12)
_LEAST = 3  # stocks that repeat their bars on a day
_DAYS = 10  # of a stock alone before its prices or volumes tell a unit


def check_units(
    files: Mapping[str, Path], session: str, daily: pd.DataFrame | None = None
) -> dict[str, list[str]]:
    """Refuse partitions in another unit; return what may be one.

    Parameters
    ----------
    files : dict
        Key of a partition to its file, with the day's close, volume and amount.
    session : str
        Levels of prices are judged for "a_share" alone.
    daily : DataFrame, optional
        Index (datetime, instrument), columns among close (unadjusted, CNY), volume
        (shares) and amount (CNY): the day bars of a store.

    Returns
    -------
    dict of str to list of str
        Finding to partitions.

    Raises
    ------
    ValueError
        With the numbers, and the unit to declare in the mapping file.
    """
    found: dict[str, list[str]] = {}
    few: list[str] = []
    closes = None if daily is None or "close" not in daily else Closes(daily)
    before = None
    for key, file in sorted(files.items()):
        table = pq.ParquetFile(file)
        names = [n for n in _PRICES if n in table.schema_arrow.names]
        names += [n for n in _COLUMNS if n not in names]
        rows = table.read(columns=names).to_pandas()
        rows["instrument"] = rows["instrument"].astype(object)
        units = _slips(rows, session, daily) or _shifts(rows, before, session)
        units = [f"Units: {text}" for text in units]
        odd = (
            units
            or _closed(rows)
            or _repeats(rows, before)
            or _copied(rows)
            or _exchanged(rows, before, session)
        )
        for message in odd:
            found.setdefault(message, []).append(key)
        if closes is not None:
            closes.add(rows)
        many = rows["instrument"].nunique() >= _MANY and session == "a_share"
        blind = daily is None and many and not (rows["amount"] > 0).any()
        if blind and 0 < rows["volume"].median() < FEW_SHARES:
            few.append(key)
        before = _last_rows(rows, before)
    if not found:
        what = (
            f"the median stock trades under {FEW_SHARES:,.0f} shares a day, very few: "
            "volumes in lots? Then `units: {volume: lots}`; amounts, or a store's day "
            "bars, would tell"
        )
        off = closes.check() if closes is not None else []
        return ({what: few} if few else {}) | ({_OTHER_CLOSE: off} if off else {})
    message, keys = max(found.items(), key=lambda x: len(x[1]))
    raise ValueError(
        f"{message} ({len(keys)} of {len(files)} partitions, first {keys[0]}). "
        "Nothing was written."
    )


def against_days(
    files: Mapping[str, Path], years: Sequence[Path], daily: pd.DataFrame
) -> dict[str, list[str]]:
    """Hold finished stock-days against the day bars of a store.

    Parameters
    ----------
    files, daily
        As in `check_units`.
    years : sequence of Path
        The yearly files.

    Returns
    -------
    dict of str to list of str
        Finding to "instrument date".
    """
    keys = _COLUMNS[:2]

    def read(file: Path, *more: str) -> pd.DataFrame:
        rows = pq.ParquetFile(file).read(columns=[*keys, *more]).to_pandas()
        return rows.astype({"instrument": object})

    have = pd.concat([read(file) for file in years])
    spans = have.groupby("instrument")["datetime"].agg(["min", "max"])
    traded = daily.index[daily["close"].notna()]
    days = traded.to_frame(index=False).join(spans, on="instrument")
    inside = days["datetime"].between(days["min"], days["max"]).to_numpy()
    lost = traded[inside & ~traded.isin(pd.MultiIndex.from_frame(have))]
    rows = pd.concat([read(file, "close") for file in files.values()])
    ends = rows.set_index(keys)["close"].astype(float)
    off = (ends / daily["close"].reindex(ends.index) - 1).abs() > _OTHER
    found = {
        "traded days of the store without bars (features count as the mean)": lost,
        "days that the store has no price of": ends.index.difference(traded),
        "days that end at another close than the store's (of another contract, product "
        "or day?)": ends.index[off.to_numpy()],
    }
    return {
        why: [f"{code} {day:%Y-%m-%d}" for day, code in index]
        for why, index in found.items()
        if len(index)
    }


def _slips(rows: pd.DataFrame, session: str, daily: pd.DataFrame | None) -> list[str]:
    """Say what is in another unit; a list so that none is an empty one."""
    if daily is not None:
        same = daily.reindex(pd.MultiIndex.from_frame(rows[_COLUMNS[:2]]))
        for what, field in _FIELDS.items():
            if field in same:
                ratio = rows[field].to_numpy(float) / same[field].to_numpy(float)
                power = _power(ratio, _TOLERANCE[what])
                if power:
                    return [
                        f"every {what} is {10.0**power:g} times that of the day store; "
                        + _remedy(what, power)
                    ]
                by = pd.Series(ratio).groupby(rows["instrument"].to_numpy(str))
                of = {n: _power(x.to_numpy(), _TOLERANCE[what]) for n, x in by}
                powers = pd.Series(of, dtype=int)
                powers = powers[(powers != 0) & (by.size() >= _FEW)]
                if len(powers):
                    times = 10.0 ** int(powers.iloc[0])
                    return [
                        f"every {what} of {', '.join(powers.index[:5])} "
                        f"({len(powers)} stock(s)) is {times:g} times "
                        "that of the day store; mend their rows, or read these files "
                        "with a mapping of their own"
                    ]
    value = rows["volume"] * rows["close"]
    power = _power((rows["amount"] / value).to_numpy(float), _TOLERANCE["amount"])
    if power:
        return [
            f"amount / volume is {10.0**power:g} times the price, so one of the three "
            "is in another unit: declare it in the mapping file, such as "
            "`units: {volume: lots}`, `{amount: thousand_cny}` or `{price: fen}`"
        ]
    slip = _odd_stocks(rows) or _off_the_bar(rows)
    if not slip and session == "a_share":
        slip = price_level(rows)
        if names := [] if slip or (rows["amount"] > 0).any() else odd_lots(rows):
            slip = (
                f"the volumes of {', '.join(names[:5])} ({len(names)} stock(s)) are no "
                "whole lots, as all others are: volumes in lots for shares? Read these "
                "files with a mapping of their own, `units: {volume: lots}`"
            )
    return [slip] if slip else []


def price_level(rows: pd.DataFrame) -> str:
    """Say that prices of A-shares can't be CNY, or nothing.

    Parameters
    ----------
    rows : DataFrame
        ``instrument``, ``open``, ``high``, ``low``, ``close``, as traded.
    """
    middle = float(rows["close"].median())
    if not middle > 0:
        return ""
    stocks = rows["instrument"].nunique()
    many = stocks >= _MANY
    if middle > (_MEDIAN[1] if many else _HIGHEST) or (many and middle < _MEDIAN[0]):
        return (
            f"the median price is near {10.0 ** round(np.log10(middle)):,.6g} CNY, "
            f"which no A-share market had; " + _remedy("price", _unit(rows["close"]))
        )
    if middle >= _WHOLE and _whole(rows.reindex(columns=_PRICES).dropna()):
        return (
            "every price is a whole number, and the tick of A-shares is 0.01 CNY; "
            + _remedy("price", _unit(rows["close"]))
        )
    if len(rows) < stocks - 1 + _DAYS or not (rows["close"] >= _WHOLE).any():
        return ""  # no stock has both
    by = rows.groupby("instrument")["close"]
    high = by.agg(["median", "size"]).query(f"median >= {_WHOLE} and size >= {_DAYS}")
    whole = rows[rows["instrument"].isin(high.index)]
    whole = whole[["instrument", *_PRICES]] if set(_PRICES) <= set(rows) else whole[:0]
    names = [
        str(name)
        for name, x in whole.groupby("instrument", observed=True)
        if _whole(x[_PRICES].dropna())
    ]
    if names:
        return (
            f"the prices of {', '.join(names[:5])} ({len(names)} stock(s)) are whole "
            "numbers on every day, and the tick of A-shares is 0.01 CNY: in fen, where "
            "others are in CNY? Mend their rows, or read these files with a mapping of "
            "their own"
        )
    return ""


def odd_lots(rows: pd.DataFrame) -> list[str]:
    """Stocks whose volumes are no whole lots, where those of all others are.

    Such a vendor rounds to lots and counts shares, so they are in lots. Shares of the
    STAR market and of Beijing trade by the share and are no sign.

    Parameters
    ----------
    rows : DataFrame
        ``instrument``, ``volume`` in shares.
    """
    rows = rows.loc[rows["volume"] > 0, ["instrument", "volume"]]
    broken = (rows["volume"] % 100 != 0).groupby(rows["instrument"].astype(str))
    of = broken.agg(["sum", "size"])
    of = of[~of.index.str.contains("688|689|^BJ", regex=True)]
    odd = of["sum"] >= _FEW
    others = of[~odd]
    if odd.sum() >= 0.5 * len(of) or others["sum"].any() or others["size"].sum() < 20:
        return []
    return [str(name) for name in of.index[odd]]


def other_level(value: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows whose price is of another level than most of its group's: another unit.

    Parameters
    ----------
    value : ndarray [n]
        What is not above 0 is unknown.
    at : int ndarray [k + 1]
        Where each group begins, and the last one ends.
    """
    out = np.zeros(len(value), dtype=bool)
    has = np.flatnonzero(np.diff(at) > 0)
    if not len(has):
        return out
    value = value[: at[-1]]
    known = value > 0
    most = np.maximum.reduceat(np.where(known, value, 0.0), at[has])
    least = np.minimum.reduceat(np.where(known, value, np.inf), at[has])
    for g in has[most > _LEVEL * least]:
        rows = slice(at[g], at[g + 1])
        middle = np.median(value[rows][known[rows]])
        far = (value[rows] > _LEVEL * middle) | (value[rows] < middle / _LEVEL)
        out[rows] = known[rows] & far
    return out


def of_few(odd: np.ndarray, names: np.ndarray, what: str, remedy: str) -> np.ndarray:
    """Stocks (or stock-days) in another unit that are so few that they are left out.

    Parameters
    ----------
    odd : bool ndarray [k]
    names : ndarray [k]
        For the message.
    what, remedy : str
        What is odd about them, and what to do.

    Raises
    ------
    ValueError
        If they are not few.
    """
    if odd.sum() > _OF_MANY * len(odd):
        some = ", ".join(map(str, names[odd][:5]))
        raise ValueError(f"{int(odd.sum())} of {len(odd)} {what} ({some}); {remedy}.")
    return odd


def swapped(opens: np.ndarray, closes: np.ndarray, same: np.ndarray) -> bool:
    """Whether opens and closes of bars, in order, are each other's.

    From a close to the next open a price moves less than from an open to the next
    close, whatever the bar.

    Parameters
    ----------
    opens, closes : ndarray [n]
    same : bool ndarray [n]
        Whether the row before is the same stock's.
    """
    if same.sum() < 100:
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.abs(np.log(opens[1:] / closes[:-1]))[same[1:]]
        bar = np.abs(np.log(closes[1:] / opens[:-1]))[same[1:]]
    known = np.isfinite(gap) & np.isfinite(bar)
    if known.sum() < 100:
        return False
    return bool(np.median(gap[known]) > _FARTHER * np.median(bar[known]))


def unexplained_weekdays(days: pd.DatetimeIndex) -> np.ndarray:
    """Whether no Chinese public holiday can fall on each of these weekdays, in order.

    From 18 January to February only the Spring Festival does, and since 2000 it has
    taken five weekdays in a row, six in some years.
    """
    number = days.month * 100 + days.day
    holiday = np.zeros(len(days), dtype=bool)
    for first, last in _HOLIDAYS:
        holiday |= (number >= first) & (number <= last)
    at = np.busday_count("1970-01-01", days.to_numpy().astype("datetime64[D]"))
    run = np.cumsum(np.diff(at, prepend=at[:1]) != 1)
    spring = (number >= 118) & (number <= 228) & (days.year >= 2000)
    return ~holiday | (spring & (np.bincount(run)[run] < _SPRING_FESTIVAL))


def usual_rows(rows: pd.Series) -> pd.Series:
    """Rows that each day should have, by the five days on either side.

    Parameters
    ----------
    rows : Series
        By day, sorted.

    Returns
    -------
    Series
        NaN on the first day: a file may begin with the few oldest stocks.
    """
    before = rows.shift().rolling(5, min_periods=1).median()
    after = rows[::-1].shift().rolling(5, min_periods=1).median()[::-1]
    usual = before.combine(after, np.fmin)
    usual.iloc[:1] = np.nan
    return usual


def is_thin(rows: Any, usual: Any) -> Any:
    """Whether a day's rows are too few beside the usual number.

    On hardly a day has a tenth of a market stopped trading at once (July 2015); of a
    few stocks some may, by chance: of thirteen three did.
    """
    lacking = usual - rows > 0.1 * usual + np.sqrt(0.1 * usual)
    return (lacking & (usual >= 30)) | (rows < 0.7 * usual)


def silence(count: np.ndarray, gap: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Whether stretches without bars or trades are too long to be by chance.

    Parameters
    ----------
    count : ndarray [n]
        Slots (of a bar, or minutes) of the day with a bar or a trade.
    gap, whole : ndarray [n]
        Slots of the longest stretch without one, and of the day.
    """
    share = count / np.maximum(whole - gap, count)  # of the slots outside the stretch
    return -gap * np.log1p(-np.minimum(share, 1 - 1e-12)) > _CHANCE


def check_rising(volume: np.ndarray, starts: np.ndarray) -> None:
    """Refuse volumes of the day so far: never falling from row to row, rising often.

    Parameters
    ----------
    volume : ndarray [n]
        In order of stock-days and times.
    starts : int ndarray [k + 1]
        Where each stock-day begins, and the last one ends.

    Raises
    ------
    ValueError
        If it rises so in most stock-days of the first.
    """
    starts = np.unique(starts)[: _RISING_DAYS + 1]
    if len(starts) < 2:
        return
    step = np.diff(volume[: starts[-1]], prepend=0.0)
    step[starts[:-1]] = 0.0  # from one stock-day to the next
    falls = np.add.reduceat(~(step >= 0), starts[:-1], dtype=np.int64)
    rises = np.add.reduceat(step > 0, starts[:-1], dtype=np.int64)
    told = falls + rises >= _FEWEST_STEPS
    rising = int((told & (falls == 0)).sum())
    if rising > 0.5 * told.sum():
        raise ValueError(
            f"the volume rises from row to row all day in {rising:,} of "
            f"{told.sum():,} stock-days, so it is that of the day so far (a "
            "snapshot's), not of the row; take the differences within the day, of the "
            "amount too."
        )


def _odd_stocks(rows: pd.DataFrame) -> str:
    """Say which stocks alone are in another unit."""
    amount, volume, close = (
        rows[n].to_numpy(float) for n in ("amount", "volume", "close")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(volume > 0, amount / volume, np.nan) / close
        power = np.log10(np.where(ratio > 0, ratio, np.nan))
        whole = np.round(power)
        slip = np.abs(10.0 ** (power - whole) - 1) <= _TOLERANCE["amount"]
    slip &= whole != 0
    if not slip.any():
        return ""
    known, slip = ~np.isnan(power), pd.Series(slip, rows.index)
    odd = slip[known].groupby(rows.loc[known, "instrument"]).all()
    days = rows[slip & known & (np.abs(whole) >= 2)]
    if not odd.any() and len(days) > _OF_MANY * known.sum():
        some = [f"{x.instrument} {x.datetime:%Y-%m-%d}" for x in days.itertuples()]
        return (
            f"amount / volume of {', '.join(some[:3])} ({len(some)} stock-day(s)) is a "
            "power of ten off the price: another unit than on the other days? Mend "
            "these rows"
        )
    if not odd.any():
        return ""
    names = [str(name) for name in odd.index[odd]]
    first = 10.0 ** np.nanmedian(whole[(rows["instrument"] == names[0]).to_numpy()])
    return (
        f"{len(names)} of {len(odd)} stocks have another unit than the others: amount "
        f"/ volume of {', '.join(names[:5])} is {first:g} times the price; mend their "
        "rows, or read these files with a mapping of their own"
    )


def _whole(prices: pd.DataFrame) -> bool:
    """Whether prices that move are whole numbers throughout."""
    values = prices.to_numpy(float)
    moves = (prices["high"] > prices["low"]).any()
    return bool(moves and (np.abs(values - np.round(values)) < 1e-3).all())


def _off_the_bar(rows: pd.DataFrame) -> str:
    """Say that mean prices lie outside the bars: adjusted prices beside raw amounts."""
    if not {"high", "low"} <= set(rows):
        return ""
    mean = rows["amount"] / rows["volume"].where(rows["volume"] > 0)
    known = mean > 0
    off = ((mean > rows["high"] * 1.01) | (mean < rows["low"] * 0.99))[known]
    if not off.any():
        return ""
    if (share := float(off.mean())) > 0.5:
        return (
            f"amount / volume lies outside low to high on {share:.0%} of the "
            "stock-days: are prices adjusted? Bars must be as traded; a column "
            "`factor` adjusts the overnight return"
        )
    for by in ("instrument", "datetime"):
        of = off.groupby(rows.loc[known, by].astype(str)).agg(["mean", "size"])
        if len(of := of[(of["mean"] > 0.5) & (of["size"] >= _FEW)]):
            return (
                f"amount / volume of {', '.join(of.index[:5])} lies outside low to "
                "high: prices that stand still, are adjusted, or of another stock?"
            )
    return ""


def _last_rows(rows: pd.DataFrame, before: pd.DataFrame | None) -> pd.DataFrame:
    """Last row of each instrument."""
    both = rows if before is None else pd.concat([before, rows], ignore_index=True)
    return both.sort_values("datetime", kind="stable").drop_duplicates(
        "instrument", keep="last"
    )


def _shifts(rows: pd.DataFrame, before: pd.DataFrame | None, session: str) -> list[str]:
    """Say that a day, or a stock on a day, is in another unit than those before it."""
    names = [n for n in ("close", "volume") if n in rows]
    both = pd.concat([rows] if before is None else [before, rows], ignore_index=True)
    both = both.sort_values(["instrument", "datetime"], kind="stable")
    same = both["instrument"].eq(both["instrument"].shift()).to_numpy()
    new = same & (both["datetime"] >= rows["datetime"].min()).to_numpy()
    for name in names:
        value = both[name].to_numpy(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.r_[np.nan, np.log10(value[1:] / value[:-1])]
        known = new & np.isfinite(step)
        of = pd.Series(step[known]).groupby(both["datetime"].to_numpy()[known])
        middle = of.median()[of.size() >= _MANY]
        far = middle[middle.abs() > np.log10(_STEP[name])]
        if len(far):
            return [
                f"on {far.index[0]:%Y-%m-%d} the {name} of the median stock is "
                f"{10.0 ** far.iloc[0]:.3g} times that of the day before, as no market "
                "moves: another unit from that day on? Mend its rows, or declare it in "
                "the mapping file of these files"
            ]
        power = np.round(step)
        odd = known & (np.abs(power) >= 2) & (np.abs(10.0 ** (step - power) - 1) < 0.3)
        if name == "close" and session == "a_share" and odd.any():
            first = both[odd].iloc[0]
            return [
                f"the price of {first['instrument']} is {10.0 ** step[odd][0]:.3g} "
                f"times that of its day before on {first['datetime']:%Y-%m-%d}, as no "
                f"split is ({int(odd.sum())} stock-day(s)): in fen? Mend its rows, or "
                "read them with a mapping of their own"
            ]
    return []


def fixed_holidays(days: pd.DatetimeIndex) -> np.ndarray:
    """Whether A-shares never trade on each of these days, since 2000."""
    number = days.month * 100 + days.day
    return np.isin(number, _FIXED) & (days.year >= 2000)


def _closed(rows: pd.DataFrame) -> list[str]:
    """Say that a day is none of trading."""
    days = pd.DatetimeIndex(rows["datetime"].unique())
    now = pd.Timestamp.now()
    return [
        f"Days: {day:%Y-%m-%d} {why}; take its rows out, or mend their times"
        for why, found in (
            ("lies on a weekend, when no exchange trades", days[days.dayofweek >= 5]),
            ("lies in the future", days[days > now + pd.Timedelta(days=1)]),
        )
        for day in found[:1]
    ]


def _repeats(rows: pd.DataFrame, before: pd.DataFrame | None) -> list[str]:
    """Say that a day is an earlier one under a new date."""
    both = rows if before is None else pd.concat([before, rows], ignore_index=True)
    names = [n for n in (*_PRICES, "volume") if n in rows]
    both = both[both["close"].notna() & (both["volume"] > 0)]
    both = both[["datetime", "instrument", *names]].sort_values("datetime")
    again = both.duplicated(["instrument", *names])
    if again.sum() < _LEAST:
        return []
    same = pd.Series(data=True, index=both.index)
    return [
        f"Days: the bars of {day:%Y-%m-%d} are those of an earlier day again, in "
        f"{n} of {count} stocks; fetch it again"
        for day, n, count in repeated_days(
            again, same, both["datetime"], 0.2
        ).itertuples()
    ][:1]


def _exchanged(
    rows: pd.DataFrame, before: pd.DataFrame | None, session: str
) -> list[str]:
    """Say that prices move as no limit allows: codes of one another, or other days."""
    if session != "a_share":
        return []
    both = rows if before is None else pd.concat([before, rows], ignore_index=True)
    both = both[both["close"] > 0].sort_values(["instrument", "datetime"])
    was = both.groupby("instrument")[["close", "datetime"]].shift()
    near = both["datetime"] - was["datetime"] <= _LONGEST_HALT
    near &= both["datetime"] >= rows["datetime"].min()
    both = both.assign(was=was["close"])[near]
    both["step"] = np.log(both["close"] / both["was"])
    far = both[both["step"].abs() > _NO_LIMIT]
    if len(far) < 2:
        return []
    size = both.groupby("datetime").size()
    for day, odd in far.groupby("datetime"):
        if len(odd) >= _LEAST and len(odd) > 0.2 * size[day]:
            return [
                f"Codes: the prices of {len(odd)} of {size[day]} stocks moved by more "
                f"than {np.expm1(_NO_LIMIT):.0%} on {day:%Y-%m-%d}, as no limit "
                "allows: under each other's codes, or of another day?"
            ]
        if pair := exchanged_pair(odd):
            return [
                f"Codes: {pair[0]} and {pair[1]} change places on {day:%Y-%m-%d}: each "
                "has the other's price; under each other's codes?"
            ]
    return []


def exchanged_pair(rows: pd.DataFrame) -> list[str]:
    """Find two stocks each of which has about the other's price of the day before.

    Parameters
    ----------
    rows : DataFrame
        ``instrument``, ``close`` and ``was``, the one before; NaN is unknown. Only
        prices that moved farther than any does in a day are looked at.
    """
    step = np.log(rows["close"] / rows["was"])
    up, down = rows[step > _NO_LIMIT], rows[step < -_NO_LIMIT]
    ups, downs = (x[["close", "was"]].to_numpy() for x in (up, down))
    # each close over the other's before
    pair = np.abs(np.log(ups[:, None] / downs[None, :, ::-1])).max(axis=2)
    if not pair.size or pair.min() >= _DAY_MOVE:
        return []
    i, j = np.unravel_index(np.argmin(pair), pair.shape)
    return [str(up["instrument"].iloc[i]), str(down["instrument"].iloc[j])]


def _copied(rows: pd.DataFrame) -> list[str]:
    """Say that a stock has the bars of another, days later."""
    if not set(_PRICES) <= set(rows) or rows["datetime"].nunique() < _FEW:
        return []
    return [
        f"Codes: {late} has the bars of {code}, {wait} day(s) later, on {n} days: a "
        "wrong code, or wrong dates?"
        for code, late, wait, n in copies(rows).query("days_late > 0").to_numpy()
    ][:1]


def copies(rows: pd.DataFrame) -> pd.DataFrame:
    """Pairs of codes of which one has the other's bars, on the same days or later.

    Parameters
    ----------
    rows : DataFrame
        ``instrument``, ``datetime``, prices and ``volume``, in any order.

    Returns
    -------
    DataFrame
        ``instrument``, ``same_as`` (the later one), ``days_late`` and ``days``, at
        least three and half of those of one of the two.
    """
    # prices alone are another's by chance on other days
    keys = [*_PRICES, "volume"] if "volume" in rows else ["datetime", *_PRICES]
    same = rows.loc[rows.duplicated(keys, keep=False)]
    same = same[list(dict.fromkeys(["instrument", "datetime", *keys]))]
    same = same.sort_values([*keys, "datetime", "instrument"], kind="stable")
    again = same.duplicated(keys).to_numpy()
    slot = np.searchsorted(np.sort(rows["datetime"].unique()), same["datetime"])
    pairs = pd.DataFrame(
        {
            "instrument": same["instrument"].shift(),
            "same_as": same["instrument"],
            "days_late": np.diff(slot, prepend=0),
        }
    )[again]
    pairs = pairs[pairs["instrument"] != pairs["same_as"]]
    count = pairs.groupby(list(pairs), as_index=False, observed=True).size()
    count = count.rename(columns={"size": "days"})
    days = rows.groupby("instrument", observed=True).size()
    first, second = (count[c].map(days) for c in ("instrument", "same_as"))
    least = np.minimum(first.astype(float), second.astype(float))
    return count[(count["days"] >= _FEW) & (count["days"] > 0.5 * least)]


def repeats(bars: pd.DataFrame, same: pd.Series) -> pd.Series:
    """Whether each bar is the one before again; NaN repeats nothing.

    Parameters
    ----------
    bars : DataFrame
        Prices and sizes, stock by stock in the order of days.
    same : bool Series
        Whether the row before is the same stock's.
    """
    return same & (bars == bars.shift()).all(axis=1)


def repeated_days(
    again: pd.Series, same: pd.Series, dates: pd.Series, most: float
) -> pd.DataFrame:
    """Find days on which bars are those of the day before under a new date.

    Parameters
    ----------
    again, same : bool Series
        See `repeats`.
    dates : Series
    most : float
        Share of a day's stocks that may repeat, at least three.

    Returns
    -------
    DataFrame
        By date: ``sum`` of the stocks that repeat, ``size`` of all.
    """
    of = again[same].groupby(dates[same]).agg(["sum", "size"])
    return of[(of["sum"] >= _LEAST) & (of["sum"] > most * of["size"])]


def _unit(prices: pd.Series) -> int:
    """Power of ten of A-share prices in CNY, by their tick of 0.01 in each unit."""
    for power in (4, 3):
        ticks = prices / 10.0 ** (power - 2)
        if (np.abs(ticks - ticks.round()) < 1e-6).mean() > 0.99:
            return power
    return 2 if float(prices.median()) > 12 else round(np.log10(prices.median() / 12))


def _power(ratio: np.ndarray, tolerance: float) -> int:
    """Power of ten that most ratios share; 0 if none does."""
    ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
    if not len(ratio):
        return 0
    power = round(float(np.log10(np.median(ratio))))
    near = np.abs(ratio / 10.0**power - 1) <= tolerance
    return power if near.mean() >= _SHARE else 0


def _remedy(what: str, power: int) -> str:
    unit = {
        ("price", 2): "fen",
        ("price", 3): "li",
        ("price", 4): "e4",
        ("volume", -2): "lots",
        ("amount", -3): "thousand_cny",
        ("amount", -4): "ten_thousand_cny",
    }.get((what, power), f"… ({10.0**power:g} of ours)")
    return f"declare it in the mapping file: `units: {{{what}: {unit}}}`"
