"""Runs the functions of a package, one operation after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.errors import ExportError
from toolchain.verify.mil.mlpackage import MilFunction, Name, Operation, Package
from toolchain.verify.mil.operations import CONSTANT, READ_STATE, WRITE_STATE, is_constant, kernels
from toolchain.verify.mil.registry import Kernel, Value
from toolchain.verify.mil.values import Constant, Stored, TensorType

# Is shown each value that a run computes, with its operation and name; it must not change it.
Watch = Callable[[Operation, str, Tensor], None]


@dataclass(frozen=True)
class _Compressed:
    """A compressed constant, which becomes numbers when it is used."""

    operation: Operation
    kernel: Kernel
    arguments: Mapping[str, tuple[Constant, ...]]

    def key(self) -> tuple[object, ...]:
        """Equal for constants that are the same bytes of the same file, in any function."""
        parts = [
            (name, *(str(v.tolist()) if isinstance(v, Tensor) else v for v in values))
            for name, values in sorted(self.arguments.items())
        ]
        return (self.operation.type, *parts)


_Held = Constant | _Compressed


class Interpreter:
    """Computes the functions of ``package``.

    ``keep_bytes``: how many bytes of decompressed constants to keep between uses. At 0 each is
    decompressed anew whenever it is used, and only one is in memory at a time. What functions
    share is kept once.
    """

    def __init__(self, package: Package, keep_bytes: int = 0) -> None:
        self.package = package
        self._room = keep_bytes
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def states(self, function: str) -> dict[str, Tensor]:
        """New states of a function, all zero, as Core ML makes them. A host gives the same states
        to every function that shares them."""
        declared = self.package.function(function).states
        return {name: _zeros(name, kind) for name, kind in declared.items()}

    @torch.no_grad()
    def run(
        self,
        function: str,
        inputs: Mapping[str, Tensor],
        states: MutableMapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """A function's outputs by name. ``inputs`` have exactly the names, shapes and dtypes that
        it declares.

        ``states`` has new tensors afterwards for what the function wrote; if it fails, they are
        what they were. ``watch`` is called for each value in the order of computation, but not for
        constants. Raises ``ExportError`` for operations that are unknown, before anything is
        computed; for all arguments that do not fit; and for an operation that fails, by its name.
        """
        called = self.package.function(function)
        table = kernels(called)
        given = {} if states is None else states
        _check(called, inputs, given)
        current = {name: given[name] for name in called.states}
        values: dict[str, _Held] = dict(inputs)
        for index, operation in enumerate(called.operations):
            if is_constant(operation):
                values[_only(operation)] = _constant(operation, table, values)
            else:
                results = self._results(called, operation, table, values, current)
                values.update(results)
                if watch is not None:
                    for name, result in results.items():
                        watch(operation, name, result)
            for name in called.last_uses[index]:
                values.pop(name, None)
        outputs = {name: self._tensor(values[name], name) for name in called.outputs}
        given.update(current)
        return outputs

    @torch.no_grad()
    def constants(self, function: str) -> Iterator[tuple[str, Tensor]]:
        """A function's constants by name, but for text, as its operations see them: decompressed,
        one at a time."""
        called = self.package.function(function)
        table = kernels(called)
        values: dict[str, _Held] = {}
        for operation in filter(is_constant, called.operations):
            name = _only(operation)
            values[name] = _constant(operation, table, values)
            if not isinstance(values[name], str):
                yield name, self._tensor(values[name], name)

    def _results(
        self,
        called: MilFunction,
        operation: Operation,
        table: Mapping[str, Kernel],
        values: Mapping[str, _Held],
        current: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """What an operation that is not a constant gives, by name; writes into ``current``."""
        if operation.type == READ_STATE:
            return {_only(operation): current[_state(operation, "input", called)]}
        if operation.type in WRITE_STATE:
            state, parameter = WRITE_STATE[operation.type]
            (given,) = operation.arguments[parameter]
            written = self._tensor(_held(given, values), operation.name)
            name = _state(operation, state, called)
            if not called.states[name].admits(written):
                raise ExportError(f"{operation.name} writes {_shown(written)} into state '{name}'.")
            current[name] = written
            return dict.fromkeys(operation.outputs, written)
        arguments = self._arguments(operation.arguments, values)
        return _computed(operation, table[operation.type], arguments)

    def _arguments(
        self, arguments: Mapping[str, tuple[Name | Constant, ...]], values: Mapping[str, _Held]
    ) -> dict[str, list[Value]]:
        return {
            parameter: [self._value(_held(given, values)) for given in several]
            for parameter, several in arguments.items()
        }

    def _value(self, held: _Held) -> Value:
        if isinstance(held, Stored):
            return held.load()
        if not isinstance(held, _Compressed):
            return held
        key = held.key()
        if key in self._kept:
            return self._kept[key]
        arguments = self._arguments(held.arguments, {})
        (tensor,) = _computed(held.operation, held.kernel, arguments).values()
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._kept[key] = tensor
        return tensor

    def _tensor(self, held: _Held, name: str) -> Tensor:
        value = self._value(held)
        if isinstance(value, str):
            raise ExportError(f"{name} is text where a tensor is expected.")
        return value


def _computed(
    operation: Operation, kernel: Kernel, arguments: Mapping[str, Sequence[Value]]
) -> dict[str, Tensor]:
    """The operation's results by name, in the declared dtypes and of the declared shapes."""
    what = f"{operation.type} ({operation.name})"
    try:
        results = kernel.compute(arguments)
    except ExportError as error:
        raise ExportError(f"{what} {error}") from error
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = {
            parameter: [list(v.shape) if isinstance(v, Tensor) else v for v in several]
            for parameter, several in arguments.items()
        }
        raise ExportError(f"{what} fails on arguments {shapes}: {error}") from error
    if len(results) != len(operation.outputs):
        raise ExportError(f"{what} gives {len(results)} values for {len(operation.outputs)} names.")
    rounded = {}
    for (name, declared), result in zip(operation.outputs.items(), results, strict=True):
        if declared is None:
            raise ExportError(f"{what} is declared to give text.")
        carrier = declared.dtype.carrier
        if result.dtype.is_floating_point and carrier.is_floating_point:
            result = result.to(carrier)
        if not declared.admits(result):
            raise ExportError(f"{what} gives {_shown(result)} where {declared} is declared.")
        rounded[name] = result
    return rounded


