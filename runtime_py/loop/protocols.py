"""What the loop needs from outside: an engine, something that fine-tunes, and a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from runtime_py.loop.dialogue import Dialogue, Turn


@dataclass(frozen=True, eq=False)
class Embedding:
    """``pooled``: float32 [hidden], the mean of the tokens' vectors; ``entropy``: the set's EOE."""

    pooled: np.ndarray
    entropy: float


class Engine(Protocol):
    def embed(self, dialogue: Dialogue) -> Embedding:
        """Pure: the same dialogue and weights give the same bits. A conversation whose last turn is
        the user's is embedded too."""
        ...

    def generate(
        self, messages: Sequence[Turn], *, temperature: float, seed: int, max_new_tokens: int
    ) -> str:
        """Pure too: the same messages, adapter, temperature and seed give the same text."""
        ...

    def use_adapter(self, file: Path) -> None:
        """Switches the adapter of ``generate``. ``embed`` always runs with the bundle's own."""
        ...


class AdapterBundle(Protocol):
    """What adapts and is adapted: never changed, so that version 0 is always there."""

    @property
    def hidden(self) -> int:
        """The length of pooled vectors."""
        ...

    @property
    def adapter_file(self) -> Path:
        """Version 0 of the adapter, in the form that engine and fine-tuner take."""
        ...

    def as_peft(self, file: Path, folder: Path) -> None:
        """Writes a version's file as a PEFT folder, whole or not at all."""
        ...


@dataclass(frozen=True)
class FineTuneJob:
    """Everything a run depends on, so that a run can be repeated bit for bit."""

    number: int
    training: tuple[Dialogue, ...]
    held_out: tuple[Dialogue, ...]
    parent: Path  # the adapter to start from
    seed: int  # in [0, 2^63)
    epochs: int
    learning_rate: float
    batch: int  # sequences whose gradients make one step
    max_sequence_tokens: int


@dataclass(frozen=True)
class FineTuneResult:
    """``losses``: one a step, over assistant tokens. ``adapter``: a file in the job's folder."""

    adapter: Path
    heldout_loss_before: float
    heldout_loss_after: float
    losses: tuple[float, ...]
    seconds: float


class FineTuner(Protocol):
    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        """Goes on from what an earlier run of the same job left in ``folder``.

        None: ``stop`` said so between two micro-batches. Raises ``MemoryError`` where the device
        has too little memory for the job's sequence length.
        """
        ...
