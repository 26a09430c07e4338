"""Command line: `qlib-ext COMMAND --help` teaches each step, from files to a report.

A file a command; nothing imports this package.
"""

import errno
import re
import sys
import traceback
from typing import Any

import click

from qlib_ext import __version__
from qlib_ext.cli.audit import audit
from qlib_ext.cli.build import build
from qlib_ext.cli.compare import compare
from qlib_ext.cli.console import quiet_others
from qlib_ext.cli.ingest import ingest
from qlib_ext.cli.init import init
from qlib_ext.cli.market import market
from qlib_ext.cli.mine import mine
from qlib_ext.cli.report import report
from qlib_ext.cli.riskmodel import riskmodel
from qlib_ext.cli.roll import roll
from qlib_ext.cli.run import run
from qlib_ext.cli.score import score
from qlib_ext.cli.study import study
from qlib_ext.cli.track import track
from qlib_ext.masking import mask_logs, redact

__all__ = ["main"]


class _Commands(click.Group):
    """Commands whose ValueErrors are one line, without passwords."""

    def invoke(self, ctx: click.Context) -> Any:
        quiet_others()
        mask_logs()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            raise  # who reads our output has gone (`| head`): click ends quietly
        except ValueError as error:
            raise click.ClickException(redact(str(error))) from error
        except Exception as error:
            if told := (
                _of_the_disk(error) or _of_the_server(error) or _of_qlib(error)
            ):
                raise click.ClickException(redact(told)) from error
            click.echo(redact(traceback.format_exc()), err=True, nl=False)
            sys.exit(1)


def _of_the_disk(error: BaseException | None) -> str:
    """Say that a disk is full or a folder may not be written, where that is the cause.

    MLflow wraps what its database says. Likewise where memory is at its limit.
    """
    remedy = "; see to the disk or the folder and run again"
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            file = error.filename2 or error.filename  # of a copy, what is written
            where = f"{file}: " if file else ""
            limit = " (ulimit -f)" if error.errno == errno.EFBIG else ""
            return f"{where}{error.strerror}{limit}{remedy}"
        if isinstance(error, MemoryError) or re.search(_NO_MEMORY, str(error)):
            told = " ".join(str(error).split())[:200]
            return f"there is no memory left{f' ({told})' if told else ''}: {_MEMORY}"
        for words, told in _SQLITE.items():
            if words in str(error):
                return f"the database of runs {told}"
        error = error.__cause__ or error.__context__
    return ""


def _of_the_server(error: BaseException) -> str:
    """Say in a line what MLflow's server, or its database, answers."""
    if type(error).__module__.split(".")[0] not in _SERVER:
        return ""
    told = " ".join(str(error).split())[:300]
    return f"MLflow's store of runs: {told}; is it running, and `--uri` right?"


def _of_qlib(error: BaseException) -> str:
    """Say in a line why one of Qlib's own models ends, where the cause is known."""
    if isinstance(error, ModuleNotFoundError) and error.name == "ipdb":
        return (
            "Qlib's ICLoss, which judges DNNModelPytorch on its validation days, finds "
            "none with 50 stocks or more whose scores and labels differ; take a larger "
            "market or another model"
        )
    place = error.__traceback__
    while place is not None:
        module = str(place.tb_frame.f_globals.get("__name__"))
        if module.startswith("qlib.contrib.model.") and isinstance(error, RuntimeError):
            if re.search("shape|input_size|input_dim", str(error)):
                return (
                    f"{module}: {error}; set its number of features (d_feat, or "
                    "input_dim of pt_model_kwargs) to the columns of its dataset"
                )
        place = place.tb_next
    return ""


# What SQLite says, in MLflow's words or alone.
_FULL = (
    "cannot be written: the disk is full, or the file longer than the limit on file "
    "sizes (ulimit -f); see to that and run again"
)
_RIGHTS = (
    "cannot be opened for writing: change the rights of its file and folder, or name "
    "another (`--uri`)"
)
_SQLITE = {
    "disk is full": _FULL,
    "disk I/O error": _FULL,
    "readonly database": _RIGHTS,
    "unable to open database file": _RIGHTS,
    "database is locked": "is held by another process; run again when that has ended",
    "disk image is malformed": "is damaged: move its file away, or put a copy back",
    "file is not a database": "is no SQLite file: see to `--uri`, or move it away",
}
_SERVER = {"mlflow", "sqlalchemy", "requests", "urllib3"}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
_NO_MEMORY = "allocate memory|failed to map segment"  # of a library, in an import
_MEMORY = (
    "raise the limit (ulimit -v), run fewer processes (--workers), or take fewer days, "
    "stocks or features"
)
_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=_Commands, context_settings=_SETTINGS)
@click.version_option(__version__)
def main() -> None:
    """Deep-learning stock-selection factors for Qlib."""


for _command in (
    init, market, ingest, build, run, report, compare, roll, score, study, audit, mine,
    riskmodel, track,
):  # fmt: skip
    main.add_command(_command)
