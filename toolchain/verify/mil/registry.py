"""What a MIL operation is here: a PyTorch function whose parameters are MIL's, found by name.

An operation takes a value as its parameter's annotation asks: a tensor, a tuple of tensors, or,
for what MIL calls a constant parameter, a Python number, text, or a tuple of numbers. Parameters
without a default are required.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from exporters.errors import ExportError

Value = Tensor | str
Result = Tensor | tuple[Tensor, ...]
Tensors = tuple[Tensor, ...]
Ints = tuple[int, ...]
Bools = tuple[bool, ...]

_Operator = TypeVar("_Operator", bound=Callable[..., Result])
_NARROW = (torch.float16,)


@dataclass(frozen=True)
class Kernel:
    """How an operation is computed. ``parameters``: by name, the annotation and whether it must
    be given. ``wide``: float16 arguments become float32, and the caller rounds the result."""

    name: str
    function: Callable[..., Result]
    parameters: Mapping[str, tuple[Any, bool]]
    wide: bool

    def compute(self, arguments: Mapping[str, Sequence[Value]]) -> tuple[Tensor, ...]:
        """The operation's results; ``arguments`` has one value a parameter, or several for what
        takes a tuple."""
        given = {
            name: _as(self.parameters[name][0], values, self.wide, f"{self.name}'s {name}")
            for name, values in arguments.items()
        }
        result = self.function(**given)
        return result if isinstance(result, tuple) else (result,)


KERNELS: dict[str, Kernel] = {}


def moves(*names: str) -> Callable[[_Operator], _Operator]:
    """Registers an operation that gives values as they came: float16 stays float16."""
    return _register(names, wide=False)


def computes(*names: str) -> Callable[[_Operator], _Operator]:
    """Registers an operation that calculates: what is float16 comes to it as float32."""
    return _register(names, wide=True)


def _register(names: Sequence[str], wide: bool) -> Callable[[_Operator], _Operator]:
    def register(function: _Operator) -> _Operator:
        hints = get_type_hints(function)
        parameters = {
            name: (_bare(hints[name]), parameter.default is parameter.empty)
            for name, parameter in inspect.signature(function).parameters.items()
        }
        for name in names:
            KERNELS[name] = Kernel(name, function, parameters, wide)
        return function

    return register


def _bare(annotation: Any) -> Any:
    """The annotation without ``| None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        (bare,) = (kind for kind in get_args(annotation) if kind is not types.NoneType)
        return bare
    return annotation


def _as(kind: Any, values: Sequence[Value], wide: bool, what: str) -> Any:
    """The values of one argument as a parameter's annotation asks for them."""
    if kind == Tensors:
        return tuple(_tensor(value, wide, what) for value in values)
    if len(values) != 1:
        raise ExportError(f"{what} is a tuple of {len(values)} values where one is expected.")
    (value,) = values
    if kind is str:
        if not isinstance(value, str):
            raise ExportError(f"{what} is a tensor where text is expected.")
        return value
    tensor = _tensor(value, wide, what)
    if kind is Tensor:
        return tensor
    if kind in (Ints, Bools):
        return tuple(get_args(kind)[0](number) for number in tensor.flatten().tolist())
    if tensor.numel() != 1:
        raise ExportError(f"{what} is {list(tensor.shape)} where one number is expected.")
    return kind(tensor.item())


def _tensor(value: Value, wide: bool, what: str) -> Tensor:
    if isinstance(value, str):
        raise ExportError(f"{what} is the text '{value}' where numbers are expected.")
    return value.float() if wide and value.dtype in _NARROW else value
