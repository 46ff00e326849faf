"""What the loop needs of whatever runs the programs: an engine, and something that fine-tunes."""

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
        """Pure: the same dialogue and weights give the same bits."""
        ...

    def generate(
        self, messages: Sequence[Turn], *, temperature: float, seed: int, max_new_tokens: int
    ) -> str:
        """Pure too: the same messages, adapter, temperature and seed give the same text."""
        ...

    def use_adapter(self, file: Path) -> None:
        """Switches the adapter of ``generate``. ``embed`` always runs with the bundle's own."""
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
