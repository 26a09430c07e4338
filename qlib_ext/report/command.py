"""What the commands `report` and `compare` do."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qlib_ext.report.factor import headline
from qlib_ext.report.page import format_value, text_table
from qlib_ext.report.recorders import (
    REPORT,
    copy_artifact,
    find_recorder,
    load_json,
)

__all__ = ["report_text"]


def report_text(
    uri: str, out: Path, experiment: str | None = None, recorder: str | None = None
) -> str:
    """Copy a recorder's HTML report to `out`; return the figures as text.

    Parameters
    ----------
    uri : str
        MLflow store.
    out : Path
        Directory, made if absent.
    experiment, recorder : str, optional
        See `recorders.find_recorder`.

    Raises
    ------
    ValueError
        If no recorder with a report is found.
    """
    _quiet()
    name, found = find_recorder(uri, experiment, recorder)
    context = load_json(found, "factor/context.json")
    figures = context["figures"]
    h = context["horizon"]
    rows = [
        (figure, format_value(float(figures[figure]), style))
        for figure, style in headline(h)
        if figure in figures
    ]
    rows += [
        (figure, format_value(float(value), "p2"))
        for figure, value in figures.items()
        if re.fullmatch(rf"Rank IC {h}d (\d{{4}}|lag \d+)", figure)
    ]
    target = copy_artifact(found, REPORT, out / f"{_slug(name)}-{found.id[:8]}.html")
    lines = [
        f"{name}, recorder {found.id} ({found.name}), finished {found.end_time}",
        f"{context['universe']}, {context['start']} to {context['end']}, "
        f"{context['days']:,} days, {context['stocks']:,.0f} stocks a day",
        f"label: {context['label']}, horizon {h} days",
        "returns: x252, equal-weight layers, weekly, next close, no costs",
        "",
        text_table(rows, ("figure", "value")),
        "",
        f"Report: {target.resolve()}",
    ]
    return "\n".join(lines)


def _slug(name: str) -> str:
    """Part of a file name: what is no letter, digit, dot or dash becomes a dash."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "experiment"


def _quiet() -> None:
    # MLflow draws a progress bar for every small file it copies.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
