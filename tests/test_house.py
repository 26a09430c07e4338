"""Imports run one way: no higher floor, no circle, nothing above `data_handlers`."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room imports itself and what lies below its floor, no neighbour.
FLOORS = (
    ("data_handlers",),
    ("foreign", "masking"),
    ("kernels", "nn", "recorders", "workflow"),
    ("losses", "metrics", "dataset", "graphs"),
    ("models",),
    ("report",),
    ("record_temp", "portfolio", "ingest", "mining", "rolling"),
    ("aggregates", "market"),
    ("audit",),
    ("cli",),
)


def _modules():
    """Every module by its dotted name, parsed."""
    found = {}
    for package in ("data_handlers", "qlib_ext"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = file.read_text(encoding="utf-8")
            found[name] = ast.parse(text)
            found[name].handed_on = _handed_on(found[name]) if _KEY in text else set()
    return found


_KEY = "module_path"


def _handed_on(tree):
    """Modules that a module has Qlib import, by the dictionaries it writes."""
    return {
        getattr(value, "value", None)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if getattr(key, "value", "") == _KEY
    }


def _names(node, known):
    """Modules of this project that one import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & known
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, f"line {node.lineno}: write the whole name, not dots"
    full = {f"{node.module}.{alias.name}" for alias in node.names}
    return (full & known) or ({node.module} & known)


def _statements(body, *, typing):
    """Statements, those in functions too; with or without those for type checkers."""
    for node in body:
        inside = ("body", "orelse", "finalbody", "handlers", "cases")
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inside = inside if typing else ("orelse",)
        yield node
        for part in inside:
            yield from _statements(getattr(node, part, ()), typing=typing)


def _loads(tree, known):
    """Modules that a module imports, at once or in a function, or has Qlib import."""
    for node in _statements(tree.body, typing=False):
        yield from _names(node, known)
    yield from tree.handed_on & known


@pytest.fixture(scope="module")
def modules():
    return _modules()


def _room(module):
    first, _, rest = module.partition(".")
    return first if first == "data_handlers" or not rest else rest.split(".")[0]


def test_imports_go_down_only(modules):
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for name, tree in modules.items():
        if name == "qlib_ext":
            continue
        room = _room(name)
        assert room in floor, f"give the room of {name} a floor in FLOORS"
        for node in _statements(tree.body, typing=True):
            for other in _names(node, modules.keys()) - {"qlib_ext"}:
                if _room(other) != room and floor[_room(other)] >= floor[room]:
                    wrong.append(f"{name}:{node.lineno} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_alone_imports_nothing_of_it(modules):
    inside = [
        other
        for node in ast.walk(modules["qlib_ext"])
        for other in _names(node, modules.keys())
    ]
    assert inside == []


def test_no_circle_between_modules(modules):
    graph = {
        name: {
            x
            for x in _loads(tree, modules.keys())
            if not f"{name}.".startswith(f"{x}.")
        }
        for name, tree in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_records_are_named_as_workflows_name_them():
    from qlib_ext import record_temp

    for name in record_temp.__all__:
        record = getattr(record_temp, name)
        assert record.__module__.startswith("qlib_ext.report.")
