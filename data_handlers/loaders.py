"""Read features kept in Parquet files into Qlib frames, beside Qlib expressions.

Bins hold prices; wide daily tables (minute and Level-2 aggregates, the factor units
a model saved) live in Parquet, one file a year. `ParquetDataLoader` joins both kinds
in one frame, resolves market names and honours membership spans as Qlib does.
"""

from __future__ import annotations

import glob
import importlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from qlib.config import C
from qlib.data import D
from qlib.data.dataset.loader import DataLoader, QlibDataLoader
from qlib.log import get_module_logger

from data_handlers.aggregate.schema import SCHEMA_VERSION, SILENT
from data_handlers.arguments import NamedArguments
from data_handlers.codes import a_share_code
from data_handlers.expression.loading import ExpressionLoader, load_groups
from data_handlers.expression.parse import Unsupported
from data_handlers.universe import instrument_spans
from data_handlers.vendor.read import parse_dates

__all__ = [
    "ParquetDataLoader",
    "aggregate_source",
    "built_with",
    "expand_store",
    "load_days",
    "read_daily_parquet",
    "read_factors",
]

_KEYS = ("datetime", "instrument")
_KINDS = {
    "path": {"path", "columns", "names", "missing_years"},
    "experiment": {"experiment", "recorder", "file", "columns", "names"},
    "expressions": {"expressions", "names", "inst_processors"},
    "bars": {"bars", "function", "names", "columns"},
    "panel": {"panel", "kwargs"},
}
_YEAR = re.compile(r"^(?:.*[^0-9])?((?:19|20)\d{2})$")


