"""What is learned from a set: the exchange that was answered, with as much before it as fits.

A set whose exchange alone does not fit can never be learned, so nobody is asked about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.policy import LoopPolicy


@dataclass(frozen=True)
class Capacity:
    """``tokens``: how many learning the last reply of a dialogue reads; ``longest``: how many it
    may read."""

    tokens: Callable[[Dialogue], int]
    longest: int

    def within(self, longest: int) -> Capacity:
        """With at most so many tokens."""
        return Capacity(self.tokens, min(self.longest, longest))


def longest_lesson(lengths: Sequence[int], loop: LoopPolicy) -> int:
    """Tokens that can be learned at once; ``lengths``: of the training programs."""
    return min(loop.longest_sequence_tokens, max(lengths))


def lesson(dialogue: Dialogue, capacity: Capacity, exchange: int | None = None) -> Dialogue | None:
    """The turns up to ``exchange``, counted from 0 (None: the last), without the oldest exchanges
    that are too many; its last reply is what is learned. None: that exchange alone is too long.
    """
    end = len(dialogue.turns) if exchange is None else 2 * exchange + 2
    for first in range(0, end, 2):
        shorter = Dialogue(dialogue.id, dialogue.turns[first:end])
        if capacity.tokens(shorter) <= capacity.longest:
            return shorter
    return None
