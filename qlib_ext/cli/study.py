"""`qlib-ext study`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlib_ext.cli import options
from qlib_ext.cli.console import outside_git

if TYPE_CHECKING:
    from qlib_ext.rolling.study import StudyResult

__all__ = ["study"]


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
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
def study(file: Path, out: Path, quiet: bool, **options: Any) -> None:
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
    text, code = study_text(file, out, progress=not quiet, **options)
    click.echo(text)
    sys.exit(code)


def study_text(path: Path, out: Path, *, seeds: int | None = None, **options: Any):
    """Run a study file; return the account for a terminal and the exit code.

    Parameters
    ----------
    path : Path
    out : Path
        Folder for the page.
    seeds : int, optional
        Instead of the file's.
    options
        Of `run_study`; `test`, `scheme`, `step`, `train_months` and `valid_months`
        make it rolling, `assign` holds KEY=VALUE texts that change the workflow.

    Returns
    -------
    (str, int)
    """
    from data_handlers.files import write_text
    from qlib_ext.report.compare import with_spread
    from qlib_ext.report.page import text_table
    from qlib_ext.rolling.study import load_study, run_study, set_key, study_page
    from qlib_ext.workflow import parse_yaml

    study = load_study(path)
    if seeds is not None:
        study.seeds = seeds
    for text in options.pop("assign", ()):
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"`--set` takes KEY=VALUE, got {text!r}.")
        set_key(study.config, key, parse_yaml(value, "`--set`"))
    rolling = {
        k: options.pop(k)
        for k in ("test", "scheme", "step", "train_months", "valid_months")
        if k in options
    }
    if rolling.get("test"):
        study.roll = {**study.roll, **{k: v for k, v in rolling.items() if v}}
    with outside_git(os.getcwd()):
        result = run_study(study, **options)
    lines = []
    for task, outcome in zip(result.tasks, result.outcomes, strict=True):
        if outcome.status == "failed":
            lines.append(f"FAILED {task.name}: {outcome.error}")
    code = 1 if lines else 0
    if result.comparison is None:
        return "\n".join([*lines, "no task finished; there is nothing to compare."]), 1
    shown, styles = with_spread(result.comparison.models)
    head = [study.name, *(styles[c][0] for c in shown.columns)]
    rows = [[str(name), *map(str, row)] for name, *row in shown.itertuples(name=None)]
    target = out / f"study-{study.name}.html"
    write_text(target, study_page(study, result).render("Research, not advice."))
    lines += [text_table(rows, head), _best(result), f"Report: {target.resolve()}"]
    return "\n".join(lines), code


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
