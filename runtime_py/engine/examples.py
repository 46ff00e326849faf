"""Dialogues as tokens with labels: what the assistant said is learned, nothing else.

Either all of its turns, or the last alone: what a user was asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime_py.bundle.chat_pieces import UNSAID
from runtime_py.bundle.chat_text import ChatText
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import TrainingError

IGNORED = -100  # PyTorch's label for positions that do not count


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence: ``tokens`` int64 [n]; ``labels`` int64 [n], the token itself where the
    assistant said it, ``IGNORED`` elsewhere. Token t + 1 is predicted from the tokens up to t.
    """

    id: str
    tokens: np.ndarray
    labels: np.ndarray

    @property
    def inputs(self) -> int:
        """Tokens that must be read: all before the last label."""
        return int(np.flatnonzero(self.labels != IGNORED)[-1])

    @property
    def count(self) -> int:
        """Labels."""
        return int((self.labels != IGNORED).sum())


def example(dialogue: Dialogue, text: ChatText, last_only: bool = False) -> Example:
    """The dialogue as one sequence, with what the assistant said and the token that ends each of
    its turns as labels; with ``last_only`` those of its last turn. Raises ``TrainingError`` where
    nothing in it can be learned, or its turns are not ``written_alike``."""
    if not last_only and not text.written_alike and dialogue.exchanges > 1:
        raise TrainingError(
            f"dialogue {dialogue.id} has {dialogue.exchanges} exchanges, and the model writes a "
            f"reply otherwise once more turns follow: learn each in a sequence of its own."
        )
    read = text.tokens(dialogue.turns)
    last = len(dialogue.turns) - 1
    tokens = np.asarray(read.ids, np.int64)
    said = np.asarray(read.said, np.int64)
    labels = np.where((said == last) if last_only else (said != UNSAID), tokens, IGNORED)
    labels[:1] = IGNORED  # nothing comes before it
    if not (labels != IGNORED).any():
        raise TrainingError(
            f"dialogue {dialogue.id} has no token that the assistant said: leave it out."
        )
    return Example(dialogue.id, tokens, labels)


def pack(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """Examples that share a call, each list at most ``capacity`` input tokens: first fit, in order.

    Packing is exact: within a call every example has its own positions and sees only itself.
    """
    packs: list[list[Example]] = []
    room: list[int] = []
    for one in examples:
        for index, left in enumerate(room):
            if one.inputs <= left:
                packs[index].append(one)
                room[index] -= one.inputs
                break
        else:
            packs.append([one])
            room.append(capacity - one.inputs)
    return packs


@dataclass(frozen=True)
class Fitted:
    """Examples that fit the programs, ``sets`` of them by dialogue; ids of dialogues that were cut,
    and of those left out."""

    sets: tuple[tuple[Example, ...], ...]
    cut: tuple[str, ...]
    left_out: tuple[str, ...]


def sequences(dialogue: Dialogue, text: ChatText) -> tuple[Example, ...]:
    """The dialogue as what teaches every turn of the assistant's: one sequence, or where the model
    writes a turn otherwise once more follow, one for each exchange. Raises ``TrainingError``."""
    if text.written_alike:
        return (example(dialogue, text),)
    heads = (dialogue.up_to(number) for number in range(dialogue.exchanges))
    return tuple(example(head, text, last_only=True) for head in heads)


def fit(
    dialogues: Sequence[Dialogue], text: ChatText, longest: int, refuse_long: bool = False
) -> Fitted:
    """Every dialogue as ``sequences`` of at most ``longest`` input tokens.

    A longer one is cut after the last exchange that fits, and left out where not even its first
    does; with ``refuse_long`` all too long are named in one ``TrainingError`` instead.
    """
    sets, cut, out = [], [], []
    for dialogue in dialogues:
        for exchanges in range(dialogue.exchanges, 0, -1):
            made = sequences(dialogue.up_to(exchanges - 1), text)
            if all(one.inputs <= longest for one in made):
                sets.append(made)
                if exchanges < dialogue.exchanges:
                    cut.append(dialogue.id)
                break
        else:
            out.append(dialogue.id)
    if refuse_long and (cut or out):
        raise TrainingError(
            f"{len(cut) + len(out)} dialogues are longer than the longest training program "
            f"({longest} tokens): {', '.join((*cut, *out)[:20])}. Shorten them, or leave out "
            f"--refuse-long to have them cut at a turn."
        )
    return Fitted(tuple(sets), tuple(cut), tuple(out))
