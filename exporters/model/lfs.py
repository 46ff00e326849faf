"""Files that Git LFS has not fetched: a few lines of text stand in their place."""

from __future__ import annotations

from pathlib import Path

from exporters.errors import ExportError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises ``ExportError`` where ``path`` is a file that only points to another."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:  # whoever opens it in earnest says so
        return
    if pointer:
        raise ExportError(
            f"{path} is a Git LFS pointer, a few lines in place of the file itself: run 'git lfs "
            f"pull' in its repository, or download the file."
        )
