"""Operations that multiply matrices. Sums run in float32 whatever the dtype of the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.verify.mil.registry import computes


@computes("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., inputs], weight [outputs, inputs], bias [outputs] -> [..., outputs]."""
    product = x @ weight.T
    return product if bias is None else product + bias


@computes("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """[..., a, b] times [..., b, c], the last two axes exchanged first where asked."""
    left = x.mT if transpose_x and x.ndim > 1 else x
    right = y.mT if transpose_y and y.ndim > 1 else y
    return left @ right


@computes("scaled_dot_product_attention")
def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """query [..., L, E], key [..., S, E], value [..., S, V], attn_mask broadcast to [..., L, S],
    what is added to the scores or, as bool, which of them count -> [..., L, V]."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value
