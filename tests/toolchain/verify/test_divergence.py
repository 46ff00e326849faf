"""Perplexity and divergence of an adapter on a text, against PyTorch's own loss functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from runtime_py.engine.examples import IGNORED, Example
from tests.tiny import adapted, hugging_face, tokens_of
from toolchain.verify.divergence import measure


def example(length: int, seed: int) -> Example:
    """Random tokens; every third label is left out."""
    tokens = tokens_of(length, seed)[0].numpy()
    labels = np.where(np.arange(length) % 3 > 0, tokens, IGNORED)
    return Example(str(seed), tokens, labels)


@torch.no_grad()
def test_against_cross_entropy_and_kl_div() -> None:
    base = hugging_face("llama")
    other = adapted(hugging_face("llama"), ["q_proj", "v_proj"])
    examples = [example(length, seed) for seed, length in enumerate((12, 30, 19), 1)]

    found = measure(lambda t: other(t).logits, lambda t: base(t).logits, examples)

    rows: dict[str, list[torch.Tensor]] = {"base": [], "other": []}
    labels = torch.cat([torch.from_numpy(e.labels[1:]) for e in examples])
    for e in examples:
        tokens = torch.from_numpy(e.tokens)[None]
        rows["base"].append(base(tokens).logits[0, :-1])
        rows["other"].append(other(tokens).logits[0, :-1])
    before, after = (torch.cat(rows[name]).double() for name in ("base", "other"))
    real = labels != IGNORED
    assert found.labels == int(real.sum())
    losses = [F.cross_entropy(x, labels, ignore_index=IGNORED).item() for x in (before, after)]
    assert found.base_perplexity == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses[1]), rel=1e-5)
    assert found.ratio == pytest.approx(math.exp(losses[1] - losses[0]) - 1, rel=1e-4)
    logs = [x[real].log_softmax(-1) for x in (before, after)]
    expected = F.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True).item()
    assert found.kl == pytest.approx(expected, rel=1e-4)
    assert found.kl > 1e-3


def test_without_an_adapter_nothing_is_forgotten() -> None:
    base = hugging_face("llama")
    found = measure(lambda t: base(t).logits, lambda t: base(t).logits, [example(20, 1)])
    assert (found.ratio, found.kl) == (0.0, 0.0)
