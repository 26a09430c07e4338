"""Edges between stocks as arrays: kept day by day, and made from plain arrays.

Edges of day t come from data up to the close of t. They join instruments of a panel by
position, whether or not a stock trades that day; absent stocks are filtered when a
batch is made, so that a set of edges is stored once for as long as it holds.

Glossary: t days, n instruments, f indicators, e edges, c days and m stocks of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Lt
from scipy.spatial import cKDTree
from tqdm.auto import tqdm

from data_handlers.arguments import Count, checked

__all__ = [
    "Collector",
    "EdgeSeries",
    "Sets",
    "as_of",
    "correlation_edges",
    "industry_edges",
    "knn_edges",
    "pairs",
    "standard_profile",
    "trailing_mean",
]

Sets = tuple[list[np.ndarray], np.ndarray]


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


@dataclass
class Collector:
    """Edge sets day by day; one equal to the previous day's is not stored again."""

    edges: list[np.ndarray] = field(default_factory=list)
    state: list[int] = field(default_factory=list)

    def add(self, edges: np.ndarray) -> None:
        """Take edges [2, e] for the next day."""
        edges = np.ascontiguousarray(edges, np.int32)
        if not self.edges or not np.array_equal(edges, self.edges[-1]):
            self.edges.append(edges)
        self.state.append(len(self.edges) - 1)

    def again(self) -> None:
        """Take the previous day's edges."""
        self.state.append(len(self.edges) - 1)

    @property
    def sets(self) -> Sets:
        """Distinct sets, and which of them holds on each day."""
        return self.edges, np.array(self.state, np.int32)


def pairs(i: np.ndarray, j: np.ndarray, n: int) -> np.ndarray:
    """Distinct undirected pairs, smaller position first, sorted."""
    low, high = np.minimum(i, j).astype(np.int64), np.maximum(i, j).astype(np.int64)
    code = np.unique(low * n + high)
    return np.stack([code // n, code % n]).astype(np.int32)


def _strongest(i, j, strength, n: int, limit: int | None) -> np.ndarray:
    """Pairs that are among the `limit` strongest of at least one of their ends."""
    if limit is None or not len(i):
        return pairs(i, j, n)
    degree = np.bincount(i, minlength=n) + np.bincount(j, minlength=n)
    if degree.max() <= limit:
        return pairs(i, j, n)
    source, target = np.r_[i, j], np.r_[j, i]
    order = np.lexsort((target, -np.r_[strength, strength], source))
    source, target = source[order], target[order]
    rank = np.arange(len(source)) - (np.cumsum(degree) - degree)[source]
    return pairs(source[rank < limit], target[rank < limit], n)


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
    collector = Collector()
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
        collector.add(pairs(np.hstack([none, *source]), np.hstack([none, *target]), n))
    return collector.sets


@checked
def correlation_edges(
    returns: np.ndarray,
    window: Annotated[int, Ge(3)] = 30,
    threshold: Annotated[float, Ge(-1), Lt(1)] = 0.7,
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
    least = max(3, -(-2 * window // 3) if min_count is None else min_count)
    if least > window:
        raise ValueError(f"`min_count` must be at most `window` {window}, got {least}.")
    n = returns.shape[1]
    collector = Collector()
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
    return collector.sets


CLIP = 3.0  # standard deviations, of indicators
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


@checked
def knn_edges(
    x: np.ndarray,
    k: Count = 10,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    min_known: float = 0.5,
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
    progress : bool, default False

    Returns
    -------
    edges : list of int32 array [2, e]
    state : int32 array [t]
        A day whose indicators equal the previous day's reuses its edges.
    """
    x = np.asarray(x)
    n = x.shape[1]
    collector = Collector()
    for day in tqdm(
        range(len(x)), desc="knn graph", unit="day", disable=None if progress else True
    ):
        if day and np.array_equal(x[day], x[day - 1], equal_nan=True):
            collector.again()
            continue
        z, row = standard_profile(x[day].astype(np.float64), min_known)
        if metric == "cosine":
            length = np.linalg.norm(z, axis=1)
            row, z = row[length > 0], z[length > 0] / length[length > 0, None]
        if len(row) < 2:
            collector.add(np.empty((2, 0), np.int32))
            continue
        i, j = _nearest(z, k)
        collector.add(pairs(row[i], row[j], n))
    return collector.sets


def standard_profile(x, min_known: float):
    """Standardise one day's x [n, f], clipped; rows with enough known, and which."""
    known = np.isfinite(x)
    row = np.flatnonzero(known.any(1) & (known.mean(1) >= min_known))
    x, known = x[row], known[row]
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, x, 0.0).sum(0) / count
    gap = np.where(known, x - mean, 0.0)
    spread = np.sqrt((gap**2).sum(0) / count)
    flat = spread <= 1e-12 * np.abs(np.where(known, x, 0.0)).max(0, initial=0.0)
    z = np.where(flat, 0.0, gap / np.where(flat, 1.0, spread))
    return np.clip(z, -CLIP, CLIP), row


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
