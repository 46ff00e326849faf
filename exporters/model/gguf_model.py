"""A GGUF file as a Hugging Face config and state dict.

GGUF keeps a config under llama.cpp's names, stores the rotary rows of llama's queries and keys in
another order, and Gemma's norms with one added. Every hyperparameter and tensor of the file must
be understood here: one that is not may change what the model computes, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporters.errors import ExportError
from exporters.model.gguf_architectures import (
    ALWAYS,
    COMMON,
    GGUF_ARCHITECTURES,
    HARMLESS_WHEN_ZERO,
    GGUFArchitecture,
)
from exporters.model.gguf_file import GGUFFile


def architecture_of(file: GGUFFile) -> str:
    """The file's architecture as llama.cpp calls it; ``ExportError`` if it is not supported."""
    name = file.metadata.get("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        raise ExportError(
            f"{file.path}: architecture '{name}' is not supported as GGUF; supported: "
            f"{', '.join(GGUF_ARCHITECTURES)}. Others may be as a folder of safetensors."
        )
    return str(name)


class _Hyperparameters:
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
        """Raises ``ExportError`` that names every hyperparameter beyond ``known`` which may mean
        something."""
        present = {
            key.removeprefix(self.prefix): value
            for key, value in self.file.metadata.items()
            if key.startswith(self.prefix)
        }
        odd = sorted(
            k
            for k, value in present.items()
            if k not in known and (k not in HARMLESS_WHEN_ZERO or value)
        )
        if odd:
            shown = ", ".join(f"{k} = {str(present[k])[:40]}" for k in odd)
            raise ExportError(
                f"{self.file.path} has hyperparameters that attune does not know for "
                f"'{self.prefix[:-1]}' ({shown}); leaving them out could change the model: use its "
                f"safetensors checkpoint instead."
            )


def read_config(file: GGUFFile) -> PreTrainedConfig:
    """The Hugging Face config of a GGUF file; ``ExportError`` for what it cannot say exactly."""
    name = architecture_of(file)
    kind = GGUF_ARCHITECTURES[name]
    read = _Hyperparameters(file, name)
    read.check_known(COMMON | kind.more)
    head_dim, rotary = _head_sizes(read, name)
    layers = read.size("block_count")
    if layers == kind.large:
        raise ExportError(
            f"{file.path}: the attention scale of this size of {name} is not in GGUF."
        )
    if "token_embd.weight" not in file.tensors:
        raise ExportError(f"{file.path} has no tensor token_embd.weight; it is not a whole model.")
    heads = read.size("attention.head_count")
    values: dict = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": read.size("embedding_length"),
        "intermediate_size": read.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": read.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": read.size("context_length"),
        "rms_norm_eps": read.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(read, kind, rotary / head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    values |= _optional_values(read, kind, head_dim)
    config = AutoConfig.for_model(kind.model_type, **values)
    if "rope_freqs.weight" in file.tensors:
        _check_llama3(file, config)
    return config


def _head_sizes(read: _Hyperparameters, name: str) -> tuple[int, int]:
    """Channels of a head, and those of them that rotate."""
    path = read.file.path
    even = read.size("embedding_length") // read.size("attention.head_count")
    rotary = read.size("rope.dimension_count", read.size("attention.key_length", even))
    head_dim = read.size("attention.key_length", even if name == "phi3" else rotary)
    if read.size("attention.value_length", head_dim) != head_dim:
        raise ExportError(f"{path}: keys and values of different lengths are not supported.")
    if rotary != head_dim and name != "phi3":
        raise ExportError(f"{path}: rotation of {rotary} of {head_dim} channels is not known.")
    return head_dim, rotary


def _optional_values(read: _Hyperparameters, kind: GGUFArchitecture, head_dim: int) -> dict:
    """What only some architectures, or some files, have."""
    values: dict = {}
    if read.given("attention.sliding_window"):
        values["sliding_window"] = read.size("attention.sliding_window")
    if kind.norm_offset:  # Gemma
        values["query_pre_attn_scalar"] = head_dim
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if read.given(name):
            values[name] = read.real(name)
    if kind.model_type == "llama" and "blk.0.attn_q.bias" in read.file.tensors:
        values["attention_bias"] = True
    return values


def _rope(read: _Hyperparameters, kind: GGUFArchitecture, partial: float) -> dict:
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
        self.kind = GGUF_ARCHITECTURES[architecture_of(file)]
        modules = dict(ALWAYS + self.kind.blocks)
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
