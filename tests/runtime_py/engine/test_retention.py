"""Forgetting: which tokens are measured, perplexity as PyTorch has it, and the λ that is found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.chat_text import Tokens
from runtime_py.bundle.general_text import GeneralText
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.retention import (
    GRID,
    Retention,
    exponential,
    general_examples,
    perplexity,
    retain,
)
from runtime_py.engine.streaming import StepNumbers
from runtime_py.engine.tuning import Lessons, tune
from runtime_py.loop.dialogue import Turn
from runtime_py.loop.errors import TrainingError
from runtime_py.loop.protocols import FineTuneJob

VOCAB = 17


def adapter() -> AdapterState:
    """A and B of one module [rank 2, 5 in, 3 out], and a module with two Bs."""
    shapes = {"x.lora_A": (1, 2, 5), "x.lora_B": (1, 3, 2), "y.lora_B_0": (1, 2, 2)}
    random = np.random.default_rng(3)
    tensors, values = [], {}
    for name, shape in shapes.items():
        tensor = m.AdapterTensor(name=f"layers.0.{name}", peft="p", rows=(0, 1), shape=shape)
        tensors.append(tensor)
        values[tensor.name] = random.standard_normal(shape).astype(np.float32)
    return AdapterState.of(tensors, values)


class Engine:
    """``loss``: nats a label, of how far the adapter's Bs are those that it began with."""

    capacity = 64

    def __init__(self, whole: AdapterState, loss: list[float] | None = None) -> None:
        self._view = "layers.0.x.lora_B"
        self._whole = float(whole.tensors[self._view][0, 0, 0])
        self._losses, self.asked = loss, list[int]()

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        part = float(state.tensors[self._view][0, 0, 0]) / self._whole
        self.asked.append(round(part * GRID))
        count = sum(e.count for e in examples)
        found = 2.0 + part if self._losses is None else self._losses[round(part * GRID)]
        return found * count, count

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        raise NotImplementedError

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        raise NotImplementedError


def example(count: int = 4) -> Example:
    tokens = np.arange(count, dtype=np.int64) % VOCAB
    return Example("e", tokens, np.where(np.arange(count) > 0, tokens, IGNORED))


@given(st.floats(-700, 700))
def test_exponential_is_math_exp(x: float) -> None:
    assert exponential(x) == pytest.approx(math.exp(x), rel=1e-14 * (1 + abs(x)))


def test_exponential_of_what_is_no_number() -> None:
    assert exponential(math.inf) == exponential(1e300) == math.inf
    assert exponential(-math.inf) == 0.0
    assert math.isnan(exponential(math.nan))
    assert exponential(0.0) == 1.0


class Torch(Engine):
    """Random logits, one row a token; an adapter changes nothing."""

    def __init__(self) -> None:
        self.rows = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        total, count = 0.0, 0
        for one in examples:
            logits = self.rows[torch.from_numpy(one.tokens[:-1])].log_softmax(-1)
            labels = one.labels[1:]
            at = np.flatnonzero(labels != IGNORED)
            total -= float(logits[at, labels[at]].sum())
            count += len(at)
        return total, count


def test_perplexity_is_that_of_pytorchs_cross_entropy() -> None:
    engine, examples = Torch(), [example(n) for n in (3, 9, 30, 41)]
    logits = torch.cat([engine.rows[torch.from_numpy(e.tokens[:-1])] for e in examples])
    labels = torch.cat([torch.from_numpy(e.labels[1:]) for e in examples])
    expected = math.exp(F.cross_entropy(logits, labels, ignore_index=IGNORED).item())
    assert perplexity(engine, adapter(), examples) == pytest.approx(expected, rel=1e-6)


@given(
    st.lists(st.floats(0.0, 0.2), min_size=GRID, max_size=GRID),
    st.floats(1e-6, 2.0),
)
def test_the_scale_holds_the_bound_and_the_next_does_not(rises: list[float], bound: float) -> None:
    """For every loss that rises with the scale, whatever its shape."""
    state, losses = adapter(), [2.5]
    for rise in rises:
        losses.append(losses[-1] + rise)
    whole = state.parameters.copy()
    engine = Engine(state, losses)
    found = retain(engine, state, [example()], bound)
    assert found is not None
    steps = round(found.scale * GRID)
    assert math.exp(losses[steps] - losses[0]) <= (1 + bound) * (1 + 1e-12)
    if steps < GRID:
        assert math.exp(losses[steps + 1] - losses[0]) > (1 + bound) * (1 - 1e-12)
    assert found.base == pytest.approx(math.exp(losses[0]))
    assert found.whole == pytest.approx(math.exp(losses[GRID]))
    assert found.scaled == pytest.approx(math.exp(losses[steps]))
    assert found.forgetting <= bound + 1e-9
    assert len(engine.asked) <= 6  # base, whole, and four halvings of sixteen
    views, before = state.tensors, state.layout.views(whole)
    for name, value in before.items():
        factor = np.float32(found.scale) if "lora_B" in name else np.float32(1)
        np.testing.assert_array_equal(views[name], value * factor)


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.0] * 8 + [math.nan] * 9, 7 / 16),
        ([2.0] + [math.inf] * 16, 0.0),
        ([2.0] * 16 + [1.0], 1.0),
    ],
)
def test_a_loss_that_is_no_number_does_not_hold(losses: list[float], scale: float) -> None:
    state = adapter()
    found = retain(Engine(state, losses), state, [example()], 0.03)
    assert found is not None
    assert found.scale == scale


