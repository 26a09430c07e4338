"""What a task learned from: fingerprints of a store's numbers up to a day."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from qlib.data import D

from data_handlers.files import fingerprint
from data_handlers.loaders import expand_store

__all__ = ["files_of", "fingerprints"]

_Span = tuple[int, int]  # slots of the calendar, the second excluded

# A row of Qlib's point-in-time files: day of announcement, period, value, next row.
_STATEMENT = np.dtype(
    [("date", "<u4"), ("period", "<u4"), ("value", "<f8"), ("next", "<u4")]
)


def fingerprints(
    provider: str, ends: Sequence[Any], files: Iterable[Path] = ()
) -> list[str]:
    """Fingerprint all that a store and further files say of the days up to each end.

    Days that are appended later change nothing; a corrected value, a stock or a member
    that is added, a rebuilt Parquet file do.

    Parameters
    ----------
    provider : str
        Qlib's day store.
    ends : sequence of date-like
        Last days, both included.
    files : iterable of Path
        Further files and folders that the workflow names.

    Returns
    -------
    list of str
        One for each end; empty where the store is no folder.
    """
    root = Path(provider)
    if not (root / "features").is_dir():
        return [""] * len(ends)
    calendar = pd.DatetimeIndex(D.calendar(freq="day"))
    # Whole years and what remains of the last one: an end's fingerprint does not
    # depend on the others, and every number is read once or twice.
    years = [
        int(calendar.searchsorted(pd.Timestamp(y, 1, 1))) for y in _years(calendar)
    ]
    slots = [int(calendar.searchsorted(pd.Timestamp(e), "right")) for e in ends]
    spans: dict[int, list[_Span]] = {}
    for slot in slots:
        begun = [y for y in years if y < slot]
        spans[slot] = list(zip(begun, [*begun[1:], slot], strict=True))
    blocks = {
        span: hashlib.blake2b(digest_size=16) for s in spans.values() for span in s
    }
    timeless = hashlib.blake2b(digest_size=16)
    for file in sorted(root.glob("features/*/*.day.bin")):
        values = np.fromfile(file, "<f4")
        start = int(values[0]) if len(values) else 0
        mark = f"{file.parent.name}/{file.name}@{start}".encode()
        for (a, b), block in blocks.items():
            part = values[1:][max(a - start, 0) : max(b - start, 0)]
            if len(part):
                block.update(mark)
                block.update(part.tobytes())
    for span, name, rows in _statements(root, calendar, blocks):
        blocks[span].update(fingerprint(name, rows).encode())
    tables = set(root.glob("*.parquet"))
    for folder in root.iterdir():
        if folder.name != "features":  # of all its files none is a table
            tables |= set(folder.rglob("*.parquet"))
    for path in files:
        tables |= set(path.rglob("*.parquet")) if path.is_dir() else {path}
    for file in sorted(tables):
        for at, part in _parts(file, calendar, blocks):
            block = timeless if at is None else blocks[at]
            block.update(fingerprint(file.name, part).encode())
    return [
        fingerprint(
            timeless.hexdigest(),
            [blocks[span].hexdigest() for span in spans[slot]],
            _members(root, calendar[slot - 1] if slot else calendar[0]),
        )
        for slot in slots
    ]


def files_of(node: Any) -> list[Path]:
    """Files and folders that a configuration names."""
    if isinstance(node, Mapping):
        return [p for value in node.values() for p in files_of(value)]
    if isinstance(node, (list, tuple)):
        return [p for value in node for p in files_of(value)]
    if isinstance(node, str) and ("/" in node or "." in node) and len(node) < 1000:
        path = Path(expand_store(node))
        if path.exists():
            return [path]
    return []


def _years(calendar: pd.DatetimeIndex) -> range:
    return range(calendar[0].year, calendar[-1].year + 1)


def _members(root: Path, last: pd.Timestamp) -> list:
    """Spans of the markets, as they could be told on a day."""
    found, day = [], f"{last:%Y-%m-%d}"
    for file in sorted(root.glob("instruments/*.txt")):
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [line.split() for line in lines if line.strip()]
        spans = sorted([c, s, min(e, day)] for c, s, e, *_ in rows if s <= day)
        found.append([file.name, spans])
    return found


def _statements(
    root: Path, calendar: pd.DatetimeIndex, spans: Iterable[_Span]
) -> Iterator[tuple[_Span, str, list]]:
    """Give the rows of point-in-time files to the days of their announcement."""
    days = (calendar.year * 10_000 + calendar.month * 100 + calendar.day).to_numpy()
    for file in sorted(root.glob("financial/*/*.data")):
        rows = np.fromfile(file, _STATEMENT)
        slot = np.searchsorted(days, rows["date"])
        for a, b in spans:
            part = rows[(slot >= a) & (slot < b)][["date", "period", "value"]]
            if len(part):
                yield (a, b), f"{file.parent.name}/{file.name}", part.tolist()


def _parts(
    file: Path, calendar: pd.DatetimeIndex, spans: Iterable[_Span]
) -> Iterator[tuple[_Span | None, Any]]:
    """Give a file's rows to the spans of their days, a closed year's as a whole."""
    if file.suffix != ".parquet":
        yield None, file
        return
    name = file.stem[-4:]
    year = int(name) if name.isdigit() else 0
    if year in _years(calendar)[:-1]:
        first, last = (
            int(calendar.searchsorted(pd.Timestamp(y, 1, 1))) for y in (year, year + 1)
        )
        spans = [span for span in spans if span[0] == first]
        if (first, last) in spans:
            yield (first, last), file
            spans = [span for span in spans if span != (first, last)]
    if not spans:
        return
    frame = pd.read_parquet(file)
    if "datetime" not in frame and "datetime" in frame.index.names:
        frame = frame.reset_index()
    if "datetime" not in frame:
        yield None, file
        return
    slot = calendar.searchsorted(pd.DatetimeIndex(frame["datetime"]))
    for a, b in spans:
        part = frame[(slot >= a) & (slot < b)]
        if len(part):
            yield (a, b), part
