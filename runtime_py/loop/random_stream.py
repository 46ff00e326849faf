"""The loop's only source of chance: SplitMix64, whose whole state is one 64-bit number.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

from dataclasses import dataclass

STREAMS = ("selection", "synthesis", "training", "asking")
"""The loop's streams; each starts with the policy's seed plus its place here."""

_MASK = (1 << 64) - 1


@dataclass
class SplitMix64:
    """``state`` is all there is to save. Two with the same state give the same numbers."""

    state: int

    def next(self) -> int:
        """The next number in [0, 2^64)."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """A number in [0, n), each as likely: what lies past the last multiple of n is redrawn."""
        if not 1 <= n <= 1 << 64:
            raise ValueError(f"cannot draw from [0, {n}); expected 1 to 2^64.")
        limit = (1 << 64) - (1 << 64) % n
        while (value := self.next()) >= limit:
            pass
        return value % n

    def seed(self) -> int:
        """A number in [0, 2^63), which every language can hold in a signed integer."""
        return self.next() >> 1
