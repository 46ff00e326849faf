"""An adapter while it is trained: its tensors and AdamW's moments as flat matrices of numbers.

All trained tensors lie one after another in one [rows, 1024] float32 matrix, in the manifest's
order, zeros at the end; ``gradient``, ``mean`` and ``square`` have the same layout. A program is
handed views of it, so an update changes what the next call sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime_py.bundle.manifest import AdapterTensor

COLUMNS = 1024


def is_b(name: str) -> bool:
    """Whether a trained tensor is a B: ``….lora_B``, or ``….lora_B_0`` where there are several."""
    return name.rsplit(".", 1)[1].startswith("lora_B")


@dataclass(frozen=True)
class FlatLayout:
    """Where each trained tensor lies: name -> (first number, shape)."""

    places: Mapping[str, tuple[int, tuple[int, ...]]]
    rows: int

    @staticmethod
    def of(tensors: Sequence[AdapterTensor]) -> FlatLayout:
        places, start = {}, 0
        for tensor in tensors:
            if tensor.name.endswith(".scale"):
                continue
            places[tensor.name] = (start, tensor.shape)
            start += int(np.prod(tensor.shape))
        return FlatLayout(places, -(-start // COLUMNS))

    def zeros(self) -> np.ndarray:
        """float32 [rows, 1024]"""
        return np.zeros((self.rows, COLUMNS), np.float32)

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of a matrix of this layout, sharing its memory."""
        line = flat.reshape(-1)
        return {
            name: line[start : start + int(np.prod(shape))].reshape(shape)
            for name, (start, shape) in self.places.items()
        }

    def fill_rates(self, into: np.ndarray, a: float, b: float) -> None:
        """``into`` [rows, 1024]: ``a`` at every number of an A, ``b`` at every number of a B."""
        for name, view in self.views(into).items():
            view[...] = b if is_b(name) else a

    @property
    def digest(self) -> str:
        """Which adapter a saved state belongs to: a hash of names, places and shapes."""
        text = ";".join(f"{n}:{p}:{s}" for n, (p, s) in self.places.items())
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(eq=False)
class AdapterState:
    """``parameters``, ``mean``, ``square`` float32 [rows, 1024]; ``scales``: the fixed factor of
    each module, by name; ``step``: updates so far."""

    layout: FlatLayout
    parameters: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    scales: Mapping[str, np.ndarray]
    step: int = 0
    _layers: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @staticmethod
    def of(tensors: Sequence[AdapterTensor], values: Mapping[str, np.ndarray]) -> AdapterState:
        """A fresh state from an adapter's values by name."""
        layout = FlatLayout.of(tensors)
        parameters = layout.zeros()
        for name, view in layout.views(parameters).items():
            view[...] = values[name]
        scales = {
            t.name: np.ascontiguousarray(values[t.name], dtype=np.float32)
            for t in tensors
            if t.name.endswith(".scale")
        }
        return AdapterState(layout, parameters, layout.zeros(), layout.zeros(), scales)

    def replace(self, parameters: np.ndarray, mean: np.ndarray, square: np.ndarray) -> None:
        """The result of an update, copied into this state's own memory."""
        self.parameters[...] = parameters
        self.mean[...] = mean
        self.square[...] = square
        self.step += 1

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor that the programs take, by name: views of ``parameters``, and the scales."""
        return {**self.layout.views(self.parameters), **self.scales}

    def of_layer(self, layer: int) -> dict[str, np.ndarray]:
        """Those of one layer as its programs name them: ``adapter.self_attn.q_proj.lora_A`` …"""
        if not self._layers:
            for name, value in self.tensors.items():
                _, index, rest = name.split(".", 2)
                self._layers.setdefault(int(index), {})[f"adapter.{rest}"] = value
        return self._layers[layer]
