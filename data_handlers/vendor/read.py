"""Day files of vendors to frames of roles: Qlib codes, plain dates, store units."""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.typing import NaTType
from tqdm import tqdm

from data_handlers.codes import code_of_file, normalise_codes
from data_handlers.vendor.mapping import (
    FILENAME,
    KINDS,
    UNITS,
    Source,
    load_mapping,
    preset_names,
)
from data_handlers.vendor.text import MISSING, is_text, left_out, numbers, read_text

__all__ = ["find_files", "parse_dates", "read_source"]

_END_DATES = ("end", "announced", "listed", "delisted", "conversion_ends", "matures")
_DATES = ("date", "start", "period", *_END_DATES)
_BOND_TEXTS = ("stock", "rating", "event", "issue_rating", "coupons")
_TEXTS = ("index", "code", "name", "item", "fund", "contract", *_BOND_TEXTS)
_LAST_YEAR = 2261  # of what pandas counts in nanoseconds


def find_files(
    source: Source,
    data: Path,
    override: Sequence[str] = (),
    unread: list[str] | None = None,
) -> list[Path]:
    """List the files of a source: explicit paths, globs or directories, sorted.

    Parameters
    ----------
    source : Source
        From the mapping.
    data : Path
        Directory that relative patterns start from.
    override : sequence of str
        Paths given on the command line; they take the place of the mapping's.
    unread : list of str, optional
        Gets the files in directories that look like tables in a form that is not read.

    Raises
    ------
    ValueError
        If a pattern given on the command line, or a source that is not optional, has
        no file.
    """
    patterns = list(override) or list(source.files)
    found: list[Path] = []
    for pattern in patterns:
        base = Path(pattern) if override else data / pattern
        if base.is_dir():
            files = [p for p in sorted(base.rglob("*")) if p.is_file()]
            # what begins with a dot is the system's own note on another file
            files = [p for p in files if not p.name.startswith((".", "~$"))]
            hits = [
                p for p in files if is_text(p) or p.name.lower().endswith(".parquet")
            ]
            if unread is not None:
                unread += left_out(files)
        else:
            hits = [Path(p) for p in sorted(glob.glob(str(base), recursive=True))]
            hits = [p for p in hits if p.is_file()]
            if base.name.endswith("*"):  # whatever lies there; named, it is read
                other = left_out(hits)
                hits = [p for p in hits if str(p) not in other]
                if unread is not None:
                    unread += other
        if not hits and override:
            raise ValueError(f"`file` {source.name}={pattern}: no such file.")
        found += hits
    if not found and not source.optional:
        looked = ", ".join(str(data / p) for p in patterns) or "nothing named"
        raise ValueError(
            f"source `{source.name}` has no file (looked for {looked}); give "
            f"`--data DIR` or `--file {source.name}=PATH`."
        )
    return list(dict.fromkeys(found))


def read_source(
    source: Source,
    files: Sequence[Path],
    *,
    codes: str = "cn",
    tz: str | None = "Asia/Shanghai",
    progress: bool = False,
    empty: list[Path] | None = None,
    failed: list[tuple[Path, str]] | None = None,
    titles: list[tuple[Path, str]] | None = None,
) -> pd.DataFrame:
    """Read and unify all files of a source.

    Parameters
    ----------
    source : Source
        From the mapping.
    files : sequence of Path
        From `find_files`.
    codes : {"cn", "futures", "asis"}
        As in the mapping.
    tz : str or None
        Zone of the exchange, whose day a stamp with a zone becomes.
    progress : bool, default False
        Show a progress bar.
    empty : list of Path, optional
        Gets the files without any row; they are left out if others have rows.
    failed : list of (Path, str), optional
        Gets the files that cannot be read, and why; they are left out if others can.
        Without it the first one is an error.
    titles : list of (Path, str), optional
        Gets the lines above or among the rows that are left out.

    Returns
    -------
    DataFrame
        One column per role present: ``instrument`` (text), dates (datetime64), texts,
        and numbers as float64 in the store's units. Row order is that of the files.

    Raises
    ------
    ValueError
        If a file cannot be read, lacks a required column, or has a value that is no
        number, date or code; the message names file, column and value.
    """
    bar = tqdm(
        files,
        desc=f"read {source.name}",
        unit="file",
        disable=None if progress else True,
    )
    frames, none = [], []
    for file in bar:
        try:
            frame = _read_file(source, file, codes, tz, titles)
        except ValueError as error:
            if failed is None:
                raise
            failed.append((file, str(error)))
            continue
        if frame is None or not len(frame):
            none.append(file)
        else:
            frames.append(frame)
    if not frames and failed:
        raise ValueError(failed[0][1])
    if not frames:
        size = "is empty (0 bytes)" if not none[0].stat().st_size else "has no rows"
        raise ValueError(
            f"source `{source.name}` has no rows in {len(files)} file(s): {none[0]} "
            f"{size}; fetch it again."
        )
    if empty is not None:
        empty += none
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def _read_file(
    source: Source,
    file: Path,
    codes: str,
    tz: str | None,
    titles: list[tuple[Path, str]] | None = None,
) -> pd.DataFrame | None:
    """Rows of one file; None for one that holds nothing at all."""
    where = f"{file} (source `{source.name}`)"
    if file.stat().st_size == 0:
        return None
    expect = source.options.get("expect") or {}
    opened = _open(file, source, where, titles)
    if opened is None:
        return None
    table, names = opened
    chosen: dict[str, str] = {}
    for role, options in source.columns.items():
        hit = next((o for o in options if o == FILENAME or o in names), None)
        if hit is not None:
            chosen[role] = hit
    required = KINDS[source.kind][0]
    missing = {r: source.columns[r] for r in required if r not in chosen}
    if missing:
        role, options = next(iter(missing.items()))
        raise ValueError(
            f"{where} lacks column {' or '.join(map(repr, options))} for `{role}`; "
            f"it has {names}{_fitting(source.kind, names)}{_headless(names)}."
        )
    wanted = {c for c in chosen.values() if c != FILENAME}
    wanted |= {c for c in expect if c in names}
    raw = table(sorted(wanted), [chosen.get(r) for r in _text_roles(source)])
    for column, allowed in expect.items():
        if column in raw:
            _check_expected(raw[column], column, allowed, where)
    out = {}
    for role, column in chosen.items():
        if column == FILENAME:
            values = pd.Series(code_of_file(file), raw.index, dtype=object)
        else:
            values = raw[column]
        at = f"{where}, column {column!r}"
        if role == "instrument":
            out[role] = normalise_codes(
                values,
                at,
                style=codes,
                index=source.kind == "index",
                # a list may hold other exchanges' stocks; they are left out by name
                keep_unknown=source.kind in ("members", "bond_terms"),
            )
        elif role in _DATES:
            empty_ok = role in _END_DATES
            out[role] = parse_dates(values, at, empty_ok=empty_ok, tz=tz)
        elif role in _TEXTS:
            out[role] = values.astype(object).where(values.notna(), None)
        else:
            price = UNITS.get(role) is UNITS["price"]
            number = numbers(values, at, decimal=source.decimal, price=price)
            scale = source.scale(role, column)
            out[role] = number if scale == 1 else number * scale
    return pd.DataFrame(out)


