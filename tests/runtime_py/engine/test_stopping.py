"""Held-out examples choose the step whose state a run ends with, after a kill as without one."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st

from runtime_py.bundle.manifest import Optimizer
from runtime_py.engine.trainer import TrainingOutcome, train
from runtime_py.engine.training_plan import Settings
from runtime_py.loop.errors import TrainingDiverged, TrainingError
from tests.exporters.training.training_kit import example_of
from tests.runtime_py.engine.toy import Toy, toy_state

OPTIMIZER = Optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8)
LESSONS = [example_of(10 + 3 * (i % 5), seed=i) for i in range(7)]
STOPPING = [example_of(30, seed=20 + i) for i in range(5)]  # three calls of 64 tokens
LOSSES = st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0]), min_size=21, max_size=21)


def looked_at(losses: list[float], own: Settings) -> list[tuple[int, float]]:
    """The curve as the rule has it, step after step."""
    assert own.steps is not None
    curve: list[tuple[int, float]] = []
    for step in range(own.steps + 1):
        if step % own.check_every and step != own.steps:
            continue
        curve.append((step, losses[step]))
        values = [loss for _, loss in curve]
        if own.patience and len(values) - 1 - values.index(min(values)) >= own.patience:
            break
    return curve


@examples_of(max_examples=60, deadline=None)
@given(
    losses=LOSSES,
    steps=st.integers(1, 20),
    every=st.integers(1, 6),
    patience=st.integers(0, 4),
)
def test_the_least_loss_is_kept(losses: list[float], steps: int, every: int, patience: int) -> None:
    """The earliest of equals, among those looked at; the state is the one after that step."""
    own = Settings(
        steps=steps, batch=2, learning_rate=0.1, check_every=every, patience=patience, save_every=3
    )
    state = toy_state()
    after = {0: state.parameters.copy()}
    with TemporaryDirectory() as folder:
        found = train(
            *(Toy(script=losses), state, LESSONS, own, OPTIMIZER, Path(folder)),
            stopping=STOPPING,
            on_step=lambda step: after.update({step.number: state.parameters.copy()}),
        )
    assert found is not None
    curve = looked_at(losses, own)
    assert list(found.curve) == curve
    least = min(loss for _, loss in curve)
    assert found.kept_step == next(step for step, loss in curve if loss == least)
    assert len(found.losses) == curve[-1][0] == max(after)
    np.testing.assert_array_equal(state.parameters, after[found.kept_step])


@examples_of(max_examples=40, deadline=None)
@given(
    losses=LOSSES,
    every=st.integers(1, 5),
    save=st.integers(1, 7),
    stops=st.lists(st.integers(0, 25), min_size=1, max_size=4),
)
def test_stopped_and_resumed(losses: list[float], every: int, save: int, stops: list[int]) -> None:
    """Between any two calls, several times: the same bits of what is kept, and the same curve."""
    own = Settings(steps=12, batch=3, learning_rate=0.1, check_every=every, save_every=save)

    def run(folder: str, most: int) -> tuple[TrainingOutcome | None, np.ndarray]:
        state, calls = toy_state(), count()
        outcome = train(
            *(Toy(script=losses), state, LESSONS, own, OPTIMIZER, Path(folder)),
            stopping=STOPPING,
            stop=lambda: next(calls) >= most,
        )
        return outcome, state.parameters

    with TemporaryDirectory() as whole, TemporaryDirectory() as cut:
        expected, wanted = run(whole, 10_000)
        for most in stops:
            run(cut, most)
        found, parameters = run(cut, 10_000)
        again, the_same = run(cut, 10_000)  # a run that has ended
    assert expected is not None
    assert again is not None
    assert found is not None
    for one in (found, again):
        assert one.losses == expected.losses
        assert one.curve == expected.curve
        assert one.kept_step == expected.kept_step
    np.testing.assert_array_equal(parameters, wanted)
    np.testing.assert_array_equal(the_same, wanted)


class KillError(Exception):
    """In place of a process that ends."""


@pytest.mark.parametrize("moment", range(1, 30, 4))
def test_killed_before_a_state_is_saved(moment: int, tmp_path: Path) -> None:
    """What was done since the last save is done again, looks too."""
    own = Settings(steps=12, batch=3, learning_rate=0.1, check_every=2, save_every=3, patience=0)
    losses = [float(abs(step - 7)) for step in range(13)]

    def run(folder: Path, most: int) -> tuple[TrainingOutcome | None, np.ndarray]:
        state, engine = toy_state(), Toy(script=losses)
        calls = count()

        def kill() -> bool:
            if next(calls) >= most:
                raise KillError
            return False

        arguments = (engine, state, LESSONS, own, OPTIMIZER, folder)
        return train(*arguments, stopping=STOPPING, stop=kill), state.parameters

    expected, wanted = run(tmp_path / "whole", 10_000)
    with pytest.raises(KillError):
        run(tmp_path / "cut", moment)
    found, parameters = run(tmp_path / "cut", 10_000)
    assert expected is not None
    assert found is not None
    assert (found.losses, found.curve, found.kept_step) == (expected.losses, expected.curve, 6)
    np.testing.assert_array_equal(parameters, wanted)


def test_without_stopping_examples_all_steps_are_taken(tmp_path: Path) -> None:
    own = Settings(steps=9, batch=2, learning_rate=0.1)
    found = train(Toy(), toy_state(), LESSONS, own, OPTIMIZER, tmp_path)
    assert found is not None
    assert (len(found.losses), found.curve, found.kept_step) == (9, (), 9)


def test_other_stopping_examples_are_another_run(tmp_path: Path) -> None:
    own = Settings(steps=2, batch=2, learning_rate=0.1)
    train(Toy(), toy_state(), LESSONS, own, OPTIMIZER, tmp_path, stopping=STOPPING)
    with pytest.raises(TrainingError, match="another run"):
        train(Toy(), toy_state(), LESSONS, own, OPTIMIZER, tmp_path, stopping=STOPPING[:4])


def test_a_stopping_loss_that_is_no_number(tmp_path: Path) -> None:
    own = Settings(steps=9, batch=2, learning_rate=0.1, check_every=2)
    script = [2.0, 0.0, 1.0, 0.0, math.inf]
    with pytest.raises(TrainingDiverged, match=r"stopping dialogues after step 4 is inf"):
        train(
            *(Toy(script=script), toy_state(), LESSONS, own, OPTIMIZER, tmp_path),
            stopping=STOPPING,
        )
