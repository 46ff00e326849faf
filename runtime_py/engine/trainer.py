"""A run of fine-tuning: steps, looking at held-out examples, saving, and going on after a kill.

The gradient of a batch is the sum over its sequences' labels, divided once by their number: the
same as one large batch. Order and arithmetic are fixed by the job, so a run that was killed and
resumed ends with the same bits as one that was not. Where stopping examples are given, the state
with the least loss on them is what the run ends with: its overfitting is bounded.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import Optimizer
from runtime_py.engine.examples import Example, pack
from runtime_py.engine.run_state import Progress, job_digest, load_state, save_state
from runtime_py.engine.streaming import step_numbers
from runtime_py.engine.training_engine import TrainingEngine, mean_loss
from runtime_py.engine.training_plan import Settings, batches, rates_at
from runtime_py.loop.errors import TrainingDiverged, TrainingError


@dataclass(frozen=True)
class StepReport:
    """What a step says: ``loss`` in nats a label, the gradient's ``norm``, the learning ``rate`` of
    A, ``tokens`` read, ``seconds`` that it took."""

    number: int
    of: int
    loss: float
    norm: float
    rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainingOutcome:
    """``losses``: of each step, nats a label, before its update. ``curve``: (step, loss of the
    stopping examples), empty without them. ``kept_step``: whose state the run ended with."""

    losses: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    kept_step: int
    seconds: float


def digest(
    examples: Sequence[Example],
    stopping: Sequence[Example],
    settings: Settings,
    state: AdapterState,
    capacity: int,
    base: str,
    sets: Sequence[int],
) -> str:
    """What tells this run from every other: data and their ``sets``, settings, the adapter that it
    starts from, the engine's ``capacity``, which decides what is packed together, and ``base``.

    ``save_every`` is not part of it: it changes nothing that is computed.
    """
    known = asdict(settings)
    del known["save_every"]
    start = hashlib.sha256(state.parameters.tobytes()).hexdigest()
    return job_digest(
        {
            "data": _digest(examples),
            "sets": list(sets),
            "stopping": _digest(stopping),
            "settings": known,
            "start": start,
            "capacity": capacity,
            "base": base,
        }
    )


def _digest(examples: Sequence[Example]) -> str:
    data = hashlib.sha256()
    for example in examples:
        data.update(example.tokens.tobytes() + example.labels.tobytes())
    return data.hexdigest()


def train(
    engine: TrainingEngine,
    state: AdapterState,
    examples: Sequence[Example],
    settings: Settings,
    optimizer: Optimizer,
    folder: Path,
    *,
    stopping: Sequence[Example] = (),
    sets: Sequence[int] | None = None,
    base: str = "",
    on_step: Callable[[StepReport], None] = lambda step: None,
    on_check: Callable[[int], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome | None:
    """Trains ``state`` in place; goes on from what an earlier run of the same job left in
    ``folder``. None where ``stop`` said so between two calls: all whole steps are saved.

    ``stopping``: their mean loss is taken at step 0, every ``check_every`` steps and at the end;
    ``state`` ends with the parameters where it was least, the earliest of equals. ``sets``: how
    many examples in turn are one dialogue's, which a batch counts once; None: one. ``base`` names
    the weights that ``engine`` computes with, where a run could meet others. ``on_step`` gets every
    step, after it, and ``on_check`` the step of every look at ``stopping``; both before they are
    saved.

    Raises ``TrainingDiverged`` where a loss is no number: the last good state is in ``folder``.
    """
    if not examples:
        raise TrainingError("there is no dialogue to train on: give at least one.")
    together = _together(examples, sets)
    sizes = [len(some) for some in together]
    job = digest(examples, stopping, settings, state, engine.capacity, base, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    plan = batches(len(together), settings)
    run = _Run(engine, state, settings, optimizer, folder, job, len(plan), stopping)
    while True:
        if run.must_look:
            if not run.look(stop):
                return None
            on_check(run.step)
        run.save_if_due()
        if run.ended:
            return run.end()
        batch = [one for index in plan[run.step] for one in together[index]]
        report = run.take(batch, stop)
        if report is None:
            return None
        on_step(report)


def _together(examples: Sequence[Example], sets: Sequence[int] | None) -> list[list[Example]]:
    left = iter(examples)
    return [[next(left) for _ in range(size)] for size in sets or [1] * len(examples)]


class _Run:
    """A run at step ``step`` of ``of``: ``losses`` of its steps so far, ``curve`` of its looks at
    the stopping examples, ``seconds`` that it took. What is on disk is the state after the last
    whole step that was saved."""

    def __init__(
        self,
        engine: TrainingEngine,
        state: AdapterState,
        settings: Settings,
        optimizer: Optimizer,
        folder: Path,
        job: str,
        of: int,
        stopping: Sequence[Example],
    ) -> None:
        self._engine, self._state, self._settings, self._of = engine, state, settings, of
        self._betas = (optimizer.beta1, optimizer.beta2)
        self._folder, self._job, self._stopping = folder, job, stopping
        self._kept = state.layout.zeros() if stopping else None
        progress = load_state(folder, state, job, self._kept) or Progress(0, (), 0.0, job)
        self.step = progress.step
        self.losses, self.curve = list(progress.losses), list(progress.curve)
        self._saved = (self.step, len(self.curve))
        self._begun = time.monotonic() - progress.seconds
        self._gradient = state.layout.zeros()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def ended(self) -> bool:
        """All steps are taken, or the last looks found nothing better."""
        patience = self._settings.patience
        if patience and self.curve:
            since = sum(step > self._kept_step for step, _ in self.curve)
            if since >= patience:
                return True
        return self.step == self._of

    @property
    def _kept_step(self) -> int:
        return min(self.curve, key=lambda point: point[1])[0] if self.curve else self.step

    @property
    def must_look(self) -> bool:
        """At the stopping examples, now."""
        due = self.step % self._settings.check_every == 0 or self.step == self._of
        looked = bool(self.curve) and self.curve[-1][0] == self.step
        return bool(self._stopping) and due and not looked

    def look(self, stop: Callable[[], bool]) -> bool:
        """Whether their loss was taken: not where ``stop`` said so before."""
        mean = mean_loss(self._engine, self._state, self._stopping, stop)
        if mean is None:
            self._save()
            return False
        if not math.isfinite(mean):
            what = f"the loss of the stopping dialogues after step {self.step} is {mean}"
            raise self._diverged(what, "what was learned last")
        self.curve.append((self.step, mean))
        if self._kept is not None and self._kept_step == self.step:
            self._kept[...] = self._state.parameters
        return True

    def save_if_due(self) -> None:
        if self.step % self._settings.save_every == 0 or self.ended:
            self._save()

    def _save(self) -> None:
        now = (self.step, len(self.curve))
        if self._saved != now:
            progress = Progress(
                self.step, tuple(self.losses), self.seconds, self._job, tuple(self.curve)
            )
            save_state(self._folder, self._state, progress, self._kept)
            self._saved = now

    def take(self, batch: Sequence[Example], stop: Callable[[], bool]) -> StepReport | None:
        """The next step, over the batch; None where ``stop`` said so before its update."""
        since, step = time.monotonic(), self.step + 1
        sums = self._accumulate(step, batch, stop)
        if sums is None:
            return None
        total, count = sums
        settings = self._settings
        rates = rates_at(settings, step, self._of)
        numbers = step_numbers(
            step, count, rates, settings.weight_decay, settings.clip, self._betas
        )
        norm = self._engine.update(self._state, self._gradient, numbers)
        if not math.isfinite(norm):
            what = f"the gradient of step {step} is {norm} (dialogues {_ids(batch)})"
            raise self._diverged(what, "them")
        self.step = step
        self.losses.append(total / count)
        tokens, taken = sum(e.inputs for e in batch), time.monotonic() - since
        return StepReport(step, self._of, total / count, norm, rates[0], tokens, taken)

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

    def end(self) -> TrainingOutcome:
        """The state becomes the one that is kept."""
        if self._kept is not None:
            self._state.parameters[...] = self._kept
        return TrainingOutcome(tuple(self.losses), tuple(self.curve), self._kept_step, self.seconds)

    def _diverged(self, what: str, cause: str) -> TrainingDiverged:
        self._save()
        return TrainingDiverged(
            f"{what}: training stopped and kept the state of step {self.step} in {self._folder}; "
            f"lower the learning rate or leave {cause} out."
        )


def _ids(examples: Sequence[Example]) -> str:
    return ", ".join(example.id for example in examples)
