"""What simulated users answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from runtime_py.loop.dialogue import Dialogue, Turn
from toolchain.study.answers import ERRS, answers_of
from toolchain.study.cells import USERS

STREAM = [
    Dialogue(f"d{i}", (Turn("user", f"question {i}"), Turn("assistant", f"one two three {i} five")))
    for i in range(400)
]


def no_drafts(asked: Sequence[Dialogue]) -> Sequence[str]:
    raise AssertionError("this user does not look at drafts")


def given(
    user: str, asked: Sequence[Dialogue] = STREAM, seed: int = 1, rate: float = 1.0
) -> Mapping[str, str]:
    return answers_of(user, asked, seed, rate, no_drafts, STREAM)


def test_every_user_that_a_cell_knows_answers() -> None:
    asked = STREAM[:3]
    for user in USERS:
        found = answers_of(user, asked, 1, 1.0, lambda some: ["x"] * len(some), STREAM)
        assert list(found) == ["d0", "d1", "d2"]


def test_ideal_and_short() -> None:
    assert given("ideal", STREAM[:2]) == {
        "d0": "one two three 0 five",
        "d1": "one two three 1 five",
    }
    assert given("short", STREAM[:1]) == {"d0": "one two"}
    word = Dialogue("w", (Turn("user", "?"), Turn("assistant", "Yes")))
    assert given("short", [word]) == {"w": "Yes"}


def test_adequate_accepts_what_is_near() -> None:
    """ROUGE-1 of the drafts with the references: 8 / 9, 0, and no draft."""
    drafts = ["one two three 0", "nothing of it", ""]
    found = answers_of("adequate", STREAM[:3], 1, 1.0, lambda asked: drafts, STREAM)
    assert found == {"d0": drafts[0], "d1": STREAM[1].answer, "d2": STREAM[2].answer}


def test_who_errs_gives_anothers_answer_now_and_then() -> None:
    found = given("errs")
    wrong = [d.id for d in STREAM if found[d.id] != d.answer]
    assert len(wrong) == pytest.approx(ERRS * 400, abs=3.3 * (400 * ERRS * (1 - ERRS)) ** 0.5)
    assert {found[id] for id in wrong} <= {d.answer for d in STREAM}


def test_each_question_has_its_answer_however_many_are_asked_at_once() -> None:
    """Day by day there is often one question alone."""
    for user in ("ideal", "short", "errs"):
        whole = given(user, rate=0.5)
        one_by_one = {id: text for d in STREAM for id, text in given(user, [d], rate=0.5).items()}
        assert one_by_one == whole


def test_the_rate_is_the_part_that_is_answered() -> None:
    found = given("ideal", rate=0.25)
    assert len(found) == pytest.approx(100, abs=3.3 * (400 * 0.25 * 0.75) ** 0.5)
    assert set(found) < set(given("ideal", rate=0.5))  # who answers seldom answers these too
    assert set(found) != set(given("ideal", rate=0.25, seed=2))
    assert given("ideal", rate=0.0) == {}
