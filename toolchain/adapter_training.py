"""``attune train`` as a function: dialogues and a bundle in, a trained adapter out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_py.bundle.adapter_forms import from_runtime, load_adapter, to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.bundle.peft_adapter import read_peft, write_peft
from runtime_py.engine.examples import Example, fit
from runtime_py.engine.streaming import open_training
from runtime_py.engine.trainer import (
    Settings,
    StepReport,
    TrainingEngine,
    TrainingOutcome,
    evaluate,
    train,
)
from runtime_py.loop.errors import TrainingError
from runtime_py.loop.files import replacing, writing
from runtime_py.loop.stream import read_dialogues
from toolchain import defaults
from toolchain.report.charts import Series, write_svg

RUN, PEFT, PTD, CURVE = "run", "adapter", "adapter.ptd", "curve.svg"


@dataclass(frozen=True)
class TrainedAdapter:
    """Losses in nats a label. ``held_out``: before and after, None where nothing was held out.
    ``held_out_curve``: (step, loss) at each epoch's end. ``cut``, ``left_out``: ids of dialogues
    that are too long. ``adapter``: the PEFT folder."""

    losses: tuple[float, ...]
    held_out: tuple[float | None, float | None]
    held_out_curve: tuple[tuple[int, float], ...]
    dialogues: int
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
            "dialogues": self.dialogues,
            "cut": list(self.cut),
            "left_out": list(self.left_out),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "adapter": str(self.adapter),
        }


@dataclass(frozen=True)
class _Split:
    """Examples by what they are for; ids of the dialogues that were cut and left out."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    cut: tuple[str, ...]
    left_out: tuple[str, ...]


class _Progress:
    """Follows a run: its speed, and the loss of the held-out examples, before it and after each
    epoch."""

    def __init__(
        self,
        engine: TrainingEngine,
        state: AdapterState,
        held_out: Sequence[Example],
        epoch: int,
        on_step: Callable[[StepReport, float], None],
    ) -> None:
        self._engine, self._state, self._held_out = engine, state, held_out
        self._epoch = epoch  # steps
        self._on_step = on_step
        self._tokens, self._seconds = 0, 0.0
        self.curve: list[tuple[int, float]] = []
        if held_out:
            self.curve.append((0, self._loss()))

    def _loss(self) -> float:
        return evaluate(self._engine, self._state, self._held_out)

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    def __call__(self, step: StepReport) -> None:
        self._tokens += step.tokens
        self._seconds += step.seconds
        self._on_step(step, self.tokens_per_second)
        if self._held_out and step.number % self._epoch == 0:
            self.curve.append((step.number, self._loss()))

    def before_and_after(self) -> tuple[float | None, float | None]:
        """Losses of the held-out examples."""
        if not self.curve:
            return None, None
        # A run that was complete already took no step to measure at.
        after = self.curve[-1][1] if len(self.curve) > 1 else self._loss()
        return self.curve[0][1], after


