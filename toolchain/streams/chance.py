"""Streams of chance by a label: one more thing that is drawn changes nothing that was drawn before.

Everything here is integers, or floats by + − × ÷, so that every machine draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from runtime_py.loop.random_stream import SplitMix64

T = TypeVar("T")


def chance(seed: int, *label: object) -> SplitMix64:
    """A stream of its own for each seed and label: the first 64 bits, the lowest first, of the
    SHA-256 of both, joined by colons."""
    digest = hashlib.sha256(":".join(map(str, (seed, *label))).encode()).digest()
    return SplitMix64(int.from_bytes(digest[:8], "little"))


def shuffled(items: Sequence[T], stream: SplitMix64) -> list[T]:
    """Fisher and Yates, from the end (Knuth, The Art of Computer Programming 2, algorithm P)."""
    mixed = list(items)
    for last in range(len(mixed) - 1, 0, -1):
        other = stream.below(last + 1)
        mixed[last], mixed[other] = mixed[other], mixed[last]
    return mixed


def weighted(weights: Sequence[float], stream: SplitMix64) -> int:
    """A place, each as likely as its weight; at least one weight is more than 0."""
    left = stream.next() / 2.0**64 * sum(weights)
    chosen = 0
    for place, weight in enumerate(weights):
        if weight > 0.0:
            chosen = place
            if left < weight:
                break
            left -= weight
    return chosen


def apportioned(total: int, parts: Sequence[int]) -> list[int]:
    """``total`` in the proportion of ``parts``, whole numbers, by the largest remainders; the first
    of equal ones gets more."""
    whole = sum(parts)
    if whole == 0:
        return [0 for _ in parts]
    shares = [total * part // whole for part in parts]
    rest = sorted(range(len(parts)), key=lambda i: (-(total * parts[i] % whole), i))
    for place in rest[: total - sum(shares)]:
        shares[place] += 1
    return shares
