"""A study's folder: ``study.json``, ``cells/<key>.json``, and what machines took.

``study.json`` is the configuration that every cell in the folder was measured under, and the plan.
A cell's file holds no time and no path, so that two runs of a study, by however many processes or
machines, leave the same bytes; seconds and memory are in ``measured/<key>.json``, and what went
wrong in ``failed/<key>.txt``, until the cell is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import write_bytes
from toolchain.study.cells import Cell, CellResult, canonical
from toolchain.study.executor import Failed

STUDY = "study.json"
_MAY_GROW = (
    "streams",
    "orderings",
    "rows",
    "vary",
    "stream_options",
    "secondary",
    "about",
)  # of a plan


@dataclass(frozen=True)
class StudyFolder:
    """Opened for one configuration; ``study``: what ``study.json`` holds, or will."""

    path: Path
    study: bytes

    def begin(self) -> None:
        """Makes the folder what it was opened for: not before there is something to write."""
        write_bytes(self.path / STUDY, self.study)

    def cell_file(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.key}.json"

    def read(self, cells: Iterable[Cell]) -> tuple[dict[str, CellResult], list[Path]]:
        """What is there of ``cells``, by key, and the files that are damaged."""
        found: dict[str, CellResult] = {}
        damaged: list[Path] = []
        for cell in dict.fromkeys(cells):
            path = self.cell_file(cell)
            try:
                result = CellResult.from_json(path.read_bytes())
                if result.cell != cell or result.to_json() != path.read_bytes():
                    damaged.append(path)
                    continue
            except FileNotFoundError:
                continue
            except LoopError:
                damaged.append(path)
                continue
            found[cell.key] = result
        return found, damaged

    def seconds(self, keys: Iterable[str]) -> float:
        """That workers spent on the cells, as far as it is known: it is only told."""
        total = 0.0
        for key in keys:
            try:
                raw = json.loads((self.path / "measured" / f"{key}.json").read_bytes())
                total += float(raw["seconds"])
            except (OSError, ValueError, TypeError, KeyError):
                continue
        return total

    def write(self, result: CellResult) -> None:
        """The cell's file last: a cell that is there is there whole."""
        key = result.cell.key
        write_bytes(self.path / "measured" / f"{key}.json", canonical(result.measured()) + b"\n")
        write_bytes(self.cell_file(result.cell), result.to_json())
        (self.path / "failed" / f"{key}.txt").unlink(missing_ok=True)

    def write_failure(self, cell: Cell, failure: Failed) -> None:
        text = f"{failure.sentence}\n{canonical(cell.__dict__).decode()}\n{failure.trace}"
        write_bytes(self.path / "failed" / f"{cell.key}.txt", text.encode())


def open_folder(path: Path, configuration: dict[str, Any], plan: dict[str, Any]) -> StudyFolder:
    """A new folder, of which nothing is written yet, or one of the same configuration.

    A plan may grow, and with it the data: cells that are there stay good. Raises ``LoopError``
    where the configuration or the plan's primary contrast is another than the folder's, with the
    difference. Both are plain JSON values.
    """
    raw = {"configuration": configuration, "plan": plan}
    there = _read_study(path)
    if there is not None:
        kept = {k: v for k, v in raw["plan"].items() if k not in _MAY_GROW}
        before = {k: v for k, v in there["plan"].items() if k not in _MAY_GROW}
        now = {**raw["configuration"], "plan": kept}
        data = there["configuration"].get("data", {})
        now["data"] = {**data, **configuration.get("data", {})}
        was = {**there["configuration"], "plan": before, "data": {**now["data"], **data}}
        if differences := _differences(was, now):
            raise LoopError(
                f"{path} holds a study of another configuration: {'; '.join(differences)}. Choose "
                f"another folder, or give what it was begun with."
            )
        raw["configuration"] = {**configuration, "data": now["data"]}
    text = json.dumps(raw, ensure_ascii=False, indent=1) + "\n"  # the plan keeps its order
    return StudyFolder(path, text.encode())


def read_folder(path: Path) -> tuple[StudyFolder, dict[str, Any]]:
    """A folder that is there, and the plan that it was begun with. Raises ``LoopError``."""
    there = _read_study(path)
    if there is None:
        raise LoopError(f"there is no study in {path}: run one with --out {path} first.")
    return StudyFolder(path, (path / STUDY).read_bytes()), there["plan"]


def _read_study(path: Path) -> dict[str, Any] | None:
    """None: the folder is not there, or empty. Raises ``LoopError`` for what is no study's."""
    file = path / STUDY
    if not file.exists():
        if path.is_dir() and any(path.iterdir()):
            raise LoopError(f"{path} has files and no {STUDY}: choose an empty or a new folder.")
        return None
    try:
        raw = json.loads(file.read_bytes())
        return {"configuration": dict(raw["configuration"]), "plan": dict(raw["plan"])}
    except (ValueError, KeyError, TypeError):
        raise LoopError(
            f"{file} is damaged, so it cannot be told what the cells beside it are of: choose "
            f"another folder."
        ) from None


def _differences(before: object, now: object, where: str = "") -> list[str]:
    """Leaf by leaf: ``device was "cpu", is "cuda"``."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            one
            for key in sorted(set(before) | set(now))
            for one in _differences(
                before.get(key), now.get(key), f"{where}.{key}" if where else str(key)
            )
        ]
    if before == now:
        return []
    return [f"{where} was {json.dumps(before)}, is {json.dumps(now)}"]
