"""What a precision's own rounding does to a model, measured on the inputs at hand.

Where a bound cannot come from the number format alone, it comes from here: from the same run, on
the same machine, with the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporters.coreml.half import for_half
from exporters.model.quantize import QuantizedLinear, share
from exporters.model.transformer import Dense, Transformer

Rows = Callable[[Transformer], np.ndarray]  # logits [rows, vocab] of one case


@dataclass(frozen=True)
class Spread:
    """``largest`` difference as a part of the largest value; ``unlike`` 1 − correlation, of rows
    the largest; ``rms`` of the difference, absolute."""

    largest: float
    unlike: float
    rms: float


def between(measured: np.ndarray, expected: np.ndarray) -> Spread:
    """Of two computations of the same numbers, [rows, n] or [n], in float64."""
    measured, expected = (np.atleast_2d(np.asarray(x, np.float64)) for x in (measured, expected))
    gap = measured - expected
    size = max(float(np.abs(expected).max()), 1e-30)
    a, b = (x - x.mean(-1, keepdims=True) for x in (measured, expected))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        likeness = np.where(norms > 0, (a * b).sum(-1) / norms, 1.0)
    return Spread(
        float(np.abs(gap).max()) / size,
        float((1.0 - likeness).max()),
        float(np.sqrt((gap * gap).mean())),
    )


def largest(spreads: Sequence[Spread]) -> Spread:
    """Each number's largest."""
    return Spread(
        max(s.largest for s in spreads), max(s.unlike for s in spreads), max(s.rms for s in spreads)
    )


def float_activations(model: Transformer) -> Transformer:
    """The same quantized weights, met by float32 activations: what is left between the two is the
    rounding of activations to int8."""
    result = share(model)

    def dense(base: QuantizedLinear | Dense) -> Dense:
        if isinstance(base, Dense):
            return base
        weight = base.integers_as_float()
        if base.offset is not None:
            offsets = base.offset.integers_as_float()
            weight = weight + offsets.repeat_interleave(base.group, 1)
        return Dense(weight, base.bias)

    for block in result.blocks:
        for site in ("qkv", "o", "gate_up", "down"):
            bases = getattr(block, site).bases
            for index, base in enumerate(bases):
                bases[index] = dense(base)
    result.head = dense(model.head)
    return result


def of_scores(measured: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference of the cosines between any two of some embeddings [n, hidden], which
    dissimilarity is made of."""

    def cosines(rows: Sequence[np.ndarray]) -> np.ndarray:
        unit = np.stack([row / max(float(np.linalg.norm(row)), 1e-30) for row in rows])
        return unit.astype(np.float64) @ unit.T.astype(np.float64)

    return float(np.abs(cosines(measured) - cosines(expected)).max()) if measured else 0.0


@torch.no_grad()
def of_float16(model: Transformer, cases: Sequence[Rows]) -> Spread:
    """Float16 against float32 on the module that iOS programs are captured from. Both sides are the
    rewritten module, so that a fault of the rewriting does not excuse itself."""
    single = for_half(model)
    half = for_half(model).half()
    return largest([between(rows(half).astype(np.float32), rows(single)) for rows in cases])


@torch.no_grad()
def of_int8(model: Transformer, cases: Sequence[Rows]) -> Spread:
    """Activations in int8 against float32 ones, with the same weights."""
    plain = float_activations(model)
    return largest([between(rows(plain), rows(model)) for rows in cases])
