"""`qlib-ext roll`: options and help."""

import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["roll", "run_options", "score", "study"]

_RUN_OPTIONS = [
    click.option("--uri", help="MLflow store.  [default: the workflow's]"),
    click.option(
        "--workers",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Processes; 1 on the local back-end is this process.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["local", "ray", "dask"]),
        default="local",
        show_default=True,
        help="Where they run; a cluster must see the same paths.",
    ),
    click.option("--address", help="Address of a running cluster."),
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Torch threads of a task.  [default: cores / workers]",
    ),
    click.option(
        "--retries",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        help="Further attempts of a task that fails.",
    ),
    click.option(
        "--work",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path(".rolling"),
        show_default=True,
        help="Folder for checkpoints; a cluster must see it.",
    ),
    click.option("--quiet", is_flag=True, help="No progress bar."),
]


def run_options(command: Any) -> Any:
    """Add the options of everything that runs tasks."""
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("workflow", type=click.Path(dir_okay=False, path_type=Path))
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
    show_default=True,
    help="Models a window; their standardised scores are averaged.",
)
@click.option(
    "--scheme",
    type=click.Choice(["day", "l2"]),
    default="day",
    show_default=True,
    help="day: 10 years of training and 1 of validation; l2: all days, split 9:1.",
)
@click.option(
    "--step",
    default="year",
    show_default=True,
    help="Length of a test window: year, quarter, month, or 'N months'.",
)
@click.option("--start", metavar="DAY", help="First day to learn from.")
@click.option(
    "--train-months",
    type=click.IntRange(1),
    default=120,
    show_default=True,
    help="Length of the training segment; scheme day only.",
)
@click.option(
    "--valid-months",
    type=click.IntRange(1),
    default=12,
    show_default=True,
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
@run_options
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
    from qlib_ext.rolling.command import roll_text

    try:
        text, code = roll_text(workflow, test, progress=not quiet, **options)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(text)
    sys.exit(code)


@click.command()
@click.argument("recorder")
@click.option(
    "--date", metavar="DAY", help="Trading day to score.  [default: the store's last]"
)
@click.option(
    "--store",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("data/market"),
    show_default=True,
    envvar="QLIB_EXT_STORE",
    help="Qlib store; QLIB_EXT_STORE sets it too.",
)
@click.option(
    "--uri",
    default="sqlite:///mlruns.db",
    show_default=True,
    help="MLflow store of the recorder.",
)
@click.option("--experiment", help="Experiment to look in.  [default: all]")
@click.option(
    "--max-missing",
    type=click.FloatRange(0, 1),
    default=0.02,
    show_default=True,
    help="Share of the stocks that may lack data; suspended ones do.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all scores to this CSV file.",
)
@click.option("--preset", help="First append new days: see qlib-ext ingest.")
@click.option(
    "--mapping",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="First append new days: see qlib-ext ingest.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Vendor files of the new days.",
)
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch."
)
def score(recorder: str, **options: Any) -> None:
    """Score one day with the trained model of RECORDER, an id or its beginning.

    Nothing is fitted again, and only the new day is computed: a model in stream mode
    goes on from the state that is kept with the recorder. RECORDER may be of qrun, a
    task of `qlib-ext roll`, or its joined score: then the seeds of the window that
    holds the day, or of the last one, are averaged. The score is kept with the
    recorder as score/DAY.parquet.

    A day is refused, with what is missing, if the store lacks it, or fields, feature
    rows, or the bars of too many stocks that had one the day before.

    \b
    Every day after the close:
      qlib-ext score 3f2a91 --store ~/qlib/cn --out today.csv \\
          --preset tushare --data ~/tushare/today
    Or, with a model on minute features:
      qlib-ext ingest ~/qlib/cn --preset tushare --data ~/tushare/today --update
      qlib-ext build ms --source ~/minute --out ~/qlib/cn
      qlib-ext score 3f2a91 --store ~/qlib/cn --out today.csv
    """
    from qlib_ext.rolling.command import score_text

    try:
        click.echo(score_text(recorder, **options))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


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
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("reports"),
    show_default=True,
    help="Directory for the HTML page.",
)
@run_options
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
    from qlib_ext.study import study_text

    try:
        text, code = study_text(file, out, progress=not quiet, **options)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(text)
    sys.exit(code)
