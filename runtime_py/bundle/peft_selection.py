"""Which modules of a model an adapter_config.json selects, as PEFT 0.21.2 does.

PEFT makes its layers where the configuration says, and then drops every tensor of the file that no
layer is there for. So a tensor means something only where its module is selected.
"""

from __future__ import annotations

import re
from pathlib import Path

from runtime_py.bundle.module_patterns import check_pattern, full_match
from runtime_py.loop.errors import AdapterError

_HEAD = "lm_head"  # which "all-linear" leaves out


def is_all_linear(config: dict) -> bool:
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == "all-linear"


def selects(config: dict, module: str) -> bool:
    """Whether PEFT makes a LoRA layer of ``module``, a linear layer's path in the base model, such
    as ``model.layers.0.self_attn.q_proj``. ``config`` is one that ``check_selection`` passed."""
    excluded = config.get("exclude_modules")
    if excluded and _names(excluded, module):
        return False
    targets = config["target_modules"]
    if is_all_linear(config):
        return module.rsplit(".", 1)[-1] != _HEAD
    if isinstance(targets, str) or module in targets:  # a whole path is never left out by its layer
        return _names(targets, module)
    return _names(targets, module) and _in_layers(config, module)


def check_selection(config: dict, where: Path) -> None:
    """Raises ``AdapterError``, naming the field, for what PEFT does not load, or would have to know
    the base model for."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if targets is None:
        raise AdapterError(
            f"{where} has no target_modules, which PEFT would then choose by the base model; write "
            f'down which modules it has, such as ["q_proj", "v_proj"].'
        )
    for name, value in (("target_modules", targets), ("exclude_modules", excluded)):
        if isinstance(value, str):
            check_pattern(value, f"{where}: {name}")
        elif value is not None and not _is_list(value, str):
            raise AdapterError(
                f"{where}: {name} is {value!r}; expected a list of module names or a regular "
                f"expression."
            )
    if layers is not None and not (_is_list(layers, int) or _is_list([layers], int)):
        raise AdapterError(
            f"{where}: layers_to_transform is {layers!r}; expected a layer's number or a list of "
            f"them."
        )
    patterns = pattern if isinstance(pattern, list) else [pattern]
    if pattern is not None and not all(
        isinstance(name, str) and re.fullmatch(r"[\w.]*", name) for name in patterns
    ):
        raise AdapterError(
            f"{where}: layers_pattern is {pattern!r}; expected the name of the list of layers, "
            f'such as "layers", or a list of names.'
        )
    if isinstance(targets, str) and not (layers is pattern is None):
        raise AdapterError(
            f"{where}: target_modules is {targets!r}, beside which PEFT takes no "
            f"layers_to_transform and no layers_pattern; list the modules' names."
        )
    if pattern and layers is None:
        raise AdapterError(
            f"{where}: layers_pattern is {pattern!r} without layers_to_transform, which PEFT does "
            f"not load; give the layers' numbers."
        )


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _names(modules: str | list[str], module: str) -> bool:
    if isinstance(modules, str):
        return full_match(modules, module)
    return any(module == m or module.endswith(f".{m}") for m in modules)


def _in_layers(config: dict, module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    if isinstance(patterns, str):
        patterns = [patterns] if patterns else None
    found = None
    if not patterns:  # PEFT: the first number after a name
        found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    for pattern in patterns or ():
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            break
    if found is None:
        return False
    return int(found[1]) in (layers if isinstance(layers, list) else [layers])
