"""The buffer's sums against sums made anew, its scores against loops, and its cost."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.loop.buffer import Buffer, Candidate, Scores
from runtime_py.loop.metrics import UNIT
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.replacement import POLICIES, choose
from runtime_py.loop.words import words
from tests.runtime_py.loop.toy import HIDDEN, LEXICONS, ToyEngine, dialogue

HALF_GRID = 2.0**-21  # a score is rounded to 2^-20
# The components of both directions are rounded by half a unit; and float64, which is 2^29 finer.
IDD = HALF_GRID + HIDDEN**0.5 / UNIT + 2.0**-45


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 4), min_size=5, max_size=60))
def test_scores_and_sums_against_loops(seed: int, places: list[int]) -> None:
    engine, buffer = ToyEngine(), Buffer(5, len(LEXICONS.names), HIDDEN)
    pooled: dict[int, np.ndarray] = {}
    domains: dict[int, int] = {}
    for number, bin in enumerate(places, start=1):
        one = dialogue(number, seed)
        embedding = engine.embed(one)
        new = buffer.measure(one.id, number, words(one.text), embedding, LEXICONS)
        own = embedding.pooled.astype(np.float64)
        distances = []
        for other, vector in pooled.items():
            if domains[other] == new.domain:
                norms = np.linalg.norm(own) * np.linalg.norm(vector)
                distances.append(1 - float(own @ vector) / norms)
        expected = sum(distances) / len(distances) if distances else 1.0
        assert new.scores.idd == pytest.approx(expected, abs=IDD, rel=0)
        assert new.scores.eoe == pytest.approx(embedding.entropy, abs=HALF_GRID, rel=0)
        buffer.put(bin, new)
        pooled[bin], domains[bin] = own, new.domain
        if number % 7 == 0:
            buffer.clear(bin)
            del pooled[bin], domains[bin]
    for domain in range(len(LEXICONS.names)):
        rows = buffer.directions[buffer.domains == domain]
        assert (buffer.sums[domain] == rows.sum(axis=0)).all()
        assert buffer.counts[domain] == len(rows)
    assert len(buffer) == len(pooled)


def filled(
    bins: int, hidden: int, selection: str
) -> tuple[Buffer, LoopPolicy, np.random.Generator]:
    draw = np.random.default_rng(0)
    buffer = Buffer(bins, len(LEXICONS.names), hidden)
    for bin in range(bins):
        scores = Scores(*draw.random(3))
        direction = draw.integers(-(1 << 19), 1 << 19, hidden)
        buffer.put(bin, Candidate(f"d{bin}", bin + 1, bin % 5, scores, direction))
    return buffer, LoopPolicy(selection=selection, bins=bins), draw


@pytest.mark.parametrize("selection", sorted(POLICIES))
@pytest.mark.parametrize(("bins", "limit_ms"), [(128, 1.0), (10_000, 10.0)])
def test_selection_is_cheap(selection: str, bins: int, limit_ms: float) -> None:
    """Words, scores and choice of a 100-word set with 576 hidden channels, in CPU time."""
    buffer, loop, draw = filled(bins, 576, selection)
    stream, times = SplitMix64(1), []
    text = " ".join(f"{t.content}, and then" for n in range(5) for t in dialogue(n).turns)
    if selection == "kcenter":
        assert buffer.neighbours  # made once, when first needed
    for number in range(bins + 1, bins + 30):
        pooled = draw.standard_normal(576).astype(np.float32)
        start = time.thread_time()
        new = buffer.measure(
            f"d{number}", number, words(text), Embedding(pooled, float(draw.random())), LEXICONS
        )
        choose(buffer, new, stream, loop)
        times.append(time.thread_time() - start)
    assert sorted(times)[len(times) // 2] * 1000 < limit_ms