def test_a_base_that_is_no_number_is_refused() -> None:
    state = adapter()
    with pytest.raises(TrainingError, match="general text is nan"):
        retain(Engine(state, [math.nan] * 17), state, [example()], 0.03)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_stopped_between_calls_it_leaves_the_state_as_it_was(calls: int) -> None:
    state = adapter()
    whole = state.parameters.copy()
    engine = Engine(state)
    assert retain(engine, state, [example()], 0.03, lambda: len(engine.asked) >= calls) is None
    np.testing.assert_array_equal(state.parameters, whole)
    assert retain(engine, state, [example()], 0.1) == Retention(
        exponential(2.0), exponential(3.0), 1 / 16, exponential(2.0625)
    )


class Learner(Engine):
    """Each step raises B, and what it raises B by is forgotten: a tenth of a nat a step."""

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        return 1.0, 1

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        parameters = state.parameters.copy()
        state.layout.views(parameters)[self._view][...] += 0.1
        state.replace(parameters, state.mean, state.square)
        return 0.0

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        count = sum(e.count for e in examples)
        return (3.0 + float(state.tensors[self._view].mean())) * count, count


@pytest.mark.parametrize(("bound", "scale"), [(2.0, 1.0), (0.2, 7 / 16)])
def test_a_job_ends_within_its_bound_and_the_guard_judges_what_it_keeps(
    bound: float, scale: float, tmp_path: Path
) -> None:
    """Four steps from a B of zeros: 0.4 nats at λ = 1; ln 1.2 = 0.182 is more than 7/16 of it."""
    state = adapter()
    state.layout.views(state.parameters)["layers.0.x.lora_B"][...] = 0.0
    one = (example(),)
    job = FineTuneJob(
        number=1, training=(), stopping=(), guard=(), parent=tmp_path, seed=1, steps=4,
        learning_rate=0.1, b_rate_ratio=1.0, batch=1, check_every=4, max_sequence_tokens=64,
        forgetting_bound=bound,
    )  # fmt: skip
    engine = Learner(adapter())
    taught = Lessons(one, (), one, general=one)
    optimizer = m.Optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8)
    found = tune(engine, state, job, taught, optimizer, tmp_path, tmp_path, stop=lambda: False)
    assert found is not None
    assert found.scale == scale
    assert found.guard_before == (3.0,)
    assert found.guard_after == pytest.approx((3.0 + 0.4 * scale,))
    assert found.base_perplexity == pytest.approx(math.exp(3.0))
    assert found.perplexity == pytest.approx(math.exp(3.0 + 0.4 * scale))
    assert found.forgetting == pytest.approx(math.exp(0.4 * scale) - 1, rel=1e-5)
    unmeasured = tune(
        engine, adapter(), job, Lessons(one, (), one), optimizer, tmp_path / "b", tmp_path,
        stop=lambda: False,
    )  # fmt: skip
    assert unmeasured is not None
    assert (unmeasured.scale, unmeasured.forgetting) == (1.0, None)


class Letters:
    """A chat text whose tokens are characters; the template begins with "<<"."""

    def tokens(self, turns: Sequence[Turn]) -> Tokens:
        text = "<<" + "".join(f"{turn.role[0]}:{turn.content};" for turn in turns)
        return Tokens(self.encode(text), [])

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


TEXTS = (
    GeneralText("a", (Turn("user", "hi"), Turn("assistant", "ho"))),  # <<u:hi;a:ho;
    GeneralText("b", plain="abcdefgh"),
    GeneralText("c", (Turn("user", "no"), Turn("assistant", "ho"))),
)


def learned(examples: Sequence[Example]) -> list[tuple[str, str, str]]:
    """Id, tokens and labels as text, a dot for none."""
    return [
        (
            e.id,
            "".join(map(chr, e.tokens)),
            "".join("." if label == IGNORED else chr(label) for label in e.labels),
        )
        for e in examples
    ]


def test_the_tokens_that_are_measured() -> None:
    """What all dialogues begin with is no label; plain text goes on from piece to piece."""
    found = general_examples(TEXTS, Letters(), 6, 1000)  # type: ignore[arg-type]
    assert learned(found) == [
        ("a", "<<u:hi;", "....hi;"),
        ("b", "abcdefg", ".bcdefg"),
        ("b", "gh", ".h"),
        ("c", "<<u:no;", "....no;"),
    ]
    assert all(e.inputs <= 6 for e in found)


@given(st.integers(1, 40), st.integers(5, 12))
def test_as_many_tokens_as_were_asked_for(tokens: int, longest: int) -> None:
    """The first of them, whatever the sequences."""
    every = general_examples(TEXTS, Letters(), longest, 1000)  # type: ignore[arg-type]
    whole = "".join(label for _, _, label in learned(every)).replace(".", "")
    some = general_examples(TEXTS, Letters(), longest, tokens)  # type: ignore[arg-type]
    text = "".join(label for _, _, label in learned(some)).replace(".", "")
    assert text == whole[:tokens]
    assert sum(e.count for e in some) == min(tokens, len(whole))


def test_programs_that_hold_nothing_of_it_are_refused() -> None:
    with pytest.raises(TrainingError, match="nothing to measure in sequences of 3 tokens"):
        general_examples(TEXTS[::2], Letters(), 3, 100)  # type: ignore[arg-type]
