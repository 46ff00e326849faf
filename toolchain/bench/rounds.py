"""Interleaved timing: every engine once a round, so that a busy machine is unfair to none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from toolchain.bench.engines import GenerationEngine

Measurement = Callable[[GenerationEngine], float]  # -> seconds


class Named(Protocol):
    @property
    def name(self) -> str: ...


Contestant = TypeVar("Contestant", bound=Named)


@dataclass(frozen=True)
class Timing:
    """One engine's rounds: seconds of each, for ``tokens`` tokens."""

    seconds: tuple[float, ...]
    tokens: int

    @property
    def median(self) -> float:
        """Tokens a second."""
        return self.tokens / statistics.median(self.seconds)

    def as_json(self) -> dict:
        return {
            "tokens_per_second": self.median,
            "slowest": self.tokens / max(self.seconds),
            "fastest": self.tokens / min(self.seconds),
            "rounds": [self.tokens / s for s in self.seconds],
        }


def decode(prompt: Sequence[int], continuation: Sequence[int]) -> Measurement:
    """Seconds of reading ``continuation`` one token a call, after ``prompt``."""

    def measure(engine: GenerationEngine) -> float:
        engine.prefill(prompt)
        begin = time.perf_counter()
        for token in continuation:
            engine.step(token)
        return time.perf_counter() - begin

    return measure


def prefill(prompt: Sequence[int]) -> Measurement:
    """Seconds of reading ``prompt``."""

    def measure(engine: GenerationEngine) -> float:
        begin = time.perf_counter()
        engine.prefill(prompt)
        return time.perf_counter() - begin

    return measure


def interleave(
    engines: Mapping[str, Contestant],
    measure: Callable[[Contestant], float],
    rounds: int,
    tokens: int,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Measures each engine once a round, after one round that does not count. ``progress`` is told
    the engine before each measurement."""
    seconds: dict[str, list[float]] = {key: [] for key in engines}
    for turn in range(rounds + 1):
        for key, engine in engines.items():
            progress(engine.name)
            taken = measure(engine)
            if turn > 0:
                seconds[key].append(taken)
    return {key: Timing(tuple(values), tokens) for key, values in seconds.items()}


def ratio(one: Timing, other: Timing) -> float:
    """How many times as fast ``one`` is: the median over rounds, each round compared with itself,
    since what slows one round down slows both."""
    pairs = zip(one.seconds, other.seconds, strict=True)
    return statistics.median(other_s / one_s for one_s, other_s in pairs)
