"""Whether a fine-tuned adapter may take the place of the one that it started from."""

from __future__ import annotations

import math

from runtime_py.loop.protocols import FineTuneResult


def accepts(result: FineTuneResult) -> bool:
    """The held-out loss did not get worse, and every loss is a number."""
    before, after = result.heldout_loss_before, result.heldout_loss_after
    return all(map(math.isfinite, (before, after, *result.losses))) and after <= before
