"""What bounds a run's checks, and what they do to a fault, by arithmetic alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from toolchain.compile.spread import Spread
from toolchain.compile.tolerances import HALF, TABLE, Tolerance
from toolchain.verify.parity import run_bounds
from toolchain.verify.parity.decisions_rung import closest
from toolchain.verify.parity.run_bounds import ScoreBounds
from toolchain.verify.parity.training_checks import _gradient_checks
from toolchain.verify.parity.verdict import compare


@pytest.mark.parametrize("rms", [math.nan, math.inf])
def test_float16_that_overflows_still_bounds_an_adapters_effect(
    monkeypatch: pytest.MonkeyPatch, rms: float
) -> None:
    monkeypatch.setattr(run_bounds, "of_float16", lambda model, rows: Spread(rms, math.nan, rms))
    monkeypatch.setattr(run_bounds, "largest_logit", lambda model, tokens, values: 10.0)
    case = SimpleNamespace(tokens=np.zeros(4, np.int64), prompt=2)
    bounds = run_bounds.of_ios(None, [case], {"initial": {}}, 1)  # type: ignore[arg-type, list-item]
    assert bounds.noise == pytest.approx(8 * HALF * 10.0, rel=1e-2)
    assert bounds.logits.likeness == 0.999


@pytest.mark.parametrize("name", ["float16", "adapter", "int8 activations"])
def test_a_check_without_a_bound_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="no bound"):
        compare("lm", "case", "logits", np.ones(3), np.ones(3), TABLE[name])


@pytest.mark.parametrize(
    ("off", "cancels", "passed"),
    [
        (9e-5, 0.0, True),
        (4e-4, 0.0, False),  # within the step's bound, 4 % of the tensor itself
        (4e-4, 1.0, False),  # PyTorch's own float32 does not excuse it
        (4e-4, 1e-4, False),
    ],
)
def test_a_small_tensors_gradient(off: float, cancels: float, passed: bool) -> None:
    expected = {"layers.0.lora_a": np.array([1.0, -0.5]), "layers.1.lora_a": np.array([0.01, 0.0])}
    measured = {**expected, "layers.1.lora_a": expected["layers.1.lora_a"] + off}
    bound = Tolerance("float32, gradient", 5e-4, None, "")
    checks = _gradient_checks(
        measured, expected, bound, "case", scale=1.0,
        exact=lambda: {name: array + cancels for name, array in expected.items()},
    )  # fmt: skip
    assert [check.passed for check in checks] == [True, passed]


def test_what_cancels_in_a_gradient_passes_within_the_limit() -> None:
    expected = {"layers.0.lora_a": np.array([1.0, -0.5])}
    measured = {"layers.0.lora_a": np.array([1.0, -0.497])}
    bound = Tolerance("float32, gradient", 5e-4, None, "")
    for cancels, passed in ((5e-4, True), (1e-4, False)):
        (check,) = _gradient_checks(
            measured, expected, bound, "case", scale=1.0,
            exact=lambda off=cancels: {name: array + off for name, array in expected.items()},
        )  # fmt: skip
        assert check.passed == passed


def test_a_tie_is_of_the_score_that_is_close() -> None:
    """An exact score that is close is none, nor is one by another score's bound."""
    allowed = ScoreBounds(eoe=1e-3, idd=1e-1, ties=True)

    def tie(*new: float) -> bool:
        return allowed.tied(closest(np.array([[0.5, 0.25, 0.5], new])))

    assert not tie(0.9, 0.25 + 2.0**-20, 0.9)
    assert not tie(0.51, 0.9, 0.9)
    assert not tie(0.5, 0.25, 0.9)
    assert tie(0.501, 0.9, 0.9)
    assert tie(0.9, 0.9, 0.6)
    assert closest(np.zeros((1, 3))) == {"eoe": math.inf, "dss": math.inf, "idd": math.inf}
