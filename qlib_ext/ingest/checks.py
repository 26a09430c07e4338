"""Checks of vendor bars before anything is written.

An error is a value that would silently spoil features or back-tests (a duplicate that
disagrees, a broken bar, a unit slip); a warning is something a person should look at.
Every check adds one finding or one line to the list of those that found nothing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_handlers.boards import board_of, limit_ratio
from data_handlers.codes import CODE
from data_handlers.vendor.mapping import VendorMapping
from qlib_ext.ingest.report import Report

__all__ = ["check_bars", "daily_limit", "drop_duplicates"]

_OHLC = ["open", "high", "low", "close"]
_SLIP = 8.0  # a mean price this many times off the bar's prices is another unit
_THIN_DAY = 0.10
_LIMIT_MARGIN = 0.01


def drop_duplicates(raw: pd.DataFrame, source: str, report: Report) -> pd.DataFrame:
    """Sort by stock and day; drop rows given twice, report those that disagree."""
    raw = raw.sort_values(["instrument", "date"], kind="stable", ignore_index=True)
    repeated = raw.duplicated(["instrument", "date"], keep=False)
    if not repeated.any():
        report.ok("duplicate rows", source)
        return raw
    rows = raw[repeated]
    conflict = rows[~rows.duplicated(keep=False)]
    if len(conflict):
        report.add(
            "error",
            "duplicate rows",
            source,
            "the same stock and day is given twice with different values; keep one",
            conflict,
            columns=["instrument", "date", "close", "volume"],
        )
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
        Rows after it are errors. Default: the clock's day.
    index_days : DatetimeIndex, optional
        Days of the indices; a stock day inside their span but not among them is off
        the calendar.
    full : bool, default True
        Whether these are all days of the market; False (an update of a few days) skips
        the check of thin days.

    Returns
    -------
    ndarray of bool
        Rows with a row-level error, which ``--drop-bad-rows`` leaves out.
    """
    bad = np.zeros(len(raw), dtype=bool)
    traded = raw["traded"].to_numpy()

    def finding(
        level: str, check: str, mask: np.ndarray, message: str, *columns: str
    ) -> None:
        if mask.any():
            show = ["instrument", "date", *columns]
            report.add(level, check, source, message, raw[mask], columns=show)
            if level == "error":
                bad[mask] = True
        else:
            report.ok(check, source)

    today = pd.Timestamp.now().normalize() if today is None else today
    date = raw["date"]
    future = (date > today).to_numpy()
    finding(
        "error", "future dates", future, f"days after {today:%Y-%m-%d} cannot be known"
    )
    weekend = (date.dt.dayofweek >= 5).to_numpy()
    finding("error", "weekend dates", weekend, "no exchange trades on a weekend")
    if index_days is not None and len(index_days):
        inside = (date >= index_days[0]) & (date <= index_days[-1])
        off = (inside & ~date.isin(index_days)).to_numpy()
        finding(
            "error", "dates off the calendar", off, "the indices have no bar that day"
        )
    if full:
        _thin_days(raw, source, report)

    prices = raw[_OHLC].to_numpy()
    unknown = traded & np.isnan(prices).any(axis=1)
    finding("error", "missing prices", unknown, "a traded day lacks a price", *_OHLC)
    with np.errstate(invalid="ignore"):
        nonpositive = traded & (prices <= 0).any(axis=1)
    hint = "prices must be above 0"
    if mapping.prices == "adjusted":
        hint += " (subtractive forward adjustment does this; take raw prices)"
    finding("error", "non-positive prices", nonpositive, hint, *_OHLC)
    order = _bad_order(raw, traded & ~unknown & ~nonpositive, mapping)
    finding(
        "error",
        "OHLC order",
        order,
        "high or low does not bound open and close",
        *_OHLC,
    )
    usable = traded & ~unknown & ~nonpositive & ~order
    for name in ("volume", "amount", "turnover"):
        if name in raw:
            with np.errstate(invalid="ignore"):
                negative = traded & (raw[name].to_numpy() < 0)
            finding("error", f"negative {name}", negative, f"{name} is below 0", name)
    if "volume" in raw and "amount" in raw:
        _mean_price(raw, usable, mapping, finding)
    _unit_levels(raw, usable, source, report)
    if "market_cap" in raw:
        cap = traded & (raw["market_cap"].to_numpy() <= 0)
        finding("error", "market cap", cap, "market cap is not positive", "market_cap")
    return bad


