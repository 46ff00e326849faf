"""A bundle's training part: its weights file, its programs, and the proof of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from exporters.coreml.training_package import lower_training as lower_coreml
from exporters.errors import ExportError
from exporters.executorch.training_program import lower_training as lower_executorch
from exporters.model.transformer import Transformer
from exporters.signature import ProgramSignature
from exporters.training.head import SLICE
from exporters.training.programs import (
    BETA1,
    BETA2,
    EPS,
    TrainingProgram,
    TrainingSpec,
    training_programs,
)
from exporters.training.weights_file import as_stored, biased_sites, kept_precision, write_weights
from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.program_calls import ExecutorchPrograms
from runtime_py.engine.streaming import StreamingEngine
from toolchain.compile.autograd import autograd_gradient, trained_tensors
from toolchain.compile.tolerances import ABOVE, gradient_limit, model_terms, rounding
from toolchain.compile.wide import Wide, widened

WEIGHTS = "training/base.safetensors"
PROGRAMS = {"android": "android/training.pte", "ios": "ios/training.mlpackage"}
POSITIONS = 64  # of one head call: its logits are what takes memory there


def training_spec(
    model: Transformer, modules: Sequence[str], rank: int, precision: str | None
) -> TrainingSpec:
    """What the programs are made for; ``precision`` None: the weights exactly as ``model`` has
    them."""
    blocks, head = kept_precision(model)
    if precision is not None:
        blocks, head = precision, "fp32" if precision == "fp32" else "int8"
    return TrainingSpec(
        model=model.spec,
        blocks=blocks,
        head=head,
        lora=tuple(modules),
        rank=rank,
        biased=biased_sites(model),
        positions=POSITIONS,
    )


def write_training(
    folder: Path, model: Transformer, spec: TrainingSpec, lengths: Sequence[int]
) -> m.Training:
    """Writes the weights file into the bundle ``folder``; the manifest's section."""
    path = folder / WEIGHTS
    path.parent.mkdir(exist_ok=True)
    written = write_weights(model, spec, max(lengths), path)
    return m.Training.model_validate(
        {
            "precision": spec.blocks,
            "head_precision": spec.head,
            "weights": WEIGHTS,
            "table": written.table,
            "embed_scale": model.spec.embed_scale,
            "lengths": tuple(sorted(lengths)),
            "positions": spec.positions,
            "head_slice": SLICE,
            "layers": tuple(
                m.TrainingLayer(
                    rope=model.ropes.index(layer.rope) if layer.rope else None, window=layer.window
                )
                for layer in model.spec.layers
            ),
            "optimizer": m.Optimizer(beta1=BETA1, beta2=BETA2, epsilon=EPS),
        }
    )


def lower_programs(
    target: str, folder: Path, spec: TrainingSpec, lengths: Sequence[int]
) -> tuple[m.Program, ...]:
    """Lowers the training programs of one target into the bundle ``folder``."""
    path = folder / PROGRAMS[target]
    flops: Mapping[str, float] = {}
    if target == "android":
        programs = training_programs(spec, lengths)
        flops = lower_executorch(programs, path).flops
        signatures = [program.signature for program in programs]
    else:
        # Core ML takes float32 from outside, see exporters.coreml.training_package.
        spec = replace(spec, blocks="fp32", head="fp32")
        signatures = lower_coreml(training_programs(spec, lengths), path)
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    return tuple(
        manifest_program(signature, PROGRAMS[target], size).model_copy(
            update={"flops": flops.get(signature.name)}
        )
        for signature in signatures
    )


def manifest_program(signature: ProgramSignature, file: str, size: int) -> m.Program:
    """A program's entry in the manifest; ``size``: bytes of ``file``."""
    return m.Program.model_validate(
        {
            "name": signature.name,
            "file": file,
            "bytes": size,
            **{
                kind: tuple(
                    m.Tensor(name=s.name, shape=s.shape, dtype=s.dtype)
                    for s in getattr(signature, kind)
                )
                for kind in ("inputs", "outputs", "states")
            },
        }
    )


