"""Relations between stocks as point-in-time edges, one set a day.

Edges of day t come from data up to the close of t. They join instruments of a panel by
position, whether or not a stock trades that day; absent stocks are filtered when a
batch is made, so that a set of edges is stored once for as long as it holds.

Relations: same industry (`IndustryGraph`), correlated returns (`CorrelationGraph`),
alike financial indicators (`FinancialGraph`), alike capital flow (`FlowGraph`), and any
edge list of the user's with validity dates (`ParquetGraph`). The functions below each
class work on plain arrays.

Glossary: t days, n instruments, f indicators, e edges, c days and m stocks of a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.log import get_module_logger
from qlib.utils import init_instance_by_config
from scipy.spatial import cKDTree
from tqdm.auto import tqdm

from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS
from data_handlers.arguments import check_number, check_whole
from data_handlers.fields import known_fields
from data_handlers.flow import flow_net, flow_total
from data_handlers.risk import financial_config

__all__ = [
    "CorrelationGraph",
    "EdgeSeries",
    "FinancialGraph",
    "FlowGraph",
    "Graph",
    "IndustryGraph",
    "ParquetGraph",
    "as_of",
    "correlation_edges",
    "industry_edges",
    "knn_edges",
    "load_columns",
    "load_panel",
    "risk_column",
    "standard_profile",
    "trailing_mean",
]

logger = get_module_logger("qlib_ext.graphs")

DAILY_RETURN = "$close / Ref($close, 1) - 1"
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
        "(2 * $close - $high - $low) / ($high - $low + 1e-12)",
        ("close", "high", "low"),
    ),
    (
        "Sign($close - Ref($close, 1)) * $amount / Mean($amount, 60)",
        ("close", "amount"),
    ),
    ("Log($amount / Mean($amount, 60))", ("amount",)),
)


# -------------------------------------------------------------- the representation
@dataclass
class EdgeSeries:
    """Edges of every day, each distinct set stored once.

    Attributes
    ----------
    name : str
        Relation.
    dates : DatetimeIndex [t]
    instruments : Index [n]
    edges : list of int32 array [2, e]
        Distinct sets. Undirected: each pair once, first row < second row. Directed:
        row 0 is the source, row 1 the stock that listens to it.
    state : int32 array [t]
        Which set holds on each day.
    directed : bool
    """

    name: str
    dates: pd.DatetimeIndex
    instruments: pd.Index
    edges: list[np.ndarray]
    state: np.ndarray
    directed: bool = False

    def at(self, day: int) -> np.ndarray:
        """Edges of one day, both directions, int32 [2, e], sources in row 0."""
        return self._both(self.edges[self.state[day]])

    def _both(self, edges: np.ndarray) -> np.ndarray:
        return edges if self.directed else np.hstack([edges, edges[::-1]])

    def batch(
        self, days: np.ndarray, stocks: np.ndarray, mask: np.ndarray | torch.Tensor
    ) -> torch.Tensor:
        """Edges of a batch as one graph of c·m nodes, day after day.

        Parameters
        ----------
        days : int array [c]
            Positions of days.
        stocks : int array [m]
            Positions of the batch's instruments.
        mask : bool [c, m]
            Presence; edges to or from an absent stock are left out.

        Returns
        -------
        int64 Tensor [2, e]
            Node ``i * m + j`` is stock j on day i. No self-loops.
        """
        present = np.asarray(torch.as_tensor(mask).cpu())
        local = np.full(len(self.instruments), -1, np.int64)
        local[stocks] = np.arange(len(stocks))
        parts = []
        mapped: dict[int, np.ndarray] = {}
        for i, day in enumerate(days):
            state = int(self.state[day])
            if state not in mapped:
                here = local[self.edges[state]]
                mapped[state] = here[:, (here >= 0).all(0)]
            here = mapped[state]
            both = present[i, here[0]] & present[i, here[1]]
            here = here if both.all() else here[:, both]
            parts.append(self._both(here) + i * len(stocks))
        if not parts:
            return torch.empty((2, 0), dtype=torch.long)
        return torch.from_numpy(np.ascontiguousarray(np.hstack(parts)))

    def statistics(self, present: np.ndarray | None = None) -> pd.DataFrame:
        """Describe each day's graph.

        Parameters
        ----------
        present : bool array [t, n], optional
            Presence; only edges between present stocks count. Default all.

        Returns
        -------
        DataFrame
            Rows datetime; `edges` (pairs, or directed edges), `mean_degree` and
            `max_degree` (neighbours a present stock listens to), `isolated` (share of
            present stocks without any), `turnover` (share of the day's edges that the
            previous day had not; NaN on the first day and without edges).
        """
        n = len(self.instruments)
        if present is None:
            present = np.ones((len(self.dates), n), bool)
        present = np.asarray(present, bool)
        rows, before = [], None
        for day in range(len(self.dates)):
            edges = self.edges[self.state[day]]
            edges = edges[:, present[day, edges[0]] & present[day, edges[1]]]
            degree = np.bincount(self._both(edges)[1], minlength=n)[present[day]]
            code = edges[0].astype(np.int64) * n + edges[1]
            new = np.nan
            if before is not None and len(code):
                new = 1.0 - np.isin(code, before, assume_unique=True).mean()
            before = code
            rows.append(
                (
                    edges.shape[1],
                    degree.mean() if len(degree) else np.nan,
                    degree.max() if len(degree) else 0,
                    (degree == 0).mean() if len(degree) else np.nan,
                    new,
                )
            )
        names = ["edges", "mean_degree", "max_degree", "isolated", "turnover"]
        return pd.DataFrame(rows, index=self.dates, columns=names)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored edges."""
        return sum(e.nbytes for e in self.edges) + self.state.nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one `.npz` file (no pickle), atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sizes = np.array([e.shape[1] for e in self.edges], np.int64)
        joined = np.hstack([np.empty((2, 0), np.int32), *self.edges])
        meta = {
            "name": self.name,
            "directed": self.directed,
            "dates": [str(d) for d in self.dates],
            "instruments": [str(i) for i in self.instruments],
        }
        number, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(number, "wb") as file:
                np.savez(
                    file,
                    edges=joined,
                    sizes=sizes,
                    state=self.state,
                    meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
                )
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EdgeSeries:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            joined, sizes, state = file["edges"], file["sizes"], file["state"]
        return cls(
            meta["name"],
            pd.DatetimeIndex(meta["dates"]),
            pd.Index(meta["instruments"]),
            np.split(joined, np.cumsum(sizes)[:-1], axis=1) if len(sizes) else [],
            state,
            meta["directed"],
        )


