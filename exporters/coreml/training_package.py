"""The training programs as one multifunction Core ML package, computed in float32.

Base weights are float32 inputs here: Core ML takes no smaller integers than int32 from outside, so
an app unpacks a layer before its calls. Names have ``_`` for every ``.``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from exporters.coreml.convert import convert
from exporters.coreml.multifunction import check, merge
from exporters.coreml.patches import DECOMPOSITIONS, quiet
from exporters.signature import ProgramSignature
from exporters.training.programs import TrainingProgram

_CONSTANTS = 64  # most rows of ones or averages in the functions of one package


def coreml_name(name: str) -> str:
    return name.replace(".", "_")


def _named(program: TrainingProgram) -> ProgramSignature:
    signature = program.signature
    taken = {spec.name for spec in signature.inputs}
    inputs = tuple(replace(spec, name=coreml_name(spec.name)) for spec in signature.inputs)
    # Core ML wants an output under a name of its own.
    outputs = tuple(
        replace(spec, name=coreml_name(spec.name) + ("_new" if spec.name in taken else ""))
        for spec in signature.outputs
    )
    return ProgramSignature(signature.name, inputs, outputs)


def lower_training(programs: Sequence[TrainingProgram], out: Path) -> list[ProgramSignature]:
    """Writes the .mlpackage ``out`` with one function a program -> the functions' signatures.

    Raises ``ExportError`` for a package that does not hold what was lowered."""
    signatures = [_named(program) for program in programs]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as folder, quiet():
        parts = {}
        for program, signature in zip(programs, signatures, strict=True):
            with torch.no_grad():
                captured = torch.export.export(program.module, program.example(), strict=False)
            path = Path(folder) / f"{signature.name}.mlpackage"
            convert(captured.run_decompositions(dict(DECOMPOSITIONS)), signature, {}, False, path)
            parts[signature.name] = path
        merge(parts, signatures[0].name, out)
    check(out, signatures, 0, _CONSTANTS * 100)
    return signatures
