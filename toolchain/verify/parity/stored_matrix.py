"""A matrix as integers on a grid, in NumPy: as the weights file stores it, or the source has it.

What a file's parts stand for is read off docs/bundle.md, "Weights file", and shares nothing with
the code that writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exporters.model.quantize import QuantizedLinear, QuantizedTable
from exporters.model.transformer import Dense, Table

ENDS = {8: (-127, 127), 4: (-8, 7)}  # of the integers of so many bits
_GROUP = 32  # columns that share a scale and an offset at 4 bits


@dataclass(frozen=True, eq=False)
class GridMatrix:
    """W [out, in] as ``scale · integers + offset``: ``bits`` 8 or 4, ``integers`` [out, in],
    ``scale`` and ``offset`` float32 [out, groups]."""

    bits: int
    integers: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """float32 [out, in]: a product, then a sum, each rounded once."""
        grouped = self.integers.astype(np.float32).reshape(*self.scale.shape, -1)
        return (grouped * self.scale[..., None] + self.offset[..., None]).reshape(
            self.integers.shape
        )

    @property
    def steps(self) -> np.ndarray:
        """float32 [out, in]: the distance of two neighbouring values, at each weight."""
        return np.repeat(self.scale, self.integers.shape[1] // self.scale.shape[1], axis=1)


Matrix = np.ndarray | GridMatrix  # float32 [out, in], or on a grid


def values_of(matrix: Matrix) -> np.ndarray:
    """float32 [out, in]"""
    return matrix.values if isinstance(matrix, GridMatrix) else matrix


def shape_of(matrix: Matrix) -> tuple[int, int]:
    """(out, in)"""
    rows, columns = (matrix.integers if isinstance(matrix, GridMatrix) else matrix).shape
    return rows, columns


def shapes_of(precision: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The parts of a stored matrix [rows, columns], with their shapes."""
    if precision == "fp32":
        return {"value": (1, rows, columns)}
    if precision == "int8":
        return {"q": (1, rows, columns), "scale": (1, rows, 1)}
    groups = (1, rows, columns // _GROUP)
    return {"q": (1, rows, columns // 2), "scale": groups, "offset": groups}


def read_matrix(precision: str, parts: Mapping[str, np.ndarray]) -> Matrix:
    """What the ``parts`` of a stored matrix stand for."""
    if precision == "fp32":
        return parts["value"][0]
    q, scale = parts["q"][0], parts["scale"][0]
    if precision == "int8":
        return GridMatrix(8, q.astype(np.int64), scale, np.zeros_like(scale))
    byte = q.astype(np.int64) + 128
    integers = np.concatenate([byte // 16 - 8, byte % 16 - 8], axis=1)
    return GridMatrix(4, integers, scale, parts["offset"][0])


def matrix_of(base: Dense | Table | QuantizedLinear | QuantizedTable) -> Matrix:
    """The weights that one of the transformer's matrices computes with."""
    if isinstance(base, Dense | Table):
        return base.weight.detach().numpy()
    integers, scale = base.q.numpy().astype(np.int64), base.scale.numpy().astype(np.float32)
    scale = scale.reshape(len(integers), -1)
    offset = np.zeros_like(scale)
    bits = 8
    if isinstance(base, QuantizedLinear):
        bits = base.bits
        if base.offset is not None:
            offset = values_of(matrix_of(base.offset))
    return GridMatrix(bits, integers, scale, offset)
