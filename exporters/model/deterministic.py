"""Sums, products and functions that give the same bits on every processor.

What an export writes is recomputed later, on another machine or with other threads, and compared
byte for byte. IEEE 754 fixes the result of +, −, ×, ÷ and √ of two numbers, and of rounding to an
integer or to another format; PyTorch computes each of these elementwise, one operator at a time, so
nothing is fused. It fixes neither the *order* of a sum (which follows vector width and threads) nor
exp, cos or power (SLEEF, MKL and the C library round them differently). Here:

- a sum adds halves elementwise: its tree depends on the length only;
- a product rounds both operands to integer grids so coarse that every sum of products is an integer
  below 2⁵³: float64 then adds without rounding, in whatever order a library likes;
- exp, cos and sin are polynomials in float64, each step an operator of its own.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

import torch
from torch import Tensor

_MANTISSA = 53  # bits of float64 that hold an integer exactly
_SLICE = 1024  # terms of one exact sum: 21 bits an operand
_STRIPE = 512  # rows of a symmetric matrix that are computed together
_CHUNK = 1 << 15  # numbers that a polynomial takes at once: all of its steps in a core's cache
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# π/2 in three parts; the first two have 33 bits, so that k times each is exact to k = 2²⁰.
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_EXP_TERMS, _TRIG_TERMS = 13, 9  # of the Taylor series, for |r| ≤ ln 2 / 2 and ≤ π / 4
_EXP = [1.0 / math.factorial(n) for n in range(_EXP_TERMS + 1)]
_SIN = [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(_TRIG_TERMS)]
_COS = [(-1.0) ** n / math.factorial(2 * n) for n in range(_TRIG_TERMS)]
_DECIMAL = Context(prec=40)  # software integers: the same everywhere


def power_of_two(exponent: Tensor) -> Tensor:
    """2ᵉ of integers from −1022 to 1023 as float64, by the bits of its format."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def sum_first(x: Tensor) -> Tensor:
    """Σ over the first dimension: [n, ...] -> [...], halves added to halves."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        folded = x[:half] + x[half : 2 * half]
        x = torch.cat([folded, x[2 * half :]]) if x.shape[0] % 2 else folded
    return x[0] if x.shape[0] else x.new_zeros(x.shape[1:])


def sum_last(x: Tensor) -> Tensor:
    """Σ over the last dimension: [..., n] -> [...], by the same tree."""
    return sum_first(x.movedim(-1, 0).contiguous())


def total(x: Tensor) -> Tensor:
    """Σ of all numbers, [] of the same dtype."""
    return sum_first(x.reshape(-1))


def _grid(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """``x`` as integers of at most 2^bits with one power of two along ``dim``: x ≈ q · unit.

    Both float64; a unit is 2^−bits of the largest number of its row (or column), rounded up.
    """
    exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent.clamp(-900, 900) - bits
    return (x.double() * power_of_two(-exponent)).round_(), power_of_two(exponent)


class Operand:
    """One side of an exact product, on its grid: slices of at most ``_SLICE`` terms.

    ``x`` [..., M, K] as the left side, [..., K, N] as the right one. A matrix that meets many
    others is laid on its grid once.
    """

    def __init__(self, x: Tensor, left: bool) -> None:
        dim = -1 if left else -2
        slices = x.split(_SLICE, dim)
        terms = max(s.shape[dim] for s in slices)
        bits = (_MANTISSA - (terms - 1).bit_length()) // 2
        self.slices = [_grid(part, dim, bits) for part in slices]


def matmul(a: Operand, b: Operand) -> Tensor:
    """``a`` [..., M, K] times ``b`` [..., K, N], float64 [..., M, N], exactly."""
    parts = (
        torch.matmul(p, q).mul_(unit).mul_(scale)
        for (p, unit), (q, scale) in zip(a.slices, b.slices, strict=True)
    )
    result = next(parts)
    for part in parts:
        result.add_(part)
    return result


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a`` [..., M, K] times ``b`` [..., K, N] -> float64 [..., M, N].

    Each operand keeps 21 bits or more of its row's (or column's) largest number: an entry is off by
    at most some 2⁻²¹ K max|a| max|b|.
    """
    return matmul(Operand(a, True), Operand(b, False))


