"""The weights that a bundle's files hold, beside those that its source gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from exporters.training.storage import PRECISIONS
from exporters.training.weights_file import write_weights
from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.loop.errors import TrainingError
from toolchain.verify.parity.models import Models
from toolchain.verify.parity.verdict import Check, Found, stated

_MOST = 10  # differing tensors that a report lists
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


def training_file(
    bundle: Bundle, models: Models, scratch: Path
) -> tuple[list[Check], Found | None]:
    """Every tensor of the weights file against the one that the source gives, byte by byte."""
    fresh = scratch / "weights.safetensors"
    own = bundle.training
    write_weights(models.simulated, models.training_spec, max(own.lengths), fresh)
    checks: list[Check] = []
    found: Found | None = None
    try:
        expected, stored = BaseWeights(fresh), BaseWeights(bundle.training_weights)
        missing = [name for name in expected if name not in stored]
        for name in expected:
            if name in missing:
                note, gap = "is missing", 1.0
            elif stored[name].shape != expected[name].shape:
                note, gap = f"has the shape {list(stored[name].shape)}", 1.0
            elif (stored[name].view(np.uint8) == expected[name].view(np.uint8)).all():
                continue
            else:
                gap, note = _difference(name, stored, expected)
            layer, operator = _place(name)
            where = "" if layer is None else f"layer {layer}: "
            sentence = f"{where}{operator}, tensor {name} of {own.weights}, {note}."
            found = found or Found(layer, operator, sentence)
            if len(checks) == _MOST:
                continue
            checks.append(
                Check(
                    "weights", own.weights, name, gap, gap, 0.0, "exact", False, layer=layer,
                    note=note,
                )
            )  # fmt: skip
    except TrainingError as error:
        return [stated("weights", own.weights, "file", False, str(error))], None
    finally:
        fresh.unlink(missing_ok=True)
    if not checks:
        checks.append(stated("weights", own.weights, f"{len(expected)} tensors", True, ""))
    return checks, found


def _difference(name: str, stored: BaseWeights, expected: BaseWeights) -> tuple[float, str]:
    """How far the numbers are apart, and what that looks like."""
    own, want = stored[name], expected[name]
    differing = int((own != want).sum())
    gap = float(np.abs(own.astype(np.float64) - want.astype(np.float64)).max())
    note = f"differs from the source's in {differing} of {own.size} numbers, by up to {gap:.3g}"
    square = own.ndim == 3 and own.shape[1] == own.shape[2]
    if square and np.array_equal(own, want.transpose(0, 2, 1)):
        note += ": it is transposed"
    if sorted(own.ravel().tolist()) == sorted(want.ravel().tolist()) and differing:
        note += "; the same numbers in another order"
        if name.endswith((".scale", ".offset")):
            note += ", so groups have the scales of others"
    return gap, note


def decoded(weights: BaseWeights, precision: str, name: str) -> np.ndarray:
    """A stored matrix as float32 [1, out, in]."""
    parts = {
        key.removeprefix(f"{name}."): torch.from_numpy(np.array(weights[key]))
        for key in weights
        if key.startswith(f"{name}.") and not key.endswith(".bias")
    }
    return PRECISIONS[precision].decode(parts).numpy()
