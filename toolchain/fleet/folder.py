"""A fleet's folder: ``fleet.json``, ``lives/``, ``adapters/``, ``swaps/``, and what went wrong.

``fleet.json`` is all that the results depend on. A life's and a swap's file hold no time of this
machine and no path, so that a run by however many processes or machines leaves the same bytes; the
seconds are in ``measured/``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import write_bytes
from toolchain.fleet.swap import Swapped
from toolchain.fleet.user_life import UserLife, UserLived
from toolchain.study.cells import canonical

FLEET = "fleet.json"


@dataclass(frozen=True)
class FleetFolder:
    """Opened for one configuration, whose ``text`` is fleet.json's. Files are by the users'
    numbers."""

    path: Path
    text: bytes

    def begin(self) -> None:
        """Once there is a world: what cannot be run leaves no folder."""
        write_bytes(self.path / FLEET, self.text)

    def write_life(self, lived: UserLived) -> None:
        """The life last: a life that is there has its adapter."""
        number = lived.life.number
        if lived.adapter is not None:
            write_bytes(self._file("adapters", number, ".bin"), lived.adapter)
        measured = {"seconds": round(lived.seconds, 3)}
        write_bytes(self._file("measured", number), canonical(measured) + b"\n")
        write_bytes(self._file("lives", number), canonical(lived.life.as_json()) + b"\n")
        self._file("failed", number, ".txt").unlink(missing_ok=True)

    def write_swap(self, swapped: Swapped) -> None:
        write_bytes(self._file("swaps", swapped.number), canonical(swapped.as_json()) + b"\n")

    def write_failure(self, number: int, sentence: str, trace: str) -> None:
        write_bytes(self._file("failed", number, ".txt"), f"{sentence}\n{trace}".encode())

    def lives(self) -> dict[int, UserLife]:
        """Those that are there; a damaged one is left out, and lived anew."""
        found = {}
        for number, raw in self._read("lives").items():
            try:
                life = UserLife.from_json(raw)
            except ValueError:
                continue
            if life.adapter == 0 or self._file("adapters", number, ".bin").exists():
                found[number] = life
        return found

    def swaps(self) -> dict[int, Swapped]:
        found = {}
        for number, raw in self._read("swaps").items():
            try:
                found[number] = Swapped.from_json(raw)
            except (KeyError, TypeError):
                continue
        return found

    def seconds(self) -> dict[int, float]:
        """What each life took, on whatever machine."""
        return {
            number: float(raw["seconds"])
            for number, raw in self._read("measured").items()
            if "seconds" in raw
        }

    def adapter(self, life: UserLife) -> bytes | None:
        """None: the bundle's own."""
        if life.adapter == 0:
            return None
        return self._file("adapters", life.number, ".bin").read_bytes()

    def _file(self, kind: str, number: int, suffix: str = ".json") -> Path:
        return self.path / kind / f"{number:06d}{suffix}"

    def _read(self, kind: str) -> dict[int, dict[str, Any]]:
        found = {}
        for path in sorted((self.path / kind).glob("*.json")):
            try:
                raw = json.loads(path.read_bytes())
            except ValueError:
                continue
            if path.stem.isdigit() and isinstance(raw, dict):
                found[int(path.stem)] = raw
        return found


def open_folder(path: Path, configuration: Mapping[str, Any]) -> FleetFolder:
    """A new folder, of which nothing is written yet, or one of the same configuration; a fleet may
    grow. Raises ``LoopError`` where it is another's, with the difference."""
    now = json.loads(canonical(configuration))
    file = path / FLEET
    if file.exists():
        before = _known(file)
        if differences := [
            f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
            for key in sorted({*before, *now} - {"users"})
            if before.get(key) != now.get(key)
        ]:
            raise LoopError(
                f"{path} holds a fleet of another configuration: {'; '.join(differences)}. Choose "
                f"another --out, or give what it was begun with."
            )
    elif path.is_dir() and any(path.iterdir()):
        raise LoopError(f"{path} has files and no {FLEET}: choose an empty or a new --out.")
    text = json.dumps(now, ensure_ascii=False, sort_keys=True, indent=1) + "\n"
    return FleetFolder(path, text.encode())


def _known(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise LoopError(
            f"{file} is damaged, so it cannot be told what the lives beside it are: choose another "
            f"--out."
        ) from None
