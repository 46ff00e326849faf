"""A cheap engine for runs of training, a state of 18 numbers, and a chat in a tiny tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import Example
from runtime_py.engine.streaming import StepNumbers
from runtime_py.loop.dialogue import Dialogue, Turn
from tests import tiny


class Toy:
    """A quadratic: exact, and different for every sequence. ``fail``: the call whose loss is no
    number; ``script``: what ``loss`` finds after each step, in place of the quadratic's."""

    capacity = 64

    def __init__(self, fail: int | None = None, script: Sequence[float] | None = None) -> None:
        self.calls, self.fail, self.script = 0, fail, script

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        if self.script is not None:
            return self.script[state.step] * len(examples), len(examples)
        return self.gradient(state, examples, state.layout.zeros())

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        self.calls += 1
        if self.calls == self.fail:
            return math.nan, 1
        total, slopes = 0.0, state.layout.views(into)
        for one in examples:
            for name, values in state.layout.views(state.parameters).items():
                off = values - np.float32(one.tokens.sum() % 7)
                slopes[name] += 2 * off
                total += float((off.astype(np.float64) ** 2).sum())
        return total, sum(e.count for e in examples)

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        state.replace(
            state.parameters - np.float32(numbers.rates[0]) * np.sign(gradient),
            state.mean + gradient,
            state.square + 1,
        )
        return float(np.abs(gradient).max())


def toy_state() -> AdapterState:
    tensor = m.AdapterTensor(name="layers.0.x.lora_A", peft="p", rows=(0, 2), shape=(1, 2, 9))
    values = {tensor.name: np.arange(18, dtype=np.float32).reshape(1, 2, 9)}
    return AdapterState.of([tensor], values)


def chat_text(folder: Path) -> ChatText:
    tiny.bpe(320).save(str(folder / "tokenizer.json"))
    own = m.Tokenizer(file="tokenizer.json", bos_id=1, eos_ids=(2,), pad_id=0, chat=tiny.CHAT)
    manifest = SimpleNamespace(tokenizer=own, model=SimpleNamespace(context=512))
    return ChatText.of(Bundle(folder, cast(m.Manifest, manifest)))


def dialogue(*contents: str, id: str = "d") -> Dialogue:
    roles = ("user", "assistant")
    return Dialogue(id, tuple(Turn(roles[i % 2], c) for i, c in enumerate(contents)))
