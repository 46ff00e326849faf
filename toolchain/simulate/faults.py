"""What goes wrong on the simulated phone, and when: drawn from a seed before the run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime_py.loop.random_stream import SplitMix64
from toolchain.simulate.events import PhoneEvent

PlannedKind = Literal["kill", "full_disk", "low_memory"]
_LONGEST_FUSE_S = {"dialogue": 0.25, "night": 2.0}


@dataclass(frozen=True)
class Fault:
    """Strikes ``fuse_s`` after the ``trigger``, an event, of a place at or after ``place``."""

    kind: PlannedKind
    trigger: Literal["dialogue", "night", "step"]
    place: int
    fuse_s: float


class FaultSchedule:
    """Faults that wait for their trigger, and then for their fuse to burn."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._waiting = list(faults)
        self._burning: list[tuple[float, Fault]] = []

    def light(self, event: PhoneEvent, place: int, now: float) -> None:
        """Starts the fuses of the faults that ``event`` after dialogue ``place`` triggers."""
        for fault in list(self._waiting):
            if fault.trigger == event.event and place >= fault.place:
                self._waiting.remove(fault)
                self._burning.append((now + fault.fuse_s, fault))

    def take_due(self, now: float) -> Fault | None:
        """A fault whose fuse has burnt down by ``now``; each is given once."""
        for entry in self._burning:
            if entry[0] <= now:
                self._burning.remove(entry)
                return entry[1]
        return None


def draw(kills: int, full_disk: bool, low_memory: bool, places: int, seed: int) -> list[Fault]:
    """Every other kill strikes in a night, where the work is; the others at any dialogue."""
    chance = SplitMix64(seed ^ 0x6661756C74)  # not the loop's numbers
    faults: list[Fault] = []
    for number in range(kills):
        trigger: Literal["dialogue", "night"] = "night" if number % 2 else "dialogue"
        fuse = _fraction(chance) * _LONGEST_FUSE_S[trigger]
        faults.append(Fault("kill", trigger, 1 + chance.below(places), fuse))
    if full_disk:
        faults.append(Fault("full_disk", "dialogue", 1 + chance.below(places), 0.0))
    if low_memory:
        faults.append(Fault("low_memory", "step", 0, 0.0))
    return faults


def _fraction(chance: SplitMix64) -> float:
    return (chance.next() >> 11) * 2.0**-53
