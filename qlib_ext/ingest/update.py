"""Append new days and new listings to a store; refuse what would change its past."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_handlers.aggregate.units import exchanged_pair, is_thin
from data_handlers.vendor.mapping import VendorMapping
from qlib_ext.ingest import checks, convert
from qlib_ext.ingest.build import (
    HOLDINGS_TABLE,
    INDUSTRY_TABLE,
    MEMBERS_TABLE,
    STATE_TABLE,
    STATEMENTS_TABLE,
    IngestResult,
    add_members,
    add_statements,
    check_index,
    industry_column,
    make_meta,
    report_files,
    units_of,
)
from qlib_ext.ingest.holdings import merge_holdings
from qlib_ext.ingest.inputs import Input
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.store import (
    check_bins,
    extend_store,
    read_bars,
    read_calendar,
    read_industry_names,
    read_instruments,
    read_meta,
    read_table,
)
from qlib_ext.ingest.tail import check_factor, check_tail

__all__ = ["check_same_mapping", "extend"]

_BACK = 0.2  # of the stocks without a row that day come back in the same delivery
_EDGE, _NO_CHANCE = 0.02, 1e-6  # of a stock to be suspended; of a run of them
_AT_ONCE = 0.9  # of those on a single day: the end of a download that broke off


def extend(
    root: Path,
    plan: VendorMapping,
    given: Input,
    report: Report,
    *,
    write: bool,
    progress: bool,
) -> IngestResult:
    """Append what the store does not have; refuse what disagrees with it."""
    check_bins(root)
    old = _Old.read(root)
    main = plan.main.name
    if (last := given.raw["date"].max()) < old.end:
        report.add(
            "warning", "older files", main,
            f"the files end on {last:%Y-%m-%d}, before the store ({old.end:%Y-%m-%d}): "
            "nothing in them is new, and nothing was compared",
            count=len(given.raw),
        )  # fmt: skip
        summary = {"end": f"{old.end:%Y-%m-%d}", "new_days": 0, "new_stocks": 0}
        return IngestResult(root, report, summary, False)
    _check_renames(old, plan)
    bars, state = convert.stock_bars(given.raw, plan, old.state)
    past = bars["datetime"] <= old.end
    known = bars["instrument"].isin(old.stocks)
    _check_calendar(bars, old, main, report)
    report.stop_on_errors()
    tolerance = _tolerance(plan)
    _check_overlap(root, bars[past & known], old, main, tolerance, report)
    _check_complete(bars, old, main, report)
    _check_gap(given, old, plan, main, report)
    fresh_days = given.raw["date"] > old.end
    wrong = check_factor(
        bars, given.raw, (fresh_days & known).to_numpy(), plan, main, report
    )
    report.stop_on_errors()
    if wrong.any():
        given.raw = given.raw[~wrong].reset_index(drop=True)
        bars, state = convert.stock_bars(given.raw, plan, old.state)
        past = bars["datetime"] <= old.end
        known = bars["instrument"].isin(old.stocks)
    _check_units(old, plan, main, report)
    alive = old.state["date"] >= old.calendar[-min(5, len(old.calendar))]
    check_tail(
        root, bars[~past], pd.Index(old.state.loc[alive, "instrument"]), old.end,
        old.calendar, plan, main, report,
    )  # fmt: skip
    _check_renamed(bars, given.raw, old, main, report)
    _check_exchanged(given.raw, old, main, report)
    report.stop_on_errors()
    fresh = frozenset(bars.loc[~known, "instrument"])
    last = old.state.set_index("instrument")["factor"]
    checks.check_store_bars(bars, given.raw, plan, main, report, fresh=fresh, last=last)

    new = bars[~(past & known)].reset_index(drop=True)
    new_days = pd.DatetimeIndex(np.sort(new["datetime"].unique()))
    new_days = new_days[new_days > old.end]
    calendar = pd.DatetimeIndex(old.calendar.append(new_days))
    index, index_codes = _new_index(root, given, old, calendar, tolerance, report)
    if len(index):
        check_index(index, new, report)
    report.stop_on_errors()
    summary = {
        "days": len(calendar),
        "start": f"{calendar[0]:%Y-%m-%d}",
        "end": f"{calendar[-1]:%Y-%m-%d}",
        "stocks": len(old.stocks) + len(fresh),
        "rows": len(new),
        "fields": list(old.meta["fields"]),
        "markets": {},
        "indices": sorted({*old.meta["indices"], *index_codes}),
        "new_days": len(new_days),
        "new_stocks": len(fresh),
    }
    if new.empty:
        return IngestResult(root, report, summary, False)

    tables: dict[str, pd.DataFrame] = {STATE_TABLE: _merge_state(old.state, state)}
    history = _merge_industry(given, old, report)
    if history is not None:
        new["industry"] = industry_column(new, history, report)
        tables[INDUSTRY_TABLE] = history
    statements = _merge_statements(given, old, report)
    if statements is not None:
        add_statements(new, statements, report)
        tables[STATEMENTS_TABLE] = statements
    holdings = merge_holdings(given.holdings, old.holdings, old.end, report)
    if holdings is not None:
        tables[HOLDINGS_TABLE] = holdings
    members = _merge_members(given, old, report)
    report.stop_on_errors()
    new, spans, cover = add_members(
        new, members, calendar, report, after=old.end, first_days=old.first_days
    )
    if members is not None:
        tables[MEMBERS_TABLE] = members
    names = {**old.industry_names, **given.industry_names}
    new = pd.concat([new, index], ignore_index=True) if len(index) else new
    report.stop_on_errors()
    if write:
        meta = make_meta(plan, given, {**old.meta.get("index_members", {}), **cover})
        extend_store(
            root,
            new,
            expected_end=old.end,
            markets=spans,
            index_codes=index_codes,
            industry_names=names or None,
            tables=tables,
            meta=meta,
            files=report_files(report),
            progress=progress,
        )
    summary["fields"] = list(
        dict.fromkeys([*old.meta["fields"], *map(str, new.columns[2:])])
    )
    summary["markets"] = {k: int(f["instrument"].nunique()) for k, f in spans.items()}
    return IngestResult(root, report, summary, write)


def check_same_mapping(root: Path, plan: VendorMapping) -> None:
    """Refuse to extend a store that was made from another kind of file.

    Raises
    ------
    ValueError
        If the store was not made by ingest, or with another mapping.
    """
    meta = read_meta(root)
    made = meta.get("source", {}).get("mapping")
    if made is None:
        raise ValueError(f"{root} was not made by ingest and cannot be updated.")
    mode = meta.get("adjustment", {}).get("mode")
    if made != plan.name or mode != f"{plan.prices}/{plan.factor}":
        raise ValueError(
            f"{root} was made with the mapping {made!r} ({mode}), not with "
            f"{plan.name!r} ({plan.prices}/{plan.factor}); use the first, or "
            "--overwrite."
        )


@dataclass
class _Old:
    """What an update needs to know of the store."""

    meta: dict[str, Any]
    calendar: pd.DatetimeIndex
    state: pd.DataFrame
    first_days: pd.Series
    industry: pd.DataFrame | None
    industry_names: dict[str, str]
    members: pd.DataFrame | None
    statements: pd.DataFrame | None
    holdings: pd.DataFrame | None

    @property
    def end(self) -> pd.Timestamp:
        return self.calendar[-1]

    @property
    def stocks(self) -> pd.Index:
        return self.first_days.index

    @classmethod
    def read(cls, root: Path) -> _Old:
        meta = read_meta(root)
        spans = read_instruments(root)
        return cls(
            meta=meta,
            calendar=read_calendar(root),
            state=read_table(root, STATE_TABLE),
            first_days=spans.groupby("instrument")["start"].min(),
            industry=read_table(root, INDUSTRY_TABLE, missing_ok=True),
            industry_names=read_industry_names(root),
            members=read_table(root, MEMBERS_TABLE, missing_ok=True),
            statements=read_table(root, STATEMENTS_TABLE, missing_ok=True),
            holdings=read_table(root, HOLDINGS_TABLE, missing_ok=True),
        )


def _tolerance(plan: VendorMapping) -> float:
    """Relative difference that is still agreement.

    float32 through two roundings; a re-anchored factor is published with about six
    digits; re-anchored prices of unknown factor are rounded to a fraction of a cent.
    """
    if plan.factor_history == "fixed":
        return 2e-6
    return 1e-5 if plan.prices == "raw" else 2e-3


def _check_calendar(bars: pd.DataFrame, old: _Old, source: str, report: Report) -> None:
    inside = (bars["datetime"] <= old.end) & ~bars["datetime"].isin(old.calendar)
    if inside.any():
        report.add(
            "error", "dates off the calendar", source,
            f"days before the end of the store ({old.end:%Y-%m-%d}) that it does not "
            "have; history cannot be inserted, rebuild with --overwrite",
            bars[inside], columns=["instrument", "datetime"],
        )  # fmt: skip
    else:
        report.ok("old days are in the store's calendar", source)


def _check_overlap(
    root: Path,
    bars: pd.DataFrame,
    old: _Old,
    source: str,
    tolerance: float,
    report: Report,
) -> None:
    """Compare repeated days with the store, field by field."""
    check = "overlap with the store"
    if bars.empty:
        report.ok(check, source)
        return
    fields = [
        str(f)
        for f in bars.columns
        if f in old.meta["fields"] and f not in ("industry", "datetime", "instrument")
    ]
    stored = read_bars(root, sorted(bars["instrument"].unique()), fields)
    first = bars.groupby("instrument")["datetime"].min()
    begins = stored["instrument"].map(first)
    stored = stored[stored["datetime"] >= begins]
    both = bars.merge(
        stored, on=["datetime", "instrument"], how="outer", suffixes=("", "_store")
    )
    rows = []
    for name in fields:
        new, was = both[name].to_numpy(), both[f"{name}_store"].to_numpy(np.float64)
        with np.errstate(invalid="ignore"):
            scale = np.maximum(np.abs(new), np.abs(was))
            if name == "change":
                scale = scale + 1.0  # a return is known to the rounding of its prices
            differs = np.abs(new - was) > tolerance * scale
        lost, found = np.isnan(new) & ~np.isnan(was), ~np.isnan(new) & np.isnan(was)
        if name in ("change", "market_cap"):
            # the first repeated day has no day before it to compute these from
            lost[:] = False
        wrong = differs | lost | found
        if wrong.any():
            part = both.loc[wrong, ["instrument", "datetime"]].rename(
                columns={"datetime": "date"}
            )
            rows.append(part.assign(field=name, store=was[wrong], new=new[wrong]))
    if not rows:
        report.ok(check, source)
        return
    frame = pd.concat(rows).sort_values(["date", "instrument"], kind="stable")
    report.add(
        "error",
        check,
        source,
        "days already in the store come with other values; the vendor revised them, or "
        "the units changed. Nothing is appended; rebuild with --overwrite if the new "
        "values are right",
        frame,
    )


def _check_complete(bars: pd.DataFrame, old: _Old, source: str, report: Report) -> None:
    """Refuse a delivery that holds only part of the market on a new day."""
    check = "incomplete days"
    alive = old.state["date"] >= old.calendar[-min(5, len(old.calendar))]
    expected = set(old.state.loc[alive, "instrument"])
    new = bars[bars["datetime"] > old.end]
    if len(expected) < 10 or new.empty:
        return
    days = sorted(new["datetime"].unique())
    told = new[new["instrument"].isin(expected) & new["close"].notna()]
    had = told.groupby("datetime").size().reindex(days, fill_value=0)
    # in a month of suspensions fewer trade than lately
    before = had.shift(fill_value=int((old.state["date"] == old.end).sum()))
    thin = is_thin(had, before)
    # suspended stocks come back one by one, those of a download that broke off at once,
    # and those that a delivery lacks not at all
    ever = [told.loc[told["datetime"] >= day, "instrument"].nunique() for day in days]
    back = (ever - had) >= _BACK * (before - had)
    rise = had.diff().shift(-1)[::-1].cummax()[::-1]  # the largest of the days after
    back &= rise <= _AT_ONCE * (ever - had)
    stay = thin & ~is_thin(had, had.shift(-1)) & back
    had = had.rename("stocks").rename_axis("date")
    if stay.any():
        report.add(
            "warning", check, source,
            "far fewer stocks trade than the day before, and come back day by "
            "day: suspended?",
            had[stay].reset_index(),
        )  # fmt: skip
    traded = old.state.loc[old.state["date"] == old.end, "instrument"]
    cut = _cut_off(told, traded, days) & ~stay
    thin = had[(thin & ~stay) | cut]
    if len(thin):
        report.add(
            "error", check, source,
            f"too few of the {len(expected)} stocks that traded lately do, or none "
            "from one code on; complete the download, because appended days are never "
            "changed",
            thin.reset_index(),
        )  # fmt: skip
        return
    if not stay.any():
        report.ok(check, source)
    last = max(days)
    before = old.state.loc[old.state["date"] == old.end, "instrument"]
    if len(days) > 1:
        previous = max(d for d in days if d < last)
        before = new.loc[new["datetime"] == previous, "instrument"]
    rows = new.loc[new["datetime"] == last, "instrument"]
    checks.end_before_last(before, rows, last, source, report)


def _cut_off(rows: pd.DataFrame, before: pd.Series, days: list) -> np.ndarray:
    """Days that lack all stocks from a code on, or up to one: a download's end.

    Judged of the stocks of the day before. Suspended ones are spread, and the run is
    judged by the share of them elsewhere.
    """
    out = np.zeros(len(days), dtype=bool)
    for i, day in enumerate(days):
        now = rows.loc[rows["datetime"] == day, "instrument"]
        has = np.flatnonzero(np.isin(np.sort(before), now))
        if len(has):
            lacking = 1 - len(has) / (has[-1] - has[0] + 1)
            chance = min(max(2 * lacking, _EDGE), 0.95)
            run = max(has[0], len(before) - 1 - has[-1])
            out[i] = chance**run < _NO_CHANCE
        before = now
    return out


def _check_gap(
    given: Input, old: _Old, plan: VendorMapping, source: str, report: Report
) -> None:
    """Refuse new days that do not follow on the store's last day.

    A forgotten week would be a hole in the calendar, and its returns would pass for
    ex-dates. It shows in index days without stocks, and in previous closes that are not
    the store's for most stocks at once.
    """
    check = "new days follow on"
    message = (
        f"days are missing between the end of the store ({old.end:%Y-%m-%d}) and the "
        "new files; deliver them too"
    )
    new = given.raw[given.raw["date"] > old.end]
    if new.empty:
        return
    days = new["date"].unique()
    if given.index is not None:
        between = given.index["date"].unique()
        between = between[(between > old.end) & (between <= days.max())]
        missing = np.sort(between[~np.isin(between, days)])
        if len(missing):
            frame = pd.DataFrame({"date": missing})
            report.add("error", check, source, message, frame)
            return
    first = new[new["traded"]].groupby("instrument", as_index=False).first()
    last = old.state[old.state["date"] == old.end]
    both = first.merge(last, on="instrument", suffixes=("", "_store"))
    if "preclose" in both:
        step = both["vendor_close"] / both["preclose"] - 1
        rows = both[["instrument", "date", "preclose"]]
        rows = rows.assign(last=both["vendor_close"])
        off = (step.abs() > 2e-3).to_numpy()
        if len(both) >= 3 and off.mean() > 0.5:
            message += ", or its last bars were taken before that day's close"
            report.add("error", check, source, message, rows[off])
            return
        pairs = checks.exchanged(rows[(step.abs() > 1e-6).to_numpy()])
        if len(pairs):
            report.add("error", "previous close", source, checks.EXCHANGED, pairs)
    if given.index is not None and given.index["date"].max() >= days.max():
        report.ok(check, source)
        return
    checks.check_weekdays(
        pd.DatetimeIndex(np.sort(days)), old.end, plan.codes == "cn", source, report
    )


def _check_units(old: _Old, plan: VendorMapping, source: str, report: Report) -> None:
    """Refuse a mapping whose units are not those the store was made with."""
    check = "mapping changed"
    made = old.meta.get("source", {}).get("units")
    now = units_of(plan)
    if made is None or made == now:
        report.ok(check, source)
        return
    rows = [
        {"source": name, "role": role, "store": was.get(role), "mapping": new.get(role)}
        for name in sorted({*made, *now})
        for was, new in [(made.get(name, {}), now.get(name, {}))]
        for role in sorted({*was, *new})
        if was.get(role) != new.get(role)
    ]
    report.add(
        "error", check, source,
        "`units` are not those that the store was made with", pd.DataFrame(rows),
    )  # fmt: skip


def _check_renames(old: _Old, plan: VendorMapping) -> None:
    held = sorted(set(plan.renames) & set(old.stocks))
    if held:
        raise ValueError(
            f"`renames`: the store holds {held[:5]} under the old code, and an update "
            "cannot move history; rebuild with --overwrite."
        )


def _check_renamed(
    bars: pd.DataFrame, raw: pd.DataFrame, old: _Old, source: str, report: Report
) -> None:
    """Warn of stocks of the store that end where a new one begins."""
    days = pd.DatetimeIndex(np.sort(bars["datetime"].unique()))
    calendar = old.calendar.append(days[days > old.end])
    traded = raw[raw["traded"]]
    lately = old.state["date"] >= old.calendar[-min(20, len(old.calendar))]
    silent = ~old.state["instrument"].isin(
        traded.loc[traded["date"] > old.end, "instrument"]
    )
    ends = old.state[lately & silent]
    ends = pd.DataFrame(
        {
            "instrument": ends["instrument"],
            "slot": calendar.searchsorted(ends["date"]),
            "close": ends["vendor_close"],
        }
    )
    first = traded[~traded["instrument"].isin(old.stocks)].drop_duplicates("instrument")
    price = "preclose" if "preclose" in first else "open"
    begins = first[["instrument", price]].assign(
        slot=calendar.searchsorted(first["date"])
    )
    checks.renamed_codes(ends, begins, source, report)


def _check_exchanged(raw: pd.DataFrame, old: _Old, source: str, report: Report) -> None:
    """Refuse two stocks that come under each other's codes."""
    first = (raw["date"] > old.end) & raw["traded"]
    rows = raw.loc[first, ["instrument", "date", "close"]]
    rows = rows.drop_duplicates("instrument")
    lately = old.state["date"] >= old.calendar[-min(5, len(old.calendar))]
    was = old.state[lately].set_index("instrument")["vendor_close"]
    rows = rows.assign(was=rows["instrument"].map(was))
    if pair := exchanged_pair(rows):
        report.add(
            "error", "moves", source,
            f"{pair[0]} and {pair[1]} change places: each has the other's price of the "
            "day before; under each other's codes?",
            rows[rows["instrument"].isin(pair)],
        )  # fmt: skip


