"""Bounds have a floor: what a run measures of its own rounding cannot excuse a fault."""

from __future__ import annotations

import math

import pytest

from toolchain.compile.spread import Spread
from toolchain.compile.tolerances import (
    FLOAT16_MOST,
    HALF,
    INT8_ABOVE,
    INT8_UNLIKE,
    gradient_limit,
    of_float16,
    of_int8,
)


@pytest.mark.parametrize("unlike", [0.0, 1e-3, 0.05, 0.5, 2.0, math.nan, math.inf])
def test_int8_activations_excuse_no_wrong_weight(unlike: float) -> None:
    spread = Spread(0.01, unlike, 0.01)
    logits, pooled = of_int8(spread).likeness, of_int8(spread, pooled=True).likeness
    assert logits is not None
    assert pooled is not None
    assert 0.9 <= logits <= 1.0
    assert 0.99 <= pooled <= 1.0
    if unlike == 1e-3:
        assert logits == pooled == pytest.approx(1.0 - 4.0 * unlike)


def test_two_int8_engines_get_twice_what_they_differ_by() -> None:
    """√2 of the difference, and 2 of 1 − correlation, which is a square."""
    assert pytest.approx(2.0 * math.sqrt(2.0)) == INT8_ABOVE
    assert pytest.approx(2.0 * 2.0) == INT8_UNLIKE


@pytest.mark.parametrize(
    ("largest", "unlike", "most", "least"),
    [
        (1e-6, 1e-9, 8 * HALF, 0.999),
        (5e-3, 2e-4, 0.02, 1.0 - 16 * 2e-4),
        (0.5, 0.5, FLOAT16_MOST, 0.99),
        (math.inf, math.nan, 8 * HALF, 0.999),
        (math.nan, 0.5, 8 * HALF, 0.999),
    ],
)
def test_float16(largest: float, unlike: float, most: float, least: float) -> None:
    bound = of_float16(Spread(largest, unlike, 0.0))
    assert bound.max_rel == pytest.approx(most, rel=1e-2)
    assert bound.likeness == pytest.approx(least)


@pytest.mark.parametrize(
    ("tensor", "step", "limit"),
    [(2.0, 2.0, 1e-2), (0.2, 2.0, 1e-3), (1e-6, 2.0, 1e-4), (0.0, 2.0, 1e-4), (0.0, 0.0, 1e-4)],
)
def test_a_small_gradient_is_judged_by_its_own_size(
    tensor: float, step: float, limit: float
) -> None:
    assert gradient_limit(tensor, step) == pytest.approx(limit)
