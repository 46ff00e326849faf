"""Adapter versions: numbered files, of which one is active; version 0 is the bundle's own.

A file is complete before the store names it, so the switch is the store's transaction. What no
row names is left from an interruption, and is removed when the store is opened.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import remove, replacing, sha256
from runtime_py.loop.protocols import AdapterBundle, FineTuneResult
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store


@dataclass(frozen=True)
class AdapterFile:
    name: str
    sha256: str


class Versions:
    """``folder`` holds the files of all versions but 0."""

    def __init__(self, store: Store, folder: Path, bundle: AdapterBundle) -> None:
        self._store, self._folder, self._bundle = store, folder, bundle
        if not bundle.adapter_file.is_file():
            raise LoopError(
                f"there is no adapter at {bundle.adapter_file}; expected the bundle's own. Copy "
                f"the bundle again."
            )

    @property
    def active(self) -> int:
        return self._store.count("active_adapter")

    def file(self, number: int) -> Path:
        """Raises ``LoopError`` where the version's file is not what was written."""
        if number == 0:
            return self._bundle.adapter_file
        name, digest = self._store.rows(
            "SELECT file, sha256 FROM adapters WHERE number = ?", number
        )[0]
        path = self._folder / str(name)
        if not name or not path.is_file() or sha256(path) != digest:
            raise LoopError(f"the file of adapter {number} ({path}) is missing or damaged.")
        return path

    def lineage(self, number: int) -> list[int]:
        """The version, the one that it was trained from, and so on to 0."""
        chain = [number]
        while chain[-1] != 0:
            sql = "SELECT parent FROM adapters WHERE number = ?"
            chain.append(self._store.rows(sql, chain[-1])[0][0])
        return chain

    def usable(self, number: int) -> int:
        """The version, or its nearest ancestor whose file is sound."""
        for candidate in self.lineage(number):
            try:
                self.file(candidate)
            except LoopError:
                continue
            return candidate
        return 0

    def untouched_parent(self) -> int:
        """What the next fine-tuning starts from: the active version, or where it has learnt from
        a set that was forgotten since, the nearest ancestor that has not."""
        chain = self.lineage(self.active)
        marked = {
            row[0] for row in self._store.rows("SELECT adapter FROM learnt WHERE forgotten = 1")
        }
        start = max((chain.index(number) + 1 for number in marked & set(chain)), default=0)
        return self.usable(chain[start])

    def learnt_from(self, id: str) -> tuple[int, ...]:
        """The active version and its ancestors, as far back as one was trained on this set."""
        chain = self.lineage(self.active)
        rows = self._store.rows("SELECT adapter FROM learnt WHERE id = ?", id)
        places = [chain.index(number) for (number,) in rows if number in chain]
        return tuple(sorted(chain[: max(places) + 1])) if places else ()

    def add(
        self,
        number: int,
        parent: int,
        kept: AdapterFile,
        losses: tuple[float | None, float | None],
        learnt: Sequence[str],
    ) -> None:
        """Inside a transaction: the row of a version that ``keep`` made. ``losses``: of held-out
        sets, before and after; ``learnt``: ids of the answered sets that it was trained on."""
        self._store.execute(
            "INSERT INTO adapters (number, parent, file, sha256, heldout_loss_before, "
            "heldout_loss_after, state) VALUES (?, ?, ?, ?, ?, ?, 'kept')",
            number,
            parent,
            kept.name,
            kept.sha256,
            *losses,
        )
        for id in learnt:
            self._store.execute("INSERT INTO learnt (adapter, id) VALUES (?, ?)", number, id)

    def keep(self, result: FineTuneResult, number: int) -> AdapterFile:
        """Copies a result's file to where version ``number`` has it; no row names it yet."""
        name = f"{number:05d}{result.adapter.suffix}"
        with replacing(self._folder / name) as beside:
            shutil.copyfile(result.adapter, beside)
        return AdapterFile(name, sha256(self._folder / name))

    def activate(self, number: int) -> None:
        """Inside a transaction."""
        self._store.set_count("active_adapter", number)

    def retire(self, kept: int) -> None:
        """Inside a transaction: all but the active and the ``kept`` newest lose their file."""
        rows = self._store.rows(
            "SELECT number FROM adapters WHERE file IS NOT NULL ORDER BY number DESC"
        )
        for (number,) in rows[kept:]:
            if number != self.active:
                self._store.execute(
                    "UPDATE adapters SET file = NULL, state = 'deleted' WHERE number = ?", number
                )

    def sweep(self) -> None:
        """Removes files that no row names."""
        named = {row[0] for row in self._store.rows("SELECT file FROM adapters")}
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path.name not in named:
                remove(path)

    def heal(self, now: Moment) -> int:
        """Where the active version's file is not sound, goes back to one that is, and logs it."""
        active = self.active
        sound = self.usable(active)
        if sound != active:
            with self._store.transaction(durable=True):
                self.activate(sound)
                data = {"adapter": active, "active": sound}
                self._store.append(now, "adapter_damaged", None, data)
        return sound

    def export(self, number: int, folder: Path) -> None:
        """Writes a version as a PEFT folder, whole or not at all; what is there is not replaced."""
        if os.path.lexists(folder):
            raise LoopError(f"{folder} exists already; choose another name or remove it.")
        self._bundle.as_peft(self.file(number), folder)
