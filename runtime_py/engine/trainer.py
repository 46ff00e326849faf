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
    names the weights that ``engine`` computes with, where a run could meet others.

    Raises ``TrainingDiverged`` where a loss is no number: the last good state is in ``folder``.
    """
    if not examples:
        raise TrainingError("there is no dialogue to train on: give at least one.")
    job = digest(examples, settings, state, engine.capacity, base)
    folder.mkdir(parents=True, exist_ok=True)
    known = load_state(folder, state, job) or Progress(0, (), 0.0, job)
    losses, begun = list(known.losses), time.monotonic() - known.seconds
    plan = batches(len(examples), settings)
    gradient = state.layout.zeros()
    betas = (optimizer.beta1, optimizer.beta2)

    def save(step: int) -> None:
        taken = time.monotonic() - begun
        save_state(folder, state, Progress(step, tuple(losses), taken, job))

    saved = known.step

    def keep(step: int) -> None:
        nonlocal saved
        if saved < step:
            save(step)
            saved = step

    for step in range(known.step + 1, len(plan) + 1):
        since = time.monotonic()
        gradient[...] = 0.0
        total, count, tokens = 0.0, 0, 0
        for some in pack([examples[index] for index in plan[step - 1]], engine.capacity):
            if stop():
                keep(step - 1)
                return None
            loss, labels = engine.gradient(state, some, gradient)
            if not math.isfinite(loss):
                keep(step - 1)
                raise TrainingDiverged(
                    f"the loss of {', '.join(e.id for e in some)} in step {step} is {loss}: "
                    f"training stopped and kept the state of step {step - 1} in {folder}; lower "
                    f"the learning rate or leave the dialogue out."
                )
            total, count = total + loss, count + labels
            tokens += sum(e.inputs for e in some)
        rate = rate_at(settings, step, len(plan))
        numbers = step_numbers(step, count, rate, settings.weight_decay, settings.clip, betas)
        norm = engine.update(state, gradient, numbers)
        if not math.isfinite(norm):
            keep(step - 1)
            raise TrainingDiverged(
                f"the gradient of step {step} is {norm} (dialogues "
                f"{', '.join(examples[i].id for i in plan[step - 1])}): training stopped and kept "
                f"the state of step {step - 1} in {folder}; lower the learning rate or leave them "
                f"out."
            )
        losses.append(total / count)
        if step % settings.save_every == 0 or step == len(plan):
            keep(step)
        taken = time.monotonic() - since
        on_step(StepReport(step, len(plan), total / count, norm, rate, tokens, taken))
    return TrainingOutcome(tuple(losses), time.monotonic() - begun)
