"""The training programs: whole steps against autograd, and each call by itself on any processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from exporters.model.spec import ModelSpec
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.manifest import Program
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import Example
from runtime_py.engine.program_calls import Programs
from runtime_py.engine.streaming import StreamingEngine, step_numbers
from runtime_py.engine.trainer import TrainingEngine
from toolchain.compile.tolerances import of_gradient, of_loss, of_optimizer
from toolchain.compile.wide import Wide, widened
from toolchain.verify.parity.call_bounds import bound_of, magnitude_of, pull_of
from toolchain.verify.parity.lm_checks import Executor
from toolchain.verify.parity.recording import Recorded, Recorder
from toolchain.verify.parity.verdict import Check, Found, compare

RATE, DECAY, CLIP = 1e-3, 0.01, 1.0
_STEEP = 16.0


class WideEngine(TrainingEngine, Protocol):
    """A reference in PyTorch. ``trained``: the leaves that its gradient is of."""

    @property
    def trained(self) -> Sequence[Tensor]: ...


_KEEP_ALL = 1e9  # MB: so that every layer's activations are kept

SAVED = {
    "saved.q": "q (norm before it, projection, LoRA or rotary embedding)",
    "saved.k": "k (norm before it, projection, LoRA or rotary embedding)",
    "saved.v": "v (norm before it, projection or LoRA)",
    "saved.mixed": "attention (scores, mask or softmax)",
    "saved.o": "o projection",
    "saved.middle": "o projection or residual",
    "saved.gate": "norm before the MLP, or gate projection",
    "saved.up": "norm before the MLP, or up projection",
    "saved.down": "activation or down projection",
    "y": "activation, down projection or residual",
    "gradient.x": "backward through the block",
}


def operator_of(output: str) -> str:
    if output.startswith("gradient.") and ".lora_" in output:
        return f"gradient of {output.removeprefix('gradient.')}"
    return SAVED.get(output, output)


def _order(output: str) -> int:
    """Outputs of a forward in the order in which they are computed."""
    names = list(SAVED)
    return names.index(output) if output in names else len(names)


def record(
    bundle: Bundle,
    programs: Programs,
    weights: BaseWeights,
    values: Mapping[str, np.ndarray],
    example: Example,
    keep: bool = False,
) -> list[Recorded]:
    """The calls of one step (forward, head, backward, AdamW) on ``example``."""
    recorder = Recorder(programs, bundle.manifest.model.layers)
    engine = StreamingEngine(recorder, weights, bundle.training, _KEEP_ALL if keep else 0.0)
    state = AdapterState.of(bundle.manifest.adapter.tensors, values)
    step(engine, state, example, bundle)
    heads = [call for call in recorder.calls if call.name == "head"]
    return recorder.calls if keep else [*recorder.calls, _extreme(heads[0], programs)]


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
    own = bundle.training.optimizer
    gradient = state.layout.zeros()
    loss, count = engine.gradient(state, [example], gradient)
    number = state.step + 1
    betas = (own.beta1, own.beta2)
    engine.update(state, gradient, step_numbers(number, count, RATE, DECAY, CLIP, betas))
    return loss / count, gradient


def wide_gradient(engine: WideEngine, state: AdapterState, example: Example) -> np.ndarray:
    """The gradient of an engine in PyTorch, computed in float64."""
    into = state.layout.zeros()
    with widened(engine.trained), Wide():
        engine.gradient(state, [example], into)
    return into


def against(
    found: TrainingEngine,
    expected: WideEngine,
    bundle: Bundle,
    values: Mapping[str, np.ndarray],
    example: Example,
    case: str,
    spec: ModelSpec,
    logit: float,
) -> list[Check]:
    """A whole step of two engines: loss, gradients, and the adapter after AdamW on the same
    gradient, twice, so that the moments count. ``logit``: the largest of the example, which its
    loss is a difference of."""
    tensors = bundle.manifest.adapter.tensors
    own, want = (AdapterState.of(tensors, values) for _ in range(2))
    start = own.parameters.copy()
    loss, gradient = step(found, own, example, bundle)
    right, wanted = step(expected, want, example, bundle)
    one = (np.array([loss]), np.array([right]))
    bound = of_loss(spec, len(example.tokens))
    spread = logit + abs(right)
    checks = [compare("block + head", case, "loss", *one, bound, scale=spread)]
    views, reference = own.layout.views(gradient), want.layout.views(wanted)
    greatest = float(np.abs(wanted).max())
    exact: list[np.ndarray] = []

    def wide(name: str) -> np.ndarray:
        if not exact:
            exact.append(wide_gradient(expected, AdapterState.of(tensors, values), example))
        return want.layout.views(exact[0])[name]

    gradients = [
        compare(
            "block + head",
            case,
            f"gradient of {name}",
            views[name],
            reference[name],
            of_gradient(spec, len(example.tokens)),
            layer=int(name.split(".")[1]),
            scale=greatest,
            wide=lambda name=name: wide(name),  # type: ignore[misc]
        )
        for name in reference
        if np.abs(reference[name]).max() > 0 or np.abs(views[name]).max() > 0
    ]
    checks += worst(gradients)
    found_, expected_ = (AdapterState.of(tensors, values) for _ in range(2))
    optimizer = bundle.training.optimizer if bundle.manifest.training else None
    assert optimizer is not None
    for number in (1, 2, 3):
        numbers = step_numbers(
            number, example.count, RATE, DECAY, CLIP, (optimizer.beta1, optimizer.beta2)
        )
        scaled = wanted * np.float32(1.0 - 0.3 * number)
        found.update(found_, scaled, numbers)
        expected.update(expected_, scaled, numbers)
    moved = float(np.abs(expected_.parameters - start).max())
    bound = of_optimizer(start.size, float(np.abs(start).max()), moved)
    for name in ("parameters", "mean", "square"):
        pair = getattr(found_, name), getattr(expected_, name)
        scale = moved if name == "parameters" else None
        checks.append(compare("adamw", case, f"{name} after 3 steps", *pair, bound, scale=scale))
    return checks


def worst(checks: Sequence[Check]) -> list[Check]:
    """Of each program and case the check that strains its tolerance most; all that fail stay."""
    kept: dict[tuple[str, str], Check] = {}
    for check in checks:
        key = (check.program, check.case)
        if key not in kept or check.strain > kept[key].strain:
            kept[key] = check
    return [c for c in checks if not c.passed or kept[c.program, c.case] is c]


def replay(
    calls: Sequence[Recorded],
    executor: Executor,
    files: Mapping[str, Path],
    signatures: Mapping[str, Program],
    case: str,
    spec: ModelSpec,
    programs: Programs,
) -> tuple[list[Check], Found | None, list[list[np.ndarray]]]:
    """Every recorded call once more, by ``executor``, on the same inputs. -> checks, the first call
    that differs, and what came out. Raises ``RunError``."""
    outputs = again(calls, executor, files)
    checks, found = judged(calls, outputs, signatures, case, spec, programs)
    return checks, found, outputs


def again(
    calls: Sequence[Recorded], executor: Executor, files: Mapping[str, Path]
) -> list[list[np.ndarray]]:
    outputs: list[list[np.ndarray]] = [[] for _ in calls]
    for file in dict.fromkeys(files[call.name] for call in calls):
        own = [index for index, call in enumerate(calls) if files[call.name] == file]
        results = executor(file, [], [calls[index].call() for index in own])
        for index, result in zip(own, results, strict=True):
            outputs[index] = result
    return outputs


def judged(
    calls: Sequence[Recorded],
    outputs: Sequence[Sequence[np.ndarray]],
    signatures: Mapping[str, Program],
    case: str,
    spec: ModelSpec,
    programs: Programs,
) -> tuple[list[Check], Found | None]:
    """``programs``: the same in PyTorch, for what float32 costs where terms cancel."""
    checks: list[Check] = []
    found: Found | None = None
    for call, results in zip(calls, outputs, strict=True):
        signature = signatures[call.name]
        before = dict(zip((t.name for t in signature.inputs), call.inputs, strict=True))
        adapter = [
            float(np.abs(want).max())
            for tensor, want in zip(signature.outputs, call.outputs, strict=True)
            if ".lora_" in tensor.name
        ]
        step = 0.0
        if call.name == "adamw":
            step = float(np.abs(call.outputs[0] - before["parameters"]).max())
        exact: list[np.ndarray] = []

        def wide(place: int, call: Recorded = call, exact: list = exact) -> np.ndarray:
            if not exact:
                with Wide():
                    exact.extend(programs.call(call.name, call.inputs))
            return exact[place]

        triples = list(
            zip(range(len(results)), signature.outputs, results, call.outputs, strict=True)
        )
        for place, tensor, own, want in sorted(triples, key=lambda four: _order(four[1].name)):
            scale: float | None = None
            if call.name == "adamw" and tensor.name == "parameters":
                scale = step
            elif ".lora_" in tensor.name:
                scale = max(adapter)
            elif call.name == "head" and tensor.name == "loss":
                scale = magnitude_of(before, float(want.item()))
            elif call.name == "head" and tensor.name == "gradient.x":
                scale = pull_of(before, float(np.abs(want).max()))
            bound = bound_of(call, tensor.name, before, step, spec)
            on = f"{case}, {call.variant}" if call.variant else case
            check = compare(
                call.kind, on, tensor.name, own, want, bound, layer=call.layer, scale=scale,
                wide=lambda place=place, wide=wide: wide(place),  # type: ignore[misc]
            )  # fmt: skip
            checks.append(check)
            if found is None and not check.passed:
                operator = operator_of(tensor.name)
                where = "" if call.layer is None else f"layer {call.layer}: "
                found = Found(
                    call.layer,
                    operator,
                    f"{where}{call.kind} differs first in {operator}, by {check.max_rel:.2g} of "
                    f"its range on '{on}' (at most {check.tolerance:.2g} is expected).",
                )
    return worst(checks), found
