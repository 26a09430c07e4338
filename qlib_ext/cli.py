"""Command line: `qlib-ext COMMAND --help` teaches each step, from files to a report."""

import sys
from pathlib import Path

import click

from qlib_ext import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Deep-learning stock-selection factors for Qlib."""


@main.group()
def market() -> None:
    """Simulate a market with known signals, to try everything without data."""


@market.command("make")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("market"),
    show_default=True,
    help="Directory of the new Qlib store.",
)
@click.option(
    "--stocks", type=int, default=300, show_default=True, help="Companies ever listed."
)
@click.option(
    "--years", type=int, default=8, show_default=True, help="Years, up to 2020-12-31."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Same seed, same market."
)
@click.option(
    "--signal",
    type=click.Choice(["planted", "none"]),
    default="planted",
    show_default=True,
    help="none: the same market without alpha, to see what luck looks like.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing store in --out.")
def market_make(
    out: Path, stocks: int, years: int, seed: int, signal: str, overwrite: bool
) -> None:
    """Write a simulated A-share-like market as an ordinary Qlib day store.

    Prices, volumes, indices, industries, suspensions, limits and statements are drawn
    with realistic sizes. Three signals of known strength are planted in the returns;
    the true expected return goes to OUT.oracle.parquet beside the store, never inside.

    \b
    Example:
      qlib-ext market make --out market --stocks 100 --years 3
    """  # noqa: D301 - click's own mark for a paragraph kept as it is
    from qlib_ext.market import describe_market, make_market

    try:
        make_market(
            out,
            stocks=stocks,
            years=years,
            seed=seed,
            signal=signal,
            overwrite=overwrite,
            progress=True,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(describe_market(out))


@main.command()
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
    show_default=True,
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
    help="Leave out rows with errors (listed as warnings) instead of stopping.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    help="Also save the report here (.json or .md), even if there are errors.",
)
@click.option("--list-presets", is_flag=True, help="List the presets and exit.")
@click.option("--show-preset", metavar="NAME", help="Print a preset's YAML and exit.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def ingest(
    store: Path | None,
    preset: str | None,
    mapping: Path | None,
    data: Path,
    files: tuple[str, ...],
    update: bool,
    overwrite: bool,
    dry_run: bool,
    drop_bad_rows: bool,
    report_file: Path | None,
    list_presets: bool,
    show_preset: str | None,
    quiet: bool,
) -> None:
    r"""Make or extend the Qlib day store STORE from vendor files (Parquet, CSV).

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
    from qlib_ext.ingest import command

    if list_presets or show_preset:
        click.echo(command.describe_presets(show_preset), nl=False)
        return
    code = command.run(
        store=store, preset=preset, mapping=mapping, data=data, files=files,
        update=update, overwrite=overwrite, dry_run=dry_run,
        drop_bad_rows=drop_bad_rows, report_file=report_file, progress=not quiet,
    )  # fmt: skip
    sys.exit(code)


@main.command()
@click.option("--experiment", help="Experiment to look in.  [default: all]")
@click.option("--recorder", help="Recorder id or its beginning.  [default: newest]")
@click.option(
    "--uri",
    default="sqlite:///mlruns.db",
    show_default=True,
    help="MLflow store that qrun wrote to.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("reports"),
    show_default=True,
    help="Directory for the HTML page.",
)
def report(experiment: str | None, recorder: str | None, uri: str, out: Path) -> None:
    r"""Print a run's factor figures and copy out its HTML report.

    Reads what FactorRecord left in the recorder, so it needs no Qlib store and computes
    nothing. Without options: the newest finished run that has a report.

    \b
    Examples:
      qlib-ext report
      qlib-ext report --experiment rnn_day_multi --uri sqlite:///mlruns.db
    """
    from qlib_ext.report.command import report_text

    try:
        click.echo(report_text(uri, out, experiment, recorder))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
