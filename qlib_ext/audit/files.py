"""Files that a workflow opens outside its store: found, and cut like the store.

Opened files are seen by an audit hook of the interpreter, and by wrappers around the
readers of pyarrow and polars, which open files themselves. On a copy of the store with
another future the same wrappers hand out a copy of the file with the same future.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd

from qlib_ext.audit.stores import known_date

__all__ = ["FileTrace", "OutsideFile", "period_dated"]

CONFIG = {".yaml", ".yml", ".toml", ".ini", ".cfg", ".md"}
_CODE = {".py", ".pyc", ".pyd", ".so", ".nbi", ".nbc", ".pyx", ".ttf", ".mplstyle"}
_PLACES = {"__pycache__", ".git", "site-packages"}
_RUNS = {"mlruns", "mlartifacts"}  # where MLflow reads its own notes beside artifacts
_NOTES = {"meta.yaml", "tags", "params", "metrics"}
# What lies in memory below /dev/shm is data.
_SYSTEM = re.compile("/(proc|sys|dev(?!/shm/)|etc|usr)/|/lib")
# What is taken for data even where programs keep their own files.
_DATA = re.compile(
    r"\.(csv|tsv|txt|parquet|pq|feather|arrow|pkl|pickle|joblib|np[yz]|pt|bin|h5|hdf5|db"
    r"|sqlite|duckdb)(\.(gz|bz2|xz|zip|zst))?$",
    re.IGNORECASE,
)
_TEXT = re.compile(r"\.(csv|tsv|txt)(\.gz|\.bz2|\.xz|\.zip)?$", re.IGNORECASE)
# Readers that open files without the interpreter's knowledge.
_READERS = (
    ("pyarrow.parquet", ("read_table", "ParquetFile", "ParquetDataset")),
    ("pyarrow.dataset", ("dataset",)),
    ("pyarrow.feather", ("read_table", "read_feather")),
    ("pyarrow.csv", ("read_csv",)),
    ("pyarrow", ("memory_map", "OSFile")),
    ("polars", ("read_parquet", "scan_parquet", "read_csv", "scan_csv", "read_ipc")),
)
_WRITES = os.O_WRONLY | os.O_RDWR
_active: list[FileTrace] = []
_hooked: list[bool] = []


def _hook(event: str, args: tuple) -> None:
    if not _active:
        return
    if event == "open":
        path, mode, flags = args
        if isinstance(path, (str, bytes, os.PathLike)):
            writes = bool(flags & _WRITES) or (mode or "r")[:1] in "wax"
            for trace in list(_active):
                trace.note(path, writes)
    elif event == "sqlite3.connect" and isinstance(args[0], (str, bytes, os.PathLike)):
        if "mlflow" not in (text := os.fsdecode(args[0])) and "mlruns" not in text:
            for trace in list(_active):
                trace.note(text, False)
    elif event == "socket.connect":
        address = args[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            for trace in list(_active):
                trace.hosts.add(str(address[0]))


class FileTrace:
    """Files opened for reading while it watches.

    Parameters
    ----------
    inside : Path
        Folder of the audit, with the copies of the store.

    Attributes
    ----------
    store : set of Path
        Read below `inside`.
    outside : dict
        Path to `OutsideFile`, of files read elsewhere, without code and system files.
    hosts : set of str
        Connected to.
    escaped : set of Path
        Read although a copy should have been handed out.
    """

    def __init__(self, inside: Path) -> None:
        self.inside = Path(inside).resolve()
        self.store: set[Path] = set()
        self.outside: dict[Path, OutsideFile] = {}
        self.hosts: set[str] = set()
        self.escaped: set[Path] = set()
        self._written: set[str] = set()
        self._seen: set[str] = set()
        self._map: Mapping[Path, Path] | None = None
        own = {Path(__file__).resolve().parents[1]}
        for name in ("data_handlers", "qlib"):
            if file := getattr(sys.modules.get(name), "__file__", None):
                own.add(Path(file).resolve().parent)
        roots = {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)}
        self._skip = (*map(str, own), *(os.path.realpath(r) for r in roots))

    @contextmanager
    def watching(self, copies: Mapping[Path, Path] | None = None) -> Iterator[None]:
        """Note what is read meanwhile; hand out copies instead of some files.

        Parameters
        ----------
        copies : mapping, optional
            File to the copy that is read in its place.
        """
        if not _hooked:
            sys.addaudithook(_hook)
            _hooked.append(True)
        self._map = copies
        self._seen.clear()
        with ExitStack() as stack:
            for module, names in _READERS:
                if (found := sys.modules.get(module)) is None:
                    continue
                for name in names:
                    if hasattr(found, name):
                        self._wrap(stack, found, name)
            if copies:
                self._wrap(stack, builtins, "open")
                self._wrap(stack, io, "open")
            _active.append(self)
            try:
                yield
            finally:
                _active.remove(self)
                self._map = None

    def _wrap(self, stack: ExitStack, module: Any, name: str) -> None:
        original = getattr(module, name)
        if isinstance(original, type):
            start = getattr(original, "__init__")  # noqa: B009
            # A class stays one for isinstance; only what it is made of changes.
            replaced: Any = type(
                original.__name__,
                (original,),
                {"__init__": self._redirected(start, 1)},
            )
            if start is object.__init__ or module.__name__ == "pyarrow":
                return  # Cython classes take their path elsewhere
        else:
            replaced = self._redirected(original, 0)
        stack.enter_context(mock.patch.object(module, name, replaced))

    def _redirected(self, original: Callable, at: int) -> Callable:
        def opened(*args: Any, **kwargs: Any) -> Any:
            if len(args) > at and isinstance(args[at], (str, os.PathLike)):
                changed = self._for(args[at], original)
                args = (*args[:at], changed, *args[at + 1 :])
            return original(*args, **kwargs)

        return opened

    def _for(self, path: Any, original: Callable) -> Any:
        """Give the path to read in place of a path."""
        real = Path(os.path.realpath(path))
        copy = None if self._map is None else self._map.get(real)
        if copy is not None:
            return str(copy)
        if real.is_dir():
            for file in real.rglob("*"):
                if file.is_file():
                    self.note(file, False)
        elif "://" not in str(path) and real.is_file():
            self.note(path, False)
        return path

    def note(self, path: Any, writes: bool) -> None:
        """Note an opened file."""
        text = os.fsdecode(path)
        if text in self._seen:
            return
        real = os.path.realpath(text)
        if writes:
            self._written.add(real)
            return
        self._seen.add(text)
        if real.startswith(str(self.inside) + os.sep):
            self.store.add(Path(real))
            return
        file = Path(real)
        if (
            real in self._written
            or real.startswith(self._skip)
            or _SYSTEM.match(real)
            or not file.is_file()
            or file.suffix in _CODE
            or _PLACES & set(file.parts)
            or (_RUNS & set(file.parts) and _NOTES & {file.name, file.parent.name})
            or ({".cache", ".config"} & set(file.parts) and not _DATA.search(file.name))
        ):
            return
        if self._map is not None and file in self._map:
            self.escaped.add(file)
        if file not in self.outside:
            self.outside[file] = OutsideFile(file)


class OutsideFile:
    """A file that is no part of the store, as far as it can be read and cut.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._frame: pd.DataFrame | None = None
        self._problem: str | None = None

    @property
    def problem(self) -> str:
        """Why it cannot be cut at a day; empty if it can."""
        if self._problem is None:
            self._problem = self._look()
        return self._problem

    @property
    def config(self) -> bool:
        """Whether it is settings rather than data, by its name."""
        return self.path.suffix.lower() in CONFIG

    def _look(self) -> str:
        name = self.path.name.lower()
        try:
            if name.endswith((".parquet", ".pq")):
                self._frame = pd.read_parquet(self.path)
            elif _TEXT.search(name):
                self._frame = pd.read_csv(
                    self.path, dtype=str, keep_default_na=False, sep=self._sep()
                )
            elif name.endswith((".feather", ".arrow", ".ipc")):
                self._frame = pd.read_feather(self.path)
            else:
                return f"a {self.path.suffix or 'nameless'} file has no rows to cut"
        except (OSError, ValueError, UnicodeError) as error:
            return f"it cannot be read as a table: {' '.join(str(error).split())}"
        known = self.known()
        if known is None:
            return "its rows have no dates, so when they were known cannot be told"
        if period_dated(known):
            return (
                "its rows are dated by period ends only, so when they were announced "
                "cannot be told"
            )
        return ""

    def _sep(self) -> str:
        return "\t" if ".tsv" in self.path.name.lower() else ","

    def _flat(self) -> pd.DataFrame:
        frame = self._frame
        assert frame is not None
        return frame.reset_index() if frame.index.names != [None] else (
            frame.reset_index() if frame.index.dtype.kind == "M" else frame
        )  # fmt: skip

    def known(self) -> pd.Series | None:
        """Day on which each row became known; None without dates."""
        flat, dates = self._flat(), {}
        for name in flat.columns:
            if (day := _as_dates(flat[name])) is not None:
                dates[str(name)] = day
        return known_date(pd.DataFrame(dates)) if dates else None

    def codes(self) -> set[str]:
        """Texts in it, upper case, that may be codes: of columns, or of rows."""
        flat = self._flat()
        found = {str(c).upper() for c in flat.columns}
        for name in flat.columns:
            if flat[name].dtype.kind in "OTU" or str(flat[name].dtype) == "category":
                found |= set(flat[name].astype(str).str.upper().unique()[:10_000])
        return found

    def write(self, kind: str, day: pd.Timestamp, out: Path, seed: int) -> None:
        """Write a copy with nothing ("cut") or other numbers ("noise") after a day."""
        frame, known = self._frame, self.known()
        assert frame is not None and known is not None
        later = (known > day).fillna(False).to_numpy(bool)
        if kind == "cut":
            frame = frame[~later]
        elif kind == "noise":
            frame = _other_numbers(frame, later, np.random.default_rng(seed))
        out.parent.mkdir(parents=True, exist_ok=True)
        name = self.path.name.lower()
        if _TEXT.search(name):
            frame.to_csv(out, index=False, sep=self._sep())
        elif name.endswith((".parquet", ".pq")):
            frame.to_parquet(out)
        else:
            frame.reset_index(drop=True).to_feather(out)


