"""Options that several commands share, each declared once."""

from pathlib import Path
from typing import Any

import click

__all__ = [
    "DAY",
    "FILE",
    "FOLDER",
    "of_tasks",
    "pages",
    "processes",
    "quiet",
    "uri",
    "uris",
]


class _Day(click.ParamType):
    """A date; stays the text that was given."""

    name = "day"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Refuse what is no date, by the option's name."""
        from data_handlers.arguments import check_day

        try:
            check_day(self.name, value)
        except ValueError:
            self.fail(f"{value!r} is no date such as 2020-12-31.", param, ctx)
        return value


DAY = _Day()
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
uri = click.option(
    "--uri", default="sqlite:///mlruns.db", help="MLflow store that qrun wrote to."
)
uris = click.option(
    "--uri",
    multiple=True,
    default=("sqlite:///mlruns.db",),
    help="MLflow store that qrun wrote to; may be given again for a further one.",
)
pages = click.option(
    "--out", type=FOLDER, default=Path("reports"), help="Directory for the HTML page."
)
quiet = click.option("--quiet", is_flag=True, help="No progress bars.")

_PROCESSES = [
    click.option(
        "--workers",
        type=click.IntRange(1),
        default=1,
        help="Processes; 1 on the local back-end is this process.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["local", "ray", "dask"]),
        default="local",
        help="Where they run; a cluster must see the same paths.",
    ),
    click.option("--address", help="Address of a running cluster."),
]
_TASKS = [
    click.option("--uri", help="MLflow store.  [default: the workflow's]"),
    *_PROCESSES,
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Torch threads of a task.  [default: cores / workers]",
    ),
    click.option(
        "--retries",
        type=click.IntRange(0),
        default=1,
        help="Further attempts of a task that fails.",
    ),
    click.option(
        "--work",
        type=FOLDER,
        default=Path(".rolling"),
        help="Folder for checkpoints; a cluster must see it.",
    ),
    quiet,
]


def processes(command: Any) -> Any:
    """Add the options of what runs in several processes."""
    return _all(_PROCESSES, command)


def of_tasks(command: Any) -> Any:
    """Add the options of everything that runs tasks."""
    return _all(_TASKS, command)


def _all(options: list[Any], command: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command
