"""What a host must hand to a lowered program, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a program. A dimension is a size, or a range such as ``"1..512"``; ``dtype``
    is a NumPy name: ``"float32"``, ``"float16"``, ``"int32"``, ``"int64"``."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class ProgramSignature:
    """A program (ExecuTorch method, Core ML function). ``states`` are tensors that the runtime
    keeps between calls and the program reads and writes in place."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