@dataclass
class _Collector:
    """Edge sets day by day; one equal to the previous day's is not stored again."""

    edges: list[np.ndarray] = field(default_factory=list)
    state: list[int] = field(default_factory=list)

    def add(self, edges: np.ndarray) -> None:
        edges = np.ascontiguousarray(edges, np.int32)
        if not self.edges or not np.array_equal(edges, self.edges[-1]):
            self.edges.append(edges)
        self.state.append(len(self.edges) - 1)

    def again(self) -> None:
        self.state.append(len(self.edges) - 1)


Sets = tuple[list[np.ndarray], np.ndarray]


def _done(collector: _Collector) -> Sets:
    return collector.edges, np.array(collector.state, np.int32)


def _pairs(i: np.ndarray, j: np.ndarray, n: int) -> np.ndarray:
    """Distinct undirected pairs, smaller position first, sorted."""
    low, high = np.minimum(i, j).astype(np.int64), np.maximum(i, j).astype(np.int64)
    code = np.unique(low * n + high)
    return np.stack([code // n, code % n]).astype(np.int32)


def _strongest(i, j, strength, n: int, limit: int | None) -> np.ndarray:
    """Pairs that are among the `limit` strongest of at least one of their ends."""
    if limit is None or not len(i):
        return _pairs(i, j, n)
    degree = np.bincount(i, minlength=n) + np.bincount(j, minlength=n)
    if degree.max() <= limit:
        return _pairs(i, j, n)
    source, target = np.r_[i, j], np.r_[j, i]
    order = np.lexsort((target, -np.r_[strength, strength], source))
    source, target = source[order], target[order]
    rank = np.arange(len(source)) - (np.cumsum(degree) - degree)[source]
    return _pairs(source[rank < limit], target[rank < limit], n)


# ------------------------------------------------------------------ array functions
def as_of(x: np.ndarray, max_age: int | None = None) -> np.ndarray:
    """Carry the last known value forward along the days.

    Parameters
    ----------
    x : ndarray [t, ...]
        NaN unknown.
    max_age : int, optional
        Days a value may be carried; None is without limit.
    """
    out = np.array(x)
    for column in np.moveaxis(out.reshape(len(out), -1), 1, 0):  # lean: one at a time
        day = np.arange(len(column))
        last = np.maximum.accumulate(np.where(np.isfinite(column), day, -1))
        stale = last < 0
        if max_age is not None:
            stale |= day - last > max_age
        column[:] = np.where(stale, np.nan, column[np.maximum(last, 0)])
    return out


def trailing_mean(x: np.ndarray, window: int, min_count: int) -> np.ndarray:
    """Mean of the known values of the last `window` days, the day's own included.

    NaN where fewer than `min_count` are known. x is [t, ...].
    """
    known = np.isfinite(x)
    total = np.cumsum(np.where(known, x, 0.0), axis=0, dtype=np.float64)
    count = np.cumsum(known, axis=0)
    total[window:] -= total[:-window].copy()
    count[window:] -= count[:-window].copy()
    return np.where(count >= max(min_count, 1), total / np.maximum(count, 1), np.nan)


def industry_edges(
    industry: np.ndarray, size: np.ndarray | None = None, k: int | None = None
) -> Sets:
    """Join stocks of the same industry.

    Parameters
    ----------
    industry : ndarray [t, n]
        Codes; NaN (never known so far) has no edges. Carried forward, so a suspension
        does not break an edge.
    size : ndarray [t, n], optional
        Log market cap, needed if `k` is given.
    k : int, optional
        Join each stock only to the `k` of its industry nearest in size (and to those
        that are joined to it); None joins all.

    Returns
    -------
    edges : list of int32 array [2, e]
    state : int32 array [t]
    """
    code = as_of(industry)
    if k is not None and size is None:
        raise ValueError(
            "`k` needs `size`: the store has no market cap; leave `k` out."
        )
    near = None if size is None or k is None else as_of(size)
    collector = _Collector()
    n = code.shape[1]
    for day in range(len(code)):
        same = day and np.array_equal(code[day], code[day - 1], equal_nan=True)
        if near is not None:
            same = same and np.array_equal(near[day], near[day - 1], equal_nan=True)
        if same:
            collector.again()
            continue
        source, target = [], []
        for c in np.unique(code[day][np.isfinite(code[day])]):
            member = np.flatnonzero(code[day] == c)
            if near is None:
                a, b = np.triu_indices(len(member), 1)
                source.append(member[a])
                target.append(member[b])
                continue
            member = member[np.isfinite(near[day, member])]
            if len(member) < 2:
                continue
            a, b = _nearest(near[day, member][:, None], k or 1)
            source.append(member[a])
            target.append(member[b])
        none = np.empty(0, int)
        collector.add(_pairs(np.hstack([none, *source]), np.hstack([none, *target]), n))
    return _done(collector)


def correlation_edges(
    returns: np.ndarray,
    window: int = 30,
    threshold: float = 0.7,
    min_count: int | None = None,
    max_neighbors: int | None = None,
    first: int = 0,
    progress: bool = False,
) -> Sets:
    """Join stocks whose trailing returns are correlated above a threshold.

    Parameters
    ----------
    returns : ndarray [t, n]
        Daily returns, NaN unknown (suspended, not listed).
    window : int, default 30
        Trading days, the day's own included.
    threshold : float, default 0.7
        Pearson correlation strictly above it makes an edge.
    min_count : int, optional
        Fewest days on which both returns are known; default two thirds of the window.
    max_neighbors : int, optional
        Keep pairs among the strongest so many of either stock: in a crash nearly all
        pairs pass the threshold. None keeps all.
    first : int, default 0
        First day to give edges for; earlier rows are history.
    progress : bool, default False

    Returns
    -------
    edges : list of int32 array [2, e]
    state : int32 array [t - first]

    Notes
    -----
    Correlations are pairwise complete: a pair counts the days known for both. Stocks
    with full windows need one matrix product of [n, window] a day, taken in blocks;
    the few with gaps are multiplied apart, with their masks. A stock whose price did
    not move has no correlation and no edge. The product costs less than reading and
    writing an n x n running matrix would, so nothing is carried from day to day, and
    no rounding piles up.
    """
    returns = np.asarray(returns)
    if window < 3:
        raise ValueError(f"`window` must be at least 3 days, got {window}.")
    least = max(3, -(-2 * window // 3) if min_count is None else min_count)
    if least > window:
        raise ValueError(f"`min_count` must be at most `window` {window}, got {least}.")
    if not -1 <= threshold < 1:
        raise ValueError(f"`threshold` must be in [-1, 1), got {threshold}.")
    n = returns.shape[1]
    collector = _Collector()
    for day in tqdm(
        range(first, len(returns)),
        desc="correlation graph",
        unit="day",
        disable=None if progress else True,
    ):
        x = returns[max(0, day - window + 1) : day + 1].astype(np.float32)
        found = list(_correlated(x, threshold, least))
        if not found:
            collector.add(np.empty((2, 0), np.int32))
            continue
        i, j, strength = (np.hstack(part) for part in zip(*found, strict=True))
        collector.add(_strongest(i, j, strength, n, max_neighbors))
    return _done(collector)


_ROWS = 1024  # rows of a correlation block: [1024, n] float32 at a time


def _correlated(
    x: np.ndarray, threshold: float, least: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (i, j, correlation) of the pairs above the threshold in x [window, n]."""
    known = np.isfinite(x)
    count = known.sum(0)
    mean = np.where(known, x, 0).sum(0, dtype=np.float64) / np.maximum(count, 1)
    x = np.where(known, x - mean, 0).astype(np.float32)
    moves = np.einsum("wn,wn->n", x, x, dtype=np.float64)
    fit = (count >= least) & (moves > 1e-10 * np.maximum(count, 1))
    whole = np.flatnonzero(fit & (count == len(x)))
    gappy = np.flatnonzero(fit & (count < len(x)))
    z = (x[:, whole] / np.sqrt(moves[whole])).astype(np.float32)
    for a in range(0, len(whole), _ROWS):
        b = min(a + _ROWS, len(whole))
        rho = z[:, a:b].T @ z[:, a:]
        # The lower triangle meets the same pairs in the other order.
        rho[:, : b - a][np.tri(b - a, dtype=bool)] = -2
        i, j = np.nonzero(rho > threshold)
        yield whole[a + i], whole[a + j], rho[i, j]
    m = known.astype(np.float32)
    square = x * x
    others = np.r_[gappy, whole]
    mo, xo, so = m[:, others], x[:, others], square[:, others]
    for a in range(0, len(gappy), _ROWS):
        rows = gappy[a : a + _ROWS]
        mr, xr = m[:, rows].T, x[:, rows].T
        both = mr @ mo
        share = np.reciprocal(np.maximum(both, 1))
        sum_r, sum_o = xr @ mo, mr @ xo
        rho = xr @ xo
        rho -= sum_r * sum_o * share
        sum_r *= sum_r
        sum_r *= share
        var_r = square[:, rows].T @ mo
        var_r -= sum_r
        sum_o *= sum_o
        sum_o *= share
        var_o = mr @ so
        var_o -= sum_o
        bad = np.minimum(var_r, var_o) <= 1e-10 * both
        bad |= both < least
        var_r *= var_o
        var_r[bad] = 1
        rho /= np.sqrt(var_r, out=var_r)
        rho[bad] = -2
        # Columns begin with the gappy stocks themselves, in the same order.
        rho[np.tri(rho.shape[0], rho.shape[1], a, dtype=bool)] = -2
        i, j = np.nonzero(rho > threshold)
        yield rows[i], others[j], rho[i, j]


def knn_edges(
    x: np.ndarray,
    k: int = 10,
    metric: str = "euclidean",
    min_known: float = 0.5,
    clip: float = 3.0,
    progress: bool = False,
) -> Sets:
    """Join each stock to its nearest neighbours in standardised indicators.

    Parameters
    ----------
    x : ndarray [t, n, f]
        Indicators known at the close of the day, NaN unknown.
    k : int, default 10
        Neighbours chosen by each stock; the graph is made symmetric, so a stock that
        many choose has more.
    metric : {"euclidean", "cosine"}, default "euclidean"
        Cosine compares profiles regardless of their size.
    min_known : float, default 0.5
        Share of the indicators that a stock must have; others are isolated. Its unknown
        indicators count as the day's mean.
    clip : float, default 3
        Standardised indicators are clipped to this many standard deviations.
    progress : bool, default False

    Returns
    -------
    edges : list of int32 array [2, e]
    state : int32 array [t]
        A day whose indicators equal the previous day's reuses its edges.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"`metric` must be 'euclidean' or 'cosine', got {metric!r}.")
    x = np.asarray(x)
    n = x.shape[1]
    collector = _Collector()
    for day in tqdm(
        range(len(x)), desc="knn graph", unit="day", disable=None if progress else True
    ):
        if day and np.array_equal(x[day], x[day - 1], equal_nan=True):
            collector.again()
            continue
        z, row = standard_profile(x[day].astype(np.float64), min_known, clip)
        if metric == "cosine":
            length = np.linalg.norm(z, axis=1)
            row, z = row[length > 0], z[length > 0] / length[length > 0, None]
        if len(row) < 2:
            collector.add(np.empty((2, 0), np.int32))
            continue
        i, j = _nearest(z, k)
        collector.add(_pairs(row[i], row[j], n))
    return _done(collector)


def standard_profile(x, min_known: float, clip: float):
    """Standardise one day's x [n, f]; return rows with enough known, and which."""
    known = np.isfinite(x)
    row = np.flatnonzero(known.any(1) & (known.mean(1) >= min_known))
    x, known = x[row], known[row]
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, x, 0.0).sum(0) / count
    gap = np.where(known, x - mean, 0.0)
    spread = np.sqrt((gap**2).sum(0) / count)
    flat = spread <= 1e-12 * np.abs(np.where(known, x, 0.0)).max(0, initial=0.0)
    z = np.where(flat, 0.0, gap / np.where(flat, 1.0, spread))
    return np.clip(z, -clip, clip), row


def _nearest(z: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(i, j): j is among the k nearest of i, in z [m, f], itself left out."""
    m = len(z)
    take = min(k + 1, m)
    # Away from zero: the tree steps to the next float above a value, and where torch
    # flushes subnormal floats (our models do) the next above 0 is 0, without end.
    z = z - z.min(0) + 1.0
    index = cKDTree(z).query(z, take)[1].reshape(m, take)
    other = index != np.arange(m)[:, None]
    # With several stocks at one point a stock may miss itself: drop the farthest then.
    other[other.all(1), -1] = False
    i, at = np.nonzero(other)
    return i, index[i, at]


# ----------------------------------------------------------------------- loading
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
    values : float32 ndarray [h + t, n, f]
        NaN unknown.
    h : int
        Days of history in front.
    """
    from qlib.data import D

    before = pd.DatetimeIndex(D.calendar(end_time=dates[0], freq=freq))
    before = before[before < dates[0]][-history:] if history else before[:0]
    days = before.append(dates)
    loaded = D.features(
        list(instruments), list(expressions), days[0], days[-1], freq=freq
    )
    values = np.full((len(days), len(instruments), len(expressions)), np.nan, "f4")
    if len(loaded):
        index = loaded.index
        day = days.get_indexer(index.get_level_values("datetime"))
        stock = instruments.get_indexer(index.get_level_values("instrument"))
        inside = (day >= 0) & (stock >= 0)
        values[day[inside], stock[inside]] = loaded.to_numpy(np.float32)[inside]
    values[~np.isfinite(values)] = np.nan
    return values, len(before)


class Graph:
    """A relation, configured in YAML and built for a panel.

    Subclasses give `inputs` (the arrays a panel needs, point in time) and `edges` (from
    these arrays). `build` joins them, with an optional cache on disk.

    Parameters
    ----------
    name : str
        Relation name in reports.
    cache_dir : str, optional
        Where to keep built graphs. The file name is a hash of the arguments and of the
        input data, so a changed store never meets a stale graph.
    """

    def __init__(self, name: str, cache_dir: str | None = None) -> None:
        if not name or not isinstance(name, str):
            raise ValueError(f"`name` must be a text, got {name!r}.")
        self.name = name
        self.cache_dir = cache_dir

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
        path = self._path(inputs, panel)
        if path is not None and path.exists():
            logger.info(f"graph {self.name!r} read from {path}")
            return EdgeSeries.load(path)
        edges, state = self.edges(inputs)
        series = EdgeSeries(
            self.name,
            panel.dates,
            panel.instruments,
            edges,
            state,
            self.directed,
        )
        last = series.edges[series.state[-1]].shape[1]
        logger.info(
            f"graph {self.name!r}: {len(series.edges)} distinct sets over "
            f"{len(series.dates)} days, {last} edges on the last, "
            f"{series.nbytes / 2**20:.1f} MiB"
        )
        if last == 0 and not any(e.shape[1] for e in series.edges):
            logger.warning(f"graph {self.name!r} has no edge on any day.")
        if path is not None:
            series.save(path)
        return series

    def _path(self, inputs, panel) -> Path | None:
        if self.cache_dir is None:
            return None
        digest = hashlib.sha256()
        settings = {k: v for k, v in vars(self).items() if k != "cache_dir"}
        text = {
            "class": type(self).__name__,
            "settings": settings,
            "dates": [str(d) for d in panel.dates],
            "instruments": [str(i) for i in panel.instruments],
        }
        digest.update(json.dumps(text, sort_keys=True, default=str).encode())
        for name in sorted(inputs):
            value = np.ascontiguousarray(inputs[name])
            digest.update(f"{name}{value.shape}{value.dtype}".encode())
            digest.update(value.tobytes())
        name = f"{self.name}-{digest.hexdigest()[:20]}.npz"
        return Path(self.cache_dir) / name


def risk_column(panel, name: str) -> np.ndarray | None:
    """Return a column [t, n] of the panel's risk group; None if it has none."""
    if panel.risk is None or name not in panel.risk_names:
        return None
    return panel.risk[..., panel.risk_names.index(name)].numpy()


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
    name, cache_dir
        See `Graph`.
    """

    def __init__(
        self, k: int | None = None, name: str = "industry", cache_dir: str | None = None
    ) -> None:
        super().__init__(name, cache_dir)
        if k is not None:
            check_whole("k", k, 1)
        self.k = k

    def inputs(self, panel) -> dict[str, np.ndarray]:
        """Industry codes, and log market cap if `k` is given."""
        out = {}
        for name, field_, expression in (
            ("industry", "industry", "$industry"),
            ("size", "market_cap", "Log($market_cap)"),
        ):
            if name == "size" and self.k is None:
                continue
            value = risk_column(panel, "industry" if name == "industry" else "log_mcap")
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
    name, cache_dir
        See `Graph`.
    """

    def __init__(
        self,
        window: int = 30,
        threshold: float = 0.7,
        min_count: int | None = None,
        max_neighbors: int | None = 30,
        name: str = "correlation",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(name, cache_dir)
        check_whole("window", window, 3)
        if min_count is not None:
            check_whole("min_count", min_count, 3)
        if max_neighbors is not None:
            check_whole("max_neighbors", max_neighbors, 1)
        check_number("threshold", threshold, -1, 0.999999)
        if min_count is not None and min_count > window:
            raise ValueError(
                f"`min_count` must be at most `window` {window}, got {min_count}."
            )
        self.window = window
        self.threshold = threshold
        self.min_count = min_count
        self.max_neighbors = max_neighbors

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
    name, cache_dir
        See `Graph`.
    """

    def __init__(
        self,
        fields: list[str] | None = None,
        k: int = 10,
        lag: int = 0,
        max_age: int = 400,
        min_known: float = 0.5,
        metric: str = "euclidean",
        name: str = "financial",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(name, cache_dir)
        check_whole("k", k, 1)
        check_whole("lag", lag, 0)
        check_whole("max_age", max_age, 0)
        check_number("min_known", min_known, 0, 1)
        if metric not in ("euclidean", "cosine"):
            raise ValueError(
                f"`metric` must be 'euclidean' or 'cosine', got {metric!r}."
            )
        self.fields = None if fields is None else list(fields)
        self.k = k
        self.lag = lag
        self.max_age = max_age
        self.min_known = min_known
        self.metric = metric

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
    name, cache_dir
        See `Graph`.
    """

    def __init__(
        self,
        fields: list[str] | None = None,
        window: int = 20,
        k: int = 10,
        metric: str = "euclidean",
        min_known: float = 0.5,
        name: str = "flow",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(name, cache_dir)
        check_whole("window", window, 1)
        check_whole("k", k, 1)
        check_number("min_known", min_known, 0, 1)
        if metric not in ("euclidean", "cosine"):
            raise ValueError(
                f"`metric` must be 'euclidean' or 'cosine', got {metric!r}."
            )
        self.fields = None if fields is None else list(fields)
        self.window = window
        self.k = k
        self.metric = metric
        self.min_known = min_known

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
    name, cache_dir
        See `Graph`.
    """

    def __init__(
        self,
        path: str,
        directed: bool = False,
        name: str = "user",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(name, cache_dir)
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"`path` must be a Parquet file, got {path!r}.")
        self.path = str(path)
        self.directed = directed

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
        collector = _Collector()
        for day in range(days):
            if day and day not in borders:
                collector.again()
                continue
            now = (first <= day) & (day < last)
            if self.directed:
                code = np.unique(source[now] * n + target[now])
                collector.add(np.stack([code // n, code % n]))
            else:
                collector.add(_pairs(source[now], target[now], n))
        return _done(collector)


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
