"""``attune bench train`` as a function: speed interleaved in one process, memory in children."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from exporters.executorch.training_program import lower_training
from exporters.training.programs import training_programs
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import IGNORED, Example, example
from runtime_py.engine.native import silenced
from runtime_py.loop.errors import BundleError
from runtime_py.loop.stream import read_dialogues
from toolchain.bench.machine import OtherProcesses
from toolchain.bench.peak_memory import PeakMemory, measure_kind
from toolchain.bench.peak_product import PeakProduct
from toolchain.bench.rounds import Timing
from toolchain.bench.training_engines import (
    AttuneStepper,
    KernelStepper,
    Stepper,
    TorchStepper,
    attune_stepper,
    peft_model,
)
from toolchain.bench.training_report import (
    CHECKPOINTING,
    HIGH,
    KERNELS_FOUR,
    KERNELS_ONE,
    LOW,
    TORCH,
    TrainingReport,
    TrainingRun,
)
from toolchain.compile.shipped_text import as_dialogue, shipped_dialogues
from toolchain.compile.source import CheckpointSource, find_source, float_model
from toolchain.compile.training_part import training_spec

Progress = Callable[[str], None]


def bench_training(
    bundle: Path,
    *,
    tokens: int = 256,
    threads: Sequence[int] = (1,),
    rounds: int = 5,
    keep_mb: float = 160.0,
    source: str | None = None,
    data: Path | None = None,
    memory: bool = True,
    kernels: bool = True,
    progress: Progress = lambda text: None,
) -> TrainingReport:
    """Measures a training step on one sequence of ``tokens`` tokens, one run for each of
    ``threads``.

    ``keep_mb``: the budget of high, in MB. ``source``: the bundle's model, for PyTorch's rows;
    ``data``: a stream to take the sequence from. ``memory``, ``kernels``: whether to measure them.
    Raises ``BundleError``, ``ExportError`` and ``LoopError`` for what cannot be run.
    """
    opened = open_bundle(bundle)
    android, longest = opened.android, max(opened.training.lengths)
    if tokens - 1 > longest:
        raise BundleError(
            f"--tokens {tokens} does not fit the longest training program ({longest} tokens): "
            f"export with a longer --train-lengths."
        )
    sequence = pick_sequence(opened, tokens, data)
    original = find_source(opened.manifest, source)
    reasons = {TORCH: original} if isinstance(original, str) else {}
    runs, lowering = [], None
    with tempfile.TemporaryDirectory(prefix="attune-") as name:
        folder = Path(name)
        lowered: dict[str, KernelStepper] = {}
        if kernels and not isinstance(original, str):
            lowered = _kernels(opened, original, sequence, folder, progress)
        for count in threads:
            high, steppers = _steppers(opened, original, sequence, keep_mb, count)
            runs.append(
                _run(opened, sequence, high, steppers | lowered, count, rounds, folder, progress)
            )
        if not isinstance(original, str):
            progress("lower the training programs")
            lowering = _lowering(opened, original, folder)
    peaks = _memory(bundle, source, original, sequence, keep_mb, progress) if memory else {}
    return TrainingReport(
        bundle=opened,
        rounds=rounds,
        sequence=sequence,
        runs=tuple(runs),
        memory=peaks,
        programs_bytes=android.program("head").bytes,
        lowering_seconds=lowering,
        reasons=reasons,
    )


def pick_sequence(bundle: Bundle, most: int = 256, data: Path | None = None) -> Example:
    """The first dialogue of at least ``most`` tokens, cut to them; else the longest there is. Of
    the stream ``data``, or of the text that ships with attune.

    Raises ``LoopError`` for a stream that is none, and ``BundleError`` where no dialogue serves.
    """
    text = ChatText.of(bundle)
    if data is not None:
        dialogues = read_dialogues(data)
    else:
        dialogues = [
            as_dialogue(f"attune-{i}", turns)
            for i, turns in enumerate(shipped_dialogues("perplexity"))
        ]
    best: Example | None = None
    for dialogue in dialogues:
        whole = example(dialogue, text)
        tokens, labels = whole.tokens[:most], whole.labels[:most]
        if (labels != IGNORED).sum() < 16:
            continue
        cut = Example(whole.id, tokens, labels)
        if len(tokens) == most:
            return cut
        if best is None or len(tokens) > len(best.tokens):
            best = cut
    if best is None:
        raise BundleError("there is no dialogue to measure with: give one with --data.")
    return best


def step_flops(bundle: Bundle, sequence: Example, kept: int) -> float:
    """FLOPs of the products of one step that keeps ``kept`` layers' activations and the last's."""
    flops = {p.name: p.flops or 0.0 for p in bundle.android.target.programs}
    length = min(n for n in bundle.training.lengths if n >= sequence.inputs)
    layers = len(bundle.training.layers)
    heads = -(-sequence.count // bundle.training.positions)
    total = layers * flops[f"block_forward_{length}"] + heads * flops["head"] + flops["adamw"]
    total += (kept + 1) * flops[f"block_backward_saved_{length}"]
    return total + (layers - kept - 1) * flops[f"block_backward_{length}"]


def _lowering(bundle: Bundle, source: CheckpointSource, folder: Path) -> float:
    """Seconds of CPU time of lowering the bundle's training programs once more."""
    model = float_model(bundle.manifest, source)
    adapter = bundle.manifest.adapter
    spec = training_spec(model, adapter.targets, adapter.rank, bundle.training.precision)
    begin = time.process_time()
    lower_training(training_programs(spec, bundle.training.lengths), folder / "training.pte")
    return time.process_time() - begin


