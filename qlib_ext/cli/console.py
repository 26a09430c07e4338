"""Keep what is not the user's business off the terminal; errors and warnings stay."""

import contextlib
import logging
import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import click

__all__ = ["outside_git", "quiet_others", "watched"]

# What Qlib warns of in every run: a first run makes its experiment, a suspended stock
# has no price, a back-test on days has no other levels, a model of Qlib's takes no
# reweighter. MLflow logs an error of its
# database, with its traceback, and raises it: it is told in a line.
_USUAL = {
    "qlib.workflow": "No valid experiment found",
    "qlib.online operator": "field data contains nan",
    "qlib.BaseExecutor": "`common_infra` is not set",
    "mlflow.utils.validation": "is truncated to",
    "mlflow.store.db.utils": "SQLAlchemy database error",
    "qlib.utils": "The parameter `reweighter` with value `None` is ignored",
}


def quiet_others() -> None:
    """Silence, before they load, libraries that print on import or for every file."""
    # Inherited by workers. MLflow draws a bar for every small file it copies.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name, text in _USUAL.items():
        logging.getLogger(name).addFilter(
            lambda record, text=text: text not in record.getMessage()  # type: ignore[misc]
        )
    logging.getLogger().addFilter(_of_file_store)
    # NumPy, of days or stocks without a value: they are NaN, as documented.
    for text in ("Mean of empty slice", "All-NaN slice", "Degrees of freedom <= 0"):
        warnings.filterwarnings("ignore", text, RuntimeWarning)
    for module in ("gym", "qlib", "mlflow", "setuptools_scm"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    try:  # Qlib loads gym, which prints that it is old
        from gym_notices import notices
    except ImportError:
        return
    notices.notices.clear()


def _of_file_store(record: logging.LogRecord) -> bool:
    """Keep MLflow's warning of a folder that is no experiment, without its traceback.

    A database beside a file store keeps its runs' files in the same folder: those of
    its experiments are no damage and not told.
    """
    text = record.getMessage()
    if not text.startswith("Malformed experiment"):
        return True
    record.exc_info = record.exc_text = None
    missing = re.search(r"file '(.+)/meta\.yaml' does not exist", text)
    return missing is None or any(Path(missing[1]).glob("*/meta.yaml"))


@contextlib.contextmanager
def outside_git(folder: str) -> Iterator[None]:
    """Have Qlib not ask git for a diff where there is no repository.

    Each recorder's three calls of git would print a screen of usage there.
    """
    from qlib.workflow.recorder import MLflowRecorder

    ask = ["git", "-C", folder, "rev-parse", "--git-dir"]
    try:
        inside = subprocess.run(ask, capture_output=True).returncode == 0
    except OSError:  # no git at all
        inside = False
    if inside:
        yield
        return
    kept = MLflowRecorder._log_uncommitted_code
    MLflowRecorder._log_uncommitted_code = lambda self: None
    try:
        yield
    finally:
        MLflowRecorder._log_uncommitted_code = kept


@contextlib.contextmanager
def watched(store: object) -> Iterator[None]:
    """Say in a line that a store was written while the block read it.

    Stores are swapped whole, but a reader opens their files one by one.
    """
    # Qlib also takes a mapping by frequency
    root = Path(store).expanduser() if isinstance(store, (str, Path)) else None
    before = _written(root)
    try:
        yield
    finally:
        if _written(root) != before:
            click.echo(
                f"warning: {root} was written while this ran. An update leaves former "
                "days as they are, and only labels that reach beyond them may be known "
                "for some stocks alone; after --overwrite or `build`, run again.",
                err=True,
            )


def _written(root: Path | None) -> list[tuple[int, int]]:
    names = ("meta.json", "calendars/day.txt")
    files = [root / name for name in names if root and (root / name).is_file()]
    return [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
