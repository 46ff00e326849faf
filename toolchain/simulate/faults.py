"""What goes wrong on the simulated phone, and when: drawn from a seed before the run begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime_py.loop.random_stream import SplitMix64

Kind = Literal["kill", "full_disk", "low_memory"]
_LONGEST_FUSE_S = {"dialogue": 0.25, "night": 2.0}


@dataclass(frozen=True)
class Fault:
    """Strikes ``fuse_s`` after the child has said ``trigger`` of a place at or after ``place``."""

    kind: Kind
    trigger: Literal["dialogue", "night", "step"]
    place: int
    fuse_s: float


def draw(kills: int, full_disk: bool, low_memory: bool, places: int, seed: int) -> list[Fault]:
    """Every other kill strikes in a night, where the work is; the others at any dialogue."""
    chance = SplitMix64(seed ^ 0x6661756C74)  # not the loop's own numbers
    found: list[Fault] = []
    for number in range(kills):
        trigger: Literal["dialogue", "night"] = "night" if number % 2 else "dialogue"
        fuse = _fraction(chance) * _LONGEST_FUSE_S[trigger]
        found.append(Fault("kill", trigger, 1 + chance.below(places), fuse))
    if full_disk:
        found.append(Fault("full_disk", "dialogue", 1 + chance.below(places), 0.0))
    if low_memory:
        found.append(Fault("low_memory", "step", 0, 0.0))
    return found


def _fraction(chance: SplitMix64) -> float:
    return (chance.next() >> 11) * 2.0**-53
