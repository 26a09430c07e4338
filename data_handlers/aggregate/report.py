"""The account of a build: rows in and out, what was rejected, what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_handlers.aggregate.partition import account_of, add_account
from data_handlers.aggregate.plan import Part

__all__ = ["BuildReport", "add_accounts", "read_report"]


@dataclass
class BuildReport:
    """Account of a build.

    Attributes
    ----------
    kind : str
        "ms", "l2", "flow" or "bars".
    partitions, reused : int
        Partitions of the source; those found finished.
    rows_in : dict
        Rows of each source table.
    rows_out : int
        Rows of the partitions (stock-days).
    rows_kept : int
        Rows that the years hold besides, of days that earlier builds put there.
    rejected : dict
        Table to {reason: rows}.
    coverage : dict
        Feature to the share of rows in which it has a value; of all rows of the years
        for those that need the day before.
    missing : dict
        Table to the partitions whose source lacks it, for example orders.
    notes : dict
        Other facts, counted.
    years : list of int
        Years written or kept.
    seconds : float
        Wall time.
    bytes_out : int
        Size of the yearly files.
    options : dict
        Session, bar length and the rest.
    schema_version : int
        Version of the definitions.
    """

    kind: str
    partitions: int = 0
    reused: int = 0
    rows_in: dict[str, int] = field(default_factory=dict)
    rows_out: int = 0
    rows_kept: int = 0
    rejected: dict[str, dict[str, int]] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    years: list[int] = field(default_factory=list)
    seconds: float = 0.0
    bytes_out: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    schema_version: int = 0

    def text(self) -> str:
        """Write the account as lines for a terminal."""
        rate = sum(self.rows_in.values()) / max(self.seconds, 1e-9)
        lines = [
            f"{self.kind}: {self.rows_out:,} stock-days from "
            + ", ".join(f"{n:,} {t}" for t, n in self.rows_in.items())
            + f"; {self.partitions} partitions, {self.reused} of them found finished.",
            f"Years {self.years}, {self.bytes_out / 2**20:.1f} MiB "
            f"({self.bytes_out / max(self.rows_out + self.rows_kept, 1):.0f} bytes a "
            f"stock-day), "
            f"{self.seconds:.1f} s"
            + ("." if self.reused else f" ({rate / 1e6:.2f} million rows/s)."),
        ]
        if self.rows_kept:
            lines.append(f"kept of earlier builds: {self.rows_kept:,} stock-days")
        for table, reasons in self.rejected.items():
            for why, n in sorted(reasons.items(), key=lambda x: -x[1]):
                lines.append(f"rejected {table}: {n:,} {why}")
        for note, value in self.notes.items():
            if isinstance(value, list):
                more = f" and {len(value) - 5} more" if len(value) > 5 else ""
                value = ", ".join(map(str, value[:5])) + more
            lines.append(f"note: {note}: {value}")
        for table, parts in self.missing.items():
            lines.append(
                f"source without {table}: {len(parts)} of {self.partitions} partitions "
                f"({parts[0]} … {parts[-1]}); the features that need it are NaN there"
            )
        low = {k: v for k, v in self.coverage.items() if v < 0.999}
        lines.append(
            "coverage: "
            + (", ".join(f"{k} {v:.1%}" for k, v in low.items()) or "all features full")
        )
        return "\n".join(lines)


def read_report(out: str | Path, kind: str) -> dict[str, Any]:
    """Read the report of the last finished build."""
    path = Path(out) / kind / "report.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist; `qlib-ext build {kind}` writes it.")
    return json.loads(path.read_text())


def add_accounts(
    folder: Path, parts: list[Part], marks: Mapping[str, str], report: BuildReport
) -> None:
    """Sum the partitions' accounts into the report."""
    filled: dict[str, int] = {}
    for part in parts:
        account = account_of(folder, part.key, marks[part.key])
        if account is None:
            raise ValueError(
                f"partition {part.key} changed while the build ran; run it again."
            )
        report.rows_out += account["rows_out"]
        add_account(vars(report), account)
        for table in account["missing"]:
            report.missing.setdefault(table, []).append(part.key)
        for name, n in account["coverage"].items():
            filled[name] = filled.get(name, 0) + n
    rows = max(report.rows_out, 1)
    report.coverage = {k: n / rows for k, n in filled.items()}
    stored = sum(
        pq.read_metadata(folder / f"{y}.parquet").num_rows for y in report.years
    )
    report.rows_kept = max(stored - report.rows_out, 0)
    if report.kind == "ms":
        # Completed at assembly, so counted in the yearly files.
        for name in ("ms_mom", "ms_overnight"):
            have = 0
            for year in report.years:
                column = pq.read_table(folder / f"{year}.parquet", columns=[name])
                have += int(np.isfinite(column.column(0).to_numpy()).sum())
            report.coverage[name] = have / max(stored, 1)
