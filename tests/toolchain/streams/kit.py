"""Small datasets in a folder: what streams are made of in tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.runtime_py.loop.toy import dialogue

Row = dict[str, Any]


def row(number: int, dataset: str, exchanges: int = 1) -> Row:
    """Another text for each number and dataset."""
    seed = int.from_bytes(dataset.encode()[:6], "little")
    made = dialogue(number, seed=seed, exchanges=exchanges)
    turns = [{"role": t.role, "content": f"{t.content} {dataset} {number}"} for t in made.turns]
    return {"id": f"{dataset}-{number}", "dataset": dataset, "turns": turns}


def write_dataset(folder: Path, name: str, rows: Sequence[Row]) -> Path:
    path = folder / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def data_folder(folder: Path, **sizes: int) -> Path:
    """Datasets by name, each with so many rows."""
    for name, size in sizes.items():
        write_dataset(folder, name, [row(number, name) for number in range(size)])
    return folder
