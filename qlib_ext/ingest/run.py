"""From vendor files to a store in one call: read, check, convert, write or extend."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.log import get_module_logger

from qlib_ext.ingest import checks, convert
from qlib_ext.ingest.mapping import Mapping_, Source, load_mapping
from qlib_ext.ingest.read import find_files, normalise_codes, read_source
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.store import is_store, write_store

__all__ = ["IngestResult", "ingest"]

logger = get_module_logger("qlib_ext.ingest")

STATE_TABLE = "ingest_state"
INDUSTRY_TABLE = "industry_history"
MEMBERS_TABLE = "members"


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


@dataclass
class _Input:
    """Everything read from vendor files, checked, in store units."""

    raw: pd.DataFrame
    index: pd.DataFrame | None = None
    members: pd.DataFrame | None = None
    industry: pd.DataFrame | None = None
    industry_names: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)


def ingest(
    root: str | os.PathLike[str],
    mapping: str | os.PathLike[str] | Mapping_,
    *,
    data: str | os.PathLike[str] = ".",
    files: Mapping[str, Sequence[str]] | None = None,
    update: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    drop_bad_rows: bool = False,
    progress: bool = False,
) -> IngestResult:
    """Make or extend a Qlib day store from vendor files.

    Parameters
    ----------
    root : path
        The store.
    mapping : str, path or Mapping_
        Preset name, mapping file, or a loaded mapping.
    data : path, default "."
        Directory that the mapping's file names are relative to.
    files : mapping of str to sequence of str, optional
        Source name to files, globs or directories that replace the mapping's.
    update : bool, default False
        Append new days and new listings to an existing store.
    overwrite : bool, default False
        Replace an existing store.
    dry_run : bool, default False
        Read, check and convert, write nothing.
    drop_bad_rows : bool, default False
        Leave out rows with row-level errors, with a warning, instead of stopping.
    progress : bool, default False
        Show progress bars.

    Raises
    ------
    IngestError
        If the checks find errors; nothing was written.
    ValueError
        If files, mapping or store do not fit.
    """
    started = time.monotonic()
    root = Path(root)
    plan = mapping if isinstance(mapping, Mapping_) else load_mapping(mapping)
    if update and overwrite:
        raise ValueError("`update` and `overwrite` exclude each other; choose one.")
    if update and not is_store(root):
        raise ValueError(f"`update`: {root} is no store yet; run without --update.")
    if not update and not overwrite and not dry_run and is_store(root):
        raise ValueError(
            f"`root`={root} is a store already; use --update to append to it or "
            "--overwrite to replace it."
        )
    report = Report()
    given = _read_all(
        plan, Path(data), files or {}, report,
        update=update, drop_bad_rows=drop_bad_rows, progress=progress,
    )  # fmt: skip
    if update:
        raise NotImplementedError
    result = _build(root, plan, given, report, write=not dry_run, progress=progress)
    result.summary["seconds"] = round(time.monotonic() - started, 1)
    return result


# --------------------------------------------------------------------------- reading


def _read_all(
    plan: Mapping_,
    data: Path,
    files: Mapping[str, Sequence[str]],
    report: Report,
    *,
    update: bool,
    drop_bad_rows: bool,
    progress: bool,
) -> _Input:
    names = [s.name for s in plan.sources]
    unknown = sorted(set(files) - set(names))
    if unknown:
        raise ValueError(
            f"`file` names unknown source(s) {unknown}; the mapping has {names}."
        )
    if not data.is_dir():
        raise ValueError(f"`data`={data} is not a directory.")
    read: dict[str, pd.DataFrame] = {}
    used: dict[str, list[str]] = {}
    for source in plan.sources:
        found = find_files(source, data, files.get(source.name, ()))
        if not found:
            continue
        read[source.name] = read_source(
            source, found, codes=plan.codes, progress=progress
        )
        used[source.name] = [p.name for p in found]
        if progress:
            logger.info(
                "%s: %s rows from %d file(s)",
                source.name, f"{len(read[source.name]):,}", len(found),
            )  # fmt: skip

    index = _read_index(plan, read, report)
    raw = _join(plan, read, report)
    main = plan.of_kind("bars")[0].name
    days = None if index is None else pd.DatetimeIndex(np.sort(index["date"].unique()))
    bad = checks.check_bars(
        raw, plan, main, report, index_days=days, full=not update
    )  # fmt: skip
    if bad.any() and drop_bad_rows:
        raw = _drop_bad(raw, bad, main, report)
    report.stop_on_errors()
    given = _Input(raw=raw, index=index, files=used)
    given.members = _read_members(plan, read, report)
    given.industry, given.industry_names = _read_industry(plan, read, report)
    report.stop_on_errors()
    return given


def _drop_bad(
    raw: pd.DataFrame, bad: np.ndarray, source: str, report: Report
) -> pd.DataFrame:
    """Leave out rows with errors; their findings become warnings."""
    rows = [f for f in report.errors if f.examples]
    report.findings = [f for f in report.findings if f not in rows]
    for f in rows:
        report.add("warning", f.check, f.source, f"rows left out: {f.message}",
                   pd.DataFrame(list(f.examples)), count=f.count)  # fmt: skip
    logger.warning("%d row(s) with errors are left out", int(bad.sum()))
    return raw[~bad].reset_index(drop=True)


def _join(
    plan: Mapping_, read: Mapping[str, pd.DataFrame], report: Report
) -> pd.DataFrame:
    """Bars with the fields of the other files beside them, sorted, no duplicates."""
    main = plan.of_kind("bars")[0]
    raw = checks.drop_duplicates(read[main.name], main.name, report)
    keys = ("instrument", "date")
    for source in plan.of_kind("fields"):
        if source.name not in read:
            continue
        extra = checks.drop_duplicates(read[source.name], source.name, report)
        clash = sorted(c for c in map(str, extra) if c in raw and c not in keys)
        if clash:
            raise ValueError(
                f"source `{source.name}` gives {clash}, which other sources give too; "
                "remove one of them from the mapping."
            )
        raw = raw.merge(extra, on=["instrument", "date"], how="left", indicator="_hit")
        fields = sorted(c for c in map(str, extra) if c not in keys)
        missed = raw["_hit"].eq("left_only")
        if missed.any():
            report.add(
                "warning", "rows without partner", source.name,
                f"bars have no row in this source; {fields} are unknown there",
                raw[missed], columns=["instrument", "date"],
            )  # fmt: skip
        raw = raw.drop(columns="_hit")
    for source in plan.of_kind("factor"):
        if source.name not in read:
            continue
        steps = checks.drop_duplicates(read[source.name], source.name, report)
        raw = _join_factor(raw, steps, source, report)
    if plan.factor == "column" and "factor" not in raw:
        raise ValueError(
            "`factor`: column, but no source gives the factor; add its file, or use a "
            "mapping with `factor`: one and prices adjusted by the vendor."
        )
    if plan.factor == "preclose" and "preclose" not in raw:
        raise ValueError("`factor`: preclose, but no source gives `preclose`.")
    raw["traded"] = _traded(raw, main, report)
    return raw


def _join_factor(
    raw: pd.DataFrame, steps: pd.DataFrame, source: Source, report: Report
) -> pd.DataFrame:
    """Give each bar the last factor dated on or before it."""
    if "factor" in raw:
        raise ValueError(f"source `{source.name}` gives `factor` a second time.")
    raw = raw.assign(_row=np.arange(len(raw)))
    merged = pd.merge_asof(
        raw.sort_values("date", kind="stable"),
        steps.sort_values("date", kind="stable"),
        on="date",
        by="instrument",
    )
    merged = merged.sort_values("_row", ignore_index=True).drop(columns="_row")
    # no dividend yet: before its first step a stock's factor is that of no adjustment
    unknown = merged["factor"].isna()
    if unknown.any():
        none = ~merged["instrument"].isin(steps["instrument"])
        report.add(
            "warning", "no factor", source.name,
            "bars before a stock's first factor, or of stocks without any, get the "
            "factor 1",
            merged[unknown], columns=["instrument", "date"],
        )  # fmt: skip
        merged["factor"] = merged["factor"].where(~(unknown | none), 1.0)
    return merged


def _traded(raw: pd.DataFrame, main: Source, report: Report) -> np.ndarray:
    """Days on which the stock traded: the vendor's flag, else volume above zero."""
    if "trading" in raw:
        traded = raw["trading"].eq(1).to_numpy()
        if "volume" in raw:
            idle = traded & ~(raw["volume"] > 0).to_numpy()
            if idle.any():
                report.add(
                    "warning", "no volume", main.name,
                    "marked as trading, but without volume; taken as suspended",
                    raw[idle], columns=["instrument", "date", "close", "volume"],
                )  # fmt: skip
                traded = traded & ~idle
        return traded
    if "volume" in raw:
        volume = raw["volume"].to_numpy()
        idle = ~(volume > 0) & ~(volume < 0)
        if idle.any():
            report.add(
                "warning", "no volume", main.name,
                "no volume: taken as suspended, all fields NaN that day",
                raw[idle], columns=["instrument", "date", "close", "volume"],
            )  # fmt: skip
        return ~idle
    return raw["close"].notna().to_numpy()


