"""Models whose biases push every attention score far below zero, against Hugging Face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.errors import ExportError
from exporters.executorch.lm_program import lower_lm
from exporters.executorch.methods import _additive
from exporters.model.assembly import build
from exporters.model.lora_tensors import adapter_tensors
from exporters.model.plain_attention import UNSEEN, UNSEEN_HALF, masked_attention, visible
from exporters.model.spec import read_spec
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.streaming import causal_mask
from tests import tiny
from toolchain.compile.score_range import check_scores


def biased(size: float) -> PreTrainedModel:
    """A Qwen2 with a window in its first layer, whose biases of ±``size`` add about
    -0.5 ``size``² to each score: they stand in the channels that turn least with the position."""
    model = tiny.hugging_face("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.bias.view(-1, 16)[:, [7, 15]] = size
            attention.k_proj.bias.view(-1, 16)[:, [7, 15]] = -size
    return model


def float32_and_64(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(tokens).logits.double(), model.double()(tokens).logits


@pytest.mark.parametrize("size", [0.0, 300.0, 400.0, 2000.0])  # scores to -2,000,000
def test_scores_far_below_zero_are_as_near_as_hugging_faces(size: float) -> None:
    model, tokens = biased(size), tiny.tokens_of(24)
    own = build(read_spec(model.config), model.state_dict())
    theirs, exact = float32_and_64(model, tokens)
    off = tiny.relative(theirs, exact)
    assert off < 0.02
    assert tiny.relative(own(tokens).double(), exact) <= 1.2 * off + 1e-6


@torch.no_grad()
def test_executorchs_attention_keeps_them(tmp_path: Path) -> None:
    model, tokens = biased(400.0), tiny.tokens_of(30)
    own = build(read_spec(model.config, tiny.CONTEXT), model.state_dict(), ["q_proj"], 2)
    lower_lm(own, tmp_path / "lm.pte", prefill_length=16, embed_length=32, bos_id=1, eos_ids=[2])
    adapter = {name: tensor.numpy() for name, tensor in adapter_tensors(own).items()}
    write_ptd(tmp_path / "adapter.ptd", adapter)
    lm = ExecutorchLm(tmp_path / "lm.pte", tmp_path / "adapter.ptd")
    theirs, exact = float32_and_64(model, tokens)
    off = tiny.relative(theirs, exact)
    assert off < 0.02
    assert tiny.relative(lm.all_logits(tokens).double(), exact) <= 2 * off


def exact_weights(scores: Tensor, seen: Tensor) -> Tensor:
    return torch.softmax(scores.double().masked_fill(~seen, -torch.inf), dim=-1)


class _Softmax(nn.Module):
    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(scores + mask, dim=-1)


def test_the_training_programs_mask_loses_to_every_score() -> None:
    mask = torch.from_numpy(causal_mask(np.zeros(16), 5)[0, 0].copy()).reshape(1, 1, 16, 16)
    assert float(mask.min()) == UNSEEN
    scores = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    program = torch.export.export(_Softmax(), (scores, mask))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    method = Runtime.get().load_program(lowered.to_executorch().buffer).load_method("forward")
    seen = mask[0, 0] == 0
    old = torch.where(seen, 0.0, -30000.0).reshape(1, 1, 16, 16)
    # For an ordinary model nothing changes, to the bit.
    assert torch.equal(method.execute([scores, mask])[0], method.execute([scores, old])[0])
    for shift in (-1e6, -4e4, 4e4, 1e6):
        moved = scores + shift
        found = method.execute([moved, mask])[0]
        assert (found - exact_weights(moved, seen)).abs().max() < 1e-6
        assert (found[..., ~seen] == 0).all()


@pytest.mark.parametrize("shift", [-1e6, -4e4, 0.0, 4e4])
def test_the_llm_operators_mask_loses_to_every_score(shift: float) -> None:
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 12, 2, 16, generator=random) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, shift  # a scale of 1 leaves the shift as it is
    steps = torch.arange(12)
    seen = visible(steps, steps, 4)
    found = torch.ops.llama.custom_sdpa(q, k, v, 0, _additive(seen), 0.0, False, 1.0)
    if shift == 0.0:  # an ordinary model's numbers are what they were, to the bit
        old = torch.where(seen, 0.0, -30000.0)
        assert torch.equal(found, torch.ops.llama.custom_sdpa(q, k, v, 0, old, 0.0, False, 1.0))
    scores = torch.einsum("bshd,bthd->bhst", q, k)  # as float32 rounds them
    expected = torch.einsum("bhst,bthd->bshd", exact_weights(scores, seen), v.double())
    # The products sum in another order, so that a score is off by its float32 spacing.
    assert (found - expected).abs().max() < max(1e-5, abs(shift) * 2.0**-22)


def test_a_half_scores_least_number_is_below_every_other() -> None:
    model = biased(0.0)
    spec = read_spec(model.config)
    random = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(1, 6, heads, 16, generator=random).half()
        for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
    )
    q[..., 0], k[..., 0] = 400.0, -400.0  # scores of -40,000

    def attend(count: int) -> Tensor:
        steps = torch.arange(count)
        seen = visible(steps, steps, None)
        return masked_attention(spec, q[:, :count], k[:, :count], v[:, :count], seen, UNSEEN_HALF)

    whole = attend(6)
    assert whole.isfinite().all()
    assert torch.equal(whole[:, 0], v[:, 0].repeat_interleave(2, dim=1))  # it sees itself only
    for count in range(1, 6):  # and none sees what comes later
        assert torch.equal(whole[:, :count], attend(count))


@pytest.mark.parametrize("size", [0.0, 150.0])
def test_core_ml_takes_what_float16_holds(size: float) -> None:
    model = biased(size)
    check_scores(build(read_spec(model.config), model.state_dict()), [tiny.tokens_of(24)])


def test_core_ml_refuses_scores_that_float16_does_not_tell_apart() -> None:
    model = biased(400.0)
    own = build(read_spec(model.config), model.state_dict())
    words = r"beyond 30,000 .* in layers 0 \(8\d,\d+\), 1 \(8\d,\d+\); .*--target android"
    with pytest.raises(ExportError, match=words):
        check_scores(own, [tiny.tokens_of(24)])