def _merge_state(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    kept = old[~old["instrument"].isin(new["instrument"])]
    merged = pd.concat([kept, new], ignore_index=True)
    return merged.sort_values("instrument", ignore_index=True)


def _new_index(
    root: Path,
    given: Input,
    old: _Old,
    calendar: pd.DatetimeIndex,
    tolerance: float,
    report: Report,
) -> tuple[pd.DataFrame, list[str]]:
    """Bars of indices on the new days, and of indices that are new."""
    codes = sorted(old.meta["indices"])
    empty = pd.DataFrame(columns=["datetime", "instrument"])
    new_days = calendar[calendar > old.end]
    if given.index is None:
        if codes and len(new_days):
            report.add(
                "warning", "indices not updated", "index",
                "no index file is given: the indices have no bars on the new days",
                count=len(codes),
            )  # fmt: skip
        return empty, []
    stored = read_bars(root, codes, ["close"])
    last = stored.groupby("instrument", as_index=False).last()
    index = convert.index_bars(given.index, calendar, last)
    past = index["instrument"].isin(codes) & (index["datetime"] <= old.end)
    _check_overlap(root, index[past], old, "index", tolerance, report)
    index = index[~past]
    days = index.groupby("instrument")["datetime"].agg(set).to_dict()
    missing = [c for c in codes if not set(new_days) <= days.get(c, set())]
    if missing:
        report.add(
            "warning", "indices not updated", "index",
            f"{missing} lack bars on new days", count=len(missing),
        )  # fmt: skip
    return index, sorted(index["instrument"].unique())


def _merge_industry(given: Input, old: _Old, report: Report) -> pd.DataFrame | None:
    """Take the new history, else the store's; revisions apply to new days only."""
    if given.industry is None or old.industry is None:
        return given.industry if given.industry is not None else old.industry
    before = old.industry[old.industry["start"] <= old.end]
    after = given.industry[given.industry["start"] <= old.end]
    keys = ["instrument", "start", "code"]
    both = before.merge(after, on=keys, how="outer", indicator=True)
    shared = set(before["instrument"]) & set(after["instrument"])
    revised = both[both["_merge"].ne("both") & both["instrument"].isin(shared)]
    if len(revised):
        report.add(
            "warning", "industry history revised", "industry",
            "rows that start before the end of the store differ; the store's days keep "
            "their industry, new days take the new one",
            revised, columns=keys,
        )  # fmt: skip
    absent = old.industry[
        ~old.industry["instrument"].isin(given.industry["instrument"])
    ]
    return pd.concat([given.industry, absent], ignore_index=True)


def _merge_statements(given: Input, old: _Old, report: Report) -> pd.DataFrame | None:
    """Join the store's statements and new ones; days in the store keep their values."""
    if given.statements is None or old.statements is None:
        return given.statements if given.statements is not None else old.statements
    keys = ["instrument", "period_end", "announced"]
    both = pd.concat([old.statements, given.statements], ignore_index=True)
    both = both.drop_duplicates(keys, keep="last")
    merged = given.statements.merge(
        old.statements[keys], on=keys, how="left", indicator=True
    )
    late = merged["_merge"].eq("left_only") & (merged["announced"] <= old.end)
    if late.any():
        report.add(
            "warning", "late statements", "statements",
            "announced before the end of the store, which does not have them; they "
            "count on new days only",
            merged[late], columns=keys,
        )  # fmt: skip
    return both.sort_values(keys, ignore_index=True)


def _merge_members(given: Input, old: _Old, report: Report) -> pd.DataFrame | None:
    """Join the store's lists and new ones; refuse lists that would change the past."""
    if given.members is None or old.members is None:
        if given.members is not None:
            report.add(
                "error", "member lists", "members",
                "the store has no index members yet, and they would change its past; "
                "rebuild with --overwrite", count=len(given.members),
            )  # fmt: skip
        return old.members
    keys = ["market", "date"]
    lists = given.members.merge(
        old.members[keys].drop_duplicates(), on=keys, how="left", indicator=True
    )
    fresh = lists["_merge"].eq("left_only")
    late = fresh & (lists["date"] <= old.end)
    if late.any():
        report.add(
            "error", "member lists", "members",
            f"lists dated before the end of the store ({old.end:%Y-%m-%d}) that it "
            "does not have; rebuild with --overwrite",
            lists[late].drop_duplicates(keys), columns=keys,
        )  # fmt: skip
    repeated = given.members[~fresh.to_numpy()]
    wanted = old.members.merge(repeated[keys].drop_duplicates(), on=keys)
    both = wanted.merge(
        repeated, on=[*keys, "instrument"], how="outer", indicator=True,
        suffixes=("_store", "_new"),
    )  # fmt: skip
    weights = both["weight_store"].fillna(-1) - both["weight_new"].fillna(-1)
    wrong = both["_merge"].ne("both") | (weights.abs() > 1e-9)
    if wrong.any():
        report.add(
            "error", "member lists", "members",
            "a list that the store has comes with other members or weights",
            both[wrong], columns=[*keys, "instrument", "weight_store", "weight_new"],
        )  # fmt: skip
    added = given.members[fresh.to_numpy()]
    return pd.concat([old.members, added], ignore_index=True)
