"""`qlib-ext report`."""

from __future__ import annotations

from pathlib import Path

import click

from qlib_ext.cli import options

__all__ = ["report"]

_CONTEXT = "figures horizon universe start end days stocks label".split()


@click.command()
@click.option("--experiment", help="Experiment to look in.  [default: all]")
@click.option("--recorder", help="Recorder id or its beginning.  [default: newest]")
@options.uri
@options.pages
def report(experiment: str | None, recorder: str | None, uri: str, out: Path) -> None:
    """Print a run's figures and copy out its HTML pages.

    Reads what FactorRecord left in the recorder (without it: all figures of the run),
    so it needs no Qlib store and computes nothing. Without options: the newest run that
    has a page, else the newest that has figures; one that failed after it was made, or
    still runs, is marked.

    \b
    Examples:
      qlib-ext report
      qlib-ext report --experiment rnn_day_multi --uri sqlite:///mlruns.db
    """
    click.echo(report_text(uri, out, experiment, recorder))


def report_text(
    uri: str, out: Path, experiment: str | None = None, recorder: str | None = None
) -> str:
    """Copy a recorder's HTML pages to `out`; return the figures as text.

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
    import re

    from qlib_ext.recorders import (
        PROCESS,
        close_dead,
        copy_artifact,
        find_recorder,
        load_json,
        pages_of,
    )
    from qlib_ext.report.factor import headline
    from qlib_ext.report.page import format_value, slug, text_table

    close_dead(uri)
    name, found = find_recorder(uri, experiment, recorder, finished=False, figures=True)
    pages = pages_of(found)
    about: list[str] = []
    if "factor" in pages:
        context = load_json(found, "factor/context.json", *_CONTEXT)
        figures, h = context["figures"], context["horizon"]
        about = [
            f"{context['universe']}, {context['start']} to {context['end']}, "
            f"{context['days']:,} days, {context['stocks']:,.0f} stocks a day",
            f"label: {context['label']}, horizon {h} days",
            "returns: x252, equal-weight layers, weekly, next close, no costs",
        ]
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
    else:
        rows = [(k, f"{v:.4g}") for k, v in sorted(found.list_metrics().items())]
    stem = f"{slug(name)}-{found.id[:8]}"
    copied = [
        copy_artifact(
            found,
            f"{part}/report.html",
            out / (f"{stem}.html" if part == "factor" else f"{stem}-{part}.html"),
        )
        for part in pages
    ]
    lines = [
        f"{name}, recorder {found.id}, {found.status.lower()} {found.end_time or ''}",
        *_marks(found.status, PROCESS in found.list_tags()),
        *about,
        "",
        text_table(rows, ("figure", "value")),
        "",
        *(
            f"{'Page:  ' if at else 'Report:'} {page.resolve()}"
            for at, page in enumerate(copied)
        ),
    ]
    if not copied:
        lines.append("no page: FactorRecord of qlib_ext.record_temp writes one")
    return "\n".join(lines)


def _marks(status: str, has_process: bool) -> list[str]:
    """Words about a run that did not end well."""
    if status == "FINISHED":
        return []
    if status == "RUNNING" and not has_process:
        return ["NOT FINISHED: the run may go on or be dead; it names no process"]
    if status == "RUNNING":
        return ["NOT FINISHED: the run still goes on; its other records are to come"]
    return [
        f"{status}: the run ended before all its records were done; these figures were "
        "made before that"
    ]
