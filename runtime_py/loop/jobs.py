"""A fine-tuning that has begun: frozen in the store until it has ended, so that it can go on.

What it learns from is copied when it begins; sets that come and go meanwhile do not change it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.dialogue import Dialogue, turns_from_json, turns_to_json
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneJob
from runtime_py.loop.records import annotated_sets, pairs
from runtime_py.loop.store import Store


class Jobs:
    """At most one is unfinished. ``folder`` holds a subfolder for what its runs leave behind."""

    def __init__(self, store: Store, versions: Versions, folder: Path) -> None:
        self._store, self._versions, self._folder = store, versions, folder

    def unfinished(self) -> FineTuneJob | None:
        rows = self._store.rows("SELECT number FROM jobs")
        return self.read(rows[0][0]) if rows else None

    def read(self, number: int) -> FineTuneJob:
        """A job that has begun and not ended, with its dialogues as they were frozen."""
        (row,) = self._store.rows("SELECT * FROM jobs WHERE number = ?", number)
        _, parent, seed, tokens, epochs, rate, batch = row
        parts: tuple[list[Dialogue], list[Dialogue]] = ([], [])
        for held_out, id, turns in self._store.rows(
            "SELECT held_out, id, turns FROM job_sets WHERE job = ? ORDER BY position", number
        ):
            parts[held_out].append(Dialogue(id, turns_from_json(turns)))
        return FineTuneJob(
            number=number,
            training=tuple(parts[0]),
            held_out=tuple(parts[1]),
            parent=self._versions.file(parent),
            seed=seed,
            epochs=epochs,
            learning_rate=rate,
            batch=batch,
            max_sequence_tokens=tokens,
        )

    def begin(self, parent: int, seed: int, tokens: int, loop: LoopPolicy) -> int:
        """Inside a transaction: freezes the answered sets and their paraphrases; its number.

        A held-out set is not paraphrased: its words would reach the training through them.
        """
        number = self._store.count("jobs") + 1
        self._store.set_count("jobs", number)
        self._store.execute(
            "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)",
            number,
            parent,
            seed,
            tokens,
            loop.epochs,
            loop.learning_rate,
            loop.batch,
        )
        position = 0
        for item in annotated_sets(self._store):
            source = item.dialogue
            more = [] if item.held_out else pairs(self._store, source)
            for dialogue in (source, *more):
                self._store.execute(
                    "INSERT INTO job_sets VALUES (?, ?, ?, ?, ?, ?)",
                    number,
                    position,
                    item.held_out,
                    source.id,
                    dialogue.id,
                    turns_to_json(dialogue.turns),
                )
                position += 1
        return number

    def shorten(self, number: int, tokens: int) -> None:
        """Inside a transaction: the job starts again with shorter sequences."""
        self._store.execute("UPDATE jobs SET sequence_tokens = ? WHERE number = ?", tokens, number)

    def parent(self, number: int) -> int:
        return self._store.rows("SELECT parent FROM jobs WHERE number = ?", number)[0][0]

    def sources(self, number: int) -> list[tuple[str, bool]]:
        """The answered sets that it is made of, and whether they are held out."""
        rows = self._store.rows(
            "SELECT DISTINCT source, held_out FROM job_sets WHERE job = ? ORDER BY source", number
        )
        return [(source, bool(held_out)) for source, held_out in rows]

    def end(self, number: int) -> None:
        """Inside a transaction."""
        self._store.execute("DELETE FROM jobs WHERE number = ?", number)

    def folder(self, job: FineTuneJob) -> Path:
        """Of this job with this sequence length: what another length left is not gone on with."""
        return self._folder / f"{job.number:05d}-{job.max_sequence_tokens}"

    def sweep(self) -> None:
        """Removes what ended jobs left."""
        rows = self._store.rows("SELECT number, sequence_tokens FROM jobs")
        named = {f"{number:05d}-{tokens}" for number, tokens in rows}
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path.name not in named:
                shutil.rmtree(path, ignore_errors=True)
