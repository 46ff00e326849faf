"""What a decoder-only transformer computes, as plain data read from a Hugging Face config.

``ModelSpec`` is the whole mechanism: an architecture is supported if its computation can be said
in these fields, and a config that asks for anything else is refused. ``transformer`` builds from
it; nothing downstream looks at the Hugging Face config again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporters.errors import ExportError
from exporters.model.deterministic_calls import SameBits


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: angle of pair i at position p is ``p * inv_freq[i]``; cos and sin are
    multiplied by ``scaling``. Pairs are (i, i + len) of the first ``2 * len(inv_freq)`` channels;
    the rest of a head passes through."""

    inv_freq: tuple[float, ...]
    scaling: float


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer. ``window``: tokens a query sees, itself included."""

    rope: Rope | None
    window: int | None


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. Sizes are counts of channels, heads or tokens."""

    architecture: str
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    norm_offset: float  # RMSNorm multiplies by (offset + weight)
    activation: str  # "silu" | "gelu_tanh"
    attention_scale: float
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rotation
    post_norm: bool = False  # RMSNorm on the output of attention and MLP as well (Gemma)
    tied: bool = True  # the head is the embedding
    fused: bool = False  # q, k, v and gate, up are each one matrix in the checkpoint (Phi3)

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _rope(config: PreTrainedConfig, params: dict, layer_type: str | None, context: int) -> Rope:
    """Frequencies of one layer type, by transformers' own functions."""
    kind = params.get("rope_type", "default")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "default":
        dim = int(head_dim * params.get("partial_rotary_factor", 1.0))
        base = params["rope_theta"]
        # In float32, as transformers does, so that angles agree to the last bits.
        with SameBits():
            inv = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        return Rope(tuple(inv.tolist()), 1.0)
    if kind in ("dynamic", "longrope"):
        # Both change their frequencies past this length; up to it they are constant.
        trained = params.get("original_max_position_embeddings") or config.max_position_embeddings
        if context > trained:
            raise ExportError(
                f"RoPE scaling '{kind}' changes its frequencies past {trained} tokens, which one "
                f"compiled program cannot do: export with --context {trained} or less."
            )
    if kind not in ROPE_INIT_FUNCTIONS or kind == "proportional":
        known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS} - {"proportional"}))
        raise ExportError(f"RoPE scaling '{kind}' is not supported; supported: {known}.")
    with SameBits():  # the powers are rounded once, whatever this processor's own are
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=layer_type)
    return Rope(tuple(inv_freq.tolist()), float(scaling))


def _layers(config: PreTrainedConfig, context: int) -> tuple[LayerSpec, ...]:
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [None] * count
    known = {None, "full_attention", "sliding_attention"}
    if odd := sorted({str(t) for t in types if t not in known}):
        raise ExportError(
            f"layer types {odd} are not supported; supported: {sorted(str(t) for t in known if t)}."
        )
    sliding = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        sliding = None
    params = config.rope_parameters
    per_type = "rope_theta" not in params and "rope_type" not in params
    use_rope = getattr(config, "no_rope_layers", None) or [1] * count
    ropes: dict[str | None, Rope | None] = {}
    layers = []
    for kind, rotary in zip(types, use_rope, strict=True):
        if kind not in ropes:
            values = params[kind] if per_type else params
            ropes[kind] = (
                _rope(config, values, kind if per_type else None, context) if values else None
            )
        window = sliding if kind in (None, "sliding_attention") else None
        if window is not None and window >= context:
            window = None  # never reached within this context
        layers.append(LayerSpec(ropes[kind] if rotary else None, window))
    return tuple(layers)


def _common(config: PreTrainedConfig, context: int) -> dict:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise ExportError(
            f"activation '{activation}' is not supported; supported: {', '.join(_ACTIVATIONS)}."
        )
    return {
        "architecture": config.model_type,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "context": context,
        "layers": _layers(config, context),
        "norm_eps": config.rms_norm_eps,
        "norm_offset": 0.0,
        "activation": _ACTIVATIONS[activation],
        "attention_scale": head_dim**-0.5,
        "tied": bool(config.tie_word_embeddings),
    }


def _plain(config: PreTrainedConfig, context: int) -> ModelSpec:
    return ModelSpec(**_common(config, context))


def _phi3(config: PreTrainedConfig, context: int) -> ModelSpec:
    return ModelSpec(**_common(config, context) | {"fused": True})


def _qwen3(config: PreTrainedConfig, context: int) -> ModelSpec:
    return ModelSpec(**_common(config, context) | {"qk_norm": True})


def _granite(config: PreTrainedConfig, context: int) -> ModelSpec:
    changes = {
        "attention_scale": config.attention_multiplier,
        "embed_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
    }
    return ModelSpec(**_common(config, context) | changes)


def _gemma(config: PreTrainedConfig, context: int) -> ModelSpec:
    if getattr(config, "use_bidirectional_attention", False):
        raise ExportError("bidirectional attention is not a causal language model's.")
    changes = {
        "norm_offset": 1.0,
        "post_norm": True,
        "qk_norm": config.model_type == "gemma3_text",
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "embed_scale": config.hidden_size**0.5,
        "attention_softcap": getattr(config, "attn_logit_softcapping", None),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
    }
    return ModelSpec(**_common(config, context) | changes)


ARCHITECTURES: dict[str, Callable[[PreTrainedConfig, int], ModelSpec]] = {
    "llama": _plain,
    "mistral": _plain,
    "qwen2": _plain,
    "qwen3": _qwen3,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "phi3": _phi3,
    "smollm3": _plain,
    "granite": _granite,
}


def read_spec(config: PreTrainedConfig, context: int | None = None) -> ModelSpec:
    """The spec of a Hugging Face config, for programs of ``context`` tokens (default: the model's,
    at most 2048). Raises ``ExportError`` for what cannot be kept exactly."""
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"architecture '{config.model_type}' is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}."
        )
    longest = config.max_position_embeddings
    if context is None:
        context = min(longest, 2048)
    if not 1 < context <= longest:
        raise ExportError(
            f"--context {context} does not fit: the model was made for at most {longest} tokens, "
            f"and at least 2 are needed."
        )
    return ARCHITECTURES[config.model_type](config, context)
