"""The weights that a bundle's training file holds, beside those that its source gives.

The file is read as docs/bundle.md defines it, in NumPy. Where it has the integers that ``lm``
computes with, they are compared one by one; where ``--train-weights`` rounded the source once more,
each value must be the one of its grid that is nearest to the source's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from exporters.model.spec import Rope
from exporters.model.transformer import Transformer
from runtime_py.bundle.manifest import Training
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.loop.errors import TrainingError
from toolchain.verify.parity.stored_matrix import (
    ENDS,
    GridMatrix,
    Matrix,
    matrix_of,
    read_matrix,
    shape_of,
    shapes_of,
    values_of,
)
from toolchain.verify.parity.verdict import Check, FirstDifference, stated

_MOST = 10  # differing tensors that a report lists
_ULP = 2.0**-23  # float32's step at 1
_SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
_MATRICES = {
    "q": "q projection",
    "k": "k projection",
    "v": "v projection",
    "o": "o projection",
    "gate": "gate projection",
    "up": "up projection",
    "down": "down projection",
    "head": "head",
    "table": "token table",
}


@dataclass(frozen=True)
class WeightFault:
    """What is wrong with one ``tensor`` of the file; ``gap``: the largest difference of two
    numbers."""

    tensor: str
    gap: float
    note: str


@dataclass(frozen=True, eq=False)
class _Numbers:
    """A tensor that is no part of a matrix: its exact ``values``, or any within ``allowed``."""

    values: np.ndarray
    allowed: float = 0.0


@dataclass(frozen=True, eq=False)
class _Weights:
    """A matrix, stored in ``precision``."""

    matrix: Matrix
    precision: str


def training_file(
    path: Path, training: Training, model: Transformer
) -> tuple[list[Check], FirstDifference | None]:
    """Every tensor of the weights file ``path`` against the weights of ``model``, the transformer
    that computes as the bundle's ``lm`` does. -> the checks, and the first tensor that is wrong."""
    try:
        weights = BaseWeights(path)
    except TrainingError as error:
        return [stated("weights", training.weights, "file", False, str(error))], None
    faults: list[WeightFault] = []
    known: set[str] = set()
    for name, expected in _expected(model, training):
        if isinstance(expected, _Weights):
            shapes = shapes_of(expected.precision, *shape_of(expected.matrix))
            tensors = {part: f"{name}.{part}" for part in shapes}
        else:
            shapes, tensors = {"": expected.values.shape}, {"": name}
        known.update(tensors.values())
        misshapen = [
            fault
            for part, tensor in tensors.items()
            if (fault := _misshapen(weights, tensor, shapes[part])) is not None
        ]
        parts = {part: weights[tensor] for part, tensor in tensors.items() if not misshapen}
        faults += misshapen or _faults(name, parts, expected)
    faults += [WeightFault(name, 1.0, "is no part of it") for name in weights if name not in known]
    faults = list(dict.fromkeys(faults))  # a table that is the head as well is read twice
    if not faults:
        return [stated("weights", training.weights, f"{len(known)} tensors", True, "")], None
    layer, operator = _place(faults[0].tensor)
    where = "" if layer is None else f"layer {layer}: "
    sentence = f"{where}{operator}, tensor {faults[0].tensor} of {training.weights}, "
    checks = [
        Check(
            "weights", training.weights, fault.tensor, fault.gap, fault.gap, 0.0, "exact", False,
            layer=_place(fault.tensor)[0], note=fault.note,
        )
        for fault in faults[:_MOST]
    ]  # fmt: skip
    return checks, FirstDifference(layer, operator, f"{sentence}{faults[0].note}.")


def _misshapen(weights: BaseWeights, tensor: str, shape: tuple[int, ...]) -> WeightFault | None:
    if tensor not in weights:
        return WeightFault(tensor, 1.0, "is missing")
    if weights[tensor].shape != shape:
        note = f"has the shape {list(weights[tensor].shape)} instead of {list(shape)}"
        return WeightFault(tensor, 1.0, note)
    return None


def _expected(model: Transformer, training: Training) -> Iterator[tuple[str, _Numbers | _Weights]]:
    """What docs/bundle.md says that the file has, in its order, with the model's weights."""
    for index, rope in enumerate(model.ropes):
        for kind, table in _rotary(rope, max(training.lengths)).items():
            yield f"rope.{index}.{kind}", table
    yield training.table, _Weights(matrix_of(model.table), training.head_precision)
    biased = {
        site
        for block in model.blocks
        for site in _SITES
        if any(base.bias is not None for base in getattr(block, site).bases)
    }
    for index, block in enumerate(model.blocks):
        prefix = f"layers.{index}."
        for name, norm in block.norms.items():
            yield f"{prefix}norm.{name}", _column(norm)
        for site, names in _SITES.items():
            for name, base in zip(names, getattr(block, site).bases, strict=True):
                matrix = matrix_of(base)
                yield f"{prefix}{name}", _Weights(matrix, training.precision)
                if site in biased:
                    bias = np.zeros(shape_of(matrix)[0], np.float32)
                    if base.bias is not None:
                        bias = base.bias.numpy()
                    yield f"{prefix}{name}.bias", _Numbers(bias.reshape(1, -1, 1))
    yield "norm", _column(model.norm)
    yield "head", _Weights(matrix_of(model.head), training.head_precision)


