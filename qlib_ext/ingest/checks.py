"""Checks of vendor bars before anything is written.

An error is a value that would silently spoil features or back-tests (a duplicate that
disagrees, a broken bar, a unit slip); a warning is something a person should look at.
Every check adds one finding or one line to the list of those that found nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS, SESSIONS
from data_handlers.aggregate.units import (
    FEW_SHARES,
    copies,
    fixed_holidays,
    is_thin,
    odd_lots,
    price_level,
    repeated_days,
    repeats,
    swapped,
    unexplained_weekdays,
    usual_rows,
)
from data_handlers.boards import board_of, limit_ratio
from data_handlers.codes import CODE, kind_of
from data_handlers.vendor.mapping import VendorMapping
from qlib_ext.ingest.report import Report

__all__ = [
    "EXCHANGED",
    "LEVELS",
    "NEAR",
    "check_bars",
    "check_store_bars",
    "check_weekdays",
    "daily_limit",
    "drop_duplicates",
    "end_before_last",
    "exchanged",
    "fields_beside",
    "incomplete_days",
    "infinite",
    "off_by_powers",
    "one_company_twice",
    "others_among",
    "powers",
    "renamed_codes",
]

_OHLC = ["open", "high", "low", "close"]
_SLIP = 8.0  # a mean price this many times off the bar's prices is another unit
_OLDEST = 400.0  # no stock's price adjusted backward is as many times its own
_PRICES = (*_OHLC, "preclose", "vwap", "limit_up", "limit_down")
_LIMIT_MARGIN = 0.01
#: Field to how many times its level another unit is; prices move by the limit, volumes
#: of ten stocks by eight, on a day whose sellers find no buyers.
LEVELS = {
    **{name: 1.35 for name in (*_OHLC, "vwap")},
    **{name: 15.0 for name in ("volume", "amount", "turnover")},
    "market_cap": 1.6,
}
_MOST_FLOW = 3.0  # times the amount; a trade is bought and sold, which makes 2
_OPENED = pd.Timestamp("1990-12-01")  # the exchanges' first days of trading
_FEWEST = 10  # moves of a stock, before they tell the unit of its percent change
#: Largest relative distance from a power of ten.
NEAR = 0.3
_FEWEST_TURNOVER = (2e-5, 3e-4)  # the median of any shares, and of ten stocks or more
_RARE_TURNOVER = 2e-4  # of one share in thousands the median is below
_MANY = 10  # stocks, of which some trade on any day
_LONG_GAP = 35  # calendar days; no holiday lasts so long
_ABOVE = 0.1  # of a day's ten stocks or more; an ex-date puts none above its last close


def drop_duplicates(raw: pd.DataFrame, source: str, report: Report) -> pd.DataFrame:
    """Sort by stock and day; drop rows given twice, report those that disagree."""
    raw = raw.sort_values(["instrument", "date"], kind="stable", ignore_index=True)
    repeated = raw.duplicated(["instrument", "date"], keep=False)
    if not repeated.any():
        report.ok("duplicate rows", source)
        return raw
    # as the store will hold them: 10.5 and 10.5000000001 are one price
    floats = raw.select_dtypes("float64").columns
    rows = raw[repeated].astype(dict.fromkeys(floats, np.float32))
    versions = rows.drop_duplicates()
    versions = versions[versions.duplicated(["instrument", "date"], keep=False)]
    if len(versions):
        keys = pd.MultiIndex.from_frame(raw[["instrument", "date"]])
        of = pd.MultiIndex.from_frame(versions[["instrument", "date"]])
        left_out = report.bad_rows(
            "duplicate rows",
            source,
            "the same stock and day is given twice with different values; keep one",
            raw,
            keys.isin(of),
            [c for c in versions if c in ("instrument", "date", "close", "volume")]
            or [*versions.columns],
            examples=versions,
        )
        raw = raw[~left_out]
    same = rows.duplicated()
    if same.any():
        report.add(
            "warning",
            "duplicate rows",
            source,
            "the same row is given more than once; one is kept",
            rows[same],
            columns=["instrument", "date", "close"],
        )
    return raw.drop_duplicates(["instrument", "date"], ignore_index=True)


def fields_beside(
    raw: pd.DataFrame, fields: pd.DataFrame, source: str, report: Report
) -> pd.DataFrame:
    """Rows of a source that is joined to `raw`, each stock and day once.

    Raises
    ------
    ValueError
        If the source gives a field that `raw` has already.
    """
    extra = drop_duplicates(fields, source, report)
    keys = ("instrument", "date")
    clash = sorted(c for c in map(str, extra) if c in raw and c not in keys)
    if clash:
        raise ValueError(
            f"source `{source}` gives {clash}, which other sources give too; "
            "remove one of them from the mapping."
        )
    return extra


def daily_limit(instrument: pd.Series, date: pd.Series) -> np.ndarray:
    """Largest ordinary daily move of an A-share board, as a fraction, with a margin.

    By `data_handlers.boards`; codes of no Chinese exchange 50 %. First days of a
    listing have no limit.
    """
    number, names = pd.factorize(instrument.astype(str))
    boards = [board_of(x) if CODE.fullmatch(x) else "" for x in names]
    board = np.array(boards, dtype=object)[number]
    out = np.full(len(board), 0.5)
    for name in set(boards) - {""}:
        rows = board == name
        out[rows] = limit_ratio(name, pd.DatetimeIndex(date[rows])) + _LIMIT_MARGIN
    return out


def check_bars(
    raw: pd.DataFrame,
    mapping: VendorMapping,
    source: str,
    report: Report,
    *,
    today: pd.Timestamp | None = None,
    index_days: pd.DatetimeIndex | None = None,
    full: bool = True,
) -> np.ndarray:
    """Check bars in store units; add findings to `report`.

    Parameters
    ----------
    raw : DataFrame
        Sorted by instrument and date, no duplicates, with boolean ``traded``.
    mapping : VendorMapping
        Says whether prices are adjusted.
    source : str
        Name for the findings.
    report : Report
        Receives the findings.
    today : Timestamp, optional
        Rows after it are errors. Default: the exchange's day, once it has closed.
    index_days : DatetimeIndex, optional
        Days of the indices; a stock day inside their span but not among them is off
        the calendar.
    full : bool, default True
        Whether these are all days of the market; False (an update of a few days) skips
        the check of the last day.

    Returns
    -------
    ndarray of bool
        Rows to leave out; none without ``--drop-bad-rows``.
    """
    bad = np.zeros(len(raw), dtype=bool)
    traded = raw["traded"].to_numpy()
    out_of_range = infinite(raw)

    def finding(
        level: str, check: str, mask: np.ndarray, message: str, *columns: str
    ) -> None:
        show = ["instrument", "date", *columns]
        if mask.any() and level == "error":
            bad[report.bad_rows(check, source, message, raw, mask, show)] = True
        elif mask.any():
            report.add(level, check, source, message, raw[mask], columns=show)
        else:
            report.ok(check, source)

    today = _last_day(mapping) if today is None else today
    date = raw["date"]
    future = (date > today).to_numpy()
    finding(
        "error", "future dates", future,
        f"days after {today:%Y-%m-%d} cannot be known, nor those of a day before its "
        "close",
    )  # fmt: skip
    early = (date < _OPENED).to_numpy() & (mapping.codes == "cn")
    finding("error", "dates before 1990", early, "the exchanges had not opened")
    weekend = (date.dt.dayofweek >= 5).to_numpy()
    finding("error", "weekend dates", weekend, "no exchange trades on a weekend")
    if index_days is not None and len(index_days):
        inside = (date >= index_days[0]) & (date <= index_days[-1])
        off = (inside & ~date.isin(index_days)).to_numpy()
        finding(
            "error", "dates off the calendar", off, "the indices have no bar that day"
        )
    incomplete_days(raw, source, report, full=full)
    shifted = False
    if full and mapping.of_kind("futures"):
        days = pd.DatetimeIndex(np.sort(date.unique()))
        check_weekdays(
            days, days[0], True, source, report, few=True, holidays=False
        )  # fmt: skip
    elif full:
        _whole_calendar(raw, mapping, source, report)
        shifted = _steps(raw, traded, source, report)
    wide = np.zeros(len(raw), dtype=bool)
    for name, mask in out_of_range.items():
        kind = "price" if name in _PRICES else name
        finding(
            "error",
            f"infinite {kind}",
            mask,
            f"{name} is infinite or beyond any price or count: a division by zero?",
            name,
        )
        wide |= mask
    if mapping.factor == "column" and "factor" in raw:
        _missing_factor(raw, traded, source, report, bad)

    prices = raw[_OHLC].to_numpy()
    unknown = traded & ~wide & np.isnan(prices).any(axis=1)
    finding("error", "missing prices", unknown, "a traded day lacks a price", *_OHLC)
    with np.errstate(invalid="ignore"):
        nonpositive = traded & ~wide & (prices <= 0).any(axis=1)
    hint = "prices must be above 0"
    if mapping.prices == "adjusted":
        hint += " (subtractive forward adjustment does this; take raw prices)"
    finding("error", "non-positive prices", nonpositive, hint, *_OHLC)
    order = _bad_order(raw, traded & ~wide & ~unknown & ~nonpositive, mapping)
    finding(
        "error",
        "OHLC order",
        order,
        "high or low does not bound open and close",
        *_OHLC,
    )
    usable = traded & ~wide & ~unknown & ~nonpositive & ~order
    for name in ("volume", "amount", "turnover"):
        if name in raw:
            with np.errstate(invalid="ignore"):
                negative = traded & ~wide & (raw[name].to_numpy() < 0)
            finding("error", f"negative {name}", negative, f"{name} is below 0", name)
    if "volume" in raw and "amount" in raw:
        _mean_price(raw, usable, mapping, finding)
    if "vwap" in raw:
        ratio = raw["vwap"].to_numpy() / raw["close"].to_numpy()
        with np.errstate(invalid="ignore"):
            off = usable & ((ratio > _SLIP) | (ratio < 1 / _SLIP))
        finding(
            "error", "unit slip", off,
            "vwap is another multiple of the close: set `units.vwap`", "close", "vwap",
        )  # fmt: skip
    for name, sign in (("limit_up", 1), ("limit_down", -1)):
        if name in raw and mapping.prices == "raw":
            limit = raw[name].to_numpy()
            with np.errstate(invalid="ignore"):
                beyond = sign * (raw["close"].to_numpy() / limit - 1) > 1e-3
            finding(
                "error", f"close beyond {name}", usable & beyond & (limit > 0),
                f"no close lies beyond {name}: another column, unit or day?",
                "close", name,
            )  # fmt: skip
    _limits(raw, usable, mapping, source, report)
    _columns_in_place(raw, usable, mapping, source, report)
    if mapping.prices == "raw" and mapping.codes == "cn":
        finding(
            "warning",
            "prices between ticks",
            _between_ticks(raw, usable),
            "more than a tenth of a stock's prices are no multiples of its tick, as "
            "traded prices are: adjusted by the vendor? Then `prices: adjusted`",
            "close",
        )
    _unit_levels(raw, usable, mapping, source, report)
    steady = mapping.codes == "futures" or mapping.of_kind("bars")
    if steady and mapping.codes != "asis" and not shifted:
        for what, value in _steady(raw, mapping).items():
            # Numbers of shares have no day's move, but shares locked up and set free.
            near = 1e-3 if what == "float_shares" else NEAR
            off = off_by_powers(value, raw["instrument"], near, leaps=True)
            finding(
                "error", "unit slip", usable & off,
                f"the {what} is a power of ten off that of the stock's other days: "
                "another unit there, such as fen or lots? Mend these rows", "close",
            )  # fmt: skip
    for name in ("market_cap", "float_shares"):
        if name in raw:
            cap = traded & (raw[name].to_numpy() <= 0)
            finding("error", "market cap", cap, f"{name} is not above 0", name)
    _flows(raw, usable, finding)
    return bad


def _steady(raw: pd.DataFrame, mapping: VendorMapping) -> dict[str, pd.Series]:
    """Values that another unit alone changes by powers of ten from day to day."""
    out = {} if mapping.prices == "adjusted" else {"close": raw["close"]}
    for what, over in (("volume", "turnover"), ("market_cap", "close")):
        if {what, over} <= set(raw):
            out[f"{what} / {over}"] = raw[what] / raw[over].where(raw[over] > 0)
    if "float_shares" in raw:
        out["float_shares"] = raw["float_shares"]
    return out


def _last_day(mapping: VendorMapping, now: pd.Timestamp | None = None) -> pd.Timestamp:
    """Return the last day that can have whole bars, by the exchange's clock."""
    now = pd.Timestamp.now(mapping.tz) if now is None else now
    if mapping.tz is not None:
        close = SESSIONS[mapping.session or "a_share"].intervals[-1][1]
        now -= pd.Timedelta(days=int(now.time() < close))
    return now.tz_localize(None).normalize()


