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
class Said:
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
) -> Said:
    """All cases with every adapter; one process for each adapter. The first case's prompt comes
    again at the end, after all others have been in the cache. Raises ``RunError``."""
    android, manifest = bundle.android, bundle.manifest
    files = {program.name: bundle.path / program.file for program in android.target.programs}
    prefill = min(PREFILL_ANDROID, manifest.model.context)
    said = Said({}, {}, {}, {}, {})
    for name, values in adapters.items():
        data = android.adapter
        if name != INITIAL:
            data = scratch / "adapter.ptd"
            own = manifest.adapter
            write_values(data, android.adapter, own.tensors, values)
        calls: list[Call] = []
        wanted: list[tuple[Case, list[int]]] = []
        for case in cases:
            more, counted = calls_of(case, prefill, steps)
            wanted.append((case, [len(calls) + index for index in counted]))
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
        for case, indices in wanted:
            said.logits[name, case.name] = np.concatenate([outputs[i][0] for i in indices])
        said.again[name] = outputs[last][0]
        first = last + 1
        for case, result in zip(embeds, outputs[first : first + len(embeds)], strict=True):
            said.pooled[case.name], said.entropy[case.name] = result
        for method, result in zip(asked, outputs[first + len(embeds) :], strict=True):
            said.constants[method] = [int(value) for value in result]
    return said


def compared(
    found: Said,
    expected: Said,
    cases: Sequence[Case],
    bounds: Bounds,
    program: str = "lm",
) -> list[Check]:
    """``expected``'s logits may have more steps than ``found``'s."""
    checks: list[Check] = []
    known = {case.name: case for case in cases}
    for (name, case), own in found.logits.items():
        want = expected.logits[name, case][: len(own)]
        place = f"{case}, {name}"
        parts = [(f"{known[case].prompt} tokens in", slice(0, 1))]
        if len(own) > 1:
            parts.append((f"{len(own) - 1} decoded", slice(1, len(own))))
        for what, rows in parts:

            def wide(name: str = name, case: str = case, rows: slice = rows) -> np.ndarray:
                assert bounds.wide is not None
                return bounds.wide(name, case)[rows]

            checks.append(
                compare(
                    f"{program}: {what}", place, "logits", own[rows], want[rows], bounds.logits,
                    logits=True, wide=wide if bounds.wide else None,
                )
            )  # fmt: skip
    pooled = bounds.pooled
    for case, vector in found.pooled.items():
        checks.append(compare("embed", case, "pooled", vector, expected.pooled[case], pooled))
        entropy = expected.entropy[case]
        checks.append(
            compare("embed", case, "entropy", found.entropy[case], entropy, pooled, scale=1.0)
        )
    return checks + effects(found, expected, bounds, program)


def effects(found: Said, expected: Said, bounds: Bounds, program: str) -> list[Check]:
    """What the adapter changes, which a comparison of logits may miss where it changes little; and
    that what was in the cache before changes nothing."""
    checks = []
    names = [case for adapter, case in found.logits if adapter == EFFECT]
    if names and all((INITIAL, name) in found.logits for name in names):
        rows = [
            [
                said.logits[EFFECT, name][:n] - said.logits[INITIAL, name][:n]
                for name in names
                for n in [len(found.logits[EFFECT, name])]
            ]
            for said in (found, expected)
        ]
        own, want = (np.concatenate(part) for part in rows)
        size = float(np.sqrt((want * want).mean()))
        bound = of_effect(bounds.adapter, bounds.noise, size)
        check = compare(program, "all", "effect of the adapter", own, want, bound)
        ratio = float(np.linalg.norm(own)) / max(float(np.linalg.norm(want)), 1e-30)
        if ratio < 1e-3:
            note = "nothing: another adapter gives the same logits, so it is not used"
            check = stated(program, "all", "effect of the adapter", False, note)
        elif not 1 / ADAPTER_RATIO <= ratio <= ADAPTER_RATIO:
            check = replace(check, passed=False, note=f"{ratio:.2f} times what it should be")
        checks.append(check)
    for adapter, logits in found.again.items():
        case = next(name for own, name in found.logits if own == adapter)
        before = found.logits[adapter, case][:1]
        tolerance = TABLE["exact"]
        check = compare(
            program, f"{case}, {adapter}", "logits after other dialogues", logits, before, tolerance
        )
        if not check.passed:
            note = f"other than before them, by {check.max_rel:.2g}: the cache is stale"
            check = stated(program, check.case, check.output, False, note)
        checks.append(check)
    return checks


def constants(found: Said, manifest: Manifest) -> list[Check]:
    """What the program tells a runner, beside what the manifest says."""
    own = manifest.tokenizer
    wanted = {
        "get_bos_id": [own.bos_id if own.bos_id is not None else own.eos_ids[0]],
        "get_eos_ids": list(own.eos_ids),
        "get_vocab_size": [manifest.model.vocab],
        "get_max_context_len": [manifest.model.context],
    }
    checks = []
    for method, value in found.constants.items():
        note = "" if value == wanted[method] else f"{value}, the manifest says {wanted[method]}"
        checks.append(stated("lm", "constants", method, not note, note))
    return checks