def _text_roles(source: Source) -> tuple[str, ...]:
    return ("instrument", *_DATES, *_TEXTS)


def _fitting(kind: str, names: Sequence[str]) -> str:
    """Hint at the presets whose columns a file has."""
    fit = []
    for preset in preset_names():
        for source in load_mapping(preset).of_kind(kind):
            need = [source.columns[role] for role in KINDS[kind][0]]
            if all(FILENAME in n or set(n) & set(names) for n in need):
                fit.append(preset)
    return f", the columns of the preset {' or '.join(fit)}" if fit else ""


def _headless(names: Sequence[str]) -> str:
    """Say that the first line holds values, not names."""
    values = sum(bool(re.fullmatch(r"[-+]?\d[\d.:/ -]*", name)) for name in names)
    if values <= len(names) / 2:
        return ""
    return "; a row of values, so the file has no header: put names above it"


def _open(
    file: Path,
    source: Source,
    where: str,
    titles: list[tuple[Path, str]] | None = None,
) -> tuple[Any, list[str]] | None:
    """Return a reader of chosen columns and the names of all; None without any."""
    if file.name.lower().endswith(".parquet"):
        try:
            names = list(pq.read_schema(file).names)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{where} is no readable Parquet file: {error}") from error

        def read_parquet(columns: list[str], _texts: list[str | None]) -> pd.DataFrame:
            try:
                table = pq.read_table(file, columns=columns)
                # plain columns: pandas' own notes in the file may be damaged
                plain = table.replace_schema_metadata(None)
                return plain.to_pandas(date_as_object=False)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{where} is no readable Parquet file: {error}"
                ) from error

        return read_parquet, names
    text = read_text(
        file,
        where,
        known=source.names(),
        encoding=source.encoding,
        skip=source.skip,
        footer=source.footer,
    )
    names = text.names
    if titles is not None and text.title.strip():
        titles.append((file, text.title.strip()))
    if titles is not None and text.again:
        titles.append((file, f"the header again, {text.again} x"))
    if not any(name.strip() for name in names):
        return None

    def read_csv(columns: list[str], texts: list[str | None]) -> pd.DataFrame:
        as_text = [c for c in columns if c in texts or source.decimal == ","]
        # a code is text whatever it says: NA is a listed ticker
        codes = source.columns.get("instrument", ())
        blank = {c: [""] if c in codes else MISSING for c in names}
        try:
            # all columns, not `usecols`: with it pandas cuts overlong lines silently
            frame = pd.read_csv(
                io.BytesIO(text.data),
                sep=text.sep,
                header=0,
                names=names,
                dtype=dict.fromkeys(as_text, str),  # type: ignore[arg-type]
                na_values=blank,
                keep_default_na=False,
                low_memory=False,
            )
        except (pd.errors.ParserError, ValueError) as error:
            raise ValueError(f"{where} is no readable CSV file: {error}") from error
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError(
                f"{where} is no readable CSV file: its lines have more fields than "
                f"its header ({len(names)}): commas at their ends, or in a text? Take "
                "them out, or name all fields in the header."
            )
        return frame[columns]

    return read_csv, names


