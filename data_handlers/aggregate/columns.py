"""Columns of a source as arrays for compiled loops, and the threads that run them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

__all__ = ["dictionary_codes", "frozen", "in_threads", "microseconds", "midnights"]


def in_threads(
    kernel: Callable,
    n: int,
    args: tuple,
    threads: int | None = None,
    rows: np.ndarray | None = None,
) -> None:
    """Run kernel(first, last, *args) over 0…n in threads; it must hold no GIL.

    `rows` counts the rows before each of the n, and their total: where a few of them
    hold most, the threads get about equal rows.
    """
    threads = threads or len(os.sched_getaffinity(0))
    if threads == 1 or n < (64 if rows is None else 4):
        kernel(0, n, *args)
        return
    edges = np.linspace(0, n, 4 * threads + 1).astype(np.int64)
    if rows is not None:
        edges = np.searchsorted(rows, np.linspace(0, rows[-1], 8 * threads + 1))
        edges = np.unique(np.r_[0, edges, n])
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(kernel, int(lo), int(hi), *args)
            for lo, hi in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()


def dictionary_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Labels, sorted, and the int32 code of each row in them."""
    if not pa.types.is_dictionary(column.type):
        if not (
            pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        ):
            raise ValueError(
                f"Column 'instrument' must hold text such as SH600000, got "
                f"{column.type}."
            )
        column = column.dictionary_encode()
    if column.null_count:
        raise ValueError(
            f"Column 'instrument' is empty in {column.null_count} rows; every row "
            "needs its code."
        )
    column = column.unify_dictionaries()
    if column.num_chunks == 0:
        return np.empty(0, dtype=object), np.empty(0, dtype=np.int32)
    labels = np.asarray(column.chunk(0).dictionary.to_pylist(), dtype=object)
    parts = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    code = parts[0] if len(parts) == 1 else np.concatenate(parts)
    code = code.astype(np.int32, copy=False)
    order = np.argsort(labels, kind="stable")
    if not np.array_equal(order, np.arange(len(labels))):
        rank = np.empty(len(labels), dtype=np.int32)
        rank[order] = np.arange(len(labels), dtype=np.int32)
        labels, code = labels[order], rank[code]
    return labels, code


def microseconds(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Stamps as int64 microseconds since 1970 of exchange-local time, NaT negative."""
    kind = column.type
    if not pa.types.is_timestamp(kind):
        raise ValueError(
            f"Column {name!r} must be a timestamp, got {kind}; a mapping file can say "
            "how to read it (`time_format`)."
        )
    if kind.tz is not None:
        raise ValueError(
            f"Column {name!r} has the time zone {kind.tz}; give exchange-local times "
            "without a zone, or set `tz` in a mapping file to have them translated."
        )
    values = column.to_numpy().astype("datetime64[us]", copy=False)
    return values.view(np.int64)


def frozen(x: np.ndarray) -> np.ndarray:
    """Return a contiguous read-only view: the one type that kernels are compiled for.

    Arrays from Arrow are read-only and numpy's own are not; each mixture of the two
    would be compiled anew.
    """
    view = np.ascontiguousarray(x).view()
    view.flags.writeable = False
    return view


def midnights(day: np.ndarray) -> np.ndarray:
    """Days since 1970 as datetime64[ns]."""
    return day.astype("datetime64[D]").astype("datetime64[ns]")
