"""Quantized forms of a matrix and of the embedding table, in the patterns that XNNPACK takes.

A linear multiplies int8 activations (asymmetric, quantized per token at run time, XNNPACK's qd8)
with int8 weights per output channel or int4 weights in groups of 32. Scales of 4-bit groups are
exactly representable in bfloat16, because that is what XNNPACK stores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (embedding_byte)
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from exporters.model.calibration import walk_grams
from exporters.model.deterministic import total
from exporters.model.gptq import round_gptq, spread_of
from exporters.model.rounding import Rounded, round_nearest, round_search
from exporters.model.transformer import Block, Dense, Transformer

_OPS = torch.ops.quantized_decomposed
GROUP = 32  # inputs that share a 4-bit scale
_Module = TypeVar("_Module", bound=nn.Module)


def as_int8(x: Tensor) -> Tensor:
    """Activations as XNNPACK's int8 would give them back: quantized per token, asymmetric."""
    scale, zero = _OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
    q = _OPS.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return _OPS.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)


class QuantizedLinear(nn.Module):
    """``y = Q(x) Wᵀ + b`` with W given as integers [out, in] and scales [out, groups].

    Where W has an offset per group (an asymmetric grid), the sums of x over each group meet it in
    a second, 32 times smaller product.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    ones: Tensor

    def __init__(self, weight: Rounded, bits: int, bias: Tensor | None) -> None:
        super().__init__()
        self.bits = bits
        self.group = weight.group
        scale = weight.scale if bits == 4 else weight.scale[:, 0].contiguous()
        self.register_buffer("q", weight.q)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int32))
        self.register_buffer("bias", bias)
        self._float: Tensor | None = None  # what the integers stand for, once it was needed
        self.offset: QuantizedLinear | None = None
        if weight.offset is not None:
            self.offset = QuantizedLinear(weight.offset, 8, None)
            self.register_buffer("ones", torch.ones(1, self.group))

    def integers_as_float(self) -> Tensor:
        """``scale · q``, float32 [out, in]: computed anew in a program, once in PyTorch."""
        if torch.compiler.is_exporting():
            return self._dequantize()
        if self._float is None:
            self._float = self._dequantize()
        return self._float

    def _dequantize(self) -> Tensor:
        if self.bits == 4:
            return _OPS.dequantize_per_channel_group(
                self.q, self.scale, self.zero, -8, 7, torch.int8, self.group, torch.float32
            )
        return _OPS.dequantize_per_channel(self.q, self.scale, self.zero, 0, -127, 127, torch.int8)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [1, S, in] -> what all matrices of this input share: x as int8 would give it back,
        and with offsets its sums over each group [1, S, groups], likewise."""
        sums = None
        if self.offset is not None:
            grouped = x.view(1, -1, self.q.shape[1] // self.group, self.group)
            sums = nn.functional.linear(grouped, self.ones).view(1, -1, grouped.shape[2])
            sums = as_int8(sums)
        return as_int8(x), sums

    def forward(self, prepared: tuple[Tensor, Tensor | None]) -> Tensor:
        """-> [1, S, out]"""
        x, sums = prepared
        y = nn.functional.linear(x, self.integers_as_float(), self.bias)
        if self.offset is not None and sums is not None:
            y = y + nn.functional.linear(sums, self.offset.integers_as_float())
        return y


class QuantizedTable(nn.Module):
    """Token embedding as int8 rows [vocab, hidden] with one float32 scale a row [vocab]."""

    q: Tensor
    scale: Tensor

    def __init__(self, weight: Rounded) -> None:
        super().__init__()
        self.register_buffer("q", weight.q)
        self.register_buffer("scale", weight.scale[:, 0].contiguous())

    def forward(self, tokens: Tensor) -> Tensor:
        return _OPS.embedding_byte(self.q, self.scale, None, -128, 127, tokens)


@dataclass(frozen=True)
class Scheme:
    """How the matrices of the blocks and the head are rounded. ``affine``: with an offset for each
    group; ``gptq``: with error compensation, where the grid alone does not give the weights back.
    """

    bits: int
    head_bits: int
    affine: bool = False
    gptq: bool = False


def share(model: _Module) -> _Module:
    """A copy of the modules that holds the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in model.buffers()})


# Below this relative error the weights came from such a grid (a 4-bit file) and are recovered.
_RECOVERED = 0.01
SITES = ("qkv", "o", "gate_up", "down")


def _recovers(weight: Tensor, rounded: Rounded) -> bool:
    gap = (weight - rounded.dequantize()).double()
    size = weight.double()
    return bool(total(gap * gap) < _RECOVERED**2 * total(size * size))


def _round_block(block: Block, scheme: Scheme, grams: Mapping[str, Tensor] | None) -> bool:
    """Quantizes a block's matrices in place. Without ``grams`` only those that need none: False
    where calibration would do better, and then nothing is changed."""
    rounded: dict[tuple[str, int], Rounded] = {}
    for site in SITES:
        spread = spread_of(grams[site]) if grams is not None and scheme.bits == 4 else None
        for index, base in enumerate(getattr(block, site).bases):
            weight = base.weight
            if scheme.bits == 8:
                rounded[site, index] = round_nearest(weight, 8, weight.shape[1])
            elif grams is None:
                rounded[site, index] = round_search(weight, 4, GROUP, None, scheme.affine)
                if scheme.gptq and not _recovers(weight, rounded[site, index]):
                    return False
            else:
                rounded[site, index] = round_gptq(
                    weight, 4, GROUP, grams[site], scheme.affine, spread
                )
    for (site, index), value in rounded.items():
        bases = getattr(block, site).bases
        bases[index] = QuantizedLinear(value, scheme.bits, bases[index].bias)
    return True


@torch.no_grad()
def quantized(model: Transformer, scheme: Scheme, texts: Sequence[Tensor]) -> Transformer:
    """``model`` with quantized matrices, head and embedding; norms and adapter are shared with it.

    ``texts``: calibration tokens [1, S] each, unused at 8 bits.
    """
    result = share(model)
    if not all(_round_block(block, scheme, None) for block in result.blocks):
        result = share(model)
        for (_, grams), block in zip(walk_grams(result, texts), result.blocks, strict=False):
            _round_block(block, scheme, grams)
    table = model.table.weight
    result.table = QuantizedTable(round_nearest(table, 8, table.shape[1]))
    head: Dense = model.head
    if scheme.head_bits == 8:
        rounded = round_nearest(head.weight, 8, head.weight.shape[1])
    else:
        rounded = round_search(head.weight, 4, GROUP, None, scheme.affine)
    result.head = QuantizedLinear(rounded, scheme.head_bits, None)
    return result
