"""Where several steps of training lead, by one engine and by another.

AdamW divides by the root of a square, which amplifies the last digits of small gradients: no bound
follows from the number format. How much it is shows PyTorch, with float32 gradients beside float64
ones, on the same examples in the same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime_py.bundle.adapter_state import AdapterState
from toolchain.compile.tolerances import ABOVE, TABLE


@dataclass(frozen=True, eq=False)
class Way:
    """``losses`` of the steps; by each trained tensor its ``values`` at the end, and how far the
    number came that ``moved`` most."""

    losses: np.ndarray
    values: dict[str, np.ndarray]
    moved: dict[str, float]

    @classmethod
    def of(cls, start: AdapterState, end: AdapterState, losses: np.ndarray) -> Way:
        values = {name: end.tensors[name] for name in end.layout.places}
        moved = {n: float(np.abs(v - start.tensors[n]).max()) for n, v in values.items()}
        return cls(np.asarray(losses, np.float64), values, moved)


def apart(found: Way, expected: Way, sizes: Mapping[str, float]) -> tuple[float, float]:
    """The largest difference of a loss as a part of the largest loss, and of a number of the
    adapter as a part of its tensor's of ``sizes``."""
    losses = float(np.abs(found.losses - expected.losses).max() / np.abs(expected.losses).max())
    values = (
        float(np.abs(found.values[name] - value).max()) / sizes[name]
        for name, value in expected.values.items()
    )
    return losses, max(values)


def check_same_way(found: Way, single: Way, wide: Way, sizes: Mapping[str, float]) -> None:
    """``single``: PyTorch's with float32 gradients, ``wide``: with float64 ones. Never more than
    the limit on power of the ladder's own training runs, which is one per cent of ``sizes``."""
    most = TABLE["training run"].max_rel
    assert most is not None
    gaps, spreads = (apart(one, wide, sizes) for one in (found, single))
    for what, gap, spread in zip(("losses", "adapter"), gaps, spreads, strict=True):
        bound = min(ABOVE * spread, most)
        print(f"{what}: {gap:.2g} apart, {bound:.2g} allowed")
        assert gap <= bound, what
