"""The transformer that every program is captured from, in plain PyTorch.

One definition serves all architectures of ``spec`` and both targets. It is written for the
delegates (projections that share an input are one matrix, norms and rotation in operators
that XNNPACK and Core ML both take) and proven against the Hugging Face module at every export.
Letters in shapes: S tokens, C context, H heads, K key-value heads, D head channels.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, MutableSequence, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from exporters.model.deterministic import cos_sin
from exporters.model.plain_attention import Attend, plain_attention
from exporters.model.projection import Projection
from exporters.model.spec import ModelSpec, Rope


class Rotation(NamedTuple):
    """For a call's positions: cos and sin [S, 1, D]; swap [D, D] brings each channel its signed
    partner (see ``rope_tables``)."""

    cos: Tensor
    sin: Tensor
    swap: Tensor


class Dense(nn.Module):
    """``y = x Wᵀ + b`` with a float weight [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @staticmethod
    def prepare(x: Tensor) -> Tensor:
        """What all matrices of one input share: here nothing."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Table(nn.Module):
    """Float token embedding [vocab, hidden]."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


class Norm(nn.Module):
    """RMSNorm over the last dimension (Zhang and Sennrich, 2019). The mean is a product with a
    row of 1/n, which stays inside the delegates where a reduction would not."""

    weight: Tensor
    average: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        size = weight.numel()
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("average", torch.full((1, size), 1.0 / size))

    def forward(self, x: Tensor) -> Tensor:
        mean = nn.functional.linear(x * x, self.average)
        return x * torch.rsqrt(mean + self.eps) * self.weight


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [1, S, H, D]"""
    return x * rotation.cos + nn.functional.linear(x, rotation.swap) * rotation.sin


def activate(name: str, x: Tensor) -> Tensor:
    """The MLP's activation: "silu", or else GELU."""
    if name == "silu":
        return x * torch.sigmoid(x)
    # GELU by its tanh approximation (Hendrycks and Gimpel, 2016)
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + torch.tanh(inner))


