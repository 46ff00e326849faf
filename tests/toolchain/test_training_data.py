"""Which dialogues are learned, choose the step, and are judged."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.engine.examples import Example
from toolchain.training_data import divide

NUMBERS = np.ones(2, np.int64)


@settings(max_examples=200)
@given(count=st.integers(1, 300), part=st.floats(0.0, 0.9), least=st.integers(1, 40))
def test_every_dialogue_has_one_part(count: int, part: float, least: int) -> None:
    examples = [Example(str(i), NUMBERS, NUMBERS) for i in range(count)]
    learned, stopping, judged = divide(examples, part, least)
    found = [int(one.id) for one in (*learned, *stopping, *judged)]
    assert sorted(found) == list(range(count))
    held = len(stopping) + len(judged)
    assert held == min(round(count * part), count - 1)
    assert learned
    if held >= least and held > 1:
        assert 0 <= len(stopping) - len(judged) <= 1
    elif held < least:
        assert not stopping
    places = sorted(int(one.id) for one in (*stopping, *judged))
    gaps = np.diff([-1, *places])
    assert not places or max(gaps) - min(gaps) <= 1  # evenly spread
