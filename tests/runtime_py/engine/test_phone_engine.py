"""Prompts and drawing tokens: what the phone's engine does besides running programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chisquare

from runtime_py.bundle.chat_pieces import UNSAID
from runtime_py.bundle.chat_text import ChatText, Tokens
from runtime_py.engine import phone_engine
from runtime_py.engine.phone_engine import PhoneEngine, sample
from runtime_py.loop.dialogue import Turn
from runtime_py.loop.errors import PromptTooLong
from runtime_py.loop.random_stream import SplitMix64

LOGITS = np.array([0.3, -1.0, 2.0, 0.0, 1.1], np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_as_often_as_softmax_says(temperature: float) -> None:
    chance, draws = SplitMix64(3), 20_000
    found = Counter(sample(LOGITS, temperature, chance) for _ in range(draws))
    expected = softmax(LOGITS.astype(np.float64) / temperature) * draws
    assert chisquare([found[i] for i in range(5)], expected).pvalue > 1e-3


def test_the_same_seed_draws_the_same_tokens() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    one, other = SplitMix64(9), SplitMix64(9)
    assert [sample(row, 0.5, one) for row in rows] == [sample(row, 0.5, other) for row in rows]


def test_temperature_zero_draws_nothing() -> None:
    chance = SplitMix64(5)
    assert sample(LOGITS, 0.0, chance) == 2
    assert chance.state == 5


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    chance = SplitMix64(1)
    assert {sample(logits, 1.0, chance) for _ in range(200)} == {1}


class Words(ChatText):
    """A chat text whose tokens are words, and a model that says 7 and is asked for no more than its
    context holds."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.read: list[int] = []

    @classmethod
    def of(cls, bundle: Any) -> Words:
        return cls(bundle.manifest.model.context)

    def tokens(self, turns: Sequence[Turn], reply: bool = False, prefix: str = "") -> Tokens:
        ids = [int(word) for turn in turns for word in turn.content.split()]
        return Tokens(ids, [UNSAID] * len(ids))

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.read = tokens[0].tolist()
        return torch.eye(10)[7:8]

    def forward(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        assert position < self.context
        return torch.eye(10)[7:8]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> PhoneEngine:
    """Of a bundle with a context of 8 tokens."""
    manifest = SimpleNamespace(
        model=SimpleNamespace(context=8), tokenizer=SimpleNamespace(eos_ids=[0])
    )
    android = SimpleNamespace(lm="lm.pte", adapter="adapter.ptd")
    monkeypatch.setattr(phone_engine, "ChatText", Words)
    found = PhoneEngine(SimpleNamespace(manifest=manifest, android=android))  # type: ignore[arg-type]
    monkeypatch.setattr(found, "_loaded", lambda method: found.text)
    return found


def reply(engine: PhoneEngine, *messages: str) -> str:
    turns = [
        Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(messages)
    ]
    return engine.generate(turns, temperature=0.0, seed=0, max_new_tokens=3)


def test_the_oldest_exchanges_make_room(engine: PhoneEngine) -> None:
    assert reply(engine, "1 2 3", "4", "5 6") == "7 7"  # six tokens, and two are left
    assert engine.text.read == [1, 2, 3, 4, 5, 6]  # type: ignore[attr-defined]
    assert reply(engine, "1 2 3 4", "5", "6 7 8") == "7 7 7"
    assert engine.text.read == [6, 7, 8]  # type: ignore[attr-defined]
    assert reply(engine, "1 2 3 4 5 6 7") == "7"


def test_a_message_that_fills_the_context_is_refused(engine: PhoneEngine) -> None:
    with pytest.raises(
        PromptTooLong, match="takes 8 tokens, and the model's context holds 8, of w"
    ):
        reply(engine, "1", "2", "1 2 3 4 5 6 7 8")
