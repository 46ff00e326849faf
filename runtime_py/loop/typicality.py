"""How typical of the stream each stored set is, and how unlike the other stored ones.

Directions are of length ``COARSE``, so that a product of two is exact in float32, and sums of
products are whole numbers: what is kept up to date here equals what a new start computes.
"""

from __future__ import annotations

import numpy as np

from runtime_py.loop.neighbours import coarse
from runtime_py.loop.tally import mean_cosines


class Typicality:
    """Products of each bin's direction with the sum of all observed ones and of all stored ones,
    its own included."""

    def __init__(self, directions: np.ndarray, observed: np.ndarray) -> None:
        """``directions`` int [bins, hidden], zero in free bins; ``observed`` int64 [hidden]."""
        self._directions = coarse(directions)
        exact = self._directions.astype(np.int64)
        self._observed, self._stored = observed.copy(), exact.sum(axis=0)
        self._to_observed, self._to_stored = exact @ self._observed, exact @ self._stored
        self._own = (exact * exact).sum(axis=1)

    def see(self, direction: np.ndarray) -> None:
        """A set was observed, kept or not."""
        seen = coarse(direction)
        self._to_observed += self._products(seen)
        self._observed += seen.astype(np.int64)

    def unsee(self, direction: np.ndarray) -> None:
        """An observed set was forgotten."""
        seen = coarse(direction)
        self._to_observed -= self._products(seen)
        self._observed -= seen.astype(np.int64)

    def put(self, bin: int, direction: np.ndarray) -> None:
        """Fills a free bin."""
        new = coarse(direction)
        exact = new.astype(np.int64)
        self._directions[bin] = new
        self._to_stored += self._products(new)
        self._stored += exact
        self._to_observed[bin] = exact @ self._observed
        self._to_stored[bin] = exact @ self._stored
        self._own[bin] = exact @ exact

    def clear(self, bin: int) -> None:
        old = self._directions[bin].copy()
        self._to_stored -= self._products(old)
        self._stored -= old.astype(np.int64)
        self._directions[bin] = 0
        self._to_observed[bin] = self._to_stored[bin] = self._own[bin] = 0

    def values(self, direction: np.ndarray, observed: int) -> tuple[np.ndarray, float]:
        """For a full buffer and a new set, the ``observed``-th: of every bin, float64 [bins], and
        of the new set, the mean cosine with all observed ones, the new one among them, less that
        with the other stored ones."""
        new = coarse(direction)
        exact, bins = new.astype(np.int64), len(self._own)
        everyone = np.append(
            self._to_observed + self._products(new), exact @ (self._observed + exact)
        )
        typical = mean_cosines(everyone, observed)  # [bins + 1], the new set last
        stored = typical[:-1] - mean_cosines(self._to_stored - self._own, bins - 1)
        crowd = mean_cosines(np.array([exact @ self._stored]), bins)
        return stored, float(typical[-1] - crowd[0])

    def _products(self, direction: np.ndarray) -> np.ndarray:
        """int64 [bins], 0 in free bins."""
        return (self._directions @ direction).astype(np.int64)