def others_among(raw: pd.DataFrame, source: str, report: Report) -> None:
    """Warn of indices, funds, bonds and B shares, with which shares are ranked."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(raw["instrument"].unique()):
        kinds.setdefault(kind_of(name), []).append(name)
    shares = kinds.pop("share", None)
    if not shares:  # a store of funds, say
        kinds = {kind: names for kind, names in kinds.items() if kind == "index"}
    for kind, names in kinds.items():
        many, advice = f"{kind}s", "put them into a store of their own"
        if kind == "index":
            many, advice = "indices", "give them by a source of kind index"
        report.add(
            "warning", f"{many} among stocks", source,
            f"{len(names)} code(s) are those of {many}, and will count as stocks of "
            f"this store; {advice}",
            pd.DataFrame({"instrument": names}),
        )  # fmt: skip
    if not kinds:
        report.ok("nothing but shares", source)


def _whole_calendar(
    raw: pd.DataFrame, mapping: VendorMapping, source: str, report: Report
) -> None:
    """Refuse bars of weeks, and days on which no stock has a row."""
    check = "missing trading days"
    days = pd.DatetimeIndex(np.sort(raw["date"].unique()))
    step = np.diff(days) / np.timedelta64(1, "D")
    if len(days) >= 5 and np.median(step) > 3:
        report.add(
            "error", check, source,
            f"days are {np.median(step):g} apart at the median: bars of weeks or "
            "months? A store of days needs those of each day", count=len(days),
        )  # fmt: skip
        return
    if (step > _LONG_GAP).any():
        at = np.flatnonzero(step > _LONG_GAP)
        ends = [{*raw.loc[raw["date"] == days[k + j], "instrument"]}
                for k in at.tolist() for j in (0, 1)]  # fmt: skip
        # one may be suspended so long, but not two from and to the same day
        two = any(len(a & b) > 1 for a, b in zip(ends[::2], ends[1::2], strict=True))
        report.add(
            "error" if two else "warning", check, source,
            "no stock has a row for longer than any holiday: "
            "missing files, or wrong dates?",
            pd.DataFrame({"after": days[at], "until": days[at + 1]}),
        )  # fmt: skip
    elif mapping.codes == "cn" and len(days):
        # of few stocks none may trade on a day
        few = raw.groupby("date").size().median() < 10
        check_weekdays(days, days[0], True, source, report, few=few, holidays=False)


def check_weekdays(
    days: pd.DatetimeIndex,
    end: pd.Timestamp,
    cn: bool,
    source: str,
    report: Report,
    few: bool = False,
    holidays: bool = True,
) -> None:
    """Refuse weekdays without bars that no Chinese holiday explains; warn of others.

    Parameters
    ----------
    days : DatetimeIndex
        Days with bars, sorted.
    end : Timestamp
        The day before them, such as the last one of a store.
    cn : bool
        Whether the exchange is Chinese.
    source : str
        Name for the findings.
    report : Report
        Receives the findings.
    few : bool, default False
        Warn of them all: of a few stocks none may trade on a day.
    holidays : bool, default True
        Warn of those that a holiday explains.
    """
    check = "missing trading days"
    if not len(days):
        return
    skipped = pd.bdate_range(end + pd.Timedelta(days=1), days.max()).difference(days)
    if cn:
        skipped = skipped[~fixed_holidays(skipped)]
    wrong = unexplained_weekdays(skipped) & cn
    if wrong.any():
        report.add(
            "warning" if few else "error", check, source,
            f"no stock has bars on these days between {end:%Y-%m-%d} and "
            f"{days.max():%Y-%m-%d}, and no holiday falls there; deliver them too",
            pd.DataFrame({"date": skipped[wrong]}),
        )  # fmt: skip
    if holidays and (~wrong).any():
        report.add(
            "warning", check, source, "weekdays without bars: holidays?",
            pd.DataFrame({"date": skipped[~wrong]}),
        )  # fmt: skip
    if not (wrong.any() or (holidays and len(skipped))):
        report.ok(check, source)


def _limits(
    raw: pd.DataFrame,
    usable: np.ndarray,
    mapping: VendorMapping,
    source: str,
    report: Report,
) -> None:
    """Refuse limit prices of another unit, day or board than their previous close's."""
    names = [n for n in ("limit_up", "limit_down") if n in raw]
    if not names or mapping.codes != "cn" or mapping.prices != "raw":
        return
    check = "limit prices"
    rows = raw.loc[usable, ["instrument", "date", "close", *names]]
    if "preclose" in raw:
        base = raw.loc[usable, "preclose"].to_numpy()
    else:
        base = rows.groupby("instrument")["close"].shift().to_numpy()
    board = daily_limit(rows["instrument"], rows["date"]) - _LIMIT_MARGIN
    off = np.zeros(len(rows), dtype=bool)
    known, slip = off.copy(), off.copy()
    for name in names:
        limit, sign = rows[name].to_numpy(), 1 if name == "limit_up" else -1
        with np.errstate(divide="ignore", invalid="ignore"):
            there = (limit > 0) & (base > 0)
            near = [
                np.abs(limit - base * (1 + sign * share)) <= 0.011
                for share in (board, 0.05, 0.1 * (board > 0.15))
            ]
            slip |= there & (powers(limit / base, 2) != 0)
        known |= there
        off |= there & ~np.any(near, axis=0)
    if slip.any():
        report.add(
            "error", "unit slip", source, "limit prices are a power of ten off the "
            "previous close: set `units`, or mend these rows", rows[slip],
        )  # fmt: skip
    elif known.sum() >= 20 and off.sum() > 0.2 * known.sum():
        report.add(
            "error", check, source,
            f"on {off.sum() / known.sum():.0%} of the rows the limits are not those of "
            "the board and the previous close: of another day, or another board's?",
            rows[off],
        )  # fmt: skip
    else:
        report.ok(check, source)


