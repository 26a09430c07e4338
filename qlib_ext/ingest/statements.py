"""Financial statements to a table of items and to indicators as known on each day.

A statement counts from the day it was announced. Where the vendor has no announcement
date, the last day the exchanges allow is taken: 30 April for annual and first-quarter,
31 August for half-year, 31 October for third-quarter reports. Growth compares a period
with the same period a year before, so year-to-date figures (the Chinese convention)
and annual ones need no conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_handlers.vendor.mapping import MONEY, STATEMENT_ITEMS, Source
from qlib_ext.ingest.checks import infinite
from qlib_ext.ingest.report import Report

__all__ = ["INDICATORS", "as_announced", "statement_table", "statutory_day"]

_BALANCE = (
    "total_assets",
    "total_liabilities",
    "equity",
    "current_assets",
    "current_liabilities",
    "long_term_debt",
)
_FLOWS = ("revenue", "net_profit", "operating_cash_flow")
# indicator -> items it needs
INDICATORS: dict[str, tuple[str, ...]] = {
    "earnings_growth": ("net_profit",),
    "revenue_growth": ("revenue",),
    "debt_to_assets": ("total_liabilities", "total_assets"),
    "book_leverage": ("long_term_debt", "equity"),
    "current_ratio": ("current_assets", "current_liabilities"),
}
_KEYS = ["instrument", "period_end", "announced"]
# a company that stopped reporting has no known figures after this
EXPIRES = pd.DateOffset(years=2)
_GROWTH_LIMIT = 5.0
_SLIP = 2.7  # powers of ten; a unit is 3, 4 or more


def statutory_day(period: pd.Series) -> pd.Series:
    """Return the last day the exchanges allow for the report of a period.

    31 March to 30 April, 30 June to 31 August, 30 September to 31 October, 31 December
    to 30 April of the next year; any other end of period four months later.
    """
    month, year = period.dt.month, period.dt.year
    deadline = {3: (4, 30), 6: (8, 31), 9: (10, 31), 12: (4, 30)}
    out = period + pd.DateOffset(months=4)
    for end, (m, d) in deadline.items():
        rows = month == end
        parts = {"year": year[rows] + (end == 12), "month": m, "day": d}
        out[rows] = pd.to_datetime(pd.DataFrame(parts, index=period[rows].index))
    return out


def statement_table(
    read: Mapping[str, pd.DataFrame], sources: tuple[Source, ...], report: Report
) -> pd.DataFrame | None:
    """Join the statement files to one row per stock, period and announcement.

    Parameters
    ----------
    read : mapping of str to DataFrame
        What `read.read_source` returned for each source: long (``item``, ``value``)
        or wide (one column an item, CNY).
    sources : tuple of Source
        Sources of kind statements.
    report : Report
        Receives the findings.

    Returns
    -------
    DataFrame or None
        ``instrument``, ``period_end``, ``announced`` and items in CNY; None where no
        source has a file.
    """
    frames = [_wide(read[s.name], s, report) for s in sources if s.name in read]
    if not frames:
        return None
    table = frames[0]
    for frame in frames[1:]:
        table = table.merge(frame, on=_KEYS, how="outer")
    items = [str(c) for c in table if c not in _KEYS]
    table = table.sort_values(_KEYS, ignore_index=True)
    for name in ("total_assets", "equity", "revenue"):
        if name not in table:
            continue
        size = table.groupby("instrument")[name].ffill().where(lambda x: x > 0)
        before = size.groupby(table["instrument"]).shift()
        step = pd.Series(np.log10(size / before)).abs()
        slip = (step > _SLIP) & ((step - step.round()).abs() < 0.3)
        if slip.any():
            report.add(
                "warning", "unit slip", sources[0].name,
                f"{name} moves by a power of ten from one statement to the next: "
                "another unit in some rows?", table[slip], columns=[*_KEYS, name],
            )  # fmt: skip
    for part, whole in (
        ("total_liabilities", "total_assets"), ("equity", "total_assets"),
        ("current_assets", "total_assets"), ("current_liabilities", "total_assets"),
        ("net_profit", "revenue"),
    ):  # fmt: skip
        if {part, whole} <= set(table):
            ratio = (table[part].abs() / table[whole].where(table[whole] > 0)).dropna()
            middle = float(ratio[ratio > 0].median())
            if len(ratio) >= 10 and not 1e-3 < middle < 1e2:
                report.add(
                    "error", "unit slip", sources[0].name,
                    f"{part} is {middle:.2g} times {whole} at the median: set `units` "
                    "of the two", count=len(ratio),
                )  # fmt: skip
    # a revision may repeat only some of the items of a period
    table[items] = table.groupby(["instrument", "period_end"])[items].ffill()
    if "long_term_debt" not in table and {
        "total_liabilities",
        "current_liabilities",
    } <= set(items):
        table["long_term_debt"] = (
            table["total_liabilities"] - table["current_liabilities"]
        )
    return table


def _wide(frame: pd.DataFrame, source: Source, report: Report) -> pd.DataFrame:
    frame = frame.rename(columns={"period": "period_end"})
    if "announced" not in frame:
        frame["announced"] = statutory_day(frame["period_end"])
        report.add(
            "note", "no announcement dates", source.name,
            "statements count from the last day the exchanges allow for them",
            count=len(frame),
        )  # fmt: skip
    else:
        late = statutory_day(frame["period_end"])
        frame["announced"] = frame["announced"].fillna(late)
    early = frame["announced"] <= frame["period_end"]
    if early.any():
        report.add(
            "error", "announced before the period ends", source.name,
            "a statement cannot be known before its period is over; are the date "
            "columns swapped?",
            frame[early], columns=_KEYS,
        )  # fmt: skip
    inside = ~frame["period_end"].dt.is_month_end
    if inside.any():
        report.add(
            "warning", "periods that end within a month", source.name,
            "no report of a company listed in China ends there: another column?",
            frame[inside], columns=_KEYS,
        )  # fmt: skip
    soon = pd.Timestamp.now() + pd.Timedelta(days=1)
    future = (frame["announced"] > soon).to_numpy()
    if future.any():
        bad = report.bad_rows(
            "announced in the future", source.name, "cannot be known yet: a wrong "
            "year?", frame, future, _KEYS,
        )  # fmt: skip
        frame = frame[~bad]
    for name, wrong in infinite(frame).items():
        bad = report.bad_rows(
            f"infinite {name}", source.name, f"{name} is infinite", frame, wrong,
            [*_KEYS, name],
        )  # fmt: skip
        frame = frame.assign(**{name: frame[name].mask(bad)})
    if "item" in frame:
        wanted = {str(k): str(v) for k, v in source.options["items"].items()}
        scale = MONEY[source.options.get("item_unit", "cny")]
        frame = frame[frame["item"].isin(wanted)]
        if frame.empty:
            raise ValueError(
                f"source `{source.name}` has none of the `items` of the mapping: "
                f"{list(wanted)}."
            )
        frame = frame.assign(
            item=frame["item"].map(wanted), value=frame["value"] * scale
        )
        twice = frame.duplicated([*_KEYS, "item"])
        _note_twice(frame[twice], source, report)
        frame = (
            frame[~twice].pivot(index=_KEYS, columns="item", values="value")
        ).reset_index()  # fmt: skip
        frame.columns.name = None
        return frame
    twice = frame.duplicated(_KEYS, keep="last")
    _note_twice(frame[twice], source, report)
    frame = frame[~twice]
    return frame[[*_KEYS, *[c for c in frame if c in STATEMENT_ITEMS]]]


def _note_twice(rows: pd.DataFrame, source: Source, report: Report) -> None:
    if len(rows):
        report.add(
            "warning", "duplicate statements", source.name,
            "a statement is given more than once for one day; one is kept",
            rows, columns=_KEYS,
        )  # fmt: skip


def as_announced(
    table: pd.DataFrame, dates: pd.Series, instruments: pd.Series
) -> dict[str, Any]:
    """Return indicators of the latest period announced by each day.

    Parameters
    ----------
    table : DataFrame
        From `statement_table`.
    dates, instruments : Series
        The days asked for.

    Returns
    -------
    dict of str to ndarray
        float64 per indicator, fractions. Growth is the change on the same period a year
        before over its absolute value, cut at -5 and 5; ``book_leverage`` is (equity +
        long-term debt) / equity (Barra), with non-current liabilities for the debt
        where that is all there is. NaN where an input is unknown, equity is not
        positive, or the period ended more than two years ago.
    """
    events = _events(table)
    names = [str(c) for c in events if c not in (*_KEYS, "expires")]
    ask = pd.DataFrame(
        {
            "date": dates.to_numpy(),
            "instrument": instruments.to_numpy(),
            "row": np.arange(len(dates)),
        }
    ).sort_values("date", kind="stable")
    found = pd.merge_asof(
        ask,
        events.sort_values("announced", kind="stable"),
        left_on="date",
        right_on="announced",
        by="instrument",
    ).sort_values("row")
    stale = (found["expires"] < found["date"]).to_numpy()
    return {
        name: np.where(stale, np.nan, found[name].to_numpy(dtype=np.float64))
        for name in names
    }


def _events(table: pd.DataFrame) -> pd.DataFrame:
    """Compute indicators at each announcement that brings the latest period."""
    table = table.sort_values(["announced", "period_end"], kind="stable")
    items = [str(c) for c in table if c not in _KEYS]
    base = table.rename(columns={c: f"{c}_before" for c in items})
    base["period_end"] = base["period_end"] + pd.DateOffset(years=1)
    # the base as it was known then, not as it was restated later
    both = pd.merge_asof(
        table,
        base.sort_values("announced", kind="stable"),
        on="announced",
        by=["instrument", "period_end"],
    )
    out = both[_KEYS].copy()
    for name, needs in INDICATORS.items():
        if not set(needs) <= set(items):
            continue
        x = [both[n] for n in needs]
        with np.errstate(divide="ignore", invalid="ignore"):
            if name.endswith("_growth"):
                before = both[f"{needs[0]}_before"]
                value = ((x[0] - before) / before.abs()).clip(
                    -_GROWTH_LIMIT, _GROWTH_LIMIT
                )
                value = value.where(before != 0)
            elif name == "book_leverage":
                value = (1 + x[0] / x[1]).where(x[1] > 0)
            else:
                value = (x[0] / x[1]).where(x[1] > 0)
        out[name] = value
    # a late correction of an old period does not replace the newer one
    newest = out.groupby("instrument")["period_end"].cummax()
    out = out[out["period_end"] >= newest]
    out["expires"] = out["period_end"] + EXPIRES
    return out
