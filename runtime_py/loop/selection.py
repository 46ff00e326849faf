"""What happens to one observed dialogue set: measured, kept or not, perhaps asked about, logged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime_py.loop import records
from runtime_py.loop.annotation import may_ask
from runtime_py.loop.buffer import Buffer, Candidate
from runtime_py.loop.dialogue import Dialogue, check, cut
from runtime_py.loop.errors import DuplicateDialogue, LoopError
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.log import Decision, NotAsked
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding, Engine
from runtime_py.loop.replacement import Placement, choose
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store
from runtime_py.loop.words import words

_BESIDE_TEXT = 64  # bytes of a bin for scores, domain and numbers


def room(policy: LoopPolicy, hidden: int, id: str) -> int:
    """Bytes that a bin has for turns, beside the id, the vector and the rest."""
    return policy.bin_bytes - 4 * hidden - len(id.encode()) - _BESIDE_TEXT


class Selection:
    """``buffer`` mirrors the store's sets, and changes only after a commit."""

    def __init__(
        self,
        store: Store,
        buffer: Buffer,
        policy: LoopPolicy,
        lexicons: Lexicons,
        engine: Engine,
        capacity: Capacity,
        clock: Callable[[], Moment],
    ) -> None:
        self._store, self._buffer, self._policy = store, buffer, policy
        self._lexicons, self._engine, self._clock = lexicons, engine, clock
        self._capacity = capacity
        self._hidden = buffer.directions.shape[1]

    def observe(self, dialogue: Dialogue) -> Decision:
        """One transaction: the set, its question, the random stream, the counters, the log."""
        check(dialogue)
        if (seen := records.observed_as(self._store, dialogue.id)) is not None:
            raise DuplicateDialogue(
                f"dialogue {dialogue.id!r} was observed already, as number {seen}; expected a new "
                f"id for each dialogue. Leave it out."
            )
        number, now = self._store.count("observed") + 1, self._clock()
        fitting = cut(dialogue, room(self._policy, self._hidden, dialogue.id))
        if fitting is None:
            refusal = Decision(
                dialogue.id, number, None, "too_large", 0, None, None, None, 0, "not_kept"
            )
            with self._store.transaction():
                self._count_and_log(refusal, now)
            return refusal
        embedding = self._engine.embed(fitting)
        self._check_embedding(dialogue.id, embedding)
        new = self._buffer.measure(
            dialogue.id, number, words(fitting.text), embedding, self._lexicons
        )
        stream = self._store.stream("selection")
        state = stream.state
        choice = choose(self._buffer, new, stream, self._policy)
        decision = self._decide(new, choice, dialogue, fitting, now.day)
        with self._store.transaction():
            if choice.bin is not None:
                domain = self._lexicons.names[new.domain]
                pooled = embedding.pooled
                records.write_set(self._store, choice.bin, fitting, new, domain, pooled)
            if decision.asked:
                self._ask(new, now.day)
            if stream.state != state:
                self._store.save_stream("selection", stream)
            self._count_and_log(decision, now)
        if choice.bin is not None:
            self._buffer.put(choice.bin, new)
        return decision

    def _check_embedding(self, id: str, embedding: Embedding) -> None:
        pooled = embedding.pooled
        if pooled.shape != (self._hidden,) or pooled.dtype != np.float32:
            raise LoopError(
                f"the embedding of dialogue {id!r} is {pooled.dtype} {list(pooled.shape)}; "
                f"expected float32 [{self._hidden}]. The engine does not fit the bundle."
            )
        if not np.isfinite(pooled).all() or not np.isfinite(embedding.entropy):
            raise LoopError(
                f"the embedding of dialogue {id!r} is not finite; the embed program or its weights "
                f"are damaged. Check the bundle."
            )

    def _decide(
        self, new: Candidate, choice: Placement, whole: Dialogue, fitting: Dialogue, day: int
    ) -> Decision:
        bin = choice.bin
        return Decision(
            id=new.id,
            number=new.number,
            bin=bin,
            reason=choice.reason,
            candidates=choice.candidates,
            replaced=None if bin is None else self._buffer.ids[bin],
            scores=new.scores,
            domain=self._lexicons.names[new.domain],
            dropped=len(whole.turns) - len(fitting.turns),
            not_asked="not_kept" if bin is None else self._why_not_ask(fitting, day),
        )

    def _why_not_ask(self, kept: Dialogue, day: int) -> NotAsked | None:
        today = self._store.count("question_day") == day
        if not may_ask(self._store.count("asked_today") if today else 0, self._policy):
            return "enough_today"
        return "too_long_to_learn" if lesson(kept, self._capacity) is None else None

    def _ask(self, new: Candidate, day: int) -> None:
        if self._store.count("question_day") != day:
            self._store.set_count("question_day", day)
            self._store.set_count("asked_today", 0)
        self._store.add("asked_today")
        self._store.add("asked")
        self._store.execute("INSERT INTO questions VALUES (?, ?)", new.id, new.number)

    def _count_and_log(self, decision: Decision, now: Moment) -> None:
        event = "kept" if decision.kept else "refused"
        self._store.set_count("observed", decision.number)
        self._store.add(event)
        self._store.append(now, event, decision.id, decision.data())
