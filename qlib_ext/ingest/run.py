"""From vendor files to a store in one call: read, check, convert, write or extend."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_handlers.vendor.mapping import VendorMapping, load_mapping
from qlib_ext.ingest.bonds import ingest_bonds
from qlib_ext.ingest.build import IngestResult, build
from qlib_ext.ingest.inputs import read_all
from qlib_ext.ingest.report import ACCEPTABLE, Report
from qlib_ext.ingest.store import (
    check_target,
    is_store,
    read_industry_names,
    tidy_store,
)
from qlib_ext.ingest.update import check_same_mapping, extend

__all__ = ["IngestResult", "ingest"]


def ingest(
    root: str | os.PathLike[str],
    mapping: str | os.PathLike[str] | VendorMapping,
    *,
    data: str | os.PathLike[str] = ".",
    files: Mapping[str, Sequence[str]] | None = None,
    update: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    drop_bad_rows: bool = False,
    progress: bool = False,
    accept: Sequence[str] = (),
) -> IngestResult:
    """Make or extend a Qlib day store from vendor files.

    Parameters
    ----------
    root : path
        The store.
    mapping : str, path or VendorMapping
        Preset name, mapping file, or a loaded mapping.
    data : path, default "."
        Directory that the mapping's file names are relative to.
    files : mapping of str to sequence of str, optional
        Source name to files, globs or directories that replace the mapping's.
    update : bool, default False
        Append new days and new listings to an existing store.
    overwrite : bool, default False
        Replace an existing store.
    dry_run : bool, default False
        Read, check and convert, write nothing.
    drop_bad_rows : bool, default False
        Leave out rows and files that cannot be used, with a warning, instead of
        stopping. Errors that are no matter of single rows (a unit, an update that does
        not follow on) stop all the same.
    progress : bool, default False
        Show progress bars.
    accept : sequence of str
        Names of findings (`report.ACCEPTABLE`) that are right after all: warnings.

    Raises
    ------
    IngestError
        If the checks find errors; nothing was written.
    ValueError
        If files, mapping or store do not fit.
    """
    started = time.monotonic()
    root = Path(root)
    plan = mapping if isinstance(mapping, VendorMapping) else load_mapping(mapping)
    if update and overwrite:
        raise ValueError("`update` and `overwrite` exclude each other; choose one.")
    if not dry_run:
        tidy_store(root)
        check_target(root)
    if update and not is_store(root):
        raise ValueError(f"`update`: {root} is no store yet; run without --update.")
    if update:
        check_same_mapping(root, plan)
    if not update and not overwrite and not dry_run and is_store(root):
        raise ValueError(
            f"`root`={root} is a store already; use --update to append to it or "
            "--overwrite to replace it."
        )
    unknown = sorted(set(accept) - set(ACCEPTABLE))
    if unknown:
        raise ValueError(
            f"`accept`={unknown[0]!r} is no finding that can be accepted; choose from "
            f"{list(ACCEPTABLE)}."
        )
    report = Report(drop_bad_rows=drop_bad_rows, accept=tuple(accept))
    if plan.of_kind("bonds"):
        if update:
            raise ValueError(
                "`update`: a store of bonds is built whole, since terms and events may "
                "change what its past days hold; use --overwrite with all files."
            )
        result = ingest_bonds(
            root, plan, Path(data), files or {}, report,
            write=not dry_run, progress=progress,
        )  # fmt: skip
        result.summary["seconds"] = round(time.monotonic() - started, 1)
        return result
    given = read_all(
        plan, Path(data), files or {}, report,
        update=update, progress=progress,
        known_names=read_industry_names(root) if update else {},
    )  # fmt: skip
    make = extend if update else build
    result = make(root, plan, given, report, write=not dry_run, progress=progress)
    result.summary["seconds"] = round(time.monotonic() - started, 1)
    return result
