"""What the commands `report` and `compare` do."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data_handlers.files import write_text
from qlib_ext.recorders import (
    REPORT,
    copy_artifact,
    find_recorder,
    load_json,
)
from qlib_ext.report.compare import compare, compare_page, load_runs, with_spread
from qlib_ext.report.factor import headline
from qlib_ext.report.page import format_value, text_table

__all__ = ["compare_text", "report_text"]


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


def compare_text(
    uri: str,
    experiments: Sequence[str],
    out: Path,
    horizon: int | None = None,
    n_layers: int = 20,
    label_col: int = 0,
) -> str:
    """Compare experiments, write one HTML page to `out`; return the table as text.

    Parameters
    ----------
    uri : str
        MLflow store.
    experiments : sequence of str
    out : Path
        Directory, made if absent.
    horizon : int, optional
        Trading days of the label. Default: what a FactorRecord among the recorders
        says, else 10.
    n_layers, label_col : int
        See `compare` and `load_runs`.

    Raises
    ------
    ValueError
        See `load_runs` and `compare`.
    """
    _quiet()
    runs, found, skipped = load_runs(uri, experiments, label_col)
    result = compare(runs, horizon or found or 10, n_layers)
    result.warnings += skipped
    title = "Comparison: " + ", ".join(dict.fromkeys(experiments))
    target = out / f"compare-{_slug('-'.join(dict.fromkeys(experiments)))[:80]}.html"
    write_text(target, compare_page(result, title).render("Research, not advice."))
    shown, styles = with_spread(result.models)
    head = ["model", *(styles[column][0] for column in shown.columns)]
    rows = [[str(name), *map(str, row)] for name, *row in shown.itertuples(name=None)]
    lines = [
        f"{result.context.start} to {result.context.end}, horizon "
        f"{result.context.horizon} days, every {result.context.horizon} days from the "
        "first; mean ± standard deviation over recorders",
        "",
        text_table(rows, head),
    ]
    if len(result.paired):
        lines += [
            "",
            text_table(
                [
                    [
                        str(pair.Index),
                        format_value(pair.difference, "p2"),
                        f"{format_value(pair.low, 'p2')} to "
                        f"{format_value(pair.high, 'p2')}",
                        format_value(pair.p, "n3"),
                    ]
                    for pair in result.paired.itertuples()
                ],
                ["paired, daily RankIC", "difference", "95 % interval", "p"],
            ),
        ]
    lines += [*(f"note: {text}" for text in result.warnings), ""]
    return "\n".join([*lines, f"Report: {target.resolve()}"])


def _slug(name: str) -> str:
    """Part of a file name: what is no letter, digit, dot or dash becomes a dash."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "experiment"


def _quiet() -> None:
    # MLflow draws a progress bar for every small file it copies.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
