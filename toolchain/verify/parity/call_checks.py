"""Each recorded call of a training program by itself: made again elsewhere, output by output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from exporters.model.spec import ModelSpec
from runtime_py.bundle.manifest import Program
from runtime_py.engine.program_calls import Programs
from toolchain.compile.tolerances import gradient_limit
from toolchain.compile.wide import Wide
from toolchain.verify.parity.call_bounds import bound_of, magnitude_of, pull_of
from toolchain.verify.parity.lm_checks import Executor
from toolchain.verify.parity.recording import Recorded
from toolchain.verify.parity.verdict import Check, FirstDifference, compare, worst

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


def replay(
    calls: Sequence[Recorded],
    executor: Executor,
    files: Mapping[str, Path],
    signatures: Mapping[str, Program],
    case: str,
    spec: ModelSpec,
    programs: Programs,
) -> tuple[list[Check], FirstDifference | None, list[list[np.ndarray]]]:
    """Every recorded call once more, by ``executor``, on the same inputs. -> checks, the first call
    that differs, and what came out. Raises ``RunError``."""
    outputs = again(calls, executor, files)
    checks, first = judged(calls, outputs, signatures, case, spec, programs)
    return checks, first, outputs


def again(
    calls: Sequence[Recorded], executor: Executor, files: Mapping[str, Path]
) -> list[list[np.ndarray]]:
    """The outputs of every call, in the order of ``calls``; one process for each file."""
    outputs: list[list[np.ndarray]] = [[] for _ in calls]
    for file in dict.fromkeys(files[call.name] for call in calls):
        indices = [index for index, call in enumerate(calls) if files[call.name] == file]
        results = executor(file, [], [calls[index].call() for index in indices])
        for index, result in zip(indices, results, strict=True):
            outputs[index] = result
    return outputs


class _WideOutputs:
    """A call's outputs in float64, computed when the first is asked for."""

    def __init__(self, call: Recorded, programs: Programs) -> None:
        self._call, self._programs = call, programs

    @cached_property
    def _outputs(self) -> list[np.ndarray]:
        with Wide():
            return self._programs.call(self._call.name, self._call.inputs)

    def of(self, place: int) -> Callable[[], np.ndarray]:
        """For one output, by its place in the signature."""
        return lambda: self._outputs[place]


def judged(
    calls: Sequence[Recorded],
    outputs: Sequence[Sequence[np.ndarray]],
    signatures: Mapping[str, Program],
    case: str,
    spec: ModelSpec,
    programs: Programs,
) -> tuple[list[Check], FirstDifference | None]:
    """``outputs``: of each call, elsewhere; ``programs``: the same in PyTorch, for what float32
    costs where terms cancel. -> checks, and the first call that differs."""
    checks: list[Check] = []
    for call, results in zip(calls, outputs, strict=True):
        on = f"{case}, {call.variant}" if call.variant else case
        checks += _of_call(call, results, signatures[call.name], on, spec, programs)
    failed = next((check for check in checks if not check.passed), None)
    return worst(checks), None if failed is None else _difference(failed)


def _difference(check: Check) -> FirstDifference:
    operator = operator_of(check.output)
    where = "" if check.layer is None else f"layer {check.layer}: "
    return FirstDifference(
        check.layer,
        operator,
        f"{where}{check.program} differs first in {operator}, by {check.max_rel:.2g} of "
        f"its range on '{check.case}' (at most {check.tolerance:.2g} is expected).",
    )


def _of_call(
    call: Recorded,
    results: Sequence[np.ndarray],
    signature: Program,
    case: str,
    spec: ModelSpec,
    programs: Programs,
) -> list[Check]:
    """Its outputs, those of a forward in the order in which they are computed."""
    before = dict(zip((t.name for t in signature.inputs), call.inputs, strict=True))
    step = 0.0
    if call.name == "adamw":
        step = float(np.abs(call.outputs[0] - before["parameters"]).max())
    wide = _WideOutputs(call, programs)
    names = [tensor.name for tensor in signature.outputs]
    outputs = zip(names, range(len(names)), results, call.outputs, strict=True)
    return [
        compare(
            call.kind, case, name, measured, expected, bound_of(call, name, before, step, spec),
            layer=call.layer, scale=_scale(call, names, place, before, step), wide=wide.of(place),
            limit=_limit(call, names, place),
        )
        for name, place, measured, expected in sorted(outputs, key=lambda row: _order(row[0]))
    ]  # fmt: skip


def _largest_gradient(call: Recorded, names: Sequence[str]) -> float:
    """Of the adapter, in a call with these outputs."""
    pairs = zip(names, call.outputs, strict=True)
    return max(float(np.abs(array).max()) for name, array in pairs if ".lora_" in name)


def _limit(call: Recorded, names: Sequence[str], place: int) -> float:
    """What an output's bound may never be above, whatever PyTorch's float32 is off by."""
    if ".lora_" not in names[place]:
        return math.inf
    return gradient_limit(float(np.abs(call.outputs[place]).max()), _largest_gradient(call, names))


def _scale(
    call: Recorded,
    names: Sequence[str],
    place: int,
    before: Mapping[str, np.ndarray],
    step: float,
) -> float | None:
    """What differences of an output are measured by, where that is not its own largest value.
    ``names``: of all outputs; ``before`` and ``step`` as for ``bound_of``."""
    name, expected = names[place], call.outputs[place]
    if call.name == "adamw" and name == "parameters":
        return step
    if ".lora_" in name:
        return _largest_gradient(call, names)
    if call.name == "head" and name == "loss":
        return magnitude_of(before, float(expected.item()))
    if call.name == "head" and name == "gradient.x":
        return pull_of(before, float(np.abs(expected).max()))
    return None
