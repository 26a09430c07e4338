"""Command line: `qlib-ext COMMAND --help` teaches each step, from files to a report.

A file a command; nothing imports this package.
"""

import os
from typing import Any

import click

from qlib_ext import __version__
from qlib_ext.cli.audit import audit
from qlib_ext.cli.build import build
from qlib_ext.cli.compare import compare
from qlib_ext.cli.ingest import ingest
from qlib_ext.cli.market import market
from qlib_ext.cli.mine import mine
from qlib_ext.cli.report import report
from qlib_ext.cli.riskmodel import riskmodel
from qlib_ext.cli.roll import roll
from qlib_ext.cli.score import score
from qlib_ext.cli.study import study

__all__ = ["main"]


class _Commands(click.Group):
    """Commands whose ValueErrors are one line, without passwords."""

    def invoke(self, ctx: click.Context) -> Any:
        # MLflow draws a progress bar for every small file it copies.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        try:
            return super().invoke(ctx)
        except ValueError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Deep-learning stock-selection factors for Qlib."""


for _command in (
    market, ingest, build, report, compare, roll, score, study, audit, mine, riskmodel
):  # fmt: skip
    main.add_command(_command)
