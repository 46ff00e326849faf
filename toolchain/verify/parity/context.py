"""What all rungs of one run share: the bundle, the inputs, the models, and what was computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from exporters.executorch.lm_program import adapter_tensors
from exporters.model.transformer import Transformer
from exporters.training.programs import TrainingSpec, training_programs
from exporters.training.weights_file import write_weights
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.manifest import Manifest
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.streaming import StepNumbers
from toolchain.compile.training_part import EagerPrograms
from toolchain.verify.arm64.emulate import CPU
from toolchain.verify.autograd import TorchEngine
from toolchain.verify.parity.cases import EFFECT, INITIAL, Case
from toolchain.verify.parity.lm_checks import Bounds, Said
from toolchain.verify.parity.models import Models, Values, embedding_of, logits_of, set_adapter
from toolchain.verify.parity.recording import Recorded


@dataclass(eq=False)
class Context:
    """``models`` is the reason where there is no source. ``eager``, ``ios``, ``executorch``,
    ``android_bounds`` and ``replayed`` are what a rung leaves for those after it."""

    bundle: Path
    manifest: Manifest
    text: ChatText
    models: Models | str
    cases: Sequence[Case]
    examples: Sequence[Example]
    adapters: Mapping[str, Values]
    scratch: Path
    quick: bool = False
    cpu: str = CPU
    told: Callable[[str], None] = lambda stage: None
    eager: Said | None = None
    ios: Said | None = None
    executorch: Said | None = None
    android_bounds: Bounds | None = None
    replayed: tuple[Recorded, ...] = ()

    @property
    def source(self) -> Models:
        assert not isinstance(self.models, str)
        return self.models

    @property
    def trained(self) -> Sequence[tuple[Example, str]]:
        """Examples and the adapters that they are tried with."""
        pairs = [(example, EFFECT) for example in self.examples]
        return pairs if self.quick else [*pairs, (self.examples[0], INITIAL)]

    @cached_property
    def float_spec(self) -> TrainingSpec:
        return replace(self.source.training_spec, blocks="fp32", head="fp32")

    @cached_property
    def float_programs(self) -> EagerPrograms:
        """Those that Core ML's package has too."""
        assert self.manifest.training is not None
        return EagerPrograms(training_programs(self.float_spec, self.manifest.training.lengths))

    @cached_property
    def programs(self) -> EagerPrograms:
        """Those of the bundle's weights file."""
        assert self.manifest.training is not None
        spec = self.source.training_spec
        return EagerPrograms(training_programs(spec, self.manifest.training.lengths))

    @cached_property
    def float_weights(self) -> BaseWeights:
        """The source's own weights, as a weights file."""
        assert self.manifest.training is not None
        path = self.scratch / "float.safetensors"
        lengths = self.manifest.training.lengths
        write_weights(self.source.captured, self.float_spec, max(lengths), path)
        return BaseWeights(path)

    @cached_property
    def weights(self) -> BaseWeights:
        assert self.manifest.training is not None
        return BaseWeights(self.bundle / self.manifest.training.weights)

    def torch_engine(self) -> TorchEngine:
        assert self.manifest.training is not None
        tensors = self.manifest.adapter.tensors
        return TorchEngine(self.source.eager, tensors, self.manifest.training.optimizer)

    @cached_property
    def android(self) -> Said:
        """What PyTorch says with the weights of ``lm.pte``."""
        return said_by(self.source.android, self.cases, self.adapters, self.manifest)


def said_by(
    model: Transformer, cases: Sequence[Case], adapters: Mapping[str, Values], manifest: Manifest
) -> Said:
    said = Said({}, {}, {}, {}, {})
    for adapter, values in adapters.items():
        set_adapter(model, values)
        for case in cases:
            said.logits[adapter, case.name] = logits_of(model, case.tokens, case.prompt - 1)
    for case in cases:
        tokens = case.tokens[: manifest.policy.embed_length]
        said.pooled[case.name], said.entropy[case.name] = embedding_of(model, tokens)
    return said


class AutogradEngine:
    """Training by autograd over the whole of our transformer; AdamW is PyTorch's."""

    capacity = 0

    def __init__(self, model: Transformer, updates: TorchEngine) -> None:
        self._model, self._updates = model, updates

    def _own(self, state: AdapterState) -> dict[str, Tensor]:
        set_adapter(self._model, state.tensors)
        return adapter_tensors(self._model)

    @property
    def trained(self) -> list[Tensor]:
        return [t for name, t in adapter_tensors(self._model).items() if ".lora_" in name]

    def _loss(self, example: Example) -> Tensor:
        logits = self._model(torch.from_numpy(example.tokens)[None])[0, :-1]
        labels = torch.from_numpy(example.labels)[1:]
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        self._own(state)
        total = sum(float(self._loss(example)) for example in examples)
        return total, sum(example.count for example in examples)

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        own = self._own(state)
        trained = {name: tensor for name, tensor in own.items() if ".lora_" in name}
        for tensor in trained.values():
            tensor.requires_grad_()
        with torch.enable_grad():
            loss = torch.stack([self._loss(example) for example in examples]).sum()
            grads = torch.autograd.grad(loss, list(trained.values()))
        views = state.layout.views(into)
        for (name, tensor), grad in zip(trained.items(), grads, strict=True):
            tensor.requires_grad_(False)
            views[name] += grad.numpy()
        return float(loss.detach()), sum(example.count for example in examples)

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        return self._updates.update(state, gradient, numbers)
