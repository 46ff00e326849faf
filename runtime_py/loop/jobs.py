"""A fine-tuning that has begun: frozen in the store until it has ended, so that it can go on.

What it learns from is copied when it begins; sets that come and go meanwhile do not change it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.dialogue import Dialogue, turns_from_json, turns_to_json
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneJob
from runtime_py.loop.records import annotated_sets, pairs
from runtime_py.loop.store import Store

Part = Literal["training", "stopping", "guard"]

FEWEST_TO_STOP = 16  # held-out sets, from which half of them choose the step that is kept


@dataclass(frozen=True)
class Source:
    """An answered set: ``dialogues`` are itself and, after it, its paraphrases."""

    id: str
    held_out: bool
    dialogues: tuple[Dialogue, ...]


def answered_sources(store: Store) -> list[Source]:
    """The answered sets in the buffer, by the order of their answers.

    A held-out set has no paraphrases: its words would reach the training through them.
    """
    sources = []
    for item in annotated_sets(store):
        one = item.dialogue
        more = [] if item.held_out else pairs(store, one)
        sources.append(Source(one.id, item.held_out, (one, *more)))
    return sources


def fitted(sources: Iterable[Source], capacity: Capacity) -> tuple[list[Source], list[str]]:
    """The sources as lessons, and the ids of dialogues that are too long. A set that is left out
    takes its paraphrases with it."""
    kept, left_out = [], []
    for source in sources:
        lessons = [(one.id, lesson(one, capacity)) for one in source.dialogues[:1]]
        if lessons[0][1] is not None:
            lessons += [(one.id, lesson(one, capacity)) for one in source.dialogues[1:]]
        left_out += [id for id, found in lessons if found is None]
        found = tuple(one for _, one in lessons if one is not None)
        if found:
            kept.append(Source(source.id, source.held_out, found))
    return kept, left_out


def two_sided(sources: Iterable[Source]) -> bool:
    """Whether there is something to learn, and something to judge it by."""
    return {source.held_out for source in sources} == {True, False}


def is_whole(job: FineTuneJob, capacity: Capacity) -> bool:
    """Whether a job can go on as it was frozen: its length is the capacity's, it has its steps, and
    what it has to learn and to judge by is no longer."""
    if job.max_sequence_tokens != capacity.longest or not job.steps or not job.guard:
        return False
    every = (*job.training, *job.stopping, *job.guard)
    return all(capacity.tokens(dialogue) <= capacity.longest for dialogue in every)


def count_steps(dialogues: int, epochs: int, batch: int, loop: LoopPolicy) -> int:
    """The steps that ``dialogues`` are learned in."""
    wanted = -(-dialogues * epochs // batch)  # rounded up
    return min(max(wanted, loop.fewest_steps), loop.most_steps)


def held_out_parts(held_out: int, steps: int, check_every: int) -> list[Part]:
    """What each of the held-out sets is for, by the order of their answers.

    Stopping takes enough of them to be worth looking at, and a step between the first and the last
    to look after. Else all judge.
    """
    if held_out < FEWEST_TO_STOP or check_every >= steps:
        return ["guard"] * held_out
    return ["guard" if place % 2 else "stopping" for place in range(held_out)]


class Jobs:
    """At most one is unfinished. ``folder`` holds a subfolder for what its runs leave behind."""

    def __init__(self, store: Store, versions: Versions, folder: Path) -> None:
        self._store, self._versions, self._folder = store, versions, folder

    def unfinished(self) -> int | None:
        rows = self._store.rows("SELECT number FROM jobs")
        return rows[0][0] if rows else None

    def read(self, number: int) -> FineTuneJob:
        """A job that has begun and not ended, with its dialogues as they were frozen.

        Raises ``LoopError`` where its parent's file is not sound."""
        (row,) = self._store.rows(
            "SELECT parent, seed, sequence_tokens, learning_rate, batch, steps, b_rate_ratio, "
            "check_every, forgetting_bound, forgetting_tokens, replay_share "
            "FROM jobs WHERE number = ?",
            number,
        )
        parent, seed, tokens, rate, batch, steps, ratio, check_every, bound, text, replay = row
        parts: dict[Part, list[Dialogue]] = {"training": [], "stopping": [], "guard": []}
        for part, held_out, id, turns in self._store.rows(
            "SELECT part, held_out, id, turns FROM job_sets WHERE job = ? ORDER BY position", number
        ):
            older: Part = "guard" if held_out else "training"
            parts[part or older].append(Dialogue(id, turns_from_json(turns)))
        return FineTuneJob(
            number=number,
            training=tuple(parts["training"]),
            stopping=tuple(parts["stopping"]),
            guard=tuple(parts["guard"]),
            parent=self._versions.file(parent),
            seed=seed,
            steps=steps,
            learning_rate=rate,
            b_rate_ratio=ratio,
            batch=batch,
            check_every=check_every,
            max_sequence_tokens=tokens,
            forgetting_bound=bound,
            forgetting_tokens=text,
            replay_share=replay,
        )

    def begin(
        self, parent: int, seed: int, tokens: int, loop: LoopPolicy, sources: Sequence[Source]
    ) -> int:
        """Inside a transaction: freezes the sources, which are lessons of at most ``tokens``; the
        job's number."""
        number = self._store.count("jobs") + 1
        self._store.set_count("jobs", number)
        self._store.execute(
            "INSERT INTO jobs (number, parent, seed, sequence_tokens, epochs, learning_rate, "
            "batch, b_rate_ratio, check_every, forgetting_bound, forgetting_tokens, replay_share) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            number,
            parent,
            seed,
            tokens,
            loop.epochs,
            loop.learning_rate,
            loop.batch,
            loop.b_rate_ratio,
            loop.check_every_steps,
            loop.forgetting_bound,
            loop.forgetting_tokens,
            loop.replay_share,
        )
        self._freeze(number, loop, sources)
        return number

    def shorten(
        self, number: int, tokens: int, loop: LoopPolicy, sources: Sequence[Source]
    ) -> None:
        """Inside a transaction: the job starts again with shorter sequences, and with no more than
        ``sources``, which are lessons of that length."""
        self._store.execute("UPDATE jobs SET sequence_tokens = ? WHERE number = ?", tokens, number)
        self._store.execute("DELETE FROM job_sets WHERE job = ?", number)
        self._freeze(number, loop, sources)

    def _freeze(self, number: int, loop: LoopPolicy, sources: Sequence[Source]) -> None:
        ((epochs, batch, check_every),) = self._store.rows(
            "SELECT epochs, batch, check_every FROM jobs WHERE number = ?", number
        )
        training = sum(len(source.dialogues) for source in sources if not source.held_out)
        steps = count_steps(training, epochs, batch, loop)
        self._store.execute("UPDATE jobs SET steps = ? WHERE number = ?", steps, number)
        held_out = sum(source.held_out for source in sources)
        judging = iter(held_out_parts(held_out, steps, check_every))
        position = 0
        for source in sources:
            part = next(judging) if source.held_out else "training"
            for dialogue in source.dialogues:
                self._store.execute(
                    "INSERT INTO job_sets (job, position, held_out, source, id, turns, part) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    number,
                    position,
                    source.held_out,
                    source.id,
                    dialogue.id,
                    turns_to_json(dialogue.turns),
                    part,
                )
                position += 1

    def parent(self, number: int) -> int:
        return self._store.rows("SELECT parent FROM jobs WHERE number = ?", number)[0][0]

    def sources(self, number: int) -> list[Source]:
        """The answered sets that it is made of, as they were frozen."""
        rows = self._store.rows(
            "SELECT source, held_out, id, turns FROM job_sets WHERE job = ? ORDER BY position",
            number,
        )
        return [
            Source(id, bool(held_out), tuple(Dialogue(r[2], turns_from_json(r[3])) for r in group))
            for (id, held_out), group in groupby(rows, key=lambda row: (row[0], row[1]))
        ]

    def left_out(self, number: int) -> tuple[str, ...]:
        """Ids of dialogues that were too long for it, when it began and at each shortening."""
        rows = self._store.rows(
            "SELECT data FROM log WHERE event IN ('job_begun', 'job_shortened') "
            "AND json_extract (data, '$.job') = ? ORDER BY seq",
            number,
        )
        return tuple(id for (data,) in rows for id in json.loads(data).get("left_out", ()))

    def end(self, number: int) -> None:
        """Inside a transaction."""
        self._store.execute("DELETE FROM jobs WHERE number = ?", number)

    def folder(self, job: FineTuneJob) -> Path:
        """Of this job with this sequence length: what another length left is not gone on with."""
        return self._folder / f"{job.number:05d}-{job.max_sequence_tokens}"

    def sweep(self) -> None:
        """Removes what ended jobs left, and what was trained before a job had its steps."""
        rows = self._store.rows("SELECT number, sequence_tokens FROM jobs WHERE steps > 0")
        named = {f"{number:05d}-{tokens}" for number, tokens in rows}
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path.name not in named:
                shutil.rmtree(path, ignore_errors=True)
