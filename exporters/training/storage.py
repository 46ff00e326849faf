"""How a base matrix lies in the weights file, and how a training program reads it.

Each precision is a list of parts (tensors of the file, which are the program's inputs) and a
product with what they stand for. A part is read where it lies: nothing is unpacked before a call.

==========  ==========================================================================
precision   parts of a matrix [out, in]
==========  ==========================================================================
``fp32``    ``value`` float32 [1, out, in]
``int8``    ``q`` int8 [1, out, in]; ``scale`` float32 [1, out, 1]
``int4``    ``q`` int8 [1, out, in / 2]: column j and column j + in / 2 as 16·(high) + low, each
            from −8 to 7, low stored with 8 added, the byte with 128 subtracted;
            ``scale`` float32 [1, out, in / 32]; ``offset`` float32 [1, out, in / 32]
==========  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed)

from exporters.errors import ExportError
from exporters.model.rounding import Rounded, round_nearest, round_search
from exporters.training.primitives import matmul, matmul_backward

GROUP = 32  # inputs that share a 4-bit scale
Parts = Mapping[str, Tensor]


def _float(q: Tensor) -> Tensor:
    """int8 to float32 as it is, in the form that XNNPACK converts in its own vector kernel."""
    return torch.ops.quantized_decomposed.dequantize_per_tensor(q, 1.0, 0, -128, 127, torch.int8)


def _dequantized(weight: Tensor | Rounded) -> Tensor:
    return weight.dequantize() if isinstance(weight, Rounded) else weight


@dataclass(frozen=True)
class StoredPart:
    """One tensor of a stored matrix: its name, shape, and NumPy dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class StoragePrecision(Protocol):
    """One row of the table above."""

    def parts(self, rows: int, columns: int) -> tuple[StoredPart, ...]: ...

    def encode(self, weight: Tensor | Rounded) -> dict[str, Tensor]:
        """A matrix [out, in], rounded if it is not yet on this grid."""

    def decode(self, parts: Parts) -> Tensor:
        """float32 [1, out, in], the values that the program multiplies with."""

    def forward(self, parts: Parts, x: Tensor) -> Tensor:
        """x [1, in, T] -> W x [1, out, T]"""

    def backward(self, parts: Parts, grad: Tensor) -> Tensor:
        """grad [1, out, T] -> Wᵀ g [1, T, in], tokens first"""


class Float32:
    """As they are."""

    def parts(self, rows: int, columns: int) -> tuple[StoredPart, ...]:
        return (StoredPart("value", (1, rows, columns), "float32"),)

    def encode(self, weight: Tensor | Rounded) -> dict[str, Tensor]:
        value = _dequantized(weight)
        return {"value": value.float()[None].contiguous()}

    def decode(self, parts: Parts) -> Tensor:
        return parts["value"]

    def forward(self, parts: Parts, x: Tensor) -> Tensor:
        return matmul(parts["value"], x)

    def backward(self, parts: Parts, grad: Tensor) -> Tensor:
        return matmul_backward(parts["value"], grad)


class Int8:
    """The scale of a row multiplies the row's product, not its weights: fewer numbers."""

    def parts(self, rows: int, columns: int) -> tuple[StoredPart, ...]:
        return (
            StoredPart("q", (1, rows, columns), "int8"),
            StoredPart("scale", (1, rows, 1), "float32"),
        )

    def encode(self, weight: Tensor | Rounded) -> dict[str, Tensor]:
        if isinstance(weight, Rounded) and weight.scale.shape[1] == 1 and not weight.offset:
            rounded = weight
        else:
            value = _dequantized(weight)
            rounded = round_nearest(value, 8, value.shape[1])
        return {"q": rounded.q[None].contiguous(), "scale": rounded.scale[None].contiguous()}

    def decode(self, parts: Parts) -> Tensor:
        return _float(parts["q"]) * parts["scale"]

    def forward(self, parts: Parts, x: Tensor) -> Tensor:
        return matmul(_float(parts["q"]), x) * parts["scale"]

    def backward(self, parts: Parts, grad: Tensor) -> Tensor:
        # XNNPACK packs the second operand of a product. A bare conversion of an input it packs into
        # memory that each product keeps; not so what an operator computed, even one without effect.
        q = torch.clamp(_float(parts["q"]), -127.0, 127.0)
        return matmul_backward(q, grad * parts["scale"])


class Int4:
    """Two weights a byte, with a scale and an offset for each ``GROUP`` inputs."""

    def parts(self, rows: int, columns: int) -> tuple[StoredPart, ...]:
        if columns % (2 * GROUP):
            raise ExportError(
                f"training weights in int4 need rows of a multiple of {2 * GROUP} weights, found "
                f"{columns}: give --train-weights int8."
            )
        grid = (1, rows, columns // GROUP)
        return (
            StoredPart("q", (1, rows, columns // 2), "int8"),
            StoredPart("scale", grid, "float32"),
            StoredPart("offset", grid, "float32"),
        )

    def encode(self, weight: Tensor | Rounded) -> dict[str, Tensor]:
        """A matrix [out, in], rounded if it is not yet in groups of ``GROUP``."""
        if isinstance(weight, Rounded) and weight.group == GROUP:
            rounded = weight
        else:
            rounded = round_search(_dequantized(weight), 4, GROUP, None, True)
        half = rounded.q.shape[1] // 2
        first, second = rounded.q[:, :half].int(), rounded.q[:, half:].int()
        packed = (16 * (first + 8) + second + 8 - 128).to(torch.int8)
        offset = rounded.offset.dequantize() if rounded.offset else torch.zeros_like(rounded.scale)
        return {
            "q": packed[None].contiguous(),
            "scale": rounded.scale.float()[None].contiguous(),
            "offset": offset[None].contiguous(),
        }

    def decode(self, parts: Parts) -> Tensor:
        q, scale, offset = parts["q"], parts["scale"], parts["offset"]
        byte = _float(q)
        # byte = 16 a + b − 128 with a, b from 0 to 15: a = ⌊(byte + 128) / 16⌋.
        above = torch.floor(byte * (1.0 / 16.0))  # a − 8
        below = byte - above * 16.0 - 8.0  # b − 8
        whole = torch.cat([above, below], dim=2)
        grouped = whole.view(1, q.shape[1], scale.shape[2], GROUP)
        return (grouped * scale[..., None] + offset[..., None]).view(whole.shape)

    def forward(self, parts: Parts, x: Tensor) -> Tensor:
        return matmul(self.decode(parts), x)

    def backward(self, parts: Parts, grad: Tensor) -> Tensor:
        return matmul_backward(self.decode(parts), grad)


PRECISIONS: dict[str, StoragePrecision] = {"fp32": Float32(), "int8": Int8(), "int4": Int4()}
