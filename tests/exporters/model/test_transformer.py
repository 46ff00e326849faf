"""Our transformer against Hugging Face's modules, and its LoRA against PEFT's."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoConfig

from exporters.errors import ExportError
from exporters.model.assembly import build
from exporters.model.lora_targets import lora_targets
from exporters.model.projection import LoRA
from exporters.model.spec import ARCHITECTURES, read_spec
from exporters.model.transformer import Transformer
from tests import tiny
from toolchain.compile.tolerances import rounding

# Of the logits' range: float32 sums in another order, through two layers of tiny's sizes.
EXACT = rounding(2 * (5 * 64 + tiny.SIZES["intermediate_size"] + tiny.CONTEXT))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.3 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
# What an architecture or a config can ask for beyond the plain, and the plain it must differ from.
FEATURES: list[tuple[str, str, dict, dict]] = [
    ("llama3 rope", "llama", {"rope_parameters": LLAMA3}, {}),
    ("yarn rope", "llama", {"rope_parameters": YARN}, {}),
    (
        "linear rope",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {},
    ),
    ("rope base", "llama", {"rope_parameters": {"rope_theta": 500.0}}, {}),
    ("norm epsilon", "llama", {"rms_norm_eps": 0.3}, {}),
    ("untied head", "llama", {"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
    ("mistral window", "mistral", {}, {"sliding_window": None}),
    ("qwen2 window of some layers", "qwen2", {}, {"sliding_window": 64}),
    ("gemma2 attention softcap", "gemma2", {}, {"attn_logit_softcapping": None}),
    ("gemma2 final softcap", "gemma2", {}, {"final_logit_softcapping": None}),
    ("gemma2 window", "gemma2", {}, {"layer_types": ["full_attention"] * 2}),
    ("gemma2 attention scale", "gemma2", {}, {"query_pre_attn_scalar": 16}),
    ("gemma3 window and local rope", "gemma3_text", {}, {"layer_types": ["full_attention"] * 2}),
    ("gemma3 final softcap", "gemma3_text", {"final_logit_softcapping": 4.0}, {}),
    ("phi3 partial rotation", "phi3", {}, {"partial_rotary_factor": 1.0}),
    ("phi3 window", "phi3", {}, {"sliding_window": None}),
    ("smollm3 layer without rope", "smollm3", {}, {"no_rope_layers": [1, 1]}),
    ("granite embedding", "granite", {}, {"embedding_multiplier": 1.0}),
    ("granite logits", "granite", {}, {"logits_scaling": 1.0}),
    ("granite residual", "granite", {}, {"residual_multiplier": 1.0}),
    ("granite attention", "granite", {}, {"attention_multiplier": 0.25}),
]


def ours(model, **changes: object) -> Transformer:
    return build(read_spec(model.config), model.state_dict(), **changes)


@torch.no_grad()
def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_logits_equal_hugging_face(kind: str) -> None:
    model = tiny.hugging_face(kind)
    tokens = tiny.tokens_of(tiny.CONTEXT)
    assert tiny.relative(ours(model)(tokens), logits(model, tokens)) < EXACT


@pytest.mark.parametrize(
    ("kind", "changes", "plain"), [f[1:] for f in FEATURES], ids=[f[0] for f in FEATURES]
)
@torch.no_grad()
def test_a_feature_is_kept_exactly(kind: str, changes: dict, plain: dict) -> None:
    model, without = tiny.hugging_face(kind, **changes), tiny.hugging_face(kind, **plain)
    tokens = tiny.tokens_of(tiny.CONTEXT)
    expected = logits(model, tokens)
    assert tiny.relative(logits(without, tokens), expected) > 100 * EXACT, "the case shows nothing"
    assert tiny.relative(ours(model)(tokens), expected) < EXACT
    assert tiny.relative(ours(without)(tokens), logits(without, tokens)) < EXACT


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 1, 16), (4, 4, 16), (6, 3, 8), (4, 2, 24)]
)
@torch.no_grad()
def test_head_counts_and_sizes(heads: int, kv_heads: int, head_dim: int) -> None:
    """Multi-query, multi-head and grouped; heads that together are not the hidden size."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    model = tiny.hugging_face("qwen3", **sizes)
    tokens = tiny.tokens_of(20)
    assert tiny.relative(ours(model)(tokens), logits(model, tokens)) < EXACT


