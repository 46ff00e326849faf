"""What the phone's process is to live through: written by the parent, read by each child."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.stream import read_stream
from toolchain.simulate.device import Device

STATE = "phone"  # in the run's folder: what the app keeps


@dataclass(frozen=True)
class LifePlan:
    """``places``: dialogues of the stream that are lived; ``probes``: how many of them the model
    answers by itself too, for ROUGE-1. ``model_replies``: the assistant's last turn is the model's
    own, and the stream's is what the user would rather have. ``lean``: see ``PhoneEngine``."""

    __pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    bundle: Path
    stream: Path
    folder: Path
    device: Device
    policy: LoopPolicy
    lexicons: Path | None
    places: int
    answer_rate: float
    seed: int
    probes: int
    model_replies: bool
    threads: int
    lean: bool

    @property
    def state(self) -> Path:
        """The app's folder."""
        return self.folder / STATE

    def dialogues(self) -> Iterator[Dialogue]:
        """The stream's sound dialogues; the others were named before the run began."""
        records = read_stream(self.stream, refuse=lambda error: None)
        return (record.dialogue for record in itertools.islice(records, self.places))

    def to_json(self) -> bytes:
        return _ADAPTER.dump_json(self)

    @staticmethod
    def from_json(text: bytes) -> LifePlan:
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(LifePlan)