class ParquetDataLoader(NamedArguments, DataLoader):
    """Load column groups from Parquet files, recorder artifacts and Qlib expressions.

    Parameters
    ----------
    config : dict
        ``{group: source}`` or ``{group: [source, ...]}``; the columns of several
        sources of one group stand side by side, in the order given. A source is one of

        - ``{"path": P, "columns": [...], "names": [...], "missing_years": "raise"}``:
          `P` is a file, a folder of ``*.parquet`` (names that end in a year are
          opened only for the years asked for), or a glob. ``{store}`` in it stands
          for Qlib's own data folder, so ``"{store}/ms"`` needs no second path.
          `columns` null means all; `names` renames them. With `missing_years`
          "warn" a year for which there is no file is logged, not an error.
        - ``{"experiment": E, "recorder": ID, "file": "units.parquet", ...}``: a
          Parquet artifact of a Qlib recorder, for example the factor units of
          another model. `recorder` may be "latest": of those that finished and hold
          the file.
        - ``{"expressions": [...], "names": [...]}``: Qlib expressions, read through
          `qlib.data.dataset.loader.QlibDataLoader`; membership spans are Qlib's.
        - ``{"bars": [...], "function": "module.name", "names": [...]}`` (and
          `columns` to keep some): what a function of one stock's bars gives, where no
          expression does. It gets ``{field: float64 array}`` of the stock's traded
          days in order of time, from the store's first day on whatever `start_time`
          is, and returns ``[days, names]``; row t may use rows up to t. A day on which
          one of the fields is missing or not positive is no traded day: it has no row.
        - ``{"panel": "module.name", "kwargs": {...}}``: what a function of the whole
          market gives, such as `data_handlers.holdings.fund_attributes`. It is called
          with the trading days asked for, the members' spans, `freq` and `kwargs`, and
          returns a frame (datetime, instrument); a row may use what was known at the
          close of its day.
    join : {"feature", "outer", "inner"}, default "feature"
        Rows of the result. "feature": every row that some source of the group
        "feature" has, other groups are looked up for it (NaN where absent); without
        that group the same as "outer". "outer": rows of any source. "inner": rows
        that all sources have.
    freq : str, default "day"
        Frequency of the expressions and of the market's calendar.
    filter_pipe : list, optional
        Qlib instrument filters, used where `instruments` is a market name.

    Notes
    -----
    Files need the columns (or named index levels) ``datetime`` and ``instrument``.
    Numbers keep the type they have in the file. Rows come sorted by datetime, then
    instrument. No value is filled and none is moved in time.

    Raises
    ------
    ValueError
        For an unknown key, a missing file, year or column, a repeated
        (datetime, instrument) row, a time of day in a daily file, or a column
        name that two sources of a group share. The message names it.
    """

    def __init__(
        self,
        config: dict,
        join: Literal["feature", "outer", "inner"] = "feature",
        freq: str = "day",
        filter_pipe: list | None = None,
    ) -> None:
        if not isinstance(config, Mapping) or not config:
            raise ValueError(
                "`config` must be a dict {group: source}, for example "
                '{"feature": {"path": "{store}/ms"}}, got ' + repr(config)
            )
        self.config = {
            str(group): [
                _check_source(str(group), s)
                for s in ([spec] if isinstance(spec, Mapping) else _as_list(spec))
            ]
            for group, spec in config.items()
        }
        for group, sources in self.config.items():
            if not sources:
                raise ValueError(f"`config[{group!r}]` is empty: give one source.")

    def load(
        self,
        instruments: str | dict | Sequence[str] | None = None,
        start_time: Any = None,
        end_time: Any = None,
    ) -> pd.DataFrame:
        """Read all groups.

        Parameters
        ----------
        instruments : str, dict, list of str or None
            Market name ("all", "csi300"), Qlib instrument config, codes (no
            membership spans then), or None for every row there is.
        start_time, end_time : str, datetime or None
            Both ends included.

        Returns
        -------
        DataFrame
            Rows (datetime, instrument), columns (group, name).
        """
        start, end = _day(start_time, "start_time"), _day(end_time, "end_time")
        if start is not None and end is not None and start > end:
            raise ValueError(
                f"`start_time` {start:%Y-%m-%d} lies after `end_time` {end:%Y-%m-%d}."
            )
        spans = instrument_spans(
            instruments, start, end, freq=self.freq, filter_pipe=self.filter_pipe
        )
        groups: dict[str, pd.DataFrame] = {}
        for group, sources in self.config.items():
            parts = [
                self._of_market(s, instruments, spans, start, end)
                if "panel" in s
                else self._read(s, spans, start, end)
                for s in sources
            ]
            how = "inner" if self.join == "inner" else "outer"
            names = [n for part in parts for n in part.columns]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(
                    f"Group {group!r}: column {twice[0]!r} comes from two sources; "
                    "rename one with `names`."
                )
            groups[group] = _beside(parts, how)
            del parts
        if self.join == "feature" and "feature" in groups:
            index = groups["feature"].index
            groups = {
                g: f if f.index.equals(index) else f.reindex(index)
                for g, f in groups.items()
            }
        frame = _beside(
            list(groups.values()),
            "inner" if self.join == "inner" else "outer",
            keys=list(groups),
        )
        return frame

    def _of_market(
        self,
        source: dict,
        instruments: Any,
        spans: dict[str, list] | None,
        start: pd.Timestamp | None,
        end: pd.Timestamp | None,
    ) -> pd.DataFrame:
        """Apply a function of the whole market."""
        # Who was a member before `start` too: a window may begin there.
        wanted = "all" if instruments is None else instruments
        members = instrument_spans(wanted, None, end, self.freq, self.filter_pipe) or {}
        dates = pd.DatetimeIndex(D.calendar(start, end, freq=self.freq))
        name = str(source["panel"])
        frame = _named(name)(
            dates, members, self.freq, **(source.get("kwargs") or {})
        ).sort_index()
        index = frame.index
        assert isinstance(index, pd.MultiIndex)
        labels = np.asarray(index.levels[1], dtype=object)
        when = index.get_level_values(0).to_numpy().astype("datetime64[ns]")
        inside = _inside(
            np.asarray(index.codes[1]),
            labels,
            when,
            members if spans is None else spans,
        )
        return _tidy(frame[inside], name, self.freq)

    def _read(
        self,
        source: dict,
        spans: dict[str, list] | None,
        start: pd.Timestamp | None,
        end: pd.Timestamp | None,
    ) -> pd.DataFrame:
        if "expressions" in source:
            loader = ExpressionLoader(
                config=(source["expressions"], source["names"]),
                freq=self.freq,
                inst_processors=source.get("inst_processors") or [],
            )
            if spans is None:
                wanted: Any = D.instruments("all")
            elif any(spans.values()):
                wanted = spans
            else:
                wanted = list(spans)
            frame = loader.load(wanted, start, end)
            return _tidy(frame, "expressions", self.freq)
        if "bars" in source:
            return _of_bars(source, spans, start, end, self.freq)
        if "experiment" in source:
            path = _artifact(source["experiment"], source["recorder"], source["file"])
            missing = "raise"
        else:
            path, missing = source["path"], source.get("missing_years", "raise")
        frame = read_daily_parquet(
            expand_store(path, self.freq),
            columns=source.get("columns"),
            start_time=start,
            end_time=end,
            spans=spans,
            missing_years=missing,
            freq=self.freq,
        )
        if source.get("names"):
            if len(source["names"]) != len(frame.columns):
                raise ValueError(
                    f"`names` has {len(source['names'])} entries for the "
                    f"{len(frame.columns)} columns of {path}."
                )
            frame.columns = list(source["names"])
        return frame


