"""Read source files piece by piece, so that memory follows the piece, not the file.

A day of ticks of a whole market has about 150 million rows. `read_stocks` reads only
the rows of some stocks, skipping row groups by their statistics; `iter_stocks` walks
through a file that is sorted by stock without cutting any stock in two.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from data_handlers.vendor.mapping import Source
from data_handlers.vendor.text import is_text, read_text

__all__ = [
    "as_text",
    "bounds_of",
    "columns_of",
    "iter_stocks",
    "plain_codes",
    "read_file",
    "read_stocks",
    "rows_of",
]


def _open(path: str | Path) -> pq.ParquetFile:
    """Open a Parquet file, with an error that says what to do if it is none."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}); it may be cut off: copy "
            "it again from its source."
        ) from error


def _names(how: Source | None) -> set[str]:
    """Names by which the header is known, to tell it from a title above."""
    if how is not None and how.columns:
        return how.names()
    return {"instrument", "time", "datetime"}


def _ways(how: Source | None) -> dict[str, Any]:
    return {k: getattr(how, k, None) for k in ("encoding", "skip", "footer")}


def _csv(path: str | Path, how: Source | None) -> pa.Table:
    """Read a CSV file; codes stay text, whatever they look like."""
    text = read_text(path, str(path), known=_names(how), **_ways(how))
    code = "instrument" if how is None else how.columns.get("instrument")
    codes = [code] if isinstance(code, str) else list(code or ())
    try:
        return pacsv.read_csv(
            pa.BufferReader(text.data),
            read_options=pacsv.ReadOptions(column_names=text.names, skip_rows=1),
            parse_options=pacsv.ParseOptions(delimiter=text.sep),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(codes, pa.string())
            ),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable CSV file: {error}") from error


def columns_of(path: str | Path, how: Source | None = None) -> list[str]:
    """Return the file's column names."""
    if is_text(path):
        return read_text(
            path, str(path), known=_names(how), head=True, **_ways(how)
        ).names
    with _open(path) as file:
        return file.schema_arrow.names


def rows_of(path: str | Path) -> int:
    """Return the number of rows, an estimate from the size for CSV."""
    if is_text(path):
        return os.path.getsize(path) // 60
    with _open(path) as file:
        return file.metadata.num_rows


def read_file(
    path: str | Path, columns: Sequence[str], how: Source | None = None
) -> pa.Table:
    """Read the columns of `columns` that the file has, all rows.

    `how` says how a CSV file is written, here and below.
    """
    if is_text(path):
        table = _csv(path, how)
        return table.select([c for c in columns if c in table.column_names])
    with _open(path) as file:
        return _groups(file, path, None, columns)


def _groups(
    file: pq.ParquetFile,
    path: str | Path,
    groups: Sequence[int] | None,
    columns: Sequence[str],
) -> pa.Table:
    names = set(file.schema_arrow.names)
    use = [c for c in columns if c in names]
    try:
        if groups is None:
            return file.read(columns=use)
        return file.read_row_groups(list(groups), columns=use)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path}: cannot read its data ({error}); the file is damaged: copy it "
            "again from its source."
        ) from error


def _bounds(file: pq.ParquetFile, column: str) -> list[tuple] | None:
    """(least, greatest) of each row group, None where the file does not say."""
    names = file.schema_arrow.names
    if column not in names:
        return None
    meta = file.metadata
    where = [meta.schema.column(i).path for i in range(meta.num_columns)].index(column)
    out = []
    for g in range(meta.num_row_groups):
        stats = meta.row_group(g).column(where).statistics
        if stats is None or not stats.has_min_max:
            return None
        out.append((stats.min, stats.max))
    return out


def bounds_of(path: str | Path, column: str) -> pa.Table | None:
    """Least and greatest value of a column by the statistics of a Parquet file."""
    if is_text(path):
        return None
    with _open(path) as file:
        bounds = _bounds(file, column)
        if not bounds:
            return None
        kind = file.schema_arrow.field(column).type
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.table({column: pa.array([low, high], type=kind)})


def iter_stocks(
    path: str | Path,
    columns: Sequence[str],
    stock: str,
    max_rows: int = 1_000_000,
    how: Source | None = None,
) -> Iterator[pa.Table]:
    """Yield tables that together hold the file, no stock in two of them.

    Needs a file sorted by stock, by its row groups' statistics; any other file is
    yielded whole if it has at most 32 × `max_rows` rows, else stock range by stock
    range, which reads it several times.

    Parameters
    ----------
    path : str or Path
        Parquet or CSV file.
    columns : list of str
        Columns to read, as far as the file has them.
    stock : str
        Column with the stock's code.
    max_rows : int
        Rows a piece should have at most; one stock or row group may exceed it. A piece
        of one row group is handed on without a copy.
    """
    if is_text(path) or stock not in columns_of(path, how):
        yield read_file(path, columns, how)
        return
    with _open(path) as file:
        bounds = _bounds(file, stock)
        meta = file.metadata
        sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        by_stock = bounds is not None and all(
            a[1] <= b[0] for a, b in itertools.pairwise(bounds)
        )
        if not by_stock or bounds is None:
            if sum(sizes) <= 32 * max_rows:
                yield _groups(file, path, None, columns)
                return
            yield from _ranges(path, columns, stock, max_rows)
            return
        carry: pa.Table | None = None
        carried: str = ""
        g = 0
        while g < len(sizes):
            first, rows = g, 0
            while g < len(sizes) and (rows == 0 or rows + sizes[g] <= max_rows):
                rows += sizes[g]
                g += 1
            table = _groups(file, path, range(first, g), columns)
            low, high = bounds[first][0], bounds[g - 1][1]
            more = g < len(sizes) and bounds[g][0] == high
            if carry is not None and low == high == carried and more:
                carry = pa.concat_tables([carry, table])  # still the same stock
                continue
            if carry is None and not more:
                yield table
                continue
            if carry is not None:
                head, table = _take(table, stock, carried, front=True)
                yield pa.concat_tables([carry, head])
                carry = None
            if more:
                carry, table = _take(table, stock, high, front=False)
                carried = high
            if table.num_rows:
                yield table
        if carry is not None:
            yield carry


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        return pc.cast(column, column.type.value_type)
    return as_text(column)


