"""Questions to the user, and what an answer does to a dialogue set."""

from __future__ import annotations

from dataclasses import dataclass

from runtime_py.loop.dialogue import Dialogue, check_text
from runtime_py.loop.errors import AnswerTooLong
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.policy import LoopPolicy


@dataclass(frozen=True)
class Question:
    """``text`` is what to ask below the dialogue's last reply."""

    id: str
    dialogue: Dialogue
    text: str


def may_ask(asked_today: int, loop: LoopPolicy) -> bool:
    """Asked only of a set that has just entered the buffer; this is the day's limit."""
    return asked_today < loop.questions_per_day


def annotated(dialogue: Dialogue, text: str | None, room: int, capacity: Capacity) -> Dialogue:
    """The set as it is answered: ``text`` takes the place of the last reply; None: it is good.

    Raises ``AnswerTooLong`` where it does not fit its bin, or can never be learned.
    """
    changed = dialogue
    if text is not None:
        check_text(text, f"the answer for dialogue {dialogue.id!r}")
        changed = dialogue.with_answer(text)
        if changed.bytes > room:
            raise AnswerTooLong(
                f"the answer for dialogue {dialogue.id!r} has {len(text.encode())} bytes, which is "
                f"{changed.bytes - room} more than its bin has left; shorten it."
            )
    if lesson(changed, capacity) is None:
        alone = capacity.tokens(Dialogue(dialogue.id, changed.turns[-2:]))
        raise AnswerTooLong(
            f"the last exchange of dialogue {dialogue.id!r} has {alone} tokens with this answer, "
            f"and at most {capacity.longest} can be learned; give a shorter answer."
        )
    return changed


def is_held_out(annotated_sets: int, held_out_sets: int, loop: LoopPolicy) -> bool:
    """Whether the set that is being answered is kept from training, for the guard.

    The counts are of answered sets in the buffer, this one included in the first. The first one
    is held out, then one in ``heldout_every``; what leaves the buffer is made up for.
    """
    return held_out_sets * loop.heldout_every < annotated_sets
