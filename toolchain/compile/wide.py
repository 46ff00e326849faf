"""Runs PyTorch code that was written for float32 in float64, to see what float32 itself costs.

``with Wide():`` every operator's float32 inputs become float64 on their way in. A model's weights
stay what they are, and no copy of them is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if value is torch.float32 else value


@contextmanager
def widened(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The numbers of ``tensors`` as float64 meanwhile: autograd gives a leaf a gradient of its own
    format only."""
    kept = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
        tensor.data = tensor.data.double()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.grad = None
            tensor.data = data


class Wide(TorchDispatchMode):
    """Under it, results are float64 where they would be float32."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name == "aten::detach" or func._schema.is_mutable:
            # In place, a tensor keeps its own format: its other inputs have to follow it.
            return func(*args, **(kwargs or {}))
        return func(*tree_map(_wide, args), **tree_map(_wide, dict(kwargs or {})))