def aggregate_source(
    kind: str,
    path: str,
    columns: Sequence[str] | None = None,
    missing_years: str = "raise",
    days: Mapping[str, Any] | None = None,
) -> dict:
    """Describe the yearly files of an aggregate as a source of `ParquetDataLoader`.

    Parameters
    ----------
    kind : {"ms", "l2", "flow", "bars"}
        Which feature set `path` must hold.
    path, columns, missing_years
        As in `ParquetDataLoader`.
    days : dict, optional
        `start_time` and `end_time` of what will be read, such as a handler's arguments;
        years outside are not looked at.

    Raises
    ------
    ValueError
        If the files were built with other definitions of the features than this
        version's, or hold another feature set.
    """
    first, last = (_day((days or {}).get(k), k) for k in ("start_time", "end_time"))
    for file in _files(expand_store(str(path), "day"), first, last, missing_years):
        meta = _opened(file).schema.metadata or {}
        if b"qlib_ext.kind" not in meta:
            continue  # the user's own file
        found = (meta[b"qlib_ext.kind"].decode(), int(meta[b"qlib_ext.schema_version"]))
        if found != (kind, SCHEMA_VERSION[kind]):
            raise ValueError(
                f"{file} holds {found[0]} features, version {found[1]}; needed is "
                f"{kind}, version {SCHEMA_VERSION[kind]}: run `qlib-ext build {kind}` "
                "again, it recomputes what is outdated."
            )
    source: dict[str, Any] = {"path": str(path), "missing_years": missing_years}
    if columns is not None:
        source["columns"] = list(columns)
    return source


def built_with(path: str) -> dict[str, Any]:
    """Options that the newest of an aggregate's files was built with; {} unknown."""
    newest = _files(path, None, None, "warn")[-1]
    meta = _opened(newest).schema.metadata or {}
    return json.loads(meta.get(b"qlib_ext.options", b"{}"))


def _opened(file: str) -> ds.Dataset:
    try:
        return ds.dataset(file, format="parquet")
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file} is not a readable Parquet file ({error}); it may be cut off: "
            "remove it and build it again."
        ) from error


