"""Modelled time: counted operations and bytes over what a device sustains.

The roofline (Williams, Waterman, Patterson, CACM 2009): a call takes as long as its arithmetic or
its memory traffic, whichever is longer. Weights are read from memory once a call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.phone_engine import LmCall
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.loop.errors import BundleError
from toolchain.simulate.device import Compute

_SIZES = {"float32": 4, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """``flops``: float32; ``ops``: 8-bit integers; a multiplication and an addition are two.
    ``bytes``: through the memory interface."""

    flops: float = 0.0
    ops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.ops + other.ops, self.bytes + other.bytes)

    def times(self, count: float) -> Cost:
        return Cost(self.flops * count, self.ops * count, self.bytes * count)

    def seconds(self, on: Compute) -> float:
        arithmetic = self.flops / (on.gflops * 1e9) + self.ops / (on.gops * 1e9)
        return max(arithmetic, self.bytes / (on.gigabytes_per_s * 1e9))


@dataclass(frozen=True)
class Sizes:
    """Of the transformer, from the training programs' signatures. ``matrices``: weights of all
    blocks; ``queries``, ``keys``, ``inner``: features of a token's queries, of its keys, and within
    its MLP."""

    layers: int
    matrices: int
    queries: int
    keys: int
    inner: int


class Counter:
    """What each call of a bundle's programs costs."""

    def __init__(self, bundle: Bundle) -> None:
        android, self._training = bundle.android, bundle.training
        self._programs = {program.name: program for program in android.target.programs}
        if uncounted := [
            program.name for program in android.training_programs if program.flops is None
        ]:
            raise BundleError(
                f"the manifest has no flops of {', '.join(uncounted)}: export the bundle again."
            )
        self._model = bundle.manifest.model
        self._quantized = android.quantize != "none"
        self.sizes = _sizes(bundle)

    def lm(self, call: LmCall) -> Cost:
        """Products with the weights by the head for the last token only, attention to all tokens
        before; a decode is one call a token."""
        head = 0 if call.kind == "embed" else self._model.vocab * self._model.hidden
        calls = call.tokens if call.kind == "decode" else 1
        if call.tokens == 0:
            return Cost()
        products = 2.0 * (self.sizes.matrices * call.tokens + head * calls)
        # token i of n after s sees s + i + 1 tokens, by scores and by the values' sum
        seen = call.tokens * call.start + call.tokens * (call.tokens + 1) / 2
        attention = 4.0 * self.sizes.layers * self.sizes.queries * seen
        cached = 4.0 * 2 * self.sizes.layers * self.sizes.keys  # bytes a token
        read = float(self._programs["forward"].bytes * calls)
        read += cached * (seen if call.kind == "decode" else call.start + call.tokens)
        if self._quantized:
            return Cost(attention, products, read)
        return Cost(attention + products, 0.0, read)

    def training(self, call: TrainingCall) -> Cost:
        if call.kind == "check":
            return Cost()  # its losses were calls of their own
        if call.kind == "update":
            return self._once("adamw")
        layers = len(self._training.layers)
        chunks = math.ceil(call.labels / self._training.positions)
        cost = self._once(f"block_forward_{call.length}").times(layers)
        cost += self._once("head").times(chunks)
        if call.kind == "gradient":
            cost += self._once(f"block_backward_{call.length}").times(layers)
        return cost

    def _once(self, name: str) -> Cost:
        program = self._programs[name]
        moved = sum(
            _SIZES[tensor.dtype] * math.prod(int(n) for n in tensor.shape)
            for tensor in (*program.inputs, *program.outputs)
        )
        return Cost(program.flops or 0.0, 0.0, float(moved))


def _sizes(bundle: Bundle) -> Sizes:
    model, training = bundle.manifest.model, bundle.training
    block = bundle.android.program(f"block_forward_{min(training.lengths)}")
    packed = 2 if training.precision == "int4" else 1
    weights = packed * sum(
        math.prod(int(n) for n in tensor.shape)
        for tensor in block.inputs
        if tensor.name.startswith("base.") and tensor.name.endswith((".q", ".value"))
    )
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return Sizes(model.layers, model.layers * weights, queries, keys, model.intermediate)