def _columns_in_place(
    raw: pd.DataFrame,
    usable: np.ndarray,
    mapping: VendorMapping,
    source: str,
    report: Report,
) -> None:
    """Refuse an open that is the close, and a previous close that is another's."""
    names = [c for c in ("open", "close", "preclose") if c in raw]
    rows = raw.loc[usable, ["instrument", "date", *names]]
    same = rows["instrument"].eq(rows["instrument"].shift()).to_numpy()
    if swapped(rows["open"].to_numpy(), rows["close"].to_numpy(), same):
        report.add(
            "error", "open and close", source,
            "opens lie farther from the close before than closes from the open before: "
            "are the two columns swapped?", count=len(rows),
        )  # fmt: skip
    else:
        report.ok("open and close", source)
    if "preclose" not in raw or mapping.prices != "raw":
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        step = (rows["preclose"] / rows["close"].shift()).to_numpy()
    known = same & np.isfinite(step) & (step > 0)
    off = known & (np.abs(step - 1) > 1e-3)
    slip = known & (powers(step, 2) != 0)
    if known.sum() >= 20 and off.sum() > 0.2 * known.sum():
        report.add(
            "error", "previous close", source,
            f"on {off.sum() / known.sum():.0%} of the days the previous close is not "
            "the close of the row before, as ex-dates alone should be: another column, "
            "or one that is a row off?", rows[off],
        )  # fmt: skip
        return
    if slip.any():
        report.add(
            "error", "unit slip", source, "the previous close is a power of ten off "
            "the close of the row before: in fen, or a digit lost?", rows[slip],
        )  # fmt: skip
    slot = np.searchsorted(np.sort(raw["date"].unique()), rows["date"])
    next_day = same & (np.diff(slot, prepend=-1) == 1)
    days = pd.DataFrame({"stocks": known, "above_last_close": off & (step > 1)})
    by = days[next_day].groupby(rows["date"].to_numpy()[next_day]).sum()
    bad = (by["stocks"] >= 10) & (by["above_last_close"] > _ABOVE * by["stocks"])
    last = rows["close"].shift().where(same)
    pairs = exchanged(rows.assign(last=last)[off])
    if bad.any():
        report.add(
            "error", "previous close", source,
            "on these days the previous closes of many stocks lie above the closes of "
            "the row before, which no ex-date does: were those bars taken before their "
            "close (a snapshot at midday)?",
            by[bad].rename_axis("date").reset_index(),
        )  # fmt: skip
    elif len(pairs):
        report.add("error", "previous close", source, EXCHANGED, pairs)
    else:
        report.ok("previous close", source)
    blind = same & ~(rows["preclose"] > 0).to_numpy() & (mapping.factor == "preclose")
    if blind.any():
        report.add(
            "error" if blind.sum() > 0.01 * len(rows) else "warning",
            "no previous close", source,
            "traded days without a previous close, from which the factor is made: "
            "ex-dates on them would be taken for returns", rows[blind],
        )  # fmt: skip
    behind = off & ~next_day & (mapping.factor == "preclose")
    if behind.any():
        report.add(
            "warning", "ex-dates behind days without rows", source,
            "the previous close is not the last close that is known, and the days "
            "between have no rows: ex-dates of a suspension, or lost rows whose moves "
            "will count as dividends", rows[behind],
        )  # fmt: skip


