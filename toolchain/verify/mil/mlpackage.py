"""An .mlpackage on disk as a plain description of its functions, read without Core ML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from exporters.coreml.patches import quiet
from exporters.errors import ExportError
from toolchain.verify.mil.blob import BlobFile
from toolchain.verify.mil.values import Constant, Stored, TensorType, find_dtype, from_immediate

_ROOT = "@model_path"  # the folder of the model file, in the names of weight files


@dataclass(frozen=True)
class Name:
    """An argument that is the value of that name."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One operation of a function. ``arguments``: by parameter, one or, for a tuple, several.
    ``outputs``: by name, their types; None is text."""

    type: str
    name: str
    arguments: Mapping[str, tuple[Name | Constant, ...]]
    outputs: Mapping[str, TensorType | None]
    nested: bool  # has blocks of operations inside, as control flow has


@dataclass(frozen=True)
class MilFunction:
    """A function. What it reads and writes of its states is among its operations."""

    name: str
    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    @cached_property
    def last_uses(self) -> tuple[tuple[str, ...], ...]:
        """By operation: the values that nothing after it reads."""
        last: dict[str, int] = {}
        for index, operation in enumerate(self.operations):
            # What nobody reads is done with where it is made.
            last |= dict.fromkeys(operation.outputs, index)
            for several in operation.arguments.values():
                last |= {value.name: index for value in several if isinstance(value, Name)}
        free: list[list[str]] = [[] for _ in self.operations]
        for name, index in last.items():
            if name not in self.outputs:
                free[index].append(name)
        return tuple(tuple(names) for names in free)


@dataclass(frozen=True)
class Package:
    """A package's functions by name."""

    path: Path
    functions: Mapping[str, MilFunction]

    def function(self, name: str) -> MilFunction:
        if name not in self.functions:
            raise ExportError(
                f"{self.path.name} has no function '{name}'; it has {', '.join(self.functions)}."
            )
        return self.functions[name]


def read_package(path: Path) -> Package:
    """Reads an .mlpackage that holds an ML program. Weights are mapped, not read.

    Raises ``ExportError`` for a folder that is not one, or a program whose description uses what
    this package does not know.
    """
    model_path = _model_file(path)
    with quiet():
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    model = Model_pb2.Model()
    try:
        model.ParseFromString(model_path.read_bytes())
    except DecodeError as error:
        raise ExportError(f"{model_path} is not a Core ML model: {error}.") from error
    if model.WhichOneof("Type") != "mlProgram":
        raise ExportError(f"{path.name} holds a {model.WhichOneof('Type')}, not an ML program.")
    reader = _PackageReader(model_path.parent)
    functions = {
        name: reader.function(name, function)
        for name, function in sorted(model.mlProgram.functions.items())
    }
    return Package(path, functions)


def _model_file(path: Path) -> Path:
    """The model file of a package, as the package's manifest names it."""
    listing = path / "Manifest.json"
    if not listing.is_file():
        raise ExportError(f"{path} is not an .mlpackage: it has no Manifest.json.")
    try:
        manifest = json.loads(listing.read_text())
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ExportError(f"{listing} does not name a model: {error!r}.") from error
    model = path / "Data" / item
    if not model.is_file():
        raise ExportError(f"{model} is missing: the package is not complete.")
    return model


def _undefined(function: MilFunction) -> list[str]:
    """The names that are used before they are given, or never are."""
    given = {*function.inputs, *function.states}
    undefined = []
    for operation in function.operations:
        names = [
            v.name
            for several in operation.arguments.values()
            for v in several
            if isinstance(v, Name)
        ]
        undefined += [name for name in names if name not in given]
        given |= operation.outputs.keys()
    return undefined + [name for name in function.outputs if name not in given]


class _PackageReader:
    """Messages of one model file into descriptions; its weight files are opened once."""

    def __init__(self, folder: Path) -> None:
        from coremltools.proto import MIL_pb2

        self._folder = folder
        self._files: dict[str, BlobFile] = {}
        self._dtype_name = MIL_pb2.DataType.Name
        self._text = MIL_pb2.STRING

    def function(self, name: str, function: Any) -> MilFunction:
        """Of the block for the function's own opset. Raises ``ExportError`` where there is none, or
        where it reads a value before one is given."""
        if function.opset not in function.block_specializations:
            raise ExportError(f"function '{name}' has no block for its opset {function.opset}.")
        block = function.block_specializations[function.opset]
        inputs, states = {}, {}
        for given in (*function.inputs, *block.inputs):
            if given.type.HasField("stateType"):
                states[given.name] = self.type(given.type.stateType.wrappedType, given.name)
            else:
                inputs[given.name] = self.type(given.type, given.name)
        operations = tuple(self.operation(operation) for operation in block.operations)
        read = MilFunction(name, inputs, states, tuple(block.outputs), operations)
        if undefined := _undefined(read):
            raise ExportError(
                f"function '{name}' uses values that nothing before gives: {', '.join(undefined)}."
            )
        return read

    def operation(self, operation: Any) -> Operation:
        """With its attributes as arguments, but for its name, and the type of each output."""
        name = ""
        arguments: dict[str, tuple[Name | Constant, ...]] = {}
        for key, value in operation.attributes.items():
            if key == "name":
                name = value.immediateValue.tensor.strings.values[0]
            else:  # ``val`` of a constant, and what iOS 16 gives to its compressed constants
                arguments[key] = (self.value(value, key),)
        for key, argument in operation.inputs.items():
            arguments[key] = tuple(
                Name(binding.name)
                if binding.WhichOneof("binding") == "name"
                else self.value(binding.value, key)
                for binding in argument.arguments
            )
        outputs = {
            output.name: None if self.text(output.type) else self.type(output.type, output.name)
            for output in operation.outputs
        }
        named = name or next(iter(outputs), operation.type)
        return Operation(operation.type, named, arguments, outputs, bool(operation.blocks))

    def text(self, value: Any) -> bool:
        return value.tensorType.dataType == self._text

    def type(self, value: Any, name: str) -> TensorType:
        if value.WhichOneof("type") != "tensorType":
            raise ExportError(f"{name} is a {value.WhichOneof('type')}: only tensors are known.")
        tensor = value.tensorType
        shape = tuple(
            size.constant.size if size.WhichOneof("dimension") == "constant" else None
            for size in tensor.dimensions
        )
        return TensorType(find_dtype(self._dtype_name(tensor.dataType).lower()), shape)

    def value(self, value: Any, name: str) -> Constant:
        immediate = value.WhichOneof("value") == "immediateValue"
        if immediate and value.immediateValue.WhichOneof("value") != "tensor":
            kind = value.immediateValue.WhichOneof("value")
            raise ExportError(f"{name} is a constant {kind}: only tensors are known.")
        if immediate and self.text(value.type):
            (text,) = value.immediateValue.tensor.strings.values
            return str(text)
        declared = self.type(value.type, name)
        if immediate:
            return from_immediate(value.immediateValue.tensor, declared)
        return Stored(declared, self.file(value.blobFileValue.fileName), value.blobFileValue.offset)

    def file(self, name: str) -> BlobFile:
        parts = PurePosixPath(name).parts
        if len(parts) < 2 or parts[0] != _ROOT or ".." in parts:
            raise ExportError(f"weight file '{name}' does not lie inside of the package.")
        if name not in self._files:
            self._files[name] = BlobFile(self._folder.joinpath(*parts[1:]))
        return self._files[name]
