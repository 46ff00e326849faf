"""Every policy against a slow one written from docs/semantics.md with lists and fractions."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_py.loop.buffer import Buffer, Candidate, Scores
from runtime_py.loop.errors import LoopError
from runtime_py.loop.metrics import UNIT
from runtime_py.loop.neighbours import COARSE
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.replacement import POLICIES, choose, find_policy

HIDDEN, DOMAINS = 4, 3
STEP = UNIT // COARSE  # directions that coarse rounding leaves as they are


@dataclass
class Slow:
    """The buffer as a list of what each bin holds, and nothing else."""

    loop: LoopPolicy
    stream: SplitMix64
    bins: list[Candidate | None] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)

    def choose(self, new: Candidate) -> int | None:
        for bin, held in enumerate(self.bins):
            if held is None:
                return bin
        held_sets = [held for held in self.bins if held is not None]
        return getattr(self, self.loop.selection)(new, held_sets)

    def paper(self, new: Candidate, held: list[Candidate]) -> int | None:
        mine = new.scores
        beaten = []
        for bin, old in enumerate(held):
            s = old.scores
            if mine.eoe > s.eoe and mine.dss > s.dss and mine.idd > s.idd:
                beaten.append(bin)
        return beaten[self.stream.below(len(beaten))] if beaten else None

    def random(self, new: Candidate, held: list[Candidate]) -> int | None:
        drawn = self.stream.below(new.number)
        return drawn if drawn < len(held) else None

    def fifo(self, new: Candidate, held: list[Candidate]) -> int | None:
        return sorted(range(len(held)), key=lambda bin: held[bin].number)[0]

    def kcenter(self, new: Candidate, held: list[Candidate]) -> int | None:
        def product(a: Candidate, b: Candidate) -> int:
            return sum(int(x) * int(y) for x, y in zip(a.direction, b.direction, strict=True))

        best: tuple[int, int, int] | None = None
        for i in range(len(held)):
            for j in range(len(held)):
                if i != j and (best is None or product(held[i], held[j]) > best[0]):
                    best = (product(held[i], held[j]), i, j)
        if best is None or max(product(new, old) for old in held) >= best[0]:
            return None
        _, i, j = best
        return i if held[i].number < held[j].number else j

    def attune(self, new: Candidate, held: list[Candidate]) -> int | None:
        everyone = [*held, new]

        def worth(me: Candidate, crowd: int) -> Fraction:
            rank = Fraction(0)
            for name in ("eoe", "dss", "idd"):
                own = getattr(me.scores, name)
                others = [getattr(o.scores, name) for o in everyone if o is not me]
                less = sum(value < own for value in others)
                equal = sum(value == own for value in others)
                rank += Fraction(2 * less + equal, 2 * len(others))
            fills = Fraction(self.loop.age_fills)
            age = Fraction(new.number - me.number) / (fills * len(held))
            return rank / 3 - age - Fraction(self.loop.crowding) * Fraction(crowd, len(held))

        def domain_mates(me: Candidate) -> int:
            return sum(old.domain == me.domain and old is not me for old in held)

        free = [bin for bin, old in enumerate(held) if old.id not in self.waiting]
        if not free:
            return None
        worths = {bin: worth(held[bin], domain_mates(held[bin])) for bin in free}
        weakest = min(free, key=lambda bin: (worths[bin], bin))
        gap = worth(new, domain_mates(new)) - worths[weakest]
        near = [bin for bin in free if abs(worths[bin] - worths[weakest]) < Fraction(1, 10**12)]
        if abs(gap) < Fraction(1, 10**12) or len(near) > 1:
            raise Rounded  # float64 may turn it either way
        return weakest if gap > 0 else None


class Rounded(Exception):  # noqa: N818
    pass


def candidate(number: int, draw: SplitMix64) -> Candidate:
    """Scores on a coarse grid, so that ties abound."""
    scores = Scores(*(draw.below(9) / 8 for _ in range(3)))
    direction = np.array([draw.below(21) - 10 for _ in range(HIDDEN)], np.int64) * STEP
    return Candidate(f"d{number}", number, draw.below(DOMAINS), scores, direction)


def compare(selection: str, seed: int, length: int = 24) -> None:
    draw = SplitMix64(seed)
    loop = LoopPolicy(
        selection=selection,
        bins=1 + draw.below(6),
        age_fills=(1 + draw.below(40)) / 8,
        crowding=draw.below(9) / 8,
    )
    state = draw.next()
    buffer, fast_stream = Buffer(loop.bins, DOMAINS, HIDDEN), SplitMix64(state)
    slow = Slow(loop, SplitMix64(state), [None] * loop.bins)
    for number in range(1, length + 1):
        new = candidate(number, draw)
        choice = choose(buffer, new, fast_stream, loop)
        with suppress(Rounded):
            assert slow.choose(new) == choice.bin
        assert slow.stream.state == fast_stream.state
        if choice.bin is not None:
            slow.bins[choice.bin] = new
            buffer.put(choice.bin, new)
        if draw.below(4) == 0:  # an answer
            bin = draw.below(loop.bins)
            if buffer.ids[bin]:
                slow.waiting.add(str(buffer.ids[bin]))
                buffer.waiting[bin] = True
        if draw.below(8) == 0:  # forgetting
            bin = draw.below(loop.bins)
            slow.bins[bin] = None
            buffer.clear(bin)
        assert buffer.ids == [held.id if held else None for held in slow.bins]
        assert len(buffer) <= loop.bins


@pytest.mark.parametrize("selection", sorted(POLICIES))
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_agrees_with_the_slow_one(selection: str, seed: int) -> None:
    compare(selection, seed)


@pytest.mark.full
@pytest.mark.parametrize("selection", sorted(POLICIES))
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**64 - 1))
def test_agrees_with_the_slow_one_on_10000_streams(selection: str, seed: int) -> None:
    compare(selection, seed)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_paper_never_replaces_a_set_that_wins_on_any_score(seed: int) -> None:
    draw = SplitMix64(seed)
    loop = LoopPolicy(selection="paper", bins=5)
    buffer, stream = Buffer(loop.bins, DOMAINS, HIDDEN), SplitMix64(seed)
    held: dict[int, Scores] = {}
    for number in range(1, 40):
        new = candidate(number, draw)
        bin = choose(buffer, new, stream, loop).bin
        if bin is None:
            continue
        if bin in held:
            old = held[bin]
            assert old.eoe < new.scores.eoe
            assert old.dss < new.scores.dss
            assert old.idd < new.scores.idd
        held[bin] = new.scores
        buffer.put(bin, new)


def test_random_keeps_every_set_as_often() -> None:
    kept = np.zeros(40)
    for seed in range(3000):
        draw, loop = SplitMix64(seed), LoopPolicy(selection="random", bins=4)
        bins: list[int] = []
        buffer = Buffer(loop.bins, DOMAINS, HIDDEN)
        one = candidate(1, SplitMix64(0))
        for number in range(1, 41):
            new = Candidate(f"d{number}", number, 0, one.scores, one.direction)
            bin = choose(buffer, new, draw, loop).bin
            if bin is not None:
                buffer.put(bin, new)
        bins = [int(number) for number in buffer.numbers]
        kept[[number - 1 for number in bins]] += 1
    assert kept.sum() == 12_000
    assert (abs(kept - 300) < 85).all()  # five standard deviations


def test_attune_does_not_stagnate_where_paper_does() -> None:
    """Bins full of the best scores there are: only age lets another one in."""
    entered = {}
    for selection in ("paper", "attune"):
        loop = LoopPolicy(selection=selection, bins=4, age_fills=4.0)
        buffer, stream = Buffer(4, DOMAINS, HIDDEN), SplitMix64(0)
        count = 0
        for number in range(1, 200):
            top = number <= 4
            scores = Scores(1, 1, 1) if top else Scores(0.5, 0.5 + number / 1000, 0.5)
            new = Candidate(f"d{number}", number, number % 3, scores, np.ones(HIDDEN, np.int64))
            bin = choose(buffer, new, stream, loop).bin
            if bin is not None:
                buffer.put(bin, new)
                count += number > 4
        entered[selection] = count
    assert entered["paper"] == 0
    assert 10 < entered["attune"] < 195


def test_attune_keeps_what_was_answered_and_not_learnt() -> None:
    loop = LoopPolicy(selection="attune", bins=2, age_fills=0.01)
    buffer, stream = Buffer(2, DOMAINS, HIDDEN), SplitMix64(0)
    for number in (1, 2):
        buffer.put(number - 1, candidate(number, stream))
    buffer.waiting[:] = True
    choice = choose(buffer, candidate(3, stream), stream, loop)
    assert (choice.bin, choice.reason) == (None, "all_wait_for_fine_tuning")
    buffer.waiting[1] = False
    assert choose(buffer, candidate(3, stream), stream, loop).bin == 1


def test_an_unknown_policy_names_the_known() -> None:
    with pytest.raises(LoopError, match="expected one of paper, random, fifo, kcenter, attune"):
        find_policy("best")
