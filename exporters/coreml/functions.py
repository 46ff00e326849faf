"""The PyTorch functions behind the package: ``prefill``, ``decode`` and ``embed``.

They are what is captured, so what they compute in PyTorch is what the package computes, up to
the precision of weights and arithmetic. Shapes are fixed: a chunk shorter than its length is
padded, and ``count`` says how many of its tokens are real. A padded token takes the position of
the last real one. So no real token sees it (it stands after them all in the chunk), its own row,
which nobody uses, always sees something and stays finite, and it is not written into the cache.
Letters in shapes: L length, C context, H heads, K key-value heads, D head channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exporters.errors import ExportError
from exporters.model.plain_attention import Attend, masked_attention, visible
from exporters.model.projection import LoRA
from exporters.model.spec import ModelSpec
from exporters.model.transformer import Transformer

TINY = 1e-30  # keeps division and logarithm finite where their value does not matter


def adapter_inputs(model: Transformer) -> dict[str, str]:
    """The inputs of ``prefill`` and ``decode`` that are the adapter: name -> buffer of ``model``.

    ``layers_<i>_<module>_<tensor>``: layer i, the checkpoint's module with its dots as underscores
    and a tensor of ``exporters.model.projection.LoRA``, in its shape, float32; for example
    ``layers_0_self_attn_q_proj_lora_A``. Empty for a model without an adapter.
    """
    return {
        f"layers_{index}_{module.target.module.replace('.', '_')}_{name}": f"{path}.{name}"
        for index, block in enumerate(model.blocks)
        for path, module in block.named_modules(prefix=f"blocks.{index}")
        if isinstance(module, LoRA)
        for name, _ in module.named_buffers()
    }


def _attends(
    spec: ModelSpec, queries: Tensor, keys: Tensor, make: Callable[[int, Tensor], Attend]
) -> list[Attend]:
    """``make(layer, seen)`` for each layer; each distinct mask [L, T] is computed once."""
    windows: dict[int | None, Tensor] = {}
    attends = []
    for index, layer in enumerate(spec.layers):
        if layer.window not in windows:
            windows[layer.window] = visible(queries, keys, layer.window)
        attends.append(make(index, windows[layer.window]))
    return attends


class _HiddenStates(nn.Module):
    """``Transformer.hidden`` as a forward, which is what ``functional_call`` can call."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, positions: Tensor, attends: Sequence[Attend], adapted: bool
    ) -> Tensor:
        return self.model.hidden(tokens, positions, attends, adapted)


class Cached(nn.Module):
    """A transformer over a KV cache, in chunks of ``length`` tokens. The cache is the float16
    buffers ``k_<layer>`` and ``v_<layer>`` [1, K, C, D], which become Core ML states."""

    def __init__(self, model: Transformer, length: int, unseen: float | None = None) -> None:
        super().__init__()
        spec = model.spec
        if not 1 <= length <= spec.context:
            raise ExportError(
                f"a prefill chunk of {length} tokens does not fit a context of {spec.context}: "
                f"choose a length from 1 to {spec.context}."
            )
        self.spec = spec
        self.length = length
        self.unseen = unseen
        self.body = _HiddenStates(model)
        self.adapter = adapter_inputs(model)
        for index in range(len(spec.layers)):
            for kind in ("k", "v"):
                shape = (1, spec.kv_heads, spec.context, spec.head_dim)
                self.register_buffer(f"{kind}_{index}", torch.zeros(shape, dtype=torch.float16))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        first: Tensor,
        place: Callable[[Tensor, Tensor], Tensor],
        adapter: Mapping[str, Tensor],
    ) -> Tensor:
        """tokens int32 [1, L], positions int32 [L] -> [1, L, hidden].

        The L rows of the cache from ``first`` int32 [1] on become ``place(new, cache)`` [1, K, L,
        D], where new is the chunk's own keys or values in that shape.
        """
        begin: Any = first.item()  # symbolic while it is captured
        torch._check(begin >= 0)
        torch._check(begin <= self.spec.context - self.length)

        def write(name: str, new: Tensor) -> Tensor:
            """new [1, L, K, D] -> the whole cache after it [1, C, K, D]."""
            cache = getattr(self, name)
            rows = place(new.permute(0, 2, 1, 3).to(torch.float16), cache)
            cache.copy_(torch.slice_scatter(cache, rows, 2, begin, begin + self.length))
            return cache.to(new.dtype).permute(0, 2, 1, 3)

        def make(index: int, seen: Tensor) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys, values = write(f"k_{index}", k), write(f"v_{index}", v)
                return masked_attention(self.spec, q, keys, values, seen, self.unseen)

            return attend

        # What the cache holds past the last real token is after every query, so not seen.
        slots = torch.arange(self.spec.context, dtype=torch.int32)
        return torch.func.functional_call(
            self.body,
            {f"model.{self.adapter[name]}": tensor for name, tensor in adapter.items()},
            (tokens, positions, _attends(self.spec, positions, slots, make), True),
        )


