"""What the watcher of the phone's processes has seen when a run is over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from toolchain.simulate.events import PhoneEvent
from toolchain.simulate.faults import PlannedKind

FaultKind = PlannedKind | Literal["crash", "memory_limit"]


@dataclass(frozen=True)
class FaultRecord:
    """A fault that came to pass, after dialogue ``place``; ``how`` it was got over, if it was."""

    kind: FaultKind
    place: int
    seconds: float
    how: str | None = None


@dataclass(frozen=True)
class MemorySample:
    """Resident memory above what Python had, in bytes."""

    seconds: float
    resident: int


@dataclass
class RunRecord:
    """``events`` of all processes, in order. ``peak``: the highest resident memory above what
    Python had, bytes; ``python``: that. ``ended``: why it ended early, a sentence."""

    events: list[PhoneEvent] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    samples: list[MemorySample] = field(default_factory=list)
    peak: int = 0
    cores: int = 0
    python: int = 0
    seconds: float = 0.0
    ended: str | None = None

    @property
    def recoveries(self) -> int:
        return sum(fault.how is not None for fault in self.faults)
