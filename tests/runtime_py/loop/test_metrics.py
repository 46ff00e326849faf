"""Metrics against SciPy, rouge-score and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.loop import metrics
from runtime_py.loop.lexicons import make_lexicons
from runtime_py.loop.words import words

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="no rouge-score")
stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
distance = pytest.importorskip("scipy.spatial.distance", reason="SciPy is not installed")

vectors = st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8).map(
    lambda values: np.array(values, np.float32)
)
real = vectors.filter(lambda v: np.linalg.norm(v) > 1e-3)
HALF_GRID = 2.0**-21  # a score is rounded to 2^-20


def sums(terms: int) -> float:
    """What float64 may do to a sum of so many terms, as a part of their magnitudes: 8 √n 2⁻⁵³."""
    return 8.0 * math.sqrt(terms) * 2.0**-53


def turned(hidden: int) -> float:
    """How far the cosine of two directions may be from their vectors': each of the components of
    either is rounded by half a unit at most, which turns it by √hidden / 2 units at most."""
    return math.sqrt(hidden) / metrics.UNIT


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=60))
def test_entropy_of_norms_is_scipys(norms: list[float]) -> None:
    n = len(norms)
    expected = stats.entropy(norms) / math.log(n)
    # An error of a share p changes −Σ p ln p by at most itself times |ln p| + 1.
    bound = sums(2 * n) * (1 + 1 / math.log(n))
    assert metrics.entropy_of_norms(np.array(norms)) == pytest.approx(expected, abs=bound, rel=0)


def test_entropy_at_its_ends() -> None:
    assert metrics.entropy_of_norms(np.array([])) == 0
    assert metrics.entropy_of_norms(np.array([3.0])) == 0
    assert metrics.entropy_of_norms(np.zeros(4)) == 0
    assert metrics.entropy_of_norms(np.array([1.0, 0.0, 0.0])) == 0
    assert metrics.entropy_of_norms(np.ones(9, np.float32)) == pytest.approx(1, abs=sums(9), rel=0)


@given(real, real)
def test_cosine_is_scipys(a: np.ndarray, b: np.ndarray) -> None:
    ours = metrics.cosine(metrics.direction(a), metrics.direction(b))
    expected = 1 - distance.cosine(a.astype(np.float64), b.astype(np.float64))
    assert ours == pytest.approx(expected, abs=turned(8) + sums(8), rel=0)


@given(real, st.lists(real, min_size=1, max_size=20))
def test_idd_is_the_mean_distance(own: np.ndarray, others: list[np.ndarray]) -> None:
    total = np.sum([metrics.direction(v) for v in others], axis=0)
    ours = metrics.in_domain_dissimilarity(metrics.direction(own), total, len(others))
    wide = [v.astype(np.float64) for v in others]
    expected = np.mean([distance.cosine(own.astype(np.float64), v) for v in wide])
    bound = turned(8) + HALF_GRID + sums(8 + len(others))
    assert ours == pytest.approx(expected, abs=bound, rel=0)


def test_idd_at_its_ends() -> None:
    zero = metrics.direction(np.zeros(3, np.float32))
    assert metrics.in_domain_dissimilarity(zero, zero, 0) == 1
    assert metrics.in_domain_dissimilarity(zero, zero, 1) == 1  # no direction, no likeness
    assert not zero.any()


def test_the_widest_sum_of_directions_fits() -> None:
    one = metrics.direction(np.ones(576, np.float32))
    most = 1 << 14
    assert abs(metrics.in_domain_dissimilarity(one, one * most, most)) <= turned(576) + HALF_GRID


def test_domain_specific_score_by_hand() -> None:
    lexicons = make_lexicons(
        {"travel": ["train", "train station", "hotel"], "food": ["bread", "olive oil"]}
    )
    text = words("The train station, the train: olive bread with olive oil and oil.")
    hits = lexicons.hits(text)
    assert hits == [3, 3]  # train station train; bread olive oil
    assert metrics.domain_specific_score(hits, len(text)) == 3 / 12  # which is on the grid
    assert metrics.dominant_domain(hits) == 0  # of equals, the first
    assert metrics.dominant_domain([0, 0]) == 2
    assert metrics.domain_specific_score([0, 0], 0) == 0


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(50, 300), st.integers(1, 9)
)
def test_equal_shares_are_equal_scores(hits: list[int], n: int, times: int) -> None:
    more = [h * times for h in hits]
    ours = metrics.domain_specific_score(hits, n)
    assert ours == metrics.domain_specific_score(more, n * times)


@given(st.floats(-2, 2))
def test_grid(value: float) -> None:
    rounded = metrics.on_grid(value)
    assert abs(rounded - value) <= 2**-21
    assert (rounded * 2**20).is_integer()


WORDS = "the cat sat on a mat 12 x9 dog"
plain = st.lists(st.sampled_from(WORDS.split()), max_size=15)


@given(plain, plain)
def test_rouge1_is_rouge_scores(reference: list[str], candidate: list[str]) -> None:
    """On lower-case ASCII without apostrophes, where the two have the same words."""
    expected = rouge_scorer.RougeScorer(["rouge1"]).score(" ".join(reference), " ".join(candidate))
    ours = metrics.rouge1(words(" ".join(reference)), words(" ".join(candidate)))
    assert ours == pytest.approx(expected["rouge1"].fmeasure, abs=sums(6), rel=0)


def test_rouge1_by_hand() -> None:
    assert metrics.rouge1(["a", "a", "b"], ["a", "c"]) == 2 / 5
    assert metrics.rouge1([], []) == 0
    assert metrics.rouge1(["a"], []) == 0
