"""Rounding against torchao, closed forms and its own optimality claims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

from exporters.errors import ExportError
from exporters.model.gptq import error_rows, round_gptq
from exporters.model.rounding import Rounded, round_nearest, round_search

MATRICES = st.builds(
    lambda seed, rows, groups, spread, shift: _random(seed, rows, groups * 32, spread, shift),
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([1e-27, 1e-20, 1e-3, 1.0, 50.0, 1e25]),
    st.sampled_from([0.0, 0.5, -3.0]),
)


def _random(seed: int, rows: int, inputs: int, spread: float, shift: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    heavy = 1 + 4 * (torch.rand(rows, inputs, generator=generator) > 0.97)  # some outliers
    return (weight * heavy + shift) * spread


def _importance(inputs: int) -> Tensor:
    return torch.rand(inputs, generator=torch.Generator().manual_seed(inputs)) ** 4


def _gram(seed: int, inputs: int, rank: int | None = None) -> Tensor:
    """Of strongly correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or inputs, inputs, generator=generator)
    mixing = mixing * torch.logspace(0, 1.5, inputs)
    x = torch.randn(4 * inputs, mixing.shape[0], generator=generator) @ mixing
    return x.T @ x


def _check_grid(rounded: Rounded, bits: int) -> None:
    low, high = {4: (-8, 7), 8: (-127, 127)}[bits]
    assert rounded.q.dtype == torch.int8
    assert rounded.scale.dtype == torch.float32
    assert rounded.q.min() >= low
    assert rounded.q.max() <= high
    # XNNPACK: positive and normal, also after its own division by 16.
    assert (rounded.scale / 16 >= torch.finfo(torch.float32).tiny).all()
    assert torch.isfinite(rounded.dequantize()).all()
    if bits == 4:
        assert torch.equal(rounded.scale.bfloat16().float(), rounded.scale)


def _weighted(weight: Tensor, rounded: Rounded, importance: Tensor) -> Tensor:
    """Σ importance (w - ŵ)² of each group, in float64."""
    gap = weight.double() - rounded.dequantize().double()
    return (gap.square() * importance.double()).view(*rounded.scale.shape, -1).sum(-1)


@pytest.mark.parametrize(("bits", "group"), [(8, 96), (4, 32)])
def test_nearest_is_torchaos_symmetric_quantization(bits: int, group: int) -> None:
    low, high = {4: (-8, 7), 8: (-127, 127)}[bits]
    weight = _random(3, 24, 96, 0.05, 0.0)
    # torchao's scale covers the greater of max/high and min/low, as ours does.
    scale, zero = choose_qparams_affine(
        weight,
        MappingType.SYMMETRIC_NO_CLIPPING_ERR,
        (1, group),
        torch.int8,
        low,
        high,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    if bits == 4:
        scale = scale.bfloat16().float()
    q = quantize_affine(weight, (1, group), scale, zero, torch.int8, low, high)
    ours = round_nearest(weight, bits, group)
    torch.testing.assert_close(ours.scale, scale.view_as(ours.scale), rtol=1e-6, atol=0)
    assert (ours.q.int() - q.int()).abs().max() <= 1  # w * (1 / s) against w / s
    assert (ours.q == q).float().mean() > 0.999


def test_weights_on_the_grid_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (16, 128), generator=generator)
    q[:, ::32], q[:, 1::32] = -8, 7
    scale = (torch.rand(16, 4, generator=generator) + 0.1).bfloat16().float()
    weight = Rounded(q.to(torch.int8), scale).dequantize()
    for rounded in (round_nearest(weight, 4, 32), round_search(weight, 4, 32)):
        assert torch.equal(rounded.q, q.to(torch.int8))
        assert torch.equal(rounded.scale, scale)


@pytest.mark.parametrize("levels", [16, 15, 12])
def test_asymmetric_4_bit_weights_are_recovered(levels: int) -> None:
    """GGUF's Q4_1 (w = d q + m, float16 d and m), also where a group uses fewer than 16 values."""
    generator = torch.Generator().manual_seed(levels)
    q = torch.randint(0, levels, (32, 2, 32), generator=generator).float()
    q[..., 0], q[..., 1] = 0, levels - 1
    d = (torch.rand(32, 2, 1, generator=generator) * 0.01 + 0.01).half().float()
    m = (-d * levels / 2 + 0.01 * torch.randn(32, 2, 1, generator=generator)).half().float()
    weight = (q * d + m).flatten(1)
    symmetric = (round_search(weight, 4, 32).dequantize() - weight).norm() / weight.norm()
    affine = round_search(weight, 4, 32, affine=True)
    assert affine.offset is not None
    _check_grid(affine, 4)
    _check_grid(affine.offset, 8)
    assert affine.offset.q.shape == affine.scale.shape
    # What is left: d in bfloat16 (2⁻⁹ of at most 8 d), m in 8 bits per channel.
    assert (affine.dequantize() - weight).norm() / weight.norm() < 0.01
    assert symmetric > 0.03


