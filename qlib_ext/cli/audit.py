"""`qlib-ext audit`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from qlib_ext.cli import options

__all__ = ["audit"]


@click.command()
@click.argument("workflow", type=options.FILE)
@click.option("--checks", metavar="A,B", help="Only these checks.  [default: all]")
@click.option("--quick", is_flag=True, help="Smaller, and without a second training.")
@click.option("--epochs", type=click.IntRange(1), default=1, help="Of training.")
@click.option("--stocks", type=click.IntRange(20), help="Sampled or simulated.")
@click.option(
    "--data",
    type=click.Choice(["auto", "own", "embedded"]),
    default="auto",
    help="The workflow's store, a simulated one, or the first if it exists.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Model argument to set, such as hidden_size=16; repeatable.",
)
@click.option(
    "--roll",
    metavar="FIRST:LAST",
    help="Audit the last window of `qlib-ext roll --test`, not the file's fit.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also JSON.")
@options.pages
def audit(workflow: Path, **options: Any) -> None:
    """Look for leaks of the future in a workflow's data and model.

    Builds the data and trains the model on copies of the store that agree up to one
    day, and compares what there is before it; the same at period starts and ends and
    on a day of suspensions. Files outside the store are cut like it. Then it looks at
    fit windows, purge, missing rows, graphs, batches and execution, and trains on
    exchanged labels and on a market without signal. Works on any Qlib workflow on day
    bars; `--data own` samples its store. Checks: windows, purge, membership, history,
    sources, foresight, truncation, perturbation, rows, graphs, execution, batches,
    shuffle, no_signal.

    Exit code: 0 every check passed, 1 a leak was found, 2 a check could not run.

    \b
    Examples:
      qlib-ext audit workflows/rnn_day_single.yaml
      qlib-ext audit mine.yaml --quick --checks truncation,purge --json audit.json
      qlib-ext audit mine.yaml --data own --stocks 100 --set hidden_size=16
    """
    try:
        text, code = audit_workflow(
            workflow, say=lambda line: click.echo(line, err=True), **options
        )
    except ValueError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(text)
    sys.exit(code)


def audit_workflow(
    path: Path,
    *,
    checks: str | None = None,
    quick: bool = False,
    epochs: int = 1,
    stocks: int | None = None,
    data: Literal["auto", "own", "embedded"] = "auto",
    overrides: tuple[str, ...] = (),
    roll: str | None = None,
    json_file: Path | None = None,
    out: Path = Path("reports"),
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, int]:
    """Audit a workflow file; write the page and, if asked, JSON.

    Parameters
    ----------
    path : Path
    checks : str, optional
        Names of `CHECKS`, comma separated.
    quick : bool
        Fewer stocks, a shorter market, no second training.
    epochs, stocks, data, overrides
        See `Settings`; overrides are texts NAME=VALUE, the value as in YAML.
    roll : str, optional
        Years or dates to score: the task of the last window of `qlib-ext roll` takes
        the place of the file's. All windows are moved by one rule.
    json_file : Path, optional
    out : Path
        Directory of the page.
    say : callable

    Returns
    -------
    text : str
        For the terminal.
    code : int
        0 pass, 1 leak, 2 could not run.

    Raises
    ------
    ValueError
        If the file, a check or an override is wrong.
    """
    import dataclasses
    import logging

    from qlib.log import get_module_logger

    from data_handlers.files import write_text
    from qlib_ext.audit.run import audit, to_json
    from qlib_ext.audit.subject import Settings
    from qlib_ext.workflow import load_workflow

    get_module_logger.setLevel(logging.ERROR)  # what Qlib says of templates
    settings = Settings(
        data=data, epochs=epochs, overrides=dict(_override(o) for o in overrides)
    )
    if quick:
        settings = dataclasses.replace(
            settings, stocks=30, years=2, refit=False, days=3
        )
    if stocks is not None:
        settings = dataclasses.replace(settings, stocks=stocks)
    names = None if checks is None else checks.split(",")
    config = load_workflow(path)
    if roll is None:
        note = (
            "the file's one fit is audited: nothing is vouched for what retrains it "
            "(`qlib-ext roll`: see --roll; Qlib's own rolling)"
        )
    else:
        from qlib_ext.rolling.retrain import plan
        from qlib_ext.rolling.windows import move_task

        window = plan(config, roll, seeds=1, numbers=False).windows[-1]
        config = {**config, "task": move_task(config["task"], window)}
        note = f"window {window.name} of `qlib-ext roll --test {roll}`"
    result = audit(config, name=path.stem, checks=names, settings=settings, say=say)
    result.notes.append(note)
    target = out / f"audit-{path.stem}.html"
    write_text(target, result.page().render("Research, not advice."))
    if json_file is not None:
        write_text(json_file, to_json(result))
    return f"{result.text()}\n\nReport: {target.resolve()}", result.exit_code


def _override(text: str) -> tuple[str, object]:
    from qlib_ext.workflow import parse_yaml

    name, equal, value = text.partition("=")
    if not equal or not name.strip():
        raise ValueError(f"`--set` must be NAME=VALUE, got {text!r}.")
    return name.strip(), parse_yaml(value, "`--set`")
