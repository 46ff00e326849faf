"""Words, against Python's own regular expressions and by example in several scripts."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.loop.words import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't panic, it’s 42!", ["don't", "panic", "it’s", "42"]),
        ("'quoted' rock'n'roll 90's o'", ["quoted", "rock'n'roll", "90's", "o"]),
        ("don't2 a'1 a''b", ["don't", "2", "a", "1", "a", "b"]),
        ("snake_case x-ray 3.14", ["snake", "case", "x", "ray", "3", "14"]),
        ("ZAŻÓŁĆ gęślą jaźń", ["zażółć", "gęślą", "jaźń"]),
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("我喜欢面包。很好", ["我喜欢面包", "很好"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("ok 👍🏽 ½ Ⅷ ²", ["ok", "½", "ⅷ", "²"]),
        ("ΟΔΟΣ", ["οδος"[:-1] + "ς"]),
        ("", []),
        ("... '’ _", []),
    ],
)
def test_examples(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_regular_expressions_letters_and_numbers_are_ours() -> None:
    """What the next test relies on: ``[^\\W_]`` is L or N, in this Python's Unicode."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    found = set(re.findall(r"[^\W_]", every))
    assert found == {c for c in every if unicodedata.category(c)[0] in "LN"}


@given(
    st.text(st.characters(exclude_categories=("Cs", "Nl", "No")))
    | st.text("aZ9'’ _.é", max_size=30)
)
def test_against_a_regular_expression(text: str) -> None:
    prepared = unicodedata.normalize("NFC", text).lower()
    assert words(text) == re.findall(r"[^\W_]+(?:['’][^\W\d_]+)*", prepared)
