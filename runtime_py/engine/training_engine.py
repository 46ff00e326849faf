"""What a run of training computes with, and the losses that it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.engine.examples import Example, pack
from runtime_py.engine.streaming import StepNumbers


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


def mean_loss(
    engine: TrainingEngine,
    state: AdapterState,
    examples: Sequence[Example],
    stop: Callable[[], bool],
) -> float | None:
    """Over all labels, in nats a label. None where ``stop`` said so before a call."""
    total, count = 0.0, 0
    for some in pack(examples, engine.capacity):
        if stop():
            return None
        loss, labels = engine.loss(state, some)
        total, count = total + loss, count + labels
    return total / count


def evaluate(engine: TrainingEngine, state: AdapterState, examples: Sequence[Example]) -> float:
    """Mean loss over all labels, in nats a label; nothing stops it."""
    losses = [engine.loss(state, some) for some in pack(examples, engine.capacity)]
    return sum(loss for loss, _ in losses) / sum(labels for _, labels in losses)


def each_loss(
    engine: TrainingEngine,
    state: AdapterState,
    examples: Sequence[Example],
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, ...] | None:
    """Of every example by itself, one a call, in nats a label. None where ``stop`` said so."""
    losses = []
    for one in examples:
        if stop():
            return None
        loss, labels = engine.loss(state, [one])
        losses.append(loss / labels)
    return tuple(losses)
