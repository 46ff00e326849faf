"""What a checkpoint stores beside what its config says already: accepted where the two agree."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from exporters.errors import ExportError
from exporters.model.safetensors_state import SafetensorsState
from exporters.model.spec import ModelSpec, read_spec

_FREQUENCIES = re.compile(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb(_local)?\.inv_freq")
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
# What storage in bfloat16 (8 bits) or float16 (steps of 2^-24 near 0) makes of a frequency.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-24


def settle_redundant(config: PreTrainedConfig, state: SafetensorsState, folder: Path) -> None:
    """Lists in ``state`` what the model has: one matrix for a tied head, under the embedding's
    name, and no rotary frequencies. Raises ``ExportError`` where what is stored is not what the
    config says."""
    _settle_tie(config, state, folder)
    stored = {name: match for name in state if (match := _FREQUENCIES.fullmatch(name))}
    if not stored:
        return
    spec = read_spec(config)
    wrong = []
    for name, match in stored.items():
        expected = _expected(spec, match)
        if not any(_agree(state[name], one) for one in expected):
            wanted = " or ".join(map(_shown, expected)) or "none"
            wrong.append(f"{name} is {_shown(state[name])}, expected {wanted}")
    if wrong:
        raise ExportError(
            f"{folder}: {len(wrong)} stored rotary frequencies are not those of config.json: "
            f"{'; '.join(wrong[:3])}. Correct rope_theta or its scaling there."
        )
    for name in stored:
        state.leave_out(name)


def _settle_tie(config: PreTrainedConfig, state: SafetensorsState, folder: Path) -> None:
    if not config.tie_word_embeddings or _HEAD not in state:
        return
    if _TABLE not in state:
        state.rename(_HEAD, _TABLE)
    elif not torch.equal(state[_HEAD], state[_TABLE]):
        raise ExportError(
            f"{folder}: config.json says that head and embedding are one matrix "
            f"(tie_word_embeddings), but the weights have two that differ; correct config.json."
        )


def _expected(spec: ModelSpec, match: re.Match[str]) -> list[Tensor]:
    """The frequencies that a tensor of this name may have: its layer's, or some layer's."""
    layers = spec.layers
    if match[1] is not None:
        layers = layers[int(match[1]) : int(match[1]) + 1]
    ropes = dict.fromkeys(layer.rope for layer in layers if layer.rope is not None)
    return [torch.tensor(rope.inv_freq, dtype=torch.float32) for rope in ropes]


def _agree(stored: Tensor, expected: Tensor) -> bool:
    return stored.shape == expected.shape and torch.allclose(
        stored.float(), expected, rtol=_RELATIVE, atol=_ABSOLUTE
    )


def _shown(values: Tensor) -> str:
    flat = values.float().flatten()
    return f"{flat.numel()} values from {float(flat[0]):.6g} to {float(flat[-1]):.6g}"
