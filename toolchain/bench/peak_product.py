"""The machine's peak: a float32 product of large squares, in torch and in XNNPACK."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from exporters.errors import ExportError
from runtime_py.engine.native import silenced

SIZE = 1536  # rows and columns


class _BatchedProduct(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)


class PeakProduct:
    """It is timed in every round, so that what slows the contestants down slows it down as well.
    ``folder`` takes the lowered product."""

    def __init__(self, folder: Path) -> None:
        self._a, self._b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
        with silenced():
            self._xnnpack = _xnnpack_product(folder / "product.pte")

    def rate(self) -> float:
        """FLOP/s of the better of the two, the best of three."""
        best = float("inf")
        for product in (torch.mm, lambda a, b: self._xnnpack(a[None], b[None])):
            for _ in range(3):
                begin = time.perf_counter()
                product(self._a, self._b)
                best = min(best, time.perf_counter() - begin)
        return 2.0 * SIZE**3 / best


def _xnnpack_product(path: Path) -> Callable[[Tensor, Tensor], object]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    inputs = (torch.zeros(1, SIZE, SIZE), torch.zeros(1, SIZE, SIZE))
    program = torch.export.export(_BatchedProduct(), inputs, strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    loaded = Runtime.get().load_program(path)
    method = loaded.load_method("forward")
    if method is None:
        raise ExportError(f"ExecuTorch does not load {path}: reinstall executorch.")

    # The method is nothing without its program, which the default keeps alive.
    def call(a: Tensor, b: Tensor, program: object = loaded) -> object:
        return method.execute((a, b))

    return call