@torch.no_grad()
def test_scores_far_below_zero_are_seen() -> None:
    """Biases of Qwen2 that push every score below −30,000: what is not seen stays below them."""
    model = tiny.hugging_face("qwen2")
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.fill_(120.0)
        layer.self_attn.k_proj.bias.fill_(-120.0)
    tokens = tiny.tokens_of(20)
    inner = model.model.layers[0].self_attn
    score = -(120.0**2) * inner.head_dim * inner.scaling
    assert score < -40_000
    allowed = 1e-7 * abs(score)  # of float32 scores: the logits' range is about 1
    assert tiny.relative(ours(model)(tokens), logits(model, tokens)) < 10 * allowed


@torch.no_grad()
def test_biases_of_qwen2_count() -> None:
    model = tiny.hugging_face("qwen2")
    tokens = tiny.tokens_of(20)
    expected = logits(model, tokens)
    state = {k: v * (0 if k.endswith(".bias") else 1) for k, v in model.state_dict().items()}
    assert tiny.relative(build(read_spec(model.config), state)(tokens), expected) > 100 * EXACT


@torch.no_grad()
def test_longrope_up_to_its_length() -> None:
    """The short factors, and the same attention factor, for as long as the model uses them."""
    changes = {"rope_parameters": LONGROPE, "partial_rotary_factor": 1.0, "sliding_window": None}
    model = tiny.hugging_face("phi3", original_max_position_embeddings=32, **changes)
    tokens = tiny.tokens_of(32)
    found = build(read_spec(model.config, context=32), model.state_dict())(tokens)
    assert tiny.relative(found, logits(model, tokens)) < EXACT


@torch.no_grad()
def test_dynamic_rope_up_to_its_length() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny.hugging_face("llama", rope_parameters=dynamic)
    tokens = tiny.tokens_of(64)
    found = build(read_spec(model.config, context=64), model.state_dict())(tokens)
    assert tiny.relative(found, logits(model, tokens)) < EXACT


@torch.no_grad()
def test_a_shorter_context_changes_nothing() -> None:
    model = tiny.hugging_face("gemma3_text")
    tokens = tiny.tokens_of(20)
    short = build(read_spec(model.config, context=20), model.state_dict())
    assert tiny.relative(short(tokens), logits(model, tokens)) < EXACT


# LoRA


def take_peft(model: Transformer, peft) -> None:
    """Gives our LoRA modules the tensors and scaling of PEFT's."""
    layers = dict(peft.base_model.model.named_modules())
    for index, block in enumerate(model.blocks):
        for module in block.modules():
            if not isinstance(module, LoRA):
                continue
            theirs = layers[f"model.layers.{index}.{module.target.module}"]
            module.lora_A[0] = theirs.lora_A["default"].weight
            module.scale.fill_(theirs.scaling["default"])
            parts = theirs.lora_B["default"].weight.split(module.target.rows)
            for name, rows in zip(module.b_names, parts, strict=True):
                getattr(module, name)[0] = rows


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_lora_equals_peft(kind: str) -> None:
    targets = tiny.every_target(kind)
    base = tiny.hugging_face(kind)
    model = ours(base, lora_modules=targets, rank=4)
    tokens = tiny.tokens_of(24)
    plain = logits(base, tokens)
    peft = tiny.adapted(base, targets)
    expected = logits(peft, tokens)
    assert tiny.relative(plain, expected) > 0.05, "the adapter has no effect"
    assert tiny.relative(model(tokens), plain) < EXACT  # before: a B of zero
    take_peft(model, peft)
    assert tiny.relative(model(tokens), expected) < EXACT
    assert tiny.relative(model(tokens, adapted=False), plain) < EXACT