def period_dated(days: pd.Series) -> bool:
    """Whether all days are last days of quarters: periods, not announcements."""
    known = pd.DatetimeIndex(days.dropna().unique())
    return len(known) >= 2 and bool(known.normalize().is_quarter_end.all())


def _as_dates(values: pd.Series) -> pd.Series | None:
    """Read a column as days; None if it is something else."""
    if values.dtype.kind == "M":
        return values.dt.tz_localize(None) if values.dt.tz is not None else values
    if isinstance(values.dtype, pd.DatetimeTZDtype):
        return values.dt.tz_localize(None)
    # numbers are never empty, and few columns of them are days
    numbers = values.dtype.kind in "if"
    text = (values.head(200) if numbers else values).astype(str).str.strip()
    head = text[text != ""].head(200)
    if not len(head) or not head.str.match(r"(19|20)\d\d[-/.]?[01]?\d[-/.]?\d").all():
        return None
    if numbers:
        text = values.astype(str).str.replace(r"\.0$", "", regex=True)
        if not text.head(200).str.fullmatch(r"(19|20)\d{6}").all():
            return None
    rows, texts = pd.factorize(text)
    read = pd.to_datetime(pd.Series(texts), errors="coerce", format="mixed")
    days = read.take(rows).set_axis(values.index)
    days = days.dt.tz_localize(None) if days.dt.tz is not None else days
    return days if days.notna().mean() > 0.9 else None


def _other_numbers(frame: pd.DataFrame, later: np.ndarray, rng) -> pd.DataFrame:
    frame = frame.copy()
    for at in range(frame.shape[1]):
        column = frame.iloc[:, at]
        if _as_dates(column) is not None:
            continue
        text = column.dtype.kind in "OTU" or not pd.api.types.is_numeric_dtype(column)
        if text:
            number = pd.to_numeric(column, errors="coerce")
            if number.notna().sum() < 0.5 * max(1, (column.astype(str) != "").sum()):
                continue
        else:
            number = column
            if column.dtype.kind == "b":
                continue
        values = number.to_numpy(float, copy=True)
        values[later] = values[later] * np.exp(0.3 * rng.normal(size=later.sum()))
        if text:
            # Earlier texts stay to the letter.
            new = column.astype(object).to_numpy(copy=True)
            new[later] = ["" if np.isnan(v) else repr(float(v)) for v in values[later]]
            frame.isetitem(at, new)
        elif column.dtype.kind == "f":
            frame.isetitem(at, values.astype(str(column.dtype)))
        else:
            frame.isetitem(at, values)
    return frame
