"""How much of a lowered program's arithmetic its delegates take."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

PROMPT = 64  # tokens of the prompt that FLOPs are counted for, from position 0
ATTENTION = "llama.custom_sdpa.default"  # ExecuTorch's own, with the KV cache; never delegated


@dataclass(frozen=True)
class Delegation:
    """FLOPs of products and attention for a prompt of ``PROMPT`` tokens: in the delegates, and
    outside by operator; and how many delegates there are."""

    delegates: int
    inside: float
    outside: dict[str, float]

    @property
    def missed(self) -> float:
        """Share of FLOPs that a delegate should have taken: all outside but ``ATTENTION``."""
        missed = sum(flops for name, flops in self.outside.items() if name != ATTENTION)
        return missed / (self.inside + sum(self.outside.values()))

    @property
    def fraction(self) -> float:
        """Share of FLOPs in the delegates."""
        total = self.inside + sum(self.outside.values())
        return self.inside / total if total else 1.0


def _sizes(value: torch.Tensor, length: int) -> list[int]:
    """The shape with every symbolic dimension as for a prompt of ``length`` tokens."""
    return [size if isinstance(size, int) else length for size in value.shape]


def _flops(node: torch.fx.Node) -> float:
    """2·m·n·k of a product; 4·H·D·S·(S+1)/2 of causal attention; 0 of anything else."""
    name = getattr(node.target, "__name__", str(node.target)).split(".")[-2:]
    operator = name[0] if name else ""
    out = node.meta.get("val")
    if operator in ("linear", "mm", "bmm", "addmm") and isinstance(out, torch.Tensor):
        first = node.args[1] if operator == "addmm" else node.args[0]
        if not isinstance(first, torch.fx.Node):
            raise TypeError(f"{node.format_node()} multiplies {first}, expected a tensor")
        inner = _sizes(first.meta["val"], PROMPT)[-1]
        return 2.0 * torch.Size(_sizes(out, PROMPT)).numel() * inner
    if operator == "custom_sdpa" and isinstance(out, torch.Tensor):
        _, tokens, heads, channels = _sizes(out, PROMPT)
        return 2.0 * heads * channels * tokens * (tokens + 1)
    return 0.0


def flops_of(graph: torch.fx.Graph) -> float:
    """FLOPs of a graph's products, for a call of ``PROMPT`` tokens."""
    return sum(_flops(node) for node in graph.nodes)


def measure(program: ExportedProgram, pieces: float) -> Delegation:
    """Counts a lowered edge program. ``pieces``: FLOPs of the delegates that came as such; those
    that the partitioner made are looked into."""
    inside, outside, delegates = pieces, defaultdict[str, float](float), 0
    for node in program.graph.nodes:
        if node.op == "get_attr" and "lowered_module" in str(node.target):
            module = getattr(program.graph_module, node.target)
            delegates += 1
            inside += flops_of(module.original_module.graph)
        elif node.op == "call_function" and (flops := _flops(node)):
            outside[str(node.target.__name__)] += flops
    return Delegation(delegates, inside, dict(outside))
