"""What a run of the simulated phone came to, and its form as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime_py.bundle.manifest import Manifest
from toolchain.simulate.device import Device
from toolchain.simulate.estimate import Estimate
from toolchain.simulate.life_plan import LifePlan
from toolchain.simulate.run_record import RunRecord
from toolchain.simulate.unseen import Unseen


@dataclass(frozen=True)
class StreamScan:
    """``blocks``: for each dialogue the name of the part of the stream that it belongs to;
    ``bad``: sentences about lines that were left out."""

    path: Path
    blocks: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class StreamBlock:
    """Consecutive dialogues of one name."""

    name: str
    first: int
    observed: int
    kept: int

    @property
    def rate(self) -> float:
        """The part that was kept."""
        return self.kept / self.observed


@dataclass(frozen=True)
class TuningOutcome:
    """A fine-tuning that ended; losses in nats a label. ``forgetting``: what the adapter, with
    every B times ``scale``, adds to the general text's perplexity, as a part; None: not measured.
    """

    job: int
    place: int
    day: int
    accepted: bool
    before: float
    after: float
    losses: tuple[float, ...]
    scale: float = 1.0
    forgetting: float | None = None


@dataclass(frozen=True)
class NightOutcome:
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
class ScoredDialogue:
    """A dialogue's fate, as the log has it; scores None where it was too large to be measured."""

    place: int
    kept: bool
    domain: str | None
    eoe: float | None
    dss: float | None
    idd: float | None


@dataclass(frozen=True)
class TextExample:
    """``kind``: kept, refused or synthesized."""

    kind: str
    title: str
    question: str
    answer: str


@dataclass(frozen=True)
class Occupancy:
    """``counts``: how many sets of each of ``domains`` the buffer has after every dialogue."""

    domains: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class SimulationOutcome:
    """``overhead_ms``: the median of what selection takes beyond the embedding. ``embed_ms`` and
    ``tokens_per_second`` are of this machine, ``day_hours`` are modelled."""

    plan: LifePlan
    manifest: Manifest
    stream: StreamScan
    estimate: Estimate
    record: RunRecord
    counts: dict[str, int]
    lost: tuple[str, ...]
    blocks: tuple[StreamBlock, ...]
    tunings: tuple[TuningOutcome, ...]
    nights: tuple[NightOutcome, ...]
    scored: tuple[ScoredDialogue, ...]
    rouge1: tuple[tuple[int, float], ...]
    examples: tuple[TextExample, ...]
    occupancy: Occupancy
    overhead_ms: float
    embed_ms: float
    tokens_per_second: float
    day_hours: float
    unseen: Unseen | None = None  # where tests were given, and the life did not end early

    @property
    def device(self) -> Device:
        return self.plan.device

    @property
    def modelled_hours(self) -> float:
        """Of days and nights."""
        return sum(night.hours for night in self.nights) + self.day_hours

    @property
    def watt_hours(self) -> float:
        """Modelled, of days and nights."""
        nights = sum(night.watt_hours for night in self.nights)
        return nights + self.day_hours * self.device.power.watts

    @property
    def storage_mb(self) -> float:
        """Really used, on the last morning."""
        return self.nights[-1].storage_mb if self.nights else 0.0

    @property
    def heldout(self) -> tuple[float | None, float | None]:
        """Before and after the last accepted fine-tuning, on the same sets; where none was
        accepted, of the last one."""
        last = self.last_tuning
        return (last.before, last.after) if last else (None, None)

    @property
    def last_tuning(self) -> TuningOutcome | None:
        """The last accepted one; where none was accepted, the last one with losses."""
        measured = [one for one in self.tunings if math.isfinite(one.before + one.after)]
        accepted = [one for one in measured if one.accepted]
        return next(reversed(accepted or measured), None)

    def count(self, name: str) -> int:
        """One of the store's counters."""
        return self.counts.get(name, 0)

    def as_json(self) -> dict[str, Any]:
        """Everything that the report has as numbers, for machines."""
        record, device = self.record, self.device
        return {
            "bundle": str(self.plan.bundle),
            "model": self.manifest.model.name,
            "device": device.name,
            "stream": str(self.stream.path),
            "ended": record.ended,
            "observed": self.count("observed"),
            "kept": self.count("kept"),
            "questions": self.count("asked"),
            "answered": self.count("answered"),
            "synthesized": self.count("synthesized"),
            "fine_tunes": self.count("fine_tunes"),
            "adapters_accepted": self.count("adapters_accepted"),
            "peak_memory_mb": record.peak / 1e6,
            "memory_limit_mb": device.memory.app_mb,
            "memory_estimate_mb": self.estimate.within(device.memory.app_mb),
            "python_mb": record.python / 1e6,
            "cores": {"device": device.compute.cores, "enforced": record.cores},
            "storage_mb": self.storage_mb,
            "storage_limit_mb": device.storage.app_mb,
            "faults": len(record.faults),
            "recoveries": record.recoveries,
            "fault_list": [asdict(fault) for fault in record.faults],
            "lost": len(self.lost),
            "lost_ids": list(self.lost),
            "modelled": {
                "hours": self.modelled_hours,
                "watt_hours": self.watt_hours,
                "nights": [_without(asdict(night), *_LONG) for night in self.nights],
            },
            "heldout_loss_before": self.heldout[0],
            "heldout_loss_after": self.heldout[1],
            "fine_tuning": [_finite(asdict(one)) for one in self.tunings],
            "unseen": None if self.unseen is None else asdict(self.unseen),
            "acceptance": [{**asdict(block), "rate": block.rate} for block in self.blocks],
            "rouge1": [list(point) for point in self.rouge1],
            "selection_overhead_ms": self.overhead_ms,
            "embedding": {
                "milliseconds": self.embed_ms,
                "tokens_per_second": self.tokens_per_second,
            },
            "bad_lines": len(self.stream.bad),
            "seconds": record.seconds,
        }


_LONG = ("domains", "storage_mb")  # of a night, for the pictures


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities and no NaN: None in their place."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }
