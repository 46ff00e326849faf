"""Policy fields, presets, lexicons, and the small decisions: asking, holding out, schedule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from runtime_py.loop.annotation import check_answer, has_lapsed, is_held_out, learnt, may_ask
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import AnswerTooLong, LoopError
from runtime_py.loop.lesson import Capacity
from runtime_py.loop.lexicons import make_lexicons, read_lexicons
from runtime_py.loop.policy import BRACKETS, LoopPolicy
from runtime_py.loop.presets import _DAC2024, PRESETS, preset
from runtime_py.loop.schedule import (
    Conditions,
    is_due,
    next_shorter,
    obstacles,
    sequence_tokens,
)
from tests.runtime_py.loop.toy import NIGHT, dialogue


def _exchange(question: str, answer: str) -> tuple[Turn, Turn]:
    return Turn("user", question), Turn("assistant", answer)


def test_json_round_trip() -> None:
    policy = LoopPolicy(selection="attune", bins=3, age_fills=2.5, question="Gut?")
    assert LoopPolicy.from_json(policy.to_json()) == policy
    assert LoopPolicy.from_json("{}") == LoopPolicy()
    assert LoopPolicy.from_json('{"crowding": 1}').crowding == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bin": 3, "seeds": 1}', "unknown fields: bin, seeds; it knows selection, seed"),
        ("[1]", "JSON list; expected an object"),
        ("{", "not JSON"),
        ('{"bins": "3"}', "bins is '3', expected a int"),
        ('{"bins": true}', "bins is True"),
        ('{"bins": 0}', "bins is 0, expected 1 to 16384"),
        ('{"seed": -1}', "seed is -1"),
        ('{"learning_rate": NaN}', "learning_rate is nan"),
        ('{"rouge1_lowest": 0.95}', "at most rouge1_highest"),
        ('{"shortest_sequence_tokens": 1024}', "at most longest_sequence_tokens"),
        ('{"fewest_steps": 49, "most_steps": 48}', "fewest_steps is 49, expected at most most_st"),
        ('{"guard_false_acceptance": 1.5}', "guard_false_acceptance is 1.5, expected 0 to 1"),
        ('{"check_every_steps": 0, "b_rate_ratio": 0}', "b_rate_ratio is 0.*check_every_steps is"),
        ('{"bins": 0, "batch": 0}', "bins is 0.*batch is 0"),
        ('{"question": ""}', "question is ''"),
        ('{"paraphrase_prompt": "Say it otherwise: "}', "{text} in it once"),
        ('{"paraphrase_prompt": "{text} or {text}"}', "{text} in it once"),
        ('{"paraphrase_use": "all"}', "paraphrase_use is 'all', expected both, question, answer"),
    ],
)
def test_bad_policies(text: str, message: str) -> None:
    with pytest.raises(LoopError, match=message):
        LoopPolicy.from_json(text)


def test_the_designs_defaults() -> None:
    policy = LoopPolicy()
    assert policy.bins * policy.bin_bytes == 2816 * 1024
    assert BRACKETS.endswith("use [ ] to hold your generated response: {text}")
    assert dataclasses.fields(LoopPolicy)[0].name == "selection"
    assert (policy.paraphrases, policy.paraphrase_use, policy.paraphrase_retries) == (
        0, "question", 2,
    )  # fmt: skip


def test_builtin_lexicons_are_clean() -> None:
    lexicons = read_lexicons()
    assert lexicons.domains == (
        "cooking",
        "emotion",
        "finance",
        "medical",
        "safety",
        "technology",
        "travel",
    )
    assert lexicons.names[-1] == "other"
    assert lexicons.hits(["acorn", "squash", "with", "ibuprofen"])[0] == 2


def test_bad_lexicons(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="has no lexicons"):
        read_lexicons(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(LoopError, match="is not UTF-8"):
        read_lexicons(tmp_path)
    with pytest.raises(LoopError, match="'a' has no words"):
        make_lexicons({"a": ["...", ""]})
    with pytest.raises(LoopError, match="called 'other'"):
        make_lexicons({"other": ["x"]})


def test_questions_a_day() -> None:
    policy = LoopPolicy(questions_per_day=2)
    assert [may_ask(n, policy) for n in range(4)] == [True, True, False, False]


def test_one_in_five_is_held_out_and_the_first() -> None:
    policy, held, pattern = LoopPolicy(heldout_every=5), 0, []
    for count in range(1, 13):
        out = is_held_out(count, held, policy)
        held += out
        pattern.append(out)
    assert [n for n, out in enumerate(pattern, start=1) if out] == [1, 6, 11]
    assert is_held_out(4, 0, policy)  # the one there was has left the buffer


def test_answers() -> None:
    one = dialogue(1, exchanges=3)
    assert learnt(one, 2, None) == one
    assert learnt(one, 2, "better").turns == (*one.turns[:-1], Turn("assistant", "better"))
    assert learnt(one, 0, None).turns == one.turns[:2]
    assert learnt(one, 1, "better").turns == (*one.turns[:3], Turn("assistant", "better"))
    wide = Capacity(lambda dialogue: 1, longest=1)
    check_answer(one, 1, None, 0, wide)
    with pytest.raises(LoopError, match="is empty"):
        check_answer(one, 1, "  ", 10_000, wide)
    reply = len(one.turns[3].content)
    longest = "x" * (reply + 10_000 - one.bytes)  # the whole set stays in its bin
    check_answer(one, 1, longest, 10_000, wide)
    with pytest.raises(AnswerTooLong, match=r"which is 1 more than its bin has left"):
        check_answer(one, 1, f"{longest}x", 10_000, wide)


def test_an_answer_that_cannot_be_learned_is_refused() -> None:
    one = Dialogue("d", (*dialogue(1, exchanges=2).turns[:2], *_exchange("a b c", "d e")))
    words = Capacity(lambda dialogue: len(dialogue.text.split()), longest=6)
    check_answer(one, 1, "better still now", 10_000, words)
    with pytest.raises(AnswerTooLong, match="2 of dialogue 'd' has 7 tokens with this answer, and"):
        check_answer(one, 1, "one two three four", 10_000, words)
    with pytest.raises(AnswerTooLong, match="has 5 tokens with this answer, and at most 4 can"):
        check_answer(one, 1, None, 10_000, words.within(4))


def test_questions_lapse() -> None:
    policy = LoopPolicy(question_days=3)
    assert [has_lapsed(4, day, policy) for day in (3, 4, 6, 7, 8)] == [False] * 3 + [True] * 2


def test_schedule() -> None:
    policy = LoopPolicy()
    assert not is_due(799, 0, policy)
    assert is_due(800, 0, policy)
    assert not is_due(1500, 800, policy)
    assert obstacles(NIGHT, policy) == []
    hot = Conditions(charging=False, idle=False, celsius=41.5, free_memory_mb=0)
    assert obstacles(hot, policy) == [
        "the device is not charging",
        "the device is in use",
        "the device has 41.5 °C, over 38",
    ]
    unknown = Conditions(charging=True, idle=True, celsius=float("nan"), free_memory_mb=0)
    assert len(obstacles(unknown, policy)) == 1


def test_sequences_have_the_length_of_a_program() -> None:
    policy, lengths = LoopPolicy(), (48, 64, 100, 320, 512)
    free = {150: 512, 149: 320, 94: 320, 93: 100, 30: 100, 29: 64, 19: 64, 18: None, 0: None}
    assert {mb: sequence_tokens(lengths, 512, mb, policy) for mb in free} == free
    assert sequence_tokens(lengths, 320, 1000, policy) == 320  # a job that has begun so
    assert sequence_tokens((256, 1024), 512, 1000, policy) == 512  # as the policy has it
    assert sequence_tokens((1024,), 512, 149, policy) is None
    assert sequence_tokens((32,), 32, 1000, policy) == 32  # there is no program for the shortest
    assert [next_shorter(lengths, n, policy) for n in (512, 400, 100, 64)] == [320, 320, 64, None]


def test_presets_state_every_field() -> None:
    assert set(_DAC2024) == {field.name for field in dataclasses.fields(LoopPolicy)}
    paper = preset("dac2024")
    assert (paper.batch, paper.epochs, paper.learning_rate) == (128, 3, 3e-4)
    assert sorted(PRESETS) == ["dac2024"]
    with pytest.raises(LoopError, match="no preset 'dac' of a policy; there are dac2024"):
        preset("dac")


def test_policy_is_json_that_other_languages_read() -> None:
    assert json.loads(LoopPolicy().to_json())["age_fills"] == 50.0
