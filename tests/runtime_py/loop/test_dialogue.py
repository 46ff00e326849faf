"""What may enter the loop, what may not, and that every refusal is a sentence that helps."""

from __future__ import annotations

import unicodedata

import pytest

from runtime_py.loop.dialogue import (
    Dialogue,
    Turn,
    check,
    cut,
    turns_from_json,
    turns_to_json,
    unusable_character,
)
from runtime_py.loop.errors import LoopError


def made(*contents: str, id: str = "a") -> Dialogue:
    roles = ("user", "assistant")
    return Dialogue(id, tuple(Turn(roles[n % 2], c) for n, c in enumerate(contents)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["Zażółć gęślą jaźń", "我喜欢面包。", "مرحبا\u200f بالعالم", "👩‍👩‍👧 ok\n\tyes", "x" * 100_000],
)
def test_any_language_passes(text: str) -> None:
    assert check(made(text, text)).text == f"{text}\n{text}"


@pytest.mark.parametrize(
    ("dialogue", "message"),
    [
        (made(), "has no turns"),
        (made("hi"), "ends with a user's turn"),
        (made("hi", " \n"), "turn 2 of dialogue 'a' is empty"),
        (made("hi", "a\ud800b"), "lone surrogate .U.D800. at character 2"),
        (made("hi\x00", "b"), "control character U.0000 at character 3"),
        (made("hi\x1b[0m", "b"), "U.001B"),
        (made("hi", "b", id=""), "id is ''"),
        (made("hi", "b", id="x" * 257), "1 to 256 characters"),
        (made("hi", "b", id="a\nb"), "the id of a dialogue has the control character"),
        (Dialogue(7, made("a", "b").turns), "id is 7"),  # type: ignore[arg-type]
        (Dialogue("a", made("a", "b").turns[::-1]), "turn 1 .* role 'assistant'; expected 'user'"),
        (Dialogue("a", (Turn("system", "a"),)), "role 'system'"),  # type: ignore[arg-type]
        (Dialogue("a", (Turn("user", None),)), "content None; expected a string"),  # type: ignore[arg-type]
    ],
)
def test_bad_dialogues(dialogue: Dialogue, message: str) -> None:
    with pytest.raises(LoopError, match=message):
        check(dialogue)


def test_cut_keeps_whole_exchanges() -> None:
    four = made("aa", "bb", "cc", "ź" * 10)  # 7 + 7 + 7 + 25 bytes
    assert four.bytes == 46
    assert cut(four, 46) is four
    assert cut(four, 45) == made("aa", "bb")
    assert cut(four, 14) == made("aa", "bb")
    assert cut(four, 13) is None
    assert cut(made("x" * 100_000, "b", "c", "d"), 22_000) is None


def test_turns_survive_json() -> None:
    turns = made('a"\\\n', "👍 ź").turns
    assert turns_from_json(turns_to_json(turns)) == turns


def test_what_counts_as_a_control_character_or_a_surrogate() -> None:
    """By Unicode's own categories, over all characters."""
    odd = {chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cs")}
    found = {c for c in map(chr, range(0x110000)) if unusable_character(c, "") is not None}
    assert found == odd
    assert unusable_character("a\tb\nc\r\x85") is None
    assert unusable_character("a\n\x00").start() == 2
