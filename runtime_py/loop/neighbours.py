"""For each bin, which stored set is nearest: what ``kcenter`` needs, kept up to date by change.

Directions are rounded to length ``COARSE`` here, so that a product of two is a whole number below
2^24, exact in float32 whatever the order of summation: the nearest is the same everywhere.
"""

from __future__ import annotations

import numpy as np

from runtime_py.loop.metrics import UNIT

COARSE = 1 << 11  # cosines to about 2e-4
_NONE = np.float32(-np.inf)
_BLOCK = 256  # rows whose products are held at once


def coarse(directions: np.ndarray) -> np.ndarray:
    """int [..., hidden] of length ``UNIT`` to float32 of length ``COARSE``, halves upwards."""
    return np.floor(directions * (COARSE / UNIT) + 0.5).astype(np.float32)


class Neighbours:
    """``closeness`` float32 [bins]: the product with the nearest other set, -inf without one;
    ``nearest`` int64 [bins]: its bin, the lowest of equals."""

    def __init__(self, directions: np.ndarray, filled: np.ndarray) -> None:
        """``directions`` int [bins, hidden], ``filled`` bool [bins]."""
        bins = len(directions)
        self.closeness = np.full(bins, _NONE)
        self.nearest = np.full(bins, -1, np.int64)
        self._filled = filled.copy()
        self._directions = coarse(directions)
        self._search(np.flatnonzero(filled))

    def closest_to(self, direction: np.ndarray) -> float:
        """The largest product of a new set's direction with a stored one's."""
        return float(self._products(coarse(direction)[None])[0].max())

    def put(self, bin: int, direction: np.ndarray) -> None:
        """Fills a free bin."""
        self._directions[bin] = coarse(direction)
        self._filled[bin] = True
        row = self._products(self._directions[bin : bin + 1])[0]  # [bins]
        row[bin] = _NONE
        closer = (row > self.closeness) | ((row == self.closeness) & (bin < self.nearest))
        self.closeness[closer] = row[closer]
        self.nearest[closer] = bin
        self._search(np.array([bin]))

    def clear(self, bin: int) -> None:
        self._filled[bin] = False
        self.closeness[bin], self.nearest[bin] = _NONE, -1
        self._search(np.flatnonzero(self.nearest == bin))

    def _products(self, directions: np.ndarray) -> np.ndarray:
        """float32 [n, bins], -inf in free bins."""
        return np.where(self._filled, directions @ self._directions.T, _NONE)

    def _search(self, bins: np.ndarray) -> None:
        """Finds the nearest of these filled bins anew."""
        for start in range(0, len(bins), _BLOCK):
            block = bins[start : start + _BLOCK]
            products = self._products(self._directions[block])  # [n, bins]
            products[np.arange(len(block)), block] = _NONE
            best = products.argmax(axis=1)
            self.closeness[block] = products[np.arange(len(block)), best]
            self.nearest[block] = np.where(self.closeness[block] > _NONE, best, -1)
