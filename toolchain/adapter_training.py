"""``attune train`` as a function: dialogues and a bundle in, a trained adapter out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime_py.bundle.adapter_forms import from_runtime, load_adapter, to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.bundle.peft_adapter import read_peft, write_peft
from runtime_py.engine.examples import Example
from runtime_py.engine.streaming import open_training
from runtime_py.engine.trainer import StepReport, TrainingOutcome, train
from runtime_py.engine.training_engine import TrainingEngine, evaluate
from runtime_py.engine.training_plan import Settings
from runtime_py.loop.errors import TrainingError
from runtime_py.loop.files import replacing, writing
from toolchain import defaults
from toolchain.report.charts import Series, write_svg
from toolchain.training_data import TrainingData, flat, read_training_data

RUN, PEFT, PTD, CURVE = "run", "adapter", "adapter.ptd", "curve.svg"


@dataclass(frozen=True)
class TrainedAdapter:
    """Losses in nats a label. ``held_out``: before and after, of ``judged`` dialogues that were
    neither learned nor chose the step; None where nothing was held out. ``held_out_curve``: (step,
    loss) of them. ``stopping_curve``: the same of the ``stopping`` dialogues that chose
    ``kept_step``, whose state the adapter is; empty where there were too few. ``cut``,
    ``left_out``: ids of dialogues that are too long. ``adapter``: the PEFT folder."""

    losses: tuple[float, ...]
    held_out: tuple[float | None, float | None]
    held_out_curve: tuple[tuple[int, float], ...]
    stopping_curve: tuple[tuple[int, float], ...]
    kept_step: int
    dialogues: int
    judged: int
    stopping: int
    cut: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float
    tokens_per_second: float
    adapter: Path

    def as_json(self) -> dict:
        """What ``attune train --json`` prints."""
        return {
            "losses": list(self.losses),
            "held_out_before": self.held_out[0],
            "held_out_after": self.held_out[1],
            "held_out_curve": [list(point) for point in self.held_out_curve],
            "held_out_dialogues": self.judged,
            "stopping_dialogues": self.stopping,
            "stopping_curve": [list(point) for point in self.stopping_curve],
            "kept_step": self.kept_step,
            "dialogues": self.dialogues,
            "cut": list(self.cut),
            "left_out": list(self.left_out),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "adapter": str(self.adapter),
        }


class _Progress:
    """Follows a run: its speed, and the loss of the held-out examples, before it, every ``every``
    steps (0: never within it) and after it."""

    def __init__(
        self,
        engine: TrainingEngine,
        state: AdapterState,
        held_out: Sequence[Example],
        every: int,
        on_step: Callable[[StepReport, float], None],
    ) -> None:
        self._engine, self._state, self._held_out = engine, state, held_out
        self._every = every
        self._on_step = on_step
        self._tokens, self._seconds = 0, 0.0
        self.curve: list[tuple[int, float]] = []
        self._look(0)

    def _look(self, step: int) -> None:
        if self._held_out:
            self.curve.append((step, evaluate(self._engine, self._state, self._held_out)))

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    def __call__(self, step: StepReport) -> None:
        self._tokens += step.tokens
        self._seconds += step.seconds
        self._on_step(step, self.tokens_per_second)
        if self._every and step.number % self._every == 0 and step.number < step.of:
            self._look(step.number)

    def end(self, step: int) -> tuple[float | None, float | None]:
        """Losses of the held-out examples before and after; the state is that of ``step``."""
        self._look(step)
        return (self.curve[0][1], self.curve[-1][1]) if self.curve else (None, None)


def train_adapter(
    bundle: Path,
    data: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    settings: Settings = defaults.SETTINGS,
    held_out: float = defaults.HELD_OUT,
    stopping_from: int = defaults.STOPPING_FROM,
    memory: defaults.MemoryMode = defaults.MEMORY,
    keep_mb: float = defaults.KEEP_MB,
    refuse_long: bool = False,
    threads: int | None = None,
    on_step: Callable[[StepReport, float], None] = lambda step, tokens_per_second: None,
    notify: Callable[[str], None] = lambda text: None,
) -> TrainedAdapter:
    """Trains a bundle's adapter on the dialogues of ``data`` with the phone's own programs.

    Writes into the folder ``out`` the adapter (``adapter/`` for PEFT, ``adapter.ptd`` for
    ``lm.pte``), the curve, and the state of the run, from which a run that was cut off goes on.
    ``adapter``: a PEFT folder or .ptd to start from, None for the bundle's; ``held_out``: part of
    the dialogues that are not learned: where these are ``stopping_from`` or more, half of them
    choose the step whose state is kept, and the other half is reported; ``memory``: "low" computes
    the forward anew, "high" keeps ``keep_mb`` of it (10⁶ bytes); ``refuse_long``: dialogues that
    are too long are an error instead of cut; ``threads``: None for all cores. ``on_step`` is told
    each step and the tokens a second so far, ``notify`` a sentence for the user.

    Raises ``TrainingError``, ``BundleError``, ``AdapterError`` or ``LoopError`` with a sentence.
    """
    _check(settings, memory)
    opened = open_bundle(bundle)
    tensors = opened.manifest.adapter.tensors
    engine = open_training(opened, keep_mb=keep_mb if memory == "high" else 0.0, threads=threads)
    split = read_training_data(opened, data, held_out, stopping_from, refuse_long, notify)
    settings = _looking_seldom(settings, split)
    values = to_runtime(load_adapter(adapter) if adapter else read_peft(opened.peft), tensors)
    state = AdapterState.of(tensors, values)
    with writing(out):  # told before anything is computed
        (out / RUN).mkdir(parents=True, exist_ok=True)
    every = 0 if split.stopping else settings.check_every
    progress = _Progress(engine, state, flat(split.held_out), every, on_step)
    outcome = _run(opened, engine, state, split, settings, out / RUN, progress)
    judged = progress.end(outcome.kept_step)
    _write(out, {**values, **state.tensors})
    _draw(out / CURVE, outcome, progress.curve)
    return TrainedAdapter(
        losses=outcome.losses,
        held_out=judged,
        held_out_curve=tuple(progress.curve),
        stopping_curve=outcome.curve,
        kept_step=outcome.kept_step,
        dialogues=len(split.training) + len(split.stopping) + len(split.held_out),
        judged=len(split.held_out),
        stopping=len(split.stopping),
        cut=split.cut,
        left_out=split.left_out,
        seconds=outcome.seconds,
        tokens_per_second=progress.tokens_per_second,
        adapter=out / PEFT,
    )


def _looking_seldom(settings: Settings, split: TrainingData) -> Settings:
    """No more dialogues are looked at than were learned since the look before."""
    watched = len(split.stopping or split.held_out)
    size = min(settings.batch, len(split.training))
    return replace(settings, check_every=max(settings.check_every, -(-watched // size)))


def _run(
    bundle: Bundle,
    engine: TrainingEngine,
    state: AdapterState,
    split: TrainingData,
    settings: Settings,
    folder: Path,
    on_step: Callable[[StepReport], None],
) -> TrainingOutcome:
    """Trains ``state`` in place, or goes on from what ``folder`` has."""
    outcome = train(
        engine,
        state,
        flat(split.training),
        settings,
        bundle.training.optimizer,
        folder,
        stopping=flat(split.stopping),
        sets=[len(some) for some in split.training],
        base=bundle.training_digest,
        on_step=on_step,
    )
    if outcome is None:
        raise TrainingError(f"the run in {folder} was stopped: give the same command to go on.")
    return outcome


def _check(settings: Settings, memory: str) -> None:
    if settings.schedule not in defaults.SCHEDULES:
        raise TrainingError(
            f"no --schedule {settings.schedule}; known: {', '.join(defaults.SCHEDULES)}."
        )
    if memory not in defaults.MEMORY_MODES:
        raise TrainingError(f"no --memory {memory}; known: {', '.join(defaults.MEMORY_MODES)}.")
    above_zero = {
        "--learning-rate": settings.learning_rate,
        "--b-rate-ratio": settings.b_rate_ratio,
        "--clip": settings.clip,
    }
    for name, value in above_zero.items():
        if not value > 0:
            raise TrainingError(f"{name} {value:g} changes nothing: give more than 0.")
    finite = {
        "--learning-rate": settings.learning_rate,
        "--b-rate-ratio": settings.b_rate_ratio,
        "--weight-decay": settings.weight_decay,
    }
    for name, value in finite.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} {value:g} leaves no number in the adapter: give less.")


def _write(out: Path, trained: dict) -> None:
    """The trained values (by the programs' names) in the runtime's form and in PEFT's."""
    write_ptd(out / PTD, trained)
    write_peft(out / PEFT, from_runtime(trained, str(out / PTD)), replace=True)


def _draw(path: Path, outcome: TrainingOutcome, curve: Sequence[tuple[int, float]]) -> None:
    series = [Series("training", tuple(enumerate(outcome.losses, 1)))]
    if outcome.curve:
        series.append(Series("held out, choosing the step", outcome.curve))
    series += [Series("held out", tuple(curve))] if curve else []
    with replacing(path) as beside:
        write_svg(beside, series, "step", "loss, nats a token")
