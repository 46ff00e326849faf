"""The guard: pairs of losses, and the chance that an adapter which is no better passes."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from runtime_py.loop.errors import LoopError
from runtime_py.loop.guard import judge, sign_test, tails
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneResult

NAN, INF = float("nan"), float("inf")
SEMANTICS = Path(__file__).parents[3] / "docs" / "semantics.md"


def result(
    before: tuple[float, ...], after: tuple[float, ...], losses: tuple[float, ...] = (1.0,)
) -> FineTuneResult:
    return FineTuneResult(Path("a"), before, after, losses, (), len(losses), 1.0)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 8, 29, 53, 56, 64, 127, 128, 400])
def test_chances_are_the_binomials(n: int) -> None:
    found = tails(n)
    np.testing.assert_allclose(found, binom.sf(np.arange(n + 1) - 1, n, 0.5), rtol=1e-12)
    if n <= 53:  # exact
        sums = [sum(math.comb(n, i) for i in range(k, n + 1)) for k in range(n + 1)]
        assert [Fraction(chance) for chance in found] == [Fraction(s, 2**n) for s in sums]


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3125, 0.35, 0.5, 1.0])
def test_the_rule_in_floats_decides_as_integers_do(limit: float) -> None:
    for n in range(129):
        most = max(Fraction(limit), Fraction(1, 2**n))
        sums = [sum(math.comb(n, i) for i in range(k, n + 1)) for k in range(n + 1)]
        expected = next(k for k, s in enumerate(sums) if Fraction(s, 2**n) <= most)
        needed, chance = sign_test(n, limit)
        assert needed == expected
        assert chance == pytest.approx(sums[needed] / 2**n, rel=1e-12)


def test_the_documents_table_is_what_the_rule_gives() -> None:
    text = SEMANTICS.read_text(encoding="utf-8").split("(`guard.py`)")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {int(n): (int(k), float(chance)) for n, k, chance in rows[1:]}
    assert len(table) >= 8
    for n, (needed, chance) in table.items():
        found = sign_test(n, LoopPolicy().guard_false_acceptance)
        assert found == (needed, pytest.approx(chance, abs=5e-4))


@pytest.mark.parametrize(
    ("before", "after", "losses", "taken"),
    [
        ((2.0,), (1.9,), (1.0,), True),
        ((2.0,), (2.0,), (), False),  # nothing changed
        ((2.0, 1.0), (2.0, 1.0), (1.0,), False),
        ((2.0,), (2.0001,), (), False),
        ((2.0, 2.0, 2.0), (1.9, 1.9, 2.1), (), False),  # the mean fell, but 2 of 3 are coins
        ((2.0, 2.0, 2.0, 2.0), (1.9, 1.9, 1.9, 2.1), (), True),
        ((2.0, 2.0, 2.0, 2.0), (1.9, 1.9, 1.9, 3.0), (), False),  # three fell, the mean rose
        ((2.0, 2.0, 2.0, 2.0), (1.9, 2.0, 2.0, 2.0), (), True),  # the only one that changed
        ((2.0,), (NAN,), (), False),
        ((NAN,), (1.0,), (), False),
        ((INF,), (1.0,), (), False),
        ((2.0, INF), (1.0, 1.0), (), False),
        ((2.0,), (1.0,), (1.0, NAN), False),
        ((2.0,), (), (), False),  # training that diverged gives none
        ((), (), (), False),
        ((1.7e308, 1.7e308), (1.0, 1.0), (), False),  # their sum is no number
    ],
)
def test_guard(
    before: tuple[float, ...], after: tuple[float, ...], losses: tuple[float, ...], taken: bool
) -> None:
    verdict = judge(result(before, after, losses), 0.35)
    assert verdict.accepted is taken
    assert verdict.reason.endswith("takes over." if taken else "the old adapter stays.")
    for mean in (verdict.before, verdict.after):
        assert mean is None or math.isfinite(mean)


def test_what_it_says() -> None:
    verdict = judge(result((2.0, 3.0, 2.0, 1.0), (1.0, 2.5, 2.5, 1.0)), 0.35)
    assert (verdict.changed, verdict.fell, verdict.needed) == (3, 2, 3)
    assert (verdict.before, verdict.after) == (2.0, 1.75)
    assert verdict.false_acceptance == 0.125
    assert verdict.reason == (
        "the held-out loss went from 2.0000 to 1.7500 but fell in 2 of the 3 sets where it "
        "changed, not in 3: the old adapter stays."
    )
    with pytest.raises(LoopError, match="losses of 2 guard sets before and of 1 after"):
        judge(result((2.0, 2.0), (1.0,)), 0.35)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_it_is_a_sign_test_and_a_mean(pairs: list[tuple[float, float]], limit: float) -> None:
    before, after = zip(*pairs, strict=True)
    verdict = judge(result(before, after), limit)
    changed = [new < old for old, new in pairs if new != old]
    assert (verdict.changed, verdict.fell) == (len(changed), sum(changed))
    chance = 1.0
    if changed:
        chance = binomtest(sum(changed), len(changed), 0.5, alternative="greater").pvalue
    bound = max(limit, 0.5 ** len(changed))
    if abs(chance - bound) > 1e-9 and abs(np.mean(before) - np.mean(after)) > 1e-9:
        assert verdict.accepted == (chance <= bound and np.mean(after) <= np.mean(before))


def test_coins_pass_as_often_as_it_says() -> None:
    """Losses that rise or fall by chance: the mean only takes more of them away."""
    draw = np.random.default_rng(3)
    for n in (3, 8, 25):
        passed = 0
        for _ in range(2000):
            after = 2.0 + draw.standard_normal(n)
            passed += judge(result((2.0,) * n, tuple(after)), 0.35).accepted
        said = sign_test(n, 0.35)[1]
        assert passed / 2000 <= said + 3 * math.sqrt(said * (1 - said) / 2000)
