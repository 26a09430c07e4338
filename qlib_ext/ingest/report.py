"""Findings of an ingest: what was checked, what is wrong, counts and examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["ACCEPTABLE", "Finding", "IngestError", "Report"]

#: Errors that may be right after all, and pass by name (`--accept`).
ACCEPTABLE = (
    "conversion price without event",
    "factor falls",
    "factor revised",
    "incomplete days",
    "index and stocks apart",
    "index jumps",
    "jumps without factor change",
    "levels",
    "limit prices",
    "lost fields",
    "mapping changed",
    "missing trading days",
    "moves",
    "open and close",
    "previous close",
    "ranks",
    "repeated bars",
)

_MOST_LEFT_OUT = 0.5
LEVELS = ("error", "warning", "note")
EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one source.

    Attributes
    ----------
    level : str
        ``error`` stops the ingest, ``warning`` is to be looked at, ``note`` is a fact.
    check : str
        Short name of the check.
    source : str
        Source of the mapping it was found in.
    message : str
        What is wrong and what to do.
    count : int
        Rows (or items) concerned.
    examples : tuple of dict
        The first few, with the values that are wrong.
    """

    level: str
    check: str
    source: str
    message: str
    count: int = 0
    examples: tuple[dict[str, Any], ...] = ()


class IngestError(ValueError):
    """The input has errors; nothing was written. `report` holds all findings."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class Report:
    """All findings, and the checks that found nothing.

    Attributes
    ----------
    findings : list of Finding
        In the order found.
    passed : list of str
        Checks that found nothing.
    drop_bad_rows : bool
        Whether rows with errors are left out, with a warning.
    accept : tuple of str
        Names of `ACCEPTABLE` that are warnings instead of errors.
    """

    findings: list[Finding] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    drop_bad_rows: bool = False
    accept: tuple[str, ...] = ()

    def add(
        self,
        level: str,
        check: str,
        source: str,
        message: str,
        rows: pd.DataFrame | None = None,
        *,
        count: int | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        """Add a finding; the examples are the first rows of `rows` in `columns`."""
        if level not in LEVELS:
            raise ValueError(f"`level` must be one of {LEVELS}, got {level!r}.")
        examples: tuple[dict[str, Any], ...] = ()
        if rows is not None:
            keep = [c for c in columns if c in rows.columns] or list(rows.columns)
            examples = tuple(
                {str(k): _plain(v) for k, v in row.items()}
                for row in rows[keep].head(EXAMPLES).to_dict("records")
            )
            count = len(rows) if count is None else count
        if level == "error" and check in self.accept:
            level, message = "warning", f"accepted: {message}"
        elif level == "error" and check in ACCEPTABLE:
            stop = "" if message.endswith("?") else "."
            message += f"{stop} If it is right after all: --accept {check!r}"
        self.findings.append(
            Finding(level, check, source, message, int(count or 0), examples)
        )

    def bad_rows(
        self,
        check: str,
        source: str,
        message: str,
        frame: pd.DataFrame,
        mask: np.ndarray,
        columns: Sequence[str],
        *,
        examples: pd.DataFrame | None = None,
    ) -> np.ndarray:
        """Add rows of `frame` that cannot be used; return those to leave out.

        Rows are left out, with a warning, only if that is asked for and they are at
        most half of all: what concerns more is no matter of single rows.
        """
        drop = self.drop_bad_rows and mask.sum() <= _MOST_LEFT_OUT * len(frame)
        rows = frame[mask] if examples is None else examples
        count = int(mask.sum())
        if drop:
            message = f"rows left out: {message}"
        elif self.drop_bad_rows:
            message += f". {count} of {len(frame)} rows are too many to leave out"
        level = "warning" if drop else "error"
        self.add(level, check, source, message, rows, count=count, columns=columns)
        return mask if drop else np.zeros(len(frame), dtype=bool)

    def ok(self, check: str, source: str) -> None:
        """Record a check that found nothing."""
        self.passed.append(f"{source}: {check}")

    def of_level(self, level: str) -> list[Finding]:
        """Return the findings of one level."""
        return [f for f in self.findings if f.level == level]

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop the ingest."""
        return self.of_level("error")

    def stop_on_errors(self) -> None:
        """Raise `IngestError` if there is any error."""
        if self.errors:
            first = self.errors[0]
            raise IngestError(
                f"{len(self.errors)} error(s) in the input, nothing was written; "
                f"first: {first.source}: {first.check}: {first.message}",
                self,
            )

    def to_json(self) -> str:
        """Return the report as JSON text."""
        content = {
            "counts": {level: len(self.of_level(level)) for level in LEVELS},
            "findings": [
                {
                    "level": f.level,
                    "check": f.check,
                    "source": f.source,
                    "message": f.message,
                    "count": f.count,
                    "examples": list(f.examples),
                }
                for f in self.findings
            ],
            "passed": self.passed,
        }
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the report as Markdown text."""
        lines = ["# Ingest report", "", self.headline(), ""]
        for level in LEVELS:
            for f in self.of_level(level):
                lines += [f"## {level}: {f.check} ({f.source})", "", f.message, ""]
                if f.count:
                    lines += [f"Count: {f.count:,}", ""]
                if f.examples:
                    keys = list(f.examples[0])
                    lines.append("| " + " | ".join(keys) + " |")
                    lines.append("|" + "---|" * len(keys))
                    lines += [
                        "| " + " | ".join(str(row.get(k, "")) for k in keys) + " |"
                        for row in f.examples
                    ]
                    lines.append("")
        if self.passed:
            lines += ["## Checks that found nothing", ""]
            lines += [f"- {name}" for name in self.passed]
        return "\n".join(lines) + "\n"

    def headline(self) -> str:
        """Return one line with the counts."""
        counts = [f"{len(self.of_level(level))} {level}(s)" for level in LEVELS]
        return ", ".join(counts) + f", {len(self.passed)} check(s) found nothing"

    def to_text(self, examples: int = 2) -> str:
        """Return the report as a table for the terminal."""
        lines = []
        for level in LEVELS:
            for f in self.of_level(level):
                count = f"{f.count:,}" if f.count else ""
                lines.append(f"{level.upper():8}{f.source:12}{f.check:24}{count:>10}")
                lines.append(f"        {f.message}")
                for row in f.examples[:examples]:
                    text = ", ".join(f"{k}={v}" for k, v in row.items())
                    lines.append(f"          e.g. {text}")
        lines.append(self.headline())
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """Make a value of a frame fit for JSON and eyes."""
    if isinstance(value, pd.Timestamp):
        return f"{value:%Y-%m-%d}"
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    return value if isinstance(value, (int, str, bool)) or value is None else str(value)
