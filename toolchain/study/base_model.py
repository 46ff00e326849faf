"""A bundle's base model in PyTorch, with the very weights that its training programs read.

Nothing but the bundle is needed: its ``config.json`` says the architecture, its weights file has
the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from exporters.model.lora_targets import lora_targets, site_targets
from exporters.model.projection import LoRA, Projection
from exporters.model.spec import ModelSpec, read_spec
from exporters.model.transformer import Block, Dense, Norm, Table, Transformer
from exporters.training.block import MATRICES
from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.loop.errors import BundleError


def bundle_spec(bundle: Bundle) -> ModelSpec:
    """What the bundle's model computes, for its context. Raises ``BundleError``."""
    path = bundle.path / bundle.manifest.model.config
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is no model's configuration ({error}): export anew.") from None
    return read_spec(config, bundle.manifest.model.context)


def stored_matrix(weights: BaseWeights, name: str) -> np.ndarray:
    """A stored matrix as float32 [out, in], read as docs/bundle.md says under "Weights file"."""
    if f"{name}.value" in weights:
        return np.array(weights[f"{name}.value"][0])
    q, scale = weights[f"{name}.q"][0], weights[f"{name}.scale"][0]
    if f"{name}.offset" not in weights:
        return q.astype(np.float32) * scale
    byte = q.astype(np.int16) + 128
    integers = np.concatenate([byte // 16 - 8, byte % 16 - 8], axis=1).astype(np.float32)
    grouped = integers.reshape(*scale.shape, -1) * scale[..., None]
    return (grouped + weights[f"{name}.offset"][0][..., None]).reshape(integers.shape)


def base_model(
    bundle: Bundle, spec: ModelSpec, modules: Sequence[str], rank: int
) -> Transformer:
    """The float32 transformer, with room for LoRA of ``rank`` on ``modules`` (short names)."""
    weights = BaseWeights(bundle.training_weights)
    adapted = lora_targets(spec, modules)
    blocks = []
    for index in range(len(spec.layers)):
        prefix = f"layers.{index}."
        parts = {}
        for site, targets in site_targets(spec).items():
            bases = [_dense(weights, f"{prefix}{name}") for name in MATRICES[site]]
            loras = [LoRA(target, rank) if target in adapted else None for target in targets]
            parts[site] = Projection(bases, loras)
        blocks.append(Block(spec, _norms(weights, prefix, spec.norm_eps), parts))
    head = torch.from_numpy(stored_matrix(weights, "head"))
    table = bundle.training.table
    lookup = head if table == "head" else torch.from_numpy(stored_matrix(weights, table))
    final = Norm(_column(weights, "norm"), spec.norm_eps)
    return Transformer(spec, Table(lookup), blocks, final, Dense(head, None)).eval()


def _dense(weights: BaseWeights, name: str) -> Dense:
    bias = _column(weights, f"{name}.bias") if f"{name}.bias" in weights else None
    return Dense(torch.from_numpy(stored_matrix(weights, name)), bias)


def _norms(weights: Mapping[str, np.ndarray], prefix: str, eps: float) -> dict[str, Norm]:
    begin = f"{prefix}norm."
    names = [name for name in weights if name.startswith(begin)]
    return {name.removeprefix(begin): Norm(_column(weights, name), eps) for name in names}


def _column(weights: Mapping[str, np.ndarray], name: str) -> Tensor:
    """A stored vector [1, n, 1] as [n]."""
    return torch.from_numpy(np.array(weights[name]).reshape(-1))