class Block(nn.Module):
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    norms: MutableMapping[str, Any]  # Norm, or what stands for one

    def __init__(
        self, spec: ModelSpec, norms: dict[str, Norm], parts: dict[str, Projection]
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norms = nn.ModuleDict(norms)  # type: ignore[assignment]
        self.qkv, self.o = parts["qkv"], parts["o"]
        self.gate_up, self.down = parts["gate_up"], parts["down"]

    def _add(self, x: Tensor, update: Tensor, post: str) -> Tensor:
        if self.spec.post_norm:
            update = self.norms[post](update)
        if self.spec.residual_scale != 1.0:
            update = update * self.spec.residual_scale
        return x + update

    def enter(
        self, x: Tensor, rotation: Rotation | None, adapted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: x [1, S, hidden] -> q [1, S, H, D], k and v [1, S, K, D]."""
        s = self.spec
        q, k, v = self.qkv(self.norms["attention"](x), adapted)
        q = q.view(1, -1, s.heads, s.head_dim)
        k = k.view(1, -1, s.kv_heads, s.head_dim)
        v = v.view(1, -1, s.kv_heads, s.head_dim)
        if s.qk_norm:
            q, k = self.norms["q"](q), self.norms["k"](k)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        return q, k, v

    def leave(self, x: Tensor, mixed: Tensor, adapted: bool) -> Tensor:
        """What comes after it: x [1, S, hidden] and attention's [1, S, H, D] -> [1, S, hidden]."""
        mixed = mixed.reshape(1, -1, self.spec.q_dim)
        x = self._add(x, self.o(mixed, adapted)[0], "attention_post")
        gate, up = self.gate_up(self.norms["mlp"](x), adapted)
        wide = activate(self.spec.activation, gate) * up
        return self._add(x, self.down(wide, adapted)[0], "mlp_post")

    def forward(
        self, x: Tensor, rotation: Rotation | None, attend: Attend, adapted: bool
    ) -> Tensor:
        """x [1, S, hidden] -> [1, S, hidden]"""
        return self.leave(x, attend(*self.enter(x, rotation, adapted)), adapted)


class Transformer(nn.Module):
    """Weights and blocks; the caller brings positions and attention (cached or not)."""

    blocks: MutableSequence[Block]
    table: Any  # Table or quantized
    head: Any  # Dense or quantized

    def __init__(
        self,
        spec: ModelSpec,
        table: nn.Module,
        blocks: Sequence[Block],
        norm: Norm,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.table = table
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = norm
        self.head = head
        self.ropes: list[Rope] = list(dict.fromkeys(y.rope for y in spec.layers if y.rope))
        for index, rope in enumerate(self.ropes):
            cos, sin, swap = rope_tables(rope, spec.context, spec.head_dim)
            self.register_buffer(f"cos_{index}", cos)
            self.register_buffer(f"sin_{index}", sin)
            self.register_buffer(f"swap_{index}", swap)

    @property
    def is_float(self) -> bool:
        """Whether no matrix is quantized."""
        return isinstance(self.head, Dense)

    def stream(
        self, tokens: Tensor, positions: Tensor, attends: Sequence[Attend], adapted: bool = True
    ) -> Tensor:
        """tokens [1, S] int64, positions [S] int64 -> after the last block [1, S, hidden]."""
        x = self.lookup(tokens)
        rotations = self.rotations(positions)
        for block, layer, attend in zip(self.blocks, self.spec.layers, attends, strict=True):
            x = block(x, rotations[layer.rope] if layer.rope else None, attend, adapted)
        return x

    def lookup(self, tokens: Tensor) -> Tensor:
        """Token embeddings [1, S, hidden]."""
        x = self.table(tokens)
        return x if self.spec.embed_scale == 1.0 else x * self.spec.embed_scale

    def rotations(self, positions: Tensor) -> dict[Rope, Rotation]:
        """For each distinct rotary embedding, its tables at ``positions`` [S] int64."""
        size = self.spec.head_dim
        return {
            rope: Rotation(
                _whole(getattr(self, f"cos_{index}")[positions], size, 1.0),
                _whole(getattr(self, f"sin_{index}")[positions], size, 0.0),
                getattr(self, f"swap_{index}"),
            )
            for index, rope in enumerate(self.ropes)
        }

    def hidden(
        self, tokens: Tensor, positions: Tensor, attends: Sequence[Attend], adapted: bool = True
    ) -> Tensor:
        """``stream``, then the final norm: [1, S, hidden]."""
        return self.norm(self.stream(tokens, positions, attends, adapted))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> [..., vocab]"""
        y = self.head(self.head.prepare(hidden))
        if self.spec.logit_scale != 1.0:
            y = y * self.spec.logit_scale
        if (cap := self.spec.logit_softcap) is not None:
            y = torch.tanh(y / cap) * cap
        return y

    def forward(self, tokens: Tensor, adapted: bool = True) -> Tensor:
        """Whole sequences without a cache: tokens [1, S] -> logits [1, S, vocab]."""
        positions = torch.arange(tokens.shape[1])
        attends = [plain_attention(self.spec, layer) for layer in self.spec.layers]
        return self.logits(self.hidden(tokens, positions, attends, adapted))


def rope_tables(rope: Rope, context: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin [C, 1, n] of each pair of channels, and swap [D, D].

    The same bits on every processor: a weights file holds them. ``swap`` negates and exchanges the
    two halves of the rotated channels. As a product it is exact
    (each sum has one term) and stays in one delegate, which slices of a dynamic shape do not.
    """
    n = len(rope.inv_freq)
    angles = torch.outer(torch.arange(context).float(), torch.tensor(rope.inv_freq))[:, None]
    swap = torch.zeros(head_dim, head_dim)
    pairs = torch.arange(n)
    swap[pairs, pairs + n] = -1.0
    swap[pairs + n, pairs] = 1.0
    cos, sin = (half.float() * rope.scaling for half in cos_sin(angles))
    return cos, sin, swap


def _whole(half: Tensor, head_dim: int, rest: float) -> Tensor:
    """[S, 1, n] for pairs -> [S, 1, D] for channels; those not rotated get ``rest``."""
    parts = [half, half]
    if (left := head_dim - 2 * half.shape[-1]) > 0:
        parts.append(torch.full((half.shape[0], 1, left), rest, device=half.device))
    return torch.cat(parts, dim=-1)
