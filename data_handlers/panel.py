"""Frames of rows (datetime, instrument) as arrays [days, stocks]: the one scatter.

Glossary: t days, n instruments, k columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["cells", "scatter"]

# Rows copied at a time: bounds the temporary of a wide frame.
_ROW_BLOCK = 200_000


def cells(
    index: pd.Index,
    days: pd.DatetimeIndex,
    instruments: pd.Index | Sequence[str],
    what: str = "data",
) -> np.ndarray:
    """Find the flat cell of each row in the [t, n] grid.

    Parameters
    ----------
    index : MultiIndex
        Levels named ``datetime`` and ``instrument`` in any order.
    days, instruments
        Rows and columns of the grid.
    what : str
        Name of the frame in messages.

    Returns
    -------
    int array
        ``row * n + column``; -1 for a row of the frame outside the grid.

    Raises
    ------
    ValueError
        If the index lacks a level.
    """
    names = list(index.names)
    if not isinstance(index, pd.MultiIndex) or sorted(map(str, names)) != [
        "datetime",
        "instrument",
    ]:
        raise ValueError(
            f"`{what}` must be indexed by (datetime, instrument), got {names}."
        )
    small = len(days) * len(instruments) < 2**31
    kind: Any = np.int32 if small else np.int64
    located = []
    for name, target in (("datetime", days), ("instrument", pd.Index(instruments))):
        level = names.index(name)
        of_level = target.get_indexer(index.levels[level])
        located.append(np.append(of_level, -1).astype(kind)[index.codes[level]])
    row, column = located
    outside = (row < 0) | (column < 0)
    row *= len(instruments)
    row += column
    row[outside] = -1
    return row


def scatter(
    data: pd.DataFrame | pd.Series,
    days: pd.DatetimeIndex,
    instruments: pd.Index | Sequence[str],
    dtype: Any = np.float64,
    what: str = "data",
) -> np.ndarray:
    """Put the rows of a Qlib frame or series in their cells.

    Parameters
    ----------
    data : DataFrame or Series
        Index levels ``datetime`` and ``instrument`` in any order. Rows outside the
        given days and instruments are left out.
    days, instruments
        Rows and columns of the array.
    dtype : dtype, default float64
    what : str
        Name of the data in messages.

    Returns
    -------
    ndarray [t, n, k], of a series [t, n]
        NaN where there is no row.

    Raises
    ------
    ValueError
        If the index lacks a level or holds a pair twice, or a column is not numeric.
    """
    frame = data.to_frame() if isinstance(data, pd.Series) else data
    for name, kind in zip(frame.columns, frame.dtypes, strict=True):
        if not pd.api.types.is_numeric_dtype(kind):
            raise ValueError(
                f"`{what}` column {name!r} must be numeric, got dtype {kind}."
            )
    cell = cells(frame.index, days, instruments, what)
    inside = cell >= 0
    seen = np.zeros(len(days) * len(instruments), bool)
    seen[cell[inside]] = True
    if seen.sum() != inside.sum():
        kept = frame.index[inside]
        twice = dict(
            zip(kept.names, kept[kept.duplicated()][0], strict=True)  # type: ignore
        )
        raise ValueError(
            f"`{what}` has two rows for {twice['instrument']} on "
            f"{twice['datetime']:%Y-%m-%d}."
        )
    out = np.full((len(seen), frame.shape[1]), np.nan, dtype)
    for first in range(0, len(frame), _ROW_BLOCK):
        rows = slice(first, first + _ROW_BLOCK)
        values = frame.iloc[rows].to_numpy(dtype=dtype)
        if inside[rows].all():
            out[cell[rows]] = values
        else:
            out[cell[rows][inside[rows]]] = values[inside[rows]]
    shape = len(days), len(instruments)
    return out.reshape(shape if isinstance(data, pd.Series) else (*shape, -1))
