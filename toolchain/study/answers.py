"""What a simulated user answers, by the cell, the seed and the dialogue's id alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.metrics import rouge1
from runtime_py.loop.words import words

ADEQUATE = 0.3  # ROUGE-1 of a draft that the user "adequate" lets pass
ERRS = 0.1  # of the answers of the user "errs" belong to another dialogue
SHORT = 0.5  # of the reference's words that the user "short" writes

Drafts = Callable[[Sequence[Dialogue]], Sequence[str]]  # the model's own replies


def chance_of(seed: int, id: str, what: str) -> float:
    """A number in [0, 1) that is always the same for the same three."""
    digest = hashlib.sha256(f"{seed}:{what}:{id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2.0**64


def answers_of(
    user: str,
    asked: Sequence[Dialogue],
    seed: int,
    rate: float,
    drafts: Drafts,
    stream: Sequence[Dialogue],
) -> Mapping[str, str]:
    """By id; who does not answer is left out. The last reply of each dialogue is the reference;
    ``user``: a name in ``cells.USERS``; ``rate``: the part that is answered; ``stream``: dialogues
    whose answers are given by mistake."""
    answered = [d for d in asked if chance_of(seed, d.id, "answers") < rate]
    if user == "errs":
        return dict(_errs(answered, seed, stream))
    return dict(_USERS[user](answered, drafts))


Answers = Sequence[tuple[str, str]]


def _ideal(asked: Sequence[Dialogue], drafts: Drafts) -> Answers:
    return [(d.id, d.answer) for d in asked]


def _adequate(asked: Sequence[Dialogue], drafts: Drafts) -> Answers:
    return [
        (d.id, draft if draft and _near(d.answer, draft) else d.answer)
        for d, draft in zip(asked, drafts(asked), strict=True)
    ]


def _near(reference: str, draft: str) -> bool:
    return rouge1(words(reference), words(draft)) >= ADEQUATE


def _short(asked: Sequence[Dialogue], drafts: Drafts) -> Answers:
    shortened = []
    for d in asked:
        parts = d.answer.split()
        shortened.append((d.id, " ".join(parts[: max(1, int(SHORT * len(parts)))])))
    return shortened


def _errs(asked: Sequence[Dialogue], seed: int, stream: Sequence[Dialogue]) -> Answers:
    """Drawn by the question's own id, so that it does not matter how many are asked at once."""
    given = []
    for d in asked:
        wrong = chance_of(seed, d.id, "errs") < ERRS
        others = [one for one in stream if one.id != d.id] if wrong else []
        place = int(chance_of(seed, d.id, "whose") * len(others))
        given.append((d.id, others[place].answer if others else d.answer))
    return given


_USERS: Mapping[str, Callable[[Sequence[Dialogue], Drafts], Answers]] = {
    "ideal": _ideal,
    "adequate": _adequate,
    "short": _short,
}
