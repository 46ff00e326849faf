"""The rung of the .mlpackages: read from disk and interpreted, function by function.

Core ML itself exists on Apple's systems only. Interpreted are the very operations, constants and
states of the package; what a phone's units do beyond that (see ``toolchain.verify.mil``) is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from exporters.coreml.training_package import coreml_name
from exporters.errors import ExportError
from exporters.model.lora_tensors import set_adapter
from runtime_py.bundle.manifest import Program
from toolchain.compile.tolerances import Tolerance
from toolchain.verify.mil import interpreter as mil
from toolchain.verify.mil.mlpackage import read_package
from toolchain.verify.parity import call_checks, probes, training_checks
from toolchain.verify.parity.cases import EFFECT, Case
from toolchain.verify.parity.context import Context, outputs_of
from toolchain.verify.parity.lm_checks import LmOutputs, compared
from toolchain.verify.parity.models import Values
from toolchain.verify.parity.recording import Recorded
from toolchain.verify.parity.run_bounds import of_ios
from toolchain.verify.parity.verdict import (
    Check,
    FirstDifference,
    Rung,
    compare,
    not_run,
    rung,
    stated,
    worst,
)

_KEEP = 1 << 30  # bytes of decompressed constants
_CASES, _STEPS = 3, 4
_LONGEST = 80  # tokens of a case


class CoreMlLm:
    """``prefill``, ``decode`` and ``embed`` as a host calls them, with one state for both."""

    def __init__(self, context: Context) -> None:
        manifest = context.bundle.manifest
        self._manifest = manifest
        programs = {program.name: program for program in context.bundle.ios.target.programs}
        required = ("prefill", "decode", "embed")
        if missing := [name for name in required if name not in programs]:
            raise ExportError(f"the bundle has no function {', '.join(missing)} for iOS.")
        package = read_package(context.bundle.path / programs["prefill"].file)
        self.interpreter = mil.Interpreter(package, _KEEP)
        tokens = next(t for t in programs["prefill"].inputs if t.name == "tokens")
        self.chunk = int(tokens.shape[1])
        self.states: dict[str, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        self.states = self.interpreter.states("decode")

    def _adapter(self, values: Values) -> dict[str, Tensor]:
        return {coreml_name(n): torch.from_numpy(np.array(v)) for n, v in values.items()}

    def prefill(self, tokens: np.ndarray, values: Values, filler: int = 0) -> np.ndarray:
        """tokens [n] from position 0 on -> logits [1, vocab] after the last."""
        adapter = self._adapter(values)
        logits = torch.empty(0)
        for start in range(0, len(tokens), self.chunk):
            part = tokens[start : start + self.chunk]
            padded = np.full((1, self.chunk), filler, np.int32)
            padded[0, : len(part)] = part
            inputs = {
                "tokens": torch.from_numpy(padded),
                "start": torch.tensor([start], dtype=torch.int32),
                "count": torch.tensor([len(part)], dtype=torch.int32),
            }
            logits = self.interpreter.run("prefill", {**inputs, **adapter}, self.states)["logits"]
        return logits.float().numpy()

    def decode(self, token: int, position: int, values: Values) -> np.ndarray:
        inputs = {
            "tokens": torch.tensor([[token]], dtype=torch.int32),
            "start": torch.tensor([position], dtype=torch.int32),
        }
        inputs |= self._adapter(values)
        return self.interpreter.run("decode", inputs, self.states)["logits"].float().numpy()

    def embed(self, tokens: np.ndarray, filler: int = 0) -> tuple[np.ndarray, np.ndarray]:
        length = self._manifest.policy.embed_length
        padded = np.full((1, length), filler, np.int32)
        padded[0, : len(tokens)] = tokens[:length]
        count = torch.tensor([min(len(tokens), length)], dtype=torch.int32)
        inputs = {"tokens": torch.from_numpy(padded), "count": count}
        outputs = self.interpreter.run("embed", inputs)
        return outputs["pooled"].float().numpy(), outputs["entropy"].float().numpy()


def coreml(context: Context) -> Rung:
    """Every function against PyTorch with the package's weights."""
    if context.bundle.manifest.ios is None:
        return not_run("coreml", "the bundle has no iOS part.")
    cases = few(context.cases)
    bounds = of_ios(context.source.ios, cases, context.adapters, _STEPS)
    checks: list[Check] = []
    first: FirstDifference | None = None
    layers: list[tuple[str, float]] = []
    try:
        context.progress("coreml: prefill, decode, embed")
        lm = CoreMlLm(context)
        expected = context.ios
        if expected is None:
            expected = outputs_of(
                context.source.ios, cases, context.adapters, context.bundle.manifest
            )
        measured = run(lm, cases, context.adapters, 1 if context.quick else _STEPS)
        lm_checks = compared(measured, expected, cases, bounds, "ios lm")
        lm_checks += padding(lm, cases[0], context)
        stored, place, layers = _states(lm, cases[0], context, bounds.logits)
        checks += lm_checks + stored
        if any(not check.passed for check in lm_checks):
            first = place or _noted(lm_checks)
        if context.bundle.manifest.training is not None:
            context.progress("coreml: training programs")
            more, where = _training(context)
            checks += more
            first = first or where
    except ExportError as error:
        checks.append(stated("package", "ios", "runs", False, str(error)))
        return rung("coreml", "quantized", checks, None, layers, str(error))
    return rung("coreml", "quantized", checks, first or place, layers)


