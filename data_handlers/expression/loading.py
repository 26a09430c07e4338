"""What a handler's loader would give, read by the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from qlib.config import C
from qlib.data import D
from qlib.data.dataset.loader import QlibDataLoader
from qlib.log import get_module_logger

from data_handlers.expression.evaluate import Evaluator
from data_handlers.expression.operators import CROSS
from data_handlers.expression.panel import last_before, read_panel, silent_days
from data_handlers.expression.parse import Node, Unsupported, parse
from data_handlers.fields import check_store
from data_handlers.panel import scatter
from data_handlers.traded import LastTraded, Traded
from data_handlers.universe import instrument_spans, membership_mask

__all__ = [
    "ExpressionLoader",
    "load_groups",
    "load_panel",
    "node_of",
    "read_values",
]

logger = get_module_logger("data_handlers.expression")

# In Qlib's list of the user's operators, but in the engine's table too.
_OURS = (Traded.__name__, LastTraded.__name__)


def node_of(text: str) -> Node:
    """Read an expression, with the operators that the user registered with Qlib.

    Raises
    ------
    ExpressionError, Unsupported
        See `data_handlers.expression.parse`; also for an operator of Qlib's that the
        user has replaced by one of the same name.
    """
    custom = [_name(op) for op in getattr(C, "custom_ops", None) or ()]
    custom = [name for name in custom if name not in _OURS]
    node = parse(text, custom)
    for _, part in node.walk():
        if part.op in custom:
            raise Unsupported(f"{text!r}: operator {part.op} is the user's own.")
    return node


def _name(operator: Any) -> str:
    return operator["class"] if isinstance(operator, Mapping) else operator.__name__


def load_groups(
    groups: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    instruments: Any,
    start: Any = None,
    end: Any = None,
    *,
    freq: str = "day",
    filter_pipe: list | None = None,
    threads: int = 1,
    absent: bool = False,
) -> pd.DataFrame:
    """Values of groups of expressions, as `QlibDataLoader` gives them.

    Parameters
    ----------
    groups : dict of str to (expressions, names)
    instruments : str, dict or list
        Universe, as a handler takes it.
    start, end : date-like, optional
        First and last day, both included.
    freq, filter_pipe
        As in Qlib.
    threads : int, default 1
    absent : bool, default False
        Whether a field may be without any value; else that is an error.

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
    if b < a:
        raise Unsupported(f"no day between {start} and {end}.")
    first = max(0, a - max(n.look_back for n in nodes))
    last = min(len(calendar) - 1, b + max(n.look_ahead for n in nodes))
    # A window of ranks needs the members of its own days, also those that left since.
    crossed = any(part.op in CROSS for n in nodes for _, part in n.walk())
    reach = (first, last) if crossed else (a, b)
    spans = instrument_spans(
        instruments,
        calendar[reach[0]],
        calendar[reach[1]],
        freq=freq,
        filter_pipe=filter_pipe,
    )
    codes = sorted(spans or {})
    if not codes:
        raise Unsupported(f"no stock between {start} and {end}.")
    fields = list(dict.fromkeys(f for n in nodes for f in n.fields))
    panel = read_panel(fields, codes, first, last, freq)
    if not absent:
        _check_fields(nodes, panel.fields)
    panel.before = last_before(_carried_fields(nodes), codes, first, freq)
    if any(part.op in _OURS for n in nodes for _, part in n.walk()):
        panel.silent = silent_days(panel, first, freq)
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
        codes=[day, stock],  # type: ignore[list-item]
        names=["datetime", "instrument"],
    )
    del rows, there, day, stock
    return pd.DataFrame(out.T, index=index, columns=columns, copy=False)


def read_values(
    instruments: Any,
    expressions: Sequence[str],
    start: Any = None,
    end: Any = None,
    freq: str = "day",
) -> pd.DataFrame:
    """Read expressions of some instruments, as `D.features` does, by the engine.

    Parameters
    ----------
    instruments : sequence of str or dict
        Codes, each read on all the days that its bins cover; or a dict of Qlib's
        `D.instruments`, or of spans.
    expressions : sequence of str
    start, end : date-like, optional
        First and last day, both included.
    freq : str, default "day"

    Returns
    -------
    DataFrame
        Float32, columns `expressions`, rows sorted by (datetime, instrument): Qlib's
        are sorted the other way round. No rows if there is nothing.
    """
    expressions = list(expressions)
    if not isinstance(instruments, Mapping):
        instruments = list(instruments)
    try:
        pair = {"": (expressions, expressions)}
        frame = load_groups(pair, instruments, start, end, freq=freq, absent=True)
    except Unsupported:
        frame = D.features(instruments, expressions, start, end, freq=freq)
        return frame.swaplevel().sort_index()
    return frame.droplevel(0, axis=1)


