"""The transformer that every program is captured from, in plain PyTorch.

One definition serves all architectures of ``spec`` and both targets. It is written for the
delegates (projections that share an input are one matrix, norms and rotation in operators
that XNNPACK and Core ML both take) and proven against the Hugging Face module at every export.
Letters in shapes: S tokens, C context, H heads, K key-value heads, D head channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from exporters.errors import ExportError
from exporters.model.deterministic import cos_sin
from exporters.model.spec import LayerSpec, ModelSpec, Rope

UNSEEN = -30000.0  # a score that no softmax sees, and float16 can hold
# q [1, S, H, D], k and v [1, S, K, D] -> [1, S, H, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """One module of the checkpoint that LoRA can adapt: its name in a block, its input channels,
    and the output channels of each of our matrices that it is made of."""

    module: str
    inputs: int
    rows: tuple[int, ...]


def site_targets(spec: ModelSpec) -> dict[str, tuple[Target, ...]]:
    """The checkpoint modules behind each of a block's four products, by the input they share."""
    q, kv, wide, hidden = spec.q_dim, spec.kv_dim, spec.intermediate, spec.hidden
    if spec.fused:
        qkv: tuple[Target, ...] = (Target("self_attn.qkv_proj", hidden, (q, kv, kv)),)
        gate_up: tuple[Target, ...] = (Target("mlp.gate_up_proj", hidden, (wide, wide)),)
    else:
        qkv = (
            Target("self_attn.q_proj", hidden, (q,)),
            Target("self_attn.k_proj", hidden, (kv,)),
            Target("self_attn.v_proj", hidden, (kv,)),
        )
        gate_up = (
            Target("mlp.gate_proj", hidden, (wide,)),
            Target("mlp.up_proj", hidden, (wide,)),
        )
    return {
        "qkv": qkv,
        "o": (Target("self_attn.o_proj", q, (hidden,)),),
        "gate_up": gate_up,
        "down": (Target("mlp.down_proj", wide, (hidden,)),),
    }


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


class LoRA(nn.Module):
    """The low-rank update of one target (Hu et al., 2021), in PEFT's own layouts.

    ``lora_A`` [1, r, in], ``lora_B`` [1, rows, r] (``lora_B_0``, ``lora_B_1``, … where the target
    is several of our matrices), ``scale`` [1, 1, 1] its α/r.
    """

    lora_A: Tensor  # noqa: N815  (PEFT's name)
    scale: Tensor

    def __init__(self, target: Target, rank: int) -> None:
        super().__init__()
        self.target = target
        self.register_buffer("lora_A", torch.zeros(1, rank, target.inputs))
        self.register_buffer("scale", torch.zeros(1, 1, 1))
        for name, rows in zip(self.b_names, target.rows, strict=True):
            self.register_buffer(name, torch.zeros(1, rows, rank))

    @property
    def b_names(self) -> list[str]:
        many = len(self.target.rows) > 1
        return [f"lora_B_{i}" if many else "lora_B" for i in range(len(self.target.rows))]

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [1, S, in] -> the update of each matrix [1, S, rows].

        The adapter is the second operand, which XNNPACK repacks at each call: for one token that is
        cheaper than padding x.
        """
        down = torch.bmm(x, self.lora_A.permute(0, 2, 1)) * self.scale  # [1, S, r]
        return [torch.bmm(down, getattr(self, name).permute(0, 2, 1)) for name in self.b_names]


class Projection(nn.Module):
    """The matrices that share one input, each with its low-rank update if it has one."""

    bases: MutableSequence[Any]  # Dense or quantized

    def __init__(self, bases: Sequence[nn.Module], loras: Sequence[LoRA | None]) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)  # type: ignore[assignment]
        self.loras = nn.ModuleList(lora or nn.Identity() for lora in loras)

    def forward(self, x: Tensor, adapted: bool) -> list[Tensor]:
        """x [1, S, in] -> for each matrix [1, S, rows]."""
        prepared = self.bases[0].prepare(x)
        outputs = [base(prepared) for base in self.bases]
        loras = [m for m in self.loras if isinstance(m, LoRA)]
        if not (loras and adapted):
            return outputs
        start = 0
        for lora in self.loras:
            if not isinstance(lora, LoRA):
                start += 1
                continue
            for update in lora(x):
                outputs[start] = outputs[start] + update
                start += 1
        return outputs


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [1, S, H, D]"""
    return x * rotation.cos + nn.functional.linear(x, rotation.swap) * rotation.sin


def activate(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    # GELU by its tanh approximation (Hendrycks and Gimpel, 2016)
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + torch.tanh(inner))


class Block(nn.Module):
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    def __init__(self, spec: ModelSpec, norms: dict[str, Norm], parts: dict[str, Projection]):
        super().__init__()
        self.spec = spec
        self.norms = nn.ModuleDict(norms)
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
        self, spec: ModelSpec, table: nn.Module, blocks: Sequence[Block], norm: Norm, head
    ):
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
        parts.append(torch.full((half.shape[0], 1, left), rest))
    return torch.cat(parts, dim=-1)


def plain_attention(spec: ModelSpec, layer: LayerSpec) -> Attend:
    """Causal attention over the call's own tokens, within the layer's window."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = torch.arange(q.shape[1])
        return masked_attention(spec, q, k, v, visible(steps, steps, layer.window))

    return attend


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Positions [S] and [T] -> bool [S, T]: key not after query, and within the window."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def masked_attention(spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention over what each query sees, without repeating keys and values for their groups.

    q [1, S, H, D], k and v [1, T, K, D], seen bool [S, T] -> [1, S, H, D]. The H / K queries of a
    key-value head are rows of one product, so that decoding reads the cache once and copies none.
    """
    size, total = q.shape[1], k.shape[1]
    rows = (spec.heads // spec.kv_heads) * size
    queries = (q * spec.attention_scale).permute(0, 2, 1, 3)  # [1, H, S, D]
    queries = queries.reshape(1, spec.kv_heads, rows, spec.head_dim)
    scores = torch.matmul(queries, k.permute(0, 2, 3, 1))  # [1, K, H/K·S, T]
    scores = scores.reshape(1, spec.heads, size, total)
    if (cap := spec.attention_softcap) is not None:
        scores = torch.tanh(scores / cap) * cap
    weights = torch.softmax(scores.masked_fill(~seen, UNSEEN), dim=-1)
    weights = weights.reshape(1, spec.kv_heads, rows, total)
    mixed = torch.matmul(weights, v.permute(0, 2, 1, 3))  # [1, K, H/K·S, D]
    return mixed.reshape(1, spec.heads, size, spec.head_dim).permute(0, 2, 1, 3)


def lora_targets(spec: ModelSpec, modules: Sequence[str]) -> list[Target]:
    """The adapted targets of a block, for module names as PEFT takes them."""
    targets = [t for targets in site_targets(spec).values() for t in targets]
    known = [t.module.split(".")[-1] for t in targets]
    if odd := sorted(set(modules) - set(known)):
        raise ExportError(
            f"no module named {', '.join(odd)} in {spec.architecture}; LoRA can target: "
            f"{', '.join(known)}."
        )
    return [t for t in targets if t.module.split(".")[-1] in modules]


class _Reader:
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

    def matrices(self, prefix: str, target: Target) -> list[Dense]:
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
    reader = _Reader(state)
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
