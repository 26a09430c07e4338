"""`qlib-ext roll`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlib_ext.cli import options
from qlib_ext.cli.console import outside_git, watched

if TYPE_CHECKING:
    from qlib_ext.rolling.retrain import Plan, RollResult

__all__ = ["roll"]

_SHOWN = re.compile(r"Rank IC(IR)? \d+d|Rank IC|IC")


@click.command()
@click.argument("workflow", type=options.FILE)
@click.option(
    "--test",
    required=True,
    metavar="FIRST:LAST",
    help="Years or dates to score: 2018:2020, or 2018-03-01:2019-02-28.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    help="Models a window; their standardised scores are averaged.",
)
@click.option(
    "--scheme",
    type=click.Choice(["day", "l2"]),
    default="day",
    help="day: 10 years of training and 1 of validation; l2: all days, split 9:1.",
)
@click.option(
    "--step",
    default="year",
    help="Length of a test window: year, quarter, month, or 'N months'.",
)
@click.option("--start", type=options.DAY, help="First day to learn from.")
@click.option(
    "--train-months",
    type=click.IntRange(1),
    default=120,
    help="Length of the training segment; scheme day only.",
)
@click.option(
    "--valid-months",
    type=click.IntRange(1),
    default=12,
    help="Length of the validation segment; scheme day only.",
)
@click.option(
    "--purge",
    type=click.IntRange(0),
    help="Trading days between segments.  [default: as far as the label reaches]",
)
@click.option(
    "--experiment", help="Of the joined score.  [default: the workflow's and _roll]"
)
@click.option("--partial", is_flag=True, help="Join even if tasks failed.")
@click.option("--dry-run", is_flag=True, help="Print the windows and train nothing.")
@options.of_tasks
def roll(workflow: Path, test: str, quiet: bool, **options: Any) -> None:
    """Retrain WORKFLOW window by window with several seeds, and join the scores.

    WORKFLOW is a file for qrun, Jinja and BASE_CONFIG_PATH included. Training,
    validation, fit windows and handlers move together, as far apart as the label
    reaches. Every task has a recorder in EXPERIMENT_tasks, tagged with year and seed;
    the joined score and the workflow's records on it are one recorder in EXPERIMENT.

    Stop it, or lose the machine: the same command goes on where it was, within an
    epoch. A task that fails is tried again, then reported; the others go on, and the
    exit code is 1.

    \b
    Examples:
      qlib-ext roll workflows/rnn_day_multi.yaml --test 2018:2020 --dry-run
      qlib-ext roll workflows/rnn_day_multi.yaml --test 2018:2020 --seeds 3 --workers 2
      qlib-ext roll workflows/rnn_l2_multi.yaml --test 2017:2020 --scheme l2
      qlib-ext roll workflows/rnn_day_multi.yaml --test 2018:2020 --workers 64 \\
          --backend ray --address auto --uri http://tracking:5000
    """
    text, code = roll_text(workflow, test, progress=not quiet, **options)
    click.echo(text)
    sys.exit(code)


def roll_text(
    workflow: Path, test: str, *, dry_run: bool = False, **options: Any
) -> tuple[str, int]:
    """Plan and run; return the account for a terminal and the exit code.

    Parameters
    ----------
    workflow, test
        See `plan`.
    dry_run : bool
        Print the windows and train nothing.
    options
        Of `plan` and `roll`.

    Raises
    ------
    ValueError
        See `plan` and `roll`.
    """
    from qlib_ext.rolling.retrain import plan, roll

    names = (
        "workers", "backend", "address", "threads", "retries", "partial", "work",
        "progress",
    )  # fmt: skip
    running = {k: options.pop(k) for k in names if k in options}
    made = plan(workflow, test, numbers=not dry_run, **options)
    if dry_run:
        return f"{_windows(made)}\n\n{len(made.tasks)} tasks; nothing was trained.", 0
    with outside_git(os.getcwd()), watched(made.qlib_init.get("provider_uri")):
        result = roll(made, **running)
    lines = [_windows(made), "", _tasks(made, result), ""]
    for why, tasks in _reasons(result).items():
        lines.append(f"{', '.join(tasks)}: {why}")
    for task, out in result.failed:
        lines.append(f"FAILED {task.name} ({out.attempts} attempts): {out.error}")
    if result.recorder:
        lines.append(
            f"joined score: experiment {result.experiment}, recorder {result.recorder}"
        )
        metrics = result.metrics or {}
        shown = sorted(filter(_SHOWN.fullmatch, metrics), key=len, reverse=True)
        lines += [f"  {name} {metrics[name]:.4f}" for name in shown]
    else:
        lines.append(
            "no joined score was made: run the same command again to try the failed "
            "tasks once more, or with --partial to join the others."
        )
    return "\n".join(lines), 1 if result.failed else 0


def _windows(made: Plan) -> str:
    from qlib_ext.report.page import text_table

    rows = [
        [
            w.name,
            *(f"{first} to {last}" for first, last in (w.train, w.valid, w.test)),
            w.note,
        ]
        for w in made.windows
    ]
    head = ["window", "train and fit", "valid", "test", ""]
    return text_table(rows, head)


def _tasks(made: Plan, result: RollResult) -> str:
    import pandas as pd

    from qlib_ext.report.page import text_table

    table = pd.DataFrame(
        [
            {
                "window": task.window.name,
                "seed": str(task.seed),
                "status": out.status,
                "minutes": f"{out.seconds / 60:.1f}" if out.seconds else "",
                "training": _share(out.figures),
                "peak MiB": f"{out.figures.get('peak_mib', float('nan')):,.0f}",
                "recorder": out.recorder[:8],
            }
            for task, out in zip(result.tasks, result.outcomes, strict=True)
        ]
    )
    return text_table(table.to_numpy().tolist(), list(table.columns))


def _reasons(result: RollResult) -> dict[str, list[str]]:
    """Why tasks were kept or trained again, with their names."""
    found: dict[str, list[str]] = {}
    for task, out in zip(result.tasks, result.outcomes, strict=True):
        if out.why:
            found.setdefault(out.why, []).append(task.name)
    return {
        f"kept: {why}" if not why.startswith("trained") else why: names
        for why, names in found.items()
    }


def _share(figures: dict[str, float]) -> str:
    parts = [figures.get(f"seconds_{k}") for k in ("data", "fit", "score")]
    if None in parts or not (total := sum(p for p in parts if p is not None)):
        return ""
    return f"{(parts[1] or 0.0) / total:.0%}"
