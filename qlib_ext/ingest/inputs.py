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
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.statements import statement_table

__all__ = ["Input", "read_all"]

logger = get_module_logger("qlib_ext.ingest")


@dataclass
class Input:
    """Everything read from vendor files, checked, in store units."""

    raw: pd.DataFrame
    index: pd.DataFrame | None = None
    members: pd.DataFrame | None = None
    industry: pd.DataFrame | None = None
    industry_names: dict[str, str] = field(default_factory=dict)
    statements: pd.DataFrame | None = None
    files: dict[str, list[str]] = field(default_factory=dict)


def read_all(
    plan: VendorMapping,
    data: Path,
    files: Mapping[str, Sequence[str]],
    report: Report,
    *,
    update: bool,
    drop_bad_rows: bool,
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
    if not plan.of_kind("bars"):
        raise ValueError(
            f"`mapping` {plan.name} has no source of kind bars, so it makes no day "
            "store; `qlib-ext build` reads its minute bars and ticks."
        )
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
        found = find_files(source, data, files.get(source.name, ()))
        if not found:
            continue
        empty: list[Path] = []
        read[source.name] = read_source(
            source, found, codes=plan.codes, tz=plan.tz, progress=progress, empty=empty
        )
        if "instrument" in read[source.name]:
            names = read[source.name]["instrument"]
            renamed = sorted(filter(was_renamed, names.unique()))
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
    given = Input(raw=raw, index=index, files=used)
    given.members = _read_members(plan, read, report)
    given.industry, given.industry_names = _read_industry(
        plan, read, report, known_names or {}
    )
    given.statements = statement_table(read, plan.of_kind("statements"), report)
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
    plan: VendorMapping, read: Mapping[str, pd.DataFrame], report: Report
) -> pd.DataFrame:
    """Bars with the fields of the other files beside them, sorted, no duplicates."""
    main = plan.of_kind("bars")[0]
    raw = checks.drop_duplicates(read[main.name], main.name, report)
    keys = ("instrument", "date")
    for source in plan.of_kind("fields") + plan.of_kind("flow"):
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
    plan: VendorMapping, read: Mapping[str, pd.DataFrame], report: Report
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
    text = frame["code"].astype("string").str.strip()
    digits = int(source.options.get("digits", 0))
    number = text.str.extract(r"^(\d+)", expand=False)
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
