"""Programs on ARM64 under QEMU and in the native runner, against ExecuTorch's Python runner."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn

from exporters.executorch.lm_program import lower_lm
from exporters.executorch.patches import edge_config
from exporters.model.assembly import build
from exporters.model.lora_tensors import adapter_tensors
from exporters.model.quantize import Scheme, quantized
from exporters.model.spec import read_spec
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.engine.lm import ExecutorchLm
from tests import tiny
from tests.toolchain.conftest import Exported
from toolchain.compile.tolerances import rounding
from toolchain.verify.arm64 import attention
from toolchain.verify.arm64 import build as building
from toolchain.verify.arm64 import emulate as running
from toolchain.verify.arm64.emulate import (
    Arm64Program,
    Call,
    FileSlice,
    OutputOf,
    RunError,
    refuse_cpu,
)

CHUNK = 16  # tokens of the longest call
PROMPT, STEPS = 12, 6

# The largest difference between ARM64 and x86 that is no fault, as a part of the largest value.
FLOAT = rounding(2 * (5 * 64 + 512))  # two tiny layers' sums in another order
ROUNDED = 0.05  # a limit on power: parity measures what int8 activations may do

SCHEMES = {
    "none": None,
    "8da8w": Scheme(bits=8, head_bits=8),
    "8da4w": Scheme(bits=4, head_bits=8, affine=True),
}
BOTH = pytest.mark.parametrize("native", [True, False], ids=["native", "arm64"])
RUNNERS = pytest.mark.usefixtures("runners")
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 needs an emulator")


@pytest.fixture(scope="module")
def runners() -> None:
    """Builds both runners, or skips with the reason why they cannot be had."""
    for native in (False, True):
        found = building.prepare(native)
        if isinstance(found, str):
            pytest.skip(found)


@dataclass(frozen=True)
class Files:
    program: Path
    adapter: Path


def lower(folder: Path, kind: str, precision: str) -> Files:
    """A tiny random model of one layer with an adapter that is not zero."""
    source = tiny.hugging_face(kind, num_hidden_layers=1)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = build(read_spec(source.config, tiny.CONTEXT), source.state_dict(), targets, 4)
    random = torch.Generator().manual_seed(5)
    for tensor in adapter_tensors(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.2)
    scheme = SCHEMES[precision]
    if scheme is not None:
        model = quantized(model, scheme, [tiny.tokens_of(32)])
    files = Files(folder / "lm.pte", folder / "adapter.ptd")
    lower_lm(model, files.program, prefill_length=CHUNK, embed_length=32, bos_id=1, eos_ids=[2, 5])
    write_ptd(files.adapter, {name: t.numpy() for name, t in adapter_tensors(model).items()})
    return files


def chunks() -> list[tuple[Tensor, int]]:
    """A prompt in two calls, then single tokens: tokens [1, S], and where they start."""
    tokens = tiny.tokens_of(PROMPT + STEPS)
    ends = [5, *range(PROMPT, PROMPT + STEPS + 1)]
    return [(tokens[:, a:b], a) for a, b in zip([0, *ends], ends, strict=False)]


def in_python(files: Files) -> list[np.ndarray]:
    lm = ExecutorchLm(files.program, files.adapter)
    logits = [lm.forward(tokens, start).numpy() for tokens, start in chunks()]
    vector, entropy = lm.embed(tiny.tokens_of(20))
    return [*logits, vector.numpy(), np.array([entropy], np.float32)]


def in_runner(files: Files, native: bool) -> list[np.ndarray]:
    program = Arm64Program(files.program, [files.adapter], native=native)
    calls = [Call("forward", (t.numpy(), np.array([start]))) for t, start in chunks()]
    calls.append(Call("embed", (tiny.tokens_of(20).numpy(),)))
    return [array for outputs in program.run_sequence(calls) for array in outputs]


def largest(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Of all outputs, the largest difference as a part of that output's largest value."""
    return max(
        tiny.relative(torch.from_numpy(f), torch.from_numpy(e))
        for f, e in zip(found, expected, strict=True)
    )


