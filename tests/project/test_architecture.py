"""The floors of the house: a module imports from its own folder or from floors below, no circle.

A type named only under `if TYPE_CHECKING` is no import. One list holds the floors, from the top.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dis_ssm

ROOT = Path(dis_ssm.__file__).parent
FLOORS = (
    ("__main__",),
    ("cli",),
    ("interop",),
    ("training",),
    ("metrics",),
    ("sampling",),
    ("encoders", "costs"),
    ("build",),
    ("models", "data"),
    ("storage",),
    ("ops", "diffusion", "config"),
    ("condition",),
    ("system",),
    ("version",),
)
FLOOR_OF = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}
MOST_LINES = 600


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `dis_ssm`; "" is the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.partition(".")[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of this package in a file, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, below = name.partition(".")
            if package == "dis_ssm":
                yield node.lineno, below if below in MODULES else below.rpartition(".")[0]


ARROWS = {
    name: {module for _, module in imports(path) if module not in ("", name)}
    for name, path in MODULES.items()
}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} - {""} == set(FLOOR_OF)


def test_no_arrow_runs_up():
    up = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for name, path in MODULES.items()
        for line, module in imports(path)
        if name and module and room(module) != room(name)
        if FLOOR_OF[room(module)] >= FLOOR_OF[room(name)]
    ]
    assert not up, "\n".join(up)


@pytest.mark.parametrize("rooms", [False, True], ids=["modules", "rooms"])
def test_no_circle(rooms):
    arrows = ARROWS
    if rooms:
        arrows = {room(name): set() for name in ARROWS if name}
        for name, targets in ARROWS.items():
            if name:
                arrows[room(name)] |= {room(t) for t in targets} - {room(name)}
    assert not circle(arrows)


def test_a_circle_and_an_upward_arrow_are_seen(tmp_path):
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from dis_ssm.cli.train import train_command\n")
    assert list(imports(file)) == [(2, "cli.train")]


def test_the_configuration_needs_no_torch():
    reached, waiting = set(), ["config"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        waiting += ARROWS[name]
    for name in reached:
        text = MODULES[name].read_text(encoding="utf-8")
        imported = {
            alias.name.partition(".")[0]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            (node.module or "").partition(".")[0]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom)
        }
        assert "torch" not in imported, name


def test_no_file_is_longer_than_a_reader_bears():
    project = ROOT.parents[1]
    files = [
        path
        for folder in ("dis", "experiments", "tests")
        for path in (project / folder).rglob("*.py")
        if path.is_file()
    ]
    long = {
        path.relative_to(project).as_posix(): lines
        for path in files
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long
