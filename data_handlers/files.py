"""Files and locks: write in one step, refuse a second writer, know a content again.

The one writer of both packages. A reader sees the old file or the new one, never a
part; a full disk or a read-only folder is one line that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

try:
    import fcntl
except ImportError:  # Windows: no advisory locks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "BusyError",
    "fingerprint",
    "locked",
    "replacing",
    "store_lock",
    "torch_bytes",
    "unwritable",
    "write_bytes",
    "write_json",
    "write_parquet",
    "write_text",
]

_NUMBER = itertools.count()  # two threads may write one file
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "your disk quota is used up; free some space and run again",
    errno.EFBIG: "it is larger than the limit on file sizes (ulimit -f)",
    errno.EROFS: "the file system is read-only; name a folder you may write to",
    errno.EACCES: "you may not write there; change its rights or name another folder",
    errno.EPERM: "you may not write there; change its rights or name another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; name another one",
    errno.EISDIR: "a folder has that name; name another file",
    errno.EEXIST: "a file has the name of its folder; name another one",
}


class BusyError(ValueError):
    """Another process holds the lock."""


def unwritable(error: OSError) -> str:
    """Say why a file can't be written, and the remedy; nothing where that is no case.

    Arrow gives the number of the error in its text alone.
    """
    number = error.errno
    if number is None and (told := re.search(r"errno (\d+)", str(error))):
        number = int(told[1])
    return _REMEDIES.get(number or 0, "")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path`; what was written there takes its place at the end.

    Folders above `path` are made. If the block fails, `path` is as before and nothing
    is left beside it; a killed process leaves ``.<name>.<number>.tmp``.

    Raises
    ------
    ValueError
        If the disk is full, or the file or its folder can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_NUMBER)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power cut leaves an empty file
        os.replace(temporary, path)
    except OSError as error:
        if reason := unwritable(error):
            raise ValueError(f"{path} cannot be written: {reason}.") from error
        raise
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # its folder can't be written, and the error above says so


def write_bytes(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write bytes in one step; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text in one step; see `replacing`."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], content: Any, **options: Any) -> None:
    """Write what `json.dumps` makes of `content` and `options`; see `replacing`."""
    write_text(path, json.dumps(content, **options))


def write_parquet(
    path: str | os.PathLike[str], table: pd.DataFrame | pa.Table, **options: Any
) -> None:
    """Write a frame or an Arrow table, Zstandard unless told; see `replacing`.

    Options go to `DataFrame.to_parquet` or `pyarrow.parquet.write_table`.
    """
    options = {"compression": "zstd", **options}
    with replacing(path) as temporary:
        if isinstance(table, pa.Table):
            pq.write_table(table, temporary, **options)
        else:
            table.to_parquet(temporary, **options)


def torch_bytes(content: Any) -> bytes:
    """Give what `torch.save` makes of tensors and plain containers.

    PyTorch's own writer to a file hides the reason of a failure.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@contextmanager
def locked(
    file: str | os.PathLike[str], busy: str, *, wait: bool = False
) -> Iterator[None]:
    """Hold a lock file; the lock dies with its process, and the file with the lock.

    Without advisory locks (Windows) nothing is held.

    Parameters
    ----------
    file : path
        Made if absent, its folder too.
    busy : str
        Words for the error: what goes on, such as "study a is being worked on".
    wait : bool, default False
        Wait for another holder instead of raising.

    Raises
    ------
    BusyError
        If another process holds the lock.
    ValueError
        If the file can't be made.
    """
    file = Path(file)
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            why = _REMEDIES.get(error.errno or 0, error.strerror)
            raise ValueError(f"{file} cannot be created: {why}.") from error
        if fcntl is None:
            break
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise BusyError(f"{busy} by another process; wait for it to end.") from None
        # The holder before us may have removed the file between our open and lock.
        if file.exists() and os.path.samestat(os.fstat(handle), os.stat(file)):
            break
        os.close(handle)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def store_lock(root: str | os.PathLike[str], busy: str | None = None):
    """Lock a Qlib directory against other writers: ingest, build and the market.

    The file stands beside the store, ``.<name>.lock``, because a write swaps the
    directory itself. See `locked`.
    """
    root = Path(os.path.realpath(root))
    return locked(
        root.parent / f".{root.name}.lock", busy or f"{root} is being written"
    )


def fingerprint(*parts: Any) -> str:
    """Hash contents: 32 hexadecimal digits of BLAKE2b.

    Parameters
    ----------
    *parts : str, bytes, path, array, pandas object or anything JSON holds
        A `Path` stands for the file's content, an array for its type, shape and
        values, a pandas object for its index, names and values.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        kind = type(part).__name__
        digest.update(f"|{kind}:".encode())
        for piece in _pieces(part):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(part: Any) -> Iterator[Any]:
    if isinstance(part, (bytes, memoryview)):
        yield part
    elif isinstance(part, str):
        yield part.encode()
    elif isinstance(part, Path):
        with open(part, "rb") as file:
            while piece := file.read(1 << 20):
                yield piece
    elif isinstance(part, np.ndarray):
        yield f"{part.dtype}{part.shape}".encode()
        if part.dtype == object:
            yield json.dumps(part.tolist(), default=str).encode()
        else:
            yield np.ascontiguousarray(part).tobytes()
    elif isinstance(part, (pd.DataFrame, pd.Series)):
        names = list(part.columns) if isinstance(part, pd.DataFrame) else [part.name]
        yield json.dumps([names, list(part.index.names)], default=str).encode()
        yield pd.util.hash_pandas_object(part).to_numpy().tobytes()
    elif isinstance(part, pd.Index):
        yield pd.util.hash_pandas_object(part).to_numpy().tobytes()
    else:
        yield json.dumps(part, sort_keys=True, default=str).encode()
