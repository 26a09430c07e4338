"""`qlib-ext compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qlib_ext.cli import options

__all__ = ["compare"]


@click.command()
@click.argument("experiments", nargs=-1, required=True, metavar="EXPERIMENT...")
@options.uri
@options.pages
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    help="Trading days of the label.  [default: as FactorRecord says, else 10]",
)
@click.option(
    "--layers",
    type=click.IntRange(min=2),
    default=20,
    help="Groups for the curve of the top group; fewer in a small pool.",
)
@click.option(
    "--label-col", type=click.IntRange(min=0), default=0, help="Column of label.pkl."
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
    click.echo(compare_text(uri, experiments, out, horizon, layers, label_col))


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
    from data_handlers.files import write_text
    from qlib_ext.recorders import close_dead
    from qlib_ext.report.compare import compare, compare_page, load_runs, with_spread
    from qlib_ext.report.page import format_value, slug, text_table

    close_dead(uri)
    runs, found, skipped = load_runs(uri, experiments, label_col)
    result = compare(runs, horizon or found or 10, n_layers)
    result.warnings += skipped
    title = "Comparison: " + ", ".join(dict.fromkeys(experiments))
    target = out / f"compare-{slug('-'.join(dict.fromkeys(experiments)))[:80]}.html"
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
