"""The rungs that run ``.pte`` files: ExecuTorch on this machine, and on ARM64 under QEMU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from exporters.model.lora_tensors import set_adapter
from runtime_py.bundle.adapter_forms import write_values
from runtime_py.bundle.manifest import Program
from toolchain.verify.arm64 import build
from toolchain.verify.arm64.emulate import Arm64Program, Call, RunError, refuse_cpu
from toolchain.verify.parity import call_checks, lm_checks, probes, training_checks
from toolchain.verify.parity.cases import EFFECT, Case
from toolchain.verify.parity.context import Context
from toolchain.verify.parity.native_child import run_calls
from toolchain.verify.parity.recording import Recorded
from toolchain.verify.parity.run_bounds import of_android
from toolchain.verify.parity.verdict import Check, FirstDifference, Rung, not_run, rung, stated

_ARM_STEPS = 8  # decoded tokens of a case under QEMU
_ARM_CASES = 3
_ARM_TOKENS = 80  # of the longest case there


def _here(program: Path, data: Sequence[Path], calls: Sequence[Call]) -> list[list[np.ndarray]]:
    return run_calls(program, data, calls).outputs


def _training(context: Context) -> dict[str, Program]:
    return {
        program.name: program
        for program in context.bundle.android.target.programs
        if program.name not in ("forward", "embed")
    }


def missing(context: Context) -> list[str]:
    """Programs that the manifest should have and has not."""
    manifest = context.bundle.manifest
    required = ["forward", "embed"]
    if manifest.training is not None:
        kinds = ("block_forward", "block_backward", "block_backward_saved")
        required += [f"{kind}_{length}" for length in manifest.training.lengths for kind in kinds]
        required += ["head", "adamw"]
    present = {program.name for program in context.bundle.android.target.programs}
    return [name for name in required if name not in present]


def executorch(context: Context) -> Rung:
    """Every program against PyTorch with the same weights, on the same inputs."""
    if context.bundle.manifest.android is None:
        return not_run("executorch", "the bundle has no Android part.")
    if absent := missing(context):
        names = ", ".join(absent)
        absent_checks = [stated("manifest", "bundle", name, False, "is missing") for name in absent]
        reason = f"the bundle has no program {names}: export it again."
        return rung("executorch", "quantized", absent_checks, reason=reason)
    checks: list[Check] = []
    first: FirstDifference | None = None
    layers: list[tuple[str, float]] = []
    try:
        context.progress("executorch: lm.pte")
        measured = lm_checks.run(
            context.bundle, _here, context.cases, context.adapters,
            context.scratch,
        )  # fmt: skip
        context.executorch = measured
        checks += lm_checks.constants(measured, context.bundle.manifest)
        bounds = context.android_bounds = of_android(context)
        lm = lm_checks.compared(measured, context.android, context.cases, bounds)
        checks += lm
        context.progress("executorch: layer by layer")
        layers = _layers(context)
        if any(not check.passed for check in lm):
            first = _place(lm, layers, context, bounds.largest)
        if context.bundle.manifest.training is not None:
            more, place = _replayed(context)
            checks += more
            first = first or place
    except RunError as error:
        checks.append(stated("process", "android", "runs", False, str(error)))
        return rung("executorch", "quantized", checks, None, layers, str(error))
    return rung("executorch", "quantized", checks, first, layers)


def _layers(context: Context) -> list[tuple[str, float]]:
    """What one prompt gives inside ``lm.pte``, place by place, with an adapter that has effect."""
    manifest, model = context.bundle.manifest, context.source.android
    tokens = context.cases[0].tokens
    section = manifest.adapter
    data = context.scratch / "watched.ptd"
    write_values(data, context.bundle.android.adapter, section.tensors, context.adapters[EFFECT])
    call = Call("forward", (tokens[None], np.array([0], np.int64)))
    steps = run_calls(context.bundle.android.lm, [data], [call], watch=True).instructions
    set_adapter(model, context.adapters[EFFECT])
    expected = probes.of_transformer(model, tokens)
    return probes.differences(probes.of_executorch(steps, model.spec, expected), expected)


def _place(
    checks: Sequence[Check],
    layers: Sequence[tuple[str, float]],
    context: Context,
    largest: float,
) -> FirstDifference | None:
    """Where ``lm.pte`` first differs. If a prompt in one call agrees, it is the cache.
    ``largest``: what one logit may be off by, as a part of the largest."""
    failed = [check for check in checks if not check.passed]
    if notes := [check for check in failed if check.note]:
        sentence = f"{notes[0].program}: {notes[0].output} is {notes[0].note}."
        return FirstDifference(None, notes[0].output, sentence)
    if all("decoded" in check.program or check.case == "all" for check in failed):
        return FirstDifference(
            None,
            "KV cache",
            "decoding differs where the same tokens in one prompt agree: it is the KV cache, its "
            f"positions or its mask (off by {failed[0].max_rel:.2g} on '{failed[0].case}').",
        )
    model = context.source.android
    if model.is_float:
        return probes.first_difference(layers, largest)
    floor = probes.noise_floor(model, context.cases[0].tokens)
    return probes.first_difference(layers, largest, floor)


def _replayed(context: Context) -> tuple[list[Check], FirstDifference | None]:
    signatures = _training(context)
    files = {name: context.bundle.path / program.file for name, program in signatures.items()}
    kept: list[Recorded] = []
    checks: list[Check] = []
    first: FirstDifference | None = None
    runs = [(example, adapter, False) for example, adapter in context.trained]
    runs.append((*context.trained[0], True))
    for example, adapter, keep in runs:
        context.progress(f"executorch: training on {example.id}")
        values = context.adapters[adapter]
        calls = training_checks.record(
            context.bundle, context.programs, context.weights, values, example, keep
        )
        if keep:
            calls = [call for call in calls if call.kind == "block_backward_saved"]
        case = f"{example.id}, {adapter}"
        replayed, place, outputs = call_checks.replay(
            calls, _here, files, signatures, case, context.source.captured.spec, context.programs
        )
        checks += replayed
        first = first or place
        if not kept or keep:
            kept += [
                replace(call, outputs=tuple(result))
                for call, result in zip(calls, outputs, strict=True)
                if call.layer in (0, None)
            ]
    context.replayed = tuple(kept)
    return checks, first


def arm64(context: Context) -> Rung:
    """The same files and calls on ARM NEON kernels, against those on this processor."""
    if context.bundle.manifest.android is None:
        return not_run("arm64", "the bundle has no Android part.")
    try:
        refuse_cpu(context.cpu)
    except RunError as error:
        return not_run("arm64", str(error))
    runner = build.prepare()
    if isinstance(runner, str):
        return not_run("arm64", runner)
    if context.executorch is None:
        return not_run("arm64", "the executorch rung gave nothing to compare with.")

    def there(program: Path, data: Sequence[Path], calls: Sequence[Call]) -> list[list[np.ndarray]]:
        return Arm64Program(program, data, cpu=context.cpu).run_sequence(calls)

    cases = _few(context.cases)
    adapters = {name: context.adapters[name] for name in context.adapters}
    checks: list[Check] = []
    first: FirstDifference | None = None
    try:
        context.progress("arm64: lm.pte")
        measured = lm_checks.run(
            context.bundle, there, cases, adapters, context.scratch,
            steps=_ARM_STEPS, constants=False,
        )  # fmt: skip
        bounds = context.android_bounds or of_android(context)
        checks += lm_checks.compared(measured, context.executorch, cases, bounds)
        context.progress("arm64: training programs")
        signatures = _training(context)
        files = {name: context.bundle.path / p.file for name, p in signatures.items()}
        outputs = call_checks.again(context.replayed, there, files)
        more, first = call_checks.judged(
            context.replayed, outputs, signatures, "layer 0", context.source.captured.spec,
            context.programs,
        )  # fmt: skip
        checks += more
    except RunError as error:
        checks.append(stated("process", "arm64", "runs", False, str(error)))
        return rung("arm64", "executorch", checks, None, (), str(error))
    return rung("arm64", "executorch", checks, first)


def _few(cases: Sequence[Case]) -> list[Case]:
    short = [case for case in cases if case.prompt <= _ARM_TOKENS]
    return short[:1] + [case for case in short[1:] if "shipped" not in case.name][: _ARM_CASES - 1]
