"""PEFT's module by the programs' names: modules of other ranks, and of several matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from exporters.model.assembly import build
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.loop.errors import AdapterError
from tests import tiny
from toolchain.compile.adapter_layout import layout
from toolchain.compile.autograd import autograd_gradient
from toolchain.compile.tolerances import model_terms, rounding
from toolchain.verify.peft_module import padded, peft_values, set_peft_adapter
from toolchain.verify.reference_engines import peft_gradient

RANK = 4
CASES = {
    "llama": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "phi3": {"rank_pattern": {"down_proj": 3}, "use_rslora": True},
}


@dataclass(frozen=True, eq=False)
class Pair:
    """The same weights and the same adapter, in PEFT's module and in our transformer."""

    peft: PeftModel
    model: Transformer
    tensors: tuple[AdapterTensor, ...]
    values: dict[str, np.ndarray]


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    kind = request.param
    hf = tiny.hugging_face(kind)
    spec = read_spec(hf.config, tiny.CONTEXT)
    state = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    targets = tiny.every_target(kind)
    model = build(spec, state, targets, RANK)
    peft = tiny.adapted(hf, targets, RANK, **CASES[kind])
    tensors = layout(spec, targets, RANK)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    values = {
        name: padded(torch.from_numpy(value[0]), shapes[name])
        for name, value in peft_values(peft, tensors).items()
    }
    return Pair(peft, model, tensors, values)


def test_values_come_back(pair: Pair) -> None:
    """Whatever was set before; the transformer with the same values computes the same."""
    before = peft_values(pair.peft, pair.tensors)
    tokens = tiny.tokens_of(20)
    with torch.no_grad():
        expected = pair.peft(tokens).logits
    other = {name: value * 2 for name, value in pair.values.items()}
    set_peft_adapter(pair.peft, pair.tensors, other)
    with torch.no_grad():
        assert not torch.equal(pair.peft(tokens).logits, expected)
    set_peft_adapter(pair.peft, pair.tensors, pair.values)
    after = peft_values(pair.peft, pair.tensors)
    assert before.keys() == after.keys() == {tensor.name for tensor in pair.tensors}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    with torch.no_grad():
        assert torch.equal(pair.peft(tokens).logits, expected)


def test_values_beyond_a_modules_rank(pair: Pair) -> None:
    ranks = {n: v.shape for n, v in peft_values(pair.peft, pair.tensors).items()}
    name = next(n for n, shape in ranks.items() if shape != pair.values[n].shape)
    full = {**pair.values, name: np.ones_like(pair.values[name])}
    with pytest.raises(AdapterError, match=f"{name} has values beyond the rank"):
        set_peft_adapter(pair.peft, pair.tensors, full)


def test_both_references_have_the_same_gradient(pair: Pair) -> None:
    """Hugging Face's and PEFT's, and our transformer's: summed over two examples."""
    examples = []
    for seed in (1, 2):
        tokens = tiny.tokens_of(24, seed)[0].numpy()
        labels = tokens.copy()
        labels[:8] = IGNORED
        examples.append(Example(f"random-{seed}", tokens, labels))
    loss, gradients = peft_gradient(pair.peft, pair.tensors, examples)
    whole = autograd_gradient(pair.model, pair.values, examples)
    terms = model_terms(pair.model.spec, 24)
    total = loss + whole.largest_logit * sum(example.count for example in examples)
    assert abs(whole.loss - loss) <= rounding(terms) * total < 1e-2 * loss
    bound = rounding(3 * terms) * max(np.abs(expected).max() for expected in gradients.values())
    assert gradients.keys() == whole.gradients.keys()
    assert gradients.keys() == AdapterState.of(pair.tensors, pair.values).layout.places.keys()
    for name, expected in gradients.items():
        assert np.abs(expected).max() > 100 * bound, "the case shows nothing"
        assert np.abs(whole.gradients[name] - expected).max() <= bound, name