# Numbers


def check(files: Files, tolerance: float) -> None:
    """``forward`` with its KV cache over several calls of one process, and ``embed``."""
    expected = in_python(files)
    native = in_runner(files, native=True)
    # The same kernels, in another process and without Python. Not the same bits: loaded again, a
    # program gives other last ones within one process and with one thread too.
    assert largest(native, expected) < tolerance
    arm = in_runner(files, native=False)
    assert largest(arm, expected) < tolerance
    if tolerance == FLOAT:
        assert [a.argmax() for a in arm] == [a.argmax() for a in expected]


@RUNNERS
def test_the_bundle_that_ships(both: Exported) -> None:
    android = both.bundle / "android"
    check(Files(android / "lm.pte", android / "adapter.ptd"), ROUNDED)


@pytest.mark.full
@RUNNERS
@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"),
    [
        ("llama", "none", FLOAT),
        ("mistral", "none", FLOAT),  # a sliding window, so that attention has a mask
        ("llama", "8da8w", ROUNDED),
        ("llama", "8da4w", ROUNDED),
    ],
)
def test_tiny_models(kind: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    check(lower(tmp_path, kind, precision), tolerance)


class _Attention(nn.Module):
    """Keys and values go into a cache of 12 positions; two heads of q share one of k."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 12, 2, 8))
        self.register_buffer("values", torch.zeros(1, 12, 2, 8))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        at = start[0].item()
        torch._check(at >= 0)
        torch._check(at + q.shape[1] <= 12)
        torch.ops.llama.update_cache(k, self.keys, at)
        torch.ops.llama.update_cache(v, self.values, at)
        sdpa = torch.ops.llama.custom_sdpa
        causal = sdpa(q, self.keys, self.values, at, None, 0.0, True, 0.3)
        return causal, sdpa(q, self.keys, self.values, at, mask, 0.0, False, None)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> np.ndarray:
    """PyTorch's attention: q [1, S, 4, 8], k and v [1, T, 2, 8], mask [S, T] -> [1, S, 4, 8]."""
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    out = nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).numpy()


@RUNNERS
@BOTH
def test_the_attention_kernels(native: bool, attention_program: Path) -> None:
    """A cache, grouped queries, a causal and a given mask, against PyTorch's own attention."""
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 9, heads, 8, generator=random) for heads in (4, 2, 2))
    seen = torch.rand(9, 12, generator=random) < 0.7
    seen[:, 0] = True
    seen[:, 9:] = False
    mask = torch.where(seen, 0.0, -1e30)
    calls = [
        Call(
            "forward",
            (*(t[:, i : i + 3].numpy() for t in (q, k, v)), np.array([i]), mask[i : i + 3].numpy()),
        )
        for i in (0, 3, 6)
    ]
    results = Arm64Program(attention_program, native=native).run_sequence(calls)
    for i, (causal, masked) in zip((0, 3, 6), results, strict=True):
        rows, until = slice(i, i + 3), i + 3
        past = torch.where(torch.ones(9, 9).tril().bool(), 0.0, -1e30)[rows, :until]
        expected = attended(q[:, rows], k[:, :until], v[:, :until], past, 0.3)
        np.testing.assert_allclose(causal, expected, atol=rounding(12))
        keys, values = (torch.zeros(1, 12, 2, 8) for _ in range(2))
        keys[:, :until], values[:, :until] = k[:, :until], v[:, :until]
        expected = attended(q[:, rows], keys, values, mask[rows], 8**-0.5)
        np.testing.assert_allclose(masked, expected, atol=rounding(12))


@pytest.fixture(scope="module")
def attention_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "attention.pte"
    example = (
        *(torch.zeros(1, 3, heads, 8) for heads in (4, 2, 2)),
        torch.tensor([0]),
        torch.zeros(3, 12),
    )
    edge = to_edge_transform_and_lower(
        torch.export.export(_Attention(), example), compile_config=edge_config()
    )
    path.write_bytes(edge.to_executorch().buffer)
    return path


