"""How many sets a domain had, and the sum of their directions: what means over all are made of."""

from __future__ import annotations

import numpy as np

from runtime_py.loop.metrics import on_the_grid
from runtime_py.loop.neighbours import COARSE, coarse


class Tally:
    """``counts`` int64 [domains]; ``sums`` int64 [domains, hidden], of directions of length
    ``COARSE``.

    int64 is wide enough for 2^40 sets: a product with a sum of n directions is at most
    COARSE² · n, and what rounding adds to the length of a direction is less than it.
    """

    def __init__(self, domains: int, hidden: int) -> None:
        self.counts = np.zeros(domains, np.int64)
        self.sums = np.zeros((domains, hidden), np.int64)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def total(self) -> np.ndarray:
        """int64 [hidden]"""
        return self.sums.sum(axis=0)

    def clear(self) -> None:
        self.counts[:], self.sums[:] = 0, 0

    def add(self, domain: int, direction: np.ndarray) -> None:
        """``direction``: int [hidden] of length ``UNIT``."""
        self.counts[domain] += 1
        self.sums[domain] += coarse(direction).astype(np.int64)

    def remove(self, domain: int, direction: np.ndarray) -> None:
        self.counts[domain] -= 1
        self.sums[domain] -= coarse(direction).astype(np.int64)


def mean_cosines(products: np.ndarray, count: int) -> np.ndarray:
    """The mean cosine of each of n directions with ``count`` others, from its product with their
    sum: ``products`` int64 [n], of directions of length ``COARSE``; float64 [n] on the grid, 0
    without others."""
    if count == 0:
        return np.zeros(len(products))
    return on_the_grid(products.astype(np.float64) / float(count * COARSE * COARSE))
