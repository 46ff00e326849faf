"""Counts what the loop computes: modelled work for the clock, and seconds measured here.

A night's work must be the same after a kill: what was committed to the store stands in its log, and
what was trained since then in a file beside the training state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.phone_engine import LmCall
from runtime_py.engine.run_state import FILE
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.protocols import Embedding, Engine, FineTuneJob, FineTuner, FineTuneResult
from toolchain.simulate.device import Compute
from toolchain.simulate.limits import Quota
from toolchain.simulate.rhythm import Clock
from toolchain.simulate.roofline import Counter

NIGHT = "night.json"  # in a job's folder


class Meter:
    """``day_seconds``: modelled, since ``begin``; by night the clock's work counts instead.
    ``embed_seconds`` are measured, of ``embed_tokens``, since ``begin`` too. ``heard``: whether a
    training call is new work; ``updated``: a step was done and is not saved yet."""

    def __init__(self, clock: Clock, counter: Counter, compute: Compute) -> None:
        self.clock, self._counter, self._compute = clock, counter, compute
        self.heard: Callable[[TrainingCall], bool] = lambda call: True
        self.updated: Callable[[TrainingCall], None] = lambda call: None
        self.begin()

    def begin(self) -> None:
        self.day_seconds, self.embed_seconds, self.embed_tokens = 0.0, 0.0, 0

    def lm(self, call: LmCall) -> None:
        seconds = self._counter.lm(call).seconds(self._compute)
        if call.kind == "embed":
            self.embed_tokens += call.tokens
        if self.clock.night:
            self.clock.add(seconds)
        else:
            self.day_seconds += seconds

    def training(self, call: TrainingCall) -> None:
        if self.heard(call):
            self.clock.add(self._counter.training(call).seconds(self._compute))
        if call.kind == "update":
            self.updated(call)

    def timed(self, engine: Engine) -> Engine:
        return _Timed(engine, self)


class _Timed:
    """An engine whose embeddings are timed."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine, self._meter = engine, meter

    def embed(self, dialogue: Dialogue) -> Embedding:
        begun = time.perf_counter()
        found = self._engine.embed(dialogue)
        self._meter.embed_seconds += time.perf_counter() - begun
        return found

    def generate(
        self, messages: Sequence[Turn], *, temperature: float, seed: int, max_new_tokens: int
    ) -> str:
        return self._engine.generate(
            messages, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens
        )

    def use_adapter(self, file: Path) -> None:
        self._engine.use_adapter(file)


class NightTuner:
    """A fine-tuner within the storage's quota, whose modelled work survives a kill."""

    def __init__(
        self,
        tuner: FineTuner,
        meter: Meter,
        quota: Quota,
        bundle: Bundle,
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self._tuner, self._meter, self._quota, self._say = tuner, meter, quota, say
        numbers = sum(math.prod(tensor.shape) for tensor in bundle.manifest.adapter.tensors)
        self._state, self._adapter = 12 * numbers, 5 * numbers  # bytes, with their headers

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        self._quota.check(2 * self._state + 2 * self._adapter)
        clock, path = self._meter.clock, folder / NIGHT
        step = saved_step(folder)
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("day") == clock.day:
            clock.wall = known["wall"][str(step)]
        else:
            known = {"day": clock.day, "first": step, "wall": {str(step): clock.wall}}
            _write(path, known)
        # The held-out loss before is computed at every start; the time that is known has it.
        paid = step > known["first"]

        def heard(call: TrainingCall) -> bool:
            return not paid or call.kind != "loss" or call.trained

        def updated(call: TrainingCall) -> None:  # before the state of this step is saved
            self._quota.check(self._state)
            known["wall"][str(call.step)] = clock.wall
            _write(path, known)
            said = {"event": "step", "job": job.number, "step": call.step}
            self._say({**said, "tokens": call.length})

        self._meter.heard, self._meter.updated = heard, updated
        result = self._tuner.run(job, folder, stop)
        if result is not None:
            self._quota.check(self._adapter)
        return result


def saved_step(folder: Path) -> int:
    """The last whole step of the training state in a job's folder; 0 where there is none."""
    path = folder / FILE
    if not path.exists():
        return 0
    with safe_open(path, "numpy") as file:
        return int(json.loads((file.metadata() or {})["progress"])["step"])


def _write(path: Path, value: object) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value), encoding="utf-8")
    beside.replace(path)
