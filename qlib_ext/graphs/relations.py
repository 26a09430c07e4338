"""What an edge between two stocks means, point in time.

Relations: same industry (`IndustryGraph`), correlated returns (`CorrelationGraph`),
alike financial indicators (`FinancialGraph`), alike capital flow (`FlowGraph`), and any
edge list of the user's with validity dates (`ParquetGraph`). The edges of day t come
from data up to its close.

Glossary: t days, n instruments, f indicators, e edges.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Lt
from qlib.log import get_module_logger
from qlib.utils import init_instance_by_config

from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS
from data_handlers.arguments import Count, NamedArguments, Share, Whole
from data_handlers.expression.loading import load_panel
from data_handlers.fields import known_fields
from data_handlers.flow import flow_net, flow_total
from data_handlers.risk import DAILY_RETURN, financial_config
from qlib_ext.graphs.edges import (
    Collector,
    EdgeSeries,
    Sets,
    as_of,
    correlation_edges,
    industry_edges,
    knn_edges,
    pairs,
    trailing_mean,
)

__all__ = [
    "GRAPHS",
    "CorrelationGraph",
    "FinancialGraph",
    "FlowGraph",
    "Graph",
    "IndustryGraph",
    "ParquetGraph",
    "load_columns",
    "make_graphs",
]

logger = get_module_logger("qlib_ext.graphs")

# What the flow graph compares where the store has a daily flow table by order size:
# net buying of all, of the large, of the small orders, and the share of the large.
ORDER_FLOW = (
    f"{flow_net(*FLOW_CLASSES)} / {flow_total(*FLOW_CLASSES)}",
    f"{flow_net('large', 'xlarge')} / {flow_total('large', 'xlarge')}",
    f"{flow_net('small', 'medium')} / {flow_total('small', 'medium')}",
    f"{flow_total('large', 'xlarge')} / {flow_total(*FLOW_CLASSES)}",
)
# Stand-ins from day bars elsewhere: where the close lies in the day's range, the sign
# of the day times its relative amount, the relative amount.
BAR_FLOW = (
    (
        "(2 * Traded($close) - $high - $low) / ($high - $low + 1e-12)",
        ("close", "high", "low"),
    ),
    (
        f"Sign({DAILY_RETURN}) * Traded($amount) / Mean(Traded($amount), 60)",
        ("close", "amount"),
    ),
    ("Log(Traded($amount) / Mean(Traded($amount), 60))", ("amount",)),
)

Metric = Literal["euclidean", "cosine"]


class Graph(NamedArguments):
    """A relation, configured in YAML and built for a panel.

    Subclasses give `inputs` (the arrays a panel needs, point in time) and `edges` (from
    these arrays). `build` joins them.

    Parameters
    ----------
    name : str
        Relation name in reports.
    """

    def __init__(self, name: str) -> None:
        if not name or not isinstance(name, str):
            raise ValueError(f"`name` must be a text, got {name!r}.")

    directed = False

    def inputs(self, panel: Any) -> dict[str, np.ndarray]:
        """Arrays for `edges`; rows end with the panel's days."""
        raise NotImplementedError

    def edges(self, inputs: dict[str, np.ndarray]) -> Sets:
        """Make the distinct edge sets, and say which holds on each day."""
        raise NotImplementedError

    def build(self, panel: Any) -> EdgeSeries:
        """Make the edges of every day of a panel.

        Parameters
        ----------
        panel : Panel
            Its `dates`, `instruments`, and where named its features and risk columns.
        """
        inputs = self.inputs(panel)
        edges, state = self.edges(inputs)
        series = EdgeSeries(
            self.name, panel.dates, panel.instruments, edges, state, self.directed
        )
        last = series.edges[series.state[-1]].shape[1]
        logger.info(
            f"graph {self.name!r}: {len(series.edges)} distinct sets over "
            f"{len(series.dates)} days, {last} edges on the last, "
            f"{series.nbytes / 2**20:.1f} MiB"
        )
        if last == 0 and not any(e.shape[1] for e in series.edges):
            logger.warning(f"graph {self.name!r} has no edge on any day.")
        return series


