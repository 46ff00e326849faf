"""A GGUF file as a Hugging Face config and state dict.

GGUF keeps a config under llama.cpp's names, stores the rotary rows of llama's queries and keys in
another order, and Gemma's norms with one added. Every hyperparameter and tensor of the file must
be understood here: one that is not may change what the model computes, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporters.errors import ExportError
from exporters.model.gguf_file import GGUFFile


@dataclass(frozen=True)
class _Architecture:
    """``more`` are hyperparameters beyond the common ones, ``blocks`` tensors beyond them."""

    model_type: str
    more: frozenset[str] = frozenset()
    blocks: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False  # q and k rows are pairs (i, i + 1), not (i, i + half)
    norm_offset: float = 0.0
    theta: float = 10000.0  # llama.cpp's default where the file has none
    large: int | None = None  # layers of the one size whose attention scale the file lacks


_COMMON = {
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
}  # fmt: skip
_HARMLESS_WHEN_ZERO = {"expert_count", "expert_used_count", "leading_dense_block_count"}
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
_ALWAYS = (
    ("attn_norm", "input_layernorm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_down", "mlp.down_proj"),
)
_GEMMA = frozenset(
    {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
)
_ARCHITECTURES = {
    "llama": _Architecture("llama", blocks=_SPLIT_QKV + _PRE_NORM, interleaved=True),
    "qwen2": _Architecture("qwen2", blocks=_SPLIT_QKV + _PRE_NORM),
    "qwen3": _Architecture("qwen3", blocks=_SPLIT_QKV + _PRE_NORM + _QK_NORM),
    "phi3": _Architecture(
        "phi3",
        more=frozenset({"attention.sliding_window", "rope.scaling.original_context_length"}),
        blocks=(
            ("attn_qkv", "self_attn.qkv_proj"),
            ("ffn_up", "mlp.gate_up_proj"),
            *_PRE_NORM,
        ),
    ),
    "gemma2": _Architecture(
        "gemma2", more=_GEMMA, blocks=_SPLIT_QKV + _POST_NORM, norm_offset=1.0, large=46
    ),
    "gemma3": _Architecture(
        "gemma3_text",
        more=_GEMMA | {"rope.freq_base_swa"},
        blocks=_SPLIT_QKV + _POST_NORM + _QK_NORM,
        norm_offset=1.0,
        theta=1_000_000.0,
        large=62,
    ),
}


def architecture_of(file: GGUFFile) -> str:
    """The file's architecture as llama.cpp calls it; ``ExportError`` if it is not supported."""
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ExportError(
            f"{file.path}: architecture '{name}' is not supported as GGUF; supported: "
            f"{', '.join(_ARCHITECTURES)}. Others may be as a folder of safetensors."
        )
    return str(name)


