"""Attention in plain operators, and what a query sees.

Letters in shapes: S tokens, H heads, K key-value heads, D head channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from exporters.model.spec import LayerSpec, ModelSpec

# What stands for the score of a key that is not seen: below every real score, and so far that no
# softmax sees it. A float32 score of this size would be rounded to a multiple of 64.
UNSEEN = -1e9
UNSEEN_HALF = -65504.0  # in float16: the least number that it has
# q [1, S, H, D], k and v [1, S, K, D] -> [1, S, H, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def masked_attention(
    spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, unseen: float | None = None
) -> Tensor:
    """Attention over what each query sees, without repeating keys and values for their groups.

    q [1, S, H, D], k and v [1, T, K, D], seen bool [S, T] -> [1, S, H, D]. The H / K queries of a
    key-value head are rows of one product, so that decoding reads the cache once and copies none.
    ``unseen`` is for what is captured in one dtype to be computed in another; None: by the dtype.
    """
    size, total = q.shape[1], k.shape[1]
    rows = (spec.heads // spec.kv_heads) * size
    queries = (q * spec.attention_scale).permute(0, 2, 1, 3)  # [1, H, S, D]
    queries = queries.reshape(1, spec.kv_heads, rows, spec.head_dim)
    scores = torch.matmul(queries, k.permute(0, 2, 3, 1))  # [1, K, H/K·S, T]
    scores = scores.reshape(1, spec.heads, size, total)
    if (cap := spec.attention_softcap) is not None:
        scores = torch.tanh(scores / cap) * cap
    if unseen is None:
        unseen = UNSEEN_HALF if scores.dtype == torch.float16 else UNSEEN
    weights = torch.softmax(scores.masked_fill(~seen, unseen), dim=-1)
    weights = weights.reshape(1, spec.kv_heads, rows, total)
    mixed = torch.matmul(weights, v.permute(0, 2, 1, 3))  # [1, K, H/K·S, D]
    return mixed.reshape(1, spec.heads, size, spec.head_dim).permute(0, 2, 1, 3)
