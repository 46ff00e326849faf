"""Every policy against a slow one written from docs/semantics.md with lists and fractions."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_py.loop.buffer import Buffer, Candidate, Scores
from runtime_py.loop.errors import LoopError
from runtime_py.loop.metrics import UNIT, direction
from runtime_py.loop.neighbours import COARSE
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.replacement import POLICIES, choose, find_policy, paper, worths

HIDDEN, DOMAINS = 4, 3
STEP = UNIT // COARSE  # directions that coarse rounding leaves as they are


@dataclass
class Slow:
    """The buffer as a list of what each bin holds, and nothing else."""

    loop: LoopPolicy
    stream: SplitMix64
    bins: list[Candidate | None] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    questions: set[str] = field(default_factory=set)
    observed: list[Candidate] = field(default_factory=list)

    def choose(self, new: Candidate) -> int | None:
        for bin, held in enumerate(self.bins):
            if held is None:
                return bin
        held_sets = [held for held in self.bins if held is not None]
        if not any(map(self.free, held_sets)):
            return None
        return getattr(self, self.loop.selection)(new, held_sets)

    def free(self, held: Candidate) -> bool:
        return not self.loop.keep_asked or held.id not in self.waiting | self.questions

    def paper(self, new: Candidate, held: list[Candidate]) -> int | None:
        mine = new.scores
        beaten = []
        for bin, old in enumerate(held):
            s = old.scores
            won = mine.eoe > s.eoe and mine.dss > s.dss and mine.idd > s.idd
            if won and self.free(old):
                beaten.append(bin)
        return beaten[self.stream.below(len(beaten))] if beaten else None

    def random(self, new: Candidate, held: list[Candidate]) -> int | None:
        drawn = self.stream.below(new.number)
        return drawn if drawn < len(held) and self.free(held[drawn]) else None

    def fifo(self, new: Candidate, held: list[Candidate]) -> int | None:
        free = [bin for bin in range(len(held)) if self.free(held[bin])]
        return sorted(free, key=lambda bin: held[bin].number)[0]

    def longest(self, new: Candidate, held: list[Candidate]) -> int | None:
        free = [bin for bin in range(len(held)) if self.free(held[bin])]
        shortest = min(free, key=lambda bin: (held[bin].answer_words, held[bin].number))
        return shortest if new.answer_words > held[shortest].answer_words else None

    def balanced(self, new: Candidate, held: list[Candidate]) -> int | None:
        by_domain = {d: [b for b, h in enumerate(held) if h.domain == d] for d in range(DOMAINS)}
        most = max(map(len, by_domain.values()))
        own = by_domain[new.domain]
        if len(own) + 1 < most:
            fullest = next(bins for bins in by_domain.values() if len(bins) == most)
            drawn = fullest[self.stream.below(most)]
        else:
            seen = sum(one.domain == new.domain for one in self.observed) + 1
            place = self.stream.below(seen)
            if place >= len(own):
                return None
            drawn = own[place]
        return drawn if self.free(held[drawn]) else None

    def typical(self, new: Candidate, held: list[Candidate]) -> int | None:
        def mean(me: Candidate, others: list[Candidate]) -> Fraction:
            if not others:
                return Fraction(0)
            total = sum(product(me, other) for other in others)  # of length UNIT
            scaled = Fraction(total, len(others) * UNIT * UNIT) * 2**20 + Fraction(1, 2)
            return Fraction(math.floor(scaled), 2**20)

        def typicality(me: Candidate) -> Fraction:
            others = [old for old in held if old is not me]
            return mean(me, [*self.observed, new]) - mean(me, others)

        free = [bin for bin in range(len(held)) if self.free(held[bin])]
        weakest = min(free, key=lambda bin: (typicality(held[bin]), bin))
        return weakest if typicality(new) > typicality(held[weakest]) else None

    def kcenter(self, new: Candidate, held: list[Candidate]) -> int | None:
        best: tuple[int, int, int] | None = None
        for i in range(len(held)):
            for j in range(len(held)):
                if i != j and (best is None or product(held[i], held[j]) > best[0]):
                    best = (product(held[i], held[j]), i, j)
        if best is None or max(product(new, old) for old in held) >= best[0]:
            return None
        free = [bin for bin in best[1:] if self.free(held[bin])]
        return min(free, key=lambda bin: held[bin].number) if free else None

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

        free = [
            bin for bin, old in enumerate(held) if old.id not in self.waiting and self.free(old)
        ]
        if not free:
            return None
        worths = {bin: worth(held[bin], domain_mates(held[bin])) for bin in free}
        weakest = min(free, key=lambda bin: (worths[bin], bin))
        gap = worth(new, domain_mates(new)) - worths[weakest]
        near = [bin for bin in free if abs(worths[bin] - worths[weakest]) < Fraction(1, 10**12)]
        if abs(gap) < Fraction(1, 10**12) or len(near) > 1:
            raise Rounded  # float64 may turn it either way
        return weakest if gap > 0 else None


def product(a: Candidate, b: Candidate) -> int:
    return sum(int(x) * int(y) for x, y in zip(a.direction, b.direction, strict=True))


class Rounded(Exception):  # noqa: N818
    pass


def candidate(number: int, draw: SplitMix64) -> Candidate:
    """Scores on a coarse grid, so that ties abound."""
    scores = Scores(*(draw.below(9) / 8 for _ in range(3)))
    direction = np.array([draw.below(21) - 10 for _ in range(HIDDEN)], np.int64) * STEP
    domain = draw.below(DOMAINS + 2) % DOMAINS  # some more often than others
    return Candidate(f"d{number}", number, domain, scores, direction, draw.below(6))


def compare(selection: str, seed: int, length: int = 24) -> None:
    draw = SplitMix64(seed)
    loop = LoopPolicy(
        selection=selection,
        bins=1 + draw.below(6),
        age_fills=(1 + draw.below(40)) / 8,
        crowding=draw.below(9) / 8,
        keep_asked=draw.below(4) > 0,
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
        slow.observed.append(new)
        buffer.see(new)
        if draw.below(4) == 0:  # an answer
            bin = draw.below(loop.bins)
            if buffer.ids[bin]:
                slow.waiting.add(str(buffer.ids[bin]))
                buffer.waiting[bin] = True
        if draw.below(4) == 0:  # a question
            bin = draw.below(loop.bins)
            if buffer.ids[bin] and not buffer.was_asked[bin]:
                slow.questions.add(str(buffer.ids[bin]))
                buffer.ask(bin)
        if draw.below(4) == 0 and slow.questions:  # it lapses
            id = min(slow.questions)
            slow.questions.remove(id)
            buffer.end_question(id)
        if draw.below(8) == 0:  # forgetting
            bin = draw.below(loop.bins)
            if (gone := slow.bins[bin]) is not None:
                slow.observed = [one for one in slow.observed if one is not gone]
                buffer.unsee(bin)
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
    assert (choice.bin, choice.reason) == (None, "asked_about")
    anyhow = dataclasses.replace(loop, keep_asked=False)
    choice = choose(buffer, candidate(3, stream), stream, anyhow)
    assert (choice.bin, choice.reason) == (None, "all_wait_for_fine_tuning")
    buffer.waiting[1] = False
    assert choose(buffer, candidate(3, stream), stream, loop).bin == 1


def test_an_unknown_policy_names_the_known() -> None:
    with pytest.raises(LoopError, match=r"one of paper, random, fifo, kcenter, .*, attune\."):
        find_policy("best")


def test_balanced_shares_the_buffer_and_is_fair_within_a_domain() -> None:
    """Nine sets in ten are of one domain; every set of a domain is kept as often."""
    kept = np.zeros(200)
    for seed in range(600):
        loop, stream = LoopPolicy(selection="balanced", bins=6), SplitMix64(seed)
        buffer = Buffer(loop.bins, DOMAINS, HIDDEN)
        for number in range(1, 201):
            domain = 1 if number % 10 == 0 else 0
            scores, direction = Scores(0, 0, 0), np.zeros(HIDDEN, np.int64)
            new = Candidate(f"d{number}", number, domain, scores, direction)
            bin = choose(buffer, new, stream, loop).bin
            if bin is not None:
                buffer.put(bin, new)
            buffer.see(new)
        assert abs(int(buffer.counts[0]) - int(buffer.counts[1])) <= 1
        kept[buffer.numbers - 1] += 1
    rare = np.arange(1, 201) % 10 == 0
    share = kept[rare].sum() / 600  # sets of the rare domain that a run keeps
    for group, expected in ((kept[rare], 30 * share), (kept[~rare], 10 / 3 * (6 - share))):
        assert (abs(group - expected) < 5 * expected**0.5 + 1).all()


def test_typical_keeps_the_middle_of_a_stream() -> None:
    """Three groups of directions, and lone ones: the groups stay, the lone ones leave."""
    loop, stream, draw = LoopPolicy(selection="typical", bins=6), SplitMix64(0), SplitMix64(5)
    buffer = Buffer(6, DOMAINS, 16)
    for number in range(1, 121):
        vector = np.array([draw.below(7) - 3 for _ in range(16)], np.float32)
        lone = number % 4 == 0
        vector[3 + number // 4 % 13 if lone else number % 3] += 60
        new = Candidate(f"d{number}", number, int(lone), Scores(0, 0, 0), direction(vector))
        bin = choose(buffer, new, stream, loop).bin
        if bin is not None:
            buffer.put(bin, new)
        buffer.see(new)
    assert buffer.counts[1] == 0
    groups = {int(number) % 3 for number in buffer.numbers[buffer.domains == 0]}
    assert groups == {0, 1, 2}


@pytest.mark.parametrize("selection", sorted(POLICIES))
def test_what_is_asked_about_stays(selection: str) -> None:
    draw, loop = SplitMix64(3), LoopPolicy(selection=selection, bins=4, age_fills=0.1)
    buffer, stream = Buffer(4, DOMAINS, HIDDEN), SplitMix64(1)
    for number in range(1, 5):
        buffer.put(number - 1, candidate(number, draw))
        buffer.see(candidate(number, draw))
    buffer.ask(1)
    buffer.waiting[2] = True
    for number in range(5, 200):
        new = candidate(number, draw)
        bin = choose(buffer, new, stream, loop).bin
        assert bin not in (1, 2)
        if bin is not None:
            buffer.put(bin, new)
        buffer.see(new)
    assert buffer.ids[1:3] == ["d2", "d3"]
    assert buffer.ids[0] != "d1" or buffer.ids[3] != "d4"


@pytest.mark.parametrize("names", ["eoe", "dss idd", "eoe idd", "eoe dss idd"])
def test_only_the_scores_that_the_policy_names_decide(names: str) -> None:
    """A set that is better in one score alone beats all others under that score alone."""
    loop = LoopPolicy(scores=names, bins=4, crowding=0.0, age_fills=1e9)
    buffer = Buffer(4, 1, 2)
    for bin in range(4):
        scores = Scores(0.2 + bin / 8, 0.5 - bin / 8, 0.25)
        buffer.put(bin, Candidate(f"d{bin}", bin + 1, 0, scores, np.array([1, 0], np.int64), 1))
    best = {"eoe": 0.875, "dss": 0.0, "idd": 0.0}  # in the entropy alone
    new = Candidate("new", 5, 0, Scores(**best), np.array([1, 0], np.int64), 1)
    wins = names == "eoe"
    assert (paper(buffer, new, SplitMix64(0), loop).bin is not None) == wins
    stored, worth = worths(buffer, new, loop)
    columns = names.split(" ")
    expected = sum(4 if name == "eoe" else 0 for name in columns) / (4 * len(columns))
    assert worth == pytest.approx(expected, abs=1e-12)
    assert stored.max() <= 1.0
