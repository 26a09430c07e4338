"""Vendors' CSV files: encodings, titles, footers, separators, numbers."""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["MISSING", "Text", "is_text", "left_out", "numbers", "read_text"]

#: What vendors write for a missing number or text.
MISSING = ["", "-", "--", "—", "None", "none", "null", "NULL", "NaN", "nan", "N/A"]
MISSING += ["NA", "#N/A", "<NA>", "NaT", "\\N"]
#: Endings of tables that are not read here: Excel, archives, other stores.
_UNREAD = re.compile(
    r"\.(xlsx?|xlsm|zip|7z|rar|bz2|xz|zst|tar|tgz|feather|arrow|h5|hdf5?|pkl|pickle|"
    r"json|jsonl|db|sqlite|dta|mat|dat|day|lc[15]|pq|tsv)$",
    re.IGNORECASE,
)
#: First bytes of such files, whatever their name says.
_FORMS = {
    b"PAR1": "a Parquet file; name it .parquet",
    b"\x1f\x8b": "packed by gzip; name it .csv.gz",
    b"PK\x03\x04": "a workbook or a zip archive; save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it as CSV",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"BZh": "packed by bzip2; unpack it",
    b"\xfd7zXZ": "packed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"ARROW1": "a Feather file; save it as Parquet",
    b"\x89HDF": "an HDF5 file; save it as Parquet",
}
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|table|head|body)", re.I)
_JSON = re.compile(rb"(\xef\xbb\xbf)?\s*\[?\s*\{\s*\"")
_HEAD = 1 << 18
_TITLE_LINES = 10
_FOOTER = re.compile(r"\s*#|.{0,40}(来源|[Ss]ource)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
_POINTS = re.compile(r"[+-]?\d{1,3}(\.\d{3})+(,\d*)?")  # between thousands


@dataclass(frozen=True)
class Text:
    """A CSV file.

    Attributes
    ----------
    data : bytes
        UTF-8, from the header on.
    sep : str
        Between the fields.
    names : list of str
        Of the columns.
    above : int
        Lines above the header, for row numbers.
    title : str
        What these lines say.
    again : int
        Times that the header stood among the rows, left out.
    """

    data: bytes
    sep: str
    names: list[str]
    above: int = 0
    title: str = ""
    again: int = 0


def is_text(path: str | Path) -> bool:
    """Whether a file is read as CSV, by its ending."""
    return str(path).lower().endswith((".csv", ".csv.gz", ".txt", ".txt.gz"))


def left_out(paths: Iterable[str | Path]) -> list[str]:
    """Files among `paths` that look like tables in a form that is not read."""
    return sorted(str(path) for path in paths if _UNREAD.search(str(path)))


def read_text(
    path: str | Path,
    where: str,
    *,
    known: Collection[str] = (),
    encoding: str | None = None,
    skip: int | None = None,
    footer: int | None = None,
    head: bool = False,
) -> Text:
    """Read a CSV file: comma, tab, semicolon or bar; UTF-8 or GB18030; maybe gzip.

    Parameters
    ----------
    path : path
        The file.
    where : str
        The file in messages.
    known : collection of str
        Names of columns looked for: a first line without any, above one with at least
        two, is a title and left out.
    encoding : str, optional
        By default UTF-8, else GB18030.
    skip, footer : int, optional
        Lines above the header and behind the last row that are left out; by default
        titles, and footers that begin with # or name a source, are recognised.
    head : bool, default False
        Read the beginning only, for the names of the columns.

    Raises
    ------
    ValueError
        If the file cannot be read, naming it.
    """
    raw = _bytes(path, where, head)
    _check_form(raw, where)
    raw = _decoded(raw, where, encoding)
    lines = raw.split(b"\n", _TITLE_LINES + (skip or 0))
    above = _title(lines, known) if skip is None else skip
    first = lines[above].decode() if above < len(lines) else ""
    sep = max(",\t;|", key=first.count)
    names = next(csv.reader([first.strip("\r")], delimiter=sep), [])
    names = [name.strip() for name in names]
    if twice := [n for n in names if n in known and names.count(n) > 1]:
        raise ValueError(
            f"{where} has {names.count(twice[0])} columns {twice[0]!r}, and which is "
            "meant cannot be told; rename or remove the others."
        )
    # others, such as two without a name, are told apart by blanks
    names = [n if n not in names[:i] else n + " " * i for i, n in enumerate(names)]
    title = b" ".join(lines[:above]).decode()
    if above:
        raw = raw[sum(len(line) + 1 for line in lines[:above]) :]
    if head:
        return Text(raw, sep, names, above, title)
    # files put together keep the header of each
    line = b"\n" + lines[above] + b"\n" if above < len(lines) else b"\n\n"
    again = raw.count(line) if first.strip() else 0
    raw = raw.replace(line, b"\n") if again else raw
    raw = raw.rstrip()
    for _ in range(3 if footer is None else footer):
        rest, _, last = raw.rpartition(b"\n")
        text = last.decode()
        if footer is None and not (_short(text, sep, names) and _FOOTER.match(text)):
            break
        raw = rest.rstrip()
    end = raw.rpartition(b"\n")[2].decode()
    if _short(end, sep, names):
        raise ValueError(
            f"{where} ends in a line with fewer fields than its header, {end[:60]!r}; "
            "the download broke off? Fetch it again; a footer is left out by `footer: "
            "1` in the mapping."
        )
    _check_fields(raw, sep, len(names), where, above)
    return Text(raw + b"\n", sep, names, above, title, again)


def _check_fields(raw: bytes, sep: str, fields: int, where: str, above: int) -> None:
    """Refuse lines inside a file that end early: parsers fill them up with blanks."""
    lines = raw.count(b"\n") + 1
    if b'"' in raw or raw.count(sep.encode()) == lines * (fields - 1):
        return
    data = np.frombuffer(raw + b"\n", np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.r_[0, ends[:-1] + 1]
    blank = (ends - starts <= 1) & (fields > 1)
    found = np.add.reduceat(data == ord(sep), starts, dtype=np.int64)
    short = ~blank & (found < fields - 1)
    if short.any():
        at = int(np.argmax(short))
        text = raw[starts[at] : ends[at]].decode().strip()
        raise ValueError(
            f"{where}, line {above + at + 1}, has {int(found[at]) + 1} fields where "
            f"the header has {fields}: {text[:60]!r} ({int(short.sum())} such "
            "line(s)); a download that broke off, or two programs that wrote at once? "
            "Fetch it again."
        )


def _short(line: str, sep: str, names: list[str]) -> bool:
    return len(next(csv.reader([line], delimiter=sep), [])) < len(names)


def _title(lines: list[bytes], known: Collection[str]) -> int:
    """Lines above the header; 0 unless a later line is clearly the header."""
    for number, line in enumerate(lines[:_TITLE_LINES]):
        fields = re.split(r'[,\t;|"\r]+', line.decode())
        hits = len({field.strip() for field in fields} & set(known))
        if hits >= (2 if number else 1):
            return number
    return 0


def _bytes(path: str | Path, where: str, head: bool) -> bytes:
    size = _HEAD if head else -1
    try:
        if str(path).lower().endswith(".gz"):
            with gzip.open(path) as file:
                raw = file.read(size)
        else:
            with open(path, "rb") as file:
                raw = file.read(size)
    except (EOFError, OSError, zlib.error) as error:
        kind = "gzip" if str(path).lower().endswith(".gz") else "CSV"
        raise ValueError(f"{where} is no readable {kind} file: {error}") from error
    if head and len(raw) == _HEAD:
        raw = raw[: raw.rfind(b"\n") + 1] or raw
    return raw


def _check_form(raw: bytes, where: str) -> None:
    """Refuse what is no text of a table, by its first bytes."""
    form = next((text for start, text in _FORMS.items() if raw.startswith(start)), None)
    if _PAGE.match(raw):
        form = "a web page or XML; an error of the server, or a table to save as CSV?"
    elif _JSON.match(raw):
        form = "JSON; save it as CSV"
    if form:
        raise ValueError(f"{where} is no CSV file but {form}{'.' * (form[-1] != '?')}")


def _decoded(raw: bytes, where: str, encoding: str | None) -> bytes:
    """UTF-8 of a file, its lines ended by a line feed."""
    raw = _utf8(raw, where, encoding)
    # as old Macs end lines
    return raw if b"\n" in raw else raw.replace(b"\r", b"\n")


def _utf8(raw: bytes, where: str, encoding: str | None) -> bytes:
    """UTF-8 of a file: by the mapping's encoding, else its mark, UTF-8 or GB18030."""
    if not encoding and raw[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        raise ValueError(
            f"{where} is UTF-32 text; save it as UTF-8, or set `encoding: utf-32` in "
            "its source of the mapping."
        )
    if not encoding and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        try:  # as Excel saves "Unicode text"; a part may end within a character
            return codecs.getincrementaldecoder("utf-16")().decode(raw).encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"{where} begins as UTF-16 and is not: {error}") from error
    if not encoding and b"\0" in raw:
        at = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise ValueError(
            f"{where} has zero bytes, first in line {at}: a file that was not "
            "written to its end (fetch it again), or UTF-16 without its mark (set "
            "`encoding: utf-16-le` in its source of the mapping)."
        )
    if encoding:
        try:
            return raw.decode(encoding).encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"{where} is not {encoding}: {error}.") from error
    if raw.isascii():
        return raw
    try:
        raw.decode("utf-8")
        return raw.removeprefix(b"\xef\xbb\xbf")
    except UnicodeDecodeError:
        pass
    utf8, other = None, None
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.isascii():
            continue
        try:
            # two bytes of GB18030 may be one letter of UTF-8; its Chinese takes three
            if max(line.decode("utf-8")) >= "\u0800":
                utf8 = utf8 or number
        except UnicodeDecodeError:
            other = other or number
        if utf8 and other:
            raise ValueError(
                f"{where} mixes encodings: line {utf8} is UTF-8 and line {other} is "
                "not; convert it to one encoding."
            )
    try:
        return raw.decode("gb18030").encode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is neither UTF-8 nor GB18030 text ({error}); set `encoding` of "
            "its source in the mapping."
        ) from error


