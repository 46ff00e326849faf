"""The simulated user: which questions are answered, by the seed and the dialogue's id alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class User:
    """``rate``: the part of the questions that is answered, 0 to 1."""

    seed: int
    rate: float

    def answers(self, id: str) -> bool:
        """The same whenever and however often it is asked."""
        digest = hashlib.sha256(f"{self.seed}:{id}".encode()).digest()
        return int.from_bytes(digest[:8], "little") < self.rate * 2.0**64
