"""Read a mapping's sources, check them, and join them into one input of an ingest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from qlib.log import get_module_logger

from data_handlers.codes import CODE, a_share_code, was_renamed
from data_handlers.vendor.mapping import INTRADAY, Source, VendorMapping
from data_handlers.vendor.read import find_files, read_source
from qlib_ext.ingest import checks
from qlib_ext.ingest.futures import continuous
from qlib_ext.ingest.holdings import holding_table
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.statements import statement_table

__all__ = ["Input", "read_all", "read_sources"]

logger = get_module_logger("qlib_ext.ingest")

# In the title of an export: adjusted forward, backward.
_ADJUSTED = "前复权|后复权|[qh]fq"


@dataclass
class Input:
    """Everything read from vendor files, checked, in store units."""

    raw: pd.DataFrame
    index: pd.DataFrame | None = None
    members: pd.DataFrame | None = None
    industry: pd.DataFrame | None = None
    industry_names: dict[str, str] = field(default_factory=dict)
    statements: pd.DataFrame | None = None
    holdings: pd.DataFrame | None = None
    files: dict[str, list[str]] = field(default_factory=dict)


def read_all(
    plan: VendorMapping,
    data: Path,
    files: Mapping[str, Sequence[str]],
    report: Report,
    *,
    update: bool,
    progress: bool,
    known_names: Mapping[str, str] | None = None,
) -> Input:
    """Read, join and check all sources of a mapping.

    Raises
    ------
    IngestError
        If the checks find errors.
    ValueError
        If files and mapping do not fit.
    """
    main = plan.main.name
    read, used = read_sources(plan, data, files, report, progress=progress)
    index, days = _read_index(plan, read, report)
    raw = _join(plan, read, report, update)
    checks.one_company_twice(raw, main, report)
    if plan.codes == "cn":
        checks.others_among(raw, main, report)
    bad = checks.check_bars(raw, plan, main, report, index_days=days, full=not update)
    if bad.any():
        raw = _leave_out(raw, bad)
    report.stop_on_errors()
    given = Input(raw=raw, index=index, files=used)
    given.members = _read_members(plan, read, report)
    given.industry, given.industry_names = _read_industry(
        plan, read, report, known_names or {}
    )
    given.statements = statement_table(read, plan.of_kind("statements"), report)
    given.holdings = holding_table(
        read,
        plan.of_kind("holdings"),
        pd.DatetimeIndex(np.sort(raw["date"].unique())),
        report,
    )
    report.stop_on_errors()
    return given


def read_sources(
    plan: VendorMapping,
    data: Path,
    files: Mapping[str, Sequence[str]],
    report: Report,
    *,
    progress: bool,
) -> tuple[dict[str, pd.DataFrame], dict[str, list[str]]]:
    """Read the day files of a mapping: rows and file names by source.

    Raises
    ------
    ValueError
        If files and mapping do not fit.
    """
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
        if source.kind in INTRADAY:
            continue  # for `qlib-ext build`
        unread: list[str] = []
        found = find_files(source, data, files.get(source.name, ()), unread)
        if unread:
            report.add(
                "warning", "files not read", source.name,
                "files in forms that are not read lie beside the others; save them as "
                "CSV or Parquet", pd.DataFrame({"file": unread}),
            )  # fmt: skip
        if not found:
            continue
        empty: list[Path] = []
        failed: list[tuple[Path, str]] = []
        titles: list[tuple[Path, str]] = []
        read[source.name] = read_source(
            source, found, codes=plan.codes, tz=plan.tz, progress=progress, empty=empty,
            failed=failed if report.drop_bad_rows else None, titles=titles,
        )  # fmt: skip
        _tell_titles(titles, plan, source, report)
        if failed:
            report.add(
                "warning", "unreadable files", source.name,
                "files that cannot be read are left out; fetch them again",
                pd.DataFrame(failed, columns=["file", "why"]).astype({"file": str}),
            )  # fmt: skip
        if plan.renames:
            _rename(read[source.name], plan.renames)
        if "instrument" in read[source.name]:
            stored = read[source.name]["instrument"].unique().tolist()
            renamed = sorted(name for name in stored if was_renamed(name))
            if renamed:
                report.add(
                    "warning", "renamed codes", source.name,
                    "Qlib would read these codes as blanks; stored with _ behind them",
                    pd.DataFrame({"stored as": renamed}),
                )  # fmt: skip
        if empty:
            report.add(
                "warning", "empty files", source.name,
                "files without a row are left out; fetch them again",
                pd.DataFrame({"file": [p.name for p in empty]}),
            )  # fmt: skip
        used[source.name] = [p.name for p in found]
    return read, used


def _tell_titles(
    titles: list[tuple[Path, str]], plan: VendorMapping, source: Source, report: Report
) -> None:
    """Note lines that are left out; refuse adjusted prices that are declared raw."""
    if not titles:
        return
    rows = pd.DataFrame(titles, columns=["file", "line"]).astype({"file": str})
    report.add("note", "lines left out", source.name, "lines that are no rows", rows)
    adjusted = rows["line"].str.contains(_ADJUSTED)
    if source.kind == "bars" and plan.prices == "raw" and adjusted.any():
        report.add(
            "error", "adjusted prices", source.name,
            "the file calls its prices adjusted, and the mapping says `prices: raw`: "
            "fetch them unadjusted, or use a mapping of adjusted prices",
            rows[adjusted],
        )  # fmt: skip


def _rename(frame: pd.DataFrame, renames: Mapping[str, str]) -> None:
    """Give renamed stocks their new code, in place."""
    if "instrument" in frame:
        new = frame["instrument"].map(renames)
        frame["instrument"] = new.where(new.notna(), frame["instrument"])


def _leave_out(raw: pd.DataFrame, bad: np.ndarray) -> pd.DataFrame:
    """Leave out rows, keeping the chain of previous closes.

    The next row's `preclose` becomes that of the first row left out before it, so an
    ex-date on that day still counts and its return is not taken for one.
    """
    logger.warning("%d row(s) with errors are left out", int(bad.sum()))
    if "preclose" not in raw:
        return raw[~bad].reset_index(drop=True)
    stock = raw["instrument"]
    after_bad = pd.Series(bad, raw.index).groupby(stock).shift(fill_value=False)
    starts = bad & ~after_bad.to_numpy(dtype=bool)
    close = raw["close"].where(raw["traded"] & ~bad)
    last = close.groupby(stock).ffill().groupby(stock).shift()
    preclose = raw["preclose"].where(raw["preclose"] > 0).fillna(last)
    chain = preclose.where(starts | ~bad).groupby(stock).ffill()
    moved = chain.groupby(stock).shift()
    ends = ~bad & after_bad.to_numpy(dtype=bool)
    raw = raw.assign(preclose=raw["preclose"].where(~ends, moved))
    return raw[~bad].reset_index(drop=True)


def _join(
    plan: VendorMapping,
    read: Mapping[str, pd.DataFrame],
    report: Report,
    update: bool,
) -> pd.DataFrame:
    """Bars with the fields of the other files beside them, sorted, no duplicates."""
    main = plan.main
    if main.kind == "futures":
        raw = continuous(read[main.name], main, report, update=update)
    else:
        raw = checks.drop_duplicates(read[main.name], main.name, report)
    keys = ("instrument", "date")
    for source in plan.of_kind("fields") + plan.of_kind("flow"):
        if source.name not in read:
            continue
        extra = checks.fields_beside(raw, read[source.name], source.name, report)
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
    raw["traded"] = _traded(raw, plan, main, report)
    if {"amount", "volume"} <= set(raw):
        void = (raw["traded"] & (raw["amount"] == 0) & (raw["volume"] > 0)).to_numpy()
        if void.any():
            report.add(
                "warning", "amount of 0", main.name,
                "0 on days with volume: taken as unknown", raw[void],
                columns=["instrument", "date", "volume", "amount"],
            )  # fmt: skip
            raw["amount"] = raw["amount"].where(~void)
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


def _traded(
    raw: pd.DataFrame, plan: VendorMapping, main: Source, report: Report
) -> np.ndarray:
    """Days on which the stock traded, however a suspension is written.

    A suspended day is one that the vendor marks, or one without volume: empty, zero, or
    less than half a share (a feed's zero read as 5.9e-39). Without a volume it is a day
    without amount or, without that too, without any price. All its fields are NaN.
    """
    marked = raw["trading"].eq(1).to_numpy() if "trading" in raw else True
    size = next((c for c in ("volume", "amount") if c in raw), None)
    if size is None:
        prices = raw[["open", "high", "low", "close"]]
        return marked & (prices.notna() & (prices != 0)).any(axis=1).to_numpy()
    value = raw[size].to_numpy()
    least = 0.5 if plan.codes == "cn" else 1e-6
    idle = marked & ~(value >= least) & ~(value <= -least)
    if "trading" in raw:
        moved = ~marked & (value >= least) & (raw["high"] > raw["low"]).to_numpy()
        if moved.any():
            level = "error" if moved.sum() > 0.01 * len(raw) else "warning"
            report.add(
                level, "suspended with a trade", main.name,
                "marked as not trading, but with a volume and prices that move: is the "
                "flag 1 on suspended days (QMT's suspendFlag)? `trading` is 1 on days "
                "with trade; without the column a day without volume is suspended",
                raw[moved], columns=["instrument", "date", "close", size],
            )  # fmt: skip
    if idle.any():
        how = "marked as trading, but without" if "trading" in raw else "no"
        report.add(
            "warning", f"no {size}", main.name,
            f"{how} {size}: taken as suspended, all fields NaN that day",
            raw[idle], columns=["instrument", "date", "close", size],
        )  # fmt: skip
    return marked & ~idle


def _read_index(
    plan: VendorMapping, read: Mapping[str, pd.DataFrame], report: Report
) -> tuple[pd.DataFrame | None, pd.DatetimeIndex | None]:
    """Bars of indices, and the days that the files have."""
    frames = [
        checks.drop_duplicates(read[s.name], s.name, report)
        for s in plan.of_kind("index")
        if s.name in read
    ]
    if not frames:
        return None, None
    index = pd.concat(frames, ignore_index=True)
    name = plan.of_kind("index")[0].name
    bad = np.zeros(len(index), dtype=bool)
    for column, mask in checks.infinite(index).items():
        bad |= report.bad_rows(
            f"infinite {column}", name, f"{column} is infinite", index, mask & ~bad,
            ["instrument", "date", column],
        )  # fmt: skip
    wrong = ~(index["close"] > 0).to_numpy()
    if wrong.any():
        bad |= report.bad_rows(
            "non-positive prices", name, "an index level must be above 0", index, wrong,
            ["instrument", "date", "close"],
        )  # fmt: skip
    # a level that is left out leaves its day a trading day
    days = pd.DatetimeIndex(np.sort(index["date"].unique()))
    return index[~bad].reset_index(drop=True), days


def _read_members(
    plan: VendorMapping, read: Mapping[str, pd.DataFrame], report: Report
) -> pd.DataFrame | None:
    """Dated lists of all indices: ``market``, ``date``, ``instrument``, ``weight``."""
    frames = []
    for source in plan.of_kind("members"):
        if source.name not in read:
            continue
        frame = read[source.name]
        names = {str(k): str(v) for k, v in (source.options.get("names") or {}).items()}
        texts = frame["index"].astype(str)
        table = {t: _market_name(names.get(t, t)) for t in texts.unique()}
        frame = frame.assign(market=texts.map(table))
        if "weight" not in frame:
            frame["weight"] = np.nan
        frame = frame[["market", "date", "instrument", "weight"]]
        foreign = ~frame["instrument"].str.fullmatch(CODE)
        if plan.codes == "cn" and foreign.any():
            report.add(
                "note", "foreign members", source.name,
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
        _check_weights(frame, source, report)
        _check_sizes(frame, source, report)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None


def _market_name(name: str) -> str:
    code = a_share_code(name, index=True)
    if code is None:
        return name.strip().lower().replace(" ", "_").replace(".", "_")
    return {
        "SH000300": "csi300",
        "SH000905": "csi500",
        "SH000852": "csi1000",
        "SH000906": "csi800",
        "SZ399300": "csi300",
        "SZ399905": "csi500",
    }.get(code, code.lower())


def _check_weights(frame: pd.DataFrame, source: Source, report: Report) -> None:
    """Refuse lists whose weights are a power of ten off 1 in sum; warn of others."""
    check = "sum of weights"
    of = frame.groupby(["market", "date"])["weight"].agg(["sum", "count", "size"])
    known = (of["count"] == of["size"]) & of["sum"].notna()
    total = of.loc[known, ["sum"]].reset_index()
    slip = (
        (total["sum"] > 1.5) | (checks.powers(total["sum"]) != 0) | (total["sum"] == 0)
    )
    off = (total["sum"] - 1).abs() > 0.05
    if slip.any():
        report.add(
            "error", check, source.name, "the weights of a list sum to 1 as fractions; "
            "set `units: {weight: percent}` (or fraction), or mend a single weight",
            total[slip],
        )  # fmt: skip
    elif off.any():
        report.add(
            "warning", check, source.name, "the weights of these lists do not sum to "
            "100 %: parts of lists? They are taken as they are", total[off],
        )  # fmt: skip
    else:
        report.ok(check, source.name)


def _check_sizes(frame: pd.DataFrame, source: Source, report: Report) -> None:
    sizes = source.options.get("sizes") or {}
    count = frame.groupby(["market", "date"]).size().rename("members").reset_index()
    usual = count.groupby("market")["members"].transform("median")
    many = count.groupby("market")["members"].transform("size") >= 3
    other = many & ((count["members"] / usual - 1).abs() > 0.1)
    count["expected"] = count["market"].map(sizes).fillna(usual.where(other))
    wrong = count[count["expected"].notna() & (count["members"] != count["expected"])]
    if len(wrong):
        report.add(
            "warning", "size of member lists", source.name,
            "lists do not have the size of their index, or of its other lists; they "
            "are taken as they are",
            wrong,
        )  # fmt: skip
    else:
        report.ok("size of member lists", source.name)


def _read_industry(
    plan: VendorMapping,
    read: Mapping[str, pd.DataFrame],
    report: Report,
    known_names: Mapping[str, str],
) -> tuple[pd.DataFrame | None, dict[str, str]]:
    """Industry history with number codes, and the names of the codes.

    Where the vendor has names only, codes number the sorted names; `known_names`, from
    the store that is updated, keep theirs.
    """
    sources = [s for s in plan.of_kind("industry") if s.name in read]
    if not sources:
        return None, {}
    source, frame = sources[0], read[sources[0].name]
    if "end" in frame:
        over = (frame["end"] < frame["start"]).to_numpy()
        if over.any():
            bad = report.bad_rows(
                "ends before it starts", source.name, "the days of an industry are "
                "swapped or wrong", frame, over, [*map(str, frame)],
            )  # fmt: skip
            frame = frame[~bad].reset_index(drop=True)
    text = frame["code"].astype("string").str.strip()
    digits = int(source.options.get("digits", 0))
    number = text.str.extract(r"^(\d+)", expand=False)
    mixed = number.notna() & text.notna()
    if mixed.any() and (text.notna() & number.isna()).any():
        report.add(
            "warning", "industries of two kinds", source.name,
            "some are codes and some are names: two schemes in one table? They are "
            "taken for names, each an industry of its own", frame[mixed],
        )  # fmt: skip
    if number.notna().all():
        code = number.str[:digits] if digits else number
        code = code.astype("float64")
    else:
        # names instead of codes: numbered in sorted order
        order = {name: int(value) for value, name in known_names.items()}
        for name in sorted(text.dropna().unique()):
            order.setdefault(name, max(order.values(), default=0) + 1)
        code = text.map(order).astype("float64")
        frame = frame.assign(name=text)
    frame = frame.assign(code=code)
    names: dict[str, str] = {}
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