def train_adapter(
    bundle: Path,
    data: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    settings: Settings = defaults.SETTINGS,
    held_out: float = defaults.HELD_OUT,
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
    the dialogues whose loss is only watched; ``memory``: "low" computes the forward anew, "high"
    keeps ``keep_mb`` of it (10⁶ bytes); ``refuse_long``: dialogues that are too long are an error
    instead of cut; ``threads``: None for all cores. ``on_step`` is told each step and the tokens a
    second so far, ``notify`` a sentence for the user.

    Raises ``TrainingError``, ``BundleError``, ``AdapterError`` or ``LoopError`` with a sentence.
    """
    _check(settings, memory)
    opened = open_bundle(bundle)
    tensors = opened.manifest.adapter.tensors
    engine = open_training(opened, keep_mb=keep_mb if memory == "high" else 0.0, threads=threads)
    split = _split(opened, data, held_out, refuse_long, notify)
    values = to_runtime(load_adapter(adapter) if adapter else read_peft(opened.peft), tensors)
    state = AdapterState.of(tensors, values)
    with writing(out):  # told before anything is computed
        (out / RUN).mkdir(parents=True, exist_ok=True)
    epoch = -(-len(split.training) // settings.batch)
    progress = _Progress(engine, state, split.held_out, epoch, on_step)
    outcome = _run(opened, engine, state, split.training, settings, out / RUN, progress)
    before, after = progress.before_and_after()
    _write(out, {**values, **state.tensors})
    _draw(out / CURVE, outcome.losses, progress.curve)
    return TrainedAdapter(
        losses=outcome.losses,
        held_out=(before, after),
        held_out_curve=tuple(progress.curve),
        dialogues=len(split.training) + len(split.held_out),
        cut=split.cut,
        left_out=split.left_out,
        seconds=outcome.seconds,
        tokens_per_second=progress.tokens_per_second,
        adapter=out / PEFT,
    )


def _run(
    bundle: Bundle,
    engine: TrainingEngine,
    state: AdapterState,
    examples: Sequence[Example],
    settings: Settings,
    folder: Path,
    on_step: Callable[[StepReport], None],
) -> TrainingOutcome:
    """Trains ``state`` in place, or goes on from what ``folder`` has."""
    weights = bundle.training.weights
    outcome = train(
        engine,
        state,
        examples,
        settings,
        bundle.training.optimizer,
        folder,
        base=next(file.sha256 for file in bundle.manifest.files if file.path == weights),
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
    for name, value in (("--learning-rate", settings.learning_rate), ("--clip", settings.clip)):
        if not value > 0:
            raise TrainingError(f"{name} {value:g} changes nothing: give more than 0.")
    for name, value in (
        ("--learning-rate", settings.learning_rate),
        ("--weight-decay", settings.weight_decay),
    ):
        if not math.isfinite(value):
            raise TrainingError(f"{name} {value:g} leaves no number in the adapter: give less.")


def _split(
    bundle: Bundle, data: Path, held_out: float, refuse_long: bool, notify: Callable[[str], None]
) -> _Split:
    """The dialogues of ``data``; of every so many the last is held out."""
    dialogues = read_dialogues(data)
    longest = max(bundle.training.lengths)
    fitted = fit(dialogues, ChatText(bundle), longest, refuse_long)
    if fitted.cut:
        notify(f"cut at a turn to fit {longest} tokens: {len(fitted.cut)} of {len(dialogues)}")
    if fitted.left_out:
        notify(
            f"left out, since even the first exchange has more than {longest} tokens: "
            f"{len(fitted.left_out)} (export with a longer --train-lengths to keep them)"
        )
    if not fitted.examples:
        raise TrainingError(
            f"no dialogue of {data} fits the training programs ({longest} tokens): export "
            f"with a longer --train-lengths."
        )
    count = round(len(fitted.examples) * held_out)
    if count == len(fitted.examples):
        count -= 1
    step = len(fitted.examples) / count if count else 0
    chosen = {int((i + 1) * step) - 1 for i in range(count)}
    training = tuple(e for i, e in enumerate(fitted.examples) if i not in chosen)
    held = tuple(e for i, e in enumerate(fitted.examples) if i in chosen)
    return _Split(training, held, fitted.cut, fitted.left_out)


def _write(out: Path, trained: dict) -> None:
    """The trained values (by the programs' names) in the runtime's form and in PEFT's."""
    write_ptd(out / PTD, trained)
    write_peft(out / PEFT, from_runtime(trained, str(out / PTD)), replace=True)


def _draw(path: Path, losses: Sequence[float], curve: Sequence[tuple[int, float]]) -> None:
    series = [Series("training", tuple(enumerate(losses, 1)))]
    series += [Series("held out", tuple(curve))] if curve else []
    with replacing(path) as beside:
        write_svg(beside, series, "step", "loss, nats a token")
