"""A transformer's adapter: its LoRA tensors under the names that programs and files use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from exporters.errors import ExportError
from exporters.model.projection import LoRA
from exporters.model.transformer import Block, Transformer

ENTER, LEAVE = ("qkv",), ("o", "gate_up", "down")  # sites before and after attention


def lora_buffers(block: Block, sites: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The adapter's tensors of some of a block's sites: name in the block, and public suffix such
    as ``self_attn.q_proj.lora_A``."""
    for site in sites:
        for path, module in getattr(block, site).named_modules(prefix=site):
            if isinstance(module, LoRA):
                for name, _ in module.named_buffers():
                    yield f"{path}.{name}", f"{module.target.module}.{name}"


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's LoRA tensors under the names that programs and files use, such as
    ``layers.0.self_attn.q_proj.lora_A``; the tensors themselves, not copies."""
    return {
        f"layers.{index}.{public}": block.get_buffer(path)
        for index, block in enumerate(model.blocks)
        for path, public in lora_buffers(block, ENTER + LEAVE)
    }


@torch.no_grad()
def set_adapter(model: Transformer, values: Mapping[str, np.ndarray]) -> None:
    """Copies ``values`` (float32, by the names of ``adapter_tensors``) into the model's tensors,
    whatever their dtype. What else ``values`` has, such as a file's notes, is left alone.

    Raises ``ExportError`` that names every tensor which is missing or has another shape; then the
    model is unchanged.
    """
    tensors = adapter_tensors(model)
    misfits = [
        f"{name} is {list(values[name].shape) if name in values else 'missing'}, expected "
        f"{list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in values or values[name].shape != tuple(tensor.shape)
    ]
    if misfits:
        raise ExportError(
            f"the adapter does not fit the transformer, {len(misfits)} misfits: "
            f"{'; '.join(misfits)}."
        )
    for name, tensor in tensors.items():
        tensor.copy_(torch.from_numpy(np.array(values[name])))
