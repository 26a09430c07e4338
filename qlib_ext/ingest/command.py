"""What `qlib-ext ingest` prints and returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from data_handlers.files import write_text
from data_handlers.vendor.mapping import preset_names
from qlib_ext.ingest.report import IngestError, Report
from qlib_ext.ingest.run import IngestResult, ingest

__all__ = ["run"]


def run(
    *,
    store: Path | None,
    preset: str | None,
    mapping: Path | None,
    data: Path,
    files: Sequence[str],
    update: bool,
    overwrite: bool,
    dry_run: bool,
    drop_bad_rows: bool,
    report_file: Path | None,
    progress: bool,
    accept: Sequence[str] = (),
) -> int:
    """Run one ingest for the command line; return the exit status.

    0: done. 1: the input has errors, or a file or store does not fit. 2: wrong usage.
    """
    if store is None:
        raise click.UsageError("Missing argument STORE: the directory of the store.")
    if (preset is None) == (mapping is None):
        raise click.UsageError(
            f"Give one of --preset NAME and --mapping FILE; presets: {preset_names()}."
        )
    sources: dict[str, list[str]] = {}
    for item in files:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise click.UsageError(f"--file {item!r} must be SOURCE=PATH.")
        sources.setdefault(name, []).append(path)
    try:
        result = ingest(
            store,
            preset or mapping or "",
            data=data,
            files=sources,
            update=update,
            overwrite=overwrite,
            dry_run=dry_run,
            drop_bad_rows=drop_bad_rows,
            progress=progress,
            accept=accept,
        )
    except IngestError as error:
        click.echo(error.report.to_text())
        _save(error.report, report_file)
        click.secho("\nNothing was written. Fix the errors above", fg="red", nl=False)
        click.echo(
            "." if drop_bad_rows else ", or leave bad rows out with --drop-bad-rows."
        )
        return 1
    except ValueError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        return 1
    except OSError as error:
        click.secho(
            f"error: {error}\nThe store is as it was before.", fg="red", err=True
        )
        return 1
    click.echo(result.report.to_text())
    _save(result.report, report_file)
    click.echo(_summary(result, dry_run=dry_run, update=update))
    return 0


def _save(report: Report, file: Path | None) -> None:
    if file is not None:
        text = report.to_json() if file.suffix == ".json" else report.to_markdown()
        write_text(file, text)


def _summary(result: IngestResult, *, dry_run: bool, update: bool) -> str:
    s = result.summary
    lines = [""]
    if update and not s.get("new_days") and not s.get("new_stocks"):
        lines.append(f"{result.root} is up to date: it ends {s['end']}.")
        return "\n".join(lines)
    done = "would hold" if dry_run else "holds"
    lines.append(
        f"{result.root} {done} {s['stocks']:,} stocks and {len(s['indices'])} indices "
        f"on {s['days']:,} days, {s['start']} to {s['end']} ({s['seconds']} s)"
    )
    if update:
        lines.append(f"  new:     {s['new_days']} day(s), {s['new_stocks']} listing(s)")
    lines.append(f"  fields:  {' '.join(s['fields'])}")
    if s["markets"]:
        held = ", ".join(f"{k} ({v} stocks)" for k, v in s["markets"].items())
        lines.append(f"  markets: all, {held}")
    if s["indices"]:
        lines.append(f"  indices: {' '.join(s['indices'])}")
    if dry_run:
        lines.append("Nothing was written; run again without --dry-run.")
    else:
        lines.append(f"  report:  {result.root / 'ingest_report.md'}")
        lines.append(
            f"next: qlib.init(provider_uri={str(result.root)!r}), or point a "
            "workflow's `provider_uri` at it and qrun"
        )
    return "\n".join(lines)