def _column(norm: nn.Module) -> _Numbers:
    return _Numbers(norm.get_buffer("weight").numpy().reshape(1, -1, 1))


def _rotary(rope: Rope, length: int) -> dict[str, _Numbers]:
    """cos and sin [1, n, length] of each pair's angle at each position, which is a float32 product:
    a float32 cosine is off by an ulp, its product with the scaling by half of one."""
    positions = np.arange(length, dtype=np.float32)
    angles = np.outer(np.array(rope.inv_freq, np.float32), positions).astype(np.float64)
    allowed = 2 * _ULP * max(1.0, abs(rope.scaling))
    return {
        kind: _Numbers((function(angles) * rope.scaling)[None], allowed)
        for kind, function in (("cos", np.cos), ("sin", np.sin))
    }


def _faults(
    name: str, parts: Mapping[str, np.ndarray], expected: _Numbers | _Weights
) -> list[WeightFault]:
    if isinstance(expected, _Numbers):
        return _differing(name, parts[""], expected.values, expected.allowed)
    stored, source = read_matrix(expected.precision, parts), expected.matrix
    if isinstance(stored, np.ndarray):
        return _differing(f"{name}.value", stored, values_of(source))
    if not isinstance(source, GridMatrix) or not _same_grid(stored, source):
        return _not_nearest(f"{name}.q", stored, values_of(source))
    faults = _differing(f"{name}.q", stored.integers, source.integers)
    faults += _differing(f"{name}.scale", stored.scale, source.scale)
    return faults + _differing(f"{name}.offset", stored.offset, source.offset)


def _same_grid(one: GridMatrix, other: GridMatrix) -> bool:
    if one.bits != other.bits or one.scale.shape != other.scale.shape:
        return False
    return one.bits == 4 or not other.offset.any()  # 8 bits are stored without offsets


def _not_nearest(tensor: str, stored: GridMatrix, source: np.ndarray) -> list[WeightFault]:
    """Of a grid that the source was rounded to: no value may be more than half a step off, but
    beyond the ends of the grid."""
    values, steps = stored.values.astype(np.float64), stored.steps
    gap = source - values
    low, high = ENDS[stored.bits]
    beyond = (stored.integers == low) & (gap < 0) | (stored.integers == high) & (gap > 0)
    # Float32 rounds four times: the quotient and what it is of, the product here and its sum.
    allowed = steps * (0.5 + 2 * _ULP * np.abs(stored.integers)) + _ULP * np.abs(source)
    wrong = ~(np.abs(gap) <= allowed) & ~beyond
    if not wrong.any():
        return []
    note = (
        f"is off the source's weights by more than half a step in {int(wrong.sum())} of "
        f"{wrong.size} numbers, by up to {float(np.abs(gap)[wrong].max()):.3g}"
    )
    return [WeightFault(tensor, float(np.abs(gap).max()), note + _likeness(tensor, values, source))]


def _differing(
    tensor: str, stored: np.ndarray, expected: np.ndarray, allowed: float = 0.0
) -> list[WeightFault]:
    gap = np.abs(stored.astype(np.float64) - expected)
    if (gap <= allowed).all():
        return []
    largest, count = float(gap.max()), int((~(gap <= allowed)).sum())
    note = f"differs from the source's in {count} of {gap.size} numbers, by up to {largest:.3g}"
    return [WeightFault(tensor, largest, note + _likeness(tensor, stored, expected))]


def _likeness(tensor: str, stored: np.ndarray, expected: np.ndarray) -> str:
    """What the difference looks like."""
    note = ""
    if stored.ndim == 2 and stored.shape[0] == stored.shape[1] > 1:
        alike = np.corrcoef([stored.ravel(), expected.ravel(), expected.T.ravel()])[0]
        if alike[2] > 0.9 > alike[1]:
            note += ": it is transposed"
    if np.array_equal(np.sort(stored, axis=None), np.sort(expected, axis=None)):
        note += "; the same numbers in another order"
        if tensor.endswith((".scale", ".offset")):
            note += ", so groups have the scales of others"
    return note


def _place(name: str) -> tuple[int | None, str]:
    """``layers.3.q.scale`` -> layer and operator."""
    layer = None
    parts = name.split(".")
    if parts[0] == "layers":
        layer, parts = int(parts[1]), parts[2:]
    if parts[0] == "rope":
        return None, f"rotary table ({'.'.join(parts[1:])})"
    if parts[0] == "norm":
        return layer, "final norm" if layer is None else f"norm ({'.'.join(parts[1:])})"
    return layer, f"{_MATRICES.get(parts[0], parts[0])} ({'.'.join(parts[1:])})"
