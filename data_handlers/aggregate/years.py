"""Yearly files: partitions put together, and what needs the day before.

The overnight return is made of closes that may lie in another partition or build. They
are kept in ``.parts`` for every day of the yearly files. A day store in their place
would remove nothing: builds without one stay, so the 140 lines that join days would
stand beside a second way, whose values differ where the vendor's open and close are not
those of the first and last bar. Nor is there time to gain: joining takes 0.05 s of the
1.0 s of processor time of a build (60 stocks, three years of 15-minute bars, one
thread), and the build without it takes as long. Ticks have no such feature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from qlib.log import get_module_logger
from tqdm import tqdm

from data_handlers.aggregate.columns import dictionary_codes
from data_handlers.aggregate.minute import overnight_returns
from data_handlers.aggregate.partition import (
    KEYS,
    LAYOUT,
    first_of,
    key_table,
    part_file,
)
from data_handlers.aggregate.plan import Part, features_of
from data_handlers.aggregate.report import BuildReport
from data_handlers.aggregate.schema import SCHEMA_VERSION, get_session
from data_handlers.files import write_parquet

__all__ = ["assemble"]

#: Columns of partitions that the overnight return is made of, and what it is added to.
_OVERNIGHT = ["open", "close", "factor", "ms_mom"]
#: No exchange of `schema.py` stays closed this long: such a gap is of the store.
_LONGEST_CLOSURE = np.timedelta64(20, "D")

logger = get_module_logger("aggregate")


def assemble(
    folder: Path,
    parts: list[Part],
    marks: Mapping[str, str],
    factors: pd.Series | None,
    report: BuildReport,
    progress: bool,
) -> None:
    """Put the partitions' stock-days into the yearly files; all others stay.

    Years after them are written again where the overnight return of their first days
    continues from a close that changed.
    """
    kind = report.kind
    features = features_of(
        kind, get_session(report.options["session"]), report.options["bar_minutes"]
    )
    names = [f.name for f in features]
    by_year: dict[int, list[Part]] = {}
    for part in parts:
        for year in _years_of(folder, part):
            by_year.setdefault(year, []).append(part)
    todo = set(by_year)
    if kind == "ms":
        later = [y for y in _stored_years(folder) if y > min(by_year)]
        todo |= {y for y in later if not _differences(_meta(folder, y), report)}
    given = None if factors is None else _Factors(factors)
    salt = "" if factors is None else _hash_of(factors)
    years = tqdm(
        sorted(todo),
        desc=f"{kind} years",
        unit="year",
        disable=None if progress and len(todo) > 2 else True,
    )
    for year in years:
        own = by_year.get(year, [])
        meta = _meta(folder, year)
        # A year follows from its partitions and the closes of the years before it.
        plan = _digest(marks[p.key] for p in own) if own else meta["plan"]
        last = max((y for y in _stored_years(folder) if y < year), default=None)
        known = [_meta(folder, last)["mark"]] if kind == "ms" and last else []
        before = _digest([salt, *known])
        if (plan, before) == (meta.get("plan"), meta.get("before")) and (
            kind != "ms" or _closes_file(folder, year, meta).exists()
        ):
            continue
        unlike = _differences(meta, report) if meta else ""
        when, code, labels, columns, counts = _year_rows(
            folder, own, year, meta, whole_days=bool(unlike)
        )
        if unlike and counts["kept"]:
            raise ValueError(
                f"{folder / f'{year}.parquet'} holds {counts['kept']} stock-days of "
                f"other days, built with another {unlike}. Build all days of {year} "
                "from their source in one run, or choose another `out`."
            )
        for count, note in (
            ("twice", "stock-days found in two partitions (first kept)"),
            ("stale", "stock-days kept though their day came again without the stock"),
        ):
            if counts[count]:
                report.notes[note] = report.notes.get(note, 0) + counts[count]
        mark = _digest([plan, before, meta.get("mark", "") if counts["kept"] else ""])
        if kind == "ms":
            carry = _last_closes(folder, last)
            closes, blind = _add_overnight(when, code, labels, columns, carry, given)
            if blind:
                note = "stock-days without ms_overnight: the close before is not known"
                report.notes[note] = report.notes.get(note, 0) + blind
            # Named by the mark: whenever a kill comes, the yearly file finds its own.
            state = _closes_file(folder, year, {"mark": mark})
            write_parquet(state, closes, **LAYOUT)
        narrow = {n: columns[n].astype(np.float32) for n in names}
        table = key_table(when, code, labels, narrow)
        facts = {
            "kind": kind,
            "schema_version": str(SCHEMA_VERSION[kind]),
            "plan": plan,
            "before": before,
            "mark": mark,
            "options": json.dumps(report.options, default=str),
            "features": json.dumps([asdict(f) for f in features], ensure_ascii=False),
        }
        table = table.replace_schema_metadata(
            {f"qlib_ext.{k}": v for k, v in facts.items()}
        )
        write_parquet(
            folder / f"{year}.parquet", table, row_group_size=131072, **LAYOUT
        )
        if kind == "ms":
            for path in state.parent.glob(f"closes-{year}-*.parquet"):
                if path != state:
                    path.unlink()
    for year in _stored_years(folder):
        if year not in by_year:
            logger.info("%s: no partition covers %d in this build", folder, year)
    report.years = sorted(by_year)
    report.bytes_out = sum(
        (folder / f"{y}.parquet").stat().st_size for y in report.years
    )


def _digest(texts: Iterable[str]) -> str:
    # SHA-256 as in the yearly files that users hold: another hash would write all anew.
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _hash_of(factors: pd.Series) -> str:
    values = pd.util.hash_pandas_object(factors.dropna().sort_index())
    return hashlib.sha256(values.to_numpy().tobytes()).hexdigest()


def _stored_years(folder: Path) -> list[int]:
    return sorted(int(p.stem) for p in folder.glob("[12][0-9][0-9][0-9].parquet"))


def _years_of(folder: Path, part: Part) -> list[int]:
    if part.key[:4].isdigit():
        return [int(part.key[:4])]
    column = pq.read_table(part_file(folder, part.key), columns=["datetime"])
    days = column.column("datetime").to_numpy().astype("datetime64[Y]")
    return sorted({int(str(y)) for y in np.unique(days)})


def _meta(folder: Path, year: int) -> dict[str, str]:
    """Read what a yearly file says of itself; empty if there is none."""
    path = folder / f"{year}.parquet"
    try:
        meta = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        return {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it and build all days of {year}."
        ) from error
    start = len("qlib_ext.")
    facts = {
        k.decode()[start:]: v.decode()
        for k, v in meta.items()
        if k.startswith(b"qlib_ext.")
    }
    return {"plan": "", "mark": "", **facts}


def _differences(meta: Mapping[str, str], report: BuildReport) -> str:
    """Name what makes a yearly file's features others than this build's; "" if equal.

    How a source is read may change, and so may the list of half days.
    """
    mine = {**report.options, "schema version": report.schema_version}
    theirs = json.loads(meta.get("options", "{}"))
    theirs["schema version"] = int(meta.get("schema_version", 0))
    return ", ".join(
        f"{name} ({theirs.get(name)!r}, now {value!r})"
        for name, value in mine.items()
        if name not in ("mapping", "early_close") and theirs.get(name) != value
    )


def _closes_file(folder: Path, year: int, meta: Mapping[str, str]) -> Path:
    """File of what the overnight returns of a yearly file are made of."""
    return folder / ".parts" / f"closes-{year}-{meta.get('mark', '')[:16]}.parquet"


def _last_closes(folder: Path, year: int | None) -> pd.DataFrame:
    """Each stock's last day, close and factor up to the end of a year.

    NaN where only the yearly file is left of them.
    """
    columns = ["datetime", "instrument", "close", "factor"]
    if year is None:
        return pd.DataFrame(columns=columns).set_index("instrument")
    path = _closes_file(folder, year, _meta(folder, year))
    if path.exists():
        rows = pd.read_parquet(path, columns=columns)
    else:
        rows = pd.read_parquet(folder / f"{year}.parquet", columns=KEYS)
        rows = rows.reindex(columns=columns)
    rows = rows.drop_duplicates("instrument", keep="last")
    return rows.set_index(rows.pop("instrument").astype(object))


def _year_rows(
    folder: Path,
    parts: list[Part],
    year: int,
    meta: Mapping[str, str],
    whole_days: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Rows of a year, sorted by day and instrument, each stock-day once.

    Those of the partitions, and all others of the yearly file: a source may hold one
    more stock as well as one more day. With `whole_days`, those of other days only.

    Returns
    -------
    (days, codes, labels of the codes, columns, counts of stock-days found twice in the
    partitions, kept from the yearly file, kept of days that the partitions hold)
    """
    tables = [pq.ParquetFile(part_file(folder, p.key)).read() for p in parts]
    new = sum(table.num_rows for table in tables)
    if meta:
        tables.append(_stored_rows(folder, year, meta))
    for k, table in enumerate(tables):
        at = table.column_names.index("instrument")
        if not pa.types.is_dictionary(table.column(at).type):
            tables[k] = table.set_column(
                at, "instrument", table.column(at).dictionary_encode()
            )
    table = pa.concat_tables(tables, promote_options="permissive")
    when = table.column("datetime").to_numpy().astype("datetime64[ns]")
    labels, code = dictionary_codes(table.column("instrument"))
    order = np.lexsort((code, when))
    order = order[when[order].astype("datetime64[Y]") == np.datetime64(str(year))]
    first, old = first_of(when[order], code[order]), order >= new
    stale = first & old & np.isin(when[order], np.unique(when[:new]))
    if whole_days:
        first &= ~stale
    counts = {
        "twice": int((~first & ~old).sum()),
        "kept": int((first & old).sum()),
        "stale": int((first & stale).sum()),
    }
    order = order[first]
    columns = {
        name: table.column(name).to_numpy()[order]
        for name in table.column_names
        if name not in KEYS
    }
    return when[order], code[order], labels, columns, counts


