"""A bundle's model in PyTorch: as Hugging Face and PEFT compute it, and with the weights that the
bundle's programs have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from exporters.coreml.functions import Embed
from exporters.model.attention import plain_attention
from exporters.model.lora_tensors import set_adapter
from exporters.model.transformer import Transformer
from exporters.training.programs import TrainingSpec
from exporters.training.weights_file import as_stored
from runtime_py.bundle.bundle import Bundle
from toolchain.compile.precision import rounded_for_coreml
from toolchain.compile.training_part import training_spec
from toolchain.verify.peft_module import peft_values
from toolchain.verify.source import Source, as_in_bundle, float_model

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Models:
    """Each is made when it is first asked for; ``as_read`` must be the first."""

    bundle: Bundle
    source: Source
    initial: Values

    @cached_property
    def eager(self) -> PeftModel:
        """Float32, with the bundle's PEFT folder as PEFT itself reads it."""
        model = self.source.checkpoint.hf_model()
        folder = str(self.bundle.peft)
        return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()

    @cached_property
    def as_read(self) -> dict[str, np.ndarray]:
        """The adapter that PEFT read, before any other was set: by the programs' names."""
        return peft_values(self.eager, self.bundle.manifest.adapter.tensors)

    @cached_property
    def captured(self) -> Transformer:
        """The float32 transformer that programs are captured from."""
        return float_model(self.bundle.manifest, self.source)

    @cached_property
    def android(self) -> Transformer:
        """With the weights of ``lm.pte``. Calibration reads its text with the bundle's adapter."""
        set_adapter(self.captured, self.initial)
        return as_in_bundle(self.captured, self.bundle.manifest, self.source)

    @cached_property
    def ios(self) -> Transformer:
        """Float32 arithmetic with the weights of the Core ML package."""
        return rounded_for_coreml(self.captured, self.bundle.ios.quantize)

    @cached_property
    def training_spec(self) -> TrainingSpec:
        """What the bundle's training programs were made for."""
        own = self.bundle.training
        adapter = self.bundle.manifest.adapter
        spec = training_spec(self._simulated, adapter.targets, adapter.rank, None)
        return replace(spec, blocks=own.precision, head=own.head_precision, positions=own.positions)

    @property
    def _simulated(self) -> Transformer:
        return self.android if self.bundle.manifest.android is not None else self.ios

    @cached_property
    def stored(self) -> Transformer:
        """Float32 arithmetic with the weights of the training file, as the source gives them."""
        return as_stored(self._simulated, self.training_spec)

    @property
    def simulated(self) -> Transformer:
        """The one that the training file was written from."""
        return self._simulated


@torch.no_grad()
def logits_of(model: Transformer, tokens: np.ndarray, first: int) -> np.ndarray:
    """After each token from index ``first`` on: [n, vocab]."""
    ids = torch.from_numpy(tokens)[None]
    positions = torch.arange(ids.shape[1])
    attends = [plain_attention(model.spec, layer) for layer in model.spec.layers]
    hidden = model.hidden(ids, positions, attends)
    return model.logits(hidden[:, first:])[0].numpy()


@torch.no_grad()
def embedding_of(model: Transformer, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pooled [hidden] and entropy [1], by the function that is captured."""
    count = len(tokens)
    pooled, entropy = Embed(model, count)(
        torch.from_numpy(tokens)[None].int(), torch.tensor([count], dtype=torch.int32)
    )
    return pooled.numpy(), entropy.numpy()


@torch.no_grad()
def eager_embedding(model: PeftModel, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by Hugging Face's base model and the formulas of docs/bundle.md in float64."""
    with model.disable_adapter():
        outputs = model(input_ids=torch.from_numpy(tokens)[None], output_hidden_states=True)
    e = outputs.hidden_states[-1][0].double().numpy()  # [n, hidden], after the final norm
    norms = np.linalg.norm(e, axis=1)
    p = norms / norms.sum()
    n = len(tokens)
    entropy = 0.0 if n == 1 else float(-(p * np.log(p)).sum() / np.log(n))
    return e.mean(0), np.array([entropy])


@torch.no_grad()
def eager_logits(model: nn.Module, tokens: np.ndarray, first: int) -> np.ndarray:
    return (
        model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0, first:].numpy()
    )