def _read_index(
    plan: Mapping_, read: Mapping[str, pd.DataFrame], report: Report
) -> pd.DataFrame | None:
    frames = [
        checks.drop_duplicates(read[s.name], s.name, report)
        for s in plan.of_kind("index")
        if s.name in read
    ]
    if not frames:
        return None
    index = pd.concat(frames, ignore_index=True)
    wrong = ~(index["close"] > 0)
    if wrong.any():
        report.add(
            "error", "non-positive prices", plan.of_kind("index")[0].name,
            "an index level must be above 0", index[wrong],
            columns=["instrument", "date", "close"],
        )  # fmt: skip
    return index


def _read_members(
    plan: Mapping_, read: Mapping[str, pd.DataFrame], report: Report
) -> pd.DataFrame | None:
    """Dated lists of all indices: ``market``, ``date``, ``instrument``, ``weight``."""
    frames = []
    for source in plan.of_kind("members"):
        if source.name not in read:
            continue
        frame = read[source.name]
        names = {str(k): str(v) for k, v in (source.options.get("names") or {}).items()}
        market = frame["index"].astype(str).map(lambda s, n=names: n.get(s, s))
        frame = frame.assign(market=market.map(_market_name))
        if "weight" not in frame:
            frame["weight"] = np.nan
        frame = frame[["market", "date", "instrument", "weight"]]
        foreign = ~frame["instrument"].str.fullmatch(r"(SH|SZ|BJ)\d{6}")
        if plan.codes == "cn" and foreign.any():
            report.add(
                "warning", "foreign members", source.name,
                "codes of no A-share exchange are left out of the lists",
                frame[foreign], columns=["market", "date", "instrument"],
            )  # fmt: skip
            frame = frame[~foreign]
        twice = frame.duplicated(["market", "date", "instrument"])
        if twice.any():
            report.add(
                "warning", "duplicate members", source.name,
                "a stock is listed twice in one list; the first is kept", frame[twice],
            )  # fmt: skip
            frame = frame[~twice]
        if (frame["weight"] < 0).any():
            report.add(
                "error", "negative weights", source.name, "a weight is below 0",
                frame[frame["weight"] < 0],
            )  # fmt: skip
        _check_sizes(frame, source, report)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None