def _stored_rows(folder: Path, year: int, meta: Mapping[str, str]) -> pa.Table:
    """Rows of a yearly file, in the form of a partition's."""
    with pq.ParquetFile(folder / f"{year}.parquet") as file:
        table = file.read()
    if meta.get("kind") != "ms":
        return table
    path = _closes_file(folder, year, meta)
    if path.exists():
        with pq.ParquetFile(path) as file:
            closes = file.read()
        closes = closes.slice(closes.num_rows - table.num_rows)
        raw = {c: closes.column(c) for c in _OVERNIGHT}
    else:
        nothing = np.full(table.num_rows, np.nan)
        moves = [table.column(c).to_numpy() for c in ("ms_mom", "ms_overnight")]
        raw = {c: pa.array(nothing) for c in _OVERNIGHT}
        raw["ms_mom"] = pa.array(np.subtract(*moves, dtype=np.float64))
    table = table.drop_columns("ms_mom")
    for name, values in raw.items():
        table = table.append_column(name, values)
    return table


class _Factors:
    """Adjustment factors by (datetime, instrument), looked up by sorted numbers."""

    def __init__(self, factors: pd.Series) -> None:
        factors = factors.dropna()
        index = factors.index
        self.days = pd.DatetimeIndex(index.get_level_values(0)).as_unit("ns")
        self.codes, self.labels = pd.factorize(index.get_level_values(1), sort=True)
        key = self._key(self.days.to_numpy(), self.codes)
        order = np.argsort(key)
        self.key, self.value = key[order], factors.to_numpy(dtype=float)[order]

    def _key(self, when: np.ndarray, code: np.ndarray) -> np.ndarray:
        days = when.astype("datetime64[D]").astype(np.int64)
        return days * (len(self.labels) + 1) + code

    def of(self, when: np.ndarray, code: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Factors of rows, NaN where there is none."""
        mine = pd.Index(self.labels).get_indexer(pd.Index(labels))[code]
        key = self._key(when, mine)
        at = np.minimum(np.searchsorted(self.key, key), max(len(self.key) - 1, 0))
        if not len(self.key):
            return np.full(len(key), np.nan)
        return np.where((self.key[at] == key) & (mine >= 0), self.value[at], np.nan)


def _add_overnight(
    when: np.ndarray,
    code: np.ndarray,
    labels: np.ndarray,
    columns: dict[str, np.ndarray],
    carry: pd.DataFrame,
    factors: _Factors | None,
) -> tuple[pa.Table, int]:
    """Complete the columns that need the day before.

    Parameters
    ----------
    when, code, labels, columns
        Rows of a year; see `_year_rows`.
    carry : DataFrame
        Each stock's last day, close and factor before these rows.
    factors : _Factors, optional
        Adjustment factors that go before the rows' own.

    Returns
    -------
    closes, blind
        `carry` and the rows, with what this needed of them; number of rows that have
        an earlier one but no overnight return.
    """

    def factor_of(when, code, labels, own):
        if factors is None:
            return own
        known = factors.of(when, code, labels)
        return np.where(np.isfinite(known), known, own)

    factor = factor_of(when, code, labels, columns["factor"])
    last = carry["datetime"].to_numpy().astype("datetime64[ns]")
    carry = carry.assign(
        factor=factor_of(
            last, np.arange(len(carry)), carry.index, carry["factor"].to_numpy(float)
        )
    )
    before = (carry["close"] * carry["factor"]).reindex(labels).to_numpy(dtype=float)
    # Days that are not in the store part the rows: what is before them is not the
    # close of the day before.
    days = np.unique(np.append(when, last.max())) if len(last) else np.unique(when)
    holes = days[1:][np.diff(days) > _LONGEST_CLOSURE]
    part, parts = np.searchsorted(holes, when, side="right"), len(holes) + 1
    known = np.full(len(labels) * parts, np.nan)
    known[::parts] = before
    overnight = overnight_returns(
        code * parts + part,
        when,
        opened=columns["open"] * factor,
        closed=columns["close"] * factor,
        before=known,
    )
    # What the yearly file knew goes on where its closes were lost.
    overnight = np.where(np.isnan(overnight), columns["ms_overnight"], overnight)
    here = labels[np.unique(code)]
    new = len(here) - int(pd.Index(here).isin(carry.index).sum())
    raw = {c: columns[c] for c in _OVERNIGHT} | {"factor": factor}
    closes = key_table(when, code, labels, raw)
    columns["ms_overnight"] = overnight
    columns["ms_mom"] = columns["ms_mom"] + overnight
    nothing = np.full(len(carry), np.nan)
    earlier = key_table(
        last,
        np.arange(len(carry)),
        carry.index.to_numpy(),
        {c: carry[c].to_numpy(float) if c in carry else nothing for c in _OVERNIGHT},
    )
    closes = pa.concat_tables([earlier, closes])
    return closes, max(int(np.isnan(overnight).sum()) - new, 0)
