"""``lm.pte`` on every case: prompts, decoding, embeddings, and what it says of itself.

The same calls go to any processor; an ``Executor`` makes them in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime_py.bundle.adapter_forms import write_values
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.manifest import Manifest
from toolchain.compile.android import PREFILL_ANDROID
from toolchain.compile.tolerances import ADAPTER_RATIO, TABLE, Tolerance, of_effect
from toolchain.verify.arm64.emulate import Call
from toolchain.verify.parity.cases import EFFECT, INITIAL, Case
from toolchain.verify.parity.verdict import Check, compare, stated

Executor = Callable[[Path, Sequence[Path], Sequence[Call]], list[list[np.ndarray]]]
SPEAKS = ("get_bos_id", "get_eos_ids", "get_vocab_size", "get_max_context_len")


@dataclass(frozen=True, eq=False)
class LmOutputs:
    """What one engine gave for the cases. ``logits`` [1 + steps, vocab] by adapter and case:
    after the prompt and after each decoded token; ``pooled`` and ``entropy`` by case."""

    logits: dict[tuple[str, str], np.ndarray]
    pooled: dict[str, np.ndarray]
    entropy: dict[str, np.ndarray]
    again: dict[str, np.ndarray]
    constants: dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class Bounds:
    """What ``compared`` allows. ``noise``: of logits, as a root mean square, for what is left of
    them in an adapter's effect; None: ``adapter`` has its own bound. ``largest``: what one logit
    may be off by, as a part of the largest. ``wide``: the expected logits
    [rows, vocab] of an adapter and a case in float64, where that helps."""

    logits: Tolerance
    pooled: Tolerance
    adapter: Tolerance
    noise: float | None = None
    largest: float = 0.0
    wide: Callable[[str, str], np.ndarray] | None = None


def calls_of(case: Case, prefill: int, steps: int) -> tuple[list[Call], list[int]]:
    """The calls, and the indices of those whose logits count."""
    calls = []
    for start in range(0, case.prompt, prefill):
        chunk = case.tokens[None, start : min(start + prefill, case.prompt)]
        calls.append(Call("forward", (chunk, np.array([start], np.int64))))
    first = len(calls) - 1
    for place in range(case.prompt, case.prompt + min(steps, case.steps)):
        token = case.tokens[None, place : place + 1]
        calls.append(Call("forward", (token, np.array([place], np.int64))))
    return calls, list(range(first, len(calls)))


def run(
    bundle: Bundle,
    executor: Executor,
    cases: Sequence[Case],
    adapters: Mapping[str, Mapping[str, np.ndarray]],
    scratch: Path,
    *,
    steps: int = 1 << 30,
    constants: bool = True,
) -> LmOutputs:
    """All cases with every adapter; one process for each adapter. The first case's prompt comes
    again at the end, after all others have been in the cache. Raises ``RunError``."""
    android, manifest = bundle.android, bundle.manifest
    files = {program.name: bundle.path / program.file for program in android.target.programs}
    prefill = min(PREFILL_ANDROID, manifest.model.context)
    measured = LmOutputs({}, {}, {}, {}, {})
    for name, values in adapters.items():
        data = android.adapter
        if name != INITIAL:
            data = scratch / "adapter.ptd"
            section = manifest.adapter
            write_values(data, android.adapter, section.tensors, values)
        calls: list[Call] = []
        counted_calls: list[tuple[Case, list[int]]] = []
        for case in cases:
            more, counted = calls_of(case, prefill, steps)
            counted_calls.append((case, [len(calls) + index for index in counted]))
            calls += more
        more, counted = calls_of(cases[0], prefill, 0)
        last = len(calls) + counted[0]
        calls += more
        embeds = cases if name == INITIAL else []
        longest = manifest.policy.embed_length
        calls += [Call("embed", (case.tokens[None, :longest],)) for case in embeds]
        asked = SPEAKS if constants and name == INITIAL else ()
        calls += [Call(method) for method in asked]
        outputs = executor(files["forward"], [data], calls)
        for case, indices in counted_calls:
            measured.logits[name, case.name] = np.concatenate([outputs[i][0] for i in indices])
        measured.again[name] = outputs[last][0]
        first = last + 1
        for case, result in zip(embeds, outputs[first : first + len(embeds)], strict=True):
            measured.pooled[case.name], measured.entropy[case.name] = result
        for method, result in zip(asked, outputs[first + len(embeds) :], strict=True):
            measured.constants[method] = [int(value) for value in result]
    return measured


def _rows_of(
    wide: Callable[[str, str], np.ndarray] | None, adapter: str, case: str, rows: slice
) -> Callable[[], np.ndarray] | None:
    """Rows of ``Bounds.wide``, for when they are asked for."""
    return None if wide is None else lambda: wide(adapter, case)[rows]


def compared(
    measured: LmOutputs,
    expected: LmOutputs,
    cases: Sequence[Case],
    bounds: Bounds,
    program: str = "lm",
) -> list[Check]:
    """``expected``'s logits may have more steps than ``measured``'s."""
    checks: list[Check] = []
    known = {case.name: case for case in cases}
    for (name, case), logits in measured.logits.items():
        reference = expected.logits[name, case][: len(logits)]
        place = f"{case}, {name}"
        parts = [(f"{known[case].prompt} tokens in", slice(0, 1))]
        if len(logits) > 1:
            parts.append((f"{len(logits) - 1} decoded", slice(1, len(logits))))
        for what, rows in parts:
            checks.append(
                compare(
                    f"{program}: {what}", place, "logits", logits[rows], reference[rows],
                    bounds.logits, logits=True,
                    wide=_rows_of(bounds.wide, name, case, rows),
                )
            )  # fmt: skip
    pooled = bounds.pooled
    for case, vector in measured.pooled.items():
        checks.append(compare("embed", case, "pooled", vector, expected.pooled[case], pooled))
        entropy = expected.entropy[case]
        checks.append(
            compare("embed", case, "entropy", measured.entropy[case], entropy, pooled, scale=1.0)
        )
    return checks + effects(measured, expected, bounds, program)


def effects(measured: LmOutputs, expected: LmOutputs, bounds: Bounds, program: str) -> list[Check]:
    """What the adapter changes, which a comparison of logits may miss where it changes little; and
    that what was in the cache before changes nothing."""
    checks = []
    names = [case for adapter, case in measured.logits if adapter == EFFECT]
    if names and all((INITIAL, name) in measured.logits for name in names):
        rows = [
            [
                outputs.logits[EFFECT, name][:n] - outputs.logits[INITIAL, name][:n]
                for name in names
                for n in [len(measured.logits[EFFECT, name])]
            ]
            for outputs in (measured, expected)
        ]
        effect, reference = (np.concatenate(part) for part in rows)
        size = float(np.sqrt((reference * reference).mean()))
        bound = of_effect(bounds.adapter, bounds.noise, size)
        check = compare(program, "all", "effect of the adapter", effect, reference, bound)
        ratio = float(np.linalg.norm(effect)) / max(float(np.linalg.norm(reference)), 1e-30)
        if ratio < 1e-3:
            note = "nothing: another adapter gives the same logits, so it is not used"
            check = stated(program, "all", "effect of the adapter", False, note)
        elif not 1 / ADAPTER_RATIO <= ratio <= ADAPTER_RATIO:
            check = replace(check, passed=False, note=f"{ratio:.2f} times what it should be")
        checks.append(check)
    for adapter, logits in measured.again.items():
        case = next(name for other, name in measured.logits if other == adapter)
        before = measured.logits[adapter, case][:1]
        tolerance = TABLE["exact"]
        check = compare(
            program, f"{case}, {adapter}", "logits after other dialogues", logits, before, tolerance
        )
        if not check.passed:
            note = f"other than before them, by {check.max_rel:.2g}: the cache is stale"
            check = stated(program, check.case, check.output, False, note)
        checks.append(check)
    return checks


def constants(measured: LmOutputs, manifest: Manifest) -> list[Check]:
    """What the program tells a runner, beside what the manifest says."""
    tokenizer = manifest.tokenizer
    expected = {
        "get_bos_id": [tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_ids[0]],
        "get_eos_ids": list(tokenizer.eos_ids),
        "get_vocab_size": [manifest.model.vocab],
        "get_max_context_len": [manifest.model.context],
    }
    checks = []
    for method, value in measured.constants.items():
        note = "" if value == expected[method] else f"{value}, the manifest says {expected[method]}"
        checks.append(stated("lm", "constants", method, not note, note))
    return checks
