"""A transformer rewritten so that float16 arithmetic cannot overflow, equal in exact arithmetic.

Float16 ends at 65,504, and the Neural Engine knows nothing wider: float32 norms would cut every
layer into pieces that run elsewhere. Two things leave the range. The squares in a norm: SafeNorm
divides first. The residual stream itself, where a few channels of the first token grow large (Sun
et al., "Massive Activations", 2024; 23,738 seen in SmolLM2-135M): it is kept 16 times smaller,
with what is added to it. Norms undo that, and a power of two costs no precision.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from exporters.model.projection import LoRA, Projection
from exporters.model.quantize import share
from exporters.model.transformer import Norm, Transformer

SMALLEST = 2.0**-14  # the least normal float16
HEADROOM = 2.0**-4  # the residual stream's scale


class SafeNorm(nn.Module):
    """RMSNorm of x / m with eps / m², m the largest magnitude of the row: equal to that of x for
    any m > 0, and no square exceeds 1. The square of √eps / m is taken last, as m² may overflow.
    ``shrunk`` is what its inputs are multiplied by, which the result does not show."""

    def __init__(self, norm: Norm, shrunk: float) -> None:
        super().__init__()
        self.root_eps = norm.eps**0.5 * shrunk
        self.register_buffer("weight", norm.get_buffer("weight"))

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.amax(x.abs(), dim=-1, keepdim=True)
        largest = torch.maximum(largest, torch.full_like(largest, SMALLEST))
        x = x / largest
        # As a division of tensors: Core ML's reciprocal adds 1e-4 to what it inverts.
        floor = torch.full_like(largest, self.root_eps) / largest
        mean = (x * x).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + floor * floor) * self.get_buffer("weight")


class ShrunkProjection(Projection):
    """A projection whose outputs are ``HEADROOM`` times what they were, its update included."""

    def forward(self, x: Tensor, adapted: bool) -> list[Tensor]:
        return super().forward(x * HEADROOM, adapted)


def _shrunk(projection: Projection) -> ShrunkProjection:
    for base in projection.bases:
        if base.bias is not None:
            base.register_buffer("bias", base.get_buffer("bias") * HEADROOM)
    loras = [lora if isinstance(lora, LoRA) else None for lora in projection.loras]
    return ShrunkProjection(list(projection.bases), loras)


def for_half(model: Transformer) -> Transformer:
    """The model as this module rewrites it, around the same weight matrices; ``model`` is left as
    it is. The hidden states after the final norm, and so the logits, are those of ``model``."""
    copied = share(model)
    copied.spec = replace(model.spec, embed_scale=model.spec.embed_scale * HEADROOM)
    copied.add_module("norm", SafeNorm(copied.norm, HEADROOM))
    for block in copied.blocks:
        block.o, block.down = _shrunk(block.o), _shrunk(block.down)
        for name, norm in block.norms.items():
            safe = SafeNorm(norm, 1.0 if name in ("q", "k") else HEADROOM)
            if name.endswith("_post"):  # what it gives is added to the residual stream
                safe.register_buffer("weight", norm.get_buffer("weight") * HEADROOM)
            block.norms[name] = safe
    return copied
