"""A GGUF file: its metadata and tensors, every offset checked before anything is read there.

The layout is that of the GGUF specification, versions 2 and 3, little endian (ggml's docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from exporters.errors import ExportError
from exporters.model.lfs import refuse_pointer

# GGUF value types: number -> (struct format, bytes). 8 is a string, 9 an array.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: ``shape`` in PyTorch's order, ``start`` and ``size`` in bytes."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """Metadata (Python scalars, strings, lists) and the table of tensors."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]
    data: mmap.mmap

    def read(self, name: str) -> Tensor:
        """A tensor of the file, dequantized to float32."""
        t = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, t.size, t.start)
        rows = raw.reshape(-1, t.size // max(1, math.prod(t.shape[:-1])))
        # A copy: dequantize returns a view of the mapping where the file holds float32.
        return torch.from_numpy(np.array(gguf.dequantize(rows, t.kind)).reshape(t.shape))


class _Cursor:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def corrupt(self, why: str) -> ExportError:
        return ExportError(f"{self.path} is truncated or corrupt ({why}); download it again.")

    def skip(self, size: int) -> int:
        start = self.at
        if size > len(self.data) - start:
            raise self.corrupt(f"it ends at byte {len(self.data)}, inside its header")
        self.at += size
        return start

    def numbers(self, form: str, count: int = 1) -> tuple:
        # Asked of the file's size first: a corrupt count must not allocate memory.
        start = self.skip(struct.calcsize("<" + form) * count)
        return struct.unpack_from(f"<{count}{form}", self.data, start)

    def text(self) -> str:
        (size,) = self.numbers("Q")
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt(f"the text at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> object:
        """The next value of GGUF's type ``kind``: a number, a text, or a list of either."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.corrupt(f"unknown value type {kind} at byte {self.at}")
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        if kind in _SCALARS:
            return list(self.numbers(_SCALARS[kind], count))
        if kind != _STRING:
            raise self.corrupt(f"array of value type {kind} at byte {self.at}")
        return [self.text() for _ in range(count)]


def read_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file and check it: magic, version, metadata, and that all its tensors are there.

    Raises ``ExportError`` for a file that is not GGUF, truncated, corrupt, or of a kind that cannot
    be read.
    """
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ExportError(f"{path} is empty; expected a GGUF file. Download it again.") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}.") from None
    if data[:4] != b"GGUF":
        raise ExportError(f"{path} is not a GGUF file: it begins with {data[:4]!r}, not b'GGUF'.")
    cursor = _Cursor(path, data)
    cursor.skip(4)
    (version,) = cursor.numbers("I")
    if version not in (2, 3):
        raise ExportError(
            f"{path} is GGUF version {version}; expected version 2 or 3, little endian: convert it "
            f"with llama.cpp's tools."
        )
    tensor_count, pair_count = cursor.numbers("Q", 2)
    metadata: dict[str, object] = {}
    for _ in range(pair_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    if int(_number(metadata.get("split.count", 0))) > 1:
        raise ExportError(
            f"{path} is one part of {metadata['split.count']}; join them with "
            f"llama-gguf-split --merge."
        )
    return GGUFFile(path, metadata, _tensors(cursor, tensor_count, metadata), data)


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0


def _tensors(cursor: _Cursor, count: int, metadata: dict[str, object]) -> dict[str, GGUFTensor]:
    entries = []
    for _ in range(count):
        name = cursor.text()
        (rank,) = cursor.numbers("I")
        shape = tuple(reversed(cursor.numbers("Q", rank)))  # ggml counts the fastest first
        (kind,), (offset,) = cursor.numbers("I"), cursor.numbers("Q")
        entries.append((name, shape, kind, offset))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise cursor.corrupt(f"general.alignment is {align}, expected a power of two")
    base = (cursor.at + align - 1) // align * align
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise cursor.corrupt(f"tensor {name} is listed twice")
        known = _kind(cursor, name, kind)
        block, width = gguf.GGML_QUANT_SIZES[known]
        if not shape or 0 in shape or shape[-1] % block:
            raise cursor.corrupt(f"tensor {name} has the impossible shape {list(shape)}")
        size = math.prod(shape) // block * width
        start = base + offset
        if start + size > len(cursor.data):
            raise cursor.corrupt(
                f"tensor {name} ends at byte {start + size}, the file at {len(cursor.data)}"
            )
        tensors[name] = GGUFTensor(shape, known, start, size)
    return tensors


def _kind(cursor: _Cursor, name: str, number: int) -> gguf.GGMLQuantizationType:
    try:
        kind = gguf.GGMLQuantizationType(number)
        # One block of zeros tells whether the gguf package can read this kind at all.
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except ValueError:
        raise cursor.corrupt(f"tensor {name} is of unknown type {number}") from None
    except NotImplementedError:
        raise ExportError(
            f"{cursor.path}: tensor {name} is stored as {kind.name}, which cannot be read; use a "
            f"file in F32, F16, BF16 or one of the Q4 to Q8 kinds."
        ) from None
    return kind
