"""Paraphrases: what is taken from a reply, what is refused, and which seeds it costs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.policy import BRACKETS, LoopPolicy
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.synthesis import Paraphrase, paraphrase, synthesize, taken
from tests.runtime_py.loop.toy import ToyEngine, dialogue


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("[a]", "a"),
        ("Sure: [ a b ] and [c]", "a b"),
        ("] [a] b", "a"),
        ("[a [b] c]", "a [b"),
        ("[]", ""),
        ("[a", None),
        ("a]", None),
        ("", None),
    ],
)
def test_between_brackets(reply: str, text: str | None) -> None:
    assert taken(reply, "[", "]") == text


MARKS = st.text("ab[]\n", max_size=3)


@given(st.text("ab[] \n", max_size=20), MARKS, MARKS)
def test_what_is_taken_is_what_a_pattern_matches(reply: str, begin: str, end: str) -> None:
    """``re`` says the same: the shortest match from the first begin to the next end."""
    until = re.escape(end) if end else r"\Z"
    found = re.search(f"{re.escape(begin)}(.*?){until}", reply, re.DOTALL)
    assert taken(reply, begin, end) == (found[1].strip() if found else None)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), MARKS, MARKS)
def test_a_text_between_its_marks_is_found(
    before: str, text: str, behind: str, begin: str, end: str
) -> None:
    assume(begin not in before + begin[:-1] and not (end and end in text + end[:-1]))
    reply = f"{before if begin else ''}{begin}{text}{end}{behind if end else ''}"
    assert taken(reply, begin, end) == text.strip()


class Script(ToyEngine):
    """Gives prepared replies, and keeps what it was asked."""

    def __init__(self, replies: Sequence[str]) -> None:
        super().__init__()
        self.replies, self.asked = list(replies), []

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        self.asked.append((messages, temperature, seed, max_new_tokens, prefix))
        return self.replies[len(self.asked) - 1]


IN_BRACKETS = LoopPolicy(
    paraphrase_prompt=BRACKETS, paraphrase_prefix="", paraphrase_begin="[", paraphrase_end="]"
)


def test_tries_until_one_lies_within_the_bounds() -> None:
    text = "one two three four"
    engine = Script(["no brackets", "[one two three four]", "[one two five]"])
    stream, plain = SplitMix64(3), SplitMix64(3)
    found = paraphrase(text, engine, stream, IN_BRACKETS)
    assert found is not None
    assert (found.text, found.tries) == ("one two five", 3)
    assert found.rouge1 == 4 / 7
    seeds = [plain.next() >> 1 for _ in range(3)]
    assert [asked[2] for asked in engine.asked] == seeds
    assert found.seed == seeds[2]
    assert stream.state == plain.state
    asked = BRACKETS.replace("{text}", text)
    assert engine.asked[0] == ((Turn("user", asked),), 0.5, seeds[0], 256, "")


def test_the_reply_is_begun_and_the_text_stands_where_the_prompt_says() -> None:
    """Also a text that has the mark of the place in it."""
    loop = LoopPolicy(paraphrase_prompt="Say {text} again.", paraphrase_prefix="Again:")
    engine = Script([" three {text} one\n"])
    found = paraphrase("one {text} two", engine, SplitMix64(3), loop)
    assert found is not None
    assert found.text == "three {text} one"
    assert engine.asked[0][0] == (Turn("user", "Say one {text} two again."),)
    assert engine.asked[0][4] == "Again:"


@pytest.mark.parametrize("use", ["question", "answer"])
def test_the_one_that_is_not_rewritten_stays(use: str) -> None:
    source = Dialogue("d", (Turn("user", "one two three"), Turn("assistant", "four five six")))
    engine, stream, plain = Script(["one two four five"]), SplitMix64(9), SplitMix64(9)
    pair = synthesize(source, engine, stream, LoopPolicy(paraphrase_use=use))
    assert pair is not None
    seed = plain.seed()
    assert stream.state == plain.state  # one draw, and one reply
    rewritten = Paraphrase("one two four five", seed, 4 / 7, 1)
    assert getattr(pair, use) == rewritten
    stays = {"question": ("answer", "four five six"), "answer": ("question", "one two three")}[use]
    assert getattr(pair, stays[0]) == Paraphrase(stays[1], 0, 1.0, 0)


@pytest.mark.parametrize(
    "bad", ["[nothing shared]", "[one two three four]", "[ ]", "[one \x07two]"]
)
def test_gives_up_after_two_retries(bad: str) -> None:
    engine = Script([bad] * 3)
    assert paraphrase("one two three four", engine, SplitMix64(0), IN_BRACKETS) is None
    assert len(engine.asked) == 3


def test_no_answer_is_sought_where_the_question_failed() -> None:
    engine = Script(["none"] * 3)
    assert synthesize(dialogue(1), engine, SplitMix64(0), IN_BRACKETS) is None
    assert len(engine.asked) == 3


def test_a_pair_keeps_what_came_before() -> None:
    long = dialogue(1, exchanges=3)
    pair = synthesize(long, ToyEngine(), SplitMix64(5), LoopPolicy(paraphrase_retries=50))
    assert pair is not None
    made = long.with_exchange("x", pair.question.text, pair.answer.text)
    assert made.turns[:4] == long.turns[:4]
    assert (made.question, made.answer) == (pair.question.text, pair.answer.text)