@pytest.mark.parametrize(
    ("kind", "target"),
    [("llama", name) for name in tiny.every_target("llama")]
    + [("phi3", name) for name in tiny.every_target("phi3")],
)
@torch.no_grad()
def test_one_target_equals_peft(kind: str, target: str) -> None:
    base = tiny.hugging_face(kind)
    model = ours(base, lora_modules=[target], rank=3)
    peft = tiny.adapted(base, [target], rank=3)
    take_peft(model, peft)
    tokens = tiny.tokens_of(12)
    assert sum(isinstance(m, LoRA) for m in model.modules()) == len(model.blocks)
    assert tiny.relative(model(tokens), logits(peft, tokens)) < EXACT


# Refusals


def refused(words: str, model_type: str = "llama", context: int | None = None, **changes) -> str:
    with pytest.raises(ExportError, match=words) as caught:
        read_spec(tiny.config_of(model_type, **changes), context)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ExportError, match="architecture 'gpt2' is not supported") as caught:
        read_spec(AutoConfig.for_model("gpt2"))
    for known in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"):
        assert re.search(rf"\b{known}\b", str(caught.value))


@pytest.mark.parametrize("context", [65, 10**9, 1, 0, -4])
def test_a_context_that_cannot_be_is_refused(context: int) -> None:
    refused("at most 64 tokens", context=context)


def test_a_context_at_either_end_is_taken() -> None:
    for context in (2, 64):
        assert read_spec(tiny.config_of("llama"), context).context == context
    assert read_spec(tiny.config_of("llama")).context == 64
    longer = tiny.config_of("llama", max_position_embeddings=131072)
    assert read_spec(longer).context == 2048


def test_rope_that_changes_with_the_length_is_refused_past_it() -> None:
    changes = {"rope_parameters": LONGROPE, "partial_rotary_factor": 1.0}
    changes["original_max_position_embeddings"] = 32
    refused("'longrope' changes .* past 32 tokens.*--context 32", "phi3", context=33, **changes)
    dynamic = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    refused("'dynamic' changes .* past 32 tokens", context=33, rope_parameters=dynamic)


def test_what_cannot_be_said_in_a_spec_is_refused() -> None:
    refused("activation 'relu' is not supported; supported: silu", hidden_act="relu")
    refused("bidirectional", "gemma3_text", use_bidirectional_attention=True)
    kinds = ["chunked_attention", "full_attention"]
    refused(r"layer types \['chunked_attention'\] are not supported", "qwen2", layer_types=kinds)


def test_an_unknown_lora_target_is_refused_with_those_that_are_known() -> None:
    spec = read_spec(tiny.config_of("llama"))
    with pytest.raises(ExportError, match="no module named w_proj in llama") as caught:
        lora_targets(spec, ["q_proj", "w_proj"])
    assert all(name in str(caught.value) for name in tiny.every_target("llama"))
    with pytest.raises(ExportError, match=r"no module named q_proj in phi3.*qkv_proj"):
        lora_targets(read_spec(tiny.config_of("phi3")), ["q_proj"])


def test_all_misfits_of_a_checkpoint_are_in_one_message() -> None:
    model = tiny.hugging_face("qwen2")
    state = dict(model.state_dict())
    del state["model.norm.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(7)
    state["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    with pytest.raises(ExportError) as caught:
        build(read_spec(model.config), state)
    message = str(caught.value)
    assert "(4)" in message
    assert "model.norm.weight [64] is missing" in message
    assert "model.layers.1.mlp.up_proj.weight is [3, 64], expected [512, 64]" in message
    assert "model.layers.0.self_attn.q_proj.bias is [7], expected [64]" in message
    assert "model.layers.0.self_attn.sinks is not part of this architecture" in message
