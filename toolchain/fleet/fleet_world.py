"""What a life needs from outside: a model with its loop, and what work costs on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import (
    AdapterBundle,
    Engine,
    FineTuneJob,
    FineTuner,
    FineTuneResult,
)
from runtime_py.loop.schedule import Moment
from toolchain.simulate.device import Device
from toolchain.study.cells import StudyPlace


class Costs(Protocol):
    """Modelled seconds of work on a phone, without the pauses that heat makes."""

    def embed(self, dialogue: Dialogue) -> float: ...

    def reply(self, messages: Sequence[Turn], text: str) -> float:
        """Reading ``messages`` and writing ``text``."""
        ...

    def training(self, job: FineTuneJob, result: FineTuneResult) -> float: ...


class FleetWorld(Protocol):
    """A model and its loop, opened once in each worker."""

    @property
    def policy(self) -> LoopPolicy:
        """The bundle's."""
        ...

    @property
    def bundle(self) -> AdapterBundle: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def tuner(self) -> FineTuner: ...

    def loop(
        self,
        folder: Path,
        policy: LoopPolicy,
        engine: Engine,
        tuner: FineTuner,
        clock: Callable[[], Moment],
    ) -> Personalizer:
        """With all that the bundle brings."""
        ...

    def costs(self, phone: Device) -> Costs: ...

    def losses(self, adapter: Path, dialogues: Sequence[Dialogue]) -> Sequence[float]:
        """Of each dialogue's last reply with an adapter's file: nats a label."""
        ...

    def replies(self, adapter: Path, dialogues: Sequence[Dialogue], most: int) -> Sequence[str]:
        """The greedy reply of at most ``most`` tokens to all but the last turn of each."""
        ...


@dataclass(frozen=True)
class FleetPlace:
    """Where lives are lived. ``phone``: a device profile's name or file, whose time and energy are
    modelled; ``study``: bundle, data and what computes."""

    study: StudyPlace
    phone: str
