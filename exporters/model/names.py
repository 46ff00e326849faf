"""What a model is called, by where it lies."""

from __future__ import annotations

from pathlib import Path


def model_name(path: Path) -> str:
    """A folder's own name, whole (``Qwen2.5-0.5B`` has no suffix), and a .gguf file's without
    ``.gguf``; a hub id's last part. ``.`` and ``..`` are called what they are."""
    last = path if path.name not in ("", "..") else path.resolve()
    return last.stem if last.suffix.lower() == ".gguf" and not path.is_dir() else last.name
