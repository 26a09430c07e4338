"""Run an audit and lay out what it found."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from qlib.log import get_module_logger

from qlib_ext import __version__
from qlib_ext.audit.checks import CHECKS
from qlib_ext.audit.subject import Settings, Subject
from qlib_ext.audit.verdict import ERROR, FAIL, PASS, SKIP, Verdict
from qlib_ext.report.page import Page, text_table

__all__ = ["Audit", "audit", "chosen"]

logger = get_module_logger("qlib_ext.audit")

_MARKS = {
    PASS: "✓ pass",
    FAIL: "✗ FAIL",
    SKIP: "– not applicable",
    ERROR: "! could not",
}


@dataclass
class Audit:
    """Outcome of an audit.

    Attributes
    ----------
    name : str
        Workflow.
    data : str
        What it ran on.
    day : Timestamp or None
        On which the copies of the store part.
    verdicts : dict
        Check to `Verdict`, in order.
    seconds : dict
        Check to wall-clock seconds.
    notes : list of str
    """

    name: str
    data: str = ""
    day: pd.Timestamp | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, status: str) -> list[str]:
        """Names of the checks with a status."""
        return [name for name, v in self.verdicts.items() if v.status == status]

    @property
    def exit_code(self) -> int:
        """1 if a leak was found, else 2 if a check could not run, else 0."""
        return 1 if self.of(FAIL) else 2 if self.of(ERROR) else 0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "workflow": self.name,
            "version": __version__,
            "data": self.data,
            "day": None if self.day is None else f"{self.day:%Y-%m-%d}",
            "exit_code": self.exit_code,
            "notes": self.notes,
            "checks": {
                name: {**v.as_dict(), "seconds": round(self.seconds[name], 2)}
                for name, v in self.verdicts.items()
            },
        }

    def headline(self) -> str:
        """Count the outcomes in a line."""
        counts = [f"{len(self.of(PASS))} passed"]
        for status, text in ((FAIL, "FAILED"), (ERROR, "could not run")):
            if self.of(status):
                counts.append(f"{len(self.of(status))} {text}")
        if self.of(SKIP):
            counts.append(f"{len(self.of(SKIP))} not applicable")
        return ", ".join(counts)

    def text(self) -> str:
        """Lay out for a terminal."""
        rows = [
            (CHECKS[name].title, v.status, f"{self.seconds[name]:.1f}")
            for name, v in self.verdicts.items()
        ]
        lines = [
            f"Audit of {self.name}",
            f"data: {self.data}",
            *(f"note: {note}" for note in self.notes),
            "",
            text_table(rows, ("check", "result", "seconds")),
            "",
        ]
        for name, v in self.verdicts.items():
            lines.append(f"{_MARKS[v.status]}  {CHECKS[name].title}: {v.summary}")
            lines += [f"      note: {note}" for note in v.notes]
        return "\n".join([*lines, "", self.headline()])

    def page(self) -> Page:
        """Lay out as one page."""
        page = Page(f"Audit: {self.name}", f"{self.headline()}. Data: {self.data}.")
        for name in self.of(FAIL):
            page.warn(f"{CHECKS[name].title}: {self.verdicts[name].summary}")
        for name in self.of(ERROR):
            page.warn(f"{CHECKS[name].title} could not run, which is no pass.")
        for status, text in (
            (PASS, "passed"),
            (FAIL, "failed"),
            (ERROR, "could not run"),
            (SKIP, "not applicable"),
        ):
            page.tile(text, float(len(self.of(status))), "i")
        parted = "" if self.day is None else f"{self.day:%Y-%m-%d}"
        page.section(
            "Result",
            f"Copies of the store part on {parted}: up to that day they are the same. "
            + " ".join(f"{note}." for note in self.notes),
        )
        table = pd.DataFrame(
            {
                "result": [_MARKS[v.status] for v in self.verdicts.values()],
                "found": [v.summary for v in self.verdicts.values()],
                "seconds": [self.seconds[name] for name in self.verdicts],
            },
            index=pd.Index(
                [CHECKS[name].title for name in self.verdicts], name="check"
            ),
        )
        styles = {
            "result": ("result", "v"),
            "found": ("found", "s"),
            "seconds": ("seconds", "n1"),
        }
        page.table("", table, wide=True, styles=styles)
        for name, v in self.verdicts.items():
            if v.table is None and not v.notes:
                continue
            check = CHECKS[name]
            page.section(check.title, f"{check.question} {_MARKS[v.status]}.")
            shown = v.table
            if shown is None:
                shown = pd.DataFrame(
                    {"text": v.notes},
                    index=[f"note {i + 1}" for i in range(len(v.notes))],
                )
                page.table("", shown, wide=True, styles={"text": ("", "s")})
                continue
            page.table(
                "", shown, " ".join(f"{n}." for n in v.notes), wide=True,
                styles={**{str(c): (str(c), "s") for c in shown}, **v.styles},
            )  # fmt: skip
        return page


def chosen(names: Iterable[str] | None) -> list[str]:
    """Put the chosen checks in their order.

    Raises
    ------
    ValueError
        On a name that is not in `CHECKS`.
    """
    if names is None:
        return list(CHECKS)
    wanted = [name.strip() for name in names if name.strip()]
    for name in wanted:
        if name not in CHECKS:
            raise ValueError(
                f"`checks`: there is no check {name!r}; choose from "
                f"{', '.join(CHECKS)}."
            )
    if not wanted:
        raise ValueError(f"`checks` is empty; choose from {', '.join(CHECKS)}.")
    return [name for name in CHECKS if name in wanted]


def audit(
    config: Mapping[str, Any],
    *,
    name: str = "workflow",
    checks: Iterable[str] | None = None,
    settings: Settings | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    subject: Subject | None = None,
) -> Audit:
    """Run a workflow's data and model through checks for leaks.

    Qlib is initialised anew, on copies of the store in a folder of their own; nothing
    is written elsewhere and nothing is logged. The state of Qlib is not put back.

    Parameters
    ----------
    config : mapping
        A workflow as `qlib_ext.workflow.load_workflow` returns it.
    name : str
        For the report.
    checks : iterable of str, optional
        Among `CHECKS`; default all.
    settings : Settings, optional
    folder : Path, optional
        Where copies go, and stay; by default a temporary one that is removed.
    say : callable, optional
        Told what happens.
    subject : Subject, optional
        In place of `config`, to share what an earlier audit loaded.

    Returns
    -------
    Audit
        A check that raised is "could not run"; if the workflow itself cannot be set up,
        all are.
    """
    names = chosen(checks)
    result = Audit(name)
    own = folder is None
    where = (
        Path(tempfile.mkdtemp(prefix="qlib_ext_audit_")) if folder is None else folder
    )
    try:
        if subject is None:
            try:
                subject = Subject(config, where, settings or Settings(), say)
            except Exception as error:
                for check in names:
                    result.verdicts[check] = Verdict.error(error)
                    result.seconds[check] = 0.0
                return result
        subject.start()
        result.data, result.day = subject.data_text, subject.day
        result.notes = list(subject.notes)
        for number, check in enumerate(names, 1):
            say(f"[{number}/{len(names)}] {CHECKS[check].title}")
            start = time.perf_counter()
            try:
                verdict = CHECKS[check].run(subject)
            except Exception as error:
                # Told, counted and never a pass; the other checks still say what they
                # can.
                verdict = Verdict.error(error)
                verdict.notes = traceback.format_exc().strip().splitlines()[-3:]
            result.verdicts[check] = verdict
            result.seconds[check] = time.perf_counter() - start
            say(f"      {verdict.status}: {verdict.summary}")
        return result
    finally:
        if own:
            shutil.rmtree(where, ignore_errors=True)


def to_json(result: Audit) -> str:
    """Text of the JSON report."""
    return json.dumps(result.as_dict(), indent=1, ensure_ascii=False, default=str)
