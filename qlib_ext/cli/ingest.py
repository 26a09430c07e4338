"""`qlib-ext ingest`."""

import sys
from pathlib import Path
from typing import Any

import click

from qlib_ext.cli import options

__all__ = ["ingest"]


@click.command()
@click.argument("store", type=click.Path(path_type=Path), required=False)
@click.option("--preset", help="Vendor preset; see --list-presets.")
@click.option(
    "--mapping",
    type=click.Path(path_type=Path),
    help="YAML mapping file; start from a preset with --show-preset.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Directory with the vendor files the mapping names.",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="SOURCE=PATH",
    help="Files, glob (quoted) or directory of one source of the mapping; repeatable.",
)
@click.option(
    "--update", is_flag=True, help="Append new days and new listings to STORE."
)
@click.option("--overwrite", is_flag=True, help="Replace STORE if it exists.")
@click.option("--dry-run", is_flag=True, help="Read, check and convert; write nothing.")
@click.option(
    "--drop-bad-rows",
    is_flag=True,
    help="Leave out rows and files with errors (listed as warnings) where that helps.",
)
@click.option(
    "--accept",
    multiple=True,
    metavar="NAME",
    help="Let the error of this name pass as a warning; repeatable.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    help="Also save the report here (.json or .md), even if there are errors.",
)
@click.option("--list-presets", is_flag=True, help="List the presets and exit.")
@click.option("--show-preset", metavar="NAME", help="Print a preset's YAML and exit.")
@options.quiet
def ingest(
    list_presets: bool, show_preset: str | None, quiet: bool, **given: Any
) -> None:
    """Make or extend the Qlib day store STORE from vendor files (Parquet, CSV).

    \b
    First look, write nothing:
      qlib-ext ingest ~/qlib/cn --preset tushare --data ~/tushare --dry-run
    Build the store:
      qlib-ext ingest ~/qlib/cn --preset tushare --data ~/tushare
    Files elsewhere, by source name:
      qlib-ext ingest ~/qlib/cn --preset baostock --file 'daily=dl/*.csv'
    Every day after the close:
      qlib-ext ingest ~/qlib/cn --preset tushare --data ~/tushare/today --update
    Another vendor: copy a preset and edit it:
      qlib-ext ingest --show-preset tushare > mine.yaml
      qlib-ext ingest ~/qlib/cn --mapping mine.yaml --data ~/files

    The checks run before anything is written: errors stop, warnings are listed with
    counts and examples and saved in STORE/ingest_report.md and .json. The store changes
    in one step, so processes that read it see the old or the new version.
    """
    from data_handlers.vendor.mapping import describe_presets
    from qlib_ext.ingest import command

    if list_presets or show_preset:
        click.echo(describe_presets(show_preset), nl=False)
        return
    sys.exit(command.run(progress=not quiet, **given))
