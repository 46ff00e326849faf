"""What a model's modules take and give while it runs, by place (``toolchain.verify.parity.probes``
says what a place is)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor, nn


class PlaceRecorder:
    """``values``: float32 copies by place, in the order of computation. What it hangs on modules is
    gone after the ``with``."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> PlaceRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def put(self, place: str, value: Tensor) -> None:
        """Keeps a copy."""
        self.values[place] = value.numpy().copy()

    def output(self, module: nn.Module, place: str) -> None:
        """What ``module`` gives; of a tuple the first."""

        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            self.put(place, output[0] if isinstance(output, tuple) else output)

        self._handles.append(module.register_forward_hook(hook))

    def products(
        self,
        module: nn.Module,
        source: str,
        places: Sequence[str],
        parts: Callable[[Any], Sequence[Tensor]],
    ) -> None:
        """What ``module`` takes, at the place ``source``, and the ``parts`` of what it gives, one
        for each of ``places``. Modules that take the same give it once."""

        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if source not in self.values:
                self.put(source, inputs[0])
            for place, part in zip(places, parts(output), strict=True):
                self.put(place, part)

        self._handles.append(module.register_forward_hook(hook))

    def call(self, module: nn.Module, place: str, value: Callable[[Any], np.ndarray]) -> None:
        """``value`` of what ``module`` gives."""

        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            self.values[place] = value(output)

        self._handles.append(module.register_forward_hook(hook))