def numbers(
    values: pd.Series, at: str, *, decimal: str | None = None, price: bool = False
) -> pd.Series:
    """Return numbers as float64; commas between thousands are left out.

    Parameters
    ----------
    values : Series
        Numbers, or their text.
    at : str
        File and column, for messages.
    decimal : {".", ","}, optional
        The decimal mark. By default a point, and a comma that may be one is an error.
    price : bool, default False
        Prices: "10,500" is not taken as ten thousand.

    Raises
    ------
    ValueError
        If a value is no number, or its comma may be a decimal one.
    """
    is_number = pd.api.types.is_numeric_dtype(values)
    if pd.api.types.is_bool_dtype(values) or is_number:
        return values.astype("float64")
    text = values.astype("string").str.strip()
    text = text.mask(text.isin(MISSING))
    comma = text.str.contains(",", regex=False).fillna(False)
    if decimal == ",":
        point = text.str.contains(".", regex=False).fillna(False)
        odd = point & ~text.str.fullmatch(_POINTS.pattern).fillna(False)
        if odd.any() and comma.any():
            row = int(np.argmax(odd.to_numpy(dtype=bool)))
            raise ValueError(
                f"{at} has the value {text.iloc[row]!r} in data row {row + 1}, whose "
                'point parts no thousands, and `decimal: ","` is said; write one mark '
                "throughout."
            )
        if not odd.any():  # else it is a column of plain points
            text = text.str.replace(".", "", regex=False)
            text = text.str.replace(",", ".", regex=False)
    elif comma.any():
        if decimal is None:
            _check_commas(text, comma, at, price)
        text = text.str.replace(",", "", regex=False)
    number = pd.to_numeric(text, errors="coerce")
    bad = number.isna() & text.notna()
    if bad.any():
        row = int(np.argmax(bad.to_numpy(dtype=bool)))
        raise ValueError(
            f"{at} has {int(bad.sum())} value(s) that are no numbers, first "
            f"{str(values.iloc[row]).strip()!r} in data row {row + 1}; write plain "
            "numbers, without signs, units or words, and declare the unit in the "
            "mapping."
        )
    return number.astype("float64")


def _check_commas(text: pd.Series, comma: Any, at: str, price: bool) -> None:
    """Refuse a comma that may be a decimal one."""
    plain = text.str.fullmatch(_THOUSANDS.pattern).fillna(False)
    odd = comma & ~plain
    if price and not odd.any():
        clear = text.str.count(",").gt(1) | text.str.contains(".", regex=False)
        odd = comma & ~clear.fillna(False).any()
    if odd.any():
        row = int(np.argmax(odd.to_numpy(dtype=bool)))
        raise ValueError(
            f"{at} has the value {text.iloc[row]!r} in data row {row + 1}: a decimal "
            'comma? Say which in its source of the mapping: `decimal: ","`, or '
            '`decimal: "."` if commas part thousands.'
        )
