"""What a dialogue set is measured by: entropy, domain, dissimilarity, and ROUGE-1 between texts.

EOE, DSS and IDD are those of Qin et al., DAC 2024, section 3.1. Scores lie on a grid of 2^-20 and
cosines are integers, so that no order of summation can turn a comparison.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

UNIT = 1 << 24  # a direction's length in fixed point; products of two fit float64 exactly
GRID = 1 << 20


def on_grid(value: float) -> float:
    """The nearest multiple of 2^-20, halves upwards."""
    return math.floor(value * GRID + 0.5) / GRID


def on_the_grid(values: np.ndarray) -> np.ndarray:
    """``on_grid`` of each, float64."""
    return np.floor(values * GRID + 0.5) / GRID


def entropy_of_norms(norms: np.ndarray) -> float:
    """EOE of a dialogue from its tokens' norms [n]: −Σ p ln p / ln n with p = norm / Σ norms."""
    n = len(norms)
    total = float(np.sum(norms, dtype=np.float64))
    if n <= 1 or total == 0:
        return 0.0
    p = np.asarray(norms, np.float64) / total
    p = p[p > 0]  # x ln x goes to 0 with x
    return float(-np.sum(p * np.log(p)) / math.log(n))


def domain_specific_score(hits: Sequence[int], words: int) -> float:
    """DSS: the share of a text's words that a lexicon has, averaged over the lexicons."""
    if words == 0 or not hits:
        return 0.0
    return on_grid(sum(hits) / (len(hits) * words))


def dominant_domain(hits: Sequence[int]) -> int:
    """The lexicon with most hits, the first of equals; ``len(hits)`` (``other``) without a hit."""
    best = max(hits, default=0)
    return list(hits).index(best) if best else len(hits)


def direction(vector: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """A vector [hidden], less ``mean`` where there is one, scaled to length ``UNIT`` and rounded to
    integers, int64 [hidden]."""
    wide = vector.astype(np.float64)
    if mean is not None:
        wide = wide - mean.astype(np.float64)
    norm = math.sqrt(float(np.sum(wide * wide)))
    if norm == 0:
        return np.zeros(len(vector), np.int64)
    return np.floor(wide / norm * UNIT + 0.5).astype(np.int64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of two directions; 0 where one has no length."""
    return int(a @ b) / (UNIT * UNIT)


def in_domain_dissimilarity(heading: np.ndarray, total: np.ndarray, count: int) -> float:
    """IDD: the mean of 1 − cos between a direction and ``count`` others, whose sum is ``total``;
    both int64 [hidden].

    int64 is wide enough for 2^14 of them: |heading · total| ≤ |heading| |total| ≤ UNIT² · count.
    """
    if count == 0:
        return 1.0
    return on_grid(1 - int(heading @ total) / (count * UNIT * UNIT))


def rouge1(reference: Sequence[str], candidate: Sequence[str]) -> float:
    """ROUGE-1 F1 of two lists of words (Lin, 2004): 2 · shared / (length + length)."""
    both = len(reference) + len(candidate)
    shared = sum((Counter(reference) & Counter(candidate)).values())
    return 2 * shared / both if both else 0.0