def _market_name(name: str) -> str:
    try:
        code = normalise_codes(pd.Series([name]), "index", index=True).iloc[0]
    except ValueError:
        return name.strip().lower().replace(" ", "_").replace(".", "_")
    return {
        "SH000300": "csi300",
        "SH000905": "csi500",
        "SH000852": "csi1000",
        "SH000906": "csi800",
        "SZ399300": "csi300",
        "SZ399905": "csi500",
    }.get(str(code), str(code).lower())


def _check_sizes(frame: pd.DataFrame, source: Source, report: Report) -> None:
    sizes = source.options.get("sizes") or {}
    count = frame.groupby(["market", "date"]).size().rename("members").reset_index()
    count["expected"] = count["market"].map(sizes)
    wrong = count[count["expected"].notna() & (count["members"] != count["expected"])]
    if len(wrong):
        report.add(
            "warning", "size of member lists", source.name,
            "lists do not have the size of their index; they are taken as they are",
            wrong,
        )  # fmt: skip
    else:
        report.ok("size of member lists", source.name)


def _read_industry(
    plan: Mapping_, read: Mapping[str, pd.DataFrame], report: Report
) -> tuple[pd.DataFrame | None, dict[str, str]]:
    """Industry history with number codes, and the names of the codes."""
    sources = [s for s in plan.of_kind("industry") if s.name in read]
    if not sources:
        return None, {}
    source, frame = sources[0], read[sources[0].name]
    text = frame["code"].astype("string").str.strip()
    digits = int(source.options.get("digits", 0))
    number = text.str.extract(r"^(\d+)", expand=False)
    if number.notna().all():
        code = number.str[:digits] if digits else number
        code = code.astype("float64")
    else:
        # names instead of codes: numbered in sorted order
        order = {name: i + 1 for i, name in enumerate(sorted(text.dropna().unique()))}
        code = text.map(order).astype("float64")
        frame = frame.assign(name=text)
    frame = frame.assign(code=code)
    names = {}
    if "name" in frame:
        known = frame.dropna(subset=["name"]).sort_values("start")
        names = dict(
            zip(known["code"].astype(int).astype(str), known["name"], strict=True)
        )
    fallback = {str(k): str(v) for k, v in (source.options.get("names") or {}).items()}
    for value in sorted(frame["code"].dropna().astype(int).astype(str).unique()):
        names.setdefault(value, fallback.get(value, f"industry {value}"))
    keep = ["instrument", "start", "code", *(["end"] if "end" in frame else [])]
    twice = frame.duplicated(["instrument", "start"], keep=False)
    clash = frame[twice].groupby(["instrument", "start"])["code"].nunique()
    if (clash > 1).any():
        report.add(
            "warning", "two industries at once", source.name,
            "a stock starts in two industries on one day; the last row is taken",
            clash[clash > 1].reset_index(),
        )  # fmt: skip
    return frame[keep].drop_duplicates(["instrument", "start"], keep="last"), names


