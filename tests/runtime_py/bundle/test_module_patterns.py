"""Patterns of module names against Python's ``re``, and what ``re`` would not come back from."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.bundle.module_patterns import check_pattern, full_match, tail_match
from runtime_py.loop.errors import AdapterError

# As Unsloth writes it, for language layers of text and multi-modal models.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.12.mlp.down_proj",
    "model.language_model.layers.3.self_attn.k_proj",
    "lm_head",
]
_PIECES = st.sampled_from(
    ["a", "b", "_", "1", ".", r"\.", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\b", r"\B", "^",
     "$", r"\A", r"\Z", "[ab]", "[^a1]", r"[\d.]", "[a-c]", "", "\n"]
)  # fmt: skip


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    times = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{3,}"])
    return st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        inner.map(lambda part: f"({part})"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
        st.tuples(inner, times).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


PATTERNS = st.recursive(_PIECES, _grown, max_leaves=8)


@settings(max_examples=1500, deadline=None)
@given(PATTERNS, st.text("ab_1. \né٣", max_size=8))
def test_they_match_what_re_matches(pattern: str, name: str) -> None:
    assert full_match(pattern, name) == (re.fullmatch(pattern, name) is not None)
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert tail_match(pattern, name) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r"^(?!.*language).*(q|k)_proj$",
        r".*\.(q|k)_proj",
        r"model\.layers\.(\d|1[0-2])\..*",
        ".*layers.[02468].*proj",
        "lm_",
    ],
)
def test_patterns_of_real_adapters(pattern: str, name: str) -> None:
    check_pattern(pattern, "here")
    assert full_match(pattern, name) == (re.fullmatch(pattern, name) is not None)
    assert tail_match(pattern, name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r"(\w+)+!", False),
        (r"(a|a)*!", False),
        (r"((((\w*)*)*)*)*", False),
        (r"(?:\w|\.)*", True),
        (r".*.*.*.*.*.*.*.*.*!", False),
        (r"(?:a{0,4000}){4000}", False),
    ],
)
def test_no_pattern_takes_long(pattern: str, matches: bool) -> None:
    name = f"model.layers.0.{'a' * 200}.q_proj"
    check_pattern(pattern, "here")
    start = time.monotonic()
    assert full_match(pattern, name) == matches
    assert time.monotonic() - start < 1


def test_what_would_take_long_is_refused() -> None:
    pattern = "(?:" * 40 + "a?" + "b?)*" * 40
    with pytest.raises(AdapterError, match="too long a work for 'aaaa"):
        full_match(pattern, "aaaa" * 60)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("q_(", "no regular expression: missing"),
        ("a{99999999999999999999}", "no regular expression: the repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "no regular expression: "),
        (r"(a)\1", "with GROUPREF"),
        ("(?<=q).*", "with ASSERT"),
        ("(?<!q)k_proj", "with ASSERT_NOT"),
        ("(?>a*)b", "with ATOMIC_GROUP"),
        ("a*+b", "with POSSESSIVE_REPEAT"),
        ("(a)?(?(1)b|c)", "with GROUPREF_EXISTS"),
        ("(?i)Q_PROJ", "with flags"),
        ("(?i:Q)_proj", "with flags"),
    ],
)
def test_what_remembers_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(words)) as caught:
        check_pattern(pattern, "the config: target_modules")
    assert str(caught.value).startswith("the config: target_modules has ")


def test_flags_inside_what_peft_makes_of_a_key_are_no_regular_expression() -> None:
    with pytest.raises(AdapterError, match="global flags not at the start"):
        check_pattern("(?i)q_proj", "here", tail=True)
