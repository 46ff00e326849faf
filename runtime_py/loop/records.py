"""The store's rows as the loop's nouns: sets, questions, annotations and synthetic pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_py.loop.annotation import Question
from runtime_py.loop.buffer import Buffer, Candidate, Scores
from runtime_py.loop.dialogue import Dialogue, turns_from_json, turns_to_json
from runtime_py.loop.errors import LoopError
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.metrics import direction
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.store import Store
from runtime_py.loop.synthesis import Pair


@dataclass(frozen=True)
class Annotated:
    """An answered set as it is learnt, and how many paraphrases of it were tried."""

    dialogue: Dialogue
    held_out: bool
    paraphrased: int


def load_buffer(
    store: Store, loop: LoopPolicy, lexicons: Lexicons, hidden: int, capacity: Capacity
) -> Buffer:
    """The buffer as the store's sets make it; ``hidden``: numbers of a pooled vector. An answered
    set that can never be learned does not wait.

    Raises ``LoopError`` where a set's bin is not the policy's, or its domain not the lexicons'.
    """
    names = lexicons.names
    buffer = Buffer(loop.bins, len(names), hidden)
    rows = store.rows(
        "SELECT sets.bin, sets.id, eoe, dss, idd, domain, vector, sets.number, "
        "annotations.id IS NOT NULL AND used_in IS NULL "
        "FROM sets LEFT JOIN annotations ON annotations.id = sets.id ORDER BY bin"
    )
    for bin, id, eoe, dss, idd, domain, vector, number, waiting in rows:
        if bin >= loop.bins:
            raise LoopError(
                f"the store {store.path} has a set in bin {bin}, the policy has {loop.bins} bins; "
                f"give the policy at least {rows[-1][0] + 1}."
            )
        if domain not in names:
            raise LoopError(
                f"the store {store.path} has sets of the domain {domain!r}, which the lexicons "
                f"lack (they have {', '.join(names)}); open it with the lexicons it was made with."
            )
        pooled = np.frombuffer(vector, "<f4")
        scores = Scores(eoe, dss, idd)
        new = Candidate(id, number, names.index(domain), scores, direction(pooled))
        buffer.put(bin, new)
        buffer.waiting[bin] = bool(waiting)
    for item in annotated_sets(store):
        if lesson(item.dialogue, capacity) is None:
            buffer.set_waiting(item.dialogue.id, False)
    return buffer


def write_set(
    store: Store, bin: int, dialogue: Dialogue, new: Candidate, domain: str, pooled: np.ndarray
) -> None:
    """Puts a set in a bin; what was there leaves with all that hangs on it."""
    store.execute("DELETE FROM sets WHERE bin = ?", bin)
    store.execute(
        "INSERT INTO sets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        bin,
        dialogue.id,
        turns_to_json(dialogue.turns),
        new.scores.eoe,
        new.scores.dss,
        new.scores.idd,
        domain,
        pooled.astype("<f4").tobytes(),
        new.number,
    )


def observed_as(store: Store, id: str) -> int | None:
    """Which observed set had this id."""
    rows = store.rows(
        "SELECT json_extract (data, '$.number') FROM log "
        "WHERE id = ? AND event IN ('kept', 'refused')",
        id,
    )
    return rows[0][0] if rows else None


def read_set(store: Store, id: str) -> Dialogue | None:
    rows = store.rows("SELECT turns FROM sets WHERE id = ?", id)
    return Dialogue(id, turns_from_json(rows[0][0])) if rows else None


def questions(store: Store, text: str) -> tuple[Question, ...]:
    rows = store.rows(
        "SELECT id, turns FROM questions JOIN sets USING (id) ORDER BY questions.number"
    )
    return tuple(Question(id, Dialogue(id, turns_from_json(turns)), text) for id, turns in rows)


def write_annotation(store: Store, id: str, answer: str | None, number: int, held: bool) -> None:
    store.execute("DELETE FROM questions WHERE id = ?", id)
    store.execute(
        "INSERT INTO annotations (id, answer, number, held_out) VALUES (?, ?, ?, ?)",
        id,
        answer,
        number,
        held,
    )


def annotated_sets(store: Store) -> list[Annotated]:
    """The answered sets in the buffer, by the order of their answers."""
    answered = []
    for id, turns, answer, held_out, tried in store.rows(
        "SELECT id, turns, answer, held_out, paraphrased FROM annotations JOIN sets USING (id) "
        "ORDER BY annotations.number"
    ):
        dialogue = Dialogue(id, turns_from_json(turns))
        if answer is not None:
            dialogue = dialogue.with_answer(answer)
        answered.append(Annotated(dialogue, bool(held_out), tried))
    return answered


def write_pair(store: Store, source: str, ordinal: int, pair: Pair | None, adapter: int) -> None:
    """One paraphrase of ``source`` was tried; None: nothing came of it."""
    store.execute("UPDATE annotations SET paraphrased = ? WHERE id = ?", ordinal + 1, source)
    if pair is None:
        return
    store.execute(
        "INSERT INTO synthetic (source, ordinal, question, answer, question_rouge1, "
        "answer_rouge1, question_seed, answer_seed, adapter) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        source,
        ordinal,
        pair.question.text,
        pair.answer.text,
        pair.question.rouge1,
        pair.answer.rouge1,
        pair.question.seed,
        pair.answer.seed,
        adapter,
    )


def pairs(store: Store, source: Dialogue) -> list[Dialogue]:
    """The synthetic sets that came from ``source``, as dialogues with ids of their own."""
    rows = store.rows(
        "SELECT ordinal, question, answer FROM synthetic WHERE source = ? ORDER BY ordinal",
        source.id,
    )
    return [
        source.with_exchange(f"{source.id}#{n + 1}", question, answer)
        for n, question, answer in rows
    ]
