"""Drawing tokens: what the phone's engine does besides running programs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from runtime_py.engine.phone_engine import sample
from runtime_py.loop.random_stream import SplitMix64

LOGITS = np.array([0.3, -1.0, 2.0, 0.0, 1.1], np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_as_often_as_softmax_says(temperature: float) -> None:
    chance, draws = SplitMix64(3), 20_000
    found = Counter(sample(LOGITS, temperature, chance) for _ in range(draws))
    expected = softmax(LOGITS.astype(np.float64) / temperature) * draws
    assert chisquare([found[i] for i in range(5)], expected).pvalue > 1e-3


def test_the_same_seed_draws_the_same_tokens() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    one, other = SplitMix64(9), SplitMix64(9)
    assert [sample(row, 0.5, one) for row in rows] == [sample(row, 0.5, other) for row in rows]


def test_temperature_zero_draws_nothing() -> None:
    chance = SplitMix64(5)
    assert sample(LOGITS, 0.0, chance) == 2
    assert chance.state == 5


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    chance = SplitMix64(1)
    assert {sample(logits, 1.0, chance) for _ in range(200)} == {1}
