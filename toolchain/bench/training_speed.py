"""``attune bench train`` as a function: speed interleaved in one process, memory in children."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from exporters.executorch.training_program import lower_training
from exporters.training.programs import training_programs
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import IGNORED, Example, example
from runtime_py.engine.native import silenced
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import BundleError
from runtime_py.loop.stream import read_stream
from toolchain.bench import machine, training_memory
from toolchain.bench.rounds import Timing
from toolchain.bench.training_engines import (
    AttuneStepper,
    KernelStepper,
    Stepper,
    TorchStepper,
    attune_stepper,
    peft_model,
)
from toolchain.compile.shipped_text import shipped_dialogues
from toolchain.compile.training_part import training_spec
from toolchain.verify.source import Source, find_source, float_model

LOW, HIGH, TORCH, CHECKPOINTING = "low", "high", "torch", "torch_checkpointing"
KERNELS_ONE, KERNELS_FOUR = "executorch_kernels_1", "executorch_kernels_4"


@dataclass(frozen=True)
class Request:
    """``keep_mb``: the budget of high, in MB. ``memory``, ``kernels``: whether to measure them."""

    bundle: Path
    tokens: int = 256
    threads: tuple[int, ...] = (1,)
    rounds: int = 5
    keep_mb: float = 160.0
    source: str | None = None
    data: Path | None = None
    memory: bool = True
    kernels: bool = True


@dataclass(frozen=True)
class Run:
    """One number of threads. ``timings`` by contestant; ``peak`` in FLOP/s, of the better of torch
    and XNNPACK; ``flops`` of a step of low and of high; ``neighbours``: cores that others took."""

    threads: int
    timings: Mapping[str, Timing]
    peak: float
    flops: Mapping[str, float]
    losses: Mapping[str, float]
    neighbours: float | None


@dataclass(frozen=True)
class Report:
    request: Request
    bundle: Bundle
    sequence: Example
    runs: tuple[Run, ...]
    memory: Mapping[str, training_memory.Memory]
    programs_bytes: int
    lowering_seconds: float | None
    reasons: Mapping[str, str] = field(default_factory=dict)


def pick_sequence(request: Request, bundle: Bundle) -> Example:
    """The first dialogue of at least so many tokens, cut to them; else the longest there is."""
    text = ChatText(bundle)
    if request.data is not None:
        dialogues = [record.dialogue for record in read_stream(request.data)]
    else:
        dialogues = [
            Dialogue(f"attune-{i}", tuple(Turn(t["role"], t["content"]) for t in turns))
            for i, turns in enumerate(shipped_dialogues("perplexity"))
        ]
    best: Example | None = None
    for dialogue in dialogues:
        found = example(dialogue, text)
        tokens, labels = found.tokens[: request.tokens], found.labels[: request.tokens]
        if (labels != IGNORED).sum() < 16:
            continue
        cut = Example(found.id, tokens, labels)
        if len(tokens) == request.tokens:
            return cut
        if best is None or len(tokens) > len(best.tokens):
            best = cut
    if best is None:
        raise BundleError("there is no dialogue to measure with: give one with --data.")
    return best


class Product:
    """A float32 product of large squares in torch and in XNNPACK: the machine's peak. It is timed
    in every round, so that what slows the contestants down slows it down as well."""

    SIZE = 1536

    def __init__(self, folder: Path) -> None:
        self._a, self._b = torch.randn(self.SIZE, self.SIZE), torch.randn(self.SIZE, self.SIZE)
        with silenced():
            self._xnnpack = _xnnpack_product(folder / "product.pte", self.SIZE)

    def rate(self) -> float:
        """FLOP/s of the better of the two, the best of three."""
        best = float("inf")
        for product in (torch.mm, lambda a, b: self._xnnpack(a[None], b[None])):
            for _ in range(3):
                begin = time.perf_counter()
                product(self._a, self._b)
                best = min(best, time.perf_counter() - begin)
        return 2.0 * self.SIZE**3 / best


def _xnnpack_product(path: Path, size: int) -> Callable[[torch.Tensor, torch.Tensor], object]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    class Product(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.bmm(a, b)

    inputs = (torch.zeros(1, size, size), torch.zeros(1, size, size))
    program = torch.export.export(Product(), inputs, strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    loaded = Runtime.get().load_program(path)
    method = loaded.load_method("forward")
    assert method is not None

    def call(a: torch.Tensor, b: torch.Tensor, keep: object = loaded) -> object:
        return method.execute((a, b))

    return call


def step_flops(bundle: Bundle, sequence: Example, kept: int) -> float:
    """FLOPs of the products of one step that keeps ``kept`` layers' activations and the last's."""
    flops = {p.name: p.flops or 0.0 for p in bundle.android.target.programs}
    length = min(n for n in bundle.training.lengths if n >= sequence.inputs)
    layers = len(bundle.training.layers)
    heads = -(-sequence.count // bundle.training.positions)
    total = layers * flops[f"block_forward_{length}"] + heads * flops["head"] + flops["adamw"]
    total += (kept + 1) * flops[f"block_backward_saved_{length}"]
    return total + (layers - kept - 1) * flops[f"block_backward_{length}"]


def bench(request: Request, told: Callable[[str], None] = lambda text: None) -> Report:
    """Measures. Raises ``BundleError`` and ``ExportError`` for what cannot be run."""
    bundle = open_bundle(request.bundle)
    android = bundle.android
    if request.tokens - 1 > max(bundle.training.lengths):
        raise BundleError(
            f"--tokens {request.tokens} does not fit the longest training program "
            f"({max(bundle.training.lengths)} tokens): export with a longer --train-lengths."
        )
    sequence = pick_sequence(request, bundle)
    source = find_source(bundle.manifest, request.source)
    reasons = {TORCH: source} if isinstance(source, str) else {}
    runs, lowering = [], None
    with tempfile.TemporaryDirectory(prefix="attune-") as folder:
        kernels = _kernels(request, bundle, source, sequence, Path(folder), told)
        for threads in request.threads:
            runs.append(
                _run(request, bundle, source, sequence, kernels, threads, told, Path(folder))
            )
        if not isinstance(source, str):
            told("lower the training programs")
            lowering = _lowering(bundle, source, Path(folder))
    memory = _memory(request, source, sequence, told) if request.memory else {}
    return Report(
        request,
        bundle,
        sequence,
        tuple(runs),
        memory,
        android.program("head").bytes,
        lowering,
        reasons,
    )


def _lowering(bundle: Bundle, source: Source, folder: Path) -> float:
    """Seconds of CPU time of lowering the bundle's training programs once more."""
    model = float_model(bundle.manifest, source)
    spec = training_spec(
        model,
        bundle.manifest.adapter.targets,
        bundle.manifest.adapter.rank,
        bundle.training.precision,
    )
    begin = time.process_time()
    lower_training(training_programs(spec, bundle.training.lengths), folder / "training.pte")
    return time.process_time() - begin


