"""Whether a fine-tuned adapter may take the place of the one that it started from.

Judged pairwise: each held-out dialogue has a loss before and after, and the falls must outweigh the
rises. By how much follows from the chance that coins would do as well: Wilcoxon's signed-rank test
(1945), exact, with the ranks that are there.
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
    rest is then of no dialogue. ``changed`` dialogues have another loss than before, and for
    ``fell`` it is lower. Of the ranks of the changes by size, ``rank_sum`` is those of the falls,
    and ``needed`` is what it must be. ``false_acceptance``: the chance that it is so much where
    each change is a coin."""

    accepted: bool
    before: float | None
    after: float | None
    changed: int
    fell: int
    rank_sum: float
    needed: float
    false_acceptance: float

    def data(self) -> dict[str, float | int | None]:
        """As it stands in the log."""
        return {
            "heldout_loss_before": self.before,
            "heldout_loss_after": self.after,
            "changed": self.changed,
            "fell": self.fell,
            "rank_sum": self.rank_sum,
            "needed": self.needed,
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
        if self.rank_sum < self.needed:
            whole = self.changed * (self.changed + 1) / 2
            return (
                f"{went} but {fell}, and these falls have {self.rank_sum:g} of the {whole:g} ranks "
                f"by size, not {self.needed:g}: chance may do as well, and the old adapter stays."
            )
        return f"{went}, but a step's loss is not a number: the old adapter stays."


def doubled_ranks(sizes: Sequence[float]) -> list[int]:
    """Of each size 2 · its rank from 1, the least first; equal ones share the mean of theirs."""
    return [sum(2 * int(b < a) + int(b == a) for b in sizes) + 1 for a in sizes]


def tails(ranks: Sequence[int]) -> list[float]:
    """[sum + 1]: the chance that those of ``ranks`` whose coin shows heads add up to at least s,
    for s from 0.

    Each coin halves what was there and adds it to itself, moved by its rank; the least rank comes
    first, and at last the row is added up from its end: additions of float64 and halvings in a
    stated order, so that every language has the same bits. Exact up to 53 ranks.
    """
    row = [1.0]
    for rank in sorted(ranks):
        still, moved = [*row, *[0.0] * rank], [*[0.0] * rank, *row]
        row = [(one + other) / 2 for one, other in zip(still, moved, strict=True)]
    chances, total = [0.0] * len(row), 0.0
    for place in range(len(row) - 1, 0, -1):
        total += row[place]
        chances[place] = total
    chances[0] = 1.0
    return chances


def signed_rank_test(ranks: Sequence[int], false_acceptance: float) -> tuple[int, float]:
    """What the ranks of the falls must add up to at least, a sum that they can have, and the chance
    that coins do as well.

    The chance is at most ``false_acceptance``, or 2^-n where even n of n are likelier than that.
    """
    chances = tails(ranks)
    limit = max(false_acceptance, chances[-1]) * _ROUNDING
    sums = 1  # the bit of each sum that ranks can have
    for rank in ranks:
        sums |= sums << rank
    needed = next(
        total for total, chance in enumerate(chances) if chance <= limit and sums >> total & 1
    )
    return needed, chances[needed]


def judge(result: FineTuneResult, false_acceptance: float) -> Verdict:
    """Taken where every loss is a number, one changed, their mean is not above what it was, and the
    falls weigh enough."""
    before, after = _mean(result.guard_before), _mean(result.guard_after)
    finite = all(map(math.isfinite, result.losses))
    if before is None or after is None:
        return Verdict(False, before, after, 0, 0, 0.0, 0.0, 1.0)
    if len(result.guard_before) != len(result.guard_after):
        raise LoopError(
            f"the fine-tuner gave the losses of {len(result.guard_before)} guard sets before and "
            f"of {len(result.guard_after)} after; expected the same sets. It does not fit the loop."
        )
    pairs = zip(result.guard_before, result.guard_after, strict=True)
    falls = [old - new for old, new in pairs if old != new]
    ranks = doubled_ranks([abs(fall) for fall in falls])
    weight = sum(rank for rank, fall in zip(ranks, falls, strict=True) if fall > 0)
    needed, chance = signed_rank_test(ranks, false_acceptance)
    accepted = finite and bool(falls) and after <= before and weight >= needed
    fell = sum(fall > 0 for fall in falls)
    return Verdict(accepted, before, after, len(falls), fell, weight / 2, needed / 2, chance)


def _mean(losses: Sequence[float]) -> float | None:
    """Added up in order; None where there is none, or one that is no number."""
    if not losses or not all(map(math.isfinite, losses)):
        return None
    total = 0.0
    for loss in losses:
        total += loss
    return total / len(losses) if math.isfinite(total) else None