def read_daily_parquet(
    path: str | Path,
    columns: Sequence[str] | None = None,
    start_time: Any = None,
    end_time: Any = None,
    spans: Mapping[str, Sequence[tuple]] | None = None,
    missing_years: str = "raise",
    freq: str = "day",
) -> pd.DataFrame:
    """Read one file, a folder or a glob of daily Parquet files.

    Parameters
    ----------
    path : str or Path
        File, folder of ``*.parquet``, or glob.
    columns : list of str, optional
        Columns to read, default all but the two keys.
    start_time, end_time : optional
        Both ends included; row groups outside are skipped by their statistics.
    spans : dict, optional
        ``{code: [(start, end), ...]}``; see `instrument_spans`.
    missing_years : {"raise", "warn"}
        What a year without a file is, if the files are named by year.
    freq : str, default "day"
        With "day" a time of day in the `datetime` column is an error.

    Returns
    -------
    DataFrame
        Index (datetime, instrument), sorted.
    """
    start, end = _day(start_time, "start_time"), _day(end_time, "end_time")
    files = _files(str(path), start, end, missing_years)
    wanted = None if columns is None else [str(c) for c in columns]
    tables = []
    for file in files:
        # Each file on its own: two years may hold columns of different types, and an
        # error should name the file that is wrong.
        dataset = _opened(file)
        names = dataset.schema.names
        for key in _KEYS:
            if key not in names:
                raise ValueError(
                    f"{file} has no column {key!r}; it needs 'datetime' and "
                    f"'instrument', and has {names[:8]}."
                )
        use = wanted
        if use is None:
            use = [n for n in names if n not in _KEYS]
            wanted = use
        lacking = [c for c in use if c not in names]
        if lacking:
            raise ValueError(
                f"{file} has no column {lacking[0]!r}; it has "
                f"{[n for n in names if n not in _KEYS]}."
            )
        stamp = dataset.schema.field("datetime").type
        if not pa.types.is_timestamp(stamp) or stamp.tz is not None:
            raise ValueError(
                f"{file}: column 'datetime' must be a timestamp without a time zone, "
                f"got {stamp}; write exchange-local dates."
            )
        keep = None
        field = pc.field("datetime")
        if start is not None:
            keep = field >= pa.scalar(start.to_pydatetime(), stamp)
        if end is not None:
            last = field < pa.scalar(
                (end + pd.Timedelta(days=1)).to_pydatetime(), stamp
            )
            keep = last if keep is None else keep & last
        table = dataset.to_table(columns=[*_KEYS, *use], filter=keep)
        tables.append(table)
    table = pa.concat_tables(tables, promote_options="permissive")
    if not table.schema.equals(tables[0].schema):
        get_module_logger("ParquetDataLoader").info(
            "%s: column types differ between years; the wider one is used.", path
        )
    del tables
    code = table.column("instrument").combine_chunks()
    if isinstance(code, pa.ChunkedArray):
        code = pa.chunked_array(code).combine_chunks()
    if not pa.types.is_dictionary(code.type):
        code = code.dictionary_encode()
    labels = np.asarray(code.dictionary.to_pylist(), dtype=object)
    codes = code.indices.to_numpy(zero_copy_only=False)
    when = table.column("datetime").to_numpy().astype("datetime64[ns]")
    if spans is not None:
        mask = _inside(codes, labels, when, spans)
        if not mask.all():
            table, codes, when = table.filter(pa.array(mask)), codes[mask], when[mask]
    values = table.drop_columns(list(_KEYS))
    del table, code
    # Column by column, each freed in the file's form once it is there in pandas'.
    frame = values.to_pandas(split_blocks=True, self_destruct=True)
    del values
    pa.default_memory_pool().release_unused()
    # `labels` sorted once makes the codes sortable: cheaper than sorting strings.
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels))
    days, day_codes = np.unique(when, return_inverse=True)
    codes = rank[codes]
    key = day_codes * max(len(labels), 1) + codes
    by = np.argsort(key, kind="stable")
    if len(by) and not np.array_equal(by, np.arange(len(by))):
        frame, key = frame.iloc[by], key[by]
        codes, day_codes = codes[by], day_codes[by]
    same = np.flatnonzero(np.diff(key) == 0)
    if len(same):
        k = int(same[0])
        raise ValueError(
            f"{path}: row ({pd.Timestamp(days[day_codes[k]])}, "
            f"{labels[order][codes[k]]}) appears twice ({len(same)} such rows); keep "
            "one row per stock and day."
        )
    levels: list = [pd.DatetimeIndex(days), pd.Index(labels[order], dtype=object)]
    pairs: list = [day_codes, codes]
    frame.index = pd.MultiIndex(
        levels=levels, codes=pairs, names=list(_KEYS)
    ).remove_unused_levels()
    _midnight(days, str(path), freq)
    return frame


