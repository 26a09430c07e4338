"""What a check found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

__all__ = ["ERROR", "FAIL", "PASS", "SKIP", "Verdict"]

PASS, FAIL, SKIP, ERROR = "pass", "fail", "not applicable", "could not run"


@dataclass
class Verdict:
    """Outcome of one check.

    Attributes
    ----------
    status : str
        `PASS`, `FAIL`, `SKIP` (there is nothing to check) or `ERROR` (never a pass).
    summary : str
        What was found, in a sentence.
    table : DataFrame or None
        Details, with row names in the index.
    notes : list of str
        What a reader should know beside the outcome.
    styles : mapping
        Columns of `table` to (heading, style), see `qlib_ext.report.page.Page.table`.
    """

    status: str
    summary: str
    table: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)
    styles: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def passed(
        cls,
        summary: str,
        table: pd.DataFrame | None = None,
        notes: Sequence[str] = (),
        styles: Mapping[str, tuple[str, str]] | None = None,
    ) -> Verdict:
        """Report that nothing leaked."""
        return cls(PASS, summary, table, list(notes), styles or {})

    @classmethod
    def fail(
        cls,
        summary: str,
        table: pd.DataFrame | None = None,
        notes: Sequence[str] = (),
        styles: Mapping[str, tuple[str, str]] | None = None,
    ) -> Verdict:
        """Report a leak."""
        return cls(FAIL, summary, table, list(notes), styles or {})

    @classmethod
    def skip(cls, reason: str) -> Verdict:
        """Report that the workflow has nothing of the kind."""
        return cls(SKIP, reason)

    @classmethod
    def error(cls, error: BaseException) -> Verdict:
        """Report that the check broke off."""
        text = " ".join(str(error).split()) or "no message"
        return cls(ERROR, f"{type(error).__name__}: {text}")

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        table = None
        if self.table is not None:
            flat = self.table.reset_index()
            table = flat.astype(object).where(flat.notna(), None).to_dict("records")
        return {
            "status": self.status,
            "summary": self.summary,
            "notes": self.notes,
            "table": table,
        }
