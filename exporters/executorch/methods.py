"""The functions that become ``lm.pte``: ``forward`` with its KV cache, and ``embed``.

``forward`` keeps the stock LLM runner's contract: ``tokens`` [1, S] int64 and ``start_pos`` [1]
int64 in, the logits of the last token [1, vocab] float32 out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
from torch import Tensor, nn

from exporters.executorch.pieces import PieceFactory
from exporters.model.lora_tensors import ENTER, LEAVE, lora_buffers
from exporters.model.plain_attention import UNSEEN, Attend, masked_attention, visible
from exporters.model.quantize import share
from exporters.model.spec import ModelSpec
from exporters.model.transformer import Transformer

TINY = 1e-30  # keeps log and division finite where the value does not matter


class StockCache(nn.Module):
    """Keys and values of one layer [1, C, K, D], updated and attended by ExecuTorch's LLM ops."""

    keys: Tensor
    values: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = (1, spec.context, spec.kv_heads, spec.head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def attend(self, start: int, mask: Tensor | None) -> Attend:
        """``mask``: additive [S, C] float32 where a window narrows the causal view."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """As ``Attend`` says, with what the cache holds before ``start``."""
            torch.ops.llama.update_cache(k, self.keys, start)
            torch.ops.llama.update_cache(v, self.values, start)
            return torch.ops.llama.custom_sdpa(
                q,
                self.keys,
                self.values,
                start,
                mask,
                0.0,
                mask is None,
                self.spec.attention_scale,
            )

        return attend


class PlainCache(nn.Module):
    """The same in plain operators, for what the LLM ops cannot express (soft-capping)."""

    keys: Tensor
    values: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = (1, spec.context, spec.kv_heads, spec.head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def attend(self, positions: Tensor, seen: Tensor) -> Attend:
        """``positions`` [S] int64, ``seen`` bool [S, C]."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[:, positions] = k
            self.values[:, positions] = v
            return _ungrouped_attention(self.spec, q, self.keys, self.values, seen)

        return attend


class _Pieces(nn.Module):
    """A transformer whose arithmetic is delegates, with attention between them."""

    def __init__(self, model: Transformer, factory: PieceFactory, adapted: bool) -> None:
        super().__init__()
        self.spec = model.spec
        self.shell = share(model)  # for the token table and the rotary tables
        self.shell.blocks = nn.ModuleList()  # type: ignore[assignment]
        del self.shell.norm, self.shell.head
        last = len(model.blocks) - 1
        self.pieces = [factory.between(None, 0, adapted)]
        self.pieces += [factory.between(i, i + 1, adapted) for i in range(last)]
        self.pieces.append(factory.between(last, None, adapted))
        self.arguments: list[list[str]] = []
        if adapted:
            for index, block in enumerate(model.blocks):
                for path, public in lora_buffers(block, ENTER + LEAVE):
                    _register(self, f"layers.{index}.{public}", block.get_buffer(path))
        for piece in range(last + 2):
            names = []
            if adapted and piece > 0:
                block = model.blocks[piece - 1]
                names += [f"layers.{piece - 1}.{p}" for _, p in lora_buffers(block, LEAVE)]
            if adapted and piece <= last:
                block = model.blocks[piece]
                names += [f"layers.{piece}.{p}" for _, p in lora_buffers(block, ENTER)]
            self.arguments.append(names)

    def stream(self, tokens: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """As ``Transformer.stream``."""
        rotations = self.shell.rotations(positions)

        def inputs(piece: int) -> list[Tensor]:
            layer = self.spec.layers[piece] if piece < len(self.spec.layers) else None
            tables = list(rotations[layer.rope][:2]) if layer and layer.rope else []
            return tables + [self.get_buffer(name) for name in self.arguments[piece]]

        x = self.shell.lookup(tokens)
        q, k, v = self.pieces[0](x, *inputs(0))
        for index, attend in enumerate(attends[:-1], 1):
            x, q, k, v = self.pieces[index](x, attend(q, k, v), *inputs(index))
        last = len(attends)
        return self.pieces[last](x, attends[-1](q, k, v), *inputs(last))[0]


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Registers a buffer under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.register_buffer(leaf, tensor)


class LmProgram(_Pieces):
    """Next-token logits with a KV cache; the adapter is read from outside the program."""

    def __init__(self, model: Transformer, factory: PieceFactory) -> None:
        super().__init__(model, factory, adapted=True)
        # The LLM ops have no soft-capping.
        plain = model.spec.attention_softcap is not None
        self.plain = [PlainCache(model.spec) for _ in model.spec.layers] if plain else []
        self.stock = [] if plain else [StockCache(model.spec) for _ in model.spec.layers]
        self.caches = nn.ModuleList([*self.plain, *self.stock])
        self.final = [factory.final()]

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        """tokens [1, S] int64, start_pos [1] int64 -> logits of the last token [1, vocab]."""
        spec = self.spec
        length = tokens.shape[1]
        start: Any = start_pos[0].item()  # a symbol while captured
        torch._check(start >= 0)
        torch._check(start + length <= spec.context)
        positions = start_pos + torch.arange(length)
        seen = _masks(spec, positions, torch.arange(spec.context))
        attends = [
            cache.attend(positions, seen[layer.window])
            for cache, layer in zip(self.plain, spec.layers, strict=False)
        ]
        masks = {w: _additive(mask) if w else None for w, mask in seen.items()}
        attends += [
            cache.attend(start, masks[layer.window])
            for cache, layer in zip(self.stock, spec.layers, strict=False)
        ]
        last = self.stream(tokens, positions, attends)[:, -1:]
        return self.final[0](last)[0][0]


class EmbedProgram(_Pieces):
    """Pooled vector and entropy of a dialogue, by the base model without adapter or cache."""

    def __init__(self, model: Transformer, factory: PieceFactory) -> None:
        super().__init__(model, factory, adapted=False)
        self.final = [factory.normed()]

    def _attend(self, seen: Tensor, window: int | None) -> Attend:
        spec = self.spec
        if spec.attention_softcap is not None:
            return lambda q, k, v: _ungrouped_attention(spec, q, k, v, seen)
        mask = _additive(seen) if window else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.ops.llama.custom_sdpa(
                q, k, v, 0, mask, 0.0, mask is None, spec.attention_scale
            )

        return attend

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [1, S] int64 -> pooled [hidden] float32, entropy [1] float32."""
        positions = torch.arange(tokens.shape[1])
        seen = _masks(self.spec, positions, positions)
        by_window = {w: self._attend(mask, w) for w, mask in seen.items()}
        attends = [by_window[layer.window] for layer in self.spec.layers]
        hidden = self.final[0](self.stream(tokens, positions, attends))[0][0]  # [S, hidden]
        return pooled(hidden), entropy(hidden)


def _ungrouped_attention(spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``masked_attention`` with a key and a value for each head: where S is dynamic, capture cannot
    fold a group's queries into rows."""
    groups = spec.heads // spec.kv_heads
    single = replace(spec, kv_heads=spec.heads)
    keys, values = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    return masked_attention(single, q, keys, values, seen)


def _masks(spec: ModelSpec, queries: Tensor, keys: Tensor) -> dict[int | None, Tensor]:
    """Each distinct window's view, bool [S, T], once."""
    windows = dict.fromkeys(layer.window for layer in spec.layers)
    return {window: visible(queries, keys, window) for window in windows}


def _additive(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, UNSEEN)


def pooled(hidden: Tensor) -> Tensor:
    """Mean over tokens: [S, hidden] -> [hidden]."""
    return hidden.mean(dim=0)


def entropy(hidden: Tensor) -> Tensor:
    """Entropy of embedding, estimator ``norm``: [S, hidden] -> [1], in 0..1.

    −Σ p ln p / ln n with p_i = ‖e_i‖ / Σ‖e_j‖; 0 for a single token.
    """
    norms = torch.sqrt((hidden * hidden).sum(dim=1))
    p = norms / (norms.sum() + TINY)
    count = torch.ones_like(norms).sum()
    total = -(p * torch.log(p + TINY)).sum()
    return (total / torch.clamp(torch.log(count), min=1e-6)).reshape(1)
