"""Whether a fine-tuned adapter may take the place of the one that it started from.

Judged pairwise: each held-out dialogue has a loss before and after, and for most of them it must
have fallen. How many are most follows from the chance that coins would do as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime_py.loop.errors import LoopError
from runtime_py.loop.protocols import FineTuneResult

_ROUNDING = 1 + 2.0**-40  # so that the last bits of a long sum do not decide


@dataclass(frozen=True)
class Verdict:
    """``before``, ``after``: means over the guard's dialogues, None where a loss is no number; the
    rest is then of no dialogue. ``changed`` dialogues have another loss than before, for ``fell``
    it is lower, and ``needed`` must be. ``false_acceptance``: the chance that so many fall where
    each is a coin."""

    accepted: bool
    before: float | None
    after: float | None
    changed: int
    fell: int
    needed: int
    false_acceptance: float

    def data(self) -> dict[str, float | int | None]:
        """As it stands in the log."""
        return {
            "heldout_loss_before": self.before,
            "heldout_loss_after": self.after,
            "changed": self.changed,
            "fell": self.fell,
            "false_acceptance": self.false_acceptance,
        }

    @property
    def reason(self) -> str:
        """A sentence."""
        if self.before is None or self.after is None:
            return "a held-out loss is not a number, so the old adapter stays."
        if not self.changed:
            return "no held-out loss changed: nothing was learned, so the old adapter stays."
        went = f"the held-out loss went from {self.before:.4f} to {self.after:.4f}"
        fell = f"fell in {self.fell} of the {self.changed} sets where it changed"
        if self.accepted:
            return f"{went} and {fell}: the new adapter takes over."
        if self.after > self.before:
            return f"{went}: it got worse, so the old adapter stays."
        if self.fell < self.needed:
            return f"{went} but {fell}, not in {self.needed}: the old adapter stays."
        return f"{went}, but a step's loss is not a number: the old adapter stays."


def tails(n: int) -> list[float]:
    """[n + 1]: the chance of at least k heads among ``n`` coins, for k from 0.

    A row of Pascal's triangle, halved at every step so that nothing overflows, and added up from
    its end: additions of float64 and halvings in a stated order, so that every language has the
    same bits. Exact up to n = 53.
    """
    row = [1.0]
    for _ in range(n):
        row = [(left + right) / 2 for left, right in zip([0.0, *row], [*row, 0.0], strict=True)]
    chances, total = [0.0] * (n + 1), 0.0
    for k in range(n, 0, -1):
        total += row[k]
        chances[k] = total
    chances[0] = 1.0
    return chances


def sign_test(n: int, false_acceptance: float) -> tuple[int, float]:
    """How many of ``n`` losses must have fallen, and the chance that coins do as well.

    The chance is at most ``false_acceptance``, or 2^-n where even n of n are likelier than that.
    """
    chances = tails(n)
    limit = max(false_acceptance, chances[n]) * _ROUNDING
    needed = next(k for k, chance in enumerate(chances) if chance <= limit)
    return needed, chances[needed]


def judge(result: FineTuneResult, false_acceptance: float) -> Verdict:
    """Taken where every loss is a number, one changed, their mean is not above what it was, and the
    losses of enough dialogues fell."""
    before, after = _mean(result.guard_before), _mean(result.guard_after)
    finite = all(map(math.isfinite, result.losses))
    if before is None or after is None:
        return Verdict(False, before, after, 0, 0, *sign_test(0, false_acceptance))
    if len(result.guard_before) != len(result.guard_after):
        raise LoopError(
            f"the fine-tuner gave the losses of {len(result.guard_before)} guard sets before and "
            f"of {len(result.guard_after)} after; expected the same sets. It does not fit the loop."
        )
    pairs = list(zip(result.guard_before, result.guard_after, strict=True))
    changed = sum(new != old for old, new in pairs)
    fell = sum(new < old for old, new in pairs)
    needed, chance = sign_test(changed, false_acceptance)
    accepted = finite and changed > 0 and after <= before and fell >= needed
    return Verdict(accepted, before, after, changed, fell, needed, chance)


def _mean(losses: Sequence[float]) -> float | None:
    """Added up in order; None where there is none, or one that is no number."""
    if not losses or not all(map(math.isfinite, losses)):
        return None
    total = 0.0
    for loss in losses:
        total += loss
    return total / len(losses) if math.isfinite(total) else None
