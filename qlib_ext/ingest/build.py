"""A whole store from one checked input, and what building and updating share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_handlers.vendor.mapping import VendorMapping
from qlib_ext.ingest import checks, convert
from qlib_ext.ingest.inputs import Input
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.statements import as_announced
from qlib_ext.ingest.store import write_store

__all__ = ["IngestResult", "build", "check_index"]

STATE_TABLE = "ingest_state"
INDUSTRY_TABLE = "industry_history"
MEMBERS_TABLE = "members"
STATEMENTS_TABLE = "statements"
HOLDINGS_TABLE = "holdings"
STALE_DAYS = 100


@dataclass
class IngestResult:
    """What an ingest did.

    Attributes
    ----------
    root : Path
        The store.
    report : Report
        All findings.
    summary : dict
        Counts: ``days``, ``stocks``, ``rows``, ``fields``, ``start``, ``end``,
        ``markets``, ``indices``, ``seconds``; for updates ``new_days`` and
        ``new_stocks``.
    written : bool
        False for a dry run, or an update that found nothing new.
    """

    root: Path
    report: Report
    summary: dict[str, Any]
    written: bool


def build(
    root: Path,
    plan: VendorMapping,
    given: Input,
    report: Report,
    *,
    write: bool,
    progress: bool,
) -> IngestResult:
    """Convert a checked input and write it as a whole store (unless not `write`)."""
    main = plan.main.name
    bars, state = convert.stock_bars(given.raw, plan)
    checks.check_store_bars(bars, given.raw, plan, main, report)
    _renamed(given.raw, main, report)
    calendar = pd.DatetimeIndex(np.sort(bars["datetime"].unique()))
    if given.industry is not None:
        bars["industry"] = industry_column(bars, given.industry, report)
    if given.statements is not None:
        add_statements(bars, given.statements, report)
    bars, spans, cover = add_members(bars, given.members, calendar, report)
    index_codes: list[str] = []
    if given.index is not None:
        _index_days_without_stocks(given.index, calendar, report)
        index = convert.index_bars(given.index, calendar)
        index = _without_stocks(index, bars, report)
        check_index(index, bars, report)
        index_codes = sorted(index["instrument"].unique())
        bars = pd.concat([bars, index], ignore_index=True)
    report.stop_on_errors()
    tables = {STATE_TABLE: state}
    if given.industry is not None:
        tables[INDUSTRY_TABLE] = given.industry.reset_index(drop=True)
    if given.members is not None:
        tables[MEMBERS_TABLE] = given.members.reset_index(drop=True)
    if given.statements is not None:
        tables[STATEMENTS_TABLE] = given.statements
    if given.holdings is not None:
        tables[HOLDINGS_TABLE] = given.holdings
    meta = make_meta(plan, given, cover)
    if write:
        write_store(
            root,
            bars,
            markets=spans,
            index_codes=index_codes,
            industry_names=given.industry_names or None,
            tables=tables,
            meta=meta,
            calendar=calendar,
            files=report_files(report),
            progress=progress,
        )
    stocks = bars.loc[~bars["instrument"].isin(index_codes), "instrument"].nunique()
    summary = {
        "days": len(calendar),
        "start": f"{calendar[0]:%Y-%m-%d}",
        "end": f"{calendar[-1]:%Y-%m-%d}",
        "stocks": int(stocks),
        "rows": len(given.raw),
        "fields": [c for c in bars.columns if c not in ("datetime", "instrument")],
        "markets": {name: int(f["instrument"].nunique()) for name, f in spans.items()},
        "indices": index_codes,
    }
    return IngestResult(root, report, summary, write)


def _renamed(raw: pd.DataFrame, source: str, report: Report) -> None:
    """Look for codes that end where another begins."""
    traded = raw[raw["traded"]]
    days = np.sort(traded["date"].unique())
    by = traded.groupby("instrument", sort=False)
    first, last = by.head(1), by.tail(1)
    slot = np.searchsorted(days, last["date"])
    ends = last[["instrument", "close"]].assign(slot=slot)[slot < len(days) - 1]
    slot = np.searchsorted(days, first["date"])
    price = "preclose" if "preclose" in raw else "open"
    begins = first[["instrument", price]].assign(slot=slot)[slot > 0]
    checks.renamed_codes(ends, begins, source, report)


def check_index(index: pd.DataFrame, bars: pd.DataFrame, report: Report) -> None:
    """Refuse indices that jump, or move with the stocks of another day.

    Parameters
    ----------
    index, bars : DataFrame
        ``datetime``, ``instrument``, ``change``; of the index ``close`` too.
    report : Report
        Receives the findings.
    """
    if {"open", "high", "low"} <= set(index):
        prices = index[["open", "high", "low", "close"]]
        off = (prices.max(axis=1) > index["high"]) | (prices.min(axis=1) < index["low"])
        if off.any():
            report.add(
                "warning", "OHLC order", "index",
                "high or low does not bound open and close", index[off],
                columns=["instrument", "datetime", *prices],
            )  # fmt: skip
    jumps = index[index["change"].abs() > 0.3]
    if len(jumps):
        report.add(
            "error", "index jumps", "index",
            "an index moves by more than 30 % in a day: another index or unit?", jumps,
            columns=["instrument", "datetime", "close", "change"],
        )  # fmt: skip
    mean = bars.groupby("datetime")["change"].mean()
    wide = index.pivot(index="datetime", columns="instrument", values="change")
    wide = wide.reindex(mean.index)
    for name in wide if bars["instrument"].nunique() >= 5 else ():
        if wide[name].notna().sum() >= 20:
            same, *other = (wide[name].corr(mean.shift(k)) for k in (0, 1, -1))
            if max(other) > max(same, 0.2) + 0.3:
                report.add(
                    "error", "index and stocks apart", "index",
                    f"{name} moves with the stocks of the day beside (correlation "
                    f"{max(other):.2f}, of the same day {same:.2f}): are the dates of "
                    "one of them a day off?", count=int(wide[name].notna().sum()),
                )  # fmt: skip


def _index_days_without_stocks(
    index: pd.DataFrame, calendar: pd.DatetimeIndex, report: Report
) -> None:
    days = pd.DatetimeIndex(np.sort(index["date"].unique()))
    inside = days[(days >= calendar[0]) & (days <= calendar[-1])]
    ends = index[index["date"].isin(calendar)]
    ends = ends.groupby("instrument")["date"].agg(["min", "max", "size"])
    whole = np.searchsorted(calendar, ends["max"], "right")
    whole = whole - np.searchsorted(calendar, ends["min"])
    ends["lacks"] = whole - ends["size"]
    short = ends[(ends["max"] < calendar[-1]) | (ends["lacks"] > 0)]
    if len(short):
        report.add(
            "warning", "days without index", "index",
            "indices end before the stocks or lack days: they have no return there",
            short.reset_index(),
        )  # fmt: skip
    missing = inside[~inside.isin(calendar)]
    if len(missing):
        report.add(
            "warning", "days without stocks", "index",
            "the indices have bars on days on which no stock has one; those days are "
            "not in the calendar",
            pd.DataFrame({"date": missing}),
        )  # fmt: skip
    else:
        report.ok("index days have stocks", "index")


def report_files(report: Report) -> dict[str, str]:
    """Return the report as files for the root of the store."""
    return {
        "ingest_report.json": report.to_json(),
        "ingest_report.md": report.to_markdown(),
    }


def industry_column(
    bars: pd.DataFrame, history: pd.DataFrame, report: Report
) -> np.ndarray:
    """Return the industry code of each traded row, NaN where unknown."""
    code = convert.industry_of(history, bars["datetime"], bars["instrument"])
    traded = bars["close"].notna().to_numpy()
    code[~traded] = np.nan
    unknown = traded & np.isnan(code)
    if unknown.any():
        frame = bars.loc[unknown, ["instrument", "datetime"]]
        stocks = frame.groupby("instrument")["datetime"].agg(["min", "max", "size"])
        report.add(
            "warning", "no industry", "industry",
            f"{len(stocks)} stock(s) have days before their first industry (or none at "
            "all); unknown there, never filled from later",
            stocks.reset_index(), count=int(unknown.sum()),
        )  # fmt: skip
    else:
        report.ok("every traded day has an industry", "industry")
    return code


def add_statements(
    bars: pd.DataFrame, statements: pd.DataFrame, report: Report
) -> None:
    """Add the indicators known on each traded day to `bars`, in place."""
    traded = bars["close"].notna().to_numpy()
    values = as_announced(statements, bars["datetime"], bars["instrument"])
    for name, value in values.items():
        bars[name] = np.where(traded, value, np.nan)
    known = {k: float(np.isfinite(bars[k][traded]).mean()) for k in values}
    report.add(
        "note", "statements", "statements",
        "share of traded days with an indicator: "
        + ", ".join(f"{k} {v:.0%}" for k, v in known.items()),
        count=len(statements),
    )  # fmt: skip


def add_members(
    bars: pd.DataFrame,
    members: pd.DataFrame | None,
    calendar: pd.DatetimeIndex,
    report: Report,
    *,
    after: pd.Timestamp | None = None,
    first_days: pd.Series | None = None,
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], dict[str, Any]]:
    """Add ``weight_<index>``; return spans by market and how much of it we hold."""
    spans: dict[str, pd.DataFrame] = {}
    cover: dict[str, Any] = {}
    if members is None:
        return bars, spans, cover
    own = bars.groupby("instrument")["datetime"].min()
    if first_days is not None:
        own = first_days.combine_first(own)
    # lists dated after the last day are for a later update
    current = members[members["date"] <= calendar[-1]]
    if len(current) < len(members):
        report.add(
            "note", "lists of the future", "members",
            "lists dated after the last day are left for a later update",
            members[members["date"] > calendar[-1]].drop_duplicates(["market", "date"]),
            columns=["market", "date"],
        )  # fmt: skip
    for market, lists in current.groupby("market", sort=True):
        held = lists["instrument"].isin(own.index)
        if not held.any():
            report.add(
                "note", "index left out", "members",
                f"{market}: no member is in the store within its days",
                count=int(lists["instrument"].nunique()),
            )  # fmt: skip
            continue
        market_spans, periods = convert.member_spans(lists[held], calendar)
        spans[str(market)] = market_spans
        weights = _weight_rows(periods, calendar, own, after)
        name = f"weight_{market}"
        bars = bars.merge(
            weights.rename(columns={"weight": name}),
            on=["datetime", "instrument"],
            how="outer",
        )
        given = bool(lists["weight"].notna().any())
        per_list = lists.assign(held=held).groupby("date")["held"].agg(["sum", "size"])
        cover[str(market)] = {
            "weights": "vendor, held constant between lists" if given else "equal",
            "first_list": f"{lists['date'].min():%Y-%m-%d}",
            "last_list": f"{lists['date'].max():%Y-%m-%d}",
            "members_in_store": int(per_list["sum"].max()),
            "members_listed": int(per_list["size"].max()),
        }
        age = (calendar[-1] - lists["date"].max()).days
        if age > STALE_DAYS:
            report.add(
                "warning", "old member list", "members",
                f"{market}: the last list is {age} days older than the last bar and is "
                "taken to hold on",
                count=age,
            )  # fmt: skip
        if not given:
            report.add(
                "note", "equal weights", "members",
                f"{market}: the lists have no weights; members share 1 equally",
            )  # fmt: skip
        if (per_list["sum"] < per_list["size"]).any():
            report.add(
                "warning", "members not in the store", "members",
                f"{market}: weights of the members we have are scaled to sum to 1",
                per_list.rename(columns={"sum": "in_store", "size": "listed"})
                .reset_index().tail(3),
                count=int((per_list["size"] - per_list["sum"]).max()),
            )  # fmt: skip
    return bars, spans, cover


def _weight_rows(
    periods: pd.DataFrame,
    calendar: pd.DatetimeIndex,
    own: pd.Series,
    after: pd.Timestamp | None,
) -> pd.DataFrame:
    """Weights per day and member, summing to 1 a day over the members listed then.

    Kept on suspended days: a suspended member is still in the index. A member counts
    from its first bar in the store.
    """
    first = calendar.searchsorted(own.reindex(periods["instrument"]))
    start = np.maximum(periods["first"].to_numpy(), first)
    if after is not None:
        start = np.maximum(start, calendar.searchsorted(after, "right"))
    # to the end of the list even without bars: a member is listed, if suspended
    end = periods["last"].to_numpy()
    length = np.maximum(end - start + 1, 0)
    total = int(length.sum())
    offset = np.arange(total) - np.repeat(np.cumsum(length) - length, length)
    slot = np.repeat(start, length) + offset
    rows = pd.DataFrame(
        {
            "datetime": calendar[slot],
            "instrument": np.repeat(periods["instrument"].to_numpy(), length),
            "weight": np.repeat(periods["weight"].to_numpy(), length),
        }
    )
    rows["weight"] /= rows.groupby("datetime")["weight"].transform("sum")
    return rows


def _without_stocks(
    index: pd.DataFrame, bars: pd.DataFrame, report: Report
) -> pd.DataFrame:
    both = sorted(set(index["instrument"]) & set(bars["instrument"]))
    if both:
        raise ValueError(
            f"{both} are stocks and indices at once; bare index numbers need a source "
            "of kind index and stocks one of kind bars."
        )
    if index.empty:
        report.add("warning", "index off the calendar", "index",
                   "no index bar falls on a day of the stocks", count=0)  # fmt: skip
    return index


def units_of(plan: VendorMapping) -> dict[str, dict[str, Any]]:
    """Return the units that a mapping declares, by source and role."""
    return {s.name: dict(s.units) for s in plan.sources if s.units}


def make_meta(
    plan: VendorMapping, given: Input, cover: Mapping[str, Any]
) -> dict[str, Any]:
    adjusted_by = {
        "one": "vendor (factor unknown, stored as 1)"
        if plan.prices == "adjusted"
        else "nobody (raw prices, factor 1)",
        "column": "published factor",
        "preclose": "product of previous close / ex-right previous close",
    }[plan.factor]
    notes = list(plan.notes)
    if given.industry is not None:
        notes.append(
            "industry holds from its start date until the stock's next row; codes are "
            "comparable within a day, not across a change of the scheme."
        )
    return {
        "source": {
            "mapping": plan.name,
            "vendor": plan.vendor,
            "files": {k: v[:20] for k, v in given.files.items()},
            "units": units_of(plan),
        },
        "adjustment": {
            "mode": f"{plan.prices}/{plan.factor}",
            "prices": adjusted_by,
            "anchor": "none: factor is 1 throughout"
            if plan.factor == "one"
            else "factor is 1 on a stock's first traded day in the store",
            "volume": "shares / factor" if plan.prices == "raw" else "shares as traded",
            "amount": "CNY as traded",
            "vwap": "amount / volume x factor"
            if plan.prices == "raw"
            else "absent: amount / volume is not adjusted",
        },
        "index_members": dict(cover),
        "notes": notes,
    }