class _Reader:
    """Hyperparameters of one file, with their types checked."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self.file, self.prefix = file, f"{name}."

    def given(self, key: str) -> bool:
        return self.prefix + key in self.file.metadata

    def _wrong(self, key: str, expected: str) -> ExportError:
        value = self.file.metadata.get(self.prefix + key, "missing")
        return ExportError(
            f"{self.file.path}: {self.prefix}{key} is {str(value)[:60]}, expected {expected}."
        )

    def size(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(self.prefix + key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "one positive integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(self.prefix + key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._wrong(key, "a positive number")
        return float(value)

    def check_known(self, known: set[str]) -> None:
        own = {
            key.removeprefix(self.prefix): value
            for key, value in self.file.metadata.items()
            if key.startswith(self.prefix)
        }
        odd = sorted(k for k in own if k not in known and (k not in _HARMLESS_WHEN_ZERO or own[k]))
        if odd:
            shown = ", ".join(f"{k} = {str(own[k])[:40]}" for k in odd)
            raise ExportError(
                f"{self.file.path} has hyperparameters that attune does not know for "
                f"'{self.prefix[:-1]}' ({shown}); leaving them out could change the model: use its "
                f"safetensors checkpoint instead."
            )


def read_config(file: GGUFFile) -> PreTrainedConfig:
    """The Hugging Face config of a GGUF file; ``ExportError`` for what it cannot say exactly."""
    name = architecture_of(file)
    kind = _ARCHITECTURES[name]
    read = _Reader(file, name)
    read.check_known(_COMMON | kind.more)
    heads, hidden, layers = (
        read.size(k) for k in ("attention.head_count", "embedding_length", "block_count")
    )
    rotary = read.size("rope.dimension_count", read.size("attention.key_length", hidden // heads))
    head_dim = read.size("attention.key_length", hidden // heads if name == "phi3" else rotary)
    if read.size("attention.value_length", head_dim) != head_dim:
        raise ExportError(f"{file.path}: keys and values of different lengths are not supported.")
    if rotary != head_dim and name != "phi3":
        raise ExportError(f"{file.path}: rotation of {rotary} of {head_dim} channels is not known.")
    if layers == kind.large:
        raise ExportError(
            f"{file.path}: the attention scale of this size of {name} is not in GGUF."
        )
    if "token_embd.weight" not in file.tensors:
        raise ExportError(f"{file.path} has no tensor token_embd.weight; it is not a whole model.")
    values: dict = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": read.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": read.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": read.size("context_length"),
        "rms_norm_eps": read.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(read, kind, rotary / head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for token in ("bos", "eos"):
        values[f"{token}_token_id"] = file.metadata.get(f"tokenizer.ggml.{token}_token_id")
    values["pad_token_id"] = file.metadata.get("tokenizer.ggml.padding_token_id")
    if read.given("attention.sliding_window"):
        values["sliding_window"] = read.size("attention.sliding_window")
    if kind.norm_offset:  # Gemma
        values["query_pre_attn_scalar"] = head_dim
    for key, field in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if read.given(key):
            values[field] = read.real(key)
    if name == "llama" and "blk.0.attn_q.bias" in file.tensors:
        values["attention_bias"] = True
    config = AutoConfig.for_model(kind.model_type, **values)
    if "rope_freqs.weight" in file.tensors:
        _check_llama3(file, config)
    return config


def _rope(read: _Reader, kind: _Architecture, partial: float) -> dict:
    theta = read.real("rope.freq_base", kind.theta)
    params: dict = {"rope_type": "default", "rope_theta": theta}
    scaling = read.file.metadata.get(f"{read.prefix}rope.scaling.type", "none")
    if scaling == "linear":
        params |= {"rope_type": "linear", "factor": read.real("rope.scaling.factor")}
    elif scaling != "none":
        raise ExportError(
            f"{read.file.path}: RoPE scaling '{scaling}' cannot be read from GGUF exactly; use the "
            f"model's safetensors checkpoint."
        )
    if partial != 1.0:
        params["partial_rotary_factor"] = partial
    if kind.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": read.real("rope.freq_base_swa", 10000.0)}
        return {"full_attention": params, "sliding_attention": local}
    if "rope_freqs.weight" in read.file.tensors:
        if scaling != "none":
            raise ExportError(f"{read.file.path}: two RoPE scalings at once are not supported.")
        # GGUF has the divisor of each frequency, not the numbers it was made from: these are
        # Llama 3's, and read_config checks that they give the same divisors.
        params |= {
            "rope_type": "llama3",
            "factor": float(read.file.read("rope_freqs.weight").max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return params


def _check_llama3(file: GGUFFile, config: PreTrainedConfig) -> None:
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** steps
    divisors = file.read("rope_freqs.weight")
    if divisors.shape != scaled.shape or not torch.allclose(plain / divisors, scaled, rtol=1e-4):
        raise ExportError(
            f"{file.path}: the RoPE frequencies in rope_freqs.weight are not those of Llama 3; use "
            f"the model's safetensors checkpoint."
        )


class GGUFState(Mapping[str, Tensor]):
    """Hugging Face names to float32 tensors of a GGUF file, dequantized at each lookup."""

    def __init__(self, file: GGUFFile, config: PreTrainedConfig) -> None:
        self.file = file
        self.config = config
        self.kind = _ARCHITECTURES[architecture_of(file)]
        modules = dict(_ALWAYS + self.kind.blocks)
        top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        self.names: dict[str, str] = {}
        odd = []
        for name in file.tensors:
            stem, _, leaf = name.rpartition(".")
            block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
            if block and block[2] in modules:
                self.names[f"model.layers.{block[1]}.{modules[block[2]]}.{leaf}"] = name
            elif stem in top:
                self.names[f"{top[stem]}.{leaf}"] = name
            elif name != "rope_freqs.weight" or self.kind.model_type != "llama":
                odd.append(name)
        if odd:
            raise ExportError(
                f"{file.path} has {len(odd)} tensors that '{self.kind.model_type}' does not have "
                f"({', '.join(odd[:5])}); leaving them out would change the model."
            )

    def __getitem__(self, name: str) -> Tensor:
        stored = self.names[name]
        tensor = self.file.read(stored)
        if self.kind.norm_offset and stored.endswith("norm.weight"):
            return tensor - self.kind.norm_offset
        if self.kind.interleaved and ".attn_q." in stored:
            return _halves(tensor, self.config.num_attention_heads)
        if self.kind.interleaved and ".attn_k." in stored:
            return _halves(tensor, self.config.num_key_value_heads)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads · D, ...] of rotary pairs (i, i + 1) -> pairs (i, i + D/2)."""
    if rows.shape[0] % (2 * heads):
        return rows  # a wrong shape, which the model's builder reports by name
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
