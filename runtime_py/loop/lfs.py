"""Git LFS pointers: the few lines that a clone without Git LFS has in place of a large file."""

from __future__ import annotations

import contextlib
from pathlib import Path

from runtime_py.loop.errors import AttuneError

_BEGINNING = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointers(files: list[Path], error: type[AttuneError]) -> None:
    """Raises ``error`` that names all of ``files`` which are pointers. Whether a file can be read
    at all, whoever opens it finds out."""
    if pointers := [path for path in files if _is_pointer(path)]:
        are = "is a Git LFS pointer" if len(pointers) == 1 else "are Git LFS pointers"
        raise error(
            f"{', '.join(map(str, pointers))} {are}, not what was stored: install Git LFS and run "
            f"'git lfs pull' in {pointers[0].parent}."
        )


def _is_pointer(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(_BEGINNING)) == _BEGINNING
    return False
