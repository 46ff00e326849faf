"""``attune train`` as a function: dialogues and a bundle in, a trained adapter out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from runtime_py.bundle.adapter_forms import from_runtime, load_adapter, to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.bundle.peft_adapter import read_peft, write_peft
from runtime_py.engine.examples import Example, fit
from runtime_py.engine.streaming import open_training
from runtime_py.engine.trainer import Settings, StepReport, evaluate, train
from runtime_py.loop.errors import TrainingError
from runtime_py.loop.stream import read_stream
from toolchain.report.curves import Series, write_svg

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Request:
    """What a user asked for; see ``attune train --help``."""

    bundle: Path
    data: Path
    out: Path
    adapter: Path | None = None
    held_out: float = 0.1
    epochs: int = 3
    batch: int = 8
    learning_rate: float = 3e-4
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    memory: str = "low"
    keep_mb: float = 160.0
    save_every: int = 10
    refuse_long: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Result:
    """Losses in nats a label. ``held_out``: before and after, None where nothing was held out.
    ``held_out_curve``: (step, loss) at each epoch's end."""

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


def _check(request: Request) -> None:
    if request.schedule not in SCHEDULES:
        raise TrainingError(f"no --schedule {request.schedule}; known: {', '.join(SCHEDULES)}.")
    if request.memory not in ("low", "high"):
        raise TrainingError(f"no --memory {request.memory}; known: low, high.")
    for name, value in (("--learning-rate", request.learning_rate), ("--clip", request.clip)):
        if not value > 0:
            raise TrainingError(f"{name} {value:g} changes nothing: give more than 0.")
    for name, value in (
        ("--learning-rate", request.learning_rate),
        ("--weight-decay", request.weight_decay),
    ):
        if not math.isfinite(value):
            raise TrainingError(f"{name} {value:g} leaves no number in the adapter: give less.")


def _examples(
    request: Request, bundle: Bundle, said: Callable[[str], None]
) -> tuple[list[Example], list[Example], tuple[str, ...], tuple[str, ...]]:
    """-> training and held-out examples, ids of those cut and of those left out. Of every so many
    dialogues the last is held out."""
    dialogues = [record.dialogue for record in read_stream(request.data)]
    if not dialogues:
        raise TrainingError(f"{request.data} has no dialogue: give one JSON object a line.")
    text = ChatText(bundle)
    fitted = fit(dialogues, text, max(bundle.training.lengths), request.refuse_long)
    longest = max(bundle.training.lengths)
    if fitted.cut:
        said(f"cut at a turn to fit {longest} tokens: {len(fitted.cut)} of {len(dialogues)}")
    if fitted.left_out:
        said(
            f"left out, since even the first exchange has more than {longest} tokens: "
            f"{len(fitted.left_out)} (export with a longer --train-lengths to keep them)"
        )
    if not fitted.examples:
        raise TrainingError(
            f"no dialogue of {request.data} fits the training programs ({longest} tokens): export "
            f"with a longer --train-lengths."
        )
    count = round(len(fitted.examples) * request.held_out)
    if count == len(fitted.examples):
        count -= 1
    step = len(fitted.examples) / count if count else 0
    chosen = {int((i + 1) * step) - 1 for i in range(count)}
    kept = [e for i, e in enumerate(fitted.examples) if i not in chosen]
    held = [e for i, e in enumerate(fitted.examples) if i in chosen]
    return kept, held, fitted.cut, fitted.left_out


def fine_tune(
    request: Request,
    told: Callable[[StepReport, float], None],
    said: Callable[[str], None],
) -> Result:
    """Trains and writes ``request.out``; ``told``: each step and the tokens a second so far.

    Raises ``TrainingError``, ``BundleError``, ``AdapterError`` or ``LoopError`` with a sentence.
    """
    _check(request)
    bundle = open_bundle(request.bundle)
    manifest = bundle.manifest
    keep = request.keep_mb if request.memory == "high" else 0.0
    engine = open_training(bundle, keep_mb=keep, threads=request.threads)
    training, held, cut, left_out = _examples(request, bundle, said)
    source = load_adapter(request.adapter) if request.adapter else read_peft(bundle.peft)
    values = to_runtime(source, manifest.adapter.tensors)
    state = AdapterState.of(manifest.adapter.tensors, values)
    settings = Settings(
        epochs=request.epochs,
        batch=request.batch,
        learning_rate=request.learning_rate,
        weight_decay=request.weight_decay,
        clip=request.clip,
        schedule=cast(Literal["constant", "linear", "cosine"], request.schedule),
        warmup=request.warmup,
        seed=request.seed,
        save_every=request.save_every,
    )
    folder = request.out / "run"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"--out {request.out} cannot be made ({error.strerror}): name a folder that can."
        ) from error
    before = evaluate(engine, state, held) if held else None
    an_epoch = -(-len(training) // request.batch)
    curve: list[tuple[int, float]] = [(0, before)] if before is not None else []
    read = [0, 0.0]  # tokens, seconds of steps

    def step_done(step: StepReport) -> None:
        read[0] += step.tokens
        read[1] += step.seconds
        told(step, read[0] / read[1])
        if held and step.number % an_epoch == 0:
            curve.append((step.number, evaluate(engine, state, held)))

    outcome = train(
        engine,
        state,
        training,
        settings,
        bundle.training.optimizer,
        folder,
        base=next(f.sha256 for f in manifest.files if f.path == bundle.training.weights),
        on_step=step_done,
    )
    assert outcome is not None
    after = curve[-1][1] if held and len(curve) > 1 else None
    if held and after is None:  # the run was complete already
        after = evaluate(engine, state, held)
    series = [Series("training", tuple(enumerate(outcome.losses, 1)))]
    series += [Series("held out", tuple(curve))] if curve else []
    try:
        _write(request, state, values)
        write_svg(request.out / "curve.svg", series, "step", "loss, nats a token")
    except OSError as error:
        raise TrainingError(
            f"{request.out} cannot be written ({error.strerror}): the run itself is whole; free "
            f"space and give the same command again to have its adapter."
        ) from error
    return Result(
        losses=outcome.losses,
        held_out=(before, after),
        held_out_curve=tuple(curve),
        dialogues=len(training) + len(held),
        cut=cut,
        left_out=left_out,
        seconds=outcome.seconds,
        tokens_per_second=read[0] / read[1] if read[1] else 0.0,
        adapter=request.out / "adapter",
    )


def _write(request: Request, state: AdapterState, values: dict) -> None:
    """The trained values in the runtime's form and in PEFT's."""
    trained = {**values, **state.tensors}
    write_ptd(request.out / "adapter.ptd", trained)
    folder, beside = request.out / "adapter", request.out / "adapter.part"
    shutil.rmtree(beside, ignore_errors=True)
    write_peft(beside, from_runtime(trained, str(request.out / "adapter.ptd")))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
