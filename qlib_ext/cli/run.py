"""`qlib-ext run`."""

import contextlib
import io
import logging
import os
from pathlib import Path

import click

from qlib_ext.cli import options
from qlib_ext.cli.console import outside_git, watched

__all__ = ["run"]


@click.command()
@click.argument("workflow", type=options.FILE)
@click.option("--verbose", is_flag=True, help="Show all that Qlib and MLflow print.")
def run(workflow: Path, verbose: bool) -> None:
    """Run WORKFLOW as qrun does: train, score, record.

    Prints one line at the start and the next command at the end; warnings and errors
    stay. The file is read with Jinja sandboxed, so it can't run commands by being read;
    the classes that it names are run, as by qrun.

    \b
    Examples:
      qlib-ext run workflows/rnn_day_multi.yaml
      QLIB_EXT_STORE=~/qlib/cn qlib-ext run workflows/mamba_10.yaml
    """
    if not verbose:
        # Bars that others draw; ours are switched by their own option.
        os.environ.setdefault("TQDM_DISABLE", "1")

    from qlib_ext.workflow import load_workflow

    config = load_workflow(workflow)
    name = str(config.get("experiment_name", "workflow"))
    click.echo(f"{name}: data, training and records ...", err=True)

    import qlib
    import qlib.workflow.record_temp  # it sets its logger to INFO on import
    from qlib.cli.run import sys_config
    from qlib.config import C
    from qlib.log import get_module_logger
    from qlib.model.trainer import task_train

    from qlib_ext.masking import masked
    from qlib_ext.recorders import (
        check_task,
        close_dead,
        failed_if_interrupted,
        pages_of,
        prepare_store,
        tagged_runs,
    )

    for key in ("qlib_init", "task"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{workflow}: `{key}` is missing.")
    sys_config(config, str(workflow))
    options = dict(config["qlib_init"])
    if not verbose:
        options.setdefault("logging_level", logging.WARNING)
    if "exp_manager" not in options:
        options["exp_manager"] = manager = dict(C["exp_manager"])
        manager["kwargs"] = {
            **manager["kwargs"],
            "uri": f"file:{Path.cwd() / 'mlruns'}",
        }
    printed = io.StringIO()
    quiet = contextlib.nullcontext() if verbose else contextlib.redirect_stdout(printed)
    with quiet, outside_git(os.getcwd()), tagged_runs():
        uri = options["exp_manager"].get("kwargs", {}).get("uri", "")
        prepare_store(uri, name)
        close_dead(uri)
        qlib.init(**options)
        # Qlib gives the level to loggers made from now on only.
        get_module_logger.setLevel(C.logging_level)
        check_task(config["task"])
        with failed_if_interrupted(), watched(options.get("provider_uri")):
            recorder = task_train(config["task"], experiment_name=name)
        recorder.save_objects(config=masked(config))
    click.echo(f"{name}: done, recorder {recorder.id}")
    if pages_of(recorder):
        click.echo(f"  qlib-ext report --experiment {name}")
