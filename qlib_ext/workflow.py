"""Read a workflow YAML exactly as `qrun` does, but as a file that one need not trust.

`qrun` renders the file with plain Jinja, which can run any Python, and reads it with
ruamel's safe loader (YAML 1.2: ``2e-4`` is a number). Here Jinja is sandboxed and both
steps are bounded; what the bundled files and ordinary ones say is the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from qlib.utils.data import update_config
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from data_handlers.vendor.mapping import nodes_of, settings_text

__all__ = ["load_workflow", "parse_yaml", "read_yaml"]

_MAX_CHARACTERS = 300_000
_MAX_NODES = 100_000
_MAX_STEPS = 100_000  # of all loops: passes times what stands inside


# Statements of a template, and filters whose result is not longer than what they take.
# Macros, calls other than range(), and further filters can grow texts, or run on
# without an end.
_STATEMENTS = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Assign, nodes.If),
    *(nodes.For, nodes.Keyword, nodes.Operand, nodes.Pair, nodes.Expr),
)
_FILTERS = frozenset(
    "default d int float string lower upper title trim abs round length first last"
    " tojson".split()
)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without Python's insides and without texts that grow."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(finalize=self.bounded)
        self.steps = 0
        for name in _FILTERS:
            self.filters[name] = self._bounded_filter(self.filters[name])
        self.filters["passes"] = self._passes

    def _bounded_filter(self, kept: Any) -> Any:
        @functools.wraps(kept)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            return self.bounded(kept(*args, **kwargs))

        return bounded

    def _passes(self, items: Any, inside: int) -> list:
        items = list(items)
        self.steps += len(items) * inside
        if self.steps > _MAX_STEPS:
            raise TemplateError(f"its loops take more than {_MAX_STEPS:,} steps")
        return items

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        grows = operator == "**" and numbers and abs(right) > 64
        if grows or (operator != "+" and not numbers):
            raise TemplateError(f"{operator} of that is not allowed in a workflow")
        result = super().call_binop(context, operator, left, right)
        return self.bounded(result)

    def bounded(self, value: Any) -> Any:
        """Return the value, if it is short once written out."""
        if _count(value, {}) > _MAX_CHARACTERS or (
            isinstance(value, int) and value.bit_length() > 10_000
        ):
            raise TemplateError(f"it grows beyond {_MAX_CHARACTERS:,} characters")
        return value

    def check(self, tree: nodes.Template) -> None:
        """Refuse what a file of settings does not need."""
        for node in tree.find_all(nodes.Node):
            name = type(node).__name__
            if not isinstance(node, _STATEMENTS):
                raise TemplateError(f"{name} is not allowed in a workflow")
            if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
                raise TemplateError(f"the filter {node.name} is not allowed there")
            if isinstance(node, nodes.Call) and not (
                isinstance(node.node, nodes.Name) and node.node.name == "range"
            ):
                raise TemplateError("only range() may be called in a workflow")
            if isinstance(node, nodes.For) and next(node.find_all(nodes.For), None):
                raise TemplateError("a loop inside a loop is not allowed there")
            if isinstance(node, nodes.Assign) and any(
                next(made.find_all(nodes.Name), None)
                for made in (node.node, *node.node.find_all(nodes.Literal))
                if isinstance(made, (nodes.List, nodes.Tuple, nodes.Dict))
            ):
                # Said over and over, it would hold itself 2, 4, 8 ... times.
                raise TemplateError("a list of variables is not allowed in `set`")
            if isinstance(node, nodes.Concat):
                # `+` is bounded on its way
                raise TemplateError("write + in place of ~ in a workflow")
        for node in tree.find_all(nodes.For):
            inside = nodes.Const(sum(1 for _ in node.find_all(nodes.Node)))
            node.iter = nodes.Filter(node.iter, "passes", [inside], [], None, None)
        tree.set_environment(self).set_lineno(1)


def load_workflow(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Render, read and merge a workflow file.

    Environment variables fill the file's own Jinja placeholders; the file named by
    `BASE_CONFIG_PATH` is looked up from the working directory, then beside the file,
    and is not rendered: all as in `qrun`.

    Parameters
    ----------
    path : str or path

    Raises
    ------
    ValueError
        If the file or its base is missing, no mapping, too large, asks Jinja for more
        than values, or the base has a base itself.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`path`: there is no workflow file {path}.")
    config = _mapping(_render(settings_text(path, str(path)), path), path)
    if not (base := config.pop("BASE_CONFIG_PATH", None)):
        return config
    if not isinstance(base, str):
        raise ValueError(f"`BASE_CONFIG_PATH` of {path} must be a path, got {base!r}.")
    places = [Path(base), path.absolute().parent / base]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise ValueError(
            f"`BASE_CONFIG_PATH` of {path} is {base}, found neither from "
            f"{Path.cwd()} nor beside the file."
        )
    base_config = _mapping(settings_text(found, str(found)), found)
    if "BASE_CONFIG_PATH" in base_config:
        raise ValueError(
            f"`BASE_CONFIG_PATH`: {found} has a base itself, which qrun ignores: a "
            "workflow is one level deep; name the last base, and repeat here what "
            f"{found.name} changes."
        )
    return update_config(base_config, config)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds a mapping; no Jinja. ValueError names what is wrong."""
    return _mapping(settings_text(Path(path), str(path)), Path(path))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML 1.2 safely; `name` says in errors where the text came from.

    Raises
    ------
    ValueError
        If it is no valid YAML, or aliases make it larger than any workflow.
    """
    try:
        constructor, parser = YAML(typ="safe", pure=True).get_constructor_parser(text)
        try:
            node = constructor.composer.get_single_node()
            if node is None:
                return None
            # Counted as nodes: merge keys are written out where values are made.
            if nodes_of(node) > _MAX_NODES:
                raise ValueError(
                    f"it holds more than {_MAX_NODES:,} values once its aliases are "
                    "written out, or one that holds itself; write them out."
                )
            return constructor.construct_document(node)
        finally:
            parser.dispose()
    except (YAMLError, ValueError) as error:  # a date, or a number of any length
        raise ValueError(f"{name} is no valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply.") from error


def _render(text: str, path: Path) -> str:
    environment = _Sandbox()
    size, parts = 0, []
    try:
        tree = environment.parse(text)
        environment.check(tree)
        names = meta.find_undeclared_variables(tree)
        known = {name: os.environ[name] for name in names if name in os.environ}
        for part in environment.from_string(tree).generate(known):
            size += len(part)
            if size > _MAX_CHARACTERS:
                raise TemplateError(f"it grows beyond {_MAX_CHARACTERS:,} characters")
            parts.append(part)
    except (TemplateError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}: its Jinja cannot be rendered ({error}); placeholders may name "
            "environment variables and filters such as default."
        ) from error
    return "".join(parts)


#: Parsing takes a tenth of a second a file, and all of a folder share few bases.
_parsed = functools.lru_cache(maxsize=16)(parse_yaml)


def _mapping(text: str, path: Path) -> dict[str, Any]:
    config = deepcopy(_parsed(text, str(path)))
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(config).__name__}.")
    return config


def _count(value: Any, known: dict[int, float]) -> float:
    """Characters of a value that is written out, about."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return 1
    if id(value) not in known:
        inside = [*value, *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 2 + sum(_count(v, known) for v in inside)
    return known[id(value)]