#: What `exchanged` found.
EXCHANGED = (
    "the previous close of each of two stocks is the other's last close: rows under "
    "each other's codes?"
)


def exchanged(off: pd.DataFrame) -> pd.DataFrame:
    """Pairs of stocks whose previous closes are each other's last closes.

    Parameters
    ----------
    off : DataFrame
        ``instrument``, ``date``, ``preclose`` and ``last``, the last close that is
        known, of rows where the two differ.
    """
    rows = off[["instrument", "date", "preclose", "last"]].round(3)
    pairs = rows.merge(
        rows, left_on=["date", "preclose"], right_on=["date", "last"],
        suffixes=("", "_of"),
    )  # fmt: skip
    pairs = pairs[pairs["last"] == pairs["preclose_of"]]
    pairs = pairs[pairs["instrument"] < pairs["instrument_of"]]
    return pairs.drop(columns=["preclose_of", "last_of"], errors="ignore")


def powers(ratio: Any, least: int = 1, near: float = NEAR) -> np.ndarray:
    """Power of ten that each ratio is near to, a day's move aside; 0 if it is none.

    Parameters
    ----------
    ratio : ndarray
    least : int, default 1
        Smaller powers, up or down, count as 0.
    near : float
        Largest relative distance.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log10(np.asarray(ratio, np.float64))
        power = np.where(np.isfinite(log), np.round(log), 0.0)
        close = np.abs(10.0 ** (log - power) - 1) <= near
    return np.where(close & (np.abs(power) >= least), power, 0.0).astype(int)


def off_by_powers(
    value: pd.Series, stock: pd.Series, near: float = NEAR, *, leaps: bool = False
) -> np.ndarray:
    """Rows in which a stock's value is a power of ten off that of most of its rows.

    Nothing that is near to a price or a number of shares changes by a hundred from one
    day to the next. By ten it may: that counts where it goes both ways.

    Parameters
    ----------
    value, stock : Series [n]
        In the order of stocks and days; what is not above 0 is unknown.
    near : float
        See `powers`.
    leaps : bool, default False
        Any change by a hundred or more counts, not those near to a power of ten only.
    """
    out = np.zeros(len(value), dtype=bool)
    rows = np.flatnonzero((value > 0).to_numpy() & np.isfinite(value.to_numpy()))
    if len(rows) < 2:
        return out
    values, names = value.to_numpy()[rows], pd.factorize(stock)[0][rows]
    step = powers(values[1:] / values[:-1], near=near)
    if leaps:
        far = np.log10(values[1:] / values[:-1])
        step = np.where(np.abs(far) >= 2, np.round(far), step)
    step = step * (names[1:] == names[:-1])
    level = pd.DataFrame({"stock": names, "step": np.r_[0, step]})
    if not step.any():
        return out
    level = level[level["stock"].isin(level.loc[level["step"] != 0, "stock"])]
    for _, x in level.groupby("stock")["step"]:
        if x.abs().max() > 1 or x.min() * x.max() < 0:
            power = x.cumsum()
            out[rows[x.index[power != power.mode()[0]]]] = True
    return out


def infinite(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Rows of each number column that are infinite or beyond float32; {} if none."""
    out = {}
    for name in frame.select_dtypes("number"):
        with np.errstate(invalid="ignore"):
            mask = np.abs(frame[name].to_numpy(np.float64)) > np.finfo(np.float32).max
        if mask.any():
            out[str(name)] = mask
    return out


def _missing_factor(
    raw: pd.DataFrame, traded: np.ndarray, source: str, report: Report, bad: np.ndarray
) -> None:
    missing = traded & ~(raw["factor"].to_numpy() > 0)
    if not missing.any():
        report.ok("every traded day has a factor", source)
        return
    by_stock = raw[missing].groupby("instrument")["date"].agg(["min", "max", "size"])
    rows = by_stock.set_axis(["first", "last", "days"], axis=1).reset_index()
    message = (
        f"{len(rows)} stock(s) have traded days without a factor above 0; fetch it, or "
        "leave these rows out with --drop-bad-rows"
    )
    bad |= report.bad_rows(
        "no factor", source, message, raw, missing, [*rows.columns], examples=rows
    )


def incomplete_days(
    raw: pd.DataFrame, source: str, report: Report, *, full: bool = True
) -> None:
    """Compare the rows of each day with those of the five days on either side.

    The last day has neighbours on one side only and cannot be mended by an update, so
    it is an error. Days in the middle are warned of: a mass suspension looks alike.

    Parameters
    ----------
    raw : DataFrame
        ``date``, one row per stock and day.
    source : str
        Name for the findings.
    report : Report
        Receives the findings.
    full : bool, default True
        False leaves out the ends, which an update compares with its store.
    """
    check = "incomplete days"
    traded = raw["traded"] if "traded" in raw else pd.Series(True, raw.index)
    by = traded.groupby(raw["date"])
    rows = by.sum().sort_index()
    idle = rows[(rows == 0) & (by.size() >= _MANY)]
    if len(idle):
        report.add(
            "error", "days without trade", source,
            "many stocks have a row and none has a volume: a holiday, or volumes that "
            "are lacking? Leave these days out, or complete them",
            idle.rename("traded").reset_index(),
        )  # fmt: skip
    usual = usual_rows(rows)
    thin = (usual >= _MANY) & is_thin(rows, usual) & ~rows.index.isin(idle.index)
    frame = pd.DataFrame({"date": rows.index, "rows": rows, "usual": usual})
    message = (
        "far fewer stocks trade than on the days around: an interrupted download? "
        "Stocks without a row or a volume that day count as suspended or delisted"
    )
    last = thin & (rows.index == rows.index[-1])
    if full and last.any():
        report.add("error", check, source, f"the last day: {message}", frame[last])
    middle = thin & ~last
    if middle.any():
        report.add("warning", check, source, message, frame[middle])
    if not thin.any():
        report.ok(check, source)
        if full and len(rows) > 1:
            names, there = (
                raw.loc[raw["date"] == d, "instrument"] for d in rows.index[-2:]
            )
            end_before_last(names, there, rows.index[-1], source, report)


