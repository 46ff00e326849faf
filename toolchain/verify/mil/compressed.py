"""Constants that are kept compressed: integers with scales, and tables of values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exporters.errors import ExportError
from toolchain.verify.mil.registry import Ints, computes, moves
from toolchain.verify.mil.values import unpack


def _per_block(values: Tensor, rank: int, axis: int) -> Tensor:
    """A scalar, or one number for each place of ``axis``, as a tensor of ``rank`` axes."""
    return values.reshape([-1 if place == axis % rank else 1 for place in range(rank)])


def _blocks(x: Tensor, counts: Ints) -> Tensor:
    """x with each axis of size n as two, [count, n / count], so that what belongs to a block can
    be broadcast over it."""
    sizes: list[int] = []
    for size, count in zip(x.shape, counts, strict=True):
        if not count or size % count:
            raise ExportError(f"has {list(counts)} blocks, which do not divide {list(x.shape)}.")
        sizes += [count, size // count]
    return x.reshape(sizes)


def _spread(x: Tensor, rank: int) -> Tensor:
    """x with an axis of size 1 behind each of its first ``rank`` axes."""
    sizes: list[int] = []
    for size in x.shape[:rank]:
        sizes += [size, 1]
    return x.reshape(*sizes, *x.shape[rank:])


@computes("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), with as many blocks in each axis as ``scale`` has places there."""
    blocks = _blocks(data, tuple(scale.shape)).to(torch.float32)
    if offset is not None:
        blocks = blocks - _spread(offset, offset.ndim)
    return (blocks * _spread(scale, scale.ndim)).reshape(data.shape)


@computes("constexpr_affine_dequantize")
def affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    """scale * (data - zero point), both one number or one for each place of ``axis``."""
    rank = quantized_data.ndim
    shifted = quantized_data.to(torch.float32) - _per_block(zero_point, rank, axis)
    return shifted * _per_block(scale, rank, axis)


@moves("constexpr_lut_to_dense")
def lut_to_dense(
    indices: Tensor, lut: Tensor, vector_axis: int | None = None, shape: Ints | None = None
) -> Tensor:
    """Each index replaced by what the table has there.

    iOS 16: indices uint8 [bytes], packed, lut [entries], and the result's ``shape``. iOS 18:
    indices [n, ...], lut [blocks of n, ..., entries, vector]: a table for each block; a vector of
    more than one value lies along ``vector_axis``.
    """
    if shape is not None:
        bits = int(math.log2(len(lut)))
        return lut[unpack(indices, bits, math.prod(shape), False).long()].reshape(shape)
    rank = indices.ndim
    blocks = _blocks(indices, tuple(lut.shape[:rank])).long()
    entries, vector = lut.shape[-2:]
    tables = lut.reshape(-1, vector)  # [blocks * entries, vector]
    which = torch.arange(lut.shape[:rank].numel()).reshape(lut.shape[:rank])
    rows = _spread(which, rank) * entries + blocks
    values = tables[rows.flatten()].reshape(*indices.shape, vector)
    if vector == 1:
        return values[..., 0]
    if vector_axis is None:
        raise ExportError("has a table of vectors and does not say along which axis they lie.")
    axis = vector_axis % rank
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)
