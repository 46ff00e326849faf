"""Dialogues as tokens with labels: what the assistant said is learned, nothing else.

Either all of its turns, or the last alone: what a user was asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """The dialogue by the chat template, with the assistant's contents and the token that ends
    each of them as labels; with ``last_only`` those of its last turn. Raises ``TrainingError``
    where nothing in it can be learned."""
    spans = text.assistant_spans(dialogue.turns, last_only)
    if not spans:
        raise TrainingError(
            f"dialogue {dialogue.id} has no assistant turn, so there is nothing to learn from it: "
            f"leave it out."
        )
    tokens, offsets = text.encode_with_offsets(text.render(dialogue.turns))
    labels = np.full(len(tokens), IGNORED, np.int64)
    for index, (begin, end) in enumerate(offsets):
        if begin == end and index:  # a tokenizer that trims spaces off a token's characters
            begin = offsets[index - 1][1]
        # A token that begins in the prompt and ends in the reply is the reply's.
        if end > begin and any(end > start and begin < stop for start, stop in spans):
            labels[index] = tokens[index]
    labels[0] = IGNORED  # nothing comes before it
    if not (labels != IGNORED).any():
        raise TrainingError(
            f"dialogue {dialogue.id} has no token that the assistant said: leave it out."
        )
    return Example(dialogue.id, np.asarray(tokens, np.int64), labels)


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
    """Examples that fit the programs; ids of dialogues that were cut, and of those left out."""

    examples: tuple[Example, ...]
    cut: tuple[str, ...]
    left_out: tuple[str, ...]


def fit(
    dialogues: Sequence[Dialogue], text: ChatText, longest: int, refuse_long: bool = False
) -> Fitted:
    """Every dialogue as an example of at most ``longest`` input tokens.

    A longer one is cut after the last exchange that fits, and left out where not even its first
    does; with ``refuse_long`` all too long are named in one ``TrainingError`` instead.
    """
    examples, cut, out = [], [], []
    for dialogue in dialogues:
        whole = example(dialogue, text)
        if whole.inputs <= longest:
            examples.append(whole)
            continue
        for turns in range(len(dialogue.turns) - 2, 1, -2):
            shorter = example(Dialogue(dialogue.id, dialogue.turns[:turns]), text)
            if shorter.inputs <= longest:
                examples.append(shorter)
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
    return Fitted(tuple(examples), tuple(cut), tuple(out))