def test_offset_is_a_product_with_sums_over_groups() -> None:
    weight, x = _random(1, 8, 96, 1.0, 0.5), torch.randn(5, 96)
    rounded = round_search(weight, 4, 32, affine=True)
    assert rounded.offset is not None
    plain = Rounded(rounded.q, rounded.scale).dequantize()
    y = x @ plain.T + x.view(5, 3, 32).sum(-1) @ rounded.offset.dequantize().T
    torch.testing.assert_close(y, x @ rounded.dequantize().T, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(weight=MATRICES, bits=st.sampled_from([4, 8]), weighted=st.booleans())
def test_search_is_never_worse_than_nearest(weight: Tensor, bits: int, weighted: bool) -> None:
    group = 32 if bits == 4 else weight.shape[1]
    importance = _importance(weight.shape[1]) if weighted else None
    nearest, searched = (
        round_nearest(weight, bits, group),
        round_search(weight, bits, group, importance),
    )
    _check_grid(nearest, bits)
    _check_grid(searched, bits)
    by = torch.ones(weight.shape[1]) if importance is None else importance
    by = by / by.mean() + 1e-6
    assert (_weighted(weight, searched, by) <= _weighted(weight, nearest, by) * (1 + 1e-4)).all()


@settings(max_examples=30, deadline=None)
@given(weight=MATRICES, affine=st.booleans())
def test_gptq_of_independent_inputs_is_the_search(weight: Tensor, affine: bool) -> None:
    plain = round_search(weight, 4, 32, affine=affine)
    gptq = round_gptq(weight, 4, 32, torch.eye(weight.shape[1]), affine)
    assert torch.equal(gptq.q, plain.q)
    assert torch.equal(gptq.scale, plain.scale)


@settings(max_examples=30, deadline=None)
@given(weight=MATRICES, seed=st.integers(0, 1000), bits=st.sampled_from([4, 8]))
def test_gptq_is_never_worse_than_nearest_or_search(weight: Tensor, seed: int, bits: int) -> None:
    group = 32 if bits == 4 else weight.shape[1]
    gram = _gram(seed, weight.shape[1])
    gptq = round_gptq(weight, bits, group, gram)
    _check_grid(gptq, bits)
    error = error_rows(weight, gptq, gram)
    for other in (
        round_nearest(weight, bits, group),
        round_search(weight, bits, group, gram.diagonal()),
    ):
        assert (error <= error_rows(weight, other, gram) * (1 + 1e-4)).all()


def test_gptq_gains_much_on_correlated_inputs() -> None:
    weight, gram = _random(5, 64, 128, 1.0, 0.0), _gram(6, 128, rank=24)
    searched = round_search(weight, 4, 32, gram.diagonal())
    for affine in (False, True):
        gptq = round_gptq(weight, 4, 32, gram, affine)
        assert error_rows(weight, gptq, gram).sum() < 0.5 * error_rows(weight, searched, gram).sum()


def test_error_rows_is_the_change_of_the_outputs() -> None:
    weight, x = _random(7, 6, 64, 1.0, 0.0), torch.randn(40, 64)
    rounded = round_nearest(weight, 4, 32)
    expected = (x @ (weight - rounded.dequantize()).T).square().sum(0)
    torch.testing.assert_close(error_rows(weight, rounded, x.T @ x).float(), expected)


@pytest.mark.parametrize("affine", [False, True])
def test_groups_of_zeros_and_dead_inputs(affine: bool) -> None:
    weight = _random(8, 5, 96, 1.0, 0.0)
    weight[2] = 0
    weight[:, 32:64] = 0
    gram = _gram(9, 96)
    gram[:, 64:70] = gram[64:70] = 0
    for rounded in (
        round_nearest(weight, 4, 32),
        round_search(weight, 4, 32, torch.zeros(96), affine),
        round_search(weight, 4, 32, gram.diagonal(), affine),
        round_gptq(weight, 4, 32, gram, affine),
        round_gptq(weight, 4, 32, torch.zeros(96, 96), affine),
    ):
        _check_grid(rounded, 4)
        assert rounded.dequantize()[2].abs().max() < 1e-20


def test_misuse_is_named() -> None:
    with pytest.raises(ExportError, match="3 bits"):
        round_nearest(torch.ones(2, 32), 3, 32)
    with pytest.raises(ExportError, match=r"\[2, 40\].*groups of 32"):
        round_search(torch.ones(2, 40), 4, 32)
    with pytest.raises(ExportError, match="NaN"):
        round_nearest(torch.full((2, 32), torch.nan), 4, 32)