def read_factors(path: str | Path, name: str) -> pd.DataFrame:
    """Read given factors: Parquet with datetime, instrument and number columns.

    A-share codes that name their exchange become Qlib's, and days may be text.

    Raises
    ------
    ValueError
        If the file lacks these levels, has no number column, or days that are none.
    """
    frame = pd.read_parquet(path)
    if list(frame.index.names) != ["datetime", "instrument"]:
        # An index without names is a row count, not a factor.
        frame = frame.reset_index(drop=set(frame.index.names) == {None})
        missing = {"datetime", "instrument"} - set(frame.columns)
        if missing:
            raise ValueError(
                f"`{name}` must have datetime and instrument as columns or index; "
                f"{path} lacks {sorted(missing)}."
            )
        frame = frame.set_index(["datetime", "instrument"])
    days, codes = (frame.index.unique(level) for level in ("datetime", "instrument"))
    plain = parse_dates(pd.Series(days), f"`{name}`: {path}, datetime,", tz=None)
    spelling = {
        code: (not str(code).isdigit() and a_share_code(str(code))) or code
        for code in codes
    }
    at, which = (frame.index.get_level_values(n) for n in ("datetime", "instrument"))
    frame.index = pd.MultiIndex.from_arrays(
        [at.map(dict(zip(days, plain, strict=True))), which.map(spelling)],
        names=frame.index.names,
    )
    frame = frame.select_dtypes("number")
    if frame.shape[1] == 0:
        raise ValueError(f"`{name}`: {path} has no column of numbers.")
    return frame


def load_days(
    loader: Any,
    instruments: Any,
    first: pd.Timestamp,
    last: pd.Timestamp,
    group: str = "feature",
) -> pd.DataFrame | None:
    """Load one column group of a few days, as the loader itself would.

    Parameters
    ----------
    loader : QlibDataLoader or ParquetDataLoader
    instruments : str, dict or list
        As a handler takes it.
    first, last : Timestamp
        Trading days, both included.
    group : str
        Column group.

    Returns
    -------
    DataFrame or None
        Rows (datetime, instrument) of members, columns (group, name); None if only
        the loader itself can do it.
    """
    sources = _sources(loader, group)
    if sources is None:
        return None
    spans = instrument_spans(
        instruments, first, last, filter_pipe=getattr(loader, "filter_pipe", None)
    )
    if not spans:
        return None
    frames: list[Any] = []
    for source in sources:
        if "expressions" in source:
            try:
                expressions = {group: (source["expressions"], source["names"])}
                frames.append(
                    load_groups(
                        expressions,
                        instruments,
                        first,
                        last,
                        filter_pipe=getattr(loader, "filter_pipe", None),
                    )[group]
                )
            except Unsupported:
                return None
        else:
            frame = read_daily_parquet(
                expand_store(source["path"]),
                columns=source.get("columns"),
                start_time=first,
                end_time=last,
                spans=spans,
                missing_years=source.get("missing_years", "raise"),
            )
            if source.get("names"):
                frame.columns = list(source["names"])
            frames.append(frame)
    frame = frames[0] if len(frames) == 1 else pd.concat(frames, axis=1).sort_index()
    frame.index.names = ["datetime", "instrument"]
    frame.columns = pd.MultiIndex.from_product([[group], frame.columns])
    return frame


def _sources(loader: Any, group: str) -> list[dict] | None:
    """Find the sources of a group, if they can be read here."""
    if type(loader) in (QlibDataLoader, ExpressionLoader):
        plain = loader.is_group and not loader.inst_processors and loader.swap_level
        if not plain or loader.freq != "day" or group not in loader.fields:
            return None
        expressions, names = loader.fields[group]
        return [{"expressions": list(expressions), "names": list(names)}]
    if type(loader) is ParquetDataLoader and loader.freq == "day":
        sources = loader.config.get(group)
        if sources is None or any({"experiment", "bars"} & set(s) for s in sources):
            return None
        if any(s.get("inst_processors") for s in sources) or loader.join == "inner":
            return None
        return sources
    return None


def _as_list(spec: Any) -> list:
    if isinstance(spec, (list, tuple)) and all(isinstance(s, Mapping) for s in spec):
        return list(spec)
    # Qlib's own short form, (["expr", ...], ["name", ...]) or ["expr", ...].
    if isinstance(spec, (list, tuple)) and spec:
        if all(isinstance(s, str) for s in spec):
            return [{"expressions": list(spec), "names": list(spec)}]
        if len(spec) == 2 and all(isinstance(s, (list, tuple)) for s in spec):
            return [{"expressions": list(spec[0]), "names": list(spec[1])}]
    raise ValueError(
        "A source must be a dict with 'path', 'experiment' or 'expressions', a list of "
        f"such dicts, or Qlib's (expressions, names), got {spec!r}."
    )


