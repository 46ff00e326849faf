"""SplitMix64 against numbers published for it, and draws below n."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.loop.random_stream import SplitMix64


def test_published_outputs() -> None:
    """Rosetta Code, "Pseudo-random numbers/Splitmix64"; the first of seed 0 from Java's tests."""
    stream = SplitMix64(1234567)
    assert [stream.next() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert SplitMix64(0).next() == 0xE220A8397B1DCDAF


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**64))
def test_below_stays_below_and_resumes(state: int, n: int) -> None:
    stream = SplitMix64(state)
    assert 0 <= stream.below(n) < n
    assert SplitMix64(stream.state).next() == stream.next()


def test_below_redraws_the_incomplete_last_cycle() -> None:
    n = 2**63 + 1  # nearly half of all numbers lie past the only whole cycle
    stream, plain = SplitMix64(1), SplitMix64(1)
    drawn = [stream.below(n) for _ in range(50)]
    assert drawn == [x for x in (plain.next() for _ in range(300)) if x < n][:50]


def test_below_is_even() -> None:
    stream = SplitMix64(99)
    counts = Counter(stream.below(7) for _ in range(70_000))
    assert all(9_500 < counts[k] < 10_500 for k in range(7))


@pytest.mark.parametrize("n", [0, -1, 2**64 + 1])
def test_below_refuses(n: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 2"):
        SplitMix64(0).below(n)