def gram(x: Tensor) -> Tensor:
    """Σ x xᵀ over the rows of x [T, n]: float64 [n, n], of which half is computed."""
    size = x.shape[1]
    result = x.new_empty(size, size, dtype=torch.float64)
    for start in range(0, size, _STRIPE):
        end = min(start + _STRIPE, size)
        part = product(x[:, start:end].T, x[:, :end])
        result[start:end, :end] = part
        result[:start, start:end] = part[:, :start].T
    return result


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for value in coefficients[-2::-1]:
        result.mul_(x).add_(value)
    return result


def _exp(x: Tensor) -> Tensor:
    x = x.clamp(-700.0, 700.0)
    k = (x * (1.0 / math.log(2.0))).round_()
    r = x.sub_(k * _LN2_HIGH).sub_(k * _LN2_LOW)
    return _horner(_EXP, r).mul_(power_of_two(k))


def exp(x: Tensor) -> Tensor:
    """eˣ, float64, within some units of its last place; arguments beyond ±700 count as these."""
    flat = x.double().reshape(-1)
    return torch.cat([_exp(part) for part in flat.split(_CHUNK)] or [flat]).view(x.shape)


def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """cos x and sin x, float64, for |x| up to 2²⁰, within some 10⁻¹⁶."""
    x = x.double()
    k = (x * (2.0 / math.pi)).round_()
    r = x
    for part in _HALF_PI:
        r = r - k * part
    square = r * r
    cosine, sine = _horner(_COS, square), _horner(_SIN, square) * r
    turn = k.to(torch.int64) & 3
    odd = (turn & 1).bool()
    cos = torch.where(odd, sine, cosine)
    sin = torch.where(odd, cosine, sine)
    return (
        torch.where((turn == 1) | (turn == 2), -cos, cos),
        torch.where(turn >= 2, -sin, sin),
    )


def powers(base: float, exponents: Tensor) -> Tensor:
    """``baseᵉ`` for a positive base, float64 shaped like ``exponents``: decimal arithmetic of 40
    digits, rounded once. For a few numbers."""
    log = _DECIMAL.ln(Decimal(base))
    values = [
        float(_DECIMAL.exp(_DECIMAL.multiply(Decimal(e), log)))
        for e in exponents.double().reshape(-1).tolist()
    ]
    return torch.tensor(values, dtype=torch.float64).view(exponents.shape)


def cholesky(matrix: Tensor, least: float) -> Tensor:
    """L of ``matrix`` = L Lᵀ, lower triangular, float64 [n, n].

    ``least`` > 0: a bound from below on the eigenvalues, and so on every pivot; what rounding
    leaves of a pivot is never less. Blocks of 64 columns: the diagonal block column by column with
    elementwise operators, all below it in exact products.
    """
    size, block = matrix.shape[0], 64
    left = matrix.double().clone()
    for start in range(0, size, block):
        end = min(start + block, size)
        corner = left[start:end, start:end]
        for j in range(end - start):
            pivot = corner[j, j].clamp_min(least).sqrt()
            corner[j, j] = pivot
            column = corner[j + 1 :, j].div_(pivot)
            corner[j + 1 :, j + 1 :] -= column[:, None] * column
        panel = product(left[end:, start:end], inverse_of_lower(corner.tril()).T)
        left[end:, start:end] = panel
        for first in range(end, size, _STRIPE):  # the lower triangle only
            last = min(first + _STRIPE, size)
            rows, columns = panel[first - end : last - end], panel[: last - end]
            left[first:last, end:last] -= product(rows, columns.T)
    return left.tril_()


def inverse_of_lower(matrix: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [n, n], float64, by halves:
    [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]."""
    size = matrix.shape[0]
    if size <= 32:
        result = torch.zeros_like(matrix)
        for i in range(size):
            row = -sum_first(matrix[i, :i, None] * result[:i])
            row[i] = 1.0
            result[i] = row / matrix[i, i]
        return result
    half = (size // 2 + 31) // 32 * 32
    first, last = inverse_of_lower(matrix[:half, :half]), inverse_of_lower(matrix[half:, half:])
    result = torch.zeros_like(matrix)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = product(last, product(matrix[half:, :half], first)).neg_()
    return result