def _kernels(
    bundle: Bundle, source: CheckpointSource, sequence: Example, folder: Path, progress: Progress
) -> dict[str, KernelStepper]:
    steppers = {}
    for key, layers in ((KERNELS_ONE, 1), (KERNELS_FOUR, 4)):
        progress(f"export {layers} layers for ExecuTorch's kernels")
        model = float_model(bundle.manifest, source)
        layers = min(layers, len(model.blocks))
        del model.blocks[layers:]
        model.spec = replace(model.spec, layers=model.spec.layers[:layers])
        steppers[key] = KernelStepper(model, sequence, folder)
    return steppers


def _steppers(
    bundle: Bundle, source: CheckpointSource | str, sequence: Example, keep_mb: float, threads: int
) -> tuple[AttuneStepper, dict[str, Stepper]]:
    """-> high, and all contestants but ExecuTorch's kernels."""
    with silenced():
        low = attune_stepper(f"attune {LOW}", bundle, sequence, 0.0, threads)
        high = attune_stepper(f"attune {HIGH}", bundle, sequence, keep_mb, threads)
    steppers: dict[str, Stepper] = {LOW: low, HIGH: high}
    if not isinstance(source, str):
        for key in (TORCH, CHECKPOINTING):
            model = peft_model(source.checkpoint.hf_model(), bundle.manifest)
            steppers[key] = TorchStepper(model, sequence, key == CHECKPOINTING)
    return high, steppers


def _run(
    bundle: Bundle,
    sequence: Example,
    high: AttuneStepper,
    steppers: Mapping[str, Stepper],
    threads: int,
    rounds: int,
    folder: Path,
    progress: Progress,
) -> TrainingRun:
    length = min(n for n in bundle.training.lengths if n >= sequence.inputs)
    torch.set_num_threads(threads)
    product, others = PeakProduct(folder), OtherProcesses()

    def shown(name: str) -> None:
        progress(f"{threads} threads: {name}")

    seconds, losses, peak = _timed(steppers, product, rounds, shown)
    return TrainingRun(
        threads,
        timings={key: Timing(values, len(sequence.tokens)) for key, values in seconds.items()},
        peak=peak,
        flops={
            LOW: step_flops(bundle, sequence, 0),
            HIGH: step_flops(bundle, sequence, high.kept_layers(length)),
        },
        losses=losses,
        neighbours=others.cores(),
    )


def _timed(
    steppers: Mapping[str, Stepper],
    product: PeakProduct,
    rounds: int,
    progress: Progress,
) -> tuple[dict[str, tuple[float, ...]], dict[str, float], float]:
    """-> seconds of each round, the first loss, both by contestant; the machine's peak in FLOP/s.
    One round more than ``rounds`` comes first and does not count."""
    peak = 0.0
    seconds: dict[str, list[float]] = {key: [] for key in steppers}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):
        peak = max(peak, product.rate())
        for key, stepper in steppers.items():
            progress(stepper.name)
            begin = time.perf_counter()
            loss = stepper.step()
            if turn:
                seconds[key].append(time.perf_counter() - begin)
            losses.setdefault(key, loss)
    return {key: tuple(values) for key, values in seconds.items()}, losses, peak


def _memory(
    bundle: Path,
    source: str | None,
    original: CheckpointSource | str,
    sequence: Example,
    keep_mb: float,
    progress: Progress,
) -> dict[str, PeakMemory]:
    data = json.dumps({"tokens": sequence.tokens.tolist(), "labels": sequence.labels.tolist()})
    kinds = {LOW: ("attune", 0.0), HIGH: ("attune", keep_mb)}
    if not isinstance(original, str):
        kinds |= {TORCH: ("torch", 0.0), CHECKPOINTING: ("torch-checkpointing", 0.0)}
    peaks = {}
    for key, (kind, keep) in kinds.items():
        progress(f"memory: {key}")
        peaks[key] = measure_kind(kind, [str(bundle), source or "", "1", str(keep), data])
    return peaks
