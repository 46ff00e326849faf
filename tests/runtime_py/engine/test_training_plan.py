"""What each step has and how fast it learns: the order of examples, rates, powers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st

from runtime_py.engine.training_plan import (
    Settings,
    batches,
    half_cosine,
    power,
    rates_at,
    steps_of,
)


@examples_of(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 50),
    steps=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_budget_of_steps(count: int, batch: int, steps: int, seed: int) -> None:
    """Exactly so many, all of one size; the line that they cut is orders of all examples."""
    own = Settings(steps=steps, batch=batch, seed=seed)
    plan = batches(count, own)
    assert plan == batches(count, own)
    assert len(plan) == steps == steps_of(count, own)
    assert {len(step) for step in plan} == {min(batch, count)}
    line = [index for step in plan for index in step]
    for start in range(0, len(line), count):
        order = line[start : start + count]
        assert len(set(order)) == len(order)
        assert set(order) <= set(range(count))
    times = Counter(line)
    if len(line) >= count:
        assert set(times) == set(range(count))
        assert max(times.values()) - min(times.values()) <= 1
    # A longer run of the same seed begins the same way.
    assert batches(count, replace(own, steps=steps + 3))[:steps] == plan


@examples_of(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 300),
    batch=st.integers(1, 40),
    epochs=st.integers(1, 5),
    fewest=st.integers(1, 30),
)
def test_epochs_as_a_budget(count: int, batch: int, epochs: int, fewest: int) -> None:
    own = Settings(epochs=epochs, batch=batch, fewest_steps=fewest)
    plan = batches(count, own)
    times = Counter(index for step in plan for index in step)
    assert len(plan) >= fewest
    assert min(times[index] for index in range(count)) >= epochs
    if len(plan) > fewest:  # a step less would not do
        assert (len(plan) - 1) * min(batch, count) < epochs * count


def test_two_seeds_have_two_orders() -> None:
    plans = [batches(20, Settings(steps=5, batch=8, seed=seed)) for seed in (0, 1)]
    assert plans[0] != plans[1]


def test_learning_rates() -> None:
    own = Settings(learning_rate=1.0, b_rate_ratio=4.0, warmup=2, schedule="linear")
    rates = [rates_at(own, step, 6) for step in range(1, 7)]
    assert [a for a, _ in rates] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert all(b == 4.0 * a for a, b in rates)
    cosine = replace(own, schedule="cosine")
    assert abs(rates_at(cosine, 3, 6)[0] - 1.0) <= 2.0**-51
    assert abs(rates_at(cosine, 5, 6)[0] - 0.5) <= 2.0**-51
    constant = Settings(learning_rate=1.0)  # as it comes: no warm-up, no decay
    assert {rates_at(constant, step, 6) for step in (1, 6)} == {(1.0, 1.0)}


@examples_of(max_examples=500)
@given(left=st.floats(0.0, 1.0))
def test_the_polynomial_of_the_cosine(left: float) -> None:
    """The bound that its docstring states; ``math.cos`` is off by less than a bit of its own."""
    assert 0.0 <= half_cosine(left) <= 1.0 + 2.0**-51
    assert abs(half_cosine(left) - (1.0 - math.cos(math.pi * left)) / 2) <= 2.0**-51


@examples_of(max_examples=100)
@given(base=st.sampled_from([0.9, 0.999]), exponent=st.integers(0, 400))
def test_powers(base: float, exponent: int) -> None:
    """A product of n factors has at most n − 1 roundings, and ``pow`` one."""
    assert abs(power(base, exponent) - base**exponent) <= (exponent + 1) * 2.0**-53 * base**exponent
