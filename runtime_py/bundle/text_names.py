"""A multi-modal model's language layers, by the names that its text model alone gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from runtime_py.loop.errors import AdapterError

# model.language_model.layers… (Transformers from 4.52 on), language_model.model.layers… (before).
_LANGUAGE_MODEL = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")


def text_name(module: str) -> str:
    """The module's path in the text model: ``model.layers.0…`` for Gemma 3's
    ``model.language_model.layers.0…``; another path as it is."""
    return _LANGUAGE_MODEL.sub("model.", module, count=1) if _is_language(module) else module


def _is_language(module: str) -> bool:
    return _LANGUAGE_MODEL.match(module) is not None


def renamed_config(
    config: dict, ranks: Mapping[str, int], alphas: Mapping[str, float], where: str
) -> dict:
    """The configuration that selects the same modules by their paths in the text model, each with
    its own rank and alpha. ``ranks``, ``alphas``: by the path in the file.

    Raises ``AdapterError`` where two modules get one path.
    """
    names = {module: text_name(module) for module in ranks}
    if len(set(names.values())) < len(names):
        raise AdapterError(
            f"{where} has modules under two names, with language_model and without; expected one."
        )
    default = {"r": config.get("r", 8), "alpha": config.get("lora_alpha", 8)}
    return config | {
        "target_modules": sorted(names.values()),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {names[m]: r for m, r in ranks.items() if r != default["r"]},
        "alpha_pattern": {names[m]: a for m, a in alphas.items() if a != default["alpha"]},
    }
