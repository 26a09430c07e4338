"""Imports run one way: no higher floor, no circle, nothing above `data_handlers`."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room imports itself and what lies below its floor, no neighbour.
FLOORS = (
    ("data_handlers",),
    ("masking",),
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
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def _names(node, known):
    """Modules of this project that one import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & known
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, f"line {node.lineno}: write the whole name, not dots"
    full = {f"{node.module}.{alias.name}" for alias in node.names}
    return (full & known) or ({node.module} & known)


def _run(body):
    """Nodes that run at some time, in functions too; not those for type checkers."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _run(node.orelse)
            continue
        yield node
        yield from _run(ast.iter_child_nodes(node))


def _loads(tree, known):
    """Modules that a module imports, at once or in a function, or has Qlib import."""
    for node in _run(tree.body):
        yield from _names(node, known)
        for key, value in zip(
            getattr(node, "keys", ()), getattr(node, "values", ()), strict=False
        ):
            if getattr(key, "value", "") == "module_path":
                yield from {getattr(value, "value", None)} & known


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
        for node in ast.walk(tree):
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
