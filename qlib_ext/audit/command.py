"""What the command `audit` does."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import yaml
from qlib.log import get_module_logger

from data_handlers.files import write_text
from qlib_ext.audit.run import audit, to_json
from qlib_ext.audit.subject import Settings
from qlib_ext.workflow import load_workflow

__all__ = ["audit_workflow"]


def audit_workflow(
    path: Path,
    *,
    checks: str | None = None,
    quick: bool = False,
    epochs: int = 1,
    stocks: int | None = None,
    data: str = "auto",
    overrides: tuple[str, ...] = (),
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
    get_module_logger.setLevel(logging.ERROR)  # what Qlib says of templates
    settings = Settings(
        data=data, epochs=epochs, overrides=dict(_override(o) for o in overrides)
    )
    if quick:
        settings = dataclasses.replace(settings, stocks=30, years=2, refit=False)
    if stocks is not None:
        settings = dataclasses.replace(settings, stocks=stocks)
    names = None if checks is None else checks.split(",")
    result = audit(
        load_workflow(path), name=path.stem, checks=names, settings=settings, say=say
    )
    target = out / f"audit-{path.stem}.html"
    write_text(target, result.page().render("Research, not advice."))
    if json_file is not None:
        write_text(json_file, to_json(result))
    return f"{result.text()}\n\nReport: {target.resolve()}", result.exit_code


def _override(text: str) -> tuple[str, object]:
    name, equal, value = text.partition("=")
    if not equal or not name.strip():
        raise ValueError(f"`--set` must be NAME=VALUE, got {text!r}.")
    return name.strip(), yaml.safe_load(value)