def load_columns(panel, fields: Sequence[str], history: int, lag: int):
    """Take panel features by name, and anything else as a Qlib expression.

    Parameters
    ----------
    panel : Panel
    fields : sequence of str
    history : int
        Trading days before the panel's first one to load too (expressions only).
    lag : int
        Trading days by which values are held back.

    Returns
    -------
    values : float32 ndarray [h + t, n, f]
        NaN unknown.
    h : int
        Days of history in front.
    """
    inside = [f for f in fields if f in panel.feature_names]
    outside = [f for f in fields if f not in panel.feature_names]
    history = history + lag if outside else 0
    loaded, h = (
        load_panel(outside, panel.dates, panel.instruments, history)
        if outside
        else (np.empty((len(panel.dates), len(panel.instruments), 0), np.float32), 0)
    )
    values = np.full((*loaded.shape[:2], len(fields)), np.nan, np.float32)
    for j, name in enumerate(fields):
        if name in panel.feature_names:
            column = panel.features[..., panel.feature_names.index(name)].numpy()
            # The panel's missing features are 0; absent stocks have none.
            values[h:, :, j] = np.where(panel.present.numpy(), column, np.nan)
        else:
            values[..., j] = loaded[..., outside.index(name)]
    if inside and outside and h:
        logger.info(f"{inside} are known from the panel's first day only.")
    if lag:
        values = np.concatenate([np.full_like(values[:lag], np.nan), values[:-lag]])
    return values, h


class IndustryGraph(Graph):
    """Stocks of the same point-in-time industry.

    Industry codes come from the panel's risk group, else from `$industry`.

    Parameters
    ----------
    k : int, optional
        Join each stock to the `k` members of its industry nearest in market cap (and to
        those that choose it). None, the default, joins all members, which for n stocks
        and g even industries makes n² / g edges.
    name : str
        See `Graph`.
    """

    def __init__(self, k: Count | None = None, name: str = "industry") -> None:
        super().__init__(name)

    def inputs(self, panel) -> dict[str, np.ndarray]:
        """Industry codes, and log market cap if `k` is given."""
        out = {}
        for name, field_, expression in (
            ("industry", "industry", "$industry"),
            ("size", "market_cap", "Log($market_cap)"),
        ):
            if name == "size" and self.k is None:
                continue
            value = panel.risk_column("industry" if name == "industry" else "log_mcap")
            if value is None:
                if not known_fields([field_]):
                    raise ValueError(
                        f"graph {self.name!r}: neither the panel's risk group nor the "
                        f"store has {field_!r}; ingest it or leave this graph out."
                    )
                value, _ = load_panel([expression], panel.dates, panel.instruments)
                value = value[..., 0]
            out[name] = value
        return out

    def edges(self, inputs: dict[str, np.ndarray]) -> Sets:
        """See `industry_edges`."""
        return industry_edges(inputs["industry"], inputs.get("size"), self.k)


class CorrelationGraph(Graph):
    """Stocks whose daily returns moved together over a trailing window.

    Parameters
    ----------
    window : int, default 30
        Trading days.
    threshold : float, default 0.7
    min_count : int, optional
        Fewest common days; default two thirds of the window.
    max_neighbors : int or None, default 30
        Keep pairs among the strongest so many of either stock; None keeps all that pass
        the threshold, which in a crash is nearly every pair.
    name : str
        See `Graph`.
    """

    def __init__(
        self,
        window: Annotated[int, Ge(3)] = 30,
        threshold: Annotated[float, Ge(-1), Lt(1)] = 0.7,
        min_count: Annotated[int, Ge(3)] | None = None,
        max_neighbors: Count | None = 30,
        name: str = "correlation",
    ) -> None:
        super().__init__(name)
        if min_count is not None and min_count > window:
            raise ValueError(
                f"`min_count` must be at most `window` {window}, got {min_count}."
            )

    def inputs(self, panel) -> dict[str, np.ndarray]:
        """Daily returns, `window` - 1 days of history first."""
        values, history = load_panel(
            [DAILY_RETURN], panel.dates, panel.instruments, self.window - 1
        )
        return {"returns": values[..., 0], "history": np.array(history)}

    def edges(self, inputs: dict[str, np.ndarray]) -> Sets:
        """See `correlation_edges`."""
        return correlation_edges(
            inputs["returns"],
            self.window,
            self.threshold,
            self.min_count,
            self.max_neighbors,
            first=int(inputs["history"]),
            progress=True,
        )


