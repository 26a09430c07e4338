"""`qlib-ext market`."""

from pathlib import Path
from typing import Any

import click

from qlib_ext.cli import options

__all__ = ["market"]


_years = click.option("--years", type=int, default=8, help="Years, up to 2020-12-31.")
_seed = click.option("--seed", type=int, default=0, help="Same seed, same market.")


@click.group()
def market() -> None:
    """Simulate a market with known signals, to try everything without data."""


@market.command("make")
@click.option(
    "--out",
    type=options.FOLDER,
    default=Path("market"),
    help="Directory of the new Qlib store.",
)
@click.option("--stocks", type=int, default=300, help="Companies ever listed.")
@_years
@_seed
@click.option(
    "--signal",
    type=click.Choice(["planted", "none"]),
    default="planted",
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
@click.option(
    "--funds", type=int, default=0, help="Add the reported holdings of so many funds."
)
@click.option(
    "--attribute-alpha",
    type=float,
    default=0.0,
    help="Std of the expected 10-day return that the funds' holdings tell.",
)
@click.option(
    "--turning",
    type=int,
    default=0,
    help="Days in which the day signal turns into its opposite and back.",
)
@click.option(
    "--etfs",
    type=click.IntRange(0, 999),
    default=0,
    help="Funds that track industries, with bars and dated baskets.",
)
@click.option(
    "--bonds",
    type=click.IntRange(20, 900),
    help="Also write so many convertible bonds on its shares, to OUT.bonds/.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is there already.")
def market_make(
    out: Path, minute: str | None, bonds: int | None, overwrite: bool, **given: Any
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
      qlib-ext market make --out market --stocks 100 --years 3 --bonds 120
      qlib-ext market make --out market --stocks 100 --years 3 \\
          --ticks --tick-stocks csi300 --tick-days 2020-01-01:2020-12-31
    """
    from qlib_ext.market import build_market, describe_market, make_bonds

    ticks = {k: given.pop(k) for k in ("ticks", "tick_stocks", "tick_days")}
    if not given["turning"]:
        del given["turning"]
    written = build_market(
        out,
        given,
        minute=None if minute is None else int(minute),
        keep=bonds is not None,
        overwrite=overwrite,
        progress=True,
        **ticks,
    )
    click.echo(describe_market(out, written))
    if bonds is not None:
        store = make_bonds(out, bonds=bonds, overwrite=overwrite)
        click.echo(f"{store}: {bonds} convertible bonds, a store of their own")


@market.command("futures")
@click.option(
    "--out",
    type=options.FOLDER,
    default=Path("market.futures"),
    help="Directory of the new Qlib store.",
)
@_years
@_seed
@click.option(
    "--strength",
    type=float,
    default=0.35,
    help="Correlation of the minutes' signal with the next day's return; 0 is none.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is there already.")
def market_futures(out: Path, **given: Any) -> None:
    """Write simulated treasury-bond futures as a store of their own.

    Day bars of two products rolled from all their contracts, and the minute bars of
    each day side by side (OUT/bars). A signal of known strength stands in the minutes
    only; the expected returns go to OUT.oracle.parquet.

    \b
    Example:
      qlib-ext market futures --out data/market.futures
      qrun workflows/treasury_dual.yaml
    """
    from qlib_ext.market import make_futures

    store = make_futures(out, **given)
    click.echo(f"{store}: CFFEX.T and CFFEX.TL, minute bars in {store / 'bars'}")
