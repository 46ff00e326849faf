"""Answered sets that are like a conversation, put before it: what was answered helps at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime_py.loop.buffer import Buffer
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.metrics import direction
from runtime_py.loop.neighbours import coarse


def recalled(
    answered: Sequence[Dialogue], buffer: Buffer, pooled: np.ndarray, most: int
) -> tuple[Turn, ...]:
    """The exchanges of the ``most`` sets of ``answered``, in the order of their answers, that are
    closest to the vector ``pooled`` [hidden]; the later of equals. The result keeps the order."""
    heading = coarse(direction(pooled, buffer.mean)).astype(np.int64)
    ranked = []
    for place, dialogue in enumerate(answered):
        bin = buffer.bin_of(dialogue.id)
        if bin is not None:
            closeness = int(heading @ coarse(buffer.directions[bin]).astype(np.int64))
            ranked.append((closeness, place))
    places = sorted(place for _, place in sorted(ranked, reverse=True)[:most])
    return tuple(turn for place in places for turn in answered[place].turns[-2:])
