"""Who may import whom: the arrows between packages and sub-packages, as data, and no circle."""

from __future__ import annotations

import ast
import graphlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime_py", "exporters", "toolchain")

# A room (a sub-package, or a module beside them) and the rooms that it may import. What is not
# listed is an error: a new room is drawn here first.
ARROWS: dict[str, set[str]] = {
    "runtime_py.loop": set(),
    "runtime_py.bundle": {"runtime_py.loop"},
    "runtime_py.engine": {"runtime_py.bundle", "runtime_py.loop"},
    "runtime_py": {"runtime_py.bundle", "runtime_py.engine", "runtime_py.loop"},
    "exporters": set(),
    "exporters.errors": set(),
    "exporters.signature": set(),
    "exporters.model": {"exporters.errors"},
    "exporters.training": {"exporters.model", "exporters.signature", "exporters.errors"},
    "exporters.executorch": {
        "exporters.training", "exporters.model", "exporters.signature", "exporters.errors",
    },
    "exporters.coreml": {
        "exporters.training", "exporters.model", "exporters.signature", "exporters.errors",
    },
    "toolchain": set(),
    "toolchain.report": {"runtime_py"},
    "toolchain.defaults": {"runtime_py"},
    "toolchain.compile": {"toolchain.defaults", "toolchain.report", "exporters", "runtime_py"},
    "toolchain.training_data": {"runtime_py"},
    "toolchain.adapter_training": {
        "toolchain.training_data", "toolchain.defaults", "toolchain.report", "runtime_py",
    },
    "toolchain.verify": {
        "toolchain.compile", "toolchain.defaults", "toolchain.report", "exporters", "runtime_py",
    },
    "toolchain.simulate": {"toolchain.compile", "toolchain.report", "exporters", "runtime_py"},
    "toolchain.streams": {"toolchain.compile", "runtime_py"},
    "toolchain.study": {
        "toolchain.streams", "toolchain.verify", "toolchain.simulate", "toolchain.adapter_training",
        "toolchain.compile", "toolchain.defaults", "toolchain.report", "exporters", "runtime_py",
    },
    "toolchain.fleet": {
        "toolchain.study", "toolchain.streams", "toolchain.simulate", "toolchain.report",
        "runtime_py",
    },
    "toolchain.tune": {
        "toolchain.study", "toolchain.streams", "toolchain.simulate", "toolchain.report",
        "runtime_py",
    },
    "toolchain.bench": {
        "toolchain.verify", "toolchain.compile", "toolchain.report", "exporters", "runtime_py",
    },
    "toolchain.cli": {
        "toolchain.bench", "toolchain.fleet", "toolchain.tune", "toolchain.study",
        "toolchain.simulate",
        "toolchain.streams", "toolchain.verify", "toolchain.adapter_training",
        "toolchain.defaults", "toolchain.compile", "toolchain.report", "exporters", "runtime_py",
    },
    "toolchain.__main__": {"toolchain.cli"},
}  # fmt: skip
# What the decision logic may import besides itself: Kotlin has to have it all.
LOOP_LIBRARIES = {"numpy"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, int]]:
    """What a module imports anywhere in it, by absolute name, and the line. Of a name that is
    imported from a package, the module where there is one."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else str(node.module)), node.lineno


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def allowed(importer: str, imported: str) -> bool:
    rooms = ARROWS[room(importer)]
    return (
        room(imported) in rooms
        or room(importer) == room(imported)
        or (imported.split(".")[0] in rooms and imported.split(".")[0] != importer.split(".")[0])
    )


def test_every_room_is_drawn() -> None:
    assert {room(name) for name in MODULES} == set(ARROWS)


def test_every_package_is_installed() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(setup["tool"]["setuptools"]["packages"]) - {"optimum.commands.register"}
    assert listed == {name for name, file in MODULES.items() if file.name == "__init__.py"}


def test_no_import_is_against_the_arrows() -> None:
    against = [
        f"{name}:{line} imports {imported}"
        for name in MODULES
        for imported, line in imports(name)
        if imported in MODULES and not allowed(name, imported)
    ]
    assert not against, "\n".join(against)


def test_no_circle_of_modules() -> None:
    graph = {
        name: {found for found, _ in imports(name) if found in MODULES and found != name}
        for name in MODULES
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_no_circle_of_rooms() -> None:
    """The arrows themselves, whole packages written out, have none."""
    graph = {
        name: {other for arrow in arrows for other in ARROWS if other == arrow}
        for name, arrows in ARROWS.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("runtime_py.loop")])
def test_the_loop_needs_numpy_and_the_standard_library(name: str) -> None:
    known = set(sys.stdlib_module_names) | LOOP_LIBRARIES
    foreign = [
        f"line {line}: {found}"
        for found, line in imports(name)
        if found.split(".")[0] not in known and not found.startswith("runtime_py.loop")
    ]
    assert not foreign, foreign


def test_the_rule_sees_a_wrong_import() -> None:
    assert not allowed("runtime_py.loop.buffer", "runtime_py.bundle.manifest")
    assert not allowed("exporters.model.spec", "runtime_py.loop.words")
    assert not allowed("toolchain.report.console", "toolchain.cli.app")
    assert not allowed("toolchain.compile.precision", "toolchain.verify.source")
    assert allowed("toolchain.cli.app", "exporters.errors")
