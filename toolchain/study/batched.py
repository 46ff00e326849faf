"""The transformer on many sequences at once: losses, gradients, token vectors, and text.

``exporters.model.transformer`` knows one sequence [1, S]. All of it but attention treats tokens one
by one, so a batch is handed through it as one row of B · S tokens, and only attention here knows
where a sequence ends. Sequences are padded on the right: what a token sees lies before it.
Letters in shapes: B sequences, S tokens, H heads, K key-value heads, D head channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from exporters.model.plain_attention import Attend, visible
from exporters.model.spec import LayerSpec, ModelSpec
from exporters.model.transformer import Transformer

Choose = Callable[[Tensor], Tensor]  # logits [B, vocab] -> tokens int64 [B]
_STEPS_BETWEEN_LOOKS = 16  # tokens written before it is asked whether all replies have ended


@dataclass(frozen=True, eq=False)
class Batch:
    """``tokens`` int64 [B, S], zeros where padded; ``counts`` int64 [B]."""

    tokens: Tensor
    counts: Tensor

    @property
    def real(self) -> Tensor:
        """bool [B, S]"""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return steps[None] < self.counts[:, None]


def padded(sequences: Sequence[np.ndarray], device: torch.device) -> Batch:
    """Sequences int64 [n] as one batch."""
    counts = [len(sequence) for sequence in sequences]
    tokens = np.zeros((len(sequences), max(counts)), np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Batch(torch.from_numpy(tokens).to(device), torch.tensor(counts, device=device))


def _heads_first(x: Tensor, rows: int) -> Tensor:
    """[1, B·S, H, D] -> [B, H, S, D]"""
    return x.view(rows, -1, *x.shape[2:]).transpose(1, 2)


def _attention(spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """q [B, H, S, D], k and v [B, K, T, D], seen bool [B or 1, 1, S, T] or None for causal ->
    [1, B·S, H, D]."""
    groups = spec.heads // spec.kv_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if (cap := spec.attention_softcap) is not None:
        if seen is None:
            steps = torch.arange(q.shape[2], device=q.device)
            seen = visible(steps, steps, None)
        scores = torch.tanh((q * spec.attention_scale) @ k.transpose(2, 3) / cap) * cap
        mixed = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v
    else:
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=spec.attention_scale
        )
    return mixed.transpose(1, 2).reshape(1, -1, spec.heads, spec.head_dim)


def _whole(spec: ModelSpec, layer: LayerSpec, rows: int) -> Attend:
    """Causal attention of B sequences over themselves."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_heads_first(x, rows) for x in (q, k, v))
        seen = None
        if layer.window is not None and layer.window < q.shape[2]:
            steps = torch.arange(q.shape[2], device=q.device)
            seen = visible(steps, steps, layer.window)
        return _attention(spec, q, k, v, seen)

    return attend


def _positions(batch: Batch) -> Tensor:
    rows, size = batch.tokens.shape
    return torch.arange(size, device=batch.tokens.device).repeat(rows)


def hidden_states(model: Transformer, batch: Batch, adapted: bool) -> Tensor:
    """After the final norm: [B, S, hidden]."""
    rows, size = batch.tokens.shape
    attends = [_whole(model.spec, layer, rows) for layer in model.spec.layers]
    hidden = model.hidden(batch.tokens.view(1, -1), _positions(batch), attends, adapted)
    return hidden.view(rows, size, -1)


