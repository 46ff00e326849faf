"""Fixed-order arithmetic against float64, fractions, and itself in other processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from exporters.errors import ExportError
from exporters.model import deterministic as d
from exporters.model.deterministic_calls import SameBits

SETTINGS = [  # threads, PyTorch's own kernels, MKL's
    {
        "OMP_NUM_THREADS": "2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "AVX2"},
]
OTHERS = [
    {"OMP_NUM_THREADS": "2"},
    {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"},
    {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"},
    {"OMP_NUM_THREADS": "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
]


def random(seed: int, *shape: int, spread: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.exp(spread * torch.randn(*shape, generator=generator))


def child(setting: dict[str, str]) -> list[str]:
    names = {name for one in SETTINGS + OTHERS for name in one}
    env = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "tests.exporters.model.quantize_child"]
    done = subprocess.run(command, env=env | setting, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def hashes() -> list[str]:
    found = child({"OMP_NUM_THREADS": "1"})
    assert len(found) == 9
    return found


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_quantization_gives_the_same_bits(hashes: list[str], setting: dict[str, str]) -> None:
    """Integers, scales, offsets and rotary tables, whatever the threads and the instructions."""
    assert child(setting) == hashes


@pytest.mark.full
@pytest.mark.parametrize("setting", OTHERS, ids=str)
def test_quantization_on_more_processors(hashes: list[str], setting: dict[str, str]) -> None:
    assert child(setting) == hashes


@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=70), st.integers(1, 3))
def test_a_sum_is_near_the_exact_one(values: list[float], columns: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    exact = sum(map(Fraction, x.tolist()), Fraction(0))
    depth = max(1, (len(values) - 1).bit_length() + 1)
    bound = depth * 2.0**-24 * sum(abs(v) for v in values)
    for found in (d.sum_last(x), d.sum_first(x), d.total(x)):
        assert found.dtype == torch.float32
        assert abs(Fraction(found.item()) - exact) <= Fraction(bound) * 2
    # Each column by itself, and zeros at no place change another's sum.
    wide = torch.stack([x] * columns, dim=1) if values else torch.zeros(0, columns)
    assert d.sum_first(wide).eq(d.sum_last(x)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 31, 64, 1024, 1500]), st.sampled_from([0.0, 2.0]))
def test_a_product_is_exact_on_its_grid(seed: int, inner: int, spread: float) -> None:
    a, b = random(seed, 7, inner, spread=spread), random(seed + 1, inner, 5, spread=spread)
    found = d.product(a, b)
    left, right = d.Operand(a, True), d.Operand(b, False)
    exact = [[Fraction(0)] * 5 for _ in range(7)]
    for (p, u), (q, v) in zip(left.slices, right.slices, strict=True):
        assert max(p.abs().max(), q.abs().max()) <= 2.0**26
        for i in range(7):
            for j in range(5):
                total = sum(int(m) * int(n) for m, n in zip(p[i].tolist(), q[:, j].tolist(),
                                                            strict=True))  # fmt: skip
                assert abs(total) < 1 << 53
                exact[i][j] += total * Fraction(u[i].item()) * Fraction(v[0, j].item())
    if len(left.slices) == 1:
        assert [[Fraction(value) for value in row] for row in found.tolist()] == exact
    size = inner * a.abs().amax() * b.abs().amax()
    assert (found - a.double() @ b.double()).abs().max() <= 2.0**-20 * size


def test_the_order_of_a_product_does_not_matter() -> None:
    a, b = random(1, 40, 900, spread=3.0), random(2, 900, 30, spread=3.0)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(3))
    assert torch.equal(d.product(a, b), d.product(a[:, order], b[order]))
    assert torch.equal(d.gram(b), d.gram(b[order]))
    torch.testing.assert_close(d.gram(b), d.product(b.T, b), rtol=0, atol=0)


@given(st.floats(-600, 600))
def test_exp(x: float) -> None:
    assert d.exp(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(
        math.exp(x), rel=8 * 2.0**-53
    )


@given(st.floats(-(2.0**20), 2.0**20))
def test_cos_and_sin(x: float) -> None:
    cos, sin = d.cos_sin(torch.tensor([x], dtype=torch.float64))
    assert cos.item() == pytest.approx(math.cos(x), abs=4 * 2.0**-53)
    assert sin.item() == pytest.approx(math.sin(x), abs=4 * 2.0**-53)


@given(st.floats(1.5, 1e7), st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5))
def test_powers(base: float, exponents: list[float]) -> None:
    found = d.powers(base, torch.tensor(exponents)).tolist()
    assert found == pytest.approx([base**e for e in exponents], rel=4 * 2.0**-53)


@pytest.mark.parametrize("size", [1, 33, 150])
def test_cholesky_and_the_inverse_of_a_triangle(size: int) -> None:
    x = random(size, size, max(2, size // 3))
    matrix = x.double() @ x.double().T + 0.1 * torch.eye(size, dtype=torch.float64)
    lower = d.cholesky(matrix, 0.05)
    unit = 2.0**-20 * size * matrix.abs().max()
    assert torch.equal(lower, lower.tril())
    assert (lower @ lower.T - matrix).abs().max() <= unit
    inverse = d.inverse_of_lower(lower)
    condition = torch.linalg.cond(lower)
    assert (inverse @ lower - torch.eye(size)).abs().max() <= 2.0**-20 * size * condition


def test_a_pivot_is_never_less_than_its_bound() -> None:
    ones = torch.ones(70, 70, dtype=torch.float64) + 1e-9 * torch.eye(70)
    lower = d.cholesky(ones, 1e-9)
    assert torch.isfinite(lower).all()
    assert (lower.diagonal() >= math.sqrt(1e-9)).all()


def test_a_module_under_the_mode_computes_what_it_computes() -> None:
    attention = nn.Sequential(nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 8), nn.Tanh())
    attention.append(nn.Sigmoid())
    x = random(4, 3, 5, 64)
    with torch.no_grad():
        expected = attention.double()(x.double())
        attention.float()
        with SameBits():
            found = attention(x)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2.0**-20)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [torch.cumsum, lambda x, dim: torch.sub(x, x, alpha=3), torch.logsumexp]
)
def test_an_operator_that_is_not_known_is_refused(wrong) -> None:
    with SameBits(), pytest.raises(ExportError, match="same bits on every processor"):
        wrong(torch.ones(3), 0)
