"""The store's rows as the loop's nouns: sets, questions, annotations and synthetic pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_py.loop.annotation import Question, learnt
from runtime_py.loop.buffer import Buffer, Candidate, Scores
from runtime_py.loop.dialogue import Dialogue, turns_from_json, turns_to_json
from runtime_py.loop.errors import LoopError
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.metrics import direction
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.store import Store
from runtime_py.loop.synthesis import Pair
from runtime_py.loop.words import words


@dataclass(frozen=True)
class Annotated:
    """An answered set as it is learnt, and how many paraphrases of it were tried."""

    dialogue: Dialogue
    held_out: bool
    paraphrased: int


def load_buffer(
    store: Store,
    loop: LoopPolicy,
    lexicons: Lexicons,
    hidden: int,
    capacity: Capacity,
    mean: np.ndarray | None = None,
) -> Buffer:
    """The buffer as the store's sets make it; ``hidden``: numbers of a pooled vector; ``mean``:
    float32 [hidden], taken from vectors. An answered set that can never be learned does not wait.

    Raises ``LoopError`` where a set's bin is not the policy's, or its domain not the lexicons'.
    """
    names = lexicons.names
    buffer = Buffer(loop.bins, len(names), hidden, mean)
    rows = store.rows(
        "SELECT sets.bin, sets.id, sets.turns, eoe, dss, idd, domain, vector, sets.number, "
        "answer_words, annotations.id IS NOT NULL AND used_in IS NULL, questions.id IS NOT NULL, "
        "asked OR questions.id IS NOT NULL OR annotations.id IS NOT NULL FROM sets "
        "LEFT JOIN annotations ON annotations.id = sets.id "
        "LEFT JOIN questions ON questions.id = sets.id ORDER BY bin"
    )
    for bin, id, turns, eoe, dss, idd, domain, vector, number, length, *flags in rows:
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
        if length is None:
            length = len(words(turns_from_json(turns)[-1].content))
        heading = direction(np.frombuffer(vector, "<f4"), mean)
        scores = Scores(eoe, dss, idd)
        buffer.put(bin, Candidate(id, number, names.index(domain), scores, heading, length))
        waiting, question, asked = map(bool, flags)
        buffer.questions[bin], buffer.was_asked[bin] = question, asked
        buffer.set_waiting(id, waiting)
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
        "INSERT INTO sets (bin, id, turns, eoe, dss, idd, domain, vector, number, answer_words) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        bin,
        dialogue.id,
        turns_to_json(dialogue.turns),
        new.scores.eoe,
        new.scores.dss,
        new.scores.idd,
        domain,
        pooled.astype("<f4").tobytes(),
        new.number,
        new.answer_words,
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
        "SELECT id, turns, exchange FROM questions JOIN sets USING (id) ORDER BY questions.number"
    )
    found = []
    for id, turns, exchange in rows:
        dialogue = Dialogue(id, turns_from_json(turns))
        found.append(Question(id, dialogue, text, _or_last(exchange, dialogue)))
    return tuple(found)


def find_question(store: Store, id: str) -> tuple[Dialogue, int] | None:
    """The set that an open question is about, and the exchange."""
    rows = store.rows("SELECT turns, exchange FROM questions JOIN sets USING (id) WHERE id = ?", id)
    if not rows:
        return None
    dialogue = Dialogue(id, turns_from_json(rows[0][0]))
    return dialogue, _or_last(rows[0][1], dialogue)


def write_question(store: Store, id: str, number: int, exchange: int, day: int) -> None:
    """``number``: of the observed set."""
    store.execute(
        "INSERT INTO questions (id, number, exchange, day) VALUES (?, ?, ?, ?)",
        id,
        number,
        exchange,
        day,
    )
    store.execute("UPDATE sets SET asked = 1 WHERE id = ?", id)


def write_annotation(
    store: Store, id: str, exchange: int, answer: str | None, number: int, held: bool
) -> None:
    store.execute("DELETE FROM questions WHERE id = ?", id)
    store.execute(
        "INSERT INTO annotations (id, exchange, answer, number, held_out) VALUES (?, ?, ?, ?, ?)",
        id,
        exchange,
        answer,
        number,
        held,
    )


def annotated_sets(store: Store) -> list[Annotated]:
    """The answered sets in the buffer as they are learnt, by the order of their answers."""
    answered = []
    for id, turns, exchange, answer, held_out, tried in store.rows(
        "SELECT id, turns, exchange, answer, held_out, paraphrased "
        "FROM annotations JOIN sets USING (id) ORDER BY annotations.number"
    ):
        dialogue = Dialogue(id, turns_from_json(turns))
        whole = learnt(dialogue, _or_last(exchange, dialogue), answer)
        answered.append(Annotated(whole, bool(held_out), tried))
    return answered


def _or_last(exchange: int | None, dialogue: Dialogue) -> int:
    """Rows that were written before exchanges were chosen have none."""
    return dialogue.exchanges - 1 if exchange is None else exchange


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
