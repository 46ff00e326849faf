"""Paired differences with intervals, over dialogues and orderings at once.

Two rows of a study are measured on the same test dialogues after the same orderings of the stream,
so they are compared pair by pair. Both the dialogues and the orderings are samples of what could
have been, and the bootstrap draws both anew, independently, with each pair's weight the product of
its dialogue's and its ordering's counts (the pigeonhole bootstrap: A. B. Owen, "The pigeonhole
bootstrap", Annals of Applied Statistics 1(2), 2007). It holds for crossed samples, where each
ordering has the same dialogues, and for nested ones, where each has its own. Of n orderings n − 1
are drawn, which makes the bootstrap's variance of a mean unbiased (J. N. K. Rao and C. F. J. Wu,
"Resampling inference with complex survey data", JASA 83(401), 1988); five orderings would otherwise
lose a fifth of it. Intervals are percentile intervals; with few orderings that differ much they
are still too narrow, by up to Student's factor.

Several comparisons are corrected by S. Holm, "A simple sequentially rejective multiple test
procedure", Scandinavian Journal of Statistics 6(2), 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST_ORDERINGS = 5  # fewer are shown as points
_SEED = 2024

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """Two rows' measure on the same dialogues and orderings: float64 [orderings, dialogues] each.

    A row's value is the sum of ``row`` (or ``against``) over the sum of ``unit``: 1 a dialogue for
    a mean over dialogues, its labels for a loss a label. Where an ordering has not the dialogue
    among its tests, all three are 0.
    """

    row: Floats
    against: Floats
    unit: Floats


@dataclass(frozen=True)
class Interval:
    """``LEVEL`` of the resamples lie between."""

    low: float
    high: float


@dataclass(frozen=True)
class Contrast:
    """``difference``: row − against; ``relative``: row ÷ against − 1, a ratio of means;
    ``points`` and ``relative_points``: the same in each ordering; ``p``: two-sided. Intervals and p
    are None with fewer orderings than asked for, what is relative where ``against`` is
    0."""

    row: float
    against: float
    difference: float
    relative: float | None
    points: tuple[float, ...]
    relative_points: tuple[float, ...] | None
    interval: Interval | None
    relative_interval: Interval | None
    p: float | None
    dialogues: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval.low <= 0.0 <= self.interval.high


def compare(
    pairs: Sequence[Paired], resamples: int = RESAMPLES, fewest: int = FEWEST_ORDERINGS
) -> Contrast:
    """One contrast. Several ``pairs`` are independent streams, each counts alike: the row's value
    is the mean of theirs. Orderings and dialogues of each are drawn for themselves.

    The points are the mean over the streams of each one's difference in its n-th ordering; there
    are as many as the stream with the fewest orderings has. ``fewest``: orderings that intervals
    are made of; with 1, and one ordering, they are over dialogues alone.
    """
    row, against = (float(np.mean([_value(pair, name) for pair in pairs])) for name in _SIDES)
    orderings = min(pair.unit.shape[0] for pair in pairs)
    rows, others = (
        [
            float(np.mean([_value(pair, name, slice(at, at + 1)) for pair in pairs]))
            for at in range(orderings)
        ]
        for name in _SIDES
    )
    sides = list(zip(rows, others, strict=True))
    interval = relative_interval = p = None
    if orderings >= fewest:
        each = [_resampled(pair, resamples, index) for index, pair in enumerate(pairs)]
        drawn = np.mean(each, axis=0)  # [2, resamples]
        drawn = drawn[:, np.isfinite(drawn).all(axis=0)]
        differences = drawn[0] - drawn[1]
        interval, p = percentile_interval(differences), two_sided_p(differences)
        if against and np.all(drawn[1] != 0.0):
            relative_interval = percentile_interval(drawn[0] / drawn[1] - 1.0)
    return Contrast(
        row=row,
        against=against,
        difference=row - against,
        relative=row / against - 1.0 if against else None,
        points=tuple(own - other for own, other in sides),
        relative_points=(tuple(own / other - 1.0 for own, other in sides) if all(others) else None),
        interval=interval,
        relative_interval=relative_interval,
        p=p,
        dialogues=sum(int(np.any(pair.unit > 0, axis=0).sum()) for pair in pairs),
    )


_SIDES = ("row", "against")


def _value(pair: Paired, name: str, orderings: slice = slice(None)) -> float:
    return float(getattr(pair, name)[orderings].sum() / pair.unit[orderings].sum())


def _resampled(pair: Paired, resamples: int, stream: int) -> Floats:
    """Both sides' values in each resample: [2, resamples], NaN where it drew no dialogue at all
    (of nested samples that are very small). Contrasts of one stream meet the same draws, so that
    they move together; those of another ``stream`` of one contrast meet others."""
    orderings, dialogues = pair.unit.shape
    of_orderings, of_dialogues = _draws(orderings, dialogues, resamples, stream)
    unit, row, against = (
        np.einsum("bo,bo->b", of_orderings, of_dialogues @ side.T)
        for side in (pair.unit, pair.row, pair.against)
    )
    unit = np.where(unit > 0.0, unit, np.nan)
    return np.stack([row / unit, against / unit])


@lru_cache(maxsize=2)  # a study asks for the same ones many times; 80 MB for 1,000 dialogues
def _draws(orderings: int, dialogues: int, resamples: int, stream: int) -> tuple[Floats, Floats]:
    """How often each is drawn: [resamples, orderings] and [resamples, dialogues]."""
    random = np.random.default_rng([_SEED, stream])
    return (
        _counts(random, max(orderings - 1, 1), orderings, resamples),
        _counts(random, dialogues, dialogues, resamples),
    )


def _counts(random: np.random.Generator, draws: int, among: int, resamples: int) -> Floats:
    """[resamples, among]: in each line, ``draws`` with replacement."""
    drawn = random.integers(0, among, (resamples, draws)) + among * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * among)
    return counts.reshape(resamples, among).astype(np.float64)


def percentile_interval(values: Floats) -> Interval:
    """The middle ``LEVEL`` of ``values`` [resamples]."""
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return Interval(float(low), float(high))


def two_sided_p(differences: Floats) -> float:
    """The smallest level whose percentile interval leaves zero out; never below 2 / (n + 1), which
    n resamples cannot tell from zero (Davison and Hinkley, "Bootstrap Methods and their
    Application", 1997, section 4.2: one is added to both counts)."""
    below = int((differences <= 0.0).sum()) + 1
    above = int((differences >= 0.0).sum()) + 1
    return min(1.0, 2.0 * min(below, above) / (len(differences) + 1))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order of ``values``: of m, the k-th smallest
    counts m − k + 1 times, none less than the one before it, none more than 1."""
    corrected = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected
