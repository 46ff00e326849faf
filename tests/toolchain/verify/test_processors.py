"""No false alarm where the processor, its instructions or the threads are others than at export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.toolchain.conftest import Exported
from tests.toolchain.verify.conftest import Faulty
from toolchain.verify.arm64 import build
from toolchain.verify.arm64.emulate import Arm64Program, Call
from toolchain.verify.parity import call_checks, lm_checks, training_checks
from toolchain.verify.parity.cases import EFFECT
from toolchain.verify.parity.run_bounds import of_android
from toolchain.verify.parity.verdict import RUNGS

PLAIN = {"OMP_NUM_THREADS": "1"}
SETTINGS = {
    "one thread": PLAIN,
    "two threads": {"OMP_NUM_THREADS": "2"},
    "AVX2": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    "AVX2, two threads": {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx2"},
    "no vectors": {
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
    },
}
PAIRS = [  # export, parity
    ("one thread", "AVX2, two threads"),
    ("AVX2, two threads", "one thread"),
    ("two threads", "AVX2"),
    ("AVX2", "two threads"),
    ("no vectors", "two threads"),
]
MADE = [
    *((kind, precision) for kind in tiny.ARCHITECTURES for precision in ("none", "8da8w")),
    ("llama", "8da4w"),
    ("mistral", "8da4w"),
]


def child(setting: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python of its own under a setting, and under nothing else of what settings are."""
    names = {name for one in SETTINGS.values() for name in one}
    env = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env | setting, capture_output=True, text=True)


def in_force(setting: dict[str, str]) -> list[str]:
    """The instructions and the threads that PyTorch takes under it."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    done = child(setting, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def report(bundle: Path, setting: dict[str, str], *options: object) -> dict:
    done = child(setting, "-m", "toolchain", "parity", bundle, "--json", *options)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def clean(said: dict, rungs: Sequence[str]) -> None:
    """These rungs ran, with checks, and passed; the others did not run."""
    reasons = {r["rung"]: r["reason"] for r in said["rungs"] if r["status"] == "failed"}
    assert not reasons
    assert {r["rung"] for r in said["rungs"] if r["status"] == "passed"} == set(rungs)
    ran = [r for r in said["rungs"] if r["rung"] in rungs]
    assert all(rung["checks"] for rung in ran)
    assert all(check["passed"] for rung in ran for check in rung["checks"])
    margins = [c["margin"] for r in ran for c in r["checks"] if c["margin"] is not None]
    assert len(margins) > 10
    print(f"the worst of {len(margins)} margins: {max(margins):.2g}")
    assert max(margins) < 1.0


def export_and_climb(
    folder: Path,
    kind: str,
    precision: str,
    pair: tuple[str, str],
    rungs: Sequence[str],
    *,
    layers: int = 2,
    quick: bool = False,
) -> None:
    """A tiny random model, exported under one setting; ``rungs`` of its bundle under another."""
    sizes = {"max_position_embeddings": 128, "num_hidden_layers": layers}
    source = tiny.save_checkpoint(folder / "source", kind, **sizes)
    export = ["export", source, "--out", folder / "bundle", "--target", "android"]
    export += ["--quantize", precision, "--context", 96, "--train-lengths", 48]
    done = child(SETTINGS[pair[0]], "-m", "toolchain", *export)
    assert done.returncode == 0, done.stderr
    options = [word for rung in rungs for word in ("--rung", rung)] + ["--quick"] * quick
    said = report(folder / "bundle", SETTINGS[pair[1]], "--source", source, *options)
    assert said["precisions"] == {"android": precision}
    clean(said, rungs)


def test_export_and_parity_on_unlike_processors(tmp_path: Path) -> None:
    """One small model without vectors at export; parity with them, and with other threads."""
    pair = ("no vectors", "two threads")
    instructions, threads = zip(*(in_force(SETTINGS[name]) for name in pair), strict=True)
    assert instructions[0] == "DEFAULT" != instructions[1]
    assert threads == ("1", "2")
    rungs = ("captured", "quantized", "executorch")
    export_and_climb(tmp_path, "llama", "8da4w", pair, rungs, layers=1, quick=True)


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_built_in_model(both: Exported, setting: str) -> None:
    """Exported as this machine does; the whole ladder under each setting."""
    said = report(both.bundle, SETTINGS[setting], "--quick")
    idle = [r["rung"] for r in said["rungs"] if r["status"] == "not run"]
    assert idle in ([], ["arm64"])  # which needs an emulator and a runner
    clean(said, [rung for rung in RUNGS if rung not in idle])


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "precision", "pair"),
    [(*made, pair) for made, pair in zip(MADE, cycle(PAIRS), strict=False)],
)
def test_twenty_clean_exports(
    tmp_path: Path, kind: str, precision: str, pair: tuple[str, str]
) -> None:
    rungs = ("eager", "captured", "quantized", "executorch", "decisions")
    export_and_climb(tmp_path, kind, precision, pair, rungs)


@pytest.mark.full
@pytest.mark.skipif(
    not isinstance(build.prepare(native=True), build.Runner)
    or not (shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")),
    reason="the native runner and qemu-x86_64 are needed",
)
def test_an_older_processor(faulty: Faulty) -> None:
    """XNNPACK's kernels for a Haswell, which has AVX2 and no AVX-512, against this machine's."""
    context = faulty.context()
    bundle = context.bundle
    bounds = of_android(context)

    def engine(**how: object):
        return lambda program, data, calls: Arm64Program(
            program,
            data,
            native=True,
            **how,  # type: ignore[arg-type]
        ).run_sequence(calls)

    said = [
        lm_checks.run(
            bundle, engine(**how), context.cases[:3], context.adapters,
            context.scratch, steps=4, constants=False,
        )
        for how in ({"older": "Haswell"}, {})
    ]  # fmt: skip
    checks = lm_checks.compared(*said, context.cases[:3], bounds)
    example = context.examples[-1]
    calls = training_checks.record(
        bundle, context.programs, context.weights, context.adapters[EFFECT], example
    )
    signatures = {p.name: p for p in bundle.android.target.programs}
    kept = [call for call in calls if call.layer in (0, None)]
    requests: list[Call] = [call.call() for call in kept]
    file = bundle.path / signatures["head"].file
    older, here = (engine(**how)(file, [], requests) for how in ({"older": "Haswell"}, {}))
    native = [
        replace(call, outputs=tuple(map(np.asarray, outputs)))
        for call, outputs in zip(kept, here, strict=True)
    ]
    spec = context.source.captured.spec
    more, _ = call_checks.judged(native, older, signatures, "Haswell", spec, context.programs)
    failed = [check for check in [*checks, *more] if not check.passed]
    assert not failed, failed[0]
    for check in sorted([*checks, *more], key=lambda c: -(c.margin or 0.0))[:5]:
        print(f"{check.program}: {check.output} on {check.case}: margin {check.margin or 0:.2g}")
