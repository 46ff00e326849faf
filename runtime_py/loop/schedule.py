"""When fine-tuning is due, and whether the device allows it now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime_py.loop.policy import LoopPolicy


@dataclass(frozen=True)
class Conditions:
    """The device as it is now. ``free_memory_mb`` is what the app may still take."""

    charging: bool
    idle: bool
    celsius: float
    free_memory_mb: int


@dataclass(frozen=True)
class Moment:
    """What a clock gives: seconds since any fixed time, and the number of the user's day."""

    seconds: float
    day: int


def is_due(observed: int, last: int, loop: LoopPolicy) -> bool:
    """``last``: how many sets had been observed when the last fine-tuning began."""
    return observed - last >= loop.fine_tune_every_sets


def obstacles(conditions: Conditions, loop: LoopPolicy) -> list[str]:
    """Why the device does not allow fine-tuning now; memory is ``sequence_tokens``'s matter."""
    reasons = []
    if loop.must_charge and not conditions.charging:
        reasons.append("the device is not charging")
    if loop.must_idle and not conditions.idle:
        reasons.append("the device is in use")
    if not conditions.celsius <= loop.hottest_celsius:
        reasons.append(f"the device has {conditions.celsius:g} °C, over {loop.hottest_celsius:g}")
    return reasons


def sequence_tokens(
    lengths: Sequence[int], longest: int, free_memory_mb: int, loop: LoopPolicy
) -> int | None:
    """The most tokens, at most ``longest``, that a program of ``lengths`` takes and whose need is
    free; None where not even the policy's shortest are.

    The need is taken as proportional to the length, ``fine_tune_memory_mb`` at the policy's
    longest.
    """
    lowest = min(loop.shortest_sequence_tokens, longest)
    for tokens in sorted({min(length, longest) for length in lengths}, reverse=True):
        free = free_memory_mb * loop.longest_sequence_tokens
        if tokens >= lowest and loop.fine_tune_memory_mb * tokens <= free:
            return tokens
    return None


def next_shorter(lengths: Sequence[int], tokens: int, loop: LoopPolicy) -> int | None:
    """The longest program that is shorter than ``tokens``; None below the policy's shortest."""
    return max(
        (length for length in lengths if loop.shortest_sequence_tokens <= length < tokens),
        default=None,
    )
