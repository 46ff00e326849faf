"""The tolerances that golden vectors carry: as parity computes its own, on the golden cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporters.model.transformer import Transformer
from toolchain.compile.spread import between, float_activations, largest
from toolchain.compile.spread import of_float16 as measured_float16
from toolchain.compile.tolerances import (
    INT8_ABOVE,
    Tolerance,
    of_float16,
    of_int8,
    of_model,
)

Tokens = Sequence[int]


@dataclass(frozen=True, eq=False)
class Reading:
    """How a model is read: ``logits`` [n, vocab]; ``embedding``: pooled [hidden], entropy."""

    logits: Callable[[Transformer, Tokens], np.ndarray]
    embedding: Callable[[Transformer, Tokens], tuple[np.ndarray, float]]


def tolerances(
    target: str, model: Transformer, read: Reading, cases: Sequence[Tokens]
) -> dict[str, dict]:
    """Of ``logits``, ``pooled`` and ``entropy``; ``model`` with the weights of the target's
    programs."""
    plain = of_model(model.spec, max(map(len, cases)))
    if target == "ios":
        rows = [lambda one, t=t: read.logits(one, t) for t in cases]
        logits = pooled = entropy = of_float16(measured_float16(model, rows))
    elif model.is_float:
        logits = pooled = entropy = plain
    else:
        other = float_activations(model)
        pairs = [(read.logits(other, t), read.logits(model, t)) for t in cases]
        logits = of_int8(largest([between(*pair) for pair in pairs]))
        vectors = [(read.embedding(other, t), read.embedding(model, t)) for t in cases]
        pooled = of_int8(largest([between(a[0], b[0]) for a, b in vectors]), pooled=True)
        gap = max(abs(a[1] - b[1]) for a, b in vectors)
        entropy = replace(plain, max_rel=(plain.max_rel or 0.0) + INT8_ABOVE * gap)
    tolerances = {"logits": logits, "pooled": pooled, "entropy": entropy}
    return {name: bound(tolerance) for name, tolerance in tolerances.items()}


def bound(tolerance: Tolerance) -> dict:
    return {"most": tolerance.max_rel, "least": tolerance.likeness}