class FinancialGraph(Graph):
    """Stocks with alike financial indicators, as announced by the day.

    Parameters
    ----------
    fields : list of str, optional
        Names of panel features, or Qlib expressions. Default: the announced indicators
        that the store holds (`data_handlers.risk.financial_config`).
    k : int, default 10
        Nearest neighbours of each stock.
    lag : int, default 0
        Trading days to wait after an indicator appears in the store, where its dates
        are report dates rather than announcement dates.
    max_age : int, default 400
        Trading days an indicator may be carried forward.
    min_known : float, default 0.5
        Share of indicators a stock must have to be joined.
    metric : {"euclidean", "cosine"}, default "euclidean"
    name : str
        See `Graph`.
    """

    def __init__(
        self,
        fields: list[str] | None = None,
        k: Count = 10,
        lag: Whole = 0,
        max_age: Whole = 400,
        min_known: Share = 0.5,
        metric: Metric = "euclidean",
        name: str = "financial",
    ) -> None:
        super().__init__(name)

    def inputs(self, panel) -> dict[str, np.ndarray]:
        """Give the indicators as of each day."""
        fields = financial_config()[0] if self.fields is None else self.fields
        if not fields:
            raise ValueError(
                f"graph {self.name!r}: the store has no financial indicator; give "
                "`fields` or leave this graph out."
            )
        values, h = load_columns(panel, fields, self.max_age, self.lag)
        return {"x": as_of(values, self.max_age)[h:]}

    def edges(self, inputs: dict[str, np.ndarray]) -> Sets:
        """See `knn_edges`."""
        return knn_edges(
            inputs["x"], self.k, self.metric, self.min_known, progress=True
        )