def end_before_last(
    before: pd.Series,
    last: pd.Series,
    day: pd.Timestamp,
    source: str,
    report: Report,
) -> None:
    """Note stocks with a row on the last day but one and none on the last.

    Whether they are suspended or delisted shows later only. Until then they are not
    members on the last day, labels hold them at their last price either way, and an
    update goes on with their history.
    """
    names = before[~before.isin(last)].sort_values()
    if len(names):
        report.add(
            "note", "no row on the last day", source,
            f"{len(names)} stock(s) traded the day before {day:%Y-%m-%d} and have no "
            "row on it: taken as suspended, not as delisted, so that an update goes "
            "on with them",
            names.to_frame("instrument"),
        )  # fmt: skip


def _steps(raw: pd.DataFrame, traded: np.ndarray, source: str, report: Report) -> bool:
    """Refuse days that repeat the one before, or on which all stocks change level.

    Returns whether they do change.
    """
    used = {"instrument", "date", "factor", "preclose", *_OHLC, *LEVELS}
    rows = raw.loc[traded, [name for name in raw if name in used]]
    stock, date = rows["instrument"], rows["date"].to_numpy()
    follows = stock.eq(stock.shift())
    same = follows.to_numpy()
    keys = [name for name in (*_OHLC, "volume") if name in rows]
    # a suspended stock's last price, or a bond that hardly trades, repeats as well
    again = repeats(rows[keys], follows)
    bad = repeated_days(again, follows, rows["date"], 0.2 if "volume" in keys else 0.5)
    if len(bad):
        report.add(
            "error", "repeated bars", source,
            "bars are those of the day before under a new date",
            bad.rename(columns={"sum": "stocks", "size": "of"}).reset_index(),
        )  # fmt: skip
    else:
        report.ok("repeated bars", source)
        stale = again & again.shift(fill_value=False) & ("volume" in keys)
        if stale.any():
            report.add(
                "warning", "repeated bars", source,
                "a stock's bar, volume and all, stands on three days or more in a row: "
                "a feed that was stuck?", rows[stale], columns=["instrument", "date"],
            )  # fmt: skip
    found = []
    for name, most in LEVELS.items():
        if name not in rows:
            continue
        value = rows[name].to_numpy(np.float64)
        if name in _PRICES and "factor" in rows:
            value = value * rows["factor"].to_numpy()
        elif name in _PRICES and "preclose" in rows:
            continue  # ex-dates of many stocks may fall on a day
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.log(value)
        step = pd.Series(np.diff(log, prepend=np.nan)).where(same)
        by = step[np.isfinite(step)].groupby(date[np.isfinite(step)])
        middle = by.median()[by.size() >= 10]
        far = middle[middle.abs() > np.log(most)]
        if name not in _PRICES:  # the day before may have been without trade
            far = far[[_left(log, stock, date, day, x, most) for day, x in far.items()]]
        found += [(day, name, float(np.exp(x))) for day, x in far.items()]
    if not found:
        report.ok("levels", source)
        return False
    report.add(
        "error", "levels", source,
        "the median stock changes its level from one day to the next, by a factor that "
        "no market moves: another unit from that day on?",
        pd.DataFrame(sorted(found), columns=["date", "field", "times"]),
    )  # fmt: skip
    return True


def _left(
    log: np.ndarray,
    stock: pd.Series,
    date: np.ndarray,
    day: pd.Timestamp,
    step: float,
    most: float,
) -> bool:
    """Whether the median stock's step leads away from its ten days before as well."""
    days = np.unique(date[date < day.to_datetime64()])[-10:]
    past = np.isin(date, days) & np.isfinite(log)
    now = (date == day.to_datetime64()) & np.isfinite(log)
    usual = pd.Series(log[past]).groupby(stock.to_numpy()[past]).median()
    off = np.nanmedian(log[now] - stock[now].map(usual).to_numpy(np.float64))
    return bool(np.sign(step) * off > np.log(most))


def _bad_order(
    raw: pd.DataFrame, usable: np.ndarray, mapping: VendorMapping
) -> np.ndarray:
    o, h, low, c = (raw[name].to_numpy() for name in _OHLC)
    # adjusted prices are rounded one by one, so they may miss by the last digits
    slack = 1e-6 if mapping.prices == "raw" else 1e-4
    top, bottom = np.maximum(o, c), np.minimum(o, c)
    wrong = (h < np.maximum(top, low) * (1 - slack)) | (low > bottom * (1 + slack))
    return usable & wrong


