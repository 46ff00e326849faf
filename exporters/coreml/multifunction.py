"""Merging one-function packages into one that shares its weights, and checking what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.errors import ExportError
from exporters.signature import ProgramSignature, TensorSpec

_WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
_BLOB = 192  # bytes of header and alignment that a constant may add to the weight file


def merge(parts: Mapping[str, Path], default: str, out: Path) -> None:
    """Writes one package whose functions are the ``main`` functions of ``parts``, by name."""
    import coremltools as ct

    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, path in parts.items():
        descriptor.add_function(str(path), src_function_name="main", target_function_name=name)
    descriptor.default_function_name = default
    ct.utils.save_multifunction(descriptor, str(out))


def weight_bytes(package: Path) -> int:
    """The size of a package's weight file."""
    return (package / _WEIGHTS).stat().st_size


def read_signatures(package: Path) -> list[ProgramSignature]:
    """What a package says about its functions. Raises ``ExportError`` if it has none."""
    import coremltools as ct

    spec = ct.utils.load_spec(str(package))
    functions = spec.description.functions
    if not functions:
        raise ExportError(f"{package} has no functions: it is not a multifunction package.")
    names = {
        ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16: "float16",
        ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32: "float32",
        ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32: "int32",
    }

    def read(features: Any) -> tuple[TensorSpec, ...]:
        specs = []
        for feature in features:
            kind = feature.type
            array = kind.stateType.arrayType if kind.HasField("stateType") else kind.multiArrayType
            dtype = names.get(array.dataType, f"data type {array.dataType}")
            specs.append(TensorSpec(feature.name, tuple(array.shape), dtype))
        return tuple(specs)

    return [
        ProgramSignature(f.name, read(f.input), read(f.output), read(f.state)) for f in functions
    ]


def check(package: Path, expected: Sequence[ProgramSignature], ideal: int, constants: int) -> int:
    """Checks that a package holds the expected functions and one copy of their weights.

    ``ideal`` is the bytes of that copy and ``constants`` the number of its tensors. Returns the
    size of the weight file; raises ``ExportError`` with every difference.
    """
    written = {signature.name: signature for signature in read_signatures(package)}
    differences = []
    if sorted(written) != sorted(signature.name for signature in expected):
        differences.append(f"its functions are {sorted(written)}")
    for signature in expected:
        if signature.name not in written:
            continue
        other = written[signature.name]
        for kind in ("inputs", "outputs", "states"):
            expected_specs = set(getattr(signature, kind))
            written_specs = set(getattr(other, kind))
            for spec in sorted(expected_specs ^ written_specs, key=lambda s: s.name):
                where = "lacks" if spec in expected_specs else "has unexpectedly"
                differences.append(
                    f"{signature.name} {where} among its {kind} {spec.name} "
                    f"{list(spec.shape)} {spec.dtype}"
                )
    stored = weight_bytes(package)
    most = ideal + ideal // 100 + constants * _BLOB
    if stored > most or stored < ideal:
        differences.append(
            f"its weight file has {stored:,} bytes where one copy of the weights has {ideal:,} "
            f"(at most {most:,} with its headers): weights are missing, repeated, or not rounded "
            f"as asked"
        )
    if differences:
        raise ExportError(f"{package.name} is not what was lowered: {'; '.join(differences)}.")
    return stored
