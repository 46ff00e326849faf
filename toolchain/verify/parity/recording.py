"""The calls of training programs that a step makes, with what PyTorch computes for each.

Every call is then made again by another engine on the very same inputs, so a difference belongs to
the program and the layer where it shows, and to nothing before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from runtime_py.bundle.manifest import Program
from runtime_py.engine.program_calls import Programs
from toolchain.verify.arm64.emulate import Call, FileSlice, Input


@dataclass(frozen=True, eq=False)
class Recorded:
    """``layer`` None for head and adamw. Weights among the inputs still lie in their file.
    ``variant``: what is odd about the inputs, where they are not those of a step."""

    name: str
    layer: int | None
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    variant: str = ""

    @property
    def kind(self) -> str:
        """The program without its length."""
        return self.name.rstrip("0123456789").rstrip("_")

    def call(self) -> Call:
        return Call(self.name, tuple(map(_input, self.inputs)))


class Recorder:
    """``Programs`` that remember what they were called with."""

    def __init__(self, programs: Programs, layers: int) -> None:
        self._programs, self._layers = programs, layers
        self.calls: list[Recorded] = []
        self._forward, self._backward = 0, 0

    @property
    def signatures(self) -> Mapping[str, Program]:
        return self._programs.signatures

    def call(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = self._programs.call(name, inputs)
        layer = None
        if name.startswith("block_forward"):
            layer, self._forward = self._forward % self._layers, self._forward + 1
        elif name.startswith("block_backward"):
            layer = self._layers - 1 - self._backward % self._layers
            self._backward += 1
        kept = tuple(array if _mapped(array) else array.copy() for array in inputs)
        copies = tuple(array.copy() for array in outputs)
        self.calls.append(Recorded(name, layer, kept, copies))
        return outputs


def _mapped(array: np.ndarray) -> TypeGuard[np.memmap]:
    """Whether the array lies in a mapped file, as it stands there."""
    mapping = getattr(array, "_mmap", None)
    return isinstance(array, np.memmap) and mapping is not None and array.flags.c_contiguous


def _input(array: np.ndarray) -> Input:
    """A mapped weight as the part of its file that it is."""
    if not _mapped(array):
        return np.ascontiguousarray(array)
    start = np.frombuffer(array._mmap, np.uint8).ctypes.data  # type: ignore[attr-defined]
    offset = array.ctypes.data - start
    return FileSlice(Path(str(array.filename)), offset, array.dtype.name, array.shape)
