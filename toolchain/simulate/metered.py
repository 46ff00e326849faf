"""Counts what the loop computes: modelled work for the clock, and seconds measured here.

A night's work must be the same after a kill: what was committed to the store stands in its log, and
what was trained since then in a file beside the training state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import safe_open

from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.phone_engine import LmCall
from runtime_py.engine.run_state import FILE
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.files import write_bytes
from runtime_py.loop.protocols import Embedding, Engine, FineTuneJob, FineTuner, FineTuneResult
from toolchain.simulate.device import Compute
from toolchain.simulate.events import StepTrained
from toolchain.simulate.limits import Quota
from toolchain.simulate.rhythm import Clock
from toolchain.simulate.roofline import Counter

NIGHT = "night.json"  # in a job's folder


class Meter:
    """``day_seconds``: modelled, since ``begin``; by night the clock's work counts instead.
    ``embed_seconds`` are measured, of ``embed_tokens``, since ``begin`` too. ``is_new``: whether a
    training call is work that the clock has not counted; ``after_mark`` gets the call that ends a
    step, or a look at the stopping sets, before it is saved."""

    def __init__(self, clock: Clock, counter: Counter, compute: Compute) -> None:
        self.clock, self._counter, self._compute = clock, counter, compute
        self.is_new: Callable[[TrainingCall], bool] = lambda call: True
        self.after_mark: Callable[[TrainingCall], None] = lambda call: None
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
        if self.is_new(call):
            self.clock.add(self._counter.training(call).seconds(self._compute))
        if call.kind in ("update", "check"):
            self.after_mark(call)

    def timed(self, engine: Engine) -> Engine:
        return TimedEngine(engine, self)


class TimedEngine:
    """An engine whose embeddings are timed."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine, self._meter = engine, meter

    def embed(self, dialogue: Dialogue) -> Embedding:
        begun = time.perf_counter()
        embedding = self._engine.embed(dialogue)
        self._meter.embed_seconds += time.perf_counter() - begun
        return embedding

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        """The engine's own reply."""
        return self._engine.generate(
            messages,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            prefix=prefix,
        )

    def use_adapter(self, file: Path) -> None:
        self._engine.use_adapter(file)


@dataclass(frozen=True)
class NightRecord:
    """``wall``: the clock's simulated seconds at each mark of the night of ``day``; a mark is how
    many updates, and looks at the stopping sets, the training state has. ``first``: the mark that
    the night began with."""

    day: int
    first: int
    wall: dict[int, float]

    @staticmethod
    def read(path: Path) -> NightRecord | None:
        """None: there is no file."""
        return _NIGHTS.validate_json(path.read_bytes()) if path.exists() else None

    def after(self, mark: int, wall: float) -> NightRecord:
        """With one mark more."""
        return replace(self, wall={**self.wall, mark: wall})

    def write(self, path: Path) -> None:
        write_bytes(path, _NIGHTS.dump_json(self))


_NIGHTS = TypeAdapter(NightRecord)


class NightTuner:
    """A fine-tuner within the storage's quota, whose modelled work survives a kill. ``emit`` takes
    the event of every step."""

    def __init__(
        self,
        tuner: FineTuner,
        meter: Meter,
        quota: Quota,
        bundle: Bundle,
        emit: Callable[[StepTrained], None],
    ) -> None:
        self._tuner, self._meter, self._quota, self._emit = tuner, meter, quota, emit
        numbers = sum(math.prod(tensor.shape) for tensor in bundle.manifest.adapter.tensors)
        self._state, self._adapter = 16 * numbers, 5 * numbers  # bytes, with their headers

    @property
    def lengths(self) -> tuple[int, ...]:
        return self._tuner.lengths

    def tokens(self, dialogue: Dialogue) -> int:
        return self._tuner.tokens(dialogue)

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        """As ``FineTuner`` has it. Raises ``DiskFull`` where the quota has no room for the state
        or the adapter."""
        self._quota.check(2 * self._state + 2 * self._adapter)
        mark = saved_mark(folder)
        night = self._night(folder, mark)
        # The guard's losses before are computed at every start; the time that is known has them.
        paid = mark > night.first

        def is_new(call: TrainingCall) -> bool:
            return not paid or call.stage != "before"

        def after_mark(call: TrainingCall) -> None:  # before the state of this mark is saved
            nonlocal night, mark
            self._quota.check(self._state)
            mark += 1
            night = night.after(mark, self._meter.clock.wall)
            night.write(folder / NIGHT)
            if call.kind == "update":
                self._emit(StepTrained(call.step, call.length))

        self._meter.is_new, self._meter.after_mark = is_new, after_mark
        result = self._tuner.run(job, folder, stop)
        if result is not None:
            self._quota.check(self._adapter)
        return result

    def _night(self, folder: Path, mark: int) -> NightRecord:
        """This night's record: a new one, or the one of a process that was killed, to whose last
        saved ``mark`` the clock is set."""
        clock, path = self._meter.clock, folder / NIGHT
        night = NightRecord.read(path)
        if night is not None and night.day == clock.day:
            clock.wall = night.wall[mark]
            return night
        night = NightRecord(clock.day, mark, {mark: clock.wall})
        night.write(path)
        return night


def saved_mark(folder: Path) -> int:
    """Updates and looks of the training state in a job's folder; 0 where there is none."""
    path = folder / FILE
    if not path.exists():
        return 0
    with safe_open(path, "numpy") as file:
        progress = json.loads((file.metadata() or {})["progress"])
    return int(progress["step"]) + len(progress["curve"])
