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
from exporters.model.lora_tensors import set_adapter
from exporters.model.plain_attention import plain_attention
from exporters.model.transformer import Transformer
from exporters.training.programs import TrainingSpec
from exporters.training.weights_file import as_stored
from runtime_py.bundle.bundle import Bundle
from toolchain.compile.phone_text import PhoneText, text_of
from toolchain.compile.precision import rounded_for_coreml
from toolchain.compile.source import CheckpointSource, as_in_bundle, float_model
from toolchain.compile.training_part import training_spec
from toolchain.verify.peft_module import peft_values

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Models:
    """``open_models`` makes one. ``initial``: the bundle's adapter as its programs are given it;
    ``eager``: Hugging Face's float32 module with the bundle's PEFT folder as PEFT itself reads it;
    ``as_read``: the adapter that PEFT read, by the programs' names. The others are made when they
    are first asked for."""

    bundle: Bundle
    source: CheckpointSource
    initial: Values
    eager: PeftModel
    as_read: Values

    @cached_property
    def text(self) -> PhoneText:
        """Tokenizer and chat pieces as an export of the source writes them."""
        return text_of(self.source.checkpoint, self.bundle.manifest.model.name)

    @cached_property
    def captured(self) -> Transformer:
        """The float32 transformer that programs are captured from."""
        return float_model(self.bundle.manifest, self.source)

    @cached_property
    def android(self) -> Transformer:
        """With the weights of ``lm.pte``. Calibration reads its text with the bundle's adapter."""
        set_adapter(self.captured, self.initial)
        return as_in_bundle(self.captured, self.bundle, self.source)

    @cached_property
    def ios(self) -> Transformer:
        """Float32 arithmetic with the weights of the Core ML package."""
        return rounded_for_coreml(self.captured, self.bundle.ios.quantize)

    @cached_property
    def training_spec(self) -> TrainingSpec:
        """What the bundle's training programs were made for."""
        section, adapter = self.bundle.training, self.bundle.manifest.adapter
        spec = training_spec(self.simulated, adapter.targets, adapter.rank, None)
        return replace(
            spec,
            blocks=section.precision,
            head=section.head_precision,
            positions=section.positions,
        )

    @property
    def simulated(self) -> Transformer:
        """The one that the training file was written from."""
        return self.android if self.bundle.manifest.android is not None else self.ios

    @cached_property
    def stored(self) -> Transformer:
        """Float32 arithmetic with the weights of the training file, as the source gives them."""
        return as_stored(self.simulated, self.training_spec)


def open_models(bundle: Bundle, source: CheckpointSource, initial: Values) -> Models:
    """Reads source and adapter as Hugging Face and PEFT do, before any other adapter is set."""
    model = source.checkpoint.hf_model()
    folder = str(bundle.peft)
    eager = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()
    as_read = peft_values(eager, bundle.manifest.adapter.tensors)
    return Models(bundle, source, initial, eager, as_read)


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
    """Hugging Face's, after each token from index ``first`` on: [n, vocab]."""
    return (
        model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0, first:].numpy()
    )
