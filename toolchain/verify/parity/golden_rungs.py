"""The rungs of a bundle whose source is gone: its golden vectors stand in for the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from exporters.errors import ExportError
from runtime_py.bundle.manifest import Program
from runtime_py.engine.examples import Example
from runtime_py.engine.self_test import (
    Golden,
    SelfCheck,
    adapter_files,
    effect,
    gradient_of,
    read_golden,
    self_test,
)
from toolchain.verify.arm64 import build
from toolchain.verify.arm64.emulate import Arm64Program, Call, RunError, refuse_cpu
from toolchain.verify.parity.cases import INITIAL, Case
from toolchain.verify.parity.context import Context
from toolchain.verify.parity.coreml_rung import CoreMlLm
from toolchain.verify.parity.lm_checks import Executor, calls_of
from toolchain.verify.parity.native_child import run_calls
from toolchain.verify.parity.verdict import Check, Rung, not_run, rung, stated


class _Programs:
    """Training programs, each call in another process."""

    def __init__(self, folder: Path, programs: Sequence[Program], executor: Executor) -> None:
        self.signatures = {program.name: program for program in programs}
        self._folder, self._executor = folder, executor

    def call(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        file = self._folder / self.signatures[name].file
        arrays = tuple(np.array(array) for array in inputs)
        return self._executor(file, [], [Call(name, arrays)])[0]


class DelegateTest:
    """A self-test's engine on ``.pte`` files behind an executor."""

    def __init__(self, context: Context, executor: Executor) -> None:
        self._context, self._executor = context, executor
        self._programs = {
            program.name: program for program in context.bundle.android.target.programs
        }
        self._files, self._values = adapter_files(
            context.bundle,
            context.scratch,
        )
        self._prefill = int(str(self._programs["forward"].inputs[0].shape[1]).split("..")[-1])

    def logits(self, tokens: np.ndarray, prompt: int, adapter: str) -> np.ndarray:
        case = Case("golden", tokens, prompt, "")
        calls, counted = calls_of(case, self._prefill, case.steps)
        file = self._context.bundle.path / self._programs["forward"].file
        outputs = self._executor(file, [self._files[adapter]], calls)
        return np.concatenate([outputs[index][0] for index in counted])

    def embed(self, tokens: np.ndarray) -> tuple[np.ndarray, float]:
        file = self._context.bundle.path / self._programs["embed"].file
        calls = [Call("embed", (tokens[None],))]
        ((pooled, entropy),) = self._executor(file, [self._files["initial"]], calls)
        return pooled, float(entropy.reshape(-1)[0])

    def gradient(self, example: Example) -> tuple[float, np.ndarray] | None:
        context = self._context
        if context.bundle.manifest.training is None:
            return None
        training = [p for name, p in self._programs.items() if name not in ("forward", "embed")]
        programs = _Programs(context.bundle.path, training, self._executor)
        return gradient_of(context.bundle, programs, self._values, example)


class PackageTest:
    """A self-test's engine on the .mlpackage, interpreted."""

    def __init__(self, context: Context) -> None:
        self._lm = CoreMlLm(context)
        initial: Mapping[str, np.ndarray] = context.adapters[INITIAL]
        self._adapters = {"initial": initial, "effect": effect(initial)}

    def logits(self, tokens: np.ndarray, prompt: int, adapter: str) -> np.ndarray:
        values = self._adapters[adapter]
        self._lm.begin()
        rows = [self._lm.prefill(tokens[:prompt], values)]
        rows += [self._lm.decode(int(tokens[i]), i, values) for i in range(prompt, len(tokens))]
        return np.concatenate(rows)

    def embed(self, tokens: np.ndarray) -> tuple[np.ndarray, float]:
        pooled, entropy = self._lm.embed(tokens)
        return pooled, float(entropy[0])

    def gradient(self, example: Example) -> tuple[float, np.ndarray] | None:
        return None


def _here(program: Path, data: Sequence[Path], calls: Sequence[Call]) -> list[list[np.ndarray]]:
    return run_calls(program, data, calls).outputs


def without_source(name: str, context: Context) -> Rung:
    """One of the rungs executorch, arm64, coreml, decisions, against the golden vectors."""
    golden = read_golden(context.bundle.path)
    if golden is None:
        return not_run(name, "the bundle has no golden vectors, and its source is not there.")
    target = "ios" if name == "coreml" else "android"
    if target not in golden.document["targets"]:
        return not_run(name, f"the bundle has no part for {target}.")
    try:
        if name == "arm64":
            return _on_arm64(context, golden)
        if name == "decisions":
            return _decided(context)
        engine = PackageTest(context) if name == "coreml" else DelegateTest(context, _here)
        return _rung(name, self_test(golden, engine, target))
    except (RunError, ExportError) as error:
        failed = stated("process", name, "runs", False, str(error))
        return rung(name, "golden vectors", [failed], reason=str(error))


def _rung(name: str, results: Sequence[SelfCheck]) -> Rung:
    checks = [
        Check(
            program=check.program,
            case=check.case,
            output="golden vector",
            max_abs=check.max_abs,
            max_rel=check.max_rel,
            tolerance=check.most,
            bound="golden vectors",
            passed=check.passed,
            likeness=check.likeness,
            likeness_tolerance=check.least,
        )
        for check in results
    ]
    return rung(name, "golden vectors", checks)


def _on_arm64(context: Context, golden: Golden) -> Rung:
    try:
        refuse_cpu(context.cpu)
    except RunError as error:
        return not_run("arm64", str(error))
    runner = build.prepare()
    if isinstance(runner, str):
        return not_run("arm64", runner)

    def there(program: Path, data: Sequence[Path], calls: Sequence[Call]) -> list[list[np.ndarray]]:
        return Arm64Program(program, data, cpu=context.cpu).run_sequence(calls)

    return _rung("arm64", self_test(golden, DelegateTest(context, there), "android"))


def _decided(context: Context) -> Rung:
    """Without a reference the loop is compared with itself: twice the same bits."""
    from toolchain.verify.parity import decisions_rung

    if context.bundle.manifest.training is None:
        return not_run("decisions", "the bundle has no training programs to run the loop with.")
    stream = decisions_rung.dialogues(decisions_rung.QUICK_STREAM)
    first, second = (decisions_rung.phone_life(context, f"life-{i}", stream) for i in range(2))
    same = {
        "decisions": first.decisions == second.decisions,
        "greedy text": first.reply == second.reply,
        "losses": first.losses == second.losses,
        "adapter": all(
            np.array_equal(value, second.adapter[name]) for name, value in first.adapter.items()
        ),
    }
    checks = [
        stated("loop", "run twice", name, equal, "" if equal else "another the second time")
        for name, equal in same.items()
    ]
    return rung("decisions", "itself, run again", checks)
