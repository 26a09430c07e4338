"""`qlib-ext mine`."""

from pathlib import Path
from typing import Any

import click

from qlib_ext.cli import options

__all__ = ["mine"]


@click.command()
@click.option("--store", type=options.FOLDER, required=True, help="Qlib day store.")
@click.option(
    "--train", required=True, metavar="FIRST:LAST", help="Years or dates to search on."
)
@click.option("--holdout", metavar="FIRST:LAST", help="Later years, looked at once.")
@click.option(
    "--out",
    type=options.FILE,
    default=Path("factors.yaml"),
    help="File of expressions; a page NAME.html and a folder NAME.mining go beside it.",
)
@click.option("--budget", type=int, default=10000, help="Expressions to try.")
@click.option("--minutes", type=float, help="Stop earlier; a later call goes on.")
@click.option("--universe", default="all", help="Market.")
@click.option("--fields", help="A,B,C without $.  [default: prices, volume, amount]")
@click.option("--horizon", type=int, default=10, help="Label, days.")
@click.option(
    "--price",
    type=click.Choice(["close", "open", "vwap"]),
    default="close",
    help="Price at both ends of the label.",
)
@click.option("--mined", type=int, default=185, help="Pool size.")
@click.option("--kept", type=int, default=48, help="Best of the pool.")
@click.option(
    "--fitness",
    type=click.Choice(["icir", "rank_ic"]),
    default="icir",
    help="Information ratio of RankIC, or its mean.",
)
@click.option("--population", type=int, default=200, help="Of a generation.")
@click.option(
    "--max-corr",
    type=float,
    default=0.7,
    help="Rank correlation below which two expressions differ.",
)
@click.option(
    "--keep-coverage",
    type=float,
    default=0.8,
    help="Share of stock-days with a value that the kept ones need.",
)
@click.option(
    "--parsimony",
    type=float,
    default=0.01,
    help="Share of the performance that a node costs.",
)
@click.option("--max-depth", type=int, default=5, help="Levels of operators.")
@click.option("--max-size", type=int, default=16, help="Nodes.")
@click.option("--seed", type=int, default=0, help="Same seed, same file.")
@click.option(
    "--cross",
    is_flag=True,
    help="Compare the day's stocks too (CSRank, CSZScore, CSDemean; by $industry).",
)
@click.option("--fresh", is_flag=True, help="Forget finished generations.")
@options.quiet
def mine(train: str, fields: str | None, quiet: bool, **options: Any) -> None:
    """Mine Qlib expressions that tell later returns, by genetic programming.

    The search sees the training years only: RankIC on dates whose returns do not
    overlap, newness against what was found before, and brevity. The best are then
    looked at once on the holdout. Both come with a significance that counts the tries:
    a search always finds something, on a market without any signal too.

    OUT lists the kept expressions, best first; MinedHandler (family DP) reads it, and
    so does any Qlib handler: they are Qlib's own operators, unless --cross adds those
    that only this package's handlers know. Finished generations stay in NAME.mining. A
    call with the same numbers goes on from there, also after a kill, and ends with the
    same file as one call; a larger --budget continues.

    \b
    Examples:
      qlib-ext mine --store ~/qlib/cn --train 2012:2016 --holdout 2017 \\
          --out factors.yaml --budget 20000
      qlib-ext mine --store market --train 2015:2018 --holdout 2019 \\
          --universe csi300 --mined 60 --kept 20 --minutes 10 --seed 1
      qlib-ext mine --store market --train 2015-01-01:2018-06-30 \\
          --fields open,high,low,close,volume --budget 2000
    """
    from qlib_ext.mining.search import mine as search

    names = tuple(f.strip() for f in (fields or "").split(",") if f.strip())
    if fields is not None and (not names or len(set(names)) < len(names)):
        raise ValueError(f"`fields` must be names, each once, got {fields!r}.")
    text = search(train=train, fields=names, progress=not quiet, **options)
    click.echo(text)