def _thin_days(raw: pd.DataFrame, source: str, report: Report) -> None:
    """Warn of days on which hardly any of the listed stocks has a row."""
    days = np.sort(raw["date"].unique())
    span = raw.groupby("instrument")["date"].agg(["min", "max"])
    listed = np.searchsorted(np.sort(span["min"].to_numpy()), days, side="right")
    listed -= np.searchsorted(np.sort(span["max"].to_numpy()), days, side="left")
    rows = raw.groupby("date").size().reindex(days).to_numpy()
    thin = (listed >= 10) & (rows < _THIN_DAY * listed)
    if thin.any():
        frame = pd.DataFrame({"date": days, "rows": rows, "listed": listed})[thin]
        report.add(
            "warning",
            "dates off the calendar",
            source,
            "fewer than a tenth of the listed stocks have a row: a holiday? A trading "
            "day of the store is any day with a row",
            frame,
        )
    else:
        report.ok("thin days", source)


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
        # the adjustment is unknown, so only a sudden change of the ratio tells
        stock = raw["instrument"].to_numpy()
        log = np.log(ratio)
        typical = pd.Series(log).groupby(stock).transform("median").to_numpy()
        level = np.nanmedian(np.abs(typical)) if np.isfinite(typical).any() else 0.0
        slip = np.abs(log - typical) > np.log(30.0)
        # all rows slipped alike: most stocks far off, or one stock beyond any dividend
        slip |= (np.abs(typical) > np.log(60.0)) | (level > np.log(_SLIP))
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


def _unit_levels(
    raw: pd.DataFrame, usable: np.ndarray, source: str, report: Report
) -> None:
    """Compare the levels of turnover and market cap with what markets have."""
    if "turnover" in raw:
        turnover = raw["turnover"].to_numpy()[usable]
        high = float(np.nanmean(turnover > 1.0)) if len(turnover) else 0.0
        mid = float(np.nanmedian(turnover)) if np.isfinite(turnover).any() else np.nan
        if high > 0.01 or mid < 2e-5:
            report.add(
                "error",
                "unit slip",
                source,
                f"turnover has a median of {mid:.3g} and is above 1 on {high:.1%} of "
                "the rows; as a fraction of float shares it is 0.001 to 0.1 a day: set "
                "`units.turnover` to percent or fraction",
                count=len(turnover),
            )
        else:
            report.ok("turnover level", source)
    if {"turnover", "market_cap", "amount"} <= set(raw.columns):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (
                raw["turnover"] * raw["market_cap"] / raw["amount"]
            ).to_numpy()[usable]  # fmt: skip
        ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
        mid = float(np.median(ratio)) if len(ratio) else 1.0
        if not 1 / _SLIP < mid < _SLIP:
            report.add(
                "error",
                "unit slip",
                source,
                f"turnover x market cap is {mid:.3g} times the amount (median); one of "
                "the three has another unit than the mapping says",
                count=len(ratio),
            )
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
    """
    change = bars["change"].to_numpy()
    factor = bars["factor"]
    stock = bars["instrument"]
    day = bars["close"].notna().groupby(stock).cumsum()
    young = day <= 5
    if fresh is not None:
        young &= stock.isin(fresh)
    before = factor.groupby(stock).ffill().groupby(stock).shift()
    step = (factor / before).to_numpy()
    limit = daily_limit(stock, bars["datetime"])
    with np.errstate(invalid="ignore"):
        no_step = ~(np.abs(step - 1) > 1e-6)
        jump = (np.abs(change) > limit) & no_step & ~young.to_numpy()
        wild = (np.abs(change) > limit) & ~no_step & ~young.to_numpy()
        falls = step < 1 - 1e-6
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
    for check, mask, message in cases:
        if mask.any():
            rows = shown[mask]
            rows = rows.reindex(rows["change"].abs().sort_values().index[::-1])
            report.add("warning", check, source, message, rows)
        else:
            report.ok(check, source)
    if "pct_change" in raw:
        _vendor_change(bars, raw, mapping, shown, source, report)


def _vendor_change(
    bars: pd.DataFrame,
    raw: pd.DataFrame,
    mapping: VendorMapping,
    shown: pd.DataFrame,
    source: str,
    report: Report,
) -> None:
    """Compare our returns with the vendor's own percent change."""
    if mapping.pct_change_of == "adjusted":
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
    check = "vendor's percent change"
    if off.any():
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
