"""The ladder of the built-in model in its short form, the report, golden vectors, bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime_py.bundle import manifest as m
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.engine.self_test import FOLDER, JSON, TENSORS, PhoneTest, read_golden, self_test
from runtime_py.loop.errors import BundleError
from tests import tiny
from tests.toolchain.conftest import Exported
from tests.toolchain.verify.conftest import Faulty, signed
from toolchain.compile.bundle_export import export
from toolchain.compile.tolerances import TABLE, Tolerance
from toolchain.verify.arm64 import build
from toolchain.verify.arm64.emulate import Call, RunError
from toolchain.verify.parity import ladder, parity_report
from toolchain.verify.parity.cases import EFFECT, INITIAL
from toolchain.verify.parity.lm_checks import Bounds, LmOutputs, effects
from toolchain.verify.parity.native_child import run_calls
from toolchain.verify.parity.parity_page import page
from toolchain.verify.parity.verdict import RUNGS, Report, Rung, compare

ALL = {"rung", "status", "reason", "checks"}
NUMBERS = {"program", "case", "max_abs", "max_rel", "tolerance", "margin"}


@pytest.fixture(scope="module")
def climbed(both: Exported) -> Report:
    return ladder.climb(both.bundle, quick=True)


def by_name(found: Report) -> dict[str, Rung]:
    return {rung.rung: rung for rung in found.rungs}


def test_the_built_in_model(climbed: Report) -> None:
    rungs = by_name(climbed)
    assert tuple(rungs) == RUNGS
    assert not climbed.failed, [r.reason for r in climbed.rungs if r.status == "failed"]
    missing = build.prepare()
    for name, rung in rungs.items():
        if name == "arm64" and isinstance(missing, str):
            assert (rung.status, rung.reason) == ("not run", missing)
        else:
            assert rung.status == "passed"
            assert rung.checks
    programs = {check.program.partition(":")[0] for check in rungs["executorch"].checks}
    wanted = {"lm", "embed", "block_forward", "block_backward", "block_backward_saved", "head"}
    assert wanted | {"adamw"} <= programs
    cases = {check.case for check in rungs["executorch"].checks}
    assert {"one token, initial", "one token repeated, B ≠ 0"} <= cases


def test_the_report_for_machines(climbed: Report) -> None:
    said = json.loads(json.dumps(parity_report.as_json(climbed)))
    assert [rung["rung"] for rung in said["rungs"]] == list(RUNGS)
    for rung in said["rungs"]:
        assert rung.keys() >= ALL
        assert rung["status"] in ("passed", "failed", "not run")
        assert all(check.keys() >= NUMBERS for check in rung["checks"])
    assert {row["name"] for row in said["tolerances"]} == set(TABLE)


def test_the_page_needs_nothing_else(climbed: Report) -> None:
    text = page(climbed)
    assert len(re.findall("<svg", text)) == 3
    assert not re.findall(r'(?:src|href)="(?!#)', text)
    assert "<script" not in text
    for rung in RUNGS:
        assert rung in text
    assert climbed.texts["shipped-0"][:20] in text.replace("&lt;", "<").replace("&gt;", ">")


@pytest.mark.parametrize("part", ["lm.pte", "training.pte"])
def test_a_truncated_pte_does_not_crash_the_checker(faulty: Faulty, part: str) -> None:
    file = faulty.bundle / "android" / part
    with file.open("r+b") as out:
        out.truncate(file.stat().st_size // 3)
    rung = faulty.climb("executorch")
    assert rung.status == "failed"
    assert part in rung.reason


def test_a_child_that_crashes_is_replaced(both: Exported, tmp_path: Path) -> None:
    noise = tmp_path / "noise.pte"
    good = (both.bundle / "android/lm.pte").read_bytes()
    noise.write_bytes(good[:64] + bytes(len(good) - 64))
    with pytest.raises(RunError, match=r"noise\.pte in ExecuTorch"):
        run_calls(noise, [], [Call("get_vocab_size")])
    adapter = [both.bundle / "android/adapter.ptd"]
    ran = run_calls(both.bundle / "android/lm.pte", adapter, [Call("get_vocab_size")])
    assert [int(value) for value in ran.outputs[0]] == [4096]


def test_a_missing_program(faulty: Faulty) -> None:
    def change(manifest: m.Manifest) -> m.Manifest:
        assert manifest.android is not None
        programs = tuple(p for p in manifest.android.programs if p.name != "head")
        android = manifest.android.model_copy(update={"programs": programs})
        return manifest.model_copy(update={"android": android})

    rung = faulty.climb("executorch", change=change)
    assert rung.status == "failed"
    assert "no program head" in rung.reason


def test_another_schema_version(faulty: Faulty, attune) -> None:
    path = faulty.bundle / m.MANIFEST
    said = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(said | {"schema_version": 99}), encoding="utf-8")
    (faulty.bundle / m.CHECKSUM).write_text(m.sha256(path) + "\n", encoding="ascii")
    with pytest.raises(BundleError, match="schema version 99"):
        ladder.climb(faulty.bundle)


def test_an_unknown_rung(both: Exported) -> None:
    with pytest.raises(BundleError, match="no --rung attic; known: eager"):
        ladder.climb(both.bundle, rungs=("attic",))


def test_a_source_that_is_gone(both: Exported) -> None:
    """The golden vectors stand in for it; without them nothing is claimed."""
    rungs = ("eager", "captured", "quantized", "executorch", "coreml", "decisions")
    found = ladder.climb(both.bundle, rungs=rungs, source="/no/such/model", quick=True)
    own = by_name(found)
    for name in rungs[:3]:
        assert own[name].status == "not run"
        assert "/no/such/model is no longer there" in own[name].reason
    for name in rungs[3:]:
        assert own[name].status == "passed", own[name].reason


def test_no_source_and_no_golden_vectors(faulty: Faulty) -> None:
    shutil.rmtree(faulty.bundle / FOLDER)
    signed(faulty.bundle)
    report = ladder.climb(faulty.bundle, rungs=("executorch",), source="/no/such/model", quick=True)
    rung = by_name(report)["executorch"]
    assert rung.status == "not run"
    assert "no golden vectors" in rung.reason


def test_qemu_is_missing(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "prepare", lambda: "qemu-aarch64 is not installed.")
    rung = faulty.climb("arm64")
    assert (rung.status, rung.reason) == ("not run", "qemu-aarch64 is not installed.")


def test_a_processor_that_qemu_computes_wrongly(both: Exported) -> None:
    bundle = open_bundle(both.bundle)
    context = ladder.open_context(bundle, both.bundle, quick=True, cpu="max")
    rung = ladder.run_rung("arm64", context)
    assert rung.status == "not run"
    assert "wrongly" in rung.reason


def test_the_golden_vectors_of_a_phone(both: Exported, faulty: Faulty) -> None:
    golden = read_golden(both.bundle)
    assert golden is not None
    size = sum(file.stat().st_size for file in (both.bundle / FOLDER).iterdir())
    assert size < 300_000
    for stream in golden.document["decisions"].values():
        assert len(stream["dialogues"]) > stream["bins"]  # a full buffer has had to choose
    bundle = open_bundle(both.bundle)
    checks = self_test(golden, PhoneTest(bundle), "android")
    assert all(check.passed for check in checks)
    assert {check.program for check in checks} >= {"lm", "embed", "loss", "gradient"}
    # The weights of another model: the same phone finds out.
    weights = faulty.bundle / "training/base.safetensors"
    content = bytearray(weights.read_bytes())
    half = len(content) // 2
    content[half : half + 200_000] = bytes(200_000)
    weights.write_bytes(bytes(content))
    damaged = self_test(golden, PhoneTest(Bundle(faulty.bundle, bundle.manifest)), "android")
    assert {check.program for check in damaged if not check.passed} >= {"loss"}


def test_golden_vectors_that_are_damaged(faulty: Faulty) -> None:
    file = faulty.bundle / FOLDER / TENSORS
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BundleError, match="golden vectors"):
        read_golden(faulty.bundle)
    path = faulty.bundle / FOLDER / JSON
    path.write_text(json.dumps({"format": 9}), encoding="utf-8")
    with pytest.raises(BundleError, match="golden"):
        read_golden(faulty.bundle)


def test_what_cancels_is_held_to_pytorchs_own_float32() -> None:
    """A difference that the format does not explain passes where PyTorch's float32 is as far off
    its own float64, and only there."""
    expected, found = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.001, 3.0])
    bound = Tolerance("float32", 1e-5, None, "")
    for off, passed in ((3e-4, True), (3e-5, False), (0.0, False)):
        check = compare(
            "head", "case", "loss", found, expected, bound, wide=lambda off=off: expected + off
        )
        assert check.passed == passed
        assert (check.margin or 0.0) < 1.0 if passed else (check.margin or 0.0) > 1.0


def test_numbers_of_a_verdict() -> None:
    expected = np.array([[1.0, 2.0, 4.0], [0.0, -4.0, 8.0]])
    found = expected + np.array([[0.0, 0.0, 0.4], [0.0, 0.0, 0.0]])
    bound = Tolerance("float32", 1e-2, None, "")
    check = compare("lm", "case", "logits", found, expected, bound, logits=True)
    assert not check.passed
    assert (check.max_abs, check.max_rel) == (pytest.approx(0.4), pytest.approx(0.05))
    p = np.exp(expected[0]) / np.exp(expected[0]).sum()
    q = np.exp(found[0]) / np.exp(found[0]).sum()
    assert check.kl == pytest.approx((p * np.log(p / q)).sum() / 2)
    assert check.same_token == 1.0
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, expected, strict=True)]
    assert check.likeness == pytest.approx(min(rows))
    assert sum(check.histogram) == expected.size
    assert check.margin == pytest.approx(0.05 / 1e-2)
    nan = compare("lm", "case", "logits", found * np.nan, expected, bound)
    assert not nan.passed
    assert "NaN" in nan.note
    odd = compare("lm", "case", "logits", found[:1], expected, bound)
    assert not odd.passed
    assert "shape" in odd.note


@pytest.mark.parametrize(
    ("quantize", "scale", "noise", "note"),
    [
        ("none", 1.0, 0.0, None),
        ("8da4w", 1.0, 0.5, None),
        ("8da4w", 2.0, 0.5, "times what it should be"),
        ("8da4w", 0.5, 0.5, "times what it should be"),
        ("none", 1.0, 0.2, ""),
        ("8da4w", 0.0, 0.0, "it is not used"),
        ("8da4w", -1.0, 0.0, ""),
    ],
)
def test_effect_of_an_adapter(quantize: str, scale: float, noise: float, note: str | None) -> None:
    """``note`` is None where it passes; ``noise`` is of each of the two runs, in its effect."""
    random = np.random.default_rng(0)
    base, effect = random.normal(size=(2, 4, 500))

    def outputs(scale: float, noise: float) -> LmOutputs:
        adapted = base + scale * effect + noise * random.normal(size=base.shape)
        return LmOutputs({(INITIAL, "case"): base, (EFFECT, "case"): adapted}, {}, {}, {}, {})

    # Twice what one run has, as of int8 activations; float32 has some 1e-5.
    allowed = 2.0 * noise if quantize == "8da4w" else 1e-5
    bounds = Bounds(TABLE["float32"], TABLE["float32"], TABLE["adapter"], allowed)
    (check,) = effects(outputs(scale, noise), outputs(1.0, noise), bounds, "lm")
    assert check.passed == (note is None)
    assert (note or "") in check.note


CLEAN = [
    *[(kind, "none") for kind in tiny.ARCHITECTURES],
    *[(kind, "8da8w") for kind in tiny.ARCHITECTURES],
    ("llama", "8da4w"),
    ("mistral", "8da4w"),
]


@pytest.mark.full
@pytest.mark.parametrize(("kind", "precision"), CLEAN)
def test_no_false_alarm_on_clean_exports(tmp_path: Path, kind: str, precision: str) -> None:
    source = tiny.save_checkpoint(tmp_path / "source", kind, max_position_embeddings=128)
    export(
        str(source),
        tmp_path / "bundle",
        targets=("android",),
        quantize={"android": precision},
        context=96,
        train_lengths=(48,),
    )
    rungs = ("eager", "captured", "quantized", "executorch", "decisions")
    found = ladder.climb(tmp_path / "bundle", rungs=rungs, source=str(source))
    own = by_name(found)
    for name in rungs:
        assert own[name].status == "passed", own[name].reason