def _constant(
    operation: Operation, table: Mapping[str, Kernel], values: Mapping[str, _Held]
) -> _Held:
    if operation.type == CONSTANT:
        (value,) = operation.arguments["val"]
        if isinstance(value, Name):
            raise ExportError(f"constant {operation.name} has no value of its own.")
        return value
    arguments: dict[str, tuple[Constant, ...]] = {}
    for parameter, several in operation.arguments.items():
        resolved = [_held(given, values) for given in several]
        nested = [value for value in resolved if isinstance(value, _Compressed)]
        if nested:
            raise ExportError(
                f"{operation.type} ({operation.name}) takes {nested[0].operation.name}, which is "
                f"compressed itself: this is not known."
            )
        arguments[parameter] = tuple(v for v in resolved if not isinstance(v, _Compressed))
    return _Compressed(operation, table[operation.type], arguments)


def _only(operation: Operation) -> str:
    (name,) = operation.outputs
    return name


def _held(given: Name | Constant, values: Mapping[str, _Held]) -> _Held:
    return values[given.name] if isinstance(given, Name) else given


def _state(operation: Operation, parameter: str, called: MilFunction) -> str:
    (given,) = operation.arguments[parameter]
    if not isinstance(given, Name) or given.name not in called.states:
        raise ExportError(f"{operation.type} ({operation.name}) names no state.")
    return given.name


def _zeros(name: str, declared: TensorType) -> Tensor:
    sizes = [size for size in declared.shape if size is not None]
    if len(sizes) != len(declared.shape):
        raise ExportError(f"state '{name}' has the type {declared}, without a definite shape.")
    return torch.zeros(sizes, dtype=declared.dtype.carrier)


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check(called: MilFunction, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
    """Raises ``ExportError`` with every input and state that is missing or does not fit."""
    misfits = [
        f"{kind} '{name}' is {_shown(given[name]) if name in given else 'missing'}, not {declared}"
        for kind, expected, given in (
            ("input", called.inputs, inputs),
            ("state", called.states, states),
        )
        for name, declared in expected.items()
        if name not in given or not declared.admits(given[name])
    ]
    misfits += [f"input '{name}' is not known" for name in inputs if name not in called.inputs]
    if misfits:
        raise ExportError(f"function '{called.name}': {'; '.join(misfits)}.")
