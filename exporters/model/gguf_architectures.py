"""The architectures that are read from GGUF: their names, hyperparameters and tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GGUFArchitecture:
    """``more`` are hyperparameters beyond the common ones, ``blocks`` tensors beyond them."""

    model_type: str
    more: frozenset[str] = frozenset()
    blocks: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False  # q and k rows are pairs (i, i + 1), not (i, i + half)
    norm_offset: float = 0.0
    theta: float = 10000.0  # llama.cpp's default where the file has none
    large: int | None = None  # layers of the one size whose attention scale the file lacks


COMMON = {
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
}  # fmt: skip
HARMLESS_WHEN_ZERO = {"expert_count", "expert_used_count", "leading_dense_block_count"}
_SPLIT_QKV = (
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
)
_PRE_NORM = (("ffn_norm", "post_attention_layernorm"),)
_QK_NORM = (("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"))
_POST_NORM = (
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
ALWAYS = (
    ("attn_norm", "input_layernorm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_down", "mlp.down_proj"),
)
_GEMMA = frozenset(
    {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
)
GGUF_ARCHITECTURES = {
    "llama": GGUFArchitecture("llama", blocks=_SPLIT_QKV + _PRE_NORM, interleaved=True),
    "qwen2": GGUFArchitecture("qwen2", blocks=_SPLIT_QKV + _PRE_NORM),
    "qwen3": GGUFArchitecture("qwen3", blocks=_SPLIT_QKV + _PRE_NORM + _QK_NORM),
    "phi3": GGUFArchitecture(
        "phi3",
        more=frozenset({"attention.sliding_window", "rope.scaling.original_context_length"}),
        blocks=(
            ("attn_qkv", "self_attn.qkv_proj"),
            ("ffn_up", "mlp.gate_up_proj"),
            *_PRE_NORM,
        ),
    ),
    "gemma2": GGUFArchitecture(
        "gemma2", more=_GEMMA, blocks=_SPLIT_QKV + _POST_NORM, norm_offset=1.0, large=46
    ),
    "gemma3": GGUFArchitecture(
        "gemma3_text",
        more=_GEMMA | {"rope.freq_base_swa"},
        blocks=_SPLIT_QKV + _POST_NORM + _QK_NORM,
        norm_offset=1.0,
        theta=1_000_000.0,
        large=62,
    ),
}
