"""Git LFS pointers: the few lines that a clone without Git LFS has in place of a large file."""

from __future__ import annotations

import contextlib
from pathlib import Path

from exporters.errors import ExportError

_BEGINNING = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(path: Path) -> None:
    """Raises ``ExportError`` if the file at ``path`` is a pointer, and says which others of its
    folder are. Whether it can be read at all, whoever opens it finds out."""
    if not _is_pointer(path):
        return
    others = sorted(p.name for p in path.parent.iterdir() if p != path and _is_pointer(p))
    also = f" (and beside it {', '.join(others)})" if others else ""
    raise ExportError(
        f"{path} is a Git LFS pointer{also}, not the file that it stands for: install Git LFS and "
        f"run 'git lfs pull' in {path.parent}."
    )


def _is_pointer(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(_BEGINNING)) == _BEGINNING
    return False
