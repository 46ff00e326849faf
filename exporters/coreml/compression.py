"""Which weights are rounded to which grid, and how many bytes that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from exporters.errors import ExportError
from exporters.model.transformer import Dense, Table, Transformer

QUANTIZATIONS = ("int4", "int8", "fp16", "none")
_BLOCK = 32


@dataclass(frozen=True)
class Grid:
    """Symmetric integers of ``bits`` bits with a float16 scale for each block of ``block`` inputs
    of a row; 0 means the whole row."""

    bits: int
    block: int


def plan(model: Transformer, quantize: str) -> dict[str, Grid]:
    """The grid of each matrix, by the name of its buffer in ``model``; those absent stay float.

    The token table and the head have 8 bits a row in both quantized forms. Where they are one
    matrix, that serves the lookup and the product from one copy, which is smaller than a 4-bit
    head beside an 8-bit table; where they are two, the head is what no later layer corrects.
    """
    if quantize not in QUANTIZATIONS:
        raise ExportError(f"no quantization named '{quantize}'; known: {', '.join(QUANTIZATIONS)}.")
    if quantize not in ("int4", "int8"):
        return {}
    grids = {}
    misfits = []
    for path, module in model.named_modules():
        if not isinstance(module, Dense | Table):
            continue
        name, weight = f"{path}.weight", module.get_buffer("weight")
        fine = quantize == "int4" and path.startswith("blocks.")
        grids[name] = Grid(4, _BLOCK) if fine else Grid(8, 0)
        if fine and weight.shape[1] % _BLOCK:
            misfits.append(f"{name} {list(weight.shape)}")
    if misfits:
        raise ExportError(
            f"int4 rounds blocks of {_BLOCK} inputs, which do not divide the inputs of "
            f"{'; '.join(misfits)}: export with int8."
        )
    return grids


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
