"""PEFT's own module around a Hugging Face model: its LoRA tensors by the programs' names.

A name such as ``layers.0.self_attn.q_proj.lora_A`` is the module's own, whatever the manifest says
of PEFT's names: so an adapter that is put into another module is seen. The programs have one rank
for all modules; where PEFT's module has a smaller one, the rest of a program's tensor is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.loop.errors import AdapterError

_PREFIX = "base_model.model.model."
_ADAPTER = "default"  # PEFT's name of the one adapter that a model has


def peft_parameters(
    model: nn.Module, tensors: Sequence[AdapterTensor]
) -> dict[str, tuple[nn.Parameter, slice]]:
    """Of each trained tensor: PEFT's parameter, and the rows of it that the program's tensor is."""
    parameters = dict(model.named_parameters())
    places = {}
    for tensor in tensors:
        module, part = tensor.name.rsplit(".", 1)
        if part == "scale":
            continue
        kind = "lora_A" if part == "lora_A" else "lora_B"
        rows = slice(None) if kind == "lora_A" else slice(*tensor.rows)
        places[tensor.name] = parameters[f"{_PREFIX}{module}.{kind}.{_ADAPTER}.weight"], rows
    return places


def _scales(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield f"{path.removeprefix(_PREFIX)}.scale", module


@torch.no_grad()
def set_peft_adapter(
    model: nn.Module, tensors: Sequence[AdapterTensor], values: Mapping[str, np.ndarray]
) -> None:
    """Copies ``values`` (the programs' tensors by name, float32) into PEFT's module, scales
    included.

    Raises ``AdapterError`` where a value lies beyond a module's own rank, so that PEFT's module
    cannot hold it.
    """
    for name, (parameter, rows) in peft_parameters(model, tensors).items():
        place, value = parameter[rows], values[name][0]
        held = tuple(slice(0, size) for size in place.shape)
        if np.count_nonzero(value) != np.count_nonzero(value[held]):
            raise AdapterError(
                f"{name} has values beyond the rank of PEFT's module, {list(place.shape)}: "
                f"expected zeros there."
            )
        place.copy_(torch.from_numpy(value[held]))
    for name, module in _scales(model):
        module.scaling[_ADAPTER] = float(values[name].item())


def peft_values(model: nn.Module, tensors: Sequence[AdapterTensor]) -> dict[str, np.ndarray]:
    """What PEFT's module holds, by the programs' names, scales included: [1, …], of the module's
    own rank."""
    values = {
        name: parameter[rows].detach().numpy()[None].copy()
        for name, (parameter, rows) in peft_parameters(model, tensors).items()
    }
    for name, module in _scales(model):
        values[name] = np.full((1, 1, 1), module.scaling[_ADAPTER], np.float32)
    return values


def padded(part: Tensor, shape: Sequence[int]) -> np.ndarray:
    """``part`` (of a module's own rank) as a program's tensor [1, …] of ``shape``, zeros beyond;
    its dtype is kept."""
    array = part.detach().numpy()
    result = np.zeros(tuple(shape), array.dtype)
    result[0][tuple(slice(0, size) for size in array.shape)] = array
    return result
