"""What a handler's loader would give, read by the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data import D
from qlib.data.dataset.loader import QlibDataLoader

from data_handlers.expression.evaluate import Evaluator
from data_handlers.expression.panel import read_panel
from data_handlers.expression.parse import Node, Unsupported, parse
from data_handlers.loaders import (
    ParquetDataLoader,
    expand_store,
    instrument_spans,
    membership_mask,
    read_daily_parquet,
)

__all__ = ["load_days", "load_groups", "node_of"]


def node_of(text: str) -> Node:
    """Read an expression, with the operators that the user registered with Qlib.

    Raises
    ------
    ExpressionError, Unsupported
        See `data_handlers.expression.parse`; also for an operator of Qlib's that the
        user has replaced by one of the same name.
    """
    custom = [_name(op) for op in getattr(C, "custom_ops", None) or ()]
    node = parse(text, custom)
    for _, part in node.walk():
        if part.op in custom:
            raise Unsupported(f"{text!r}: operator {part.op} is the user's own.")
    return node


def _name(operator: Any) -> str:
    return operator["class"] if isinstance(operator, Mapping) else operator.__name__


def load_groups(
    groups: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    spans: Mapping[str, Sequence],
    start: Any = None,
    end: Any = None,
    *,
    freq: str = "day",
    threads: int = 1,
) -> pd.DataFrame:
    """Values of groups of expressions, as `QlibDataLoader` gives them.

    Parameters
    ----------
    groups : dict of str to (expressions, names)
    spans : mapping of str to sequence of (start, end)
        Members of the universe, see `data_handlers.loaders.instrument_spans`.
    start, end : date-like, optional
        First and last day, both included.
    freq : str, default "day"
    threads : int, default 1

    Returns
    -------
    DataFrame
        Float32, rows (datetime, instrument) of members whose bins cover the day,
        columns (group, name). Values are those of Qlib's engine; a value depends on its
        windows' days alone, so a day read by itself equals the batch bit for bit.

    Raises
    ------
    ExpressionError, Unsupported
        See `node_of`.
    ValueError
        If the store has no value of a field, naming the expressions that need it.
    """
    nodes = [node_of(e) for expressions, _ in groups.values() for e in expressions]
    calendar = pd.DatetimeIndex(D.calendar(freq=freq))
    a = 0 if start is None else int(calendar.searchsorted(pd.Timestamp(start)))
    b = len(calendar) - 1
    if end is not None:
        b = int(calendar.searchsorted(pd.Timestamp(end), "right")) - 1
    columns = pd.MultiIndex.from_tuples(
        [(g, n) for g, (_, names) in groups.items() for n in names]
    )
    codes = sorted(spans)
    if b < a or not codes:
        raise Unsupported(f"no day or no stock between {start} and {end}.")
    first = max(0, a - max(n.look_back for n in nodes))
    last = min(len(calendar) - 1, b + max(n.look_ahead for n in nodes))
    fields = list(dict.fromkeys(f for n in nodes for f in n.fields))
    panel = read_panel(fields, codes, first, last, freq)
    _check_fields(nodes, panel.fields)
    days = calendar[a : b + 1]
    panel.member = membership_mask(spans, panel.days, codes)
    here = slice(a - first, b - first + 1)
    there = panel.member[here] & panel.inside(fields)[here]
    rows = np.full(there.shape, -1, np.int64)
    rows[there] = np.arange(there.sum())
    out = np.empty((len(nodes), int(there.sum())), np.float32)
    evaluator = Evaluator(panel, threads=threads)
    evaluator.fill(nodes, rows, a - first, out)
    shaky = [n.text for n in nodes if evaluator.is_unstable(n)]
    if shaky:
        raise Unsupported(
            f"{shaky[0]}: an infinite value inside a regression, whose effect in Qlib "
            "depends on where a query begins."
        )
    day, stock = np.nonzero(there)
    index = pd.MultiIndex(
        levels=[days, pd.Index(codes)],  # type: ignore[list-item]
        codes=[day, stock],
        names=["datetime", "instrument"],
    )
    del rows, there, day, stock
    return pd.DataFrame(out.T, index=index, columns=columns, copy=False)


def _check_fields(nodes: Sequence[Node], fields: Mapping[str, np.ndarray]) -> None:
    for name, values in fields.items():
        if not np.isfinite(values).any():
            need = [n.text for n in nodes if name in n.fields]
            more = f" and {len(need) - 3} more" if len(need) > 3 else ""
            raise ValueError(
                f"the store has no value of {name} for this universe and time range; "
                f"{len(need)} expression(s) need it: {', '.join(need[:3])}{more}."
            )


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
    frames = []
    for source in sources:
        if "expressions" in source:
            try:
                expressions = {group: (source["expressions"], source["names"])}
                frames.append(load_groups(expressions, spans, first, last)[group])
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
    if type(loader) is QlibDataLoader:
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
