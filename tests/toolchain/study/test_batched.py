"""Many sequences at once against Hugging Face's modules, one at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exporters.model.assembly import build
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer
from tests import tiny
from toolchain.compile.tolerances import rounding
from toolchain.study.batched import continued, greedy, hidden_states, label_losses, together
from toolchain.study.estimators import ESTIMATORS, TokenVectors

CPU = torch.device("cpu")
LENGTHS = (5, 23, 17, 2)  # the window of some architectures is 8
# Of the logits' range: float32 sums in another order, through two layers of tiny's sizes.
EXACT = rounding(2 * (5 * 64 + tiny.SIZES["intermediate_size"] + tiny.CONTEXT))


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def pair(request: pytest.FixtureRequest):
    theirs = tiny.hugging_face(request.param)
    ours = build(read_spec(theirs.config, tiny.CONTEXT), theirs.state_dict())
    return theirs, ours


def sequences() -> list[np.ndarray]:
    return [tiny.tokens_of(n, seed=n)[0].numpy() for n in LENGTHS]


@torch.no_grad()
def test_losses_are_those_of_each_sequence_alone(pair) -> None:
    theirs, ours = pair
    rows = sequences()
    batch = together([row[:-1] for row in rows], CPU)
    labels = torch.full(batch.tokens.shape, -100)
    expected, spread = [], 0.0
    for index, row in enumerate(rows):
        first = len(row) // 2  # what is before is the prompt
        labels.split(batch.counts)[index][first - 1 :] = torch.from_numpy(row[first:])
        logits = theirs(torch.from_numpy(row)[None], use_cache=False).logits[0]
        targets = torch.from_numpy(row[first:])
        expected.append(torch.nn.functional.cross_entropy(
            logits[first - 1 : -1], targets, reduction="sum"
        ).item())  # fmt: skip
        spread = max(spread, float(logits.abs().max()))
    found = label_losses(ours, batch, labels)
    allowed = 2 * EXACT * spread * max(LENGTHS)  # a loss is a difference of two logits, summed
    assert found.tolist() == pytest.approx(expected, abs=allowed)


@torch.no_grad()
def test_greedy_text_is_the_most_likely_token_at_each_place(pair) -> None:
    """Each token that was written is Hugging Face's best after what stands before it."""
    theirs, ours = pair
    rows, most = sequences(), 12
    written = continued(ours, together(rows, CPU), most, [], tiny.CONTEXT, greedy)
    for row, tokens in zip(rows, written, strict=True):
        assert len(tokens) == most
        whole = torch.tensor([*row.tolist(), *tokens])[None]
        logits = theirs(whole, use_cache=False).logits[0, len(row) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() <= 2 * EXACT * logits.abs().max()


def test_text_ends_at_an_end_token_and_with_the_context() -> None:
    model = tiny.hugging_face("llama")
    ours = build(read_spec(model.config, tiny.CONTEXT), model.state_dict())
    rows = [tiny.tokens_of(4)[0].numpy(), tiny.tokens_of(tiny.CONTEXT - 3)[0].numpy()]
    free = continued(ours, together(rows, CPU), 10, [], tiny.CONTEXT, greedy)
    assert [len(row) for row in free] == [10, 3]
    stop = free[0][6]
    first = free[0].index(stop)
    ended = continued(ours, together(rows, CPU), 10, [stop], tiny.CONTEXT, greedy)
    assert ended[0] == free[0][:first]


def vectors_of(model: Transformer) -> tuple[TokenVectors, list[torch.Tensor]]:
    batch = together(sequences(), CPU)
    vectors = hidden_states(model, batch, adapted=False)
    return TokenVectors(model, batch, vectors), [row.double() for row in vectors.split(LENGTHS)]


@torch.no_grad()
def test_estimators_are_their_formulas() -> None:
    source = tiny.hugging_face("llama")
    model = build(read_spec(source.config, tiny.CONTEXT), source.state_dict())
    seen, each = vectors_of(model)
    found = {name: ESTIMATORS[name](seen) for name in ESTIMATORS}
    for row, vectors in enumerate(each):
        n = len(vectors)
        norms = vectors.norm(dim=1).numpy()
        p = norms / norms.sum()
        assert found["norm"][row] == pytest.approx(-(p * np.log(p)).sum() / np.log(n), abs=1e-12)
        tokens = torch.from_numpy(sequences()[row])
        logits = source(tokens[None], use_cache=False).logits[0].double()
        surprisal = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).item()
        assert found["surprisal"][row] == pytest.approx(surprisal, rel=1e-4)
        singular = torch.linalg.svdvals(torch.softmax(logits, dim=-1))
        assert found["nuclear"][row] == pytest.approx(float(singular.sum()) / n, rel=1e-4)
        if n > 2:
            outputs = source(tokens[None], use_cache=False, output_hidden_states=True)
            middle = outputs.hidden_states[tiny.SIZES["num_hidden_layers"] // 2][0].double()
            rest = (middle[1:] - middle[1:].mean(0)).numpy()
            unit = rest / np.linalg.norm(rest, axis=1, keepdims=True)
            spectrum = np.linalg.eigvalsh(unit @ unit.T / len(unit))
            expected = -np.log((spectrum**2).sum())  # of a density matrix's eigenvalues
            assert found["renyi2"][row] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_estimators_are_numbers_of_whatever_is_said() -> None:
    """One token, two, and the same one again and again, whose centred vectors vanish."""
    source = tiny.hugging_face("llama")
    model = build(read_spec(source.config, tiny.CONTEXT), source.state_dict())
    batch = together([np.array([5]), np.array([5, 5]), np.full(9, 5)], CPU)
    vectors = hidden_states(model, batch, adapted=False)
    seen = TokenVectors(model, batch, vectors)
    for name, estimate in ESTIMATORS.items():
        assert np.isfinite(estimate(seen)).all(), name
    silent = TokenVectors(model, batch, torch.zeros_like(vectors))
    for name in ("norm", "surprisal", "nuclear"):
        assert np.isfinite(ESTIMATORS[name](silent)).all(), name
    alike = SimpleNamespace(middle=lambda: [torch.ones(4, 8).double()])
    assert ESTIMATORS["renyi2"](alike).tolist() == [0.0]  # type: ignore[arg-type]
