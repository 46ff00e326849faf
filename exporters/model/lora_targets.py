"""The modules of a checkpoint that LoRA can adapt, and which of our matrices each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporters.errors import ExportError
from exporters.model.spec import ModelSpec


@dataclass(frozen=True)
class LoraTarget:
    """One module of the checkpoint that LoRA can adapt: its name in a block, its input channels,
    and the output channels of each of our matrices that it is made of."""

    module: str
    inputs: int
    rows: tuple[int, ...]


def site_targets(spec: ModelSpec) -> dict[str, tuple[LoraTarget, ...]]:
    """The checkpoint modules behind each of a block's four products, by the input they share."""
    q, kv, wide, hidden = spec.q_dim, spec.kv_dim, spec.intermediate, spec.hidden
    if spec.fused:
        qkv: tuple[LoraTarget, ...] = (LoraTarget("self_attn.qkv_proj", hidden, (q, kv, kv)),)
        gate_up: tuple[LoraTarget, ...] = (LoraTarget("mlp.gate_up_proj", hidden, (wide, wide)),)
    else:
        qkv = (
            LoraTarget("self_attn.q_proj", hidden, (q,)),
            LoraTarget("self_attn.k_proj", hidden, (kv,)),
            LoraTarget("self_attn.v_proj", hidden, (kv,)),
        )
        gate_up = (
            LoraTarget("mlp.gate_proj", hidden, (wide,)),
            LoraTarget("mlp.up_proj", hidden, (wide,)),
        )
    return {
        "qkv": qkv,
        "o": (LoraTarget("self_attn.o_proj", q, (hidden,)),),
        "gate_up": gate_up,
        "down": (LoraTarget("mlp.down_proj", wide, (hidden,)),),
    }


def lora_targets(spec: ModelSpec, modules: Sequence[str]) -> list[LoraTarget]:
    """The adapted targets of a block, for module names as PEFT takes them."""
    targets = [t for targets in site_targets(spec).values() for t in targets]
    known = [t.module.split(".")[-1] for t in targets]
    if odd := sorted(set(modules) - set(known)):
        raise ExportError(
            f"no module named {', '.join(odd)} in {spec.architecture}; LoRA can target: "
            f"{', '.join(known)}."
        )
    return [t for t in targets if t.module.split(".")[-1] in modules]
