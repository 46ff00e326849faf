"""Intervals against closed forms, SciPy and known effects; Holm by hand and by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from toolchain.report.statistics import (
    Paired,
    _draws,
    _resampled,
    compare,
    holm,
    percentile_interval,
    two_sided_p,
)


def pair(difference: np.ndarray, against: float = 2.0) -> Paired:
    """Of differences [orderings, dialogues]."""
    other = np.full_like(difference, against)
    return Paired(other + difference, other, np.ones_like(difference))


def test_a_constant_difference_has_no_width() -> None:
    contrast = compare([pair(np.full((5, 40), -0.25))])
    assert contrast.difference == pytest.approx(-0.25)
    assert contrast.relative == pytest.approx(-0.125)
    assert contrast.points == pytest.approx([-0.25] * 5)
    assert contrast.interval is not None
    assert (contrast.interval.low, contrast.interval.high) == pytest.approx((-0.25, -0.25))
    assert contrast.p == pytest.approx(2 / 10_001)
    assert contrast.dialogues == 40
    assert contrast.clear


def test_few_orderings_are_points() -> None:
    contrast = compare([pair(np.array([[0.1, 0.3], [0.2, 0.2], [-0.1, 0.1]]))])
    assert contrast.points == pytest.approx([0.2, 0.2, 0.0])
    assert contrast.relative_points == pytest.approx([0.1, 0.1, 0.0])
    assert (contrast.interval, contrast.relative_interval, contrast.p) == (None, None, None)
    assert not contrast.clear


def test_the_variance_of_a_sum_of_effects_has_a_closed_form() -> None:
    """x = a_o + b_d: the orderings' part is their unbiased variance over their number, since one
    less is drawn; the dialogues' part is the ordinary bootstrap's."""
    random = np.random.default_rng(3)
    a, b = random.normal(0, 1, 6), random.normal(0, 1, 50)
    drawn = _resampled(pair(a[:, None] + b[None, :]), 60_000, 0)
    expected = a.var(ddof=1) / 6 + b.var() / 50
    assert (drawn[0] - drawn[1]).var() == pytest.approx(expected, rel=0.02)


def test_identical_orderings_leave_the_ordinary_bootstrap() -> None:
    differences = np.random.default_rng(4).normal(0.1, 0.5, 120)
    contrast = compare([pair(np.tile(differences, (5, 1)))], 20_000)
    expected = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    assert contrast.interval is not None
    assert (contrast.interval.low, contrast.interval.high) == pytest.approx(
        (expected.low, expected.high), abs=0.004
    )


def test_nested_dialogues_count_in_their_own_ordering_alone() -> None:
    """Five orderings with forty dialogues of their own: between orderings nothing varies, so the
    interval is that of 200 dialogues, or somewhat wider (Owen, 2007, section 4)."""
    unit = np.kron(np.eye(5), np.ones(40))
    noise = np.random.default_rng(5).normal(0, 1, unit.shape) * unit
    contrast = compare([Paired(2 * unit + noise, 2 * unit, unit)])
    values = noise[unit > 0]
    assert contrast.difference == pytest.approx(values.mean())
    assert contrast.dialogues == 200
    assert contrast.interval is not None
    width = (contrast.interval.high - contrast.interval.low) / 2
    alone = 1.96 * values.std() / np.sqrt(200)
    assert alone < width < 2 * alone


def test_the_interval_holds_a_known_effect_about_as_often_as_it_says() -> None:
    """Effects of dialogues, of orderings and of both, as a study has them; the truth is 0.3."""
    random = np.random.default_rng(6)
    held = 0
    for _ in range(200):
        effects = random.normal(0, 0.5, (1, 60)) + random.normal(0, 0.03, (5, 1))
        contrast = compare([pair(0.3 + effects + random.normal(0, 0.2, (5, 60)))], 400)
        assert contrast.interval is not None
        held += contrast.interval.low <= 0.3 <= contrast.interval.high
    assert 0.90 <= held / 200 <= 0.99


def test_no_effect_is_found_about_as_seldom_as_p_says() -> None:
    random = np.random.default_rng(7)
    values = []
    for _ in range(200):
        noise = random.normal(0, 0.5, (1, 60)) + random.normal(0, 0.2, (5, 60))
        values.append(compare([pair(noise)], 400).p)
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.10


def test_a_loss_is_all_nats_over_all_labels() -> None:
    labels = np.array([[1.0, 3.0]])
    contrast = compare([Paired(np.array([[2.0, 3.0]]), np.array([[4.0, 6.0]]), labels)])
    assert contrast.row == pytest.approx(5 / 4)
    assert contrast.against == pytest.approx(10 / 4)
    assert contrast.relative == pytest.approx(-0.5)


def test_streams_of_one_contrast_count_alike_and_are_drawn_apart() -> None:
    random = np.random.default_rng(8)
    one, other = random.normal(0.2, 1, (5, 80)), random.normal(0.4, 1, (5, 80))
    both = compare([pair(one), pair(other)])
    alone = compare([pair(one)])
    assert both.difference == pytest.approx((one.mean() + other.mean()) / 2)
    assert both.interval is not None
    assert alone.interval is not None
    narrower = (both.interval.high - both.interval.low) / (alone.interval.high - alone.interval.low)
    assert narrower == pytest.approx(np.sqrt(0.5), abs=0.1)
    assert not np.array_equal(_draws(5, 80, 100, 0)[1], _draws(5, 80, 100, 1)[1])


@given(st.floats(-0.5, 0.5), st.integers(0, 1000))
def test_p_is_below_five_percent_where_the_interval_leaves_zero_out(
    shift: float, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(shift, 0.15, 2000)
    interval = percentile_interval(values)
    outside = not interval.low <= 0.0 <= interval.high
    p = two_sided_p(values)
    assert outside is (p < 0.05) or p == pytest.approx(0.05, abs=0.004)


def test_holm_by_hand() -> None:
    """Of four: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1 raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_holm_rejects_what_its_definition_rejects(values: list[float], level: float) -> None:
    """Step down from the smallest: rejected while p ≤ level / (m − k + 1), then none."""
    rejected: set[int] = set()
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if values[index] * (len(values) - rank) > level:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected
