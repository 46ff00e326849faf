"""Which stored sets are asked about: the rules against slow ones, and what becomes of questions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import count
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.loop.asking import ASKING, Situation, find_asking_rule
from runtime_py.loop.buffer import Buffer, Candidate, Scores
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import LoopError
from runtime_py.loop.metrics import UNIT
from runtime_py.loop.neighbours import COARSE
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.records import annotated_sets
from runtime_py.loop.schedule import Moment
from tests.runtime_py.loop.toy import open_toy, small_policy

HIDDEN, DOMAINS = 4, 3
STEP = UNIT // COARSE  # directions that coarse rounding leaves as they are
WHOLE_BUFFER = sorted(set(ASKING) - {"entry"})


class Slow:
    """The rules by lists, whole numbers and fractions, from docs/semantics.md."""

    def __init__(self, loop: LoopPolicy, stream: SplitMix64, answered: int) -> None:
        self.loop, self.stream, self.answered = loop, stream, answered
        self.held: dict[int, Candidate] = {}
        self.observed: list[Candidate] = []
        self.asked: list[Candidate] = []

    def mean(self, me: Candidate, others: list[Candidate]) -> Fraction:
        if not others:
            return Fraction(0)
        total = sum(int(me.direction @ other.direction) for other in others)
        return Fraction(floor(Fraction(total, len(others) * UNIT**2) * 2**20 + Fraction(1, 2)))

    def choose(self, rule: str, able: list[int]) -> int | None:
        return getattr(self, rule)(able)

    def best(self, able: list[int], value: object) -> int:
        top = max(map(value, able))  # type: ignore[call-overload]
        equals = [b for b in able if value(b) == top]  # type: ignore[operator]
        return min(equals, key=lambda b: self.held[b].number)

    def entry(self, able: list[int]) -> int | None:
        return None

    def random(self, able: list[int]) -> int | None:
        return able[self.stream.below(len(able))]

    def longest(self, able: list[int]) -> int | None:
        return self.best(able, lambda b: self.held[b].answer_words)

    def typical(self, able: list[int]) -> int | None:
        def value(bin: int) -> Fraction:
            me = self.held[bin]
            return self.mean(me, self.observed) - self.mean(me, self.asked)

        return self.best(able, value)

    def uncertain(self, able: list[int]) -> int | None:
        ordered = sorted(self.held, key=lambda b: (-self.held[b].scores.eoe, self.held[b].number))
        tail = ordered[: floor(Fraction(self.loop.asking_tail) * len(ordered))]
        rest = [b for b in able if b not in tail]
        return self.best(rest, lambda b: self.held[b].scores.eoe) if rest else None

    def dual(self, able: list[int]) -> int | None:
        every = self.loop.asking_random_every
        if every and (len(self.asked) + 1) % every == 0:
            return self.random(able)
        early = self.answered < self.loop.asking_typical_first
        return self.typical(able) if early else self.uncertain(able)

    def balanced(self, able: list[int]) -> int | None:
        def share(domain: int) -> Fraction:
            mates = [h for h in self.held.values() if h.domain == domain]
            return Fraction(sum(any(a is m for a in self.asked) for m in mates), len(mates))

        domains = sorted({self.held[b].domain for b in able})
        best = min(domains, key=lambda d: (share(d), d))
        return self.random([b for b in able if self.held[b].domain == best])


@pytest.mark.parametrize("rule", sorted(ASKING))
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_agrees_with_the_slow_one(rule: str, seed: int) -> None:
    draw = SplitMix64(seed)
    loop = LoopPolicy(
        asking=rule,
        bins=2 + draw.below(12),
        asking_tail=draw.below(9) / 8,
        asking_typical_first=draw.below(3),
        asking_random_every=draw.below(4),
    )
    state, answered = draw.next(), draw.below(4)
    buffer = Buffer(loop.bins, DOMAINS, HIDDEN)
    slow = Slow(loop, SplitMix64(state), answered)
    for number in range(1, 20):
        scores = Scores(draw.below(9) / 8, 0.0, 0.0)
        heading = np.array([draw.below(21) - 10 for _ in range(HIDDEN)], np.int64) * STEP
        new = Candidate(f"d{number}", number, draw.below(DOMAINS), scores, heading, draw.below(5))
        buffer.see(new)
        slow.observed.append(new)
        if draw.below(3):
            bin = draw.below(loop.bins)
            buffer.put(bin, new)
            slow.held[bin] = new
            if draw.below(3) == 0:
                buffer.ask(bin)
                slow.asked.append(new)
    now = Situation(buffer, SplitMix64(state), loop, len(slow.asked), answered)
    able = [b for b in sorted(slow.held) if slow.held[b] not in slow.asked]
    before = (buffer.was_asked.copy(), buffer.asked.total)
    while able:
        chosen = find_asking_rule(rule)(now, np.array(able))
        assert chosen == slow.choose(rule, able)
        assert now.stream.state == slow.stream.state
        if chosen is None:
            break
        now.note(chosen)
        slow.asked.append(slow.held[chosen])
        able.remove(chosen)
    assert (buffer.was_asked == before[0]).all()
    assert (buffer.asked.total == before[1]).all()


def test_an_unknown_rule_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match=r"'best'.*expected one of entry, random, longest, typical"):
        open_toy(tmp_path, replace(small_policy(), asking="best"))


class Days:
    """A clock that is set by hand."""

    day = 0

    def __call__(self) -> Moment:
        return Moment(float(self.day), self.day)


def told(number: int) -> Dialogue:
    """Two exchanges with something in them, and a farewell."""
    turns = ("oven tree", f"bread {'run ' * (number % 5)}salt", "fever sun", "nurse walk")
    closing = ("Thanks, that's all!", "Good bye")
    texts = (*turns, *closing)
    roles = ("user", "assistant")
    return Dialogue(
        f"d{number}",
        tuple(Turn(roles[n % 2], text) for n, text in enumerate(texts)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("rule", WHOLE_BUFFER)
def test_a_days_questions(tmp_path: Path, rule: str) -> None:
    """Chosen at the first call of a day, once, and the same after a restart; never twice."""
    policy = replace(
        small_policy("fifo", bins=12),
        asking=rule,
        questions_per_day=3,
        question_days=2,
        asking_tail=0.0,
    )
    clock = Days()
    with open_toy(tmp_path, policy, clock=clock) as app:
        for number in range(12):
            assert not app.observe(told(number)).asked
        assert app.pending_questions() == ()  # the store was empty when the day began
        clock.day = 1
        first = app.pending_questions()
        assert len(first) == 3
        assert {(q.exchange, q.reply) for q in first} == {(1, "nurse walk")}
        assert app.pending_questions() == first
        app.answer(first[0].id, "sleep")
    with open_toy(tmp_path, policy, clock=clock) as app:
        assert app.pending_questions() == first[1:]
        clock.day = 0  # back over midnight
        assert app.pending_questions() == first[1:]
        clock.day = 2
        app.observe(told(12))  # the first call of the day
        second = app.pending_questions()
        assert len(second) == 5
        assert set(first[1:]) < set(second)
        clock.day = 3
        third = app.pending_questions()
        assert not set(third) & set(first)  # lapsed after two days
        assert len(third) == 6
        asked = [line.id for line in app.store.log() if line.event == "asked"]
        assert len(asked) == len(set(asked)) == app.status().questions_asked == 9
        lapsed = {line.id for line in app.store.log() if line.event == "lapsed"}
        assert lapsed == {q.id for q in first[1:]}
        assert app.status().questions_lapsed == 2
        with pytest.raises(LoopError, match="has lapsed, or the set has left"):
            app.answer(first[1].id)
        stored = app.store.rows("SELECT exchange, answer FROM annotations")
        assert stored == [(1, "sleep")]


def test_a_days_questions_do_not_depend_on_when_it_is_opened(tmp_path: Path) -> None:
    def life(folder: Path, pieces: int) -> list[object]:
        clock, policy = Days(), replace(small_policy("typical"), asking="dual", question_days=1)
        for part in np.array_split(np.arange(80), pieces):
            with open_toy(folder, policy, clock=clock) as app:
                for number in map(int, part):
                    clock.day = number // 10
                    app.observe(told(number))
                    for question in app.pending_questions()[:2]:
                        app.answer(question.id, None if number % 2 else "walk")
                tables = ("sets", "questions", "annotations", "tallies", "streams", "counters")
                rows = [app.store.rows(f"SELECT * FROM {table}") for table in tables]
                log = [(line.event, line.id, line.data) for line in app.store.log()]
        return [*rows, log]

    assert life(tmp_path / "one", 1) == life(tmp_path / "many", 16)


def test_a_clock_that_goes_back(tmp_path: Path) -> None:
    """Over midnight it does not begin the day's questions anew; by years it keeps none open."""
    policy = replace(small_policy("fifo", bins=8), questions_per_day=2, question_days=2)
    clock, numbers = Days(), count()
    with open_toy(tmp_path, policy, clock=clock) as app:

        def asked_on(day: int) -> int:
            clock.day = day
            return sum(app.observe(told(next(numbers))).asked for _ in range(3))

        assert [asked_on(day) for day in (9000, 9001, 9000, 9001, 9000)] == [2, 2, 0, 0, 0]
        assert [asked_on(day) for day in (20, 20, 21)] == [2, 0, 2]
        clock.day = 22
        open_now = app.store.rows("SELECT day FROM questions ORDER BY day")
        assert open_now == [(20,)] * 6 + [(21,)] * 2
        app.pending_questions()
        assert app.store.rows("SELECT day FROM questions") == [(21,)] * 2


def test_what_is_asked_about_does_not_leave(tmp_path: Path) -> None:
    policy = replace(small_policy("fifo", bins=4), questions_per_day=2, question_days=2)
    clock = Days()
    with open_toy(tmp_path, policy, clock=clock) as app:
        for number in range(10):
            app.observe(told(number))
        stored = {row[0] for row in app.store.rows("SELECT id FROM sets")}
        assert stored == {"d0", "d1", "d8", "d9"}
        app.answer("d0")
        clock.day = 2
        reasons = [app.observe(told(number)).reason for number in range(10, 14)]
        assert reasons == ["oldest"] * 4
        stored = {row[0] for row in app.store.rows("SELECT id FROM sets")}
        # d0 is answered, and no fine-tuning has used it; d1's question has lapsed
        assert stored == {"d0", "d10", "d11", "d13"}
        for question in app.pending_questions():
            app.answer(question.id)
        clock.day = 4
        app.observe(told(14))
        assert app.observe(told(15)).reason == "asked_about"  # all four are asked about


def test_only_closings_and_what_cannot_be_learnt_are_not_asked_about(tmp_path: Path) -> None:
    with open_toy(tmp_path) as app:
        farewell = Dialogue("x", (Turn("user", "Thank you, bye"), Turn("assistant", "Bye")))
        decision = app.observe(farewell)
        assert (decision.kept, decision.asked, decision.exchange) == (True, False, None)
        decision = app.observe(told(1))
        assert (decision.asked, decision.exchange) == (True, 1)
        (question,) = app.pending_questions()
        assert (question.id, question.exchange, question.reply) == ("d1", 1, "nurse walk")


def test_the_answered_exchange_is_what_is_learnt(tmp_path: Path) -> None:
    with open_toy(tmp_path) as app:
        app.observe(told(1))
        app.answer("d1", "rest and water")
        (item,) = annotated_sets(app.store)
        assert item.dialogue.turns == (*told(1).turns[:3], Turn("assistant", "rest and water"))
        app.observe(told(2))
        app.answer("d2")
        assert annotated_sets(app.store)[1].dialogue.turns == told(2).turns[:4]
        line = app.store.log()[-1]
        assert (line.event, line.data["exchange"], line.data["acceptable"]) == ("answered", 1, True)
