"""Named tensors in ExecuTorch's ``.ptd`` format (FlatTensor), bound by name at load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
from executorch.exir.scalar_type import ScalarType
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.serialize import (
    FlatTensorHeader,
    FlatTensorSerializer,
    _deserialize_to_flat_tensor,
    _get_extended_header,
)

from runtime_py.loop.errors import AdapterError
from runtime_py.loop.files import write_bytes

ALIGNMENT = 16
_TYPES: dict[np.dtype, ScalarType] = {
    np.dtype(np.float32): ScalarType.FLOAT,
    np.dtype(np.uint8): ScalarType.BYTE,
}
_DTYPES = {kind: dtype for dtype, kind in _TYPES.items()}


def write_ptd(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes float32 and uint8 arrays under their names; the file appears whole or not at all."""
    buffers: list[bytes] = []
    named: dict[str, DataEntry] = {}
    for name, array in tensors.items():
        layout = TensorLayout(_TYPES[array.dtype], list(array.shape), list(range(array.ndim)))
        named[name] = DataEntry(len(buffers), ALIGNMENT, layout)
        buffers.append(np.ascontiguousarray(array).tobytes())
    blob = FlatTensorSerializer().serialize(DataPayload(buffers, named))
    write_bytes(path, bytes(blob))


def _header(path: Path, blob: bytes) -> FlatTensorHeader:
    header = _get_extended_header(blob) if blob[4:6] == b"FT" else None
    if header is None or len(blob) < header.segment_base_offset + header.segment_data_size:
        raise AdapterError(
            f"{path} is not a whole .ptd file: expected FlatTensor data as attune writes it."
        )
    return header


def locate(path: Path) -> dict[str, int]:
    """Where each tensor's data begins in a ``.ptd`` file, in bytes."""
    blob = path.read_bytes()
    header = _header(path, blob)
    end = header.flatbuffer_offset + header.flatbuffer_size
    table = _deserialize_to_flat_tensor(blob[:end])
    return {
        entry.key: header.segment_base_offset + table.segments[entry.segment_index].offset
        for entry in table.named_data
    }


def read_ptd(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.ptd`` file, by name. Raises ``AdapterError`` where it is not one."""
    blob = path.read_bytes()
    _header(path, blob)
    payload = FlatTensorSerializer().deserialize(Cord(blob))
    arrays = {}
    for name, entry in payload.named_data.items():
        layout = entry.tensor_layout
        if layout is None or layout.scalar_type not in _DTYPES:
            raise AdapterError(f"{path}: '{name}' is not a float32 or uint8 tensor.")
        data = bytes(payload.buffers[entry.buffer_index])
        array = np.frombuffer(data, dtype=_DTYPES[layout.scalar_type])
        arrays[name] = array[: int(np.prod(layout.sizes))].reshape(layout.sizes)
    return arrays
