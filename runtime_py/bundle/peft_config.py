"""What adapter_config.json may say: the fields of a plain LoRA, and how PEFT resolves them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from runtime_py.bundle.module_patterns import check_pattern, tail_match
from runtime_py.bundle.peft_selection import check_selection
from runtime_py.loop.errors import AdapterError

Number = TypeVar("Number", int, float)

# Fields that make an adapter more than B·A·scaling, and what they are called.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside LoRA",
    "lora_bias": "a bias in B",
    "fan_in_fan_out": "transposed weights",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRA on parameters that are not modules",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel layers",
    "ensure_weight_tying": "tied adapters",
}
# Fields that do not change what the adapter computes once its tensors are there.
_PLAIN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "bias", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Initializations that leave the base model's weights as they are; the others (PiSSA, OLoRA, LoftQ,
# CorDA, LoRA-GA) change them, and their tensors mean nothing beside the original weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def fresh_config(rank: int, alpha: float, targets: Sequence[str], base_name: str) -> dict:
    """The adapter_config.json of a new LoRA on the modules named ``targets`` (e.g. "q_proj")."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    check_config(config, Path("the new adapter"))
    return config


def resolve(pattern: Mapping[str, Number] | None, module: str, default: Number) -> Number:
    """A module's own rank or alpha: that of the first pattern (a regular expression) matching the
    end of its path from a dot on, as PEFT 0.21.2 does; else the default."""
    for key, value in (pattern or {}).items():
        if tail_match(key, module):
            return value
    return default


def check_config(config: dict, where: Path) -> None:
    """Raises ``AdapterError``, naming the field, for anything but a plain LoRA on linear layers."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{where}: peft_type is {kind!r}; only 'LORA' is supported.")
    used = [f"{name} ({what})" for name, what in _REFUSED.items() if _is_used(config.get(name))]
    if used:
        raise AdapterError(
            f"{where}: {', '.join(used)} is set; only plain LoRA is supported. Merge this adapter "
            f"into its model, or train it again without."
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{where}: bias is {config['bias']!r}; only 'none' is supported, since trained biases "
            f"belong to the base model."
        )
    if config.get("init_lora_weights", True) not in _INITS:
        raise AdapterError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the "
            f"base model's weights; convert the adapter to plain LoRA (PEFT's save_pretrained "
            f"with path_initial_model_for_weight_conversion)."
        )
    unknown = sorted(
        name
        for name, value in config.items()
        if name not in _PLAIN and name not in _REFUSED and _is_used(value)
    )
    if unknown:
        raise AdapterError(
            f"{where} sets {', '.join(unknown)}, which PEFT 0.21.2 does not know; leaving that out "
            f"could change what the adapter does."
        )
    _check_rank(config.get("r", 8), f"{where}: r")
    _check_alpha(config.get("lora_alpha", 8), f"{where}: lora_alpha")
    for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
        pattern = config.get(name, {})
        if not isinstance(pattern, dict):
            raise AdapterError(f"{where}: {name} is {pattern!r}; expected names and numbers.")
        for key, value in pattern.items():
            check_pattern(key, f"{where}: {name}", tail=True)
            check(value, f"{where}: {name}[{key!r}]")
    if not isinstance(config.get("use_rslora", False), bool):
        raise AdapterError(
            f"{where}: use_rslora is {config['use_rslora']!r}; expected true or false."
        )
    check_selection(config, where)


def _is_used(value: object) -> bool:
    # An empty dict still switches a variant on: PEFT makes its default configuration of it.
    return value is not None and value is not False and value != []


def _check_rank(value: object, field: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{field} is {value!r}; a rank is an integer of at least 1.")


def _check_alpha(value: object, field: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(f"{field} is {value!r}; expected a finite number.")
