"""The log's lines, and what they prove: replayed, they give the buffer that the store holds.

``kept`` and ``refused`` have the scores and why; the log never has a dialogue's text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from runtime_py.loop.buffer import Scores
from runtime_py.loop.errors import LoopError
from runtime_py.loop.exchanges import NotAsked

Event = Literal[
    "store_made",
    "policy_changed",
    "streams_restarted",
    "tallies_restarted",
    "kept",
    "refused",
    "asked",
    "lapsed",
    "answered",
    "synthesized",
    "not_synthesized",
    "job_begun",
    "job_shortened",
    "job_abandoned",
    "adapter_accepted",
    "adapter_rejected",
    "adapter_damaged",
    "rolled_back",
    "forgotten",
    "recovered",
]
"""What a line can tell; docs/semantics.md has the data of each."""


@dataclass(frozen=True)
class LogLine:
    """``seq`` counts from 1. ``id``: the dialogue set, where there is one."""

    seq: int
    seconds: float
    day: int
    event: str
    id: str | None
    data: dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """What became of an observed set. ``bin`` is None where it was not kept; ``scores`` and
    ``domain`` are None where it was too large to be measured. ``dropped``: turns cut off.
    ``exchange``: which of the set's the user is asked about at once, from 0; ``not_asked``: why
    none is; one of the two is None."""

    id: str
    number: int
    bin: int | None
    reason: str
    candidates: int
    replaced: str | None
    scores: Scores | None
    domain: str | None
    dropped: int
    exchange: int | None
    not_asked: NotAsked | None

    @property
    def asked(self) -> bool:
        return self.not_asked is None

    @property
    def kept(self) -> bool:
        return self.bin is not None

    def data(self) -> dict[str, Any]:
        """As it stands in the log; the id has a column of its own."""
        scores = self.scores
        return {
            "number": self.number,
            "bin": self.bin,
            "reason": self.reason,
            "candidates": self.candidates,
            "replaced": self.replaced,
            "eoe": scores.eoe if scores else None,
            "dss": scores.dss if scores else None,
            "idd": scores.idd if scores else None,
            "domain": self.domain,
            "dropped": self.dropped,
            "asked": self.asked,
            "exchange": self.exchange,
            "not_asked": self.not_asked,
        }


@dataclass(frozen=True)
class Bin:
    """A bin without its text and vector."""

    id: str
    number: int
    scores: Scores
    domain: str


def replay(log: Iterable[LogLine]) -> dict[int, Bin]:
    """The buffer's contents by bin, from nothing but the log.

    Raises ``LoopError`` where a line contradicts those before it.
    """
    bins: dict[int, Bin] = {}
    lines = list(log)
    recovered = [place for place, line in enumerate(lines) if line.event == "recovered"]
    for line in lines[recovered[-1] if recovered else 0 :]:
        data = line.data
        if line.event == "recovered":  # the lines before it may have gaps; it has what was left
            bins = {int(bin): _bin(held["id"], held) for bin, held in data["bins"].items()}
        elif line.event == "kept":
            bin = data["bin"]
            held = bins[bin].id if bin in bins else None
            if held != data["replaced"]:
                raise LoopError(
                    f"line {line.seq} of the log replaces {data['replaced']!r} in bin {bin}, which "
                    f"holds {held!r} by the lines before it; the log is not whole."
                )
            bins[bin] = _bin(str(line.id), data)
        elif line.event == "forgotten":
            bins = {bin: held for bin, held in bins.items() if held.id != line.id}
    return bins


def _bin(id: str, data: dict[str, Any]) -> Bin:
    return Bin(id, data["number"], Scores(data["eoe"], data["dss"], data["idd"]), data["domain"])
