"""Forward and backward of what a block is made of, written for the delegates.

Activations are ``[1, F, T]``: features F by tokens T. A product with a weight ``[1, out, in]`` is
then ``bmm(W, x)``, which takes W where it lies in a mapped file, since the delegates repack only
the second operand. Only operators that XNNPACK and Core ML both take occur; reductions are products
with constant rows. Nothing here asks autograd: each ``*_backward`` is the derivative by hand, and
the tests hold it against autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GELU_INNER, _GELU_CUBE = math.sqrt(2.0 / math.pi), 0.044715


def matmul(weight: Tensor, x: Tensor) -> Tensor:
    """weight [1, out, in], x [1, in, T] -> [1, out, T]"""
    return torch.bmm(weight, x)


def matmul_backward(weight: Tensor, grad: Tensor) -> Tensor:
    """``Wᵀ g``: grad [1, out, T] -> [1, T, in], tokens first, so that the gradients of several
    matrices of one input are added before they are turned."""
    return torch.bmm(turn(grad), weight)


def turn(x: Tensor) -> Tensor:
    """[B, M, N] -> [B, N, M]"""
    return x.permute(0, 2, 1)


def concatenate(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` in a tree of at most five operands, which is what XNNPACK takes at once."""
    while len(parts) > 5:
        parts = [torch.cat(parts[i : i + 5], dim) for i in range(0, len(parts), 5)]
    return torch.cat(parts, dim)


def mean_rows(x: Tensor) -> Tensor:
    """Mean over features: [B, F, T] -> [B, 1, T]."""
    batch, size = x.shape[0], x.shape[1]
    return torch.bmm(torch.full((batch, 1, size), 1.0 / size), x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over features (Zhang and Sennrich, 2019): x [B, F, T], weight [1, F, 1]."""
    return x * torch.rsqrt(mean_rows(x * x) + eps) * weight


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> Tensor:
    """With r = 1/√(mean x² + ε) and h = w g: ``r h − x r³ mean(h x)``."""
    inverse = torch.rsqrt(mean_rows(x * x) + eps)
    scaled = grad * weight
    inner = mean_rows(scaled * x)
    return inverse * (scaled - x * (inverse * inverse * inner))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2n channels: x [H, D, T], cos and sin [1, n, T].

    Its derivative is itself with −sin.
    """
    n = cos.shape[1]
    first, second = x[:, :n], x[:, n : 2 * n]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[1] > 2 * n:
        parts.append(x[:, 2 * n :])
    return torch.cat(parts, dim=1)


def activation_slope(name: str, x: Tensor) -> Tensor:
    """The derivative of ``exporters.model.transformer.activate`` at x."""
    if name == "silu":
        s = torch.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    square = x * x
    t = torch.tanh(_GELU_INNER * (x + _GELU_CUBE * (square * x)))
    slope = _GELU_INNER * (1.0 + 3.0 * _GELU_CUBE * square)
    return 0.5 * (1.0 + t) + 0.5 * x * ((1.0 - t * t) * slope)


def softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x * (1.0 / cap)) * cap


def softcap_slope(capped: Tensor, cap: float) -> Tensor:
    """The derivative of ``softcap`` where its value is ``capped``."""
    part = capped * (1.0 / cap)
    return 1.0 - part * part


def lora(x: Tensor, a: Tensor, bs: list[Tensor], scale: Tensor) -> list[Tensor]:
    """x [1, in, T], a [1, r, in], each b [1, rows, r], scale [1, 1, 1] -> each [1, rows, T]."""
    down = torch.bmm(a, x) * scale
    return [torch.bmm(b, down) for b in bs]


def lora_backward(
    x: Tensor, a: Tensor, bs: list[Tensor], scale: Tensor, grads: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """-> gradient of x [1, T, in] (tokens first), of a [1, r, in], of each b [1, rows, r]."""
    down = turn(torch.bmm(a, x) * scale)  # [1, T, r]
    b_grads = [torch.bmm(grad, down) for grad in grads]
    up = torch.bmm(turn(bs[0]), grads[0])  # [1, r, T]
    for b, grad in zip(bs[1:], grads[1:], strict=True):
        up = up + torch.bmm(turn(b), grad)
    up = up * scale
    return torch.bmm(turn(up), a), torch.bmm(up, turn(x)), b_grads


class Attention:
    """Grouped causal attention of one block: its sizes, forward and backward.

    A group's G = H / K queries are rows of one product with their key-value head, so keys and
    values are never repeated. ``mask`` [1, 1, T, T] is added to the scores.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, scale: float, cap: float | None
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.cap = scale, cap

    def _rows(self, x: Tensor) -> Tensor:
        """[1, H·D, T] -> [K, G·T, D]"""
        tokens = x.shape[2]
        x = turn(x.view(self.heads, self.head_dim, tokens))
        return x.reshape(self.kv_heads, -1, self.head_dim)

    def _features(self, rows: Tensor, tokens: int) -> Tensor:
        """[K, G·T, D] -> [1, H·D, T]"""
        x = turn(rows.view(self.heads, tokens, self.head_dim))
        return x.reshape(1, self.heads * self.head_dim, tokens)

    def _weights(self, queries: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """queries [K, G·T, D], keys [K, D, T] -> softmax [K, G·T, T], capped scores if capped."""
        scores = torch.bmm(queries, keys)
        capped = softcap(scores, self.cap) if self.cap is not None else None
        scores = scores if capped is None else capped
        tokens = keys.shape[2]
        seen = scores.view(self.kv_heads, -1, tokens, tokens) + mask
        return torch.softmax(seen, dim=-1).view(self.kv_heads, -1, tokens), capped

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """q [1, H·D, T], k and v [1, K·D, T] -> [1, H·D, T], and the softmax and capped scores
        [K, G·T, T], which ``backward`` takes where the caller has them still."""
        tokens = q.shape[2]
        shape = (self.kv_heads, self.head_dim, tokens)
        weights = self._weights(self._rows(q * self.scale), k.view(shape), mask)
        return self._features(torch.bmm(weights[0], turn(v.view(shape))), tokens), weights

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        out: Tensor,
        grad: Tensor,
        known: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``out`` is forward's, ``grad`` its gradient -> gradients of q, k, v.

        With P the softmax and O = P V: dV = Pᵀ dO and dS = P ∘ (dO Vᵀ − rows(dO ∘ O)).
        """
        tokens = q.shape[2]
        shape = (self.kv_heads, self.head_dim, tokens)
        queries, keys, values = self._rows(q * self.scale), k.view(shape), v.view(shape)
        weights, capped = known or self._weights(queries, keys, mask)
        rows = self._rows(grad)
        product = (grad * out).view(self.heads, self.head_dim, tokens)
        ones = torch.ones(self.heads, 1, self.head_dim)
        dots = torch.bmm(ones, product).view(self.kv_heads, -1, 1)  # [K, G·T, 1]
        slope = weights * (torch.bmm(rows, values) - dots)
        if capped is not None and self.cap is not None:
            slope = slope * softcap_slope(capped, self.cap)
        dq = self._features(torch.bmm(slope, turn(keys)), tokens) * self.scale
        dk = torch.bmm(turn(queries), slope).view(k.shape)
        dv = torch.bmm(turn(rows), weights).view(v.shape)
        return dq, dk, dv