def load_panel(
    expressions: Sequence[str],
    dates: pd.DatetimeIndex,
    instruments: pd.Index,
    history: int = 0,
    freq: str = "day",
) -> tuple[np.ndarray, int]:
    """Load Qlib expressions as an array aligned to a panel.

    Parameters
    ----------
    expressions : sequence of str
    dates : DatetimeIndex [t]
    instruments : Index [n]
    history : int, default 0
        Trading days before the panel's first one to load too, as far as there are any.
    freq : str, default "day"

    Returns
    -------
    values : float32 ndarray [h + t, n, k]
        NaN unknown.
    h : int
        Days of history in front.
    """
    before = pd.DatetimeIndex(D.calendar(end_time=dates[0], freq=freq))
    before = before[before < dates[0]][-history:] if history else before[:0]
    days = pd.DatetimeIndex(before.append(dates))
    loaded = read_values(instruments, expressions, days[0], days[-1], freq)
    values = scatter(loaded, days, instruments, np.float32)
    values[~np.isfinite(values)] = np.nan
    return values, len(before)


def _carried_fields(nodes: Sequence[Node]) -> list[str]:
    """Fields of which a value from before the panel may count."""
    found: list[str] = []
    for node in nodes:
        for _, part in node.walk():
            if part.op == "LastTraded":
                if part.args[0].args:
                    raise Unsupported(f"{part.text}: LastTraded of an expression.")
                found.append(part.args[0].op)
    return list(dict.fromkeys(found))


def _check_fields(nodes: Sequence[Node], fields: Mapping[str, np.ndarray]) -> None:
    for name, values in fields.items():
        if not np.isfinite(values).any():
            need = [n.text for n in nodes if name in n.fields]
            more = f" and {len(need) - 3} more" if len(need) > 3 else ""
            raise ValueError(
                f"the store has no value of {name} for this universe and time range; "
                f"{len(need)} expression(s) need it: {', '.join(need[:3])}{more}."
            )


class ExpressionLoader(QlibDataLoader):
    """`QlibDataLoader` whose expressions are evaluated by the engine, all together.

    Beside Qlib's operators, expressions may hold the cross-sectional ones: `CSRank(x)`,
    `CSZScore(x)`, `CSDemean(x)`, `CSScale(x)`, each with a group as an optional second
    tree (``CSDemean($close/Ref($close,1)-1, $industry)``). They compare the members of
    the universe on one day, over which they are taken before anything else is done.

    Expressions with an operator that only Qlib has are loaded by Qlib, with a line in
    the log. Text is parsed, never run; only what was parsed is handed to Qlib.

    Parameters
    ----------
    config, filter_pipe, swap_level, freq, inst_processors
        As in Qlib. With `inst_processors` everything is loaded by Qlib.

    Raises
    ------
    ExpressionError
        For a text that is no expression, showing the place.
    ValueError
        For a field of which the store has no value, naming the expressions.
    """

    def load(
        self, instruments: Any = None, start_time: Any = None, end_time: Any = None
    ) -> pd.DataFrame:
        """Read all groups; see Qlib's `DataLoader.load`."""
        groups = self.fields if self.is_group else {"": self.fields}
        foreign = {group: self._foreign(pair[0]) for group, pair in groups.items()}
        if isinstance(self.freq, str):
            check_store(self.freq)
        plain = isinstance(self.freq, str) and self.swap_level
        if self.inst_processors or not plain:
            return super().load(instruments, start_time, end_time)
        ours = {
            group: _but(pair, foreign[group], False) for group, pair in groups.items()
        }
        theirs = {
            group: _but(pair, foreign[group], True) for group, pair in groups.items()
        }
        try:
            frame = load_groups(
                ours,
                "all" if instruments is None else instruments,
                start_time,
                end_time,
                freq=self.freq,
                filter_pipe=self.filter_pipe,
                threads=max(1, min(C.get_kernels(self.freq), os.cpu_count() or 1)),
            )
        except Unsupported as error:
            logger.info(f"{error} Qlib's own engine loads all expressions.")
            return super().load(instruments, start_time, end_time)
        if any(pair[0] for pair in theirs.values()):
            # Qlib's rows are those of its own columns; ours have every member.
            parts = {
                group: self.load_group_df(
                    instruments, *pair, start_time, end_time, group
                )
                for group, pair in theirs.items()
                if pair[0]
            }
            frame = pd.concat([frame, pd.concat(parts, axis=1)], axis=1).sort_index()
            order = [(g, n) for g, (_, names) in groups.items() for n in names]
            frame = frame[order]
        return frame if self.is_group else frame.droplevel(0, axis=1)

    def _foreign(self, expressions: Sequence[str]) -> set[str]:
        """Expressions that only Qlib can evaluate."""
        found = set()
        for text in expressions:
            try:
                node_of(text)
            except Unsupported as error:
                logger.info(f"{error} Qlib's own engine loads it.")
                found.add(text)
        return found


def _but(pair: tuple, texts: set[str], inside: bool) -> tuple[list[str], list[str]]:
    """Expressions and names of a group that are among `texts`, or are not."""
    kept = [(e, n) for e, n in zip(*pair, strict=True) if (e in texts) == inside]
    return [e for e, _ in kept], [n for _, n in kept]
