"""Command line: `qlib-ext COMMAND --help` teaches each step, from files to a report."""

import sys
from pathlib import Path
from typing import Any

import click

from qlib_ext import __version__
from qlib_ext.rolling.cli import roll, score, study


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
@click.option(
    "--minute",
    type=click.Choice(["1", "5", "15"]),
    help="Also write minute bars of this length, to OUT.minute<length>/.",
)
@click.option(
    "--ticks", is_flag=True, help="Also write trades, orders and quotes, to OUT.ticks/."
)
@click.option(
    "--tick-stocks",
    metavar="WHICH",
    help="A market (csi300), a number of stocks, or codes A,B,C.  [default: all]",
)
@click.option(
    "--tick-days",
    metavar="FIRST:LAST",
    help="Days with ticks, for example 2020-01-01:2020-12-31.  [default: all]",
)
@click.option(
    "--trades",
    type=int,
    default=240,
    show_default=True,
    help="Mean number of trades of a stock-day in minute bars and ticks.",
)
@click.option(
    "--style-alpha",
    type=float,
    default=0.0,
    help="Expected 10-day return of one unit less volatility, 0.01 for 1 %.",
)
@click.option(
    "--lead-lag",
    type=float,
    default=0.0,
    help="Std of the expected 10-day return from neighbours' news.",
)
@click.option(
    "--fundamental-alpha",
    type=float,
    default=0.0,
    help="Std of the expected 10-day return that statements tell.",
)
@click.option(
    "--order-flow", is_flag=True, help="Add a daily flow table that agrees with ticks."
)
@click.option("--overwrite", is_flag=True, help="Replace what is there already.")
def market_make(
    out: Path,
    stocks: int,
    years: int,
    seed: int,
    signal: str,
    minute: str | None,
    ticks: bool,
    tick_stocks: str | None,
    tick_days: str | None,
    trades: int,
    style_alpha: float,
    lead_lag: float,
    fundamental_alpha: float,
    order_flow: bool,
    overwrite: bool,
) -> None:
    """Write a simulated A-share-like market as an ordinary Qlib day store.

    Prices, volumes, indices, industries, suspensions, limits and statements are drawn
    with realistic sizes. Three signals of known strength are planted in the returns;
    the true expected return goes to OUT.oracle.parquet beside the store, never inside.

    Minute bars and ticks add up to the day bars to the unit, and can be added to a
    market later: call the command again with the same numbers. An interrupted run
    goes on where it stopped.

    \b
    Examples:
      qlib-ext market make --out market --stocks 100 --years 3
      qlib-ext market make --out market --stocks 100 --years 3 --minute 15
      qlib-ext market make --out market --stocks 100 --years 3 \\
          --ticks --tick-stocks csi300 --tick-days 2020-01-01:2020-12-31
    """
    from qlib_ext.market import build_market, describe_market

    try:
        written = build_market(
            out,
            {
                "stocks": stocks,
                "years": years,
                "seed": seed,
                "signal": signal,
                "trades": trades,
                "style_alpha": style_alpha,
                "lead_lag": lead_lag,
                "fundamental_alpha": fundamental_alpha,
                "order_flow": order_flow,
            },
            minute=None if minute is None else int(minute),
            ticks=ticks,
            tick_stocks=tick_stocks,
            tick_days=tick_days,
            overwrite=overwrite,
            progress=True,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(describe_market(out, written))


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
    """Print a run's factor figures and copy out its HTML report.

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


@main.command()
@click.argument("kind", type=click.Choice(["ms", "l2", "flow"]))
@click.option(
    "--source",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Folder of minute bars or ticks (or one file of bars).",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Store; yearly files go to OUT/ms, OUT/l2 or OUT/flow.",
)
@click.option(
    "--mapping",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML that names your files' columns, codes and time zone.",
)
@click.option(
    "--session",
    type=click.Choice(["a_share", "us_regular"]),
    help="Trading hours.  [default: a_share]",
)
@click.option(
    "--stamp",
    type=click.Choice(["start", "end"]),
    help="ms: what a bar's time is.  [default: start]",
)
@click.option(
    "--bar-minutes",
    type=click.Choice(["1", "5", "15"]),
    help="ms: length of the bars; shorter ones are merged.  [default: 1]",
)
@click.option("--start", help="First day to build, YYYY-MM-DD.")
@click.option("--end", help="Last day to build, YYYY-MM-DD.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes; 1 uses threads.",
)
@click.option(
    "--backend",
    type=click.Choice(["local", "ray", "dask"]),
    default="local",
    show_default=True,
    help="Where they run; a cluster must see the same paths.",
)
@click.option("--address", help="Address of a running cluster.")
@click.option(
    "--bins",
    metavar="NAMES",
    help="Also write these features (comma separated, or all) as Qlib bins.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def build(
    kind: str,
    source: Path,
    out: Path,
    mapping: Path | None,
    session: str | None,
    stamp: str | None,
    bar_minutes: str | None,
    start: str | None,
    end: str | None,
    workers: int,
    backend: str,
    address: str | None,
    bins: str | None,
    quiet: bool,
) -> None:
    """Reduce minute bars (ms) or ticks (l2, flow) to one row a stock and day.

    Works through the source month by month (bars) or day by day (ticks) and writes one
    Parquet file a year. Stop it whenever you like: the same command goes on where it
    was, and after new files arrive it computes only those. Prices in bars are as
    traded; the overnight return uses the bars' factor column, else the store's
    $factor, else none (said at the end).

    \b
    Files it understands without --mapping:
      bars    2020-01.parquet, ... with instrument, datetime, open, high, low, close,
              volume (shares), amount (CNY)
      ticks   trades/2020-01-02.parquet, orders/..., quotes/..., and Shanghai
              and Shenzhen layouts (data_handlers/aggregate/adapters.py)

    \b
    Examples:
      qlib-ext build ms --source minute --out store --stamp end
      qlib-ext build l2 --source ticks --out store --workers 8
      qlib-ext build ms --source minute --out store --bins ms_skew,ms_rv
      qlib-ext build flow --source ticks --out store --bins all

    flow is what aggressors bought and sold by size of their orders; FlowHandler reads
    it from bins.
    """
    from qlib_ext.aggregates import build_store

    try:
        text = build_store(
            kind,
            source,
            out,
            bins=bins,
            mapping=mapping,
            session=session,
            stamp=stamp,
            bar_minutes=None if bar_minutes is None else int(bar_minutes),
            start=start,
            end=end,
            workers=workers,
            backend=backend,
            address=address,
            progress=not quiet,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(text)


@main.command()
@click.argument("experiments", nargs=-1, required=True, metavar="EXPERIMENT...")
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
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    help="Trading days of the label.  [default: as FactorRecord says, else 10]",
)
@click.option(
    "--layers",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="Groups for the curve of the top group; fewer in a small pool.",
)
@click.option(
    "--label-col",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Column of label.pkl.",
)
def compare(
    experiments: tuple[str, ...],
    uri: str,
    out: Path,
    horizon: int | None,
    layers: int,
    label_col: int,
) -> None:
    """Compare all finished recorders of one or more experiments on one page.

    Works on any Qlib recorder with pred.pkl and label.pkl, whatever the model. Seeds of
    a model are averaged; models are tested against each other on the same days and
    stocks with a paired block bootstrap.

    \b
    Example:
      qlib-ext compare rnn_day_single rnn_day_multi lightgbm_alpha158
    """
    from qlib_ext.report.command import compare_text

    try:
        click.echo(compare_text(uri, experiments, out, horizon, layers, label_col))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


main.add_command(roll)
main.add_command(score)
main.add_command(study)


@main.command()
@click.argument("workflow", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--checks", metavar="A,B", help="Only these checks.  [default: all]")
@click.option("--quick", is_flag=True, help="Smaller, and without a second training.")
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of training.",
)
@click.option("--stocks", type=click.IntRange(20), help="Sampled or simulated.")
@click.option(
    "--data",
    type=click.Choice(["auto", "own", "embedded"]),
    default="auto",
    show_default=True,
    help="The workflow's store, a simulated one, or the first if it exists.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Model argument to set, such as hidden_size=16; repeatable.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also JSON.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("reports"),
    show_default=True,
    help="Directory for the HTML page.",
)
def audit(workflow: Path, **options: Any) -> None:
    """Look for leaks of the future in a workflow's data and model.

    Builds the data and trains the model on copies of the store that agree up to one
    day, and compares what there is before it; then looks at fit windows, purge, missing
    rows, graphs, batches and execution, and trains on exchanged labels and on a market
    without signal. Works on any Qlib workflow on day bars; `--data own` samples its
    store. Checks: windows, purge, membership, truncation, perturbation, rows, graphs,
    execution, batches, shuffle, no_signal.

    Exit code: 0 every check passed, 1 a leak was found, 2 a check could not run.

    \b
    Examples:
      qlib-ext audit workflows/rnn_day_single.yaml
      qlib-ext audit mine.yaml --quick --checks truncation,purge --json audit.json
      qlib-ext audit mine.yaml --data own --stocks 100 --set hidden_size=16
    """
    from qlib_ext.audit.command import audit_workflow

    try:
        text, code = audit_workflow(
            workflow, say=lambda line: click.echo(line, err=True), **options
        )
    except ValueError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(text)
    sys.exit(code)


@main.command()
@click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Qlib day store.",
)
@click.option(
    "--train", required=True, metavar="FIRST:LAST", help="Years or dates to search on."
)
@click.option("--holdout", metavar="FIRST:LAST", help="Later years, looked at once.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("factors.yaml"),
    show_default=True,
    help="File of expressions; a page NAME.html and a folder NAME.mining go beside it.",
)
@click.option(
    "--budget", type=int, default=10000, show_default=True, help="Expressions to try."
)
@click.option("--minutes", type=float, help="Stop earlier; a later call goes on.")
@click.option("--universe", default="all", show_default=True, help="Market.")
@click.option("--fields", help="A,B,C without $.  [default: prices, volume, amount]")
@click.option("--horizon", type=int, default=10, show_default=True, help="Label, days.")
@click.option(
    "--price",
    type=click.Choice(["close", "open", "vwap"]),
    default="close",
    show_default=True,
    help="Price at both ends of the label.",
)
@click.option("--mined", type=int, default=185, show_default=True, help="Pool size.")
@click.option(
    "--kept", type=int, default=48, show_default=True, help="Best of the pool."
)
@click.option(
    "--fitness",
    type=click.Choice(["icir", "rank_ic"]),
    default="icir",
    show_default=True,
    help="Information ratio of RankIC, or its mean.",
)
@click.option(
    "--population", type=int, default=200, show_default=True, help="Of a generation."
)
@click.option(
    "--max-corr",
    type=float,
    default=0.7,
    show_default=True,
    help="Rank correlation below which two expressions differ.",
)
@click.option(
    "--keep-coverage",
    type=float,
    default=0.8,
    show_default=True,
    help="Share of stock-days with a value that the kept ones need.",
)
@click.option(
    "--parsimony",
    type=float,
    default=0.01,
    show_default=True,
    help="Share of the performance that a node costs.",
)
@click.option(
    "--max-depth", type=int, default=5, show_default=True, help="Levels of operators."
)
@click.option("--max-size", type=int, default=16, show_default=True, help="Nodes.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Same seed, same file."
)
@click.option("--fresh", is_flag=True, help="Forget finished generations.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def mine(train: str, fields: str | None, quiet: bool, **options: Any) -> None:
    """Mine Qlib expressions that tell later returns, by genetic programming.

    The search sees the training years only: RankIC on dates whose returns do not
    overlap, newness against what was found before, and brevity. The best are then
    looked at once on the holdout. Both come with a significance that counts the tries:
    a search always finds something, on a market without any signal too.

    OUT lists the kept expressions, best first; MinedHandler (family DP) reads it, and
    so does any Qlib handler: they are Qlib's own operators. Finished generations stay
    in NAME.mining. A call with the same numbers goes on from there, also after a kill,
    and ends with the same file as one call; a larger --budget continues.

    \b
    Examples:
      qlib-ext mine --store ~/qlib/cn --train 2012:2016 --holdout 2017 \\
          --out factors.yaml --budget 20000
      qlib-ext mine --store market --train 2015:2018 --holdout 2019 \\
          --universe csi300 --mined 60 --kept 20 --minutes 10 --seed 1
      qlib-ext mine --store market --train 2015-01-01:2018-06-30 \\
          --fields open,high,low,close,volume --budget 2000
    """
    from qlib_ext.mining.command import mine as search

    names = tuple(f.strip() for f in fields.split(",") if f.strip()) if fields else ()
    try:
        text = search(train=train, fields=names, progress=not quiet, **options)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(text)


@main.command()
@click.option(
    "--store",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Qlib store with prices and industries.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory of the model; days already there are left.",
)
@click.option("--start", required=True, help="First day wanted.")
@click.option("--end", required=True, help="Last day wanted.")
@click.option(
    "--frequency",
    type=click.Choice(["week", "day"]),
    default="week",
    show_default=True,
    help="Last day of each week, or every day (Qlib's own strategy needs that).",
)
@click.option(
    "--extra",
    multiple=True,
    metavar="NAME=FILE",
    help="Parquet of a further risk factor, such as a Mamba's learnt one.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Compute every day again, also of a model made otherwise.",
)
def riskmodel(
    store: Path,
    out: Path,
    start: str,
    end: str,
    frequency: str,
    extra: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Estimate factor covariance and specific risk, in the layout that Qlib reads.

    Point in time: the files of a day use data up to its close. An interrupted run goes
    on where it stopped.

    \b
    Example:
      qlib-ext riskmodel --store data/market --out riskmodel/market \\
          --start 2018-01-01 --end 2020-12-31
    """
    from qlib_ext.portfolio.command import riskmodel_text

    try:
        click.echo(riskmodel_text(store, out, start, end, frequency, extra, overwrite))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