def _check_source(group: str, source: Mapping) -> dict:
    kinds = [k for k in _KINDS if k in source]
    if len(kinds) != 1:
        raise ValueError(
            f"`config[{group!r}]`: a source needs exactly one of {list(_KINDS)}, got "
            f"the keys {sorted(source)}."
        )
    allowed = _KINDS[kinds[0]]
    for key in source:
        if key not in allowed:
            raise ValueError(
                f"`config[{group!r}]`: unknown key {key!r}; a source with "
                f"{kinds[0]!r} takes {sorted(allowed)}."
            )
    out = dict(source)
    if kinds[0] == "path":
        out["path"] = str(out["path"])
        if out.get("missing_years", "raise") not in ("raise", "warn"):
            raise ValueError(
                f"`config[{group!r}]`: `missing_years` must be 'raise' or 'warn', got "
                f"{out['missing_years']!r}."
            )
    elif kinds[0] == "experiment":
        if not out.get("recorder"):
            raise ValueError(
                f"`config[{group!r}]`: give `recorder`, the recorder's id or 'latest'."
            )
        out.setdefault("file", "units.parquet")
    elif kinds[0] == "panel":
        _check_function(group, "panel", out)
    elif kinds[0] == "bars":
        for key in ("bars", "names"):
            if not isinstance(out.get(key), (list, tuple)) or not out[key]:
                raise ValueError(
                    f"`config[{group!r}]`: a source of bars needs the list `{key}`."
                )
        _check_function(group, "function", out)
        absent = [c for c in out.get("columns") or () if c not in out["names"]]
        if absent:
            raise ValueError(
                f"`config[{group!r}]`: `columns` has {absent[0]!r}, which is not among "
                f"{list(out['names'])}."
            )
    else:
        out["expressions"] = [str(e) for e in out["expressions"]]
        out["names"] = [str(n) for n in out.get("names") or out["expressions"]]
        if len(out["names"]) != len(out["expressions"]) or not out["names"]:
            raise ValueError(
                f"`config[{group!r}]`: {len(out['expressions'])} expressions need as "
                f"many names, got {len(out['names'])}."
            )
    for key in ("columns", "names"):
        if out.get(key) is not None:
            if isinstance(out[key], str) or not isinstance(out[key], Sequence):
                raise ValueError(
                    f"`config[{group!r}]`: `{key}` must be a list, got {out[key]!r}."
                )
            out[key] = [str(c) for c in out[key]]
    return out


def _check_function(group: str, key: str, source: Mapping) -> None:
    if "." not in str(source.get(key, "")):
        raise ValueError(
            f"`config[{group!r}]`: `{key}` must be 'module.name', got "
            f"{source.get(key)!r}."
        )


def _named(text: str) -> Any:
    module, _, name = text.rpartition(".")
    return getattr(importlib.import_module(module), name)


def expand_store(path: str, freq: str = "day") -> str:
    """Put Qlib's data folder for ``{store}``, and the home folder and variables in."""
    if "{store}" in path:
        path = path.replace("{store}", str(C.dpm.get_data_uri(freq)))
    return os.path.expandvars(os.path.expanduser(path))


