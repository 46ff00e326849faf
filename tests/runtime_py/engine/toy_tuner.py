"""The loop's tuner around a cheap engine, and a job for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from runtime_py.bundle import manifest as m
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.engine.examples import Example
from runtime_py.engine.streamed_tuner import StreamedFineTuner, TrainingCall
from runtime_py.engine.streaming import StreamingEngine
from runtime_py.loop.protocols import FineTuneJob
from tests.runtime_py.engine.toy import Toy, dialogue

OPTIMIZER = m.Optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8)
LENGTHS = (96, 48)  # as a manifest might have them
START = np.arange(18, dtype=np.float32).reshape(1, 2, 9) + np.float32(0.5)
SAID = ("sat", "sat on the mat", "that other hat", "another mother", "the rat", "the bat sat")


class Quadratic(Toy):
    """Remembers what each call had."""

    capacity = 96

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.losses_of: list[list[str]] = []

    def loss(self, state, examples: list[Example]) -> tuple[float, int]:
        self.losses_of.append([one.id for one in examples])
        return super().loss(state, examples)

    def length_of(self, examples: list[Example]) -> int:
        needed = sum(one.inputs for one in examples)
        return min(length for length in LENGTHS if length >= needed)


class ToyTuner(StreamedFineTuner):
    """The loop's tuner around ``Quadratic`` in place of a bundle's programs."""

    def __init__(
        self,
        text: ChatText,
        parent: Path,
        engine: Quadratic | None = None,
        on_call: Callable[[TrainingCall], None] = lambda call: None,
        available_mb: Callable[[], float] = lambda: math.inf,
        base: str = "weights",
    ) -> None:
        offset = parent.read_bytes().index(START.tobytes())
        tensor = m.AdapterTensor(
            name="layers.0.x.lora_A", peft="p", rows=(0, 2), shape=(1, 2, 9), offset=offset
        )
        self.tensors = (tensor,)
        bundle = SimpleNamespace(
            training=SimpleNamespace(lengths=LENGTHS, optimizer=OPTIMIZER),
            android=None,
            manifest=SimpleNamespace(adapter=SimpleNamespace(tensors=self.tensors)),
            training_digest=base,
        )
        super().__init__(cast(Bundle, bundle), text, available_mb=available_mb, on_call=on_call)
        self.engine = engine or Quadratic()

    def _open(self) -> StreamingEngine:
        return cast(StreamingEngine, self.engine)

    def need_mb(self, length: int) -> float:
        return 2.0 * length


def toy_parent(folder: Path) -> Path:
    path = folder / "parent.ptd"
    write_ptd(path, {"layers.0.x.lora_A": START})
    return path


def toy_job(parent: Path) -> FineTuneJob:
    every = [dialogue("the cat", said, id=f"s{i}") for i, said in enumerate(SAID * 2)]
    return FineTuneJob(
        number=3,
        training=tuple(every[:7]),
        stopping=tuple(every[7:9]),
        guard=tuple(every[9:12]),
        parent=parent,
        seed=5,
        steps=9,
        learning_rate=0.25,
        b_rate_ratio=2.0,
        batch=3,
        check_every=2,
        max_sequence_tokens=96,
    )
