"""Questions to the user, and what an answer does to a dialogue set."""

from __future__ import annotations

from dataclasses import dataclass

from runtime_py.loop.dialogue import Dialogue, check_text
from runtime_py.loop.errors import AnswerTooLong
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.policy import LoopPolicy


@dataclass(frozen=True)
class Question:
    """``text`` is what to ask below the reply of the exchange ``exchange``, which counts from 0 and
    need not be the dialogue's last."""

    id: str
    dialogue: Dialogue
    text: str
    exchange: int

    @property
    def reply(self) -> str:
        """What the user is asked about."""
        return self.dialogue.exchange(self.exchange)[1].content


def may_ask(asked_today: int, loop: LoopPolicy) -> bool:
    """The day's limit."""
    return asked_today < loop.questions_per_day


def has_lapsed(asked_on: int, day: int, loop: LoopPolicy) -> bool:
    return day - asked_on >= loop.question_days


def learnt(dialogue: Dialogue, exchange: int, text: str | None) -> Dialogue:
    """The set as it is learnt: it ends with the exchange that was asked about, and ``text`` takes
    the place of its reply; None: the reply is good."""
    head = dialogue.up_to(exchange)
    return head if text is None else head.with_answer(text)


def check_answer(
    dialogue: Dialogue, exchange: int, text: str | None, room: int, capacity: Capacity
) -> None:
    """Raises ``LoopError`` where ``text`` is no turn, and ``AnswerTooLong`` where the set would not
    fit its bin with it, or could never be learned."""
    if text is not None:
        check_text(text, f"the answer for dialogue {dialogue.id!r}")
        changed = dialogue.with_reply(exchange, text)
        if changed.bytes > room:
            raise AnswerTooLong(
                f"the answer for dialogue {dialogue.id!r} has {len(text.encode())} bytes, which is "
                f"{changed.bytes - room} more than its bin has left; shorten it."
            )
    whole = learnt(dialogue, exchange, text)
    if lesson(whole, capacity) is None:
        alone = capacity.tokens(Dialogue(dialogue.id, whole.turns[-2:]))
        raise AnswerTooLong(
            f"exchange {exchange + 1} of dialogue {dialogue.id!r} has {alone} tokens with this "
            f"answer, and at most {capacity.longest} can be learned; give a shorter answer."
        )


def is_held_out(annotated_sets: int, held_out_sets: int, loop: LoopPolicy) -> bool:
    """Whether the set that is being answered is kept from training, for the guard.

    The counts are of answered sets in the buffer, this one included in the first. The first one
    is held out, then one in ``heldout_every``; what leaves the buffer is made up for.
    """
    return held_out_sets * loop.heldout_every < annotated_sets