def few(cases: Sequence[Case]) -> list[Case]:
    short = [case for case in cases if case.prompt <= _LONGEST]
    return short[:1] + [case for case in short[1:] if "shipped" not in case.name][: _CASES - 1]


def run(
    lm: CoreMlLm, cases: Sequence[Case], adapters: Mapping[str, Values], steps: int
) -> LmOutputs:
    """The cases with each adapter; states go on from case to case, as a careless host's would."""
    measured = LmOutputs({}, {}, {}, {}, {})
    for name, values in adapters.items():
        lm.begin()
        for case in cases:
            rows = [lm.prefill(case.tokens[: case.prompt], values)]
            for place in range(case.prompt, case.prompt + min(steps, case.steps)):
                rows.append(lm.decode(int(case.tokens[place]), place, values))
            measured.logits[name, case.name] = np.concatenate(rows)
        measured.again[name] = lm.prefill(cases[0].tokens[: cases[0].prompt], values)
    for case in cases:
        measured.pooled[case.name], measured.entropy[case.name] = lm.embed(case.tokens)
    return measured


def padding(lm: CoreMlLm, case: Case, context: Context) -> list[Check]:
    """Other tokens as padding, and not a bit may change."""
    other = context.bundle.manifest.model.vocab - 1
    values = context.adapters[EFFECT]
    pairs: dict[str, list[np.ndarray]] = {"ios lm": [], "embed": []}
    for filler in (0, other):
        lm.begin()
        pairs["ios lm"].append(lm.prefill(case.tokens[: case.prompt], values, filler))
        pairs["embed"].append(lm.embed(case.tokens, filler)[0])
    checks = []
    for program, (first, second) in pairs.items():
        gap = float(np.abs(first - second).max())
        note = f"counted: other padding changes the result by {gap:.2g}" if gap else ""
        checks.append(stated(program, case.name, "padding", not gap, note))
    return checks


def _noted(checks: Sequence[Check]) -> FirstDifference | None:
    noted = [check for check in checks if not check.passed and check.note]
    if not noted:
        return None
    first = noted[0]
    return FirstDifference(None, first.output, f"{first.program}: {first.output} is {first.note}.")


