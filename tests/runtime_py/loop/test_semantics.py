"""docs/semantics.md states every module of the loop, each after those that it needs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
LOOP = ROOT / "runtime_py" / "loop"
MODULES = {path.stem: path for path in LOOP.glob("*.py") if path.stem != "__init__"}
SECTIONS = re.findall(
    r"^## .+ \(`(\w+)\.py`\)$", (ROOT / "docs/semantics.md").read_text(encoding="utf-8"), re.M
)


def needed(module: str) -> set[str]:
    """The modules of the loop that it imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("runtime_py.loop"):
            inner = str(node.module).removeprefix("runtime_py.loop").lstrip(".")
            names |= {inner} if inner else {alias.name for alias in node.names}
    return names


def test_every_module_has_its_section() -> None:
    assert sorted(SECTIONS) == sorted(MODULES)


def test_each_needs_only_those_above_it() -> None:
    late = [
        f"{module} needs {other}"
        for place, module in enumerate(SECTIONS)
        for other in sorted(needed(module) - set(SECTIONS[:place]))
    ]
    assert not late, ", ".join(late)