class FlowGraph(Graph):
    """Stocks with alike capital flow over a trailing window.

    Flow features are averaged over the window, standardised over the day's stocks, and
    each stock is joined to its nearest neighbours.

    Parameters
    ----------
    fields : list of str, optional
        Names of panel features (of the l2 or C family, say), or Qlib expressions.
        Default: net buying by order size if the store has a daily flow table
        (`ORDER_FLOW`), else stand-ins from day bars (`BAR_FLOW`).
    window : int, default 20
        Trading days; half of them must be known.
    k : int, default 10
        Nearest neighbours of each stock.
    metric : {"euclidean", "cosine"}, default "euclidean"
    min_known : float, default 0.5
        Share of the features a stock must have to be joined.
    name : str
        See `Graph`.
    """

    def __init__(
        self,
        fields: list[str] | None = None,
        window: Count = 20,
        k: Count = 10,
        metric: Metric = "euclidean",
        min_known: Share = 0.5,
        name: str = "flow",
    ) -> None:
        super().__init__(name)

    def inputs(self, panel) -> dict[str, np.ndarray]:
        """Window means of the flow features."""
        fields = self.fields
        if fields is None:
            have = set(known_fields([*FLOW_FIELDS, "close", "high", "low", "amount"]))
            if have.issuperset(FLOW_FIELDS):
                fields = list(ORDER_FLOW)
            else:
                fields = [e for e, need in BAR_FLOW if have.issuperset(need)]
                logger.info(
                    f"graph {self.name!r}: the store has no flow by order size; "
                    "stand-ins from day bars take its place."
                )
            if not fields:
                raise ValueError(
                    f"graph {self.name!r}: the store has neither amount nor prices for "
                    "the default flow features; give `fields`."
                )
        values, h = load_columns(panel, fields, self.window - 1, 0)
        mean = trailing_mean(values, self.window, -(-self.window // 2))
        return {"x": mean[h:].astype(np.float32)}

    def edges(self, inputs: dict[str, np.ndarray]) -> Sets:
        """See `knn_edges`."""
        return knn_edges(
            inputs["x"], self.k, self.metric, self.min_known, progress=True
        )


class ParquetGraph(Graph):
    """A user's own relation: an edge list with validity dates.

    Parameters
    ----------
    path : str
        Parquet file with columns `source`, `target` (instrument codes), `start` and
        `end` (first and last day on which the edge may be used; a missing `end` is
        open). `start` must be a day on which the relation was known: the graph is as
        point-in-time as these dates.
    directed : bool, default False
        Whether only `target` listens to `source`.
    name : str
        See `Graph`.
    """

    def __init__(self, path: str, directed: bool = False, name: str = "user") -> None:
        super().__init__(name)
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"`path` must be a Parquet file, got {path!r}.")
        self.path = str(path)

    def inputs(self, panel) -> dict[str, np.ndarray]:
        """Edges as positions: source, target, first day, day after the last."""
        if not Path(self.path).is_file():
            raise ValueError(f"`path`: there is no file {self.path}.")
        table = pd.read_parquet(self.path)
        absent = {"source", "target", "start"} - set(table)
        if absent:
            raise ValueError(
                f"`path` {self.path}: column(s) {sorted(absent)} missing; it needs "
                f"source, target, start and (optionally) end, got {list(table)}."
            )
        start = pd.to_datetime(table["start"])
        end = pd.to_datetime(table["end"]) if "end" in table else None
        if start.isna().any():
            raise ValueError(f"`path` {self.path}: `start` is missing in some rows.")
        if end is not None and (wrong := (end < start)).any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"`path` {self.path}: row {row} ends {end[row].date()} before it "
                f"starts {start[row].date()}."
            )
        source = panel.instruments.get_indexer(table["source"])
        target = panel.instruments.get_indexer(table["target"])
        here = (source >= 0) & (target >= 0) & (source != target)
        if not here.all():
            logger.info(
                f"graph {self.name!r}: {int((~here).sum())} of {len(here)} rows name a "
                "stock outside the panel or join a stock to itself; left out."
            )
        first = panel.dates.searchsorted(start)
        last = (
            np.full(len(table), len(panel.dates))
            if end is None
            else np.where(
                end.isna(),
                len(panel.dates),
                panel.dates.searchsorted(end.fillna(start), side="right"),
            )
        )
        rows = np.stack([source, target, first, last])[:, here]
        return {
            "rows": rows.astype(np.int64),
            "size": np.array([len(panel.dates), len(panel.instruments)]),
        }

    def edges(self, inputs: dict[str, np.ndarray]) -> Sets:
        """Give the edges that hold on each day."""
        days, n = (int(s) for s in inputs["size"])
        source, target, first, last = inputs["rows"]
        borders = set(first) | set(last)
        collector = Collector()
        for day in range(days):
            if day and day not in borders:
                collector.again()
                continue
            now = (first <= day) & (day < last)
            if self.directed:
                code = np.unique(source[now] * n + target[now])
                collector.add(np.stack([code // n, code % n]))
            else:
                collector.add(pairs(source[now], target[now], n))
        return collector.sets


GRAPHS = {
    "industry": "IndustryGraph",
    "financial": "FinancialGraph",
    "flow": "FlowGraph",
    "correlation": "CorrelationGraph",
}


def make_graphs(configs: Sequence[Any]) -> list[Graph]:
    """Make the graphs that a model's `graphs` argument names.

    Parameters
    ----------
    configs : list
        Names of `GRAPHS` for defaults, `Graph` objects, or configs with `class`,
        `kwargs` and, outside this module, `module_path`.

    Raises
    ------
    ValueError
        On an unknown name, something that is no graph, or a name given twice.
    """
    if not isinstance(configs, (list, tuple)):
        raise ValueError(f"`graphs` must be a list, got {configs!r}.")
    made: list[Graph] = []
    for config in configs:
        if isinstance(config, Graph):
            made.append(config)
            continue
        if isinstance(config, str):
            if config not in GRAPHS:
                raise ValueError(
                    f"`graphs`: {config!r} is not known; choose from "
                    f"{sorted(GRAPHS)} or give a config with `class`."
                )
            config = {"class": GRAPHS[config]}
        if not isinstance(config, dict) or "class" not in config:
            raise ValueError(
                f"`graphs`: {config!r} must be a name or a config with `class`."
            )
        graph = init_instance_by_config(config, default_module=__name__)
        if not isinstance(graph, Graph):
            raise ValueError(
                f"`graphs`: {config['class']!r} is not a qlib_ext.graphs.Graph."
            )
        made.append(graph)
    names = [graph.name for graph in made]
    if len(set(names)) < len(names):
        raise ValueError(
            f"`graphs` must have different names, got {names}; set `kwargs.name`."
        )
    return made
