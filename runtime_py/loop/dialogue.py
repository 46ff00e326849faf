"""Dialogue sets: ordered turns with an id, checked once where they enter."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from runtime_py.loop.errors import LoopError

Role = Literal["user", "assistant"]

LONGEST_ID = 256  # characters
_TURN_BYTES = 5  # a role and a length beside each content
ALLOWED_CONTROLS = "\t\n\r\x85"
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode's categories Cc and Cs


@dataclass(frozen=True)
class Turn:
    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """Turns alternate, start with the user and end with the assistant (``check``)."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        return "\n".join(turn.content for turn in self.turns)

    @property
    def question(self) -> str:
        """The last thing that the user said."""
        return self.turns[-2].content

    @property
    def answer(self) -> str:
        """The assistant's last turn."""
        return self.turns[-1].content

    @property
    def exchanges(self) -> int:
        """How many: a user's turn and the assistant's are one."""
        return len(self.turns) // 2

    def exchange(self, number: int) -> tuple[Turn, ...]:
        """The two turns of the exchange ``number``, from 0."""
        return self.turns[2 * number : 2 * number + 2]

    def up_to(self, number: int) -> Dialogue:
        """The head that ends with the exchange ``number``."""
        return Dialogue(self.id, self.turns[: 2 * number + 2])

    def with_reply(self, number: int, text: str) -> Dialogue:
        """``text`` in place of the assistant's turn of the exchange ``number``."""
        place = 2 * number + 1
        turns = (*self.turns[:place], Turn("assistant", text), *self.turns[place + 1 :])
        return Dialogue(self.id, turns)

    def with_answer(self, text: str) -> Dialogue:
        return Dialogue(self.id, (*self.turns[:-1], Turn("assistant", text)))

    def with_exchange(self, id: str, question: str, answer: str) -> Dialogue:
        """The same dialogue under another id, its last exchange put in other words."""
        last = (Turn("user", question), Turn("assistant", answer))
        return Dialogue(id, (*self.turns[:-2], *last))

    @property
    def bytes(self) -> int:
        """What the turns take in a bin: UTF-8, and five bytes a turn."""
        return sum(len(turn.content.encode()) + _TURN_BYTES for turn in self.turns)


def check_id(id: object) -> str:
    if not isinstance(id, str) or not id or len(id) > LONGEST_ID:
        raise LoopError(
            f"a dialogue's id is {id!r:.80}; expected a string of 1 to {LONGEST_ID} characters."
        )
    _check_characters(id, "the id of a dialogue", allowed="")
    return id


def check_text(text: object, where: str) -> str:
    """A turn's content: not blank, encodable as UTF-8, and no control characters."""
    if not isinstance(text, str):
        raise LoopError(f"{where} has the content {text!r:.80}; expected a string.")
    if not text.strip():
        raise LoopError(f"{where} is empty; expected text. Leave the turn out.")
    _check_characters(text, where, ALLOWED_CONTROLS)
    return text


def check(dialogue: Dialogue) -> Dialogue:
    """Raises ``LoopError`` for the first thing that makes ``dialogue`` unusable."""
    check_id(dialogue.id)
    name = f"dialogue {dialogue.id!r}"
    if not dialogue.turns:
        raise LoopError(f"{name} has no turns; expected a user's turn and an assistant's.")
    for number, turn in enumerate(dialogue.turns, start=1):
        expected = "user" if number % 2 else "assistant"
        if turn.role != expected:
            raise LoopError(
                f"turn {number} of {name} has the role {turn.role!r:.40}; expected {expected!r}: "
                f"turns alternate and start with the user."
            )
        check_text(turn.content, f"turn {number} of {name}")
    if len(dialogue.turns) % 2:
        raise LoopError(
            f"{name} ends with a user's turn; expected an assistant's. Observe it after the reply."
        )
    return dialogue


def cut(dialogue: Dialogue, room: int) -> Dialogue | None:
    """The longest head of whole exchanges that takes at most ``room`` bytes; None if none does."""
    used, keep = 0, 0
    for end in range(2, len(dialogue.turns) + 1, 2):
        used += Dialogue(dialogue.id, dialogue.turns[end - 2 : end]).bytes
        if used > room:
            break
        keep = end
    if keep == len(dialogue.turns):
        return dialogue
    return Dialogue(dialogue.id, dialogue.turns[:keep]) if keep else None


def turns_to_json(turns: tuple[Turn, ...]) -> str:
    """``[["user", "…"], ["assistant", "…"]]``, as the store keeps it."""
    return json.dumps([[t.role, t.content] for t in turns], ensure_ascii=False)


def turns_from_json(text: str) -> tuple[Turn, ...]:
    return tuple(Turn(role, content) for role, content in json.loads(text))


def unusable_character(text: str, allowed: str = ALLOWED_CONTROLS) -> re.Match[str] | None:
    """The first lone surrogate or control character that is not ``allowed``."""
    return next((found for found in _ODD.finditer(text) if found[0] not in allowed), None)


def _check_characters(text: str, where: str, allowed: str) -> None:
    found = unusable_character(text, allowed)
    if found is None:
        return
    number, place = f"U+{ord(found[0]):04X}", f"at character {found.start() + 1}"
    if found[0] >= "\ud800":
        raise LoopError(
            f"{where} has a lone surrogate ({number}) {place}, which is not valid UTF-8; expected "
            f"Unicode text."
        )
    raise LoopError(
        f"{where} has the control character {number} {place}; expected only tabs and line breaks. "
        f"Remove it."
    )
