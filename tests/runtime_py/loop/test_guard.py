"""The guard: pairs of losses, and the chance that an adapter which is no better passes."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, wilcoxon

from runtime_py.loop.errors import LoopError
from runtime_py.loop.guard import doubled_ranks, judge, signed_rank_test, tails
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneResult

NAN, INF = float("nan"), float("inf")
SEMANTICS = Path(__file__).parents[3] / "docs" / "semantics.md"


def result(
    before: tuple[float, ...], after: tuple[float, ...], losses: tuple[float, ...] = (1.0,)
) -> FineTuneResult:
    return FineTuneResult(Path("a"), before, after, losses, (), len(losses), 1.0)


def distribution(ranks: list[int]) -> dict[int, int]:
    """How many of the 2^n ways that the coins fall give each sum of doubled ranks, by integers."""
    ways = {0: 1}
    for rank in ranks:
        moved = {total + rank: count for total, count in ways.items()}
        ways = {t: ways.get(t, 0) + moved.get(t, 0) for t in {*ways, *moved}}
    return ways


@given(st.lists(st.integers(0, 6), min_size=0, max_size=40))
def test_ranks_are_scipys(sizes: list[int]) -> None:
    assert [rank / 2 for rank in doubled_ranks(sizes)] == list(rankdata(sizes))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=0, max_size=53))
def test_chances_are_counted(sizes: list[int]) -> None:
    """Exactly, up to 53 of them."""
    ranks = doubled_ranks(sizes)
    ways, found = distribution(ranks), tails(ranks)
    assert len(found) == sum(ranks) + 1
    count = 0
    for total in range(sum(ranks), -1, -1):
        count += ways.get(total, 0)
        assert Fraction(found[total]) == Fraction(count, 2 ** len(ranks))


@pytest.mark.parametrize("n", [54, 64, 127, 128, 200])
def test_chances_of_many(n: int) -> None:
    ranks = doubled_ranks([float(i) for i in range(n)])
    ways, found = distribution(ranks), tails(ranks)
    count = 0
    for total in range(sum(ranks), -1, -1):
        count += ways.get(total, 0)
        assert found[total] == pytest.approx(float(Fraction(count, 2**n)), rel=1e-12)


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3125, 0.35, 0.5, 1.0])
def test_the_rule_in_floats_decides_as_integers_do(limit: float) -> None:
    draw = np.random.default_rng(1)
    for n in range(65):
        ranks = doubled_ranks(draw.integers(0, max(1, n), n).tolist())
        ways, most = distribution(ranks), max(Fraction(limit), Fraction(1, 2**n))
        sums = sorted(ways)
        over = {s: Fraction(sum(ways[t] for t in sums if t >= s), 2**n) for s in sums}
        expected = next(s for s in sums if over[s] <= most)
        assert signed_rank_test(ranks, limit) == (
            expected, pytest.approx(float(over[expected]), rel=1e-12)
        )  # fmt: skip


def test_the_documents_table_is_what_the_rule_gives() -> None:
    text = SEMANTICS.read_text(encoding="utf-8").split("(`guard.py`)")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {int(n): (float(w), float(whole), float(chance)) for n, w, whole, chance in rows[1:]}
    assert len(table) >= 8
    for n, (needed, whole, chance) in table.items():
        ranks = doubled_ranks([float(i) for i in range(n)])
        found = signed_rank_test(ranks, LoopPolicy().guard_false_acceptance)
        assert found == (2 * needed, pytest.approx(chance, abs=5e-5))
        assert sum(ranks) == 2 * whole


@pytest.mark.parametrize(
    ("before", "after", "losses", "taken"),
    [
        ((2.0,), (1.9,), (1.0,), True),
        ((2.0,), (2.0,), (), False),  # nothing changed
        ((2.0, 1.0), (2.0, 1.0), (1.0,), False),
        ((2.0,), (2.0001,), (), False),
        ((2.0, 2.0, 2.0), (1.9, 1.8, 2.3), (), False),  # two fell, by less than one rose
        ((3.0, 2.0, 2.0), (1.0, 1.9, 2.2), (), False),  # 4 of 6 ranks: coins do it too often
        ((3.0, 3.0, 2.0), (1.0, 1.9, 2.2), (), True),  # 5 of 6: one in four times
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
    verdict = judge(result((2.0, 3.0, 2.0, 1.0), (1.0, 2.75, 2.5, 1.0)), 0.35)
    assert (verdict.changed, verdict.fell) == (3, 2)
    assert (verdict.rank_sum, verdict.needed) == (4.0, 5.0)
    assert (verdict.before, verdict.after) == (2.0, 1.8125)
    assert verdict.false_acceptance == 0.25
    assert verdict.reason == (
        "the held-out loss went from 2.0000 to 1.8125 but fell in 2 of the 3 sets where it "
        "changed, and these falls have 4 of the 6 ranks by size, not 5: chance may do as well, "
        "and the old adapter stays."
    )
    with pytest.raises(LoopError, match="losses of 2 guard sets before and of 1 after"):
        judge(result((2.0, 2.0), (1.0,)), 0.35)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2000)), min_size=1, max_size=50),
    st.floats(0, 1),
)
def test_it_is_wilcoxons_test_and_a_mean(pairs: list[tuple[int, int]], limit: float) -> None:
    """SciPy's exact chances, which it has where no two changes are of one size."""
    sizes = [abs(old - new) for old, new in pairs if old != new]
    assume(sizes and len(set(sizes)) == len(sizes))
    before, after = zip(*pairs, strict=True)
    verdict = judge(result(tuple(map(float, before)), tuple(map(float, after))), limit)
    falls = [old - new for old, new in pairs if old != new]
    test = wilcoxon(falls, alternative="greater", method="exact")
    assert verdict.rank_sum == test.statistic
    bound = max(limit, 0.5 ** len(falls))
    if abs(test.pvalue - bound) > 1e-9:
        better = sum(after) <= sum(before)
        assert verdict.accepted == (test.pvalue <= bound and better)


def test_coins_pass_as_often_as_it_says() -> None:
    """Losses that rise or fall by chance: the mean only takes more of them away."""
    draw = np.random.default_rng(3)
    for n in (3, 8, 25):
        passed = 0
        for _ in range(2000):
            after = 2.0 + draw.standard_normal(n)
            passed += judge(result((2.0,) * n, tuple(after)), 0.35).accepted
        said = signed_rank_test(doubled_ranks([float(i) for i in range(n)]), 0.35)[1]
        assert passed / 2000 <= said + 3 * math.sqrt(said * (1 - said) / 2000)
