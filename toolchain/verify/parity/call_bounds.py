"""What one call of a training program may be off by, and what that is a part of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from exporters.model.spec import ModelSpec
from toolchain.compile.tolerances import (
    TABLE,
    Tolerance,
    of_block,
    of_block_gradient,
    of_head_loss,
    of_optimizer,
)
from toolchain.verify.parity.recording import Recorded


def bound_of(
    call: Recorded, output: str, before: Mapping[str, np.ndarray], step: float, spec: ModelSpec
) -> Tolerance:
    """``before``: the call's inputs; ``step``: of ``adamw``, how far the largest number moves."""
    if call.name == "adamw":
        parameters = before["parameters"]
        return of_optimizer(parameters.size, float(np.abs(parameters).max()), step)
    tokens = before["x"].shape[2]
    if call.name.startswith("block_forward"):
        return of_block(spec, tokens)
    if output == "loss":
        return of_head_loss(spec)
    return TABLE["exact"] if output == "count" else of_block_gradient(spec, tokens)


def magnitude_of(before: Mapping[str, np.ndarray], loss: float) -> float:
    """What the head's loss is a difference of: Σ |h w| over the features of each label's logit."""
    x, norm = (before[name][0].astype(np.float64) for name in ("x", "base.norm"))  # [F, P], [F, 1]
    hidden = x / np.sqrt((x * x).mean(0) + 1e-12) * norm
    each = np.abs(hidden.T * before["targets"][0]).sum(1)  # [P]
    return float((each * before["real"][0, :, 0]).sum()) + abs(loss)


def pull_of(before: Mapping[str, np.ndarray], largest: float) -> float:
    """The head's gradient is a difference of rows of the head, seen through the norm: the size of
    the target's row there, or ``largest``, the gradient's own, where that is more."""
    x, norm = before["x"][0], before["base.norm"][0, :, 0]  # [F, P], [F]
    rows = np.abs(before["targets"][0] * norm).max(1) * before["real"][0, :, 0]  # [P]
    return max(largest, float((rows / np.sqrt((x * x).mean(0) + 1e-12)).max()))
