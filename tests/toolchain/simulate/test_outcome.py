"""What the outcome of a simulated life reads from the loop's log of fine-tunings."""

from __future__ import annotations

from typing import Any

import pytest

from runtime_py.loop.log import LogLine
from toolchain.simulate.outcome_reader import _tunings

LOSSES = {"heldout_loss_before": 2.0, "heldout_loss_after": 1.5}


def line(seq: int, event: str, **data: Any) -> LogLine:
    return LogLine(seq, float(seq), 0, event, None, data)


def test_what_a_fine_tuning_forgot() -> None:
    """Measured and scaled, not measured, and of a log that knew neither."""
    log = [
        line(1, "kept", number=7),
        line(2, "adapter_accepted", job=1, adapter=1, scale=0.75, perplexity=20.4,
             base_perplexity=20.0, **LOSSES),
        line(3, "adapter_rejected", job=2, adapter=None, scale=1.0, perplexity=None,
             base_perplexity=None, **LOSSES),
        line(4, "adapter_accepted", job=3, adapter=2, **LOSSES),
    ]  # fmt: skip
    first, second, old = _tunings(log, [])
    assert (first.place, first.accepted, first.scale) == (7, True, 0.75)
    assert first.forgetting == pytest.approx(0.02)
    assert (second.accepted, second.scale, second.forgetting) == (False, 1.0, None)
    assert (old.accepted, old.scale, old.forgetting) == (True, 1.0, None)
