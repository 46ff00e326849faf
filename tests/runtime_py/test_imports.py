"""What importing costs: the loop needs NumPy only, and a public name is loaded when it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import runtime_py

ROOT = Path(__file__).parents[2]
BLOCKED = ("torch", "executorch", "transformers", "pydantic", "safetensors", "tokenizers", "peft")
_BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
"""


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )


def loop_modules() -> list[str]:
    files = sorted((ROOT / "runtime_py" / "loop").glob("*.py"))
    return ["runtime_py.loop", *(f"runtime_py.loop.{f.stem}" for f in files if f.stem[0] != "_")]


def test_the_loop_is_imported_without_any_of_the_heavy_packages() -> None:
    names = loop_modules()
    assert len(names) > 20
    done = python(f"{_BLOCK}\nfor name in {names}:\n    __import__(name)\nprint('all')")
    assert done.stdout == "all\n", done.stderr


def test_a_personalizer_is_had_without_any_of_them() -> None:
    done = python(f"{_BLOCK}\nfrom runtime_py import Dialogue, LoopPolicy, Personalizer, Turn")
    assert done.returncode == 0, done.stderr


def test_the_block_blocks() -> None:
    done = python(f"{_BLOCK}\nimport runtime_py.bundle.manifest")
    assert "pydantic is blocked" in done.stderr


def test_importing_the_package_imports_nothing_of_it() -> None:
    done = python(
        "import sys, runtime_py\n"
        f"print([n for n in sys.modules if n.partition('.')[0] in {(*BLOCKED, 'numpy')}\n"
        " or n.startswith('runtime_py.')])"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", runtime_py.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(runtime_py, name)
    assert value.__name__ == name
    assert name in dir(runtime_py)


def test_a_name_that_is_not_public() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = runtime_py.Nothing  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    """The imports under ``TYPE_CHECKING`` are those that are made when a name is used."""
    tree = ast.parse(Path(runtime_py.__file__).read_text(encoding="utf-8"))
    seen = {
        (alias.name, f"{node.module}")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("runtime_py.")
        for alias in node.names
    }
    loaded = {(name, getattr(runtime_py, name).__module__) for name in runtime_py.__all__}
    assert seen == loaded
