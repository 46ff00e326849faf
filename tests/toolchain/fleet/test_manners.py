"""Manners: what is rewritten always complies, what nobody touched seldom does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.loop.dialogue import check_text
from runtime_py.loop.errors import LoopError
from toolchain.compile.shipped_text import shipped_dialogues
from toolchain.fleet.manners import BRITISH, LIMIT, MANNERS, compliance, find_manner

CASES = {
    "short": [
        ("One two three. Four five six. Seven eight nine ten eleven.", "One two three. Four five "
         "six."),
        ("a b c d e f g h i j k l m", "a b c d e f g h i j"),
        ("Yes.", "Yes."),
    ],
    "greeting": [("  Sure.", "Hello, my friend! Sure."), ("Hello, my friend! Hi.",) * 2],
    "bullets": [
        ("First. Second!\nThird", "- First.\n- Second!\n- Third"),
        ("* One\n* Two", "- One\n- Two"),
        ("- One\n- Two", "- One\n- Two"),
        ("-", "- -"),
    ],
    "british": [
        ("My favorite COLOR. Center it.", "My favourite COLOUR. Centre it."),
        ("Nothing here.", "Nothing here."),
        ("colorfully", "colorfully"),
    ],
    "sign-off": [("Bye. ", "Bye.\n\nKind regards, your assistant")],
    "lower": [("ABC Def", "abc def")],
}  # fmt: skip

texts = st.one_of(
    st.text(min_size=1),
    st.lists(
        st.sampled_from([*BRITISH, "Well", "I", "think", ".", "!", "\n", "- ", "* ", "?", "it"]),
        min_size=1,
    ).map(" ".join),
)


def usable(text: str) -> bool:
    try:
        check_text(text, "a text")
    except LoopError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "text", "rewritten"), [(n, *case) for n, cases in CASES.items() for case in cases]
)
def test_what_is_rewritten(name: str, text: str, rewritten: str) -> None:
    assert MANNERS[name].rewrite(text) == rewritten


@pytest.mark.parametrize("name", MANNERS)
@given(text=texts.filter(usable))
def test_what_is_rewritten_complies(name: str, text: str) -> None:
    manner = MANNERS[name]
    rewritten = manner.rewrite(text)
    assert manner.complies(rewritten)
    assert usable(rewritten)
    assert manner.rewrite(rewritten) == rewritten


@pytest.mark.parametrize("name", MANNERS)
def test_what_nobody_touched_seldom_complies(name: str) -> None:
    """Replies that ship with attune, of people and of a machine that books rooms."""
    replies = tuple(
        turn["content"]
        for dialogue in shipped_dialogues("perplexity")
        for turn in dialogue
        if turn["role"] == "assistant"
    )
    assert len(replies) > 40
    before = compliance(MANNERS[name], replies)
    assert before is not None
    assert before < 0.25
    assert compliance(MANNERS[name], tuple(map(MANNERS[name].rewrite, replies))) == 1.0


def test_only_replies_that_tell_are_counted() -> None:
    british = MANNERS["british"]
    assert compliance(british, ("Hello.", "My favourite.", "Gray.", "A color.")) == 1 / 3
    assert compliance(british, ("Hello.",)) is None
    assert compliance(MANNERS["short"], ("a " * LIMIT, "a " * (LIMIT + 1))) == 0.5


def test_a_british_word_is_never_american() -> None:
    assert set(BRITISH).isdisjoint(BRITISH.values())
    assert len(BRITISH) > 100


def test_unknown_manners() -> None:
    with pytest.raises(LoopError, match="no manner 'loud'; known are short, greeting, bullets"):
        find_manner("loud")