def _states(
    lm: CoreMlLm, case: Case, context: Context, bound: Tolerance
) -> tuple[list[Check], FirstDifference | None, list[tuple[str, float]]]:
    """The cache after a prompt and after decoding, beside PyTorch's keys and values: the layers in
    order, so the first that differs is the one."""
    model, values = context.source.ios, context.adapters[EFFECT]
    set_adapter(model, values)
    end = case.prompt + min(_STEPS, case.steps)
    expected = probes.of_transformer(model, case.tokens[:end])
    lm.begin()
    lm.prefill(case.tokens[: case.prompt], values)
    for place in range(case.prompt, end):
        lm.decode(int(case.tokens[place]), place, values)
    checks: list[Check] = []
    first: FirstDifference | None = None
    layers: list[tuple[str, float]] = []
    spans = {"prefill": slice(0, case.prompt), "decode": slice(case.prompt, end)}
    for layer in range(context.bundle.manifest.model.layers):
        for kind in ("k", "v"):
            reference = expected[f"layers.{layer}.{kind}.placed"][0]  # [S, K, D]
            state = lm.states[f"{kind}_{layer}"].float().numpy()[0].transpose(1, 0, 2)[:end]
            size = float(np.abs(reference).max())
            gaps = []
            for function, span in spans.items():
                rows, expected_rows = state[span], reference[span]
                check = compare(
                    f"ios {function}", case.name, f"state {kind}_{layer}", rows, expected_rows,
                    bound, layer=layer, scale=size,
                )  # fmt: skip
                checks.append(check)
                gaps.append(check.max_rel)
                if first is None and not check.passed:
                    first = _state_difference(check, kind, layer, function, rows, expected_rows)
            layers.append((f"layers.{layer}.{kind}.placed", max(gaps)))
    return worst(checks), first, layers


def _state_difference(
    check: Check, kind: str, layer: int, function: str, measured: np.ndarray, expected: np.ndarray
) -> FirstDifference:
    state = f"state {kind}_{layer}"
    if not measured.any():
        what = f"{function} does not write {state}: its rows are zero"
    else:
        moved = np.abs(measured[1:] - expected[:-1]).max() if len(measured) > 1 else np.inf
        what = f"{function} writes other values into {state}, off by {check.max_rel:.2g}"
        if moved < 0.05 * np.abs(expected).max():
            what = f"{function} writes {state} one position too far"
    operator = {"k": probes.OPERATORS["k.placed"], "v": probes.OPERATORS["v.placed"]}[kind]
    name = state if not measured.any() else f"{state}, {operator}"
    return FirstDifference(layer, name, f"layer {layer}: {what}.")


def _training(context: Context) -> tuple[list[Check], FirstDifference | None]:
    """The calls of a step in float32, as PyTorch makes them, by the package's functions."""
    manifest = context.bundle.manifest
    lengths = len(context.bundle.training.lengths)  # for each, an example that fills it
    examples = context.examples if context.quick else context.examples[1 : 1 + lengths]
    programs = {program.name: program for program in context.bundle.ios.target.programs}
    calls: list[Recorded] = []
    values = context.adapters[EFFECT]
    for example, keep in product(examples, (False, True)):
        recorded = training_checks.record(
            context.bundle, context.float_programs, context.float_weights, values, example, keep
        )
        calls += [c for c in recorded if not keep or c.kind == "block_backward_saved"]
    last = manifest.model.layers - 1
    kept = [call for call in calls if call.layer in (None, 0, last)]
    if missing := sorted({call.name for call in kept} - set(programs)):
        raise ExportError(f"the bundle has no function {', '.join(missing)} for iOS.")
    file = programs["adamw"].file
    interpreter = mil.Interpreter(read_package(context.bundle.path / file), 0)
    signatures = context.float_programs.signatures
    outputs = [_call(interpreter, call, signatures[call.name]) for call in kept]
    return call_checks.judged(
        kept, outputs, signatures, f"{', '.join(e.id for e in examples)}, {EFFECT}",
        context.source.captured.spec, context.float_programs,
    )  # fmt: skip


def _call(interpreter: mil.Interpreter, call: Recorded, signature: Program) -> list[np.ndarray]:
    inputs = {
        coreml_name(tensor.name): torch.from_numpy(np.array(array))
        for tensor, array in zip(signature.inputs, call.inputs, strict=True)
    }
    outputs = interpreter.run(call.name, inputs)
    names = [coreml_name(tensor.name) for tensor in signature.outputs]
    return [outputs[f"{n}_new" if n in inputs else n].float().numpy() for n in names]