class _Rows(nn.Module):
    """x [2, 3], w [3, 4] -> (x w, the sum of x): nothing of it delegated."""

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x @ w, x.sum()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that reads and writes the caller's memory, as the training programs do."""
    path = tmp_path_factory.mktemp("rows") / "rows.pte"
    captured = torch.export.export(_Rows(), (torch.ones(2, 3), torch.ones(3, 4)))
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    lowered = to_edge_transform_and_lower(captured).to_executorch(
        ExecutorchBackendConfig(memory_planning_pass=planning)
    )
    path.write_bytes(lowered.buffer)
    return path


@RUNNERS
@BOTH
def test_inputs_from_a_file_and_from_an_earlier_call(
    native: bool, rows: Path, tmp_path: Path
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T  # not contiguous
    w = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    back = np.linspace(2, 3, 12, dtype=np.float32).reshape(3, 4)
    weights = tmp_path / "with a space.bin"
    weights.write_bytes(b"12345678" + w.tobytes() + back.tobytes())
    first, second = Arm64Program(rows, native=native).run_sequence(
        [
            Call("forward", (x, FileSlice(weights, 8, "float32", (3, 4)))),
            Call(
                "forward", (np.ones((2, 3), np.float32), FileSlice(weights, 56, "float32", (3, 4)))
            ),
        ]
    )
    np.testing.assert_allclose(first[0], x @ w, rtol=rounding(4))
    assert first[1].shape == ()
    assert first[1] == 15
    np.testing.assert_allclose(second[0], np.ones((2, 3)) @ back, rtol=rounding(4))

    chained = Arm64Program(rows, native=native)
    with pytest.raises(
        RunError, match=r"input 0 of forward is float32 2x4; it must be float32 and"
    ):
        chained.run_sequence([Call("forward", (x, w)), Call("forward", (OutputOf(0, 0), w))])
    with pytest.raises(RunError, match="output 2 of call 0, which there is not"):
        chained.run_sequence([Call("forward", (x, w)), Call("forward", (OutputOf(0, 2), w))])
    with pytest.raises(RunError, match=r"3x4 from byte 60 on, is not within .*, which has 104"):
        chained.call("forward", (x, FileSlice(weights, 60, "float32", (3, 4))))


# Bad input


@RUNNERS
@BOTH
def test_calls_that_do_not_fit(native: bool, rows: Path) -> None:
    program = Arm64Program(rows, native=native)
    x, w = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    for method, inputs, said in (
        ("backward", (x, w), "there is no method 'backward'; the program has forward"),
        ("forward", (x,), "forward takes 2 inputs, not 1"),
        ("forward", (x, w.T.copy()), "input 1 of forward is float32 4x3; it must be"),
        ("forward", (x, w.astype(np.int64)), "int64 3x4; it must be float32 and at most 3x4"),
        ("forward", (x, w[:2]), "a call of forward fails: "),
        ("forward", (x, w.astype("complex64")), "unknown dtype 'complex64'"),
        ("for\tward", (x, w), "cannot be written into a request"),
    ):
        with pytest.raises(RunError, match=said):
            program.call(method, inputs)


@RUNNERS
@BOTH
def test_files_that_are_damaged(native: bool, rows: Path, tmp_path: Path) -> None:
    content = rows.read_bytes()
    inputs = (np.ones((2, 3), np.float32), np.ones((3, 4), np.float32))
    damaged = tmp_path / "damaged.pte"
    for part in (b"", content[:20], content[: len(content) // 2], content[:-40]):
        damaged.write_bytes(part)
        with pytest.raises(RunError, match=r"damaged\.pte .* failed: cannot load"):
            Arm64Program(damaged, native=native).call("forward", inputs)
    with pytest.raises(RunError, match=r"none\.pte is not a file"):
        Arm64Program(tmp_path / "none.pte", native=native).call("forward", inputs)


@RUNNERS
def test_a_flipped_byte_harms_only_the_child(rows: Path, tmp_path: Path) -> None:
    content = rows.read_bytes()
    inputs = (np.ones((2, 3), np.float32), np.ones((3, 4), np.float32))
    damaged = tmp_path / "damaged.pte"
    for position in np.random.default_rng(1).integers(8, len(content), 20):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        damaged.write_bytes(flipped)
        try:
            Arm64Program(damaged, timeout=20).call("forward", inputs)
        except RunError as error:
            assert "damaged.pte" in str(error)  # noqa: PT017


@RUNNERS
def test_a_child_that_takes_too_long_is_ended(rows: Path) -> None:
    with pytest.raises(RunError, match=r"took longer than 0\.001 s"):
        Arm64Program(rows, timeout=0.001).call("forward")


def test_processors_that_compute_wrongly_are_refused(rows: Path) -> None:
    for cpu in ("max", "", "max,sve=on"):
        with pytest.raises(RunError, match="computes int8 products wrongly"):
            refuse_cpu(cpu)
    for cpu in ("cortex-a76", "max,sme=off", "neoverse-n1"):
        refuse_cpu(cpu)
    with pytest.raises(RunError, match="take cortex-a76"):
        Arm64Program(rows, cpu="max")


@RUNNERS
@ON_X86
def test_a_processor_that_there_is_not(rows: Path) -> None:
    with pytest.raises(RunError, match="unable to find CPU model 'abacus'"):
        Arm64Program(rows, cpu="abacus").call("forward")


# What is missing


def with_only(folder: Path, programs: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``programs`` the only ones to be found."""
    folder.mkdir()
    for name in programs:
        (folder / name).write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_a_child_that_crashes(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "runner"
    monkeypatch.setattr(running, "prepare", lambda native, cache: building.Runner(script))
    for body, said in (
        ("kill -SEGV $$", "in the native runner crashed with SIGSEGV"),
        ("exit 7", "failed: exit code 7"),
        ("echo two; echo lines >&2; exit 3", "failed: lines"),
        ("echo call > response; touch outputs", "the runner's response is incomplete"),
    ):
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        with pytest.raises(RunError, match=said):
            Arm64Program(rows).call("forward")


@ON_X86
def test_the_reason_why_there_is_no_runner(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_only(tmp_path / "none", [], monkeypatch)
    reason = building.prepare()
    assert isinstance(reason, str)
    assert reason.startswith("qemu-aarch64-static or qemu-aarch64 is not installed")
    with pytest.raises(RunError, match="is not installed"):
        Arm64Program(rows)
    with_only(tmp_path / "qemu", ["qemu-aarch64-static"], monkeypatch)
    assert str(building.prepare()).startswith("aarch64-linux-gnu-g++ is not installed")

    with_only(tmp_path / "both", ["qemu-aarch64-static", "aarch64-linux-gnu-g++"], monkeypatch)
    cache = tmp_path / "cache"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    reason = str(building.prepare(cache=cache))
    assert "which is needed once, failed: " in reason
    assert "executorch" in reason
    assert os.listdir(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reason = building.prepare(native=True, cache=tmp_path / "file")
    assert reason == f"the cache {tmp_path / 'file'} cannot be written: File exists."


def test_a_library_that_is_not_as_expected(tmp_path: Path) -> None:
    source, target = tmp_path / "a.so", tmp_path / "b.so"
    kernels = b" ".join(attention.KERNELS)
    for content, said in (
        (b"text", "it has no custom_sdpa_out and no update_cache_out"),
        (kernels, "not a 64-bit"),
        (b"\x7fELF\x02\x01" + kernels, "tables are damaged"),
        (b"\x7fELF\x02\x01" + bytes(60) + kernels, "lacks the entry 5"),
    ):
        source.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            attention.detach(source, target)
    assert not target.exists()
