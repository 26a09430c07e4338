"""`qlib-ext compare`."""

from __future__ import annotations

from pathlib import Path

import click

from qlib_ext.cli import options

__all__ = ["compare"]


@click.command()
@click.argument("experiments", nargs=-1, required=True, metavar="EXPERIMENT...")
@options.uris
@options.pages
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    help="Trading days of the label.  [default: as the recorders say, else 10]",
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
    uri: tuple[str, ...],
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
    Examples:
      qlib-ext compare rnn_day_single rnn_day_multi lightgbm_alpha158
      qlib-ext compare mine theirs --uri sqlite:///mlruns.db --uri file:mlruns
    """
    from data_handlers.files import write_text
    from qlib_ext.recorders import close_dead
    from qlib_ext.report import compare as report
    from qlib_ext.report.page import format_value, slug, text_table

    for store in uri:
        close_dead(store)
    runs, found, skipped = report.load_runs(uri, experiments, label_col)
    result = report.compare(runs, horizon or found or 10, layers)
    result.warnings += skipped
    if horizon is None and found is None:
        result.warnings.append(
            "no recorder says over how many days its label reaches: 10 are taken; give "
            "--horizon"
        )
    title = "Comparison: " + ", ".join(dict.fromkeys(experiments))
    target = out / f"compare-{slug('-'.join(dict.fromkeys(experiments)))[:80]}.html"
    write_text(
        target, report.compare_page(result, title).render("Research, not advice.")
    )
    shown, styles = report.with_spread(result.models)
    head = ["model", *(styles[column][0] for column in shown.columns)]
    rows = [[str(name), *map(str, row)] for name, *row in shown.itertuples(name=None)]
    lines = [
        f"{result.context.start} to {result.context.end}, horizon "
        f"{result.context.horizon} days, RankIC every {result.context.horizon} days, "
        "mean over all starts; mean ± standard deviation over recorders",
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
    click.echo("\n".join([*lines, f"Report: {target.resolve()}"]))
