"""Constants of a program as tensors: MIL's dtypes, packed bits, and where a value is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters.errors import ExportError
from toolchain.verify.mil.blob import BlobFile


@dataclass(frozen=True)
class Dtype:
    """A dtype of MIL. ``carrier`` is the PyTorch dtype that holds its values, wider where PyTorch
    has no operations for it; ``stored`` is NumPy's for it in a file, None where it is packed."""

    name: str
    bits: int
    carrier: torch.dtype
    stored: str | None

    @property
    def signed(self) -> bool:
        return not self.name.startswith("u")


_ALL = (
    Dtype("bool", 8, torch.bool, "?"),
    Dtype("float16", 16, torch.float16, "<f2"),
    Dtype("float32", 32, torch.float32, "<f4"),
    Dtype("int8", 8, torch.int8, "<i1"),
    Dtype("int16", 16, torch.int16, "<i2"),
    Dtype("int32", 32, torch.int32, "<i4"),
    Dtype("uint8", 8, torch.uint8, "<u1"),
    Dtype("uint16", 16, torch.int32, "<u2"),
    Dtype("uint32", 32, torch.int64, "<u4"),
    Dtype("int4", 4, torch.int8, None),
    Dtype("uint1", 1, torch.uint8, None),
    Dtype("uint2", 2, torch.uint8, None),
    Dtype("uint3", 3, torch.uint8, None),
    Dtype("uint4", 4, torch.uint8, None),
    Dtype("uint6", 6, torch.uint8, None),
)
DTYPES = {dtype.name: dtype for dtype in _ALL}
# The names that programs use for some of them as text, in ``cast``.
DTYPES |= {"fp16": DTYPES["float16"], "fp32": DTYPES["float32"]}


def find_dtype(name: str) -> Dtype:
    if name not in DTYPES:
        raise ExportError(f"no dtype '{name}' is known; known: {', '.join(DTYPES)}.")
    return DTYPES[name]


@dataclass(frozen=True)
class TensorType:
    """A declared type. A dimension is None where the program leaves it open."""

    dtype: Dtype
    shape: tuple[int | None, ...]

    def admits(self, tensor: Tensor) -> bool:
        return (
            tensor.dtype == self.dtype.carrier
            and tensor.ndim == len(self.shape)
            and all(size in (None, n) for size, n in zip(self.shape, tensor.shape, strict=True))
        )

    def __str__(self) -> str:
        return f"{self.dtype.name} {['?' if n is None else n for n in self.shape]}"


@dataclass(frozen=True)
class Stored:
    """A constant in a weight file, read when it is used."""

    type: TensorType
    file: BlobFile
    offset: int

    def load(self) -> Tensor:
        """The constant in its carrier dtype; where that is how it is stored, without a copy."""
        count = math.prod(_sizes(self.type))
        data = self.file.read(self.offset, self.type.dtype.name, count, self.type.dtype.bits)
        return from_bytes(data, self.type)


# A constant: numbers, or text such as a mode, or a place in a weight file.
Constant = Tensor | str | Stored


def _sizes(declared: TensorType) -> tuple[int, ...]:
    sizes = tuple(size for size in declared.shape if size is not None)
    if len(sizes) != len(declared.shape):
        raise ExportError(f"a constant of type {declared} has no definite shape.")
    return sizes


def unpack(data: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """``count`` integers of ``bits`` bits each, the lowest bits of the first byte first.

    data uint8 [ceil(count * bits / 8)] -> uint8 [count], or int8 where they are signed.
    """
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        numbers = (data[:, None] >> shifts) & (2**bits - 1)
    else:  # a number may begin in one byte and end in the next
        single = (data[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        single = single.flatten()[: count * bits].view(count, bits)
        numbers = (single << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    numbers = numbers.flatten()[:count]
    if not signed:
        return numbers
    half = 2 ** (bits - 1)
    return (numbers ^ half).to(torch.int8) - half


def from_bytes(data: np.ndarray, declared: TensorType) -> Tensor:
    """data uint8 [bytes] -> the tensor of the declared type, in its carrier dtype."""
    dtype, shape = declared.dtype, _sizes(declared)
    if dtype.stored is None:
        packed = torch.from_numpy(data)
        return unpack(packed, dtype.bits, math.prod(shape), dtype.signed).view(shape)
    numbers = torch.from_numpy(data.view(dtype.stored)).to(dtype.carrier)
    return numbers.view(shape)


def from_immediate(tensor: Any, declared: TensorType) -> Tensor:
    """A ``TensorValue`` message, whose field depends on the dtype, as a tensor."""
    field = tensor.WhichOneof("value")
    shape = _sizes(declared)
    if field == "bytes":
        data = np.frombuffer(tensor.bytes.values, np.uint8).copy()
        expected = (math.prod(shape) * declared.dtype.bits + 7) // 8
        if len(data) != expected:
            raise ExportError(
                f"a constant of type {declared} has {len(data)} bytes, not {expected}."
            )
        return from_bytes(data, declared)
    if field not in ("floats", "ints", "bools"):
        raise ExportError(f"a constant of type {declared} is kept as {field}, which is unknown.")
    numbers = torch.tensor(list(getattr(tensor, field).values), dtype=declared.dtype.carrier)
    if numbers.numel() != math.prod(shape):
        raise ExportError(f"a constant of type {declared} has {numbers.numel()} numbers.")
    return numbers.view(shape)
