"""Calls of training programs on the host's own memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime_py.bundle.manifest import Program
from runtime_py.engine.native import silenced
from runtime_py.loop.errors import TrainingError


class Programs(Protocol):
    """Programs by name. What a call returns may be overwritten by the next call of that name."""

    @property
    def signatures(self) -> Mapping[str, Program]: ...

    def call(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]: ...


class ExecutorchPrograms:
    """The methods of training .pte files in ExecuTorch: inputs are read where they lie."""

    def __init__(
        self, folder: Path, programs: Sequence[Program], threads: int | None = None
    ) -> None:
        from runtime_py.engine.executorch_library import load_program, set_threads

        if threads is not None:
            set_threads(threads)
        self.signatures = {program.name: program for program in programs}
        # A method is nothing without its program, which must outlive it.
        self._files = {
            file: load_program(folder / file)
            for file in dict.fromkeys(program.file for program in programs)
        }
        self._methods: dict[str, Any] = {}

    def _method(self, name: str) -> Any:
        if name not in self._methods:
            program = self._files[self.signatures[name].file]
            if name not in map(program.get_method_name, range(program.num_methods())):
                raise TrainingError(
                    f"{self.signatures[name].file} has no method {name}: export the bundle again."
                )
            with silenced():
                self._methods[name] = program.load_method(name)
        return self._methods[name]

    def call(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        method = self._method(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mapped weights are read-only, and are only read
            tensors = [torch.from_numpy(array) for array in inputs]
        outputs = method.call(tensors, False)
        return [output.numpy() for output in outputs]
