"""Float32's last bit as a yardstick: how far a model drifts from itself by it.

Where activations are rounded to int8, such a change turns some roundings the other way, each a step
of 1/255 of the token's range, and what comes after sees another input. Two exact computations of
one model differ by as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from exporters.model.transformer import Transformer

PERTURBATION = 1e-7  # relative, of each embedding channel: one bit of float32


@contextmanager
def perturbed(model: Transformer, seed: int) -> Iterator[None]:
    """Within it, each number of ``model``'s token embeddings changes by ``PERTURBATION`` of itself
    times a normal deviate."""
    random = torch.Generator().manual_seed(seed)

    def change(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=random, dtype=torch.float64)
        return (output.double() * (1.0 + PERTURBATION * noise)).float()

    handle = model.table.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
