"""Operations that make tensors or change their shape: reshape, transpose, join, split, fill."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from exporters.errors import ExportError
from toolchain.verify.mil.registry import Ints, Tensors, computes, moves
from toolchain.verify.mil.values import find_dtype


@moves("reshape")
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """A 0 in ``shape`` is the size of x at that place counted from the end, or 1 where x has no
    such place (iOS 17); a -1 is what is left."""
    missing = len(shape) - x.ndim
    sizes = [
        size if size else (x.shape[place - missing] if place >= missing else 1)
        for place, size in enumerate(shape)
    ]
    return x.reshape(sizes)


@moves("reshape_like")
def reshape_like(
    x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors
) -> Tensor:
    sizes: list[int] = []
    for reference, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += reference.shape[int(begin) : None if mask else int(end)]
    return x.reshape(sizes)


@moves("transpose")
def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


@moves("expand_dims")
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """``axes`` count in the result."""
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@moves("squeeze")
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    if any(x.shape[axis] != 1 for axis in axes):
        raise ExportError(f"of axes {list(axes)} of {list(x.shape)}, which are not all of size 1.")
    return x.squeeze(axes)


@moves("flatten2d")
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    cut = axis if axis >= 0 else axis + x.ndim
    return x.reshape(math.prod(x.shape[:cut]), -1)


@moves("concat")
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    if interleave:  # the first of each, then the second of each
        return torch.stack(values, axis % values[0].ndim + 1).flatten(
            axis % values[0].ndim, axis % values[0].ndim + 1
        )
    if values[0].ndim == 0:
        return torch.stack(values)
    return torch.cat(values, axis)


@moves("stack")
def stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


@moves("split")
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return tuple(x.split(split_sizes, axis))
    if not num_splits or x.shape[axis] % num_splits:
        raise ExportError(f"of {x.shape[axis]} rows into {num_splits} equal parts is impossible.")
    return tuple(x.split(x.shape[axis] // num_splits, axis))


@moves("tile")
def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.tile(reps)


@moves("reverse")
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(tuple(range(x.ndim)) if axes is None else axes)


_PADDING = ("constant", "reflect", "replicate")


@computes("pad")
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """``pad`` has before and after of each of the last axes, in the order of the axes."""
    if mode not in _PADDING:
        raise ExportError(f"mode '{mode}' is unknown; known: {', '.join(_PADDING)}.")
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]
    if mode == "constant":
        backwards = [size for pair in reversed(pairs) for size in pair]
        return functional.pad(x, backwards, value=constant_val)
    for axis, (before, after) in enumerate(pairs, x.ndim - len(pairs)):
        x = x.index_select(axis, _edge(x.shape[axis], before, after, mode))
    return x


def _edge(size: int, before: int, after: int, mode: str) -> Tensor:
    """Which rows of ``size`` stand in a padded axis."""
    places = torch.arange(-before, size + after)
    if mode == "replicate":
        return places.clamp(0, size - 1)
    return (size - 1) - ((size - 1) - places.abs()).abs()


@moves("shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@moves("fill")
def fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    return _full(shape, value)


@moves("fill_like")
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return _full(ref_tensor.shape, value)


def _full(shape: Sequence[int], value: Tensor | None) -> Tensor:
    return torch.zeros(()).expand(shape) if value is None else value.reshape(()).expand(shape)


@computes("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@moves("one_hot")
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """An index outside of the vector gives a vector without the ``on_value``."""
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.tensor(0, dtype=on.dtype) if off_value is None else off_value
    places = torch.arange(one_hot_vector_size, dtype=indices.dtype)
    hot = torch.where(indices[..., None] == places, on, off)
    return hot.movedim(-1, axis)


@moves("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """What is at most ``lower`` below and ``upper`` above the diagonal; -1 is all."""
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])
    kept = torch.ones(x.shape[-2:], dtype=torch.bool)
    if lower >= 0:
        kept &= rows - columns <= lower
    if upper >= 0:
        kept &= columns - rows <= upper
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


@moves("non_zero")
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero().to(torch.int32)


@moves("constexpr_cast")
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val.to(find_dtype(output_dtype).carrier)
