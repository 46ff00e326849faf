"""How much memory a run of training takes, and how one that fails for want of it is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.manifest import Tensor

_NO_MEMORY = ("MemoryAllocationFailed", "0x21", "bad_alloc", "DefaultCPUAllocator")


@contextmanager
def memory_errors() -> Iterator[None]:
    """ExecuTorch's failed allocations as ``MemoryError``."""
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in _NO_MEMORY):
            raise MemoryError from error
        raise


def training_bytes(bundle: Bundle, length: int) -> int:
    """An upper estimate of what a run takes with programs of ``length`` tokens, beside the mapped
    weights: every layer's input; of one block its outputs twice, its scores three times and its
    matrices in float32; the head's logits twice, and one slice of its rows twice, in float32 and
    packed; the adapter, gradient, moments, rates and the state that is kept, and the copies of them
    in an update and in what is being saved."""
    model, training = bundle.manifest.model, bundle.training
    block = bundle.android.program(f"block_forward_{length}")
    outputs = sum(_numbers(tensor) for tensor in block.outputs)
    packed = 2 if training.precision == "int4" else 1
    matrices = packed * sum(_numbers(t) for t in block.inputs if t.name.endswith((".q", ".value")))
    rows = 2 * min(training.head_slice, model.vocab) * model.hidden
    inputs = (len(training.layers) + 3) * model.hidden * length
    logits = 2 * training.positions * model.vocab
    adapter = 15 * sum(math.prod(tensor.shape) for tensor in bundle.manifest.adapter.tensors)
    block_numbers = 2 * outputs + 3 * model.heads * length * length + matrices
    return 4 * (inputs + block_numbers + logits + rows + adapter)


def _numbers(tensor: Tensor) -> int:
    return math.prod(int(n) for n in tensor.shape)