def _files(
    path: str, start: pd.Timestamp | None, end: pd.Timestamp | None, missing_years: str
) -> list[str]:
    if os.path.isfile(path):
        return [path]
    pattern = os.path.join(path, "*.parquet") if os.path.isdir(path) else path
    files = sorted(
        f for f in glob.glob(pattern) if not os.path.basename(f).startswith((".", "_"))
    )
    if not files:
        raise ValueError(
            f"No Parquet file at {path}; give a file, a folder that holds *.parquet, "
            "or a glob (`qlib-ext build` writes <store>/ms/2020.parquet and so on)."
        )
    matches = [_YEAR.match(Path(f).stem) for f in files]
    if not all(matches):
        return files
    years = {int(m.group(1)): f for m, f in zip(matches, files, strict=True) if m}
    if len(years) < len(files):
        return files  # several files a year: no rule for which year is missing
    first = start.year if start is not None else min(years)
    last = end.year if end is not None else max(years)
    absent = [y for y in range(first, last + 1) if y not in years]
    use = [f for y, f in sorted(years.items()) if first <= y <= last]
    if absent and (missing_years == "raise" or not use):
        raise ValueError(
            f"{path} has no file for the year {absent[0]} (years there: "
            f"{min(years)}-{max(years)}, asked for {first}-{last}); build it, ask for "
            "fewer years, or set `missing_years: warn` on this source."
        )
    if absent:
        get_module_logger("ParquetDataLoader").warning(
            "%s has no file for %s: their rows are absent.", path, absent
        )
    return use


def _inside(
    codes: np.ndarray,
    labels: np.ndarray,
    when: np.ndarray,
    spans: Mapping[str, Sequence[tuple]],
) -> np.ndarray:
    """Mask of the rows within some span of their instrument."""
    low, high = np.datetime64("1900-01-01", "ns"), np.datetime64("2200-01-01", "ns")
    most = max((max(len(s), 1) for s in spans.values()), default=0)
    inside = np.zeros(len(codes), dtype=bool)
    for k in range(most):
        # Instruments without a k-th span get an empty one.
        starts = np.full(len(labels), high)
        ends = np.full(len(labels), low)
        for i, label in enumerate(labels):
            own = spans.get(label)
            if own is None:
                continue
            if len(own) == 0 and k == 0:
                starts[i], ends[i] = low, high
            elif k < len(own):
                starts[i] = np.datetime64(pd.Timestamp(own[k][0]), "ns")
                ends[i] = np.datetime64(pd.Timestamp(own[k][1]), "ns")
        inside |= (when >= starts[codes]) & (when <= ends[codes])
    return inside


def _artifact(experiment: str, recorder: str, file: str) -> str:
    """Local path of a recorder's artifact, downloaded if its server is remote."""
    from qlib.workflow import R
    from qlib.workflow.recorder import Recorder

    def files(rec: Recorder) -> list[str]:
        return rec.list_artifacts(os.path.dirname(file) or None)

    if str(recorder) == "latest":
        finished = [
            rec
            for rec in R.list_recorders(experiment_name=experiment).values()
            if rec.status == Recorder.STATUS_FI
        ]
        finished.sort(key=lambda rec: str(rec.end_time), reverse=True)
        rec = next((rec for rec in finished if file in files(rec)), None)
        if rec is None:
            raise ValueError(
                f"Experiment {experiment!r} has no finished recorder with {file!r}, of "
                f"{len(finished)} that finished; run its workflow to the end, or give "
                "another `file`."
            )
        get_module_logger("ParquetDataLoader").info(
            "experiment %s: latest recorder is %s", experiment, rec.id
        )
    else:
        rec = R.get_recorder(recorder_id=str(recorder), experiment_name=experiment)
        have = files(rec)
        if file not in have:
            raise ValueError(
                f"Recorder {recorder} of experiment {experiment!r} has no artifact "
                f"{file!r}; it has {sorted(have)}."
            )
    return rec.client.download_artifacts(rec.id, file)


