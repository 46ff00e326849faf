"""Writes the base weights of training: one safetensors file, each layer's tensors together.

The safetensors package sorts tensors by dtype and name; here they lie in the order in which
training walks them, and 64 bytes aligned as the header allows, so that a layer is one stretch of
the mapping. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.errors import ExportError
from exporters.model.projection import LoRA
from exporters.model.quantize import QuantizedLinear, QuantizedTable, share
from exporters.model.rounding import Rounded
from exporters.model.transformer import Block, Dense, Table, Transformer, rope_tables
from exporters.training.block import MATRICES
from exporters.training.programs import TrainingSpec
from exporters.training.storage import GROUP, PRECISIONS, StoragePrecision, StoredPart

_DTYPES = {"float32": "F32", "int8": "I8"}
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """Tensors that are computed together and lie one after another in the file."""

    parts: tuple[StoredPart, ...]
    make: Callable[[], Sequence[Tensor]]


def kept_precision(model: Transformer) -> tuple[str, str]:
    """The precisions of blocks and head that keep the very weights that ``model`` has."""
    base = model.blocks[0].qkv.bases[0]
    if isinstance(base, Dense):
        return "fp32", "fp32"
    if base.bits == 8:
        return "int8", "int8"
    sizes = (model.spec.hidden, model.spec.q_dim, model.spec.intermediate)
    # A row of nibbles is two halves of whole groups; other sizes keep the values as float32.
    return ("int4" if all(size % (2 * GROUP) == 0 for size in sizes) else "fp32"), "int8"


def biased_sites(model: Transformer) -> tuple[str, ...]:
    """The sites whose matrices have biases, in any layer."""
    return tuple(
        site
        for site in MATRICES
        if any(
            base.bias is not None for block in model.blocks for base in getattr(block, site).bases
        )
    )


def _values(base: Dense | QuantizedLinear | QuantizedTable) -> Tensor | Rounded:
    """What the matrix stands for: integers with their scales where it has them."""
    if isinstance(base, Dense):
        return base.weight
    return _rounded(base)


def _rounded(base: QuantizedLinear | QuantizedTable) -> Rounded:
    scale = base.scale if base.scale.ndim == 2 else base.scale[:, None]
    offset = getattr(base, "offset", None)
    return Rounded(base.q, scale, None if offset is None else _rounded(offset))


def _given(name: str, tensor: Tensor) -> TensorGroup:
    """A tensor that is small and there already."""
    value = tensor.detach().float().contiguous()
    return TensorGroup((StoredPart(name, tuple(value.shape), "float32"),), lambda: [value])


def _column(name: str, vector: Tensor) -> TensorGroup:
    return _given(name, vector.view(1, -1, 1))


def _matrix(name: str, value: Tensor | Rounded, precision: str) -> TensorGroup:
    rows, columns = value.shape if isinstance(value, Tensor) else value.q.shape
    parts = PRECISIONS[precision].parts(rows, columns)
    named = tuple(StoredPart(f"{name}.{p.name}", p.shape, p.dtype) for p in parts)

    def make() -> list[Tensor]:
        encoded = PRECISIONS[precision].encode(value)
        return [encoded[p.name] for p in parts]

    return TensorGroup(named, make)


def _block(prefix: str, block: Block, spec: TrainingSpec) -> Iterator[TensorGroup]:
    for name, norm in block.norms.items():
        yield _column(f"{prefix}norm.{name}", norm.weight)
    for site, names in MATRICES.items():
        for name, base in zip(names, getattr(block, site).bases, strict=True):
            value = _values(base)
            yield _matrix(f"{prefix}{name}", value, spec.blocks)
            if site in spec.biased:
                rows = (value if isinstance(value, Tensor) else value.q).shape[0]
                bias = base.bias if base.bias is not None else torch.zeros(rows)
                yield _column(f"{prefix}{name}.bias", bias)


def _same(head: Tensor | Rounded, table: Tensor | Rounded) -> bool:
    if isinstance(head, Tensor) or isinstance(table, Tensor):
        return isinstance(head, Tensor) and isinstance(table, Tensor) and torch.equal(head, table)
    return torch.equal(head.q, table.q) and torch.equal(head.scale, table.scale)


def _groups(model: Transformer, spec: TrainingSpec, longest: int) -> tuple[list[TensorGroup], bool]:
    """Every tensor of the file in its order, and whether the token table is the head."""
    groups: list[TensorGroup] = []
    for index, rope in enumerate(model.ropes):
        cos, sin, _ = rope_tables(rope, longest, model.spec.head_dim)  # [longest, 1, n]
        for name, table in (("cos", cos), ("sin", sin)):
            groups.append(_given(f"rope.{index}.{name}", table.permute(1, 2, 0)))  # [1, n, longest]
    head = _values(model.head)
    lookup = model.table.weight if isinstance(model.table, Table) else _values(model.table)
    if not (shared := _same(head, lookup)):
        groups.append(_matrix("table", lookup, spec.head))
    for index, block in enumerate(model.blocks):
        groups += _block(f"layers.{index}.", block, spec)
    groups.append(_column("norm", model.norm.weight))
    groups.append(_matrix("head", head, spec.head))
    return groups, shared


@dataclass(frozen=True)
class WrittenWeights:
    """``table``: the name under which the token table lies."""

    table: str
    bytes: int


def _header(groups: Sequence[TensorGroup]) -> bytes:
    """safetensors' JSON, with spaces up to where the first tensor is aligned."""
    header: dict[str, object] = {}
    begin = 0
    for part in (part for group in groups for part in group.parts):
        end = begin + math.prod(part.shape) * np.dtype(part.dtype).itemsize
        header[part.name] = {
            "dtype": _DTYPES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % _ALIGNMENT)


@torch.no_grad()
def write_weights(
    model: Transformer, spec: TrainingSpec, longest: int, path: Path
) -> WrittenWeights:
    """Writes ``path`` with the weights that ``model`` computes with, in the spec's precisions, and
    rotary tables for ``longest`` tokens."""
    groups, shared = _groups(model, spec, longest)
    text = _header(groups)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            for part, tensor in zip(group.parts, group.make(), strict=True):
                if tuple(tensor.shape) != part.shape:
                    raise ExportError(
                        f"{part.name} is {list(tensor.shape)}, but the header of {path} says "
                        f"{list(part.shape)}: please report it."
                    )
                file.write(tensor.numpy().data)
    return WrittenWeights("head" if shared else "table", path.stat().st_size)


@torch.no_grad()
def as_stored(model: Transformer, spec: TrainingSpec) -> Transformer:
    """The model in float32 with the values that the file's matrices stand for, and an adapter of
    its own."""
    blocks, head = PRECISIONS[spec.blocks], PRECISIONS[spec.head]

    def dense(
        base: Dense | QuantizedLinear | QuantizedTable, precision: StoragePrecision
    ) -> Tensor:
        return precision.decode(precision.encode(_values(base)))[0]

    result = share(model)
    for block in result.blocks:
        for site in MATRICES:
            bases = getattr(block, site).bases
            for index, base in enumerate(bases):
                bases[index] = Dense(dense(base, blocks), base.bias)
        for module in block.modules():
            if isinstance(module, LoRA):
                for name, buffer in list(module.named_buffers()):
                    setattr(module, name, buffer.clone())
    result.head = Dense(dense(model.head, head), None)
    table = model.table
    weight = dense(Dense(table.weight, None) if isinstance(table, Table) else table, head)
    result.table = Table(weight)
    return result
