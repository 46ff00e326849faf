"""The loop's fine-tuner on a bundle's training programs: from a job to an adapter's file.

A job's folder holds the state after the last whole step, so that a killed run goes on from there
and ends with the same bits. A trained adapter is the bundle's own ``.ptd`` with other values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from runtime_py.bundle.adapter_forms import read_values, write_values
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import Example, example
from runtime_py.engine.memory import memory_errors, training_bytes
from runtime_py.engine.native import silenced
from runtime_py.engine.streaming import StepNumbers, StreamingEngine, open_training
from runtime_py.engine.tuning import Stage, lessons, tune
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult

ADAPTER = "adapter.ptd"  # in a job's folder
RESERVE = 0.25  # of what a run needs must be free before each call, or it ends


@dataclass(frozen=True)
class TrainingCall:
    """What was computed: the ``loss`` or ``gradient`` of ``labels`` labels by the programs of
    ``length`` tokens, or the ``update`` of step ``step`` after them; a ``check`` computes nothing,
    but says that the stopping sets' loss after ``step`` is known. ``stage``: where in the job."""

    kind: Literal["loss", "gradient", "update", "check"]
    length: int = 0
    labels: int = 0
    step: int = 0
    stage: Stage = "training"


def _ignore(call: TrainingCall) -> None:
    pass


def _nothing() -> None:
    pass


def _unlimited() -> float:
    return math.inf


class StreamedFineTuner:
    """The loop's ``FineTuner``. ``before`` is called ahead of a run, to free memory;
    ``available_mb`` is what the process may still take, asked before a run and between sequences.
    ``on_call`` gets every call, after it, and an update before it is saved."""

    def __init__(
        self,
        bundle: Bundle,
        text: ChatText,
        *,
        threads: int | None = None,
        before: Callable[[], None] = _nothing,
        available_mb: Callable[[], float] = _unlimited,
        on_call: Callable[[TrainingCall], None] = _ignore,
    ) -> None:
        self._training, _ = bundle.training, bundle.android  # refuses a bundle without either
        self._bundle, self._text, self._threads = bundle, text, threads
        self._before, self._available, self._on_call = before, available_mb, on_call

    @property
    def lengths(self) -> tuple[int, ...]:
        """``FineTuner.lengths``."""
        return tuple(sorted(self._training.lengths))

    def tokens(self, dialogue: Dialogue) -> int:
        """``FineTuner.tokens``."""
        return example(dialogue, self._text, last_only=True).inputs

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        """``FineTuner.run``. The job's parent is a ``.ptd`` of this bundle's layout."""
        self._before()
        longest = min(job.max_sequence_tokens, max(self._training.lengths))
        taught = lessons(job, self._text, longest, self._bundle)
        tensors = self._bundle.manifest.adapter.tensors
        state = AdapterState.of(tensors, read_values(job.parent, tensors))
        capacity = self.program_for(taught.longest)
        need = self.need_mb(capacity)
        engine = _Guarded(self._open, capacity, need, self._available, self._on_call)
        result = tune(
            engine,
            state,
            job,
            taught,
            self._training.optimizer,
            folder,
            folder / ADAPTER,
            stop=stop,
            base=self._bundle.training_digest,
            on_stage=engine.enter,
            on_check=lambda step: self._on_call(TrainingCall("check", step=step)),
        )
        if result is not None:
            write_values(result.adapter, job.parent, tensors, state.tensors)
        return result

    def _open(self) -> StreamingEngine:
        with silenced():  # the runtime talks of the processor
            engine = open_training(self._bundle, threads=self._threads)
        self._threads = None  # the pool stays for the process
        return engine

    def program_for(self, tokens: int) -> int:
        """The length of the shortest programs that hold ``tokens``."""
        return min(length for length in self._training.lengths if length >= tokens)

    def need_mb(self, length: int) -> float:
        """What a run with the programs of ``length`` tokens takes at most, in MB."""
        return training_bytes(self._bundle, length) / 1e6


class _Guarded:
    """The training programs, with an eye on memory."""

    def __init__(
        self,
        opening: Callable[[], StreamingEngine],
        capacity: int,
        need_mb: float,
        available_mb: Callable[[], float],
        on_call: Callable[[TrainingCall], None],
    ) -> None:
        self._available, self._on_call = available_mb, on_call
        self.capacity, self._length = capacity, capacity
        self._stage: Stage = "before"
        self._check(need_mb)
        self._reserve_mb = RESERVE * need_mb
        with memory_errors():
            self._engine = opening()

    def enter(self, stage: Stage) -> None:
        self._stage = stage

    def _check(self, need_mb: float) -> None:
        if self._available() < need_mb:
            raise MemoryError

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        self._check(self._reserve_mb)
        with memory_errors():
            loss, labels = self._engine.loss(state, examples)
        length = self._engine.length_of(examples)
        self._on_call(TrainingCall("loss", length, labels, stage=self._stage))
        return loss, labels

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        self._check(self._reserve_mb)
        with memory_errors():
            loss, labels = self._engine.gradient(state, examples, into)
        self._length = self._engine.length_of(examples)
        self._on_call(TrainingCall("gradient", self._length, labels))
        return loss, labels

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        with memory_errors():
            norm = self._engine.update(state, gradient, numbers)
        self._on_call(TrainingCall("update", self._length, step=state.step))
        return norm