def _of_bars(
    source: Mapping,
    spans: Mapping[str, Sequence[tuple]] | None,
    start: pd.Timestamp | None,
    end: pd.Timestamp | None,
    freq: str,
) -> pd.DataFrame:
    """Apply a function to each stock's bars; see `ParquetDataLoader`."""
    function = _named(str(source["function"]))
    names = [str(n) for n in source["names"]]
    columns = [str(c) for c in source.get("columns") or names]
    at = [names.index(c) for c in columns]
    if spans is None:
        spans = instrument_spans("all", None, end, freq) or {}
    fields = [str(f) for f in source["bars"]]
    # From the store's beginning: what a recursive indicator gives must not depend on
    # the time range that is asked for.
    loaded = D.features(sorted(spans), [f"${f}" for f in fields], None, end, freq=freq)
    loaded = loaded.sort_index()
    values = loaded.to_numpy(np.float64)
    least = np.where(np.array(fields) == "volume", SILENT, 0.0)
    traded = (np.isfinite(values) & (values > least)).all(axis=1)
    loaded, values = loaded[traded], values[traded]
    index = loaded.index
    assert isinstance(index, pd.MultiIndex)
    labels = np.asarray(index.levels[0], dtype=object)
    codes = np.asarray(index.codes[0])
    when = index.get_level_values(1).to_numpy().astype("datetime64[ns]")
    keep = _inside(codes, labels, when, spans)
    if start is not None:
        keep &= when >= np.datetime64(start, "ns")
    out = np.empty((int(keep.sum()), len(at)), np.float32)
    place = np.concatenate([[0], np.cumsum(keep)])
    edges = np.flatnonzero(np.diff(codes)) + 1
    for first, last in itertools.pairwise([0, *edges, len(codes)]):
        own = keep[first:last]
        if not own.any():
            continue
        bars = {f: values[first:last, j].copy() for j, f in enumerate(fields)}
        made = np.asarray(function(bars))
        if made.shape != (last - first, len(names)):
            raise ValueError(
                f"`function` {source['function']} gave the shape {made.shape} for "
                f"{last - first} bars and {len(names)} names."
            )
        out[place[first] : place[last]] = made[own][:, at]
    frame = pd.DataFrame(out, index=index[keep], columns=columns)
    frame = frame.swaplevel().sort_index()
    pairs = frame.index
    assert isinstance(pairs, pd.MultiIndex)
    frame.index = pairs.remove_unused_levels()
    return _tidy(frame, str(source["function"]), freq)


def _tidy(frame: pd.DataFrame, what: str, freq: str) -> pd.DataFrame:
    frame.index = frame.index.set_names(list(_KEYS))
    _midnight(frame.index.unique(level=0).to_numpy(), what, freq)
    return frame


def _midnight(days: np.ndarray, what: str, freq: str) -> None:
    if freq != "day" or len(days) == 0:
        return
    days = days.astype("datetime64[ns]")
    off = days != days.astype("datetime64[D]").astype("datetime64[ns]")
    if off.any():
        raise ValueError(
            f"{what}: `datetime` must be a date at midnight, got "
            f"{pd.Timestamp(days[off][0])}; stamp daily rows with the exchange's date."
        )


def _beside(
    parts: list[pd.DataFrame], how: str, keys: list[str] | None = None
) -> pd.DataFrame:
    """Columns side by side; `pd.concat`, but without work when the rows agree."""
    index = parts[0].index
    for part in parts[1:]:
        if not part.index.equals(index):
            index = (
                index.intersection(part.index)
                if how == "inner"
                else index.union(part.index)
            )
    index = index.sort_values() if not index.is_monotonic_increasing else index
    same = [p if p.index.equals(index) else p.reindex(index) for p in parts]
    out = _one_block(same, keys)
    out.index = out.index.set_names(list(_KEYS))
    return out


def _one_block(parts: list[pd.DataFrame], keys: list[str] | None) -> pd.DataFrame:
    """`pd.concat` of frames with equal rows, without its second and third copy."""
    kinds = {kind for part in parts for kind in part.dtypes}
    if len(kinds) != 1 or not isinstance(kind := kinds.pop(), np.dtype):
        return pd.concat(parts, axis=1, keys=keys)
    heads = [part.iloc[:0] for part in parts]
    columns = pd.concat(heads, axis=1, keys=keys).columns
    # Column-major, as pandas keeps a block.
    values = np.empty((len(parts[0]), len(columns)), dtype=kind, order="F")
    at = 0
    for part in parts:
        for k in range(part.shape[1]):
            values[:, at] = part.iloc[:, k]
            at += 1
    return pd.DataFrame(values, index=parts[0].index, columns=columns, copy=False)


def _day(value: Any, name: str) -> pd.Timestamp | None:
    if value is None or value == "":
        return None
    try:
        stamp = pd.Timestamp(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}` must be a date, got {value!r}.") from error
    return None if pd.isna(stamp) else stamp.normalize()
