"""The transformer on many sequences at once: losses, gradients, token vectors, and text.

``exporters.model.transformer`` knows one sequence [1, S]. All of it but attention treats tokens one
by one, so the sequences of a batch are handed through it as one row of their N tokens, without
padding, and only attention here knows where one ends.
Letters in shapes: B sequences, S or T tokens of one of them, H heads, K key-value heads, D head
channels.
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
_STEPS_BETWEEN_LOOKS = 8  # tokens written before replies that have ended are put aside


@dataclass(frozen=True, eq=False)
class Batch:
    """``tokens`` int64 [N]: the sequences, one after the other; ``counts``: tokens of each."""

    tokens: Tensor
    counts: tuple[int, ...]

    @property
    def positions(self) -> Tensor:
        """Of each token in its sequence: int64 [N]."""
        return torch.cat([torch.arange(n, device=self.tokens.device) for n in self.counts])

    @property
    def owners(self) -> Tensor:
        """Which sequence each token is of: int64 [N]."""
        rows = torch.arange(len(self.counts), device=self.tokens.device)
        return rows.repeat_interleave(torch.tensor(self.counts, device=rows.device))

    @property
    def lasts(self) -> Tensor:
        """Where each sequence's last token stands: int64 [B]."""
        return torch.tensor(self.counts, device=self.tokens.device).cumsum(0) - 1


def together(sequences: Sequence[np.ndarray], device: torch.device) -> Batch:
    """Sequences int64 [n] as one batch."""
    tokens = torch.from_numpy(np.concatenate(sequences).astype(np.int64, copy=False))
    return Batch(tokens.to(device), tuple(len(sequence) for sequence in sequences))


def _attention(spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """q [B, H, S, D], k and v [B, H, T, D], seen bool [B or 1, 1, S, T] or None for causal ->
    [B, H, S, D]."""
    if (cap := spec.attention_softcap) is None:
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=spec.attention_scale
        )
    if seen is None:
        steps = torch.arange(q.shape[2], device=q.device)
        seen = visible(steps, steps, None)
    scores = torch.tanh((q * spec.attention_scale) @ k.transpose(2, 3) / cap) * cap
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def _whole(spec: ModelSpec, layer: LayerSpec, counts: Sequence[int]) -> Attend:
    """Causal attention of each sequence over itself."""
    groups = spec.heads // spec.kv_heads

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = None
        if layer.window is not None and layer.window < q.shape[1]:
            steps = torch.arange(q.shape[1], device=q.device)
            seen = visible(steps, steps, layer.window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return _attention(spec, q, k, v, seen).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (x.split(tuple(counts), dim=1) for x in (q, k, v))
        return torch.cat([alone(*part) for part in zip(*parts, strict=True)], dim=1)

    return attend


def hidden_states(model: Transformer, batch: Batch, adapted: bool) -> Tensor:
    """After the final norm: [N, hidden]."""
    attends = [_whole(model.spec, layer, batch.counts) for layer in model.spec.layers]
    return model.hidden(batch.tokens[None], batch.positions, attends, adapted)[0]


def middle_states(model: Transformer, batch: Batch) -> Tensor:
    """After half of the blocks, without the adapter: [N, hidden]."""
    x = model.lookup(batch.tokens[None])
    rotations = model.rotations(batch.positions)
    layers = list(zip(model.blocks, model.spec.layers, strict=True))
    for block, layer in layers[: len(layers) // 2]:
        rotation = rotations[layer.rope] if layer.rope else None
        x = block(x, rotation, _whole(model.spec, layer, batch.counts), False)
    return x[0]


def label_losses(model: Transformer, batch: Batch, labels: Tensor, adapted: bool = True) -> Tensor:
    """Cross-entropy in nats summed over each sequence's labels: float32 [B]. ``labels`` int64
    [N]: what follows each token, −100 where it does not count."""
    hidden = hidden_states(model, batch, adapted)
    counted = torch.nonzero(labels >= 0)[:, 0]
    logits = model.logits(hidden[counted])
    losses = nn.functional.cross_entropy(logits, labels[counted], reduction="none")
    sums = torch.zeros(len(batch.counts), device=losses.device)
    return sums.index_add(0, batch.owners[counted], losses)


class _Cache:
    """Keys and values of one layer: [B, K, capacity, D] each."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, shape: tuple[int, ...]) -> None:
        self._spec, self._layer, self._shape = spec, layer, shape
        self._kept: list[Tensor] = []

    def fill(self, counts: Sequence[int]) -> Attend:
        """Attention of the prompts, which the cache keeps."""
        whole = _whole(self._spec, self._layer, counts)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._kept = [q.new_zeros(self._shape) for _ in range(2)]
            for kept, given in zip(self._kept, (k, v), strict=True):
                for row, part in zip(kept, given[0].split(tuple(counts)), strict=True):
                    row[:, : len(part)] = part.transpose(0, 1)
            return whole(q, k, v)

        return attend

    def keep(self, rows: Tensor) -> None:
        """Forgets the other sequences."""
        self._kept = [kept[rows] for kept in self._kept]

    def step(self, positions: Tensor, reach: int) -> Attend:
        """Attention of one token a sequence, at ``positions`` [B], all below ``reach``. The H / K
        queries of a key-value head are rows of one product: nothing is copied for them."""
        s, rows = self._spec, torch.arange(len(positions), device=positions.device)
        distance = positions[:, None] - torch.arange(reach, device=positions.device)
        seen = distance >= 0
        if self._layer.window is not None:
            seen = seen & (distance < self._layer.window)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, given in zip(self._kept, (k, v), strict=True):
                kept[rows, :, positions] = given[0]
            queries = q.view(len(rows), s.kv_heads, s.heads // s.kv_heads, s.head_dim)
            keys, values = (kept[:, :, :reach] for kept in self._kept)
            mixed = _attention(s, queries, keys, values, seen[:, None, None])
            return mixed.reshape(1, len(rows), s.heads, s.head_dim)

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
    spec, rows, device = model.spec, len(batch.counts), batch.tokens.device
    longest = max(batch.counts)
    capacity = min(longest + most, context)
    shape = rows, spec.kv_heads, capacity, spec.head_dim
    caches = [_Cache(spec, layer, shape) for layer in spec.layers]
    fills = [cache.fill(batch.counts) for cache in caches]
    last = model.stream(batch.tokens[None], batch.positions, fills)[0, batch.lasts]
    ends = torch.tensor(list(stops), device=device)
    written = torch.full((rows, most), -1, device=device)
    left = torch.arange(rows, device=device)  # those that are still being written
    counts = torch.tensor(batch.counts, device=device)
    over = torch.zeros(rows, dtype=torch.bool, device=device)
    for index in range(most):
        token = choose(model.logits(model.norm(last)))
        over = over | torch.isin(token, ends)
        positions = counts + index
        written[left, index] = torch.where(over, -1, token)
        over = over | (positions + 1 >= context)
        if index + 1 == most:
            break
        if rows == 1 or index % _STEPS_BETWEEN_LOOKS == 0:
            going = torch.nonzero(~over)[:, 0]
            if not len(going):
                break
            if len(going) < len(left):
                token, positions, counts, over, left = (
                    x[going] for x in (token, positions, counts, over, left)
                )
                for cache in caches:
                    cache.keep(going)
        positions = positions.clamp(max=capacity - 1)
        reach = min(longest + index + 1, capacity)
        attends = [cache.step(positions, reach) for cache in caches]
        last = model.stream(token[None], positions, attends)[0]
    return [[token for token in row if token >= 0] for row in written.tolist()]
