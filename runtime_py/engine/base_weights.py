"""The base weights of training: one safetensors file, mapped and used where it lies.

Only the header is read into memory. A tensor is a view of the mapping, so the system pages weights
in as layers are walked and drops them at will; nothing is copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from runtime_py.loop.errors import TrainingError

_DTYPES: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "I8": np.dtype(np.int8)}
_MOST_HEADER = 100_000_000  # bytes, safetensors' own limit


class BaseWeights(Mapping[str, np.ndarray]):
    """The tensors of one file by name, read-only."""

    def __init__(self, path: Path) -> None:
        try:
            self._map = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be mapped ({error}): export the bundle.") from error
        self.path = path
        self._entries = self._header()

    def _header(self) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
        damaged = TrainingError(
            f"{self.path} is not a whole safetensors file of float32 and int8 tensors: copy the "
            f"bundle again, or export anew."
        )
        if self._map.size < 8:
            raise damaged
        size = int(self._map[:8].view(np.uint64)[0])
        if size > min(_MOST_HEADER, self._map.size - 8):
            raise damaged
        try:
            raw = json.loads(self._map[8 : 8 + size].tobytes())
        except ValueError as error:  # neither UTF-8 nor JSON
            raise damaged from error
        entries = {}
        for name, entry in raw.items():
            if name == "__metadata__":
                continue
            dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if dtype is None or end - begin != dtype.itemsize * int(np.prod(shape)):
                raise damaged
            if 8 + size + end > self._map.size:
                raise damaged
            entries[name] = (dtype, shape, 8 + size + begin)
        return entries

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._entries:
            raise TrainingError(
                f"{self.path} has no tensor {name}: it does not belong to this bundle's manifest; "
                f"export the bundle again."
            )
        dtype, shape, begin = self._entries[name]
        size = dtype.itemsize * int(np.prod(shape))
        return self._map[begin : begin + size].view(dtype).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def decode_rows(tensors: Mapping[str, np.ndarray], name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of a stored matrix [1, out, in] as float32 [len(rows), in]; ``rows`` int64.

    Precisions ``fp32`` (part ``value``) and ``int8`` (``q`` and ``scale``), which the token table
    and the head have.
    """
    if f"{name}.value" in tensors:
        return np.asarray(tensors[f"{name}.value"][0][rows])
    q, scale = tensors[f"{name}.q"], tensors[f"{name}.scale"]
    return q[0][rows].astype(np.float32) * scale[0][rows]