def plain_codes(table: pa.Table) -> pa.Table:
    """Table whose instruments are text, so that tables of several files join."""
    at = table.column_names.index("instrument")
    return table.set_column(at, "instrument", _plain(table.column(at)))


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Codes kept as numbers as text; other columns as they are."""
    if not pa.types.is_integer(column.type):
        return column
    return pc.cast(column, pa.string())


def _take(
    table: pa.Table, stock: str, value: str, front: bool
) -> tuple[pa.Table, pa.Table]:
    """Rows of one stock and the rest; slices where they stand at the edge."""
    column = table.column(stock)
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    masks = [np.empty(0, dtype=bool)]
    for chunk in column.chunks:
        # Codes, not texts: comparing millions of strings costs as much as reading them.
        at = chunk.dictionary.index(value).as_py()
        masks.append(chunk.indices.to_numpy(zero_copy_only=False) == at)
    is_it = np.concatenate(masks)
    n = int(is_it.sum())
    rest = table.num_rows - n
    if is_it[:n].all() if front else is_it[rest:].all():
        if front:
            return table.slice(0, n), table.slice(n)
        return table.slice(rest), table.slice(0, rest)
    mask = pa.array(is_it)
    return table.filter(mask), table.filter(pc.invert(mask))


def _ranges(
    path: str | Path, columns: Sequence[str], stock: str, max_rows: int
) -> Iterator[pa.Table]:
    counts = stock_counts(path, stock)
    for stocks in split_stocks(counts, max_rows):
        yield read_stocks(path, columns, stock, set(stocks).__contains__, stocks)


def stock_counts(
    path: str | Path, stock: str, how: Source | None = None
) -> dict[str, int]:
    """Rows of each code in the file's own spelling; reads that column only."""
    counts: dict[str, int] = {}
    if is_text(path):
        tables = iter([_csv(path, how)])
    else:
        file = _open(path)
        n = file.metadata.num_row_groups
        tables = (_groups(file, path, [g], [stock]) for g in range(n))
    for table in tables:
        for item in _plain(table.column(stock)).value_counts().to_pylist():
            code = str(item["values"])
            counts[code] = counts.get(code, 0) + item["counts"]
    return counts


def split_stocks(counts: dict[str, int], max_rows: int) -> list[list[str]]:
    """Sorted codes in consecutive runs of at most `max_rows` rows (at least one)."""
    runs: list[list[str]] = []
    rows = max_rows + 1
    for code in sorted(counts):
        if rows + counts[code] > max_rows:
            runs.append([])
            rows = 0
        runs[-1].append(code)
        rows += counts[code]
    return runs


def read_stocks(
    path: str | Path,
    columns: Sequence[str],
    stock: str,
    wanted: Callable[[str], bool],
    between: Sequence[str] | None = None,
    how: Source | None = None,
) -> pa.Table:
    """Read the rows of some stocks, one row group at a time.

    Parameters
    ----------
    path : str or Path
        Parquet or CSV file.
    columns : list of str
        Columns to read, as far as the file has them.
    stock : str
        Column with the stock's code.
    wanted : callable
        Tells by a code, in the file's spelling, whether its rows are wanted.
    between : list of str, optional
        The wanted codes, sorted, in the file's spelling: row groups outside their
        range are skipped.
    """
    if is_text(path):
        table = read_file(path, columns, how)
        mask = _mask(table.column(stock), wanted)
        return table if mask is None else table.filter(mask)
    with _open(path) as file:
        bounds = _bounds(file, stock)
        parts = []
        for g in range(file.metadata.num_row_groups):
            if bounds and between and isinstance(bounds[g][0], str):
                low, high = bounds[g]
                if high < between[0] or low > between[-1]:
                    continue
                if low >= between[0] and high <= between[-1] and low == high:
                    parts.append(_groups(file, path, [g], columns))
                    continue
            table = _groups(file, path, [g], columns)
            mask = _mask(table.column(stock), wanted)
            parts.append(table if mask is None else table.filter(mask))
        if not parts:
            return _groups(file, path, [], columns)
    return pa.concat_tables(parts, promote_options="permissive")


def _mask(column: pa.ChunkedArray, wanted: Callable[[str], bool]) -> pa.Array | None:
    """Mask of wanted rows; None if all are."""
    column = as_text(column)
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = column.unify_dictionaries().chunks
    if not chunks:
        return pa.array([], type=pa.bool_())
    keep = np.array([wanted(str(x)) for x in chunks[0].dictionary.to_pylist()], bool)
    index = np.concatenate([c.indices.to_numpy(zero_copy_only=False) for c in chunks])
    mask = keep[index]
    return None if mask.all() else pa.array(mask)
