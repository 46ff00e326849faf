"""Whole steps of training: two engines on one example, and the calls that a step makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Protocol

import numpy as np
from torch import Tensor

from exporters.model.spec import ModelSpec
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import Example
from runtime_py.engine.program_calls import Programs
from runtime_py.engine.streaming import StreamingEngine, step_numbers
from runtime_py.engine.training_engine import TrainingEngine
from toolchain.compile.tolerances import (
    Tolerance,
    gradient_limit,
    of_gradient,
    of_loss,
    of_optimizer,
)
from toolchain.compile.wide import Wide, widened
from toolchain.verify.parity.recording import Recorded, Recorder
from toolchain.verify.parity.verdict import Check, compare, worst

RATES, DECAY, CLIP = (1e-3, 4e-3), 0.01, 1.0  # of A and of B: a mixed-up one shows
_STEEP = 16.0


class WideEngine(TrainingEngine, Protocol):
    """A reference in PyTorch. ``trained``: the leaves that its gradient is of."""

    @property
    def trained(self) -> Sequence[Tensor]: ...


_KEEP_ALL = 1e9  # MB: so that every layer's activations are kept


def record(
    bundle: Bundle,
    programs: Programs,
    weights: BaseWeights,
    values: Mapping[str, np.ndarray],
    example: Example,
    keep: bool = False,
) -> list[Recorded]:
    """The calls of one step (forward, head, backward, AdamW) on ``example``; and, where the
    shortest programs hold it, one of the head more, with logits that no model has: the head is the
    same program whatever the length."""
    recorder = Recorder(programs, bundle.manifest.model.layers)
    engine = StreamingEngine(recorder, weights, bundle.training, _KEEP_ALL if keep else 0.0)
    state = AdapterState.of(bundle.manifest.adapter.tensors, values)
    step(engine, state, example, bundle)
    if keep or example.inputs > min(bundle.training.lengths):
        return recorder.calls
    heads = [call for call in recorder.calls if call.name == "head"]
    return [*recorder.calls, _extreme(heads[0], programs)]


def _extreme(head: Recorded, programs: Programs) -> Recorded:
    """The head's call with a final norm of ``_STEEP`` times its weight, and so logits as large: a
    softmax that is all but 0 and 1."""
    names = [tensor.name for tensor in programs.signatures[head.name].inputs]
    place = names.index("base.norm")
    inputs = [*head.inputs]
    inputs[place] = inputs[place] * np.float32(_STEEP)
    outputs = tuple(array.copy() for array in programs.call(head.name, inputs))
    return replace(head, inputs=tuple(inputs), outputs=outputs, variant="extreme logits")


def step(
    engine: TrainingEngine, state: AdapterState, example: Example, bundle: Bundle
) -> tuple[float, np.ndarray]:
    """Loss a label, and the gradient that it took; ``state`` is updated."""
    optimizer = bundle.training.optimizer
    gradient = state.layout.zeros()
    loss, count = engine.gradient(state, [example], gradient)
    number = state.step + 1
    betas = (optimizer.beta1, optimizer.beta2)
    engine.update(state, gradient, step_numbers(number, count, RATES, DECAY, CLIP, betas))
    return loss / count, gradient


def wide_gradient(engine: WideEngine, state: AdapterState, example: Example) -> np.ndarray:
    """The gradient of an engine in PyTorch, computed in float64."""
    into = state.layout.zeros()
    with widened(engine.trained), Wide():
        engine.gradient(state, [example], into)
    return into


def against(
    measured: TrainingEngine,
    expected: WideEngine,
    bundle: Bundle,
    values: Mapping[str, np.ndarray],
    example: Example,
    case: str,
    spec: ModelSpec,
    logit: float,
) -> list[Check]:
    """A whole step of two engines: loss, gradients, and the adapter after AdamW on the same
    gradient, three times, so that the moments count. ``logit``: the largest of the example, which
    its loss is a difference of."""
    tensors = bundle.manifest.adapter.tensors
    state, reference = (AdapterState.of(tensors, values) for _ in range(2))
    loss, gradient = step(measured, state, example, bundle)
    expected_loss, expected_gradient = step(expected, reference, example, bundle)
    losses = (np.array([loss]), np.array([expected_loss]))
    bound = of_loss(spec, len(example.tokens))
    spread = logit + abs(expected_loss)

    @cache
    def exact() -> Mapping[str, np.ndarray]:
        wide = wide_gradient(expected, AdapterState.of(tensors, values), example)
        return reference.layout.views(wide)

    gradients = _gradient_checks(
        state.layout.views(gradient),
        reference.layout.views(expected_gradient),
        of_gradient(spec, len(example.tokens)),
        case,
        scale=float(np.abs(expected_gradient).max()),
        exact=exact,
    )
    return [
        compare("block + head", case, "loss", *losses, bound, scale=spread),
        *worst(gradients),
        *_optimizer_checks(measured, expected, bundle, values, example, expected_gradient, case),
    ]


def _gradient_checks(
    measured: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    bound: Tolerance,
    case: str,
    *,
    scale: float,
    exact: Callable[[], Mapping[str, np.ndarray]],
) -> list[Check]:
    """Gradients by adapter tensor, but for those that are 0 on both sides. ``scale``: the step's
    largest; ``exact``: the expected ones in float64."""

    def wide(name: str) -> Callable[[], np.ndarray]:
        return lambda: exact()[name]

    return [
        compare(
            "block + head",
            case,
            f"gradient of {name}",
            measured[name],
            expected[name],
            bound,
            layer=int(name.split(".")[1]),
            scale=scale,
            wide=wide(name),
            limit=gradient_limit(float(np.abs(expected[name]).max()), scale),
        )
        for name in expected
        if np.abs(expected[name]).max() > 0 or np.abs(measured[name]).max() > 0
    ]


def _optimizer_checks(
    measured: TrainingEngine,
    expected: TrainingEngine,
    bundle: Bundle,
    values: Mapping[str, np.ndarray],
    example: Example,
    gradient: np.ndarray,
    case: str,
) -> list[Check]:
    """AdamW of two engines on the same flat ``gradient``, scaled otherwise in each of 3 steps."""
    tensors, optimizer = bundle.manifest.adapter.tensors, bundle.training.optimizer
    state, reference = (AdapterState.of(tensors, values) for _ in range(2))
    start = reference.parameters.copy()
    betas = (optimizer.beta1, optimizer.beta2)
    for number in (1, 2, 3):
        numbers = step_numbers(number, example.count, RATES, DECAY, CLIP, betas)
        scaled = gradient * np.float32(1.0 - 0.3 * number)
        measured.update(state, scaled, numbers)
        expected.update(reference, scaled, numbers)
    moved = float(np.abs(reference.parameters - start).max())
    bound = of_optimizer(start.size, float(np.abs(start).max()), moved)
    pairs = {
        "parameters": (state.parameters, reference.parameters),
        "mean": (state.mean, reference.mean),
        "square": (state.square, reference.square),
    }
    return [
        compare(
            "adamw", case, f"{name} after 3 steps", *pair, bound,
            scale=moved if name == "parameters" else None,
        )
        for name, pair in pairs.items()
    ]  # fmt: skip