def _mean_price(
    raw: pd.DataFrame, usable: np.ndarray, mapping: VendorMapping, finding: object
) -> None:
    """Compare amount / volume with the bar's prices."""
    assert callable(finding)
    volume, amount = raw["volume"].to_numpy(), raw["amount"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(usable & (volume > 0) & (amount > 0), amount / volume, np.nan)
        ratio = mean / raw["close"].to_numpy()
    if mapping.prices == "raw":
        slip = (ratio > _SLIP) | (ratio < 1 / _SLIP)
        outside = (mean > raw["high"].to_numpy() * 1.01) | (
            mean < raw["low"].to_numpy() * 0.99
        )
        finding(
            "warning",
            "amount/volume off the bar",
            usable & outside & ~slip,
            "the mean price lies more than 1 % outside low to high",
            "low",
            "high",
            "amount",
            "volume",
        )
    else:
        slip = _slip_of_adjusted(np.log(ratio), raw["instrument"].to_numpy())
    slip = usable & np.nan_to_num(slip, nan=False).astype(bool)
    typical_ratio = np.nanmedian(ratio[slip]) if slip.any() else 1.0
    finding(
        "error",
        "unit slip",
        slip,
        f"amount/volume is about {typical_ratio:.3g} times the close: lots for shares, "
        "or thousand CNY for CNY? Set `units` in the mapping, one file per unit",
        "close",
        "amount",
        "volume",
    )


def _between_ticks(raw: pd.DataFrame, usable: np.ndarray) -> np.ndarray:
    """Find closes of shares off the tick of 0.01, of stocks that have many such."""
    close = raw["close"].to_numpy()
    # shares in CNY, whose tick is 0.01; funds, bonds and B shares have 0.001
    shares = [x for x in raw["instrument"].unique() if kind_of(x) == "share"]
    share = raw["instrument"].isin(shares).to_numpy()
    off = usable & share & (np.abs(close * 100 - np.round(close * 100)) > 0.02)
    of = pd.Series(off[usable]).groupby(raw["instrument"].to_numpy()[usable]).mean()
    return off & raw["instrument"].isin(of.index[of > 0.1]).to_numpy()


def _slip_of_adjusted(log: np.ndarray, stock: np.ndarray) -> np.ndarray:
    """Rows whose log of mean price over adjusted close is no matter of adjustment.

    A real ratio moves by single ex-dates and is near 1 on the first day of a listing if
    prices are adjusted backward, on the last day if forward. Backward, an old stock's
    close may be 169 times its mean price, on all days of files that begin later. So a
    slip is a sudden change by 30, a stock far off at the end where the others agree and
    no such adjustment leads, or a market of which hardly a stock is near 1 at any end
    and whose stocks are all about as far from it.
    """
    known = np.isfinite(log)
    series = pd.Series(log[known])
    group = stock[known]
    jumps = series.groupby(group).diff().abs() > np.log(30.0)
    run = jumps.groupby(group).cumsum()
    # levels of the runs between sudden changes, against the longest run of the stock
    table = (
        pd.DataFrame({"stock": group, "run": run, "log": series})
        .groupby(["stock", "run"])["log"].agg(["median", "size"]).reset_index()
    )  # fmt: skip
    longest = table.sort_values("size").drop_duplicates("stock", keep="last")
    main = longest.set_index("stock")["median"]
    table["off"] = (table["median"] - table["stock"].map(main)).abs() > np.log(20.0)
    off = dict(zip(zip(table["stock"], table["run"], strict=True), table["off"],
                   strict=True))  # fmt: skip
    slip = np.zeros(len(log), dtype=bool)
    slip[known] = [off[key] for key in zip(group, run, strict=True)]

    inside = pd.Series(np.where(slip[known], np.nan, series)).groupby(group)
    first, last = inside.first(), inside.last()
    anchor = first.abs().combine(last.abs(), np.fmin)
    backward = (last < 0) & (last > -np.log(_OLDEST))
    spread = last.quantile(0.9) - last.quantile(0.1)
    if len(anchor) >= 5 and anchor.quantile(0.1) > np.log(_SLIP):
        grown = bool(backward.all()) and spread > np.log(2.0)
        wrong = set() if grown else set(anchor.index)
    elif len(anchor) >= 5 and (last.abs() < np.log(_SLIP)).mean() > 0.8:
        wrong = set(last.index[(last.abs() > np.log(60.0)) & ~backward])
    else:
        wrong = set(anchor.index[anchor > np.log(1000.0)])
    if wrong:
        slip |= np.isin(stock, list(wrong)) & known
    return slip


def _flows(raw: pd.DataFrame, usable: np.ndarray, finding: Any) -> None:
    """Hold flows by order size against the amount, and what is bought against sold.

    A trade is bought once and sold once, so all classes together are at most twice the
    amount, and about once where aggressors alone are counted.
    """
    names = [name for name in FLOW_FIELDS if name in raw]
    if not names:
        return
    flow = raw[names].where(pd.Series(usable, raw.index), axis=0)
    below = (flow < 0).any(axis=1).to_numpy()
    finding("error", "negative flow", below, "a flow is below 0", *names)
    pairs = [(f"flow_buy_{x}", f"flow_sell_{x}") for x in FLOW_CLASSES]
    sums = flow.sum()
    for buy, sell in pairs:
        if {buy, sell} <= set(names) and powers(sums[buy] / sums[sell], 2):
            finding(
                "error", "unit slip", usable, f"{buy} is {sums[buy] / sums[sell]:.3g} "
                f"times {sell} in sum: set their `units`", buy, sell,
            )  # fmt: skip
    value = [c for c in ("amount", "volume") if c in raw]
    if not value or len(names) < len(FLOW_FIELDS):
        return
    amount = raw["amount"] if "amount" in raw else raw["volume"] * raw["close"]
    share = (flow.sum(axis=1, min_count=1) / amount.where(amount > 0)).where(usable)
    middle = share.groupby(raw["instrument"]).transform("median")
    slip = (share > _MOST_FLOW) | (middle < 1 / _SLIP)
    finding(
        "error", "unit slip", slip.to_numpy(),
        f"the flows of all classes sum to {share[slip].median():.3g} times the amount, "
        "of which each trade is bought once and sold once: set `units` of the flows, "
        "or mend these rows", *value,
    )  # fmt: skip


def _unit_levels(
    raw: pd.DataFrame,
    usable: np.ndarray,
    mapping: VendorMapping,
    source: str,
    report: Report,
) -> None:
    """Compare levels of prices, volume, turnover and sizes with what markets have."""
    rows = raw[usable]
    if mapping.codes == "cn" and mapping.prices == "raw" and mapping.of_kind("bars"):
        if slip := price_level(rows):
            report.add("error", "unit slip", source, slip, count=len(rows))
        else:
            report.ok("price level", source)
        if "volume" in raw and "amount" not in raw and len(rows):
            middle = float(rows["volume"].median())
            if middle < FEW_SHARES:
                report.add(
                    "warning", "volume level", source,
                    f"the median stock trades {middle:,.6g} shares a day, very few: "
                    "lots? Then `units: {volume: lots}`; an `amount` would tell",
                    count=len(rows),
                )  # fmt: skip
            if names := odd_lots(rows):
                report.add(
                    "error", "volumes of some stocks", source,
                    f"volumes of {len(names)} stock(s) are no whole lots, as those of "
                    "all others are: in lots, where others are in shares? Give them a "
                    "mapping of their own, or multiply them by 100",
                    pd.DataFrame({"instrument": names}),
                )  # fmt: skip
    if "is_st" in raw and len(rows) and float((rows["is_st"] != 0).mean()) > 0.5:
        report.add(
            "warning", "flag of special treatment", source, "`is_st` is set on most "
            "rows: is the flag 1 on days without it?", count=len(rows),
        )  # fmt: skip
    measures: dict[str, tuple[str, str | None]] = {"turnover": ("turnover", None)}
    measures["volume / float_shares"] = ("volume", "float_shares")
    if "turnover" not in raw:
        measures["amount / market_cap"] = ("amount", "market_cap")
    for what, (name, over) in measures.items():
        if name not in raw or (over and over not in raw):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            turnover = (raw[name] / raw[over] if over else raw[name]).to_numpy()[usable]
        high = float(np.nanmean(turnover > 1.0)) if len(turnover) else 0.0
        mid = float(np.nanmedian(turnover)) if np.isfinite(turnover).any() else np.nan
        least = _FEWEST_TURNOVER[rows["instrument"].nunique() >= 10]
        if high > 0.01 or mid < least:
            report.add(
                "error",
                "unit slip",
                source,
                f"{what} has a median of {mid:.3g} and is above 1 on {high:.1%} of "
                "the rows; as a fraction of float shares it is 0.001 to 0.1 a day: set "
                + (
                    f"`units` of {name} and {over}"
                    if over
                    else "`units.turnover` to percent or fraction"
                ),
                count=len(turnover),
            )
        else:
            report.ok(f"{what} level", source)
        of = pd.Series(turnover).groupby(rows["instrument"].to_numpy()).median()
        low = of.index[of < _RARE_TURNOVER]
        if len(low) and len(of) >= 10 and mid >= least:
            report.add(
                "warning", "turnover level", source,
                f"{what} of {len(low)} stock(s) is below {_RARE_TURNOVER:.2%} on the "
                "median day, as hardly a stock's: another unit than the others'?",
                pd.DataFrame({"instrument": low}),
            )  # fmt: skip
    if {"turnover", "volume", "float_shares"} <= set(raw):
        share = rows["volume"] / rows["float_shares"]
        gap = (rows["turnover"] - share).abs()
        off = gap > 0.5 * np.fmax(rows["turnover"], share) + 1e-4  # of rounding
        if off.any():
            report.add(
                "warning", "turnover and float_shares", source,
                "the turnover is not volume / float_shares: other shares are meant, or "
                "one of the three is wrong there", rows[off],
                columns=["instrument", "date", "volume", "turnover", "float_shares"],
            )  # fmt: skip
        else:
            report.ok("turnover and float_shares", source)
    if {"turnover", "market_cap", "amount"} <= set(raw.columns):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (
                raw["turnover"] * raw["market_cap"] / raw["amount"]
            ).to_numpy()[usable]  # fmt: skip
        known = np.isfinite(ratio) & (ratio > 0)
        stock = rows["instrument"].to_numpy()[known]
        ratio = ratio[known]
        each = pd.Series(ratio).groupby(stock).median()
        mid = float(np.median(ratio)) if len(ratio) else 1.0
        odd = each.index[powers(each / mid, 2) != 0]
        if not 1 / _SLIP < mid < _SLIP:
            report.add(
                "error",
                "unit slip",
                source,
                f"turnover x market cap is {mid:.3g} times the amount (median); one of "
                "the three has another unit than the mapping says",
                count=len(ratio),
            )
        elif len(odd):
            report.add(
                "error", "unit slip", source,
                f"turnover x market cap over the amount is a power of ten off in "
                f"{len(odd)} stock(s), beside the others: one of the three has another "
                "unit there; mend their rows", pd.DataFrame({"instrument": odd}),
            )  # fmt: skip
        else:
            report.ok("turnover x market cap = amount", source)


def check_store_bars(
    bars: pd.DataFrame,
    raw: pd.DataFrame,
    mapping: VendorMapping,
    source: str,
    report: Report,
    *,
    fresh: frozenset[str] | None = None,
    last: pd.Series | None = None,
) -> None:
    """Check returns and factors of converted bars (same rows as `raw`).

    Parameters
    ----------
    bars, raw : DataFrame
        Output and input of `convert.stock_bars`.
    mapping : VendorMapping
        Says of which close the vendor's percent change is.
    source : str
        Name for the findings.
    report : Report
        Receives the findings.
    fresh : frozenset of str, optional
        Stocks whose first row is their listing, or at least the first we see; their
        first five days have no limit. None means all.
    last : Series, optional
        By instrument, the factor of the store's last day.
    """
    change = bars["change"].to_numpy()
    factor = bars["factor"]
    stock = bars["instrument"]
    day = bars["close"].notna().groupby(stock).cumsum()
    young = day <= 5
    if fresh is not None:
        young &= stock.isin(fresh)
    before = factor.groupby(stock).ffill().groupby(stock).shift()
    if last is not None:
        before = before.fillna(stock.map(last))
    step = (factor / before).to_numpy()
    limit = daily_limit(stock, bars["datetime"])
    with np.errstate(invalid="ignore"):
        no_step = ~(np.abs(step - 1) > 1e-6)
        jump = (np.abs(change) > limit) & no_step & ~young.to_numpy()
        wild = (np.abs(change) > limit) & ~no_step & ~young.to_numpy()
        split = np.abs(np.log1p(change)) > np.log(1.35)
        falls = step < 1 - 1e-6
        calm = np.abs((1 + change) / step - 1) <= limit
        absurd = calm & (np.abs(np.log(step)) > np.log(_SLIP)) & (mapping.codes == "cn")
    shown = pd.DataFrame(
        {
            "instrument": stock,
            "date": bars["datetime"],
            "close": raw["close"].to_numpy(),
            "change": change,
            "factor_step": step,
        }
    )
    cases = (
        (
            "jumps without factor change",
            jump,
            "the adjusted close moves beyond the board's daily limit and the factor "
            "stays: a missing ex-date, a resumption, or a day without limits",
        ),
        (
            "jumps despite factor change",
            wild,
            "the factor changes and the adjusted close still moves beyond the limit: "
            "a wrong factor or a wrong ex-date?",
        ),
        (
            "factor falls",
            falls,
            "the factor goes down, which dividends and splits never do (a reverse "
            "split, or a vendor's rounding)",
        ),
    )
    rolled = bool(mapping.of_kind("futures"))  # a roll's factor goes either way
    for check, mask, message in cases[:2] if rolled else cases:
        if check == "factor falls" and mask.sum() > max(4, 0.5 * (~no_step).sum()):
            report.add(
                "error", check, source,
                f"{int(mask.sum())} of {int((~no_step).sum())} changes of the factor "
                "are falls: is it one to divide by, as Sina's qfq_factor? Take the "
                "factor to multiply by (hfq)", shown[mask],
            )  # fmt: skip
        elif fresh is not None and check == cases[0][0] and (mask & split).any():
            report.add(
                "error", check, source, "the close of an update moves by more than a "
                "third and the factor stays: a split or another stock's price, and "
                "appended days stay for good", shown[mask & split],
            )  # fmt: skip
        elif check == "factor falls" and (powers(step, 2) < 0).any():
            report.add(
                "error", check, source, "the factor falls to a hundredth or less, as "
                "in no reverse split: a price in another unit?",
                shown[powers(step, 2) < 0],
            )  # fmt: skip
        elif check == cases[1][0] and (mask & absurd).any():
            report.add(
                "error", check, source, "the factor changes as by no dividend or "
                "split, and the price moves within its limit: a wrong factor or "
                "previous close there? Mend it", shown[mask & absurd],
            )  # fmt: skip
        elif last is not None and check == cases[1][0] and (mask & calm).any():
            report.add(
                "error", check, source, "the price moves within its limit, and by the "
                "factor beyond it: was the factor revised since the last update? "
                "Appended days stay for good; rebuild with --overwrite",
                shown[mask & calm],
            )  # fmt: skip
        elif mask.any():
            rows = shown[mask]
            rows = rows.reindex(rows["change"].abs().sort_values().index[::-1])
            report.add("warning", check, source, message, rows)
        else:
            report.ok(check, source)
    if "pct_change" in raw or ("preclose" in raw and mapping.factor == "column"):
        _vendor_change(bars, raw, mapping, shown, source, report)
    _volume_at_splits(bars, raw, mapping, source, report)


def _vendor_change(
    bars: pd.DataFrame,
    raw: pd.DataFrame,
    mapping: VendorMapping,
    shown: pd.DataFrame,
    source: str,
    report: Report,
) -> None:
    """Compare our returns with the vendor's percent change, or previous close."""
    if "pct_change" not in raw:  # beside a factor: ex-right, as that is
        ours = bars["change"].to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            own = (raw["close"] / raw["preclose"].where(raw["preclose"] > 0)) - 1
        raw = raw.assign(pct_change=own)
    elif mapping.pct_change_of == "adjusted":
        ours = bars["change"].to_numpy()
    else:
        close = raw["close"].where(raw["traded"])
        last = close.groupby(raw["instrument"]).ffill()
        ours = (close / last.groupby(raw["instrument"]).shift() - 1).to_numpy()
    vendor = raw["pct_change"].to_numpy()
    # half a unit of the vendor's second decimal of a percent, and half a cent of price
    slack = 6e-5 + 0.006 / np.maximum(raw["close"].to_numpy(), 0.01)
    with np.errstate(invalid="ignore"):
        off = np.abs(ours - vendor) > slack
    check = "vendor's own return"
    moved = np.abs(ours) > 0.005
    with np.errstate(divide="ignore", invalid="ignore"):
        slip = (powers(np.abs(vendor / ours), 2) != 0)[moved]
    stock = raw["instrument"].to_numpy()[moved]
    by = pd.Series(slip).groupby(stock).agg(["mean", "size"])
    names = by.index[(by["mean"] > 0.8) & (by["size"] >= _FEWEST)]
    if len(names) or (len(slip) >= _FEWEST and slip.mean() > 0.8):
        report.add(
            "error", "unit slip", source, "the vendor's percent change is another "
            f"multiple of the return from our prices, in {len(names) or 'all'} "
            "stock(s): set `units.pct_change` to percent or fraction",
            shown.assign(vendor_change=vendor)[off],
        )  # fmt: skip
    elif off.any():
        rows = shown.assign(vendor_change=vendor)[off]
        report.add(
            "warning",
            check,
            source,
            "the return from our prices and factors differs from the vendor's own",
            rows,
        )
    else:
        report.ok(check, source)


def _volume_at_splits(
    bars: pd.DataFrame,
    raw: pd.DataFrame,
    mapping: VendorMapping,
    source: str,
    report: Report,
) -> None:
    """Warn if the stored volume jumps at splits: volume and prices of two bases.

    The split is the factor's step, or that of amount / volume over the close where the
    vendor adjusts prices and gives no factor.
    """
    if "volume" not in bars:
        return
    check = "volume at splits"
    traded = bars["close"].notna().to_numpy() & (bars["volume"] > 0).to_numpy()
    stock = bars["instrument"].to_numpy()[traded]
    volume = np.log(bars["volume"].to_numpy()[traded])
    if mapping.prices == "raw":
        level = np.log(bars["factor"].to_numpy()[traded])
    elif "amount" in raw:
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = raw["amount"].to_numpy() / raw["volume"].to_numpy()
            level = -np.log(mean / raw["close"].to_numpy())[traded]
    else:
        return
    groups = pd.Series(volume).groupby(stock)
    half = 5
    rolled = groups.rolling(half).median().droplevel(0).sort_index()
    after = rolled.groupby(stock).shift(-(half - 1))
    before = rolled.groupby(stock).shift()
    base = pd.Series(level).groupby(stock)
    # of three days either side, so a day's odd mean price is no split
    calm = base.rolling(3).median().droplevel(0).sort_index()
    step = calm.groupby(stock).shift(-2) - calm.groupby(stock).shift()
    split = (step > np.log(1.3)) & (base.diff() > 0.8 * step)
    split &= after.notna() & before.notna()
    if split.sum() < 10:
        report.ok(check, source)
        return
    jump = (after - before)[split]
    share = jump / step[split]
    # the volume of a stock that is split may rise on its own, so the median tells
    middle = float(share.median())
    if abs(middle) < 0.5:
        report.ok(check, source)
        return
    rows = bars.loc[traded, ["instrument", "datetime"]][split.to_numpy()]
    rows = rows.assign(split=np.exp(step[split]).to_numpy(),
                       volume_jump=np.exp(jump).to_numpy())  # fmt: skip
    why = (
        "prices are adjusted for splits and the volume is not; features of volume need "
        "turnover or amount instead"
        if mapping.prices == "adjusted"
        else "is the vendor's volume adjusted already? The store divides it by the "
        "factor"
    )
    report.add(
        "warning", check, source,
        f"at {int(split.sum())} splits the stored volume jumps, at the median by "
        f"{middle:.0%} of the split (in logs): {why}",
        rows,
    )  # fmt: skip


def one_company_twice(raw: pd.DataFrame, source: str, report: Report) -> None:
    """Look for codes whose bars are another's, of the same day or of days before.

    Of the same days they are a company under its old and new code; shifted, a history
    under the wrong dates or the wrong code.
    """
    check = "two codes with equal bars"
    traded = raw[raw["traded"]].rename(columns={"date": "datetime"})
    count = copies(traded)
    twins, late = (count[(count["days_late"] > 0) == k] for k in (False, True))
    if len(twins):
        report.add(
            "warning", check, source,
            f"{len(twins)} pair(s) of codes have the same bars: one company counts "
            "twice, renamed or merged? Put `renames: {OLD: NEW}` into the mapping",
            twins.drop(columns="days_late"),
        )  # fmt: skip
    if len(late):
        report.add(
            "error", "bars of another code", source,
            f"{len(late)} code(s) have the bars of another, days later: a history "
            "under the wrong code, or wrong dates?", late,
        )  # fmt: skip
    if count.empty:
        report.ok(check, source)


def renamed_codes(
    ends: pd.DataFrame, begins: pd.DataFrame, source: str, report: Report
) -> None:
    """Warn of codes that end where another begins at the same price.

    Parameters
    ----------
    ends : DataFrame
        ``instrument``, ``slot`` (of its last traded day), ``close`` (raw).
    begins : DataFrame
        ``instrument``, ``slot`` (of its first traded day), ``preclose``, or ``open``
        where the vendor gives no previous close.
    source : str
        Name for the findings.
    report : Report
        Receives the finding.
    """
    check = "renamed codes"
    price = "preclose" if "preclose" in begins else "open"
    # a new code keeps its exchange or its last digits, and trades on within days
    pairs = ends.merge(begins, how="cross", suffixes=("", "_new"))
    wait = pairs["slot_new"] - pairs["slot"]
    with np.errstate(invalid="ignore"):
        off = (pairs[price] / pairs["close"] - 1).abs()
    near = off < (1e-3 if price == "preclose" else 0.02)
    if price == "open":
        near &= pairs["instrument"].str[-3:] == pairs["instrument_new"].str[-3:]
    pairs = pairs[(wait > 0) & (wait <= 20) & near]
    if pairs.empty:
        report.ok(check, source)
        return
    n = pairs["instrument"].nunique()
    m = pairs["instrument_new"].nunique()
    report.add(
        "warning", check, source,
        f"{n} code(s) end, {m} begin at the same price: renamed? It is a delisting and "
        "a listing here, and the history is cut; put `renames: {OLD: NEW}` into the "
        "mapping and build anew",
        pairs.rename(columns={"instrument_new": "begins"}),
        columns=["instrument", "begins", "close", price],
    )  # fmt: skip
