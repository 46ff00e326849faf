"""What a run of the simulated phone came to, and its form as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime_py.bundle.manifest import Manifest
from toolchain.simulate.device import Device
from toolchain.simulate.estimate import Estimate
from toolchain.simulate.life import Life
from toolchain.simulate.watcher import Watched


@dataclass(frozen=True)
class Stream:
    """``blocks``: for each dialogue the name of the part of the stream that it belongs to;
    ``bad``: sentences about lines that were left out."""

    path: Path
    blocks: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Consecutive dialogues of one name."""

    name: str
    first: int
    observed: int
    kept: int


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning that ended; losses in nats a label."""

    job: int
    place: int
    day: int
    accepted: bool
    before: float
    after: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Night:
    """Modelled. ``hours`` with the pauses for heat; ``battery``: watt-hours as a part of a full
    battery; ``storage``: MB really used in the morning."""

    day: int
    state: str
    hours: float
    watt_hours: float
    battery: float
    storage_mb: float
    domains: dict[str, int]
    place: int


@dataclass(frozen=True)
class Scored:
    """A dialogue's fate, as the log has it; scores None where it was too large to be measured."""

    place: int
    kept: bool
    domain: str | None
    eoe: float | None
    dss: float | None
    idd: float | None


@dataclass(frozen=True)
class Example:
    """``kind``: kept, refused or synthesized."""

    kind: str
    title: str
    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class Outcome:
    """``occupancy``: domains, and how many sets of each the buffer has after every dialogue;
    ``overhead_ms``: the median of what selection takes beyond the embedding. ``embed_ms`` and
    ``tokens_per_second`` are of this machine, ``day_hours`` are modelled."""

    life: Life
    device: Device
    manifest: Manifest
    stream: Stream
    estimate: Estimate
    watched: Watched
    counts: dict[str, int]
    lost: tuple[str, ...]
    blocks: tuple[Block, ...]
    tunings: tuple[Tuning, ...]
    nights: tuple[Night, ...]
    scored: tuple[Scored, ...]
    rouge1: tuple[tuple[int, float], ...]
    examples: tuple[Example, ...]
    occupancy: tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
    overhead_ms: float
    embed_ms: float
    tokens_per_second: float
    day_hours: float

    @property
    def nightly_hours(self) -> float:
        return sum(night.hours for night in self.nights)

    def as_json(self) -> dict[str, Any]:
        watched, device = self.watched, self.device
        watts = device.power.watts
        night_wh = sum(night.watt_hours for night in self.nights)
        return {
            "bundle": self.life.bundle,
            "model": self.manifest.model.name,
            "device": device.name,
            "stream": str(self.stream.path),
            "ended": watched.ended,
            "observed": self.counts.get("observed", 0),
            "kept": self.counts.get("kept", 0),
            "questions": self.counts.get("asked", 0),
            "answered": self.counts.get("answered", 0),
            "synthesized": self.counts.get("synthesized", 0),
            "fine_tunes": self.counts.get("fine_tunes", 0),
            "adapters_accepted": self.counts.get("adapters_accepted", 0),
            "peak_memory_mb": watched.peak / 1e6,
            "memory_limit_mb": device.memory.app_mb,
            "memory_estimate_mb": self.estimate.within(device.memory.app_mb),
            "python_mb": watched.python / 1e6,
            "cores": {"device": device.compute.cores, "enforced": watched.cores},
            "storage_mb": self.nights[-1].storage_mb if self.nights else 0.0,
            "storage_limit_mb": device.storage.app_mb,
            "faults": len(watched.faults),
            "recoveries": watched.recoveries,
            "fault_list": [asdict(fault) for fault in watched.faults],
            "lost": len(self.lost),
            "lost_ids": list(self.lost),
            "modelled": {
                "hours": self.nightly_hours + self.day_hours,
                "watt_hours": night_wh + self.day_hours * watts,
                "nights": [
                    {k: v for k, v in asdict(night).items() if k not in ("domains", "storage_mb")}
                    for night in self.nights
                ],
            },
            "heldout_loss_before": self.heldout[0],
            "heldout_loss_after": self.heldout[1],
            "fine_tuning": [_finite(asdict(one)) for one in self.tunings],
            "acceptance": [
                {**asdict(block), "rate": block.kept / block.observed} for block in self.blocks
            ],
            "rouge1": [list(point) for point in self.rouge1],
            "selection_overhead_ms": self.overhead_ms,
            "embedding": {
                "milliseconds": self.embed_ms,
                "tokens_per_second": self.tokens_per_second,
            },
            "bad_lines": len(self.stream.bad),
            "seconds": watched.seconds,
        }

    @property
    def heldout(self) -> tuple[float | None, float | None]:
        """Before and after the last accepted fine-tuning, on the same sets; where none was
        accepted, of the last one."""
        measured = [one for one in self.tunings if math.isfinite(one.before + one.after)]
        accepted = [one for one in measured if one.accepted]
        last = (accepted or measured)[-1:]
        return (last[0].before, last[0].after) if last else (None, None)


def _number(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) for key, value in fields.items()}
