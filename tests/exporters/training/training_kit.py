"""A tiny adapted model with its training programs, and PEFT's own loss and gradients beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from exporters.coreml.training_package import lower_training
from exporters.model.assembly import build
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer
from exporters.training.programs import TrainingProgram, TrainingSpec
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import AdapterTensor, Program, Training
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.program_calls import Programs
from runtime_py.engine.streaming import StreamingEngine
from tests import tiny
from toolchain.compile.adapter_layout import layout
from toolchain.compile.autograd import summed_loss
from toolchain.compile.tolerances import model_terms, rounding
from toolchain.compile.training_part import manifest_program, training_spec, write_training
from toolchain.verify.mil.interpreter import Interpreter
from toolchain.verify.mil.mlpackage import read_package
from toolchain.verify.reference_engines import peft_gradient

RANK = 4


@dataclass(frozen=True, eq=False)
class Kit:
    """``folder`` holds the weights file; ``peft`` is the independent reference."""

    folder: Path
    peft: PeftModel
    model: Transformer
    spec: TrainingSpec
    training: Training
    tensors: tuple[AdapterTensor, ...]
    values: dict[str, np.ndarray]

    def state(self) -> AdapterState:
        return AdapterState.of(self.tensors, self.values)

    def engine(self, programs: Programs, keep_mb: float = 0.0) -> StreamingEngine:
        weights = BaseWeights(self.folder / self.training.weights)
        return StreamingEngine(programs, weights, self.training, keep_mb)


class MilPrograms:
    """The Core ML package of ``programs``, lowered to ``package`` and computed by
    ``toolchain.verify.mil``."""

    def __init__(self, programs: Sequence[TrainingProgram], package: Path) -> None:
        lower_training(programs, package)
        self._interpreter = Interpreter(read_package(package))
        self.signatures: Mapping[str, Program] = {
            p.signature.name: manifest_program(p.signature, package.name, 0) for p in programs
        }

    def call(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Names as docs/bundle.md says under Training, Core ML."""
        own = self.signatures[name]
        taken = {tensor.name for tensor in own.inputs}
        given = {
            tensor.name.replace(".", "_"): torch.from_numpy(np.array(array))
            for tensor, array in zip(own.inputs, inputs, strict=True)
        }
        found = self._interpreter.run(name, given)
        return [
            found[t.name.replace(".", "_") + ("_new" if t.name in taken else "")].numpy()
            for t in own.outputs
        ]


def make_kit(
    folder: Path, kind: str, targets: list[str] | None = None, length: int = 32, **changes: object
) -> Kit:
    """An architecture with random weights and a random adapter on ``targets`` (q, k, v)."""
    hf = tiny.hugging_face(kind, **changes)
    spec = read_spec(hf.config, tiny.CONTEXT)
    if targets is None:
        targets = ["qkv_proj"] if spec.fused else ["q_proj", "k_proj", "v_proj"]
    state = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    model = build(spec, state, targets, RANK)
    peft = tiny.adapted(hf, targets, RANK)
    peft.save_pretrained(str(folder / "lora"))
    tensors = layout(spec, targets, RANK)
    own = training_spec(model, targets, RANK, None)
    training = write_training(folder, model, own, [length])
    values = to_runtime(read_peft(folder / "lora"), tensors)
    return Kit(folder, peft, model, own, training, tensors, values)


def example_of(count: int = 28, seed: int = 1) -> Example:
    """Ordinary tokens with two stretches of labels."""
    tokens = tiny.tokens_of(count, seed)[0]
    labels = tokens.clone()
    labels[: count // 3] = IGNORED
    labels[count // 2 : count // 2 + 3] = IGNORED
    return Example(f"random-{seed}", tokens.numpy(), labels.numpy())


@torch.no_grad()
def bounds_of(kit: Kit, examples: Sequence[Example]) -> tuple[float, float]:
    """What float32 may do (``tolerances``) to the examples' summed loss, in nats, and to its
    gradient, as a part of the largest number of that. A loss is a difference of logits."""
    terms = model_terms(kit.spec.model, max(len(example.tokens) for example in examples))
    total = 0.0
    for example in examples:
        logits = kit.peft(torch.from_numpy(example.tokens)[None]).logits
        total += example.count * float(logits.abs().max()) + float(summed_loss(logits, example))
    return rounding(terms) * total, rounding(3 * terms)


def check_gradient(kit: Kit, engine: StreamingEngine, example: Example) -> None:
    """Loss and gradients within float32's rounding of the sums that they are."""
    state = kit.state()
    into = state.layout.zeros()
    loss, count = engine.gradient(state, [example], into)
    expected, grads = peft_gradient(kit.peft, kit.tensors, [example])
    loss_bound, gradient_bound = bounds_of(kit, [example])
    assert count == example.count
    assert abs(loss - expected) <= loss_bound
    views = state.layout.views(into)
    assert views.keys() == grads.keys()
    bound = gradient_bound * max(float(np.abs(grad).max()) for grad in grads.values())
    for name, grad in grads.items():
        assert np.abs(grad).max() > 100 * bound, "the case shows nothing"
        assert float(np.abs(views[name] - grad).max()) <= bound, name