class Prefill(Cached):
    """A chunk of a prompt, padded to ``length``."""

    def forward(
        self, tokens: Tensor, start: Tensor, count: Tensor, adapter: Mapping[str, Tensor]
    ) -> Tensor:
        """tokens int32 [1, L], start and count int32 [1] -> logits float32 [1, vocab].

        ``start`` is the first token's position, ``count`` is from 1 to L, and start + count must
        not exceed the context: the host sees to that, a program cannot raise. The logits are
        those after token ``count - 1``.
        """
        steps = torch.arange(self.length, dtype=torch.int32)
        # L rows of the cache are written, from start on; where those would reach past the end,
        # which only padding can, the last L rows.
        room = self.spec.context - self.length
        first = torch.minimum(start, torch.full_like(start, room))
        shift = start - first
        fresh = (steps >= shift) & (steps < shift + count)  # [L], rows that take a token
        source = torch.where(fresh, steps - shift, torch.zeros_like(steps))  # [L], which one

        def place(new: Tensor, cache: Tensor) -> Tensor:
            # By gathers: a slice of the cache from a computed row on would lose its static shape.
            old = cache[:, :, first + steps]
            return torch.where(fresh[None, None, :, None], new[:, :, source], old)

        positions = start + torch.minimum(steps, count - 1)  # [L]
        hidden = self.hidden(tokens, positions, first, place, adapter)
        return self.body.model.logits(hidden[:, count - 1][:, 0])


class Decode(Cached):
    """One token."""

    def __init__(self, model: Transformer, unseen: float | None = None) -> None:
        super().__init__(model, 1, unseen)

    def forward(self, tokens: Tensor, start: Tensor, adapter: Mapping[str, Tensor]) -> Tensor:
        """tokens int32 [1, 1] and its position start int32 [1] -> logits float32 [1, vocab]."""
        hidden = self.hidden(tokens, start, start, lambda new, cache: new, adapter)
        return self.body.model.logits(hidden[:, 0])


class Pool(nn.Module):
    """Mean of the token vectors, and the entropy of their norms. In float32 in the package too:
    sums over tokens and squares are what float16 cannot hold."""

    def forward(self, hidden: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [1, L, hidden], count int32 [1] -> pooled [hidden], entropy [1].

        Entropy is -sum p ln p / ln n with p_i = |e_i| / sum |e_j| over the n real tokens, and 0
        where n is 1.
        """
        real = torch.arange(hidden.shape[1], dtype=torch.int32) < count
        n = count.to(hidden.dtype)
        vectors = hidden[0] * real[:, None].to(hidden.dtype)  # [L, hidden]
        norms = (vectors * vectors).sum(-1).sqrt()  # [L]
        p = norms / (norms.sum() + TINY)
        nats = -(p * torch.log(p + TINY)).sum()
        entropy = nats / torch.log(torch.maximum(n, torch.full_like(n, 2.0)))
        return vectors.sum(0) / n, torch.where(count > 1, entropy, torch.zeros_like(entropy))


class Embed(nn.Module):
    """The vector and the entropy of a text, by the model as it was before any adapter."""

    def __init__(self, model: Transformer, length: int, unseen: float | None = None) -> None:
        super().__init__()
        if not 1 <= length <= model.spec.context:
            raise ExportError(
                f"an embed length of {length} tokens does not fit a context of "
                f"{model.spec.context}: choose a length from 1 to {model.spec.context}."
            )
        self.spec = model.spec
        self.length = length
        self.unseen = unseen
        self.body = _HiddenStates(model)
        self.pool = Pool()

    def forward(self, tokens: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """tokens int32 [1, L], count int32 [1] from 1 to L -> pooled [hidden], entropy [1]."""
        steps = torch.arange(self.length, dtype=torch.int32)
        positions = torch.minimum(steps, count - 1)

        def make(index: int, seen: Tensor) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return masked_attention(self.spec, q, k, v, seen, self.unseen)

            return attend

        attends = _attends(self.spec, positions, steps, make)
        return self.pool(self.body(tokens, positions, attends, False), count)
