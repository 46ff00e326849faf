"""Gram matrices against sums over recorded inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig

from exporters.model.assembly import build
from exporters.model.calibration import SITES, collect_grams, walk_grams
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _model(config: PreTrainedConfig) -> Transformer:
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    return build(read_spec(config), state)


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, (1, n), generator=generator) for n in (9, 20, 1)]


@torch.no_grad()
def _recorded(model: Transformer, batches: list[Tensor]) -> dict[str, Tensor]:
    """The same sums from the inputs of every matrix in whole forward passes."""
    inputs: dict[str, list[Tensor]] = {}

    def record(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(
            lambda _, args: inputs.setdefault(name, []).append(args[0].flatten(0, -2))
        )

    for index, block in enumerate(model.blocks):
        for site in SITES:
            record(f"blocks.{index}.{site}", getattr(block, site))
    record("head", model.head)
    for tokens in batches:
        model(tokens)
    stacked = {name: torch.cat(xs) for name, xs in inputs.items()}
    return {name: x.T @ x for name, x in stacked.items()}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), Gemma2Config(**SIZES, head_dim=8, sliding_window=4)],
    ids=["llama", "gemma2"],
)
def test_grams_are_sums_over_all_tokens(config: PreTrainedConfig) -> None:
    model = _model(config)
    grams = collect_grams(model, _batches())
    expected = _recorded(model, _batches())
    assert grams.keys() == expected.keys()
    for name, gram in grams.items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-4, atol=1e-4)


def test_blocks_changed_on_the_way_feed_the_next() -> None:
    model = _model(LlamaConfig(**SIZES))
    seen = {}
    for block, grams in walk_grams(model, _batches()):
        seen |= {f"{block}.{site}".strip("."): gram for site, gram in grams.items()}
        if block == "blocks.0":
            for base in model.blocks[0].down.bases:
                base.weight.mul_(3)
    unchanged = collect_grams(_model(LlamaConfig(**SIZES)), _batches())
    changed = collect_grams(model, _batches())
    torch.testing.assert_close(seen["blocks.0.down"], unchanged["blocks.0.down"])
    torch.testing.assert_close(seen["blocks.1.qkv"], changed["blocks.1.qkv"])
    torch.testing.assert_close(seen["head"], changed["head"])
    assert not torch.allclose(seen["blocks.1.qkv"], unchanged["blocks.1.qkv"])


def test_the_model_is_left_as_it_was() -> None:
    model = _model(LlamaConfig(**SIZES))
    blocks = list(model.blocks)
    collect_grams(model, _batches())
    assert list(model.blocks) == blocks
    assert not any(m._forward_pre_hooks for m in model.modules())
