"""`qlib-ext study`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlib_ext.cli import options
from qlib_ext.cli.console import outside_git, watched

if TYPE_CHECKING:
    from qlib_ext.rolling.study import StudyResult

__all__ = ["study"]


@click.command()
@click.argument("file", type=options.FILE)
@click.option("--seeds", type=click.IntRange(1), help="Instead of the file's.")
@click.option(
    "--set",
    "assign",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the workflow in every variant, for example "
    "task.model.kwargs.n_epochs=5; repeatable.",
)
@click.option(
    "--test",
    metavar="FIRST:LAST",
    help="Retrain window by window.  [default: the workflow's own segments]",
)
@click.option("--scheme", type=click.Choice(["day", "l2"]), help="See qlib-ext roll.")
@click.option("--step", help="See qlib-ext roll.")
@click.option("--train-months", type=click.IntRange(1), help="See qlib-ext roll.")
@click.option("--valid-months", type=click.IntRange(1), help="See qlib-ext roll.")
@options.pages
@options.of_tasks
def study(
    file: Path, out: Path, quiet: bool, seeds: int | None, **options: Any
) -> None:
    """Vary settings of a workflow as FILE says; print a table, write one page.

    Every combination is trained with every seed, like the tasks of `qlib-ext roll`: a
    killed study goes on where it was. The page holds RankIC, IC_IR, paired tests and
    the learning curves.

    Studies that are there, in workflows/studies: lr, dropout, lambda, factors.

    \b
    Examples:
      qlib-ext study workflows/studies/lr.yaml
      qlib-ext study workflows/studies/factors.yaml --seeds 1 --workers 2 \\
          --set task.model.kwargs.n_epochs=5
      qlib-ext study workflows/studies/lambda.yaml --test 2018:2020
    """
    from data_handlers.files import write_text
    from qlib_ext.report.compare import with_spread
    from qlib_ext.report.page import text_table
    from qlib_ext.rolling.study import load_study, run_study, set_key, study_page
    from qlib_ext.workflow import parse_yaml

    asked = load_study(file)
    if seeds is not None:
        asked.seeds = seeds
    for text in options.pop("assign", ()):
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"`--set` takes KEY=VALUE, got {text!r}.")
        set_key(asked.config, key, parse_yaml(value, "`--set`"))
    rolling = {
        k: options.pop(k)
        for k in ("test", "scheme", "step", "train_months", "valid_months")
        if k in options
    }
    if rolling.get("test"):
        asked.roll = {**asked.roll, **{k: v for k, v in rolling.items() if v}}
    store = (asked.config.get("qlib_init") or {}).get("provider_uri")
    with outside_git(os.getcwd()), watched(store):
        result = run_study(asked, progress=not quiet, **options)
    lines = []
    for task, outcome in zip(result.tasks, result.outcomes, strict=True):
        if outcome.status == "failed":
            lines.append(f"FAILED {task.name}: {outcome.error}")
    code = 1 if lines else 0
    if result.comparison is None:
        click.echo("\n".join([*lines, "no task finished; nothing to compare."]))
        sys.exit(1)
    shown, styles = with_spread(result.comparison.models)
    head = [asked.name, *(styles[c][0] for c in shown.columns)]
    rows = [[str(name), *map(str, row)] for name, *row in shown.itertuples(name=None)]
    target = out / f"study-{asked.name}.html"
    write_text(target, study_page(asked, result).render("Research, not advice."))
    lines += [text_table(rows, head), _best(result), f"Report: {target.resolve()}"]
    click.echo("\n".join(lines))
    sys.exit(code)


def _best(result: StudyResult) -> str:
    from qlib_ext.report.page import text_table

    frame = result.curves.get("valid_rank_ic")
    if frame is None:
        return ""
    rows = [
        [str(name), f"{100 * column.max():.2f} %", f"{column.idxmax()}"]
        for name, column in frame.items()
    ]
    head = ["variant", "best validation RankIC (mean over seeds)", "epoch"]
    return text_table(rows, head)
