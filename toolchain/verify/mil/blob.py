"""The weight file of a package: tensors at 64-byte steps, each behind a header that describes it.

The layout (version 2, little endian), from MLModel's public ``MILBlob`` sources: the file begins
with uint32 count and uint32 version. A tensor's header, to which an offset in the program points,
is uint32 sentinel, uint32 dtype, uint64 bytes, uint64 offset of its data, uint64 unused bits of
its last byte.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from exporters.errors import ExportError

_FILE = struct.Struct("<II")
_HEADER = struct.Struct("<IIQQQ")
_VERSION = 2
_SENTINEL = 0xDEADBEEF
_NAMES = {
    1: "float16",
    2: "float32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}


class BlobFile:
    """A weight file, mapped into memory. Raises ``ExportError`` for a file that is not one."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ExportError(f"{path} is missing: the package is not complete.")
        self.path = path
        size = path.stat().st_size
        if size < _FILE.size:
            raise ExportError(f"{path} has {size} bytes, too few for a weight file.")
        # Copy on write: whatever happens to a tensor made from it, the file stays as it is.
        self._bytes = np.memmap(path, np.uint8, mode="c")
        _, version = _FILE.unpack(self._bytes[: _FILE.size].tobytes())
        if version != _VERSION:
            raise ExportError(
                f"{path} is a weight file of version {version}; only {_VERSION} is known."
            )

    def read(self, offset: int, dtype: str, count: int, bits: int) -> np.ndarray:
        """The bytes, uint8 [ceil(count * bits / 8)], of ``count`` numbers of type ``dtype`` with
        ``bits`` bits each, without a copy. ``offset`` is that of their header."""
        where = f"the weight at byte {offset} of {self.path}"
        if offset + _HEADER.size > len(self._bytes):
            raise ExportError(f"{where} lies past the end of the file: it is truncated.")
        header = self._bytes[offset : offset + _HEADER.size].tobytes()
        sentinel, code, size, start, _ = _HEADER.unpack(header)
        if sentinel != _SENTINEL:
            raise ExportError(f"{where} has no header there: the file is damaged.")
        stored = _NAMES.get(code, f"type {code}")
        expected = (count * bits + 7) // 8
        if stored != dtype or size != expected:
            raise ExportError(
                f"{where} is {stored} in {size} bytes where the program has {dtype} in {expected}: "
                f"program and weights do not belong together."
            )
        if start + size > len(self._bytes):
            raise ExportError(f"{where} ends past the end of the file: it is truncated.")
        return self._bytes[start : start + size]
