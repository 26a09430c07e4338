"""Command line: `qlib-ext COMMAND --help` teaches each step, from files to a report."""

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


if __name__ == "__main__":
    main()
