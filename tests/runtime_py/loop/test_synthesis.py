"""Paraphrases: what is taken from a reply, what is refused, and which seeds it costs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from runtime_py.loop.dialogue import Turn
from runtime_py.loop.policy import PARAPHRASE, LoopPolicy
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.synthesis import between_brackets, paraphrase, synthesize
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
    assert between_brackets(reply) == text


class Script(ToyEngine):
    """Gives prepared replies, and keeps what it was asked."""

    def __init__(self, replies: Sequence[str]) -> None:
        super().__init__()
        self.replies, self.asked = list(replies), []

    def generate(
        self, messages: Sequence[Turn], *, temperature: float, seed: int, max_new_tokens: int
    ) -> str:
        self.asked.append((messages, temperature, seed, max_new_tokens))
        return self.replies[len(self.asked) - 1]


def test_tries_until_one_lies_within_the_bounds() -> None:
    text = "one two three four"
    engine = Script(["no brackets", "[one two three four]", "[one two five]"])
    stream, plain = SplitMix64(3), SplitMix64(3)
    found = paraphrase(text, engine, stream, LoopPolicy())
    assert found is not None
    assert (found.text, found.tries) == ("one two five", 3)
    assert found.rouge1 == 4 / 7
    seeds = [plain.next() >> 1 for _ in range(3)]
    assert [asked[2] for asked in engine.asked] == seeds
    assert found.seed == seeds[2]
    assert stream.state == plain.state
    assert engine.asked[0] == ((Turn("user", PARAPHRASE + text),), 0.5, seeds[0], 256)


@pytest.mark.parametrize(
    "bad", ["[nothing shared]", "[one two three four]", "[ ]", "[one \x07two]"]
)
def test_gives_up_after_two_retries(bad: str) -> None:
    engine = Script([bad] * 3)
    assert paraphrase("one two three four", engine, SplitMix64(0), LoopPolicy()) is None
    assert len(engine.asked) == 3


def test_no_answer_is_sought_where_the_question_failed() -> None:
    engine = Script(["none"] * 3)
    assert synthesize(dialogue(1), engine, SplitMix64(0), LoopPolicy()) is None
    assert len(engine.asked) == 3


def test_a_pair_keeps_what_came_before() -> None:
    long = dialogue(1, exchanges=3)
    pair = synthesize(long, ToyEngine(), SplitMix64(5), LoopPolicy(paraphrase_retries=50))
    assert pair is not None
    made = long.with_exchange("x", pair.question.text, pair.answer.text)
    assert made.turns[:4] == long.turns[:4]
    assert (made.question, made.answer) == (pair.question.text, pair.answer.text)