def middle_states(model: Transformer, batch: Batch) -> Tensor:
    """After half of the blocks, without the adapter: [B, S, hidden]."""
    rows, size = batch.tokens.shape
    x = model.lookup(batch.tokens.view(1, -1))
    rotations = model.rotations(_positions(batch))
    layers = list(zip(model.blocks, model.spec.layers, strict=True))
    for block, layer in layers[: len(layers) // 2]:
        rotation = rotations[layer.rope] if layer.rope else None
        x = block(x, rotation, _whole(model.spec, layer, rows), False)
    return x.view(rows, size, -1)


def label_losses(model: Transformer, batch: Batch, labels: Tensor, adapted: bool = True) -> Tensor:
    """Cross-entropy in nats summed over each sequence's labels: float32 [B]. ``labels`` int64
    [B, S]: what follows each token, −100 where it does not count."""
    hidden = hidden_states(model, batch, adapted)
    rows, columns = torch.nonzero(labels >= 0, as_tuple=True)
    logits = model.logits(hidden[rows, columns])
    losses = nn.functional.cross_entropy(logits, labels[rows, columns], reduction="none")
    return torch.zeros(len(labels), device=losses.device).index_add(0, rows, losses)


class _Cache:
    """Keys and values of one layer: [B, K, capacity, D] each."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, keys: Tensor, values: Tensor) -> None:
        self._spec, self._window = spec, layer.window
        self._keys, self._values = keys, values

    def fill(self, rows: int) -> Attend:
        """Attention of the prompts, which the cache keeps."""
        layer = LayerSpec(None, self._window)
        whole = _whole(self._spec, layer, rows)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            size = k.shape[1] // rows
            self._keys[:, :, :size] = _heads_first(k, rows)
            self._values[:, :, :size] = _heads_first(v, rows)
            return whole(q, k, v)

        return attend

    def step(self, positions: Tensor, seen: Tensor) -> Attend:
        """Attention of one token a sequence, at ``positions`` [B]; ``seen`` bool [B, capacity]."""
        rows = torch.arange(len(positions), device=positions.device)
        if self._window is not None:
            steps = torch.arange(seen.shape[1], device=seen.device)
            seen = seen & (positions[:, None] - steps[None] < self._window)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            count = len(positions)
            self._keys[rows, :, positions] = k.view(count, *k.shape[2:])
            self._values[rows, :, positions] = v.view(count, *v.shape[2:])
            query = _heads_first(q, count)
            return _attention(self._spec, query, self._keys, self._values, seen[:, None, None])

        return attend


def greedy(logits: Tensor) -> Tensor:
    """[B, vocab] -> the most likely token of each, int64 [B]."""
    return logits.argmax(-1)


@torch.no_grad()
def continued(
    model: Transformer,
    batch: Batch,
    most: int,
    stops: Sequence[int],
    context: int,
    choose: Choose,
) -> list[list[int]]:
    """What is written after each prompt: at most ``most`` tokens, up to an end token or the
    context's end."""
    spec, rows = model.spec, len(batch.tokens)
    size = batch.tokens.shape[1]
    capacity = min(size + most, context)
    shape = (rows, spec.kv_heads, capacity, spec.head_dim)
    device = batch.tokens.device
    caches = [
        _Cache(spec, layer, torch.zeros(shape, device=device), torch.zeros(shape, device=device))
        for layer in spec.layers
    ]
    stream = model.stream(
        batch.tokens.view(1, -1), _positions(batch), [cache.fill(rows) for cache in caches]
    ).view(rows, size, -1)
    everyone = torch.arange(rows, device=device)
    last = stream[everyone, batch.counts - 1]
    ends = torch.tensor(list(stops), device=device)
    steps = torch.arange(capacity, device=device)
    written = torch.full((rows, most), -1, device=device)
    over = torch.zeros(rows, dtype=torch.bool, device=device)
    for index in range(most):
        token = choose(model.logits(model.norm(last)))
        over = over | torch.isin(token, ends)
        positions = batch.counts + index
        written[:, index] = torch.where(over, -1, token)
        over = over | (positions + 1 >= context)
        if index + 1 == most or (
            (rows == 1 or index % _STEPS_BETWEEN_LOOKS == 0) and bool(over.all())
        ):
            break
        positions = positions.clamp(max=capacity - 1)
        seen = steps[None] <= positions[:, None]
        attends = [cache.step(positions, seen) for cache in caches]
        last = model.stream(token[None], positions, attends)[0]
    return [[token for token in row if token >= 0] for row in written.tolist()]