def _kernels(
    request: Request,
    bundle: Bundle,
    source: Source | str,
    sequence: Example,
    folder: Path,
    told: Callable[[str], None],
) -> dict[str, KernelStepper]:
    if isinstance(source, str) or not request.kernels:
        return {}
    made = {}
    for key, layers in ((KERNELS_ONE, 1), (KERNELS_FOUR, 4)):
        told(f"export {layers} layers for ExecuTorch's kernels")
        model = float_model(bundle.manifest, source)
        layers = min(layers, len(model.blocks))
        del model.blocks[layers:]
        model.spec = replace(model.spec, layers=model.spec.layers[:layers])
        made[key] = KernelStepper(model, sequence, folder)
    return made


def _run(
    request: Request,
    bundle: Bundle,
    source: Source | str,
    sequence: Example,
    kernels: Mapping[str, KernelStepper],
    threads: int,
    told: Callable[[str], None],
    folder: Path,
) -> Run:
    made: dict[str, Stepper] = {}
    for key, keep in ((LOW, 0.0), (HIGH, request.keep_mb)):
        with silenced():
            made[key] = attune_stepper(f"attune {key}", bundle, sequence, keep, threads)
    if not isinstance(source, str):
        for key in (TORCH, CHECKPOINTING):
            model = peft_model(source.checkpoint.hf_model(), bundle.manifest)
            made[key] = TorchStepper(model, sequence, key == CHECKPOINTING)
    made |= kernels
    engine = made[HIGH]
    assert isinstance(engine, AttuneStepper)
    length = min(n for n in bundle.training.lengths if n >= sequence.inputs)
    kept = engine.kept_layers(length)
    torch.set_num_threads(threads)
    product, peak = Product(folder), 0.0
    neighbours = machine.Neighbours()
    seconds: dict[str, list[float]] = {key: [] for key in made}
    losses: dict[str, float] = {}
    for turn in range(request.rounds + 1):
        peak = max(peak, product.rate())
        for key, stepper in made.items():
            told(f"{threads} threads: {stepper.name}")
            begin = time.perf_counter()
            loss = stepper.step()
            if turn:
                seconds[key].append(time.perf_counter() - begin)
            losses.setdefault(key, loss)
    timings = {key: Timing(tuple(v), len(sequence.tokens)) for key, v in seconds.items()}
    flops = {
        LOW: step_flops(bundle, sequence, 0),
        HIGH: step_flops(bundle, sequence, kept),
    }
    return Run(threads, timings, peak, flops, losses, neighbours.cores())


def _memory(
    request: Request, source: Source | str, sequence: Example, told: Callable[[str], None]
) -> dict[str, training_memory.Memory]:
    data = json.dumps({"tokens": sequence.tokens.tolist(), "labels": sequence.labels.tolist()})
    kinds = {LOW: ("attune", 0.0), HIGH: ("attune", request.keep_mb)}
    if not isinstance(source, str):
        kinds |= {TORCH: ("torch", 0.0), CHECKPOINTING: ("torch-checkpointing", 0.0)}
    found = {}
    for key, (kind, keep) in kinds.items():
        told(f"memory: {key}")
        arguments = [str(request.bundle), request.source or "", "1", str(keep), data]
        found[key] = training_memory.measure_kind(kind, arguments)
    return found
