"""`qlib-ext build`."""

from pathlib import Path
from typing import Any

import click

from qlib_ext.cli import options

__all__ = ["build"]


@click.command()
@click.argument("kind", type=click.Choice(["ms", "l2", "flow", "bars"]), required=False)
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="Folder of minute bars or ticks (or one file of bars).",
)
@click.option(
    "--out",
    type=options.FOLDER,
    help="Store; yearly files go to OUT/ms, OUT/l2, OUT/flow or OUT/bars.",
)
@click.option("--preset", help="Vendor preset; see --list-presets.")
@click.option(
    "--mapping",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML mapping file; start from a preset with --show-preset.",
)
@click.option(
    "--session",
    type=click.Choice(["a_share", "us_regular", "cffex_bonds"]),
    help="Trading hours.  [default: a_share]",
)
@click.option(
    "--stamp",
    type=click.Choice(["start", "end"]),
    help="ms, bars: what a bar's time is.  [default: start]",
)
@click.option(
    "--bar-minutes",
    type=click.Choice(["1", "5", "15"]),
    help="ms, bars: length of the bars; shorter ones are merged.  [default: 1]",
)
@click.option("--start", type=options.DAY, help="First day to build, YYYY-MM-DD.")
@click.option("--end", type=options.DAY, help="Last day to build, YYYY-MM-DD.")
@options.processes
@click.option(
    "--bins",
    metavar="NAMES",
    help="Also write these features (comma separated, or all) as Qlib bins.",
)
@click.option("--list-presets", is_flag=True, help="List the presets and exit.")
@click.option("--show-preset", metavar="NAME", help="Print a preset's YAML and exit.")
@options.quiet
def build(
    kind: str | None,
    source: Path | None,
    out: Path | None,
    preset: str | None,
    mapping: Path | None,
    bar_minutes: str | None,
    list_presets: bool,
    show_preset: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Reduce minute bars (ms, bars) or ticks (l2, flow) to one row a stock and day.

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
              and Shenzhen layouts (the presets shanghai_ticks, shenzhen_ticks)

    \b
    Examples:
      qlib-ext build ms --source minute --out store --stamp end
      qlib-ext build ms --source dl --out store --preset akshare_minute
      qlib-ext build l2 --source ticks --out store --workers 8
      qlib-ext build ms --source minute --out store --bins ms_skew,ms_rv
      qlib-ext build flow --source ticks --out store --bins all

    bars keeps the minute bars themselves side by side, for the timing of a few
    instruments. flow is what aggressors bought and sold by size of their orders;
    FlowHandler reads it from bins.
    """
    from data_handlers.vendor.mapping import describe_presets

    if list_presets or show_preset:
        click.echo(describe_presets(show_preset, intraday=True), nl=False)
        return
    if kind is None or source is None or out is None:
        raise click.UsageError("Give KIND (ms, l2, flow or bars), --source and --out.")
    if preset is not None and mapping is not None:
        raise click.UsageError("--preset and --mapping exclude each other.")
    from qlib_ext.aggregates import build_store

    text = build_store(
        kind,
        source,
        out,
        mapping=preset or mapping,
        bar_minutes=None if bar_minutes is None else int(bar_minutes),
        progress=not quiet,
        **given,
    )
    click.echo(text)
