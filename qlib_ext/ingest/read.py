"""Vendor files to frames of roles: codes as SH600000, plain dates, store units."""

from __future__ import annotations

import csv
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
from tqdm import tqdm

from data_handlers.codes import code_of_file, normalise_codes
from qlib_ext.ingest.mapping import FILENAME, KINDS, UNITS, Source, unit_scale

__all__ = ["find_files", "normalise_codes", "parse_dates", "read_source"]

SUFFIXES = (".parquet", ".csv", ".csv.gz", ".txt")
_MISSING = ["", "-", "--", "None", "none", "null", "NULL", "NaN", "nan", "N/A"]
_DATES = ("date", "start", "end", "period", "announced")
_TEXTS = ("index", "code", "name", "item")


def find_files(source: Source, data: Path, override: Sequence[str] = ()) -> list[Path]:
    """List the files of a source: explicit paths, globs or directories, sorted.

    Parameters
    ----------
    source : Source
        From the mapping.
    data : Path
        Directory that relative patterns start from.
    override : sequence of str
        Paths given on the command line; they take the place of the mapping's.

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
            hits = [
                p
                for p in sorted(base.rglob("*"))
                if p.is_file() and p.name.lower().endswith(SUFFIXES)
            ]
        else:
            hits = [Path(p) for p in sorted(glob.glob(str(base), recursive=True))]
            hits = [p for p in hits if p.is_file()]
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
    source: Source, files: Sequence[Path], *, codes: str = "cn", progress: bool = False
) -> pd.DataFrame:
    """Read and unify all files of a source.

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
        disable=not progress,
    )
    frames = [_read_file(source, file, codes) for file in bar]
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        raise ValueError(f"source `{source.name}` has no rows in {len(files)} file(s).")
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def _read_file(source: Source, file: Path, codes: str) -> pd.DataFrame:
    where = f"{file} (source `{source.name}`)"
    if file.stat().st_size == 0:
        raise ValueError(f"{where} is empty (0 bytes); fetch it again.")
    expect = source.options.get("expect") or {}
    table, names = _open(file, source, where)
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
            f"it has {names}."
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
                keep_unknown=source.kind == "members",
            )
        elif role in _DATES:
            empty_ok = role in ("end", "announced")
            out[role] = parse_dates(values, at, empty_ok=empty_ok)
        elif role in _TEXTS:
            out[role] = values.astype(object).where(values.notna(), None)
        else:
            number = _numbers(values, at)
            if role in UNITS:
                unit = source.units.get(role) or next(iter(UNITS[role]))
                scale = unit_scale(role, unit)
                number = number if scale == 1 else number * scale
            out[role] = number
    return pd.DataFrame(out)


def _text_roles(source: Source) -> tuple[str, ...]:
    return ("instrument", *_DATES, *_TEXTS)


def _open(file: Path, source: Source, where: str) -> tuple[Any, list[str]]:
    """Return a reader of chosen columns and the names of all columns."""
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
    text = _decode(file, source, where)
    first = text.split("\n", 1)[0]
    sep = max(",\t;|", key=first.count)
    try:
        header = pd.read_csv(io.StringIO(text), sep=sep, nrows=0)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{where} is no readable CSV file: {error}") from error
    names = [str(c) for c in header.columns]
    last = text.rstrip().rsplit("\n", 1)[-1]
    if len(next(csv.reader([last], delimiter=sep), [])) < len(names):
        raise ValueError(
            f"{where} ends in a line with fewer fields than its header; the download "
            "broke off? Fetch it again."
        )

    def read_csv(columns: list[str], texts: list[str | None]) -> pd.DataFrame:
        dtypes = {c: str for c in columns if c in texts}
        try:
            # all columns, not `usecols`: with it pandas cuts overlong lines silently
            frame = pd.read_csv(
                io.StringIO(text),
                sep=sep,
                dtype=dtypes,  # type: ignore[arg-type]
                na_values=_MISSING,
                keep_default_na=False,
                low_memory=False,
            )
        except (pd.errors.ParserError, ValueError) as error:
            raise ValueError(f"{where} is no readable CSV file: {error}") from error
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError(
                f"{where} is no readable CSV file: its lines have more fields than "
                f"its header ({len(names)})."
            )
        return frame[columns]

    return read_csv, names


def _decode(file: Path, source: Source, where: str) -> str:
    """Text of a CSV: the mapping's encoding, else UTF-8, else GB18030."""
    if file.name.lower().endswith(".gz"):
        import gzip

        try:
            raw = gzip.decompress(file.read_bytes())
        except (OSError, EOFError) as error:
            raise ValueError(f"{where} is no readable gzip file: {error}") from error
    else:
        raw = file.read_bytes()
    if source.encoding:
        try:
            return raw.decode(source.encoding)
        except LookupError:
            raise ValueError(
                f"source `{source.name}`: `encoding`={source.encoding!r} is unknown; "
                "use utf-8 or gb18030."
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not {source.encoding}: {error}.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    lines = raw.split(b"\n")
    utf8, other = None, None
    for number, line in enumerate(lines, 1):
        if line.isascii():
            continue
        try:
            line.decode("utf-8")
            utf8 = utf8 or number
        except UnicodeDecodeError:
            other = other or number
        if utf8 and other:
            raise ValueError(
                f"{where} mixes encodings: line {utf8} is UTF-8 and line {other} is "
                "not; convert it to one encoding."
            )
    try:
        return raw.decode("gb18030")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is neither UTF-8 nor GB18030 text ({error}); set `encoding` of "
            f"source `{source.name}` in the mapping."
        ) from error


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


def _numbers(values: pd.Series, at: str) -> pd.Series:
    if pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values):
        return values.astype("float64")
    text = values.astype("string").str.strip()
    text = text.mask(text.isin(_MISSING))
    number = pd.to_numeric(text.str.replace(",", "", regex=False), errors="coerce")
    bad = number.isna() & text.notna()
    if bad.any():
        row = int(np.argmax(bad.to_numpy()))
        raise ValueError(
            f"{at} has {int(bad.sum())} value(s) that are no numbers, first "
            f"{text.iloc[row]!r} in data row {row + 1}."
        )
    return number.astype("float64")


def parse_dates(values: pd.Series, at: str, *, empty_ok: bool = False) -> pd.Series:
    """Parse days: dates, timestamps, 20200102, 2020-01-02, 2020/1/2, or 2020-01.

    A month stands for its last day. A time of day is dropped.

    Raises
    ------
    ValueError
        If a value is no date, or missing where it must not be.
    """
    if pd.api.types.is_datetime64_any_dtype(values):
        if getattr(values.dt, "tz", None) is not None:
            values = values.dt.tz_localize(None)
        days = values.dt.normalize()
    else:
        codes, uniques = pd.factorize(values)
        parsed = [_one_date(u) for u in uniques]
        bad = [u for u, p in zip(uniques, parsed, strict=True) if p is None]
        if bad:
            raise ValueError(
                f"{at} has {len(bad)} value(s) that are no dates, first {bad[0]!r}; "
                "use 2020-01-02 or 20200102."
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


def _one_date(value: Any) -> pd.Timestamp | None:
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
    if month:
        stamp += pd.offsets.MonthEnd(0)
    return stamp.tz_localize(None).normalize()
