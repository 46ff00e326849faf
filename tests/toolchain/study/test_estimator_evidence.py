"""What estimators say of dialogues, against SciPy's ranks and PyTorch's own training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from runtime_py.bundle.adapter_forms import read_values
from runtime_py.bundle.bundle import open_bundle
from runtime_py.engine.examples import example
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import LoopError
from tests.runtime_py.engine.toy import dialogue
from tests.toolchain.study.tiny_bundle import tiny_bundle
from toolchain.study.batched_model import BatchedModel
from toolchain.study.estimator_evidence import bench_estimators, spearman
from toolchain.study.estimators import ESTIMATORS

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "other", "cat"]
TAUGHT = [
    dialogue(" ".join(WORDS[: 1 + n % 7]), " ".join(WORDS[-1 - n % 9 :]), id=str(n))
    for n in range(14)
]
UNSEEN = [dialogue("the mat", "the other cat sat", id="u"), dialogue("and", "on the mat", id="v")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BatchedModel:
    bundle = open_bundle(tiny_bundle(tmp_path_factory.mktemp("bundle")))
    return BatchedModel(bundle, torch.device("cpu"))


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30))
def test_rank_correlations_are_scipy_s(pairs: list[tuple[int, int]]) -> None:
    one, other = np.array(pairs, float).T
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        assert spearman(one, other) == 0.0
    else:
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_gains_are_those_of_torch_s_own_training(model: BatchedModel) -> None:
    """Each dialogue's gain by ``torch.optim.AdamW`` on the same LoRA tensors."""
    told: list[int] = []
    found = bench_estimators(model, TAUGHT, UNSEEN, steps=3, told=told.append)
    assert told == list(range(1, len(TAUGHT) + 1))
    others = {"length", "answer length", "answer loss", "gradient match"}
    assert {row.name for row in found.rows} == {*ESTIMATORS, *others}
    gains = np.array([gain_by_torch(model, one, steps=3) for one in TAUGHT])
    assert found.gain == pytest.approx(gains.mean(), rel=1e-3)
    assert found.helped == np.mean(gains > 0)
    lengths = [example(one, model.text, last_only=True).inputs + 1 for one in TAUGHT]
    rows = {row.name: row for row in found.rows}
    assert rows["length"].with_gain == pytest.approx(spearmanr(lengths, gains).statistic, abs=0.02)
    assert rows["length"].with_length == pytest.approx(1.0)
    renyi = [one.entropy for one in model.embed(TAUGHT, "renyi2")]
    assert rows["renyi2"].with_gain == pytest.approx(spearmanr(renyi, gains).statistic, abs=0.02)
    # In small steps a gain is what the gradients say.
    assert rows["gradient match"].with_gain > 0.8
    shown = [abs(row.with_gain) for row in found.rows]
    assert shown == sorted(shown, reverse=True)
    assert found.chance == pytest.approx(1.96 / np.sqrt(len(TAUGHT) - 1))


def gain_by_torch(model: BatchedModel, taught: Dialogue, steps: int) -> float:
    optimizer = model.bundle.training.optimizer
    model.set_values(read_values(model.bundle.adapter_file, model.shape.tensors))
    flat = torch.nn.Parameter(model._flat.clone())
    adam = torch.optim.AdamW(
        [flat], lr=1e-3, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon,
        weight_decay=0.01,
    )  # fmt: skip
    one = example(taught, model.text, last_only=True)
    unseen = [example(each, model.text, last_only=True) for each in UNSEEN]
    count = sum(each.count for each in unseen)
    before = model.losses(unseen).sum() / count
    for _ in range(steps):
        model._bind(flat.detach())
        _, gradient = model.loss_and_gradient([one])
        flat.grad = torch.from_numpy(gradient / one.count)
        torch.nn.utils.clip_grad_norm_([flat], 1.0)
        adam.step()
    model._bind(flat.detach())
    return float(before - model.losses(unseen).sum() / count)


def test_too_few_dialogues_are_told(model: BatchedModel) -> None:
    with pytest.raises(LoopError, match="9 of the dialogues and 2 of the tests fit 192 tokens"):
        bench_estimators(model, TAUGHT[:9], UNSEEN)


def test_a_dialogue_that_is_too_long_is_left_out(model: BatchedModel) -> None:
    long = dialogue("the other mat " * 90, "on it", id="l")
    found = bench_estimators(model, [long, *TAUGHT], [*UNSEEN, long], steps=1)
    assert (found.dialogues, found.tests) == (len(TAUGHT), len(UNSEEN))
