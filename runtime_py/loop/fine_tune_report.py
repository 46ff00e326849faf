"""What became of a call to fine-tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["not_due", "too_few", "postponed", "stopped", "rejected", "accepted"]


@dataclass(frozen=True)
class FineTuneReport:
    """``reason`` is a sentence. ``synthesized``: pairs that this call wrote. ``adapter``: the
    active version afterwards. ``left_out``: ids of answered sets and pairs that are too long, for
    the job or for a job to begin. The rest is None or empty where no run ended: losses are nats a
    label, of held-out sets the mean (None: not a number); ``losses`` are one a step, of which the
    state after ``kept_step`` is judged; ``false_acceptance`` is the chance that the guard takes an
    adapter where each of the ``changed`` sets is a coin; ``scale`` is what every B was multiplied
    by to keep the bound on ``forgetting``, the part that the adapter adds to the general text's
    perplexity (None: not measured)."""

    state: State
    reason: str
    adapter: int
    synthesized: int = 0
    job: int | None = None
    left_out: tuple[str, ...] = ()
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None
    losses: tuple[float, ...] = ()
    kept_step: int | None = None
    scale: float | None = None
    forgetting: float | None = None
    changed: int | None = None
    false_acceptance: float | None = None
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """That were trained."""
        return len(self.losses)
