"""What happens to one observed dialogue set: measured, kept or not, perhaps asked about, logged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime_py.loop import records
from runtime_py.loop.buffer import Buffer, Candidate
from runtime_py.loop.dialogue import Dialogue, check, cut
from runtime_py.loop.errors import DuplicateDialogue, LoopError
from runtime_py.loop.exchanges import Exchanges, NotAsked
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.log import Decision, Event
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding, Engine
from runtime_py.loop.questions import Questions
from runtime_py.loop.replacement import Placement, choose
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store
from runtime_py.loop.tallies import count_direction
from runtime_py.loop.words import words

_BESIDE_TEXT = 64  # bytes of a bin for scores, domain and numbers


def room(policy: LoopPolicy, hidden: int, id: str) -> int:
    """Bytes that a bin has for turns, beside the id, the vector and the rest."""
    return policy.bin_bytes - 4 * hidden - len(id.encode()) - _BESIDE_TEXT


def check_embedding(embedding: Embedding, hidden: int, what: str) -> None:
    """Raises ``LoopError`` where it is not what a bundle's engine gives; ``what`` it is of."""
    pooled = embedding.pooled
    if pooled.shape != (hidden,) or pooled.dtype != np.float32:
        raise LoopError(
            f"the embedding of {what} is {pooled.dtype} {list(pooled.shape)}; expected float32 "
            f"[{hidden}]. The engine does not fit the bundle."
        )
    if not np.isfinite(pooled).all() or not np.isfinite(embedding.entropy):
        raise LoopError(
            f"the embedding of {what} is not finite; the embed program or its weights are damaged. "
            f"Check the bundle."
        )


class Selection:
    """``buffer`` mirrors the store's sets, and changes only after a commit."""

    def __init__(
        self,
        store: Store,
        buffer: Buffer,
        policy: LoopPolicy,
        lexicons: Lexicons,
        engine: Engine,
        clock: Callable[[], Moment],
        exchanges: Exchanges,
        questions: Questions,
    ) -> None:
        self._store, self._buffer, self._policy = store, buffer, policy
        self._lexicons, self._engine, self._clock = lexicons, engine, clock
        self._exchanges, self._questions = exchanges, questions
        self._hidden = buffer.directions.shape[1]

    def observe(self, dialogue: Dialogue) -> Decision:
        """One transaction: the set, its question, the random stream, the tallies, the counters, the
        log. The first call of a day has the day's questions before it."""
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
                dialogue.id, number, None, "too_large", 0, None, None, None, 0, None, "not_kept"
            )
            self._questions.begin_day(now)
            with self._store.transaction():
                self._count_and_log(refusal, now)
            return refusal
        embedding = self._engine.embed(fitting)
        check_embedding(embedding, self._hidden, f"dialogue {dialogue.id!r}")
        exchange = self._exchanges.to_ask_about(fitting)
        answer = "" if exchange is None else fitting.exchange(exchange)[1].content
        new = self._buffer.measure(
            dialogue.id,
            number,
            words(fitting.text),
            embedding,
            self._lexicons,
            len(words(answer)),
        )
        self._questions.begin_day(now)
        stream = self._store.stream("selection")
        state = stream.state
        choice = choose(self._buffer, new, stream, self._policy)
        dropped = len(dialogue.turns) - len(fitting.turns)
        why = "not_kept" if choice.bin is None else self._why_not_ask(fitting, exchange, now.day)
        decision = self._decision(new, choice, dropped, exchange, why)
        domain = self._lexicons.names[new.domain]
        with self._store.transaction():
            count_direction(self._store, "observed", domain, new.direction)
            if choice.bin is not None:
                records.write_set(self._store, choice.bin, fitting, new, domain, embedding.pooled)
            if decision.exchange is not None:
                self._questions.write_at_entry(new, decision.exchange, now)
            if stream.state != state:
                self._store.save_stream("selection", stream)
            self._count_and_log(decision, now)
        self._buffer.see(new)
        if choice.bin is not None:
            self._buffer.put(choice.bin, new)
            if decision.asked:
                self._buffer.ask(choice.bin)
        return decision

    def _why_not_ask(self, kept: Dialogue, exchange: int | None, day: int) -> NotAsked | None:
        if exchange is None:
            return self._exchanges.why_none(kept)
        return self._questions.why_not_at_entry(day)

    def _decision(
        self,
        new: Candidate,
        choice: Placement,
        dropped: int,
        exchange: int | None,
        not_asked: NotAsked | None,
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
            dropped=dropped,
            exchange=None if not_asked else exchange,
            not_asked=not_asked,
        )

    def _count_and_log(self, decision: Decision, now: Moment) -> None:
        event: Event = "kept" if decision.kept else "refused"
        self._store.set_count("observed", decision.number)
        self._store.add(event)
        self._store.append(now, event, decision.id, decision.data())
