"""The object that an app talks to: it watches dialogues, asks, learns at night, and answers.

One process and one call at a time. Every method that changes something is one transaction, or a
row of them that can end after any; what a method holds in memory changes only after the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np

from runtime_py.loop import records
from runtime_py.loop.acknowledgements import Acknowledgements, read_acknowledgements
from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.annotation import Question, check_answer, is_held_out
from runtime_py.loop.asking import find_asking_rule
from runtime_py.loop.dialogue import Dialogue, Turn, check_text
from runtime_py.loop.errors import LoopError
from runtime_py.loop.exchanges import Exchanges, find_exchange_rule
from runtime_py.loop.fine_tune_report import FineTuneReport
from runtime_py.loop.fine_tuning import FineTuning
from runtime_py.loop.forgetting import Forgotten, forget
from runtime_py.loop.jobs import Jobs
from runtime_py.loop.lesson import Capacity, lesson, longest_lesson
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.log import Decision
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import AdapterBundle, Engine, FineTuner
from runtime_py.loop.questions import Questions
from runtime_py.loop.recall import recalled
from runtime_py.loop.replacement import find_policy
from runtime_py.loop.schedule import Conditions, Moment
from runtime_py.loop.selection import Selection, check_embedding, room
from runtime_py.loop.status import Status, lost, status
from runtime_py.loop.store import Store, open_store
from runtime_py.loop.store_policy import enter_policy
from runtime_py.loop.tallies import load_tallies

STORE, ADAPTERS, JOBS = "loop.sqlite", "adapters", "jobs"


def _never() -> bool:
    return False


def _centre(policy: LoopPolicy, mean: np.ndarray | None, hidden: int) -> np.ndarray | None:
    """The mean that directions are made without, if the policy wants one."""
    if policy.centre == "none":
        return None
    if mean is None:
        raise LoopError(
            "the policy centres vectors by the bundle's mean (centre is 'bundle'), and there is "
            "none; export the bundle again, or set centre to 'none'."
        )
    if mean.shape != (hidden,) or mean.dtype != np.float32 or not np.isfinite(mean).all():
        raise LoopError(
            f"the mean of vectors is {mean.dtype} {list(mean.shape)}; expected finite float32 "
            f"[{hidden}]. Export the bundle again."
        )
    return mean


class Personalizer:
    """``folder`` holds the store and the adapters; ``bundle`` the adapter that all begins with.
    ``acknowledgements``: None for attune's own, which are English; ``mean``: float32 [hidden], of
    the vectors of general text, for the policies that centre. Use it in a ``with``, or ``close``
    it."""

    def __init__(
        self,
        folder: Path,
        policy: LoopPolicy,
        lexicons: Lexicons,
        engine: Engine,
        tuner: FineTuner,
        clock: Callable[[], Moment],
        bundle: AdapterBundle,
        acknowledgements: Acknowledgements | None = None,
        mean: np.ndarray | None = None,
    ) -> None:
        find_policy(policy.selection)
        find_asking_rule(policy.asking)
        rule = find_exchange_rule(policy.ask_exchange)
        self._policy, self._lexicons, self._engine, self._clock = policy, lexicons, engine, clock
        self._hidden = hidden = bundle.hidden
        # every answer asks for the tokens of all answered sets again
        self._tokens = lru_cache(maxsize=4 * policy.bins)(tuner.tokens)
        self._capacity = Capacity(self._tokens, longest_lesson(tuner.lengths, policy))
        if self._room("") < 256:
            raise LoopError(
                f"a bin of {policy.bin_bytes} bytes has no room for text beside a vector of "
                f"{hidden} numbers; expected bin_bytes of at least {4 * hidden + 320}."
            )
        centre = _centre(policy, mean, hidden)
        with ExitStack() as undo:
            self._store = open_store(folder / STORE)
            undo.callback(self._store.close)
            enter_policy(self._store, policy, hidden, clock())
            self._buffer = records.load_buffer(
                self._store, policy, lexicons, hidden, self._capacity, centre
            )
            load_tallies(self._store, self._buffer, lexicons, clock())
            self._versions = Versions(self._store, folder / ADAPTERS, bundle)
            self._jobs = Jobs(self._store, self._versions, folder / JOBS)
            self._versions.sweep()
            self._jobs.sweep()
            engine.use_adapter(self._versions.file(self._versions.heal(clock())))
            undo.pop_all()
        exchanges = Exchanges(
            rule, lexicons, acknowledgements or read_acknowledgements(), self._can_learn
        )
        self._questions = Questions(self._store, self._buffer, policy, lexicons, exchanges)
        self._selection = Selection(
            self._store, self._buffer, policy, lexicons, engine, clock, exchanges, self._questions
        )
        self._tuning = FineTuning(
            self._store,
            self._versions,
            self._jobs,
            self._buffer,
            policy,
            engine,
            tuner,
            self._capacity,
            clock,
        )

    def __enter__(self) -> Personalizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._store.close()

    @property
    def store(self) -> Store:
        """For reports and audits: read it, and change nothing."""
        return self._store

    def observe(self, dialogue: Dialogue) -> Decision:
        """Scores a set, keeps it or not, and perhaps has a question about it."""
        return self._selection.observe(dialogue)

    def pending_questions(self) -> tuple[Question, ...]:
        """The oldest first. The first call of a day ends what is too old, and may ask more; a
        question also ends when its set leaves the buffer."""
        self._questions.begin_day(self._clock())
        return records.questions(self._store, self._policy.question)

    def answer(self, id: str, text: str | None = None) -> None:
        """``text``: an ideal reply in the exchange that was asked about; None: the one given is
        good. Raises ``AnswerTooLong`` where the set would not fit its bin, or not be learned; the
        question stays open."""
        question = records.find_question(self._store, id)
        if question is None:
            raise LoopError(
                f"no question about dialogue {id!r} is open: it was answered, has lapsed, or the "
                f"set has left the buffer. Answer those that pending_questions gives."
            )
        dialogue, exchange = question
        check_answer(dialogue, exchange, text, self._room(id), self._capacity)
        answered = [
            item
            for item in records.annotated_sets(self._store)
            if lesson(item.dialogue, self._capacity) is not None
        ]
        held = is_held_out(len(answered) + 1, sum(a.held_out for a in answered), self._policy)
        with self._store.transaction(durable=True):
            self._store.add("answered")
            number = self._store.count("answered")
            records.write_annotation(self._store, id, exchange, text, number, held)
            data = {
                "number": number,
                "held_out": held,
                "acceptable": text is None,
                "exchange": exchange,
            }
            self._store.append(self._clock(), "answered", id, data)
        self._buffer.end_question(id)
        self._buffer.set_waiting(id, True)

    def fine_tune(
        self, conditions: Conditions, stop: Callable[[], bool] = _never
    ) -> FineTuneReport:
        """Begins or goes on, if it is due and the device allows it. ``stop`` is asked between
        paraphrases and between micro-batches."""
        return self._tuning.run(conditions, stop)

    def generate(self, prompt: str | Sequence[Turn]) -> str:
        """The reply of the model with the active adapter; ``recall_examples`` of the policy puts
        answered sets before the conversation. Takes nothing from a random stream.

        Raises ``PromptTooLong`` where the last message fills the model's context."""
        messages = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        for number, turn in enumerate(messages, start=1):
            check_text(turn.content, f"turn {number} of the prompt")
        if not messages or messages[-1].role != "user":
            raise LoopError("the prompt has to end with a turn of the user's, to be replied to.")
        return self._engine.generate(
            (*self.recalled(messages, self._policy.recall_examples), *messages),
            temperature=self._policy.reply_temperature,
            seed=0,
            max_new_tokens=self._policy.reply_max_tokens,
        )

    def recalled(self, messages: Sequence[Turn], most: int) -> tuple[Turn, ...]:
        """The exchanges of the ``most`` answered sets that are most like a conversation, which ends
        with the user's turn."""
        answered = records.annotated_sets(self._store) if most else []
        if not answered:
            return ()
        embedding = self._engine.embed(Dialogue("prompt", tuple(messages)))
        check_embedding(embedding, self._hidden, "the prompt")
        sets = [one.dialogue for one in answered]
        return recalled(sets, self._buffer, embedding.pooled, most)

    def _can_learn(self, dialogue: Dialogue, exchange: int) -> bool:
        return lesson(dialogue, self._capacity, exchange) is not None

    def status(self) -> Status:
        return status(self._store, self._buffer, self._policy, self._lexicons)

    def rollback(self) -> int:
        """Back to the version that the active one was trained from; gives its number.

        An unfinished fine-tuning is abandoned, because it would bring the other one back.
        """
        active = self._versions.active
        if active == 0:
            raise LoopError("the bundle's own adapter is active; there is none before it.")
        sound = self._versions.usable(self._versions.lineage(active)[1])
        with self._store.transaction(durable=True):
            sql = "UPDATE adapters SET state = 'rolled_back' WHERE number = ?"
            self._store.execute(sql, active)
            self._versions.activate(sound)
            self._store.execute("DELETE FROM jobs")
            data = {"adapter": active, "active": sound}
            self._store.append(self._clock(), "rolled_back", None, data)
        self._jobs.sweep()
        self._engine.use_adapter(self._versions.file(sound))
        return sound

    def forget(self, id: str) -> Forgotten:
        """Removes a set, its question, its answer and what was synthesized from it.

        An unfinished fine-tuning that has it is abandoned. The log keeps its id and scores.
        """
        self._tokens.cache_clear()
        return forget(
            id,
            self._store,
            self._buffer,
            self._lexicons,
            self._versions,
            self._jobs,
            self._clock,
        )

    def export_adapter(self, folder: Path) -> None:
        """Writes the active adapter as PEFT keeps it."""
        self._versions.export(self._versions.active, folder)

    def lost(self) -> tuple[str, ...]:
        """Ids of sets and answers that the log says are here and the store has not: none, ever."""
        return lost(self._store)

    def _room(self, id: str) -> int:
        return room(self._policy, self._hidden, id)