class EagerPrograms:
    """The functions that are captured, in PyTorch."""

    def __init__(self, programs: Sequence[TrainingProgram]) -> None:
        self._modules: dict[str, nn.Module] = {p.signature.name: p.module for p in programs}
        self.signatures: Mapping[str, m.Program] = {
            p.signature.name: manifest_program(p.signature, "", 0) for p in programs
        }

    @torch.no_grad()
    def call(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.array(array)) for array in inputs]
        return [output.contiguous().numpy() for output in self._modules[name](*tensors)]


def prove(
    folder: Path,
    programs: Sequence[m.Program],
    training: m.Training,
    spec: TrainingSpec,
    tensors: Sequence[m.AdapterTensor],
    values: Mapping[str, np.ndarray],
    model: Transformer,
    text: Tensor,
) -> None:
    """Holds the lowered programs to autograd over the whole transformer with the stored weights:
    loss and gradient of ``text`` [1, S] with an adapter that has an effect (``values``).

    Raises ``ExportError`` where they differ by more than float32 explains.
    """
    tokens = text[0, : min(text.shape[1], min(training.lengths))]
    labels = tokens.clone()
    labels[: len(tokens) // 4] = IGNORED
    example = Example("proof", tokens.numpy(), labels.numpy())
    state = AdapterState.of(tensors, values)
    weights = BaseWeights(folder / training.weights)
    engine = StreamingEngine(ExecutorchPrograms(folder, programs), weights, training)
    gradient = state.layout.zeros()
    loss, count = engine.gradient(state, [example], gradient)
    reference = as_stored(model, spec)
    whole = autograd_gradient(reference, values, [example])
    expected, grads = whole.loss, whole.gradients
    streamed = state.layout.views(gradient)
    sizes = {n: float(np.abs(grad).max()) for n, grad in grads.items()}
    largest = max(max(sizes.values()), 1e-30)
    off = {n: float(np.abs(streamed[n] - grad).max()) / largest for n, grad in grads.items()}
    terms = model_terms(spec.model, len(tokens))
    # A loss is a difference of logits; a gradient passes the layers there and back.
    most = rounding(terms) * (whole.largest_logit + expected / count) * count
    limits = {n: gradient_limit(size, largest) for n, size in sizes.items()}
    allowed = {n: min(rounding(3 * terms), limit) for n, limit in limits.items()}
    if abs(loss - expected) > most or _beyond(off, allowed):  # do sums cancel, in PyTorch too?
        with widened(list(trained_tensors(reference).values())), Wide():
            exact = autograd_gradient(reference, values, [example])
        most = max(most, ABOVE * abs(exact.loss - expected))
        for n, grad in grads.items():
            spread = ABOVE * float(np.abs(exact.gradients[n] - grad).max()) / largest
            allowed[n] = min(max(allowed[n], spread), limits[n])
    wrong = _beyond(off, allowed)
    if wrong or not abs(loss - expected) <= most:
        name = wrong[0] if wrong else max(off, key=lambda key: off[key] / allowed[key])
        raise ExportError(
            f"the training programs do not compute what PyTorch computes with the same weights: "
            f"loss {loss / count:.6f} instead of {expected / count:.6f} a label, gradient of "
            f"{name} off by {off[name]:.2g} of the largest (at most {allowed[name]:.2g})."
        )


def _beyond(off: Mapping[str, float], allowed: Mapping[str, float]) -> list[str]:
    """Names of those that are off by more than allowed, or NaN."""
    return [name for name, value in off.items() if not value <= allowed[name]]


def lengths_within(lengths: Sequence[int], context: int) -> tuple[int, ...]:
    """Distinct lengths in order, none longer than the context. Raises ``ExportError``."""
    if wrong := [length for length in lengths if length < 8]:
        raise ExportError(
            f"--train-lengths {', '.join(map(str, wrong))} is too short: a program of at least 8 "
            f"tokens is needed."
        )
    return tuple(sorted({min(length, context) for length in lengths}))
