"""A run of fine-tuning: epochs, batches, learning rate, saving, and going on after a kill.

The gradient of a batch is the sum over its sequences' labels, divided once by their number: the
same as one large batch. Order and arithmetic are fixed by the job, so a run that was killed and
resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import Optimizer
from runtime_py.engine.examples import Example, pack
from runtime_py.engine.run_state import Progress, job_digest, load_state, save_state
from runtime_py.engine.streaming import StepNumbers, step_numbers
from runtime_py.loop.errors import TrainingDiverged, TrainingError
from runtime_py.loop.random_stream import SplitMix64


class TrainingEngine(Protocol):
    """Whatever computes: the streamed programs, or plain PyTorch. A call takes one sequence, or
    several of together at most ``capacity`` input tokens."""

    @property
    def capacity(self) -> int: ...

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        """Summed cross-entropy in nats, and labels."""
        ...

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        """The same, and the sum's gradient added to ``into`` [rows, 1024] float32."""
        ...

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        """One AdamW step -> the gradient's global norm before clipping."""
        ...


@dataclass(frozen=True)
class Settings:
    """``batch``: sequences a step. ``warmup``: steps over which the rate rises. ``schedule``: what
    it does after them, down to 0 at the end unless constant. ``save_every``: steps."""

    epochs: int = 3
    batch: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    seed: int = 0
    save_every: int = 10


@dataclass(frozen=True)
class StepReport:
    """What a step says: ``loss`` in nats a label, the gradient's ``norm``, the learning ``rate``,
    ``tokens`` read, ``seconds`` that it took."""

    number: int
    of: int
    loss: float
    norm: float
    rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainingOutcome:
    """``losses``: of each step, nats a label, before its update."""

    losses: tuple[float, ...]
    seconds: float


