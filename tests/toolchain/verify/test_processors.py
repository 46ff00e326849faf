"""No false alarm where the processor, its instructions or the threads are others than at export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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


def toolchain(setting: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    names = {name for one in SETTINGS.values() for name in one}
    env = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "toolchain", *map(str, arguments)]
    return subprocess.run(command, env=env | setting, capture_output=True, text=True)


def report(bundle: Path, setting: dict[str, str], *options: object) -> dict:
    done = toolchain(setting, "parity", bundle, "--json", *options)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def clean(said: dict) -> None:
    reasons = {r["rung"]: r["reason"] for r in said["rungs"] if r["status"] == "failed"}
    assert not reasons
    margins = [c["margin"] for r in said["rungs"] for c in r["checks"] if c["margin"] is not None]
    assert margins
    assert max(margins) < 1.0


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_built_in_model(both: Exported, setting: str) -> None:
    """Exported as this machine does; the whole ladder under each setting."""
    clean(report(both.bundle, SETTINGS[setting], "--quick"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "precision", "pair"),
    [(*made, pair) for made, pair in zip(MADE, cycle(PAIRS), strict=False)],
)
def test_twenty_clean_exports(
    tmp_path: Path, kind: str, precision: str, pair: tuple[str, str]
) -> None:
    source = tiny.save_checkpoint(tmp_path / "source", kind, max_position_embeddings=128)
    export = ["export", source, "--out", tmp_path / "bundle", "--target", "android"]
    export += ["--quantize", precision, "--context", 96, "--train-lengths", 48]
    done = toolchain(SETTINGS[pair[0]], *export)
    assert done.returncode == 0, done.stderr
    rungs = ("eager", "captured", "quantized", "executorch", "decisions")
    options = [word for rung in rungs for word in ("--rung", rung)]
    clean(report(tmp_path / "bundle", SETTINGS[pair[1]], "--source", source, *options))


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
