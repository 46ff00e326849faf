"""What all rungs of one run share: the bundle, the inputs, the models, and what was computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from exporters.model.lora_tensors import set_adapter
from exporters.model.transformer import Transformer
from exporters.training.programs import TrainingSpec, training_programs
from exporters.training.weights_file import write_weights
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.manifest import Manifest
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import Example
from runtime_py.loop.errors import BundleError
from toolchain.compile.training_part import EagerPrograms
from toolchain.verify.arm64.emulate import CPU
from toolchain.verify.parity.cases import EFFECT, INITIAL, Case
from toolchain.verify.parity.lm_checks import Bounds, LmOutputs
from toolchain.verify.parity.models import Models, Values, embedding_of, logits_of
from toolchain.verify.parity.recording import Recorded
from toolchain.verify.reference_engines import PeftEngine


@dataclass(eq=False)
class Context:
    """``models`` is the reason where there is no source. ``eager``, ``ios``, ``executorch``,
    ``android_bounds`` and ``replayed`` are what a rung leaves for those after it."""

    bundle: Bundle
    text: ChatText
    models: Models | str
    cases: Sequence[Case]
    examples: Sequence[Example]
    adapters: Mapping[str, Values]
    scratch: Path
    quick: bool = False
    cpu: str = CPU
    progress: Callable[[str], None] = lambda stage: None
    eager: LmOutputs | None = None
    ios: LmOutputs | None = None
    executorch: LmOutputs | None = None
    android_bounds: Bounds | None = None
    replayed: tuple[Recorded, ...] = ()

    @property
    def source(self) -> Models:
        """Raises ``BundleError`` where the source is not there."""
        if isinstance(self.models, str):
            raise BundleError(f"the model's source is needed: {self.models}")
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
        return EagerPrograms(training_programs(self.float_spec, self.bundle.training.lengths))

    @cached_property
    def programs(self) -> EagerPrograms:
        """Those of the bundle's weights file."""
        spec = self.source.training_spec
        return EagerPrograms(training_programs(spec, self.bundle.training.lengths))

    @cached_property
    def float_weights(self) -> BaseWeights:
        """The source's own weights, as a weights file."""
        path = self.scratch / "float.safetensors"
        lengths = self.bundle.training.lengths
        write_weights(self.source.captured, self.float_spec, max(lengths), path)
        return BaseWeights(path)

    @cached_property
    def weights(self) -> BaseWeights:
        return BaseWeights(self.bundle.training_weights)

    def peft_engine(self) -> PeftEngine:
        """Training by Hugging Face and PEFT themselves."""
        tensors = self.bundle.manifest.adapter.tensors
        return PeftEngine(self.source.eager, tensors, self.bundle.training.optimizer)

    @cached_property
    def android(self) -> LmOutputs:
        """What PyTorch says with the weights of ``lm.pte``."""
        return outputs_of(self.source.android, self.cases, self.adapters, self.bundle.manifest)


def outputs_of(
    model: Transformer, cases: Sequence[Case], adapters: Mapping[str, Values], manifest: Manifest
) -> LmOutputs:
    outputs = LmOutputs({}, {}, {}, {}, {})
    for adapter, values in adapters.items():
        set_adapter(model, values)
        for case in cases:
            outputs.logits[adapter, case.name] = logits_of(model, case.tokens, case.prompt - 1)
    for case in cases:
        tokens = case.tokens[: manifest.policy.embed_length]
        outputs.pooled[case.name], outputs.entropy[case.name] = embedding_of(model, tokens)
    return outputs