# --------------------------------------------------------------------------- building


def _build(
    root: Path,
    plan: Mapping_,
    given: _Input,
    report: Report,
    *,
    write: bool,
    progress: bool,
) -> IngestResult:
    main = plan.of_kind("bars")[0].name
    bars, state = convert.stock_bars(given.raw, plan)
    checks.check_store_bars(bars, given.raw, plan, main, report)
    calendar = pd.DatetimeIndex(np.sort(bars["datetime"].unique()))
    if given.industry is not None:
        bars["industry"] = _industry_column(bars, given.industry, report)
    bars, spans, cover = _add_members(bars, given.members, calendar, report)
    index_codes: list[str] = []
    if given.index is not None:
        index = convert.index_bars(given.index, calendar)
        index = _without_stocks(index, bars, report)
        index_codes = sorted(index["instrument"].unique())
        bars = pd.concat([bars, index], ignore_index=True)
    report.stop_on_errors()
    tables = {STATE_TABLE: state}
    if given.industry is not None:
        tables[INDUSTRY_TABLE] = given.industry.reset_index(drop=True)
    if given.members is not None:
        tables[MEMBERS_TABLE] = given.members.reset_index(drop=True)
    meta = _meta(plan, given, cover)
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
            files=_report_files(report),
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


def _report_files(report: Report) -> dict[str, str]:
    return {
        "ingest_report.json": report.to_json(),
        "ingest_report.md": report.to_markdown(),
    }


def _industry_column(
    bars: pd.DataFrame, history: pd.DataFrame, report: Report
) -> np.ndarray:
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


def _add_members(
    bars: pd.DataFrame,
    members: pd.DataFrame | None,
    calendar: pd.DatetimeIndex,
    report: Report,
    *,
    after: pd.Timestamp | None = None,
    span_of: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], dict[str, Any]]:
    """Add ``weight_<index>``; return spans by market and how much of it we hold."""
    spans: dict[str, pd.DataFrame] = {}
    cover: dict[str, Any] = {}
    if members is None:
        return bars, spans, cover
    own = bars.groupby("instrument")["datetime"].agg(["min", "max"])
    if span_of is not None:
        own = own.combine_first(span_of)
    # lists dated after the last day are for a later update
    current = members[members["date"] <= calendar[-1]]
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
    own: pd.DataFrame,
    after: pd.Timestamp | None,
) -> pd.DataFrame:
    """Weights per day and member, summing to 1 a day over the members listed then.

    Kept on suspended days: a suspended member is still in the index.
    """
    first = calendar.searchsorted(own["min"].reindex(periods["instrument"]))
    last = calendar.searchsorted(own["max"].reindex(periods["instrument"]), "right") - 1
    start = np.maximum(periods["first"].to_numpy(), first)
    if after is not None:
        start = np.maximum(start, calendar.searchsorted(after, "right"))
    end = np.minimum(periods["last"].to_numpy(), last)
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


def _meta(plan: Mapping_, given: _Input, cover: Mapping[str, Any]) -> dict[str, Any]:
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
        },
        "adjustment": {
            "prices": adjusted_by,
            "anchor": "factor is 1 on a stock's first traded day in the store",
            "volume": "shares / factor" if plan.prices == "raw" else "shares as traded",
            "amount": "CNY as traded",
            "vwap": "amount / volume x factor"
            if plan.prices == "raw"
            else "absent: amount / volume is not adjusted",
        },
        "index_members": dict(cover),
        "notes": notes,
    }
