"""Which weights are rounded to which grid, and how many bytes that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from exporters.errors import ExportError
from exporters.model.transformer import Dense, Table, Transformer

QUANTIZATIONS = ("int4", "int8", "fp16", "none")
_BLOCK = 32
_LEAST_NORMAL = 2.0**-14  # of float16
_UNHELD = 2.0**-6  # of a matrix's largest weight: less than that float16 must lose of it


@dataclass(frozen=True)
class Grid:
    """Symmetric integers of ``bits`` bits with a float16 scale for each block of ``block`` inputs
    of a row; 0 means the whole row."""

    bits: int
    block: int


def plan(model: Transformer, quantize: str) -> dict[str, Grid]:
    """The grid of each matrix, by the name of its buffer in ``model``; those absent stay float.
    That is also where a row's weights are so small that float16 holds them and not their scale.

    The token table and the head have 8 bits a row in both quantized forms. Where they are one
    matrix, that serves the lookup and the product from one copy, which is smaller than a 4-bit
    head beside an 8-bit table; where they are two, the head is what no later layer corrects.

    Raises ``ExportError`` for matrices that int4's blocks do not divide, and for those whose
    weights are too small for float16 itself.
    """
    if quantize not in QUANTIZATIONS:
        raise ExportError(f"no quantization named '{quantize}'; known: {', '.join(QUANTIZATIONS)}.")
    if quantize == "none":
        return {}
    matrices = {
        f"{path}.weight": module.get_buffer("weight")
        for path, module in model.named_modules()
        if isinstance(module, Dense | Table)
    }
    _check_held(matrices)
    grids: dict[str, Grid] = {}
    if quantize == "fp16":
        return grids
    misfits = []
    for name, weight in matrices.items():
        fine = quantize == "int4" and name.startswith("blocks.")
        grid = Grid(4, _BLOCK) if fine else Grid(8, 0)
        if fine and weight.shape[1] % _BLOCK:
            misfits.append(f"{name} {list(weight.shape)}")
        elif not _scale_vanishes(weight, grid):
            grids[name] = grid
    if misfits:
        raise ExportError(
            f"int4 rounds blocks of {_BLOCK} inputs, which do not divide the inputs of "
            f"{'; '.join(misfits)}: export with int8."
        )
    return grids


def _check_held(matrices: Mapping[str, Tensor]) -> None:
    unheld = [
        f"{name} (largest weight {float(weight.abs().max()):.3g})"
        for name, weight in matrices.items()
        if not _held(weight)
    ]
    if unheld:
        raise ExportError(
            f"float16 cannot hold the weights of {'; '.join(unheld)}, which are too small for it: "
            f"export with --quantize ios=none."
        )


def _held(weight: Tensor) -> bool:
    """Whether float16 holds the matrix to a part of its largest weight, if that is not 0."""
    largest = float(weight.abs().max())
    if largest >= _LEAST_NORMAL:
        return True  # or infinite, as the caller finds out
    off = float((weight.half().float() - weight).abs().max())
    return off <= _UNHELD * largest


def _scale_vanishes(weight: Tensor, grid: Grid) -> bool:
    """Whether some block's scale, a float16, is so small that the block is off by more than a step
    of its row's grid, and would be less so as float16 numbers."""
    most = 2 ** (grid.bits - 1) - 1
    blocks = weight.unflatten(1, (-1, grid.block or weight.shape[1])).float()  # [out, blocks, in]
    steps = (blocks.abs().amax((1, 2)) / most)[:, None].expand(blocks.shape[:2])
    largest = blocks.abs().amax(2)
    small = (largest > 0) & (largest < most * _LEAST_NORMAL)
    rows = blocks[small]
    off = (stored_values(rows, Grid(grid.bits, 0)) - rows).abs().amax(1)
    near = (rows.half().float() - rows).abs().amax(1)
    return bool(((off > steps[small]) & (near < off / 2)).any())


def stored_values(weight: Tensor, grid: Grid) -> Tensor:
    """The numbers that a package's constant stands for, float32, shaped like ``weight`` [out, in].

    The converter rounds float16 weights with float16 arithmetic, so this asks its own functions.
    """
    from coremltools.optimize import _utils

    blocks = [1, grid.block]
    half = weight.half().numpy()
    # It takes the range of a row, twice its largest value, in float16. A row of zeros is fine.
    if not np.abs(half).max(initial=0) < np.finfo(np.float16).max / 2:
        raise ExportError(
            f"a matrix has a weight of {float(weight.abs().max()):.3g}, which float16 cannot round "
            f"on a grid: export with --quantize none."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded = _utils.compute_qparams(
            half, grid.bits, True, "LINEAR_SYMMETRIC", half.dtype, blocks
        )
        if rounded is None:
            raise ExportError(
                f"coremltools cannot round a matrix {list(weight.shape)} to {grid.bits} bits in "
                f"blocks of {grid.block}: export with --quantize none."
            )
        q, scale, _ = rounded
        return torch.from_numpy(_utils.dequantize_by_scale_and_zp(q, scale, None)).float()


def ideal_bytes(model: nn.Module, grids: dict[str, Grid], width: int) -> int:
    """Bytes of one copy of all constants of a model: integers with float16 scales where a grid
    says so, ``width`` bytes a number elsewhere. Tensors that are one in memory count once."""
    total = 0
    seen: set[int] = set()
    for name, tensor in model.named_buffers():
        if tensor.data_ptr() in seen or ".loras." in name:
            continue
        seen.add(tensor.data_ptr())
        if (grid := grids.get(name)) is None:
            total += tensor.numel() * width
        else:
            scales = tensor.shape[0] * (tensor.shape[1] // grid.block if grid.block else 1)
            total += tensor.numel() * grid.bits // 8 + scales * 2
    return total