def rate_at(settings: Settings, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 1 on)."""
    peak = settings.learning_rate
    if step <= settings.warmup:
        return peak * step / settings.warmup
    if settings.schedule == "constant":
        return peak
    left = (steps - step + 1) / max(1, steps - settings.warmup)
    return peak * (left if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def batches(count: int, settings: Settings) -> list[list[int]]:
    """The examples of each step: every epoch in an order of its own, drawn from the seed."""
    chance = SplitMix64(settings.seed)
    steps = []
    for _ in range(settings.epochs):
        order = list(range(count))
        for last in range(count - 1, 0, -1):  # Fisher and Yates
            other = chance.below(last + 1)
            order[last], order[other] = order[other], order[last]
        steps += [order[i : i + settings.batch] for i in range(0, count, settings.batch)]
    return steps


def digest(
    examples: Sequence[Example], settings: Settings, state: AdapterState, capacity: int, base: str
) -> str:
    """What tells this run from every other: data, settings, the adapter that it starts from, the
    engine's ``capacity``, which decides what is packed together, and ``base``.

    ``save_every`` is not part of it: it changes nothing that is computed.
    """
    data = hashlib.sha256()
    for example in examples:
        data.update(example.tokens.tobytes() + example.labels.tobytes())
    known = asdict(settings)
    del known["save_every"]
    start = hashlib.sha256(state.parameters.tobytes()).hexdigest()
    return job_digest(
        {
            "data": data.hexdigest(),
            "settings": known,
            "start": start,
            "capacity": capacity,
            "base": base,
        }
    )


def evaluate(engine: TrainingEngine, state: AdapterState, examples: Sequence[Example]) -> float:
    """Mean loss over all labels, in nats a label."""
    total, count = 0.0, 0
    for some in pack(examples, engine.capacity):
        loss, labels = engine.loss(state, some)
        total, count = total + loss, count + labels
    return total / count


def train(
    engine: TrainingEngine,
    state: AdapterState,
    examples: Sequence[Example],
    settings: Settings,
    optimizer: Optimizer,
    folder: Path,
    *,
    base: str = "",
    on_step: Callable[[StepReport], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome | None:
    """Trains ``state`` in place; goes on from what an earlier run of the same job left in
    ``folder``. None where ``stop`` said so between two calls: all whole steps are saved. ``base``
    names the weights that ``engine`` computes with, where a run could meet others. ``on_step``
    gets every step, after it.

    Raises ``TrainingDiverged`` where a loss is no number: the last good state is in ``folder``.
    """
    if not examples:
        raise TrainingError("there is no dialogue to train on: give at least one.")
    job = digest(examples, settings, state, engine.capacity, base)
    folder.mkdir(parents=True, exist_ok=True)
    plan = batches(len(examples), settings)
    run = _Run(engine, state, settings, optimizer, folder, job, len(plan))
    for step in range(run.step + 1, len(plan) + 1):
        report = run.take(step, [examples[index] for index in plan[step - 1]], stop)
        if report is None:
            return None
        on_step(report)
    return TrainingOutcome(tuple(run.losses), run.seconds)


class _Run:
    """A run at step ``step`` of ``of``: ``losses`` of its steps so far, ``seconds`` that it took.
    What is on disk is the state after the last whole step that was saved."""

    def __init__(
        self,
        engine: TrainingEngine,
        state: AdapterState,
        settings: Settings,
        optimizer: Optimizer,
        folder: Path,
        job: str,
        of: int,
    ) -> None:
        self._engine, self._state, self._settings, self._of = engine, state, settings, of
        self._betas = (optimizer.beta1, optimizer.beta2)
        self._folder, self._job = folder, job
        progress = load_state(folder, state, job) or Progress(0, (), 0.0, job)
        self.step = self._saved = progress.step
        self.losses = list(progress.losses)
        self._begun = time.monotonic() - progress.seconds
        self._gradient = state.layout.zeros()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def _save(self) -> None:
        if self._saved < self.step:
            progress = Progress(self.step, tuple(self.losses), self.seconds, self._job)
            save_state(self._folder, self._state, progress)
            self._saved = self.step

    def take(
        self, step: int, batch: Sequence[Example], stop: Callable[[], bool]
    ) -> StepReport | None:
        """Step ``step`` over the batch; None where ``stop`` said so before its update."""
        since = time.monotonic()
        sums = self._accumulate(step, batch, stop)
        if sums is None:
            return None
        total, count = sums
        settings = self._settings
        rate = rate_at(settings, step, self._of)
        numbers = step_numbers(step, count, rate, settings.weight_decay, settings.clip, self._betas)
        norm = self._engine.update(self._state, self._gradient, numbers)
        if not math.isfinite(norm):
            what = f"the gradient of step {step} is {norm} (dialogues {_ids(batch)})"
            raise self._diverged(what, "them")
        self.step = step
        self.losses.append(total / count)
        if step % settings.save_every == 0 or step == self._of:
            self._save()
        tokens, taken = sum(e.inputs for e in batch), time.monotonic() - since
        return StepReport(step, self._of, total / count, norm, rate, tokens, taken)

    def _accumulate(
        self, step: int, batch: Sequence[Example], stop: Callable[[], bool]
    ) -> tuple[float, int] | None:
        """The batch's summed loss and its labels; its gradient is in ``_gradient``."""
        self._gradient[...] = 0.0
        total, count = 0.0, 0
        for some in pack(batch, self._engine.capacity):
            if stop():
                self._save()
                return None
            loss, labels = self._engine.gradient(self._state, some, self._gradient)
            if not math.isfinite(loss):
                what = f"the loss of {_ids(some)} in step {step} is {loss}"
                raise self._diverged(what, "the dialogue")
            total, count = total + loss, count + labels
        return total, count

    def _diverged(self, what: str, cause: str) -> TrainingDiverged:
        self._save()
        return TrainingDiverged(
            f"{what}: training stopped and kept the state of step {self.step} in {self._folder}; "
            f"lower the learning rate or leave {cause} out."
        )


def _ids(examples: Sequence[Example]) -> str:
    return ", ".join(example.id for example in examples)
