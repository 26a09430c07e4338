"""Read a workflow YAML exactly as `qrun` does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from qlib.cli.run import render_template
from qlib.utils.data import update_config

__all__ = ["load_workflow"]


def load_workflow(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Render, read and merge a workflow file.

    Environment variables fill the file's own Jinja placeholders; the file named by
    `BASE_CONFIG_PATH` is looked up from the working directory, then beside the file,
    and is not rendered: all as in `qrun`.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If the file or its base is missing, no mapping, or the base has a base itself.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`path`: there is no workflow file {path}.")
    config = _mapping(render_template(str(path)), path)
    if not (base := config.pop("BASE_CONFIG_PATH", None)):
        return config
    places = [Path(base), path.absolute().parent / base]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise ValueError(
            f"`BASE_CONFIG_PATH` of {path} is {base}, found neither from "
            f"{Path.cwd()} nor beside the file."
        )
    base_config = _mapping(found.read_text(encoding="utf-8"), found)
    if "BASE_CONFIG_PATH" in base_config:
        raise ValueError(
            f"`BASE_CONFIG_PATH`: {found} has a base itself, which qrun ignores."
        )
    return update_config(base_config, config)


def _mapping(text: str, path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(config).__name__}.")
    return config