def _check_expected(values: pd.Series, column: str, allowed: Any, where: str) -> None:
    options = {str(a) for a in (allowed if isinstance(allowed, list) else [allowed])}
    seen = values.dropna().unique()
    bad = [v for v in seen if str(v) not in options and _int_text(v) not in options]
    if bad:
        raise ValueError(
            f"{where}: column {column!r} must be {sorted(options)}, got "
            f"{str(bad[0])!r}; the mapping is for another kind of file."
        )


def _int_text(value: Any) -> str:
    try:
        return str(int(float(value)))
    except (TypeError, ValueError):
        return str(value)


def parse_dates(
    values: pd.Series,
    at: str,
    *,
    empty_ok: bool = False,
    tz: str | None = "Asia/Shanghai",
) -> pd.Series:
    """Parse days: dates, timestamps, 20200102, 2020-01-02, 2020/1/2, or 2020-01.

    A month stands for its last day. A time of day is dropped; a stamp with a time zone
    becomes the day of the exchange.

    Parameters
    ----------
    values : Series
        Days.
    at : str
        File and column, for messages.
    empty_ok : bool, default False
        Whether some may be missing.
    tz : str or None
        Zone of the exchange. None is unknown: only midnights with a zone are days.

    Raises
    ------
    ValueError
        If a value is no date, missing where it must not be, or of an unclear day.
    """
    if pd.api.types.is_datetime64_any_dtype(values):
        if getattr(values.dt, "tz", None) is not None:
            values = _exchange_day(values, at, tz)
        if (values.dt.year > _LAST_YEAR).any():
            values = values.astype(object)
    if pd.api.types.is_datetime64_any_dtype(values):
        days = values.dt.normalize()
    else:
        codes, uniques = pd.factorize(values)
        parsed = [_one_date(u, at, tz, empty_ok) for u in uniques]
        bad = [u for u, p in zip(uniques, parsed, strict=True) if p is None]
        if bad:
            row = int(np.argmax(values == bad[0]))
            raise ValueError(
                f"{at} has {len(bad)} value(s) that are no dates, first {bad[0]!r} in "
                f"data row {row + 1}; use 2020-01-02 or 20200102"
                f"{_number_of_day(bad[0])}."
            )
        table = pd.DatetimeIndex(parsed).append(pd.DatetimeIndex([pd.NaT]))
        days = pd.Series(table[codes], index=values.index)
    if not empty_ok and days.isna().any():
        row = int(np.argmax(days.isna().to_numpy()))
        raise ValueError(
            f"{at} has {int(days.isna().sum())} missing date(s), first in data row "
            f"{row + 1}."
        )
    return days.astype("datetime64[ns]")


def _number_of_day(value: Any) -> str:
    """Say what a number may be that is no date."""
    text = _int_text(value)
    kinds = {13: "milliseconds since 1970", 10: "seconds since 1970"}
    kinds |= {16: "microseconds since 1970", 19: "nanoseconds since 1970"}
    kinds[5] = "Excel's number of a day"
    kind = kinds.get(len(text)) if text.isdigit() else None
    return f" ({kind}? Write days before)" if kind else ""


def _exchange_day(values: pd.Series, at: str, tz: str | None) -> pd.Series:
    """Plain days of stamps with a zone."""
    written = values.dt.tz_localize(None).dt.normalize()
    midnight = values.dt.tz_localize(None) == written
    if tz is None:
        unclear, local = ~midnight, written
    else:
        there = values.dt.tz_convert(tz).dt.tz_localize(None)
        local = there.dt.normalize()
        # midnight here, but another day's evening there: a plain day marked with a zone
        unclear = midnight & (local != written) & (there != local)
    unclear &= values.notna()
    if unclear.any():
        row = int(np.argmax(unclear.to_numpy()))
        raise ValueError(
            f"{at} has the stamp {values.iloc[row]} in data row {row + 1}, and its day "
            f"in {tz or 'the zone of the exchange, which is not known,'} is unclear; "
            "give `session` in the mapping, or store plain dates."
        )
    return local


def _one_date(
    value: Any, at: str, tz: str | None, empty_ok: bool
) -> pd.Timestamp | NaTType | None:
    """Day of a value; None for what is no day, or one that is none, such as 9999."""
    text = str(value).strip()
    if re.fullmatch(r"\d{8}(\.0)?", text):
        text = f"{text[:4]}-{text[4:6]}-{text[6:8]}"
    month = re.fullmatch(r"(\d{4})[-/](\d{1,2})", text)
    if not month and not re.match(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}", text):
        return None
    try:
        stamp = pd.Timestamp(text)
    except ValueError:
        return None
    if stamp.year > _LAST_YEAR:  # how tables write that something has not ended
        return pd.NaT if empty_ok else None
    if month:
        stamp += pd.offsets.MonthEnd(0)
    if stamp.tzinfo is not None:
        stamp = _exchange_day(pd.Series([stamp]), at, tz).iloc[0]
    return stamp.normalize()
