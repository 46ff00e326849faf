"""A checkpoint's tensors assembled into the transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exporters.errors import ExportError
from exporters.model.lora_targets import LoraTarget, lora_targets, site_targets
from exporters.model.projection import LoRA, Projection
from exporters.model.spec import ModelSpec
from exporters.model.transformer import Block, Dense, Norm, Table, Transformer


class _StateReader:
    """Takes tensors out of a checkpoint, as float32, and remembers what it was not asked for."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.unread = set(state)
        self.missing: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.state:
            self.missing.append(f"{name} {list(shape)} is missing")
            return torch.zeros(shape)
        self.unread.discard(name)
        tensor = self.state[name]
        if tuple(tensor.shape) != shape:
            self.missing.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
            return torch.zeros(shape)
        return tensor.detach().to(torch.float32)

    def matrices(self, prefix: str, target: LoraTarget) -> list[Dense]:
        """The target's weight [rows, in] and bias [rows], cut into our matrices."""
        total, name = sum(target.rows), f"{prefix}{target.module}"
        weights = self.take(f"{name}.weight", (total, target.inputs)).split(target.rows)
        if f"{name}.bias" not in self.state:
            return [Dense(weight, None) for weight in weights]
        biases = self.take(f"{name}.bias", (total,)).split(target.rows)
        return [Dense(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def build(
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    lora_modules: Sequence[str] = (),
    rank: int = 8,
) -> Transformer:
    """The float32 transformer of a checkpoint's state dict (Hugging Face names).

    Every tensor must be used and every one needed must be there, with its shape; all misfits are
    listed in one ``ExportError``.
    """
    reader = _StateReader(state)
    adapted = lora_targets(spec, lora_modules)
    norm_names = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    if spec.post_norm:
        norm_names = {
            "attention": "input_layernorm",
            "attention_post": "post_attention_layernorm",
            "mlp": "pre_feedforward_layernorm",
            "mlp_post": "post_feedforward_layernorm",
        }

    def norm(name: str, size: int) -> Norm:
        return Norm(reader.take(name, (size,)) + spec.norm_offset, spec.norm_eps)

    blocks = []
    for index in range(len(spec.layers)):
        prefix = f"model.layers.{index}."
        norms = {k: norm(f"{prefix}{name}.weight", spec.hidden) for k, name in norm_names.items()}
        if spec.qk_norm:
            norms["q"] = norm(f"{prefix}self_attn.q_norm.weight", spec.head_dim)
            norms["k"] = norm(f"{prefix}self_attn.k_norm.weight", spec.head_dim)
        parts = {
            site: Projection(
                [base for target in targets for base in reader.matrices(prefix, target)],
                [LoRA(target, rank) if target in adapted else None for target in targets],
            )
            for site, targets in site_targets(spec).items()
        }
        blocks.append(Block(spec, norms, parts))
    table = reader.take("model.embed_tokens.weight", (spec.vocab, spec.hidden))
    final = norm("model.norm.weight", spec.hidden)
    if spec.tied:
        head = table
        reader.unread.discard("lm_head.weight")
    else:
        head = reader.take("lm_head.weight", (spec.vocab, spec.hidden))
    unused = [f"{name} is not part of this architecture" for name in sorted(reader.unread)]
    if misfits := reader.missing + unused:
        shown = "; ".join(misfits[:20]) + ("; …" if len(misfits) > 20 else "")
        raise ExportError(f"the checkpoint does not fit its config ({len(misfits)}): {shown}.")
    return Transformer(spec, Table(table), blocks, final, Dense(head, None)).eval()
