"""Operations that read or write a part of a tensor: slices, gather, scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from exporters.errors import ExportError
from toolchain.verify.mil.registry import Bools, Ints, computes, moves


def _ranges(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> tuple[list[range], list[int]]:
    """For each axis of x the indices that a slice takes, as Python's slices do, negative strides
    included; and which axes it drops."""
    rank = x.ndim
    if len(begin) != rank or len(end) != rank:
        raise ExportError(f"has bounds {list(begin)} and {list(end)} for {list(x.shape)}.")
    steps = stride or (1,) * rank
    from_start = begin_mask or (False,) * rank
    to_end = end_mask or (False,) * rank
    single = squeeze_mask or (False,) * rank
    ranges = []
    for axis, size in enumerate(x.shape):
        first = None if from_start[axis] else begin[axis]
        if single[axis]:
            place = first or 0
            if not -size <= place < size:
                raise ExportError(f"takes index {place} of an axis of {size}.")
            ranges.append(range(place % size, place % size + 1))
        else:
            last = None if to_end[axis] else end[axis]
            ranges.append(range(size)[first : last : steps[axis]])
    return ranges, [axis for axis in range(rank) if single[axis]]


def _view(x: Tensor, ranges: list[range]) -> tuple[Tensor, list[int]]:
    """The part of x that ranges take, each in rising order, and the axes where they fall."""
    falling = [axis for axis, rows in enumerate(ranges) if rows.step < 0]
    for axis, rows in enumerate(ranges):
        rising = rows[::-1] if axis in falling else rows
        x = x[(slice(None),) * axis + (slice(rising.start, rising.stop, rising.step),)]
    return x, falling


@moves("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """x [d₀, …], bounds one an axis -> x[begin₀:end₀:stride₀, …], without the axes of
    ``squeeze_mask``; a mask lets an axis start at its beginning or go on to its end."""
    ranges, dropped = _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    part, falling = _view(x, ranges)
    part = part.flip(falling) if falling else part
    return part.squeeze(dropped) if dropped else part


@moves("slice_update")
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """x [d₀, …] with ``update`` in the place of what ``slice_by_index`` would take, whose shape
    ``update`` has -> [d₀, …]."""
    ranges, dropped = _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    sizes = [len(rows) for rows in ranges]
    if list(update.shape) != [n for axis, n in enumerate(sizes) if axis not in dropped]:
        raise ExportError(f"puts {list(update.shape)} into a slice of {sizes}.")
    result = x.clone()
    part, falling = _view(result, ranges)
    part.copy_(update.reshape(sizes).flip(falling))
    return result


@moves("slice_by_size")
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """A size of -1 is all that is left."""
    for axis, (first, length) in enumerate(zip(begin, size, strict=True)):
        start = first + x.shape[axis] if first < 0 else first
        count = x.shape[axis] - start if length == -1 else length
        if start < 0 or start + count > x.shape[axis]:
            raise ExportError(f"takes {count} from {start} of an axis of {x.shape[axis]}.")
        x = x.narrow(axis, start, count)
    return x


def _inside(indices: Tensor, size: int) -> Tensor:
    """indices int64, checked: what lies outside of its axis is undefined on a device."""
    wrong = indices[(indices < 0) | (indices >= size)]
    if wrong.numel():
        raise ExportError(f"takes index {wrong[0].item()} of an axis of {size}.")
    return indices.to(torch.int64)


@moves("gather")
def gather(
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """x [*B, *A, n, *C], indices [*B, *I] with n at ``axis`` -> [*B, *A, *I, *C]."""
    axis %= x.ndim
    rows = _inside(indices, x.shape[axis])
    if not batch_dims:
        taken = x.index_select(axis, rows.flatten())
        return taken.reshape(*x.shape[:axis], *rows.shape, *x.shape[axis + 1 :])
    parts = [
        gather(part, its_rows, axis - 1, batch_dims - 1)
        for part, its_rows in zip(x, rows, strict=True)
    ]
    return torch.stack(parts)


@moves("gather_along_axis")
def gather_along_axis(
    x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    return x.gather(axis, _inside(indices, x.shape[axis]))


def _tuples(indices: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """indices [..., k], each a place in the first k axes -> one tensor an axis."""
    return tuple(_inside(part, shape[axis]) for axis, part in enumerate(indices.unbind(-1)))


@moves("gather_nd")
def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    if not batch_dims:
        return x[_tuples(indices, x.shape)]
    parts = [
        gather_nd(part, its_indices, batch_dims - 1)
        for part, its_indices in zip(x, indices, strict=True)
    ]
    return torch.stack(parts)


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@computes("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """data [*A, n, *C], indices and updates [*A, m, *C] with m at ``axis`` -> ``data`` in whose
    rows ``indices`` each update is put or, by ``mode``, added, multiplied, … : [*A, n, *C]."""
    rows = _inside(indices, data.shape[axis])
    if mode == "update":
        return data.scatter(axis, rows, updates)
    if mode == "sub":
        return data.scatter_reduce(axis, rows, -updates, "sum")
    if mode not in _REDUCE:
        raise ExportError(f"mode '{mode}' is unknown; known: update, sub, {', '.join(_REDUCE)}.")
    return data.scatter_reduce(axis, rows, updates, _REDUCE[mode])


@computes("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """indices [n], each a row of ``axis``, which has size n in ``updates``."""
    shape = [-1 if place == axis % data.ndim else 1 for place in range(data.ndim)]
    rows = indices.view(shape).expand(updates.shape)
    return scatter_along_axis(data, rows, updates, axis, mode)


@computes("scatter_nd")
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    places = _tuples(indices, data.shape)
    if mode not in ("add", "sub", "update"):
        raise ExportError(f"mode '{mode}' is unknown; known: add, sub, update.")
    values = -updates if mode == "sub" else updates
    return data.index_put(places, values, accumulate=mode != "update")
