"""The study's engine and tuner on a tiny bundle: AdamW, and what depends on what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime_py.bundle.adapter_forms import read_values, to_runtime
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.general_text import read_general
from runtime_py.bundle.manifest import Optimizer
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.retention import general_examples
from runtime_py.engine.streaming import step_numbers
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.protocols import Embedding, FineTuneJob
from tests import tiny
from tests.runtime_py.engine.toy import dialogue
from tests.toolchain.study.tiny_bundle import LENGTHS, RANK, SIZE, TARGETS, tiny_bundle
from toolchain.study import batched_loop
from toolchain.study.batched_loop import BatchedEngine, BatchedFineTuner, BatchedTraining
from toolchain.study.batched_model import BatchedModel
from toolchain.study.general import ForgettingMeter
from toolchain.verify.divergence import measure
from toolchain.verify.reference_engines import torch_update

BETAS = (0.9, 0.999)
OPTIMIZER = Optimizer(beta1=BETAS[0], beta2=BETAS[1], epsilon=1e-8)
SHORT, LONG = dialogue("the cat", "sat", id="s"), dialogue("the other mat " * 9, "on it", id="l")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BatchedModel:
    bundle = open_bundle(tiny_bundle(tmp_path_factory.mktemp("bundle")))
    return BatchedModel(bundle, torch.device("cpu"))


def values(model: BatchedModel) -> dict[str, np.ndarray]:
    return read_values(model.bundle.adapter_file, model.shape.tensors)


def test_an_update_is_that_of_torch(model: BatchedModel) -> None:
    """Three steps, A and B at rates of their own, with decay, the first one clipped."""
    random = np.random.default_rng(1)
    states = [AdapterState.of(model.shape.tensors, values(model)) for _ in range(2)]
    training = BatchedTraining(model, OPTIMIZER)
    begun = states[0].parameters.copy()
    for step in (1, 2, 3):
        gradient = random.normal(0, 3.0 if step == 1 else 0.01, begun.shape).astype(np.float32)
        gradient.reshape(-1)[sum(v.size for v in states[0].layout.views(begun).values()) :] = 0
        numbers = step_numbers(step, 4, (1e-3, 8e-3), 0.1, 1.0, BETAS)
        norms = (
            training.update(states[0], gradient, numbers),
            torch_update(OPTIMIZER, states[1], gradient, numbers),
        )
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert (norms[0] > 1.0) == (step == 1)
    moved = np.abs(states[1].parameters - begun).max()
    assert moved > 1e-2  # three steps of B's rate
    for name in ("parameters", "mean", "square"):
        ours, theirs = (getattr(state, name) for state in states)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * moved)
    assert [state.step for state in states] == [3, 3]


def test_a_step_without_a_number_changes_nothing(model: BatchedModel) -> None:
    state = AdapterState.of(model.shape.tensors, values(model))
    begun = state.parameters.copy()
    gradient = np.full_like(begun, np.nan)
    numbers = step_numbers(1, 1, (1e-3, 1e-3), 0.0, 1.0, BETAS)
    assert np.isnan(BatchedTraining(model, OPTIMIZER).update(state, gradient, numbers))
    assert np.array_equal(state.parameters, begun)
    assert state.step == 0


def job(model: BatchedModel, steps: int = 4) -> FineTuneJob:
    return FineTuneJob(
        number=1, training=(SHORT, LONG), stopping=(), guard=(SHORT,),
        parent=model.bundle.adapter_file, seed=1, steps=steps, learning_rate=0.05,
        b_rate_ratio=1.0, batch=2, check_every=4, max_sequence_tokens=128,
    )  # fmt: skip


def test_training_leaves_the_adapter_in_use_as_it_was(model: BatchedModel, tmp_path: Path) -> None:
    """What was trained may be refused: the model must go on writing with the old one."""
    engine, tuner = BatchedEngine(model), BatchedFineTuner(model)
    engine.use_adapter(model.bundle.adapter_file)
    examples = [batched_loop.example(one, model.text, last_only=True) for one in (SHORT, LONG)]
    before = model.losses(examples)
    result = tuner.run(job(model), tmp_path, lambda: False)
    assert result is not None
    assert len(result.losses) == 4
    assert np.array_equal(model.losses(examples), before)
    engine.use_adapter(result.adapter)
    assert np.abs(model.losses(examples) - before).max() > 1e-2


def test_vectors_do_not_depend_on_what_was_embedded_before(model: BatchedModel) -> None:
    """The same list gives the same bits in a worker that has seen other lists."""
    other = [LONG, dialogue("and then", "there", id="o")]
    fresh, used = BatchedEngine(model), BatchedEngine(model)
    fresh.prepare([SHORT, LONG])
    used.prepare(other)
    used.embed(SHORT)
    later = used.with_estimator("norm")
    later.prepare([SHORT, LONG])
    for one in (SHORT, LONG):
        found, expected = later.embed(one), fresh.embed(one)
        assert np.array_equal(found.pooled, expected.pooled)
        assert found.entropy == expected.entropy
    assert later.embed(SHORT) is later.embed(SHORT)


def test_a_list_that_was_embedded_is_not_embedded_again(
    model: BatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, str]] = []
    embed = model.embed

    def counted(dialogues: Sequence[Dialogue], estimator: str = "norm") -> list[Embedding]:
        calls.append((len(dialogues), estimator))
        return embed(dialogues, estimator)

    monkeypatch.setattr(model, "embed", counted)
    monkeypatch.setattr(batched_loop, "LISTS_KEPT", 2)
    engine = BatchedEngine(model)
    engine.prepare([SHORT, LONG])
    engine.with_estimator("norm").prepare([SHORT, LONG])
    engine.with_estimator("renyi2").prepare([SHORT, LONG])
    assert calls == [(2, "norm"), (2, "renyi2")]
    engine.prepare([LONG])  # one list too many: the oldest goes
    engine.with_estimator("norm").prepare([SHORT, LONG])
    assert calls[2:] == [(1, "norm"), (2, "norm")]


def test_forgetting_is_that_of_peft(model: BatchedModel, tmp_path: Path) -> None:
    """Against Hugging Face's model with PEFT's adapter, one sequence at a time."""
    base = tiny.hugging_face("llama", **SIZE)
    peft = tiny.adapted(tiny.hugging_face("llama", **SIZE), TARGETS, RANK)
    peft.save_pretrained(str(tmp_path))
    texts = read_general(model.bundle)
    examples = general_examples(texts, model.text, LENGTHS[0], 40)
    expected = measure(lambda t: peft(t).logits, lambda t: base(t).logits, examples)
    general = ForgettingMeter(model, examples)
    model.set_values(to_runtime(read_peft(tmp_path), model.shape.tensors))
    found = general.forgetting()
    assert found.labels == expected.labels == 40
    assert found.base_perplexity == pytest.approx(expected.base_perplexity, rel=1e-5)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert abs(found.ratio) > 0.01
    model.set_values(values(model))  # B is zero: the base
    assert (general.forgetting().ratio, general.forgetting().kl) == (0.0, 0.0)
