"""GPTQ (Frantar et al., 2022): integers that make small what rounding does to a matrix's outputs.

What the inputs look like is given as their Gram matrix (``exporters.model.calibration`` collects
them). The same bits on every processor, as ``exporters.model.rounding``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.model.deterministic import cholesky, inverse_of_lower, product, sum_last, total
from exporters.model.rounding import (
    Rounded,
    nearest_integers,
    round_nearest,
    round_search,
    unit_of,
)


def error_rows(weight: Tensor, rounded: Rounded, gram: Tensor) -> Tensor:
    """What rounding does to each output over the inputs that ``gram`` was made of:
    ``(w - ŵ) H (w - ŵ)ᵀ`` for each row, float64 [out]."""
    gap = weight.detach().float() - rounded.dequantize()
    unit = unit_of(weight.detach())
    gap = gap / unit[:, None]
    unit = unit.double()
    return sum_last(product(gap, gram) * gap) * (unit * unit)


@dataclass(frozen=True, eq=False)
class ErrorSpread:
    """How GPTQ spreads the error of one input over those still to come.

    ``order`` int64 [in]: those of most energy first. ``u`` float32 [in, in], upper triangular, in
    that order: with the Gram matrix H = R Rᵀ, R upper triangular, u = R⁻¹ is the Cholesky factor of
    H⁻¹ (H⁻¹ = uᵀ u) that Frantar et al. (2022), section 4, take each step's coefficients from.
    """

    order: Tensor
    u: Tensor


def spread_of(gram: Tensor, damping: float = 0.01) -> ErrorSpread:
    """For all matrices of one input; gram [in, in]. ``damping``: of the mean energy, added to each
    input's."""
    energy = gram.diagonal().double()
    order = torch.argsort(energy, descending=True, stable=True)
    h = gram[order][:, order].double()
    added = damping * (total(energy) / energy.numel()).clamp_min(1e-30)
    h.diagonal().add_(added)
    # No eigenvalue is below what was added, so half of it bounds the pivots.
    r = cholesky(h.flip(0, 1), added.item() / 2)
    return ErrorSpread(order, inverse_of_lower(r).flip(0, 1).float())


def _compensate(weight: Tensor, rounded: Rounded, bits: int, spread: ErrorSpread) -> Tensor:
    """The integers of GPTQ on the grid of ``rounded``, int8 [out, in]: inputs are rounded one by
    one, and each one's error is spread over the inputs still to come."""
    size = weight.shape[1]
    order, u = spread.order, spread.u
    group = order // rounded.group
    left = weight.detach().float()[:, order].T.contiguous()  # [in, out], so that an input is a row
    scale = rounded.scale.T.contiguous()
    offset = None if rounded.offset is None else rounded.offset.dequantize().T.contiguous()
    q = torch.empty_like(left)
    block = 64
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = torch.empty(end - start, weight.shape[0])
        for i in range(start, end):
            s, o = scale[group[i]], None if offset is None else offset[group[i]]
            q[i] = nearest_integers(left[i], s, o, bits)
            error = left[i] - q[i] * s
            if o is not None:
                error -= o
            errors[i - start] = error.div_(u[i, i])
            # Two operators: a fused one rounds once, an unfused one twice.
            left[i + 1 : end] -= u[i, i + 1 : end, None] * error
        left[end:] -= product(u[start:end, end:].T, errors).float()
    back = torch.empty_like(order)
    back[order] = torch.arange(size)
    return q[back].T.contiguous().to(torch.int8)


def round_gptq(
    weight: Tensor,
    bits: int,
    group: int,
    gram: Tensor,
    affine: bool = False,
    spread: ErrorSpread | None = None,
) -> Rounded:
    """GPTQ (Frantar et al., 2022) on the searched grid: integers chosen for small ``error_rows``.

    weight [out, in]; gram [in, in] = Σ x xᵀ over calibration inputs; ``spread`` its ``spread_of``,
    where the caller has it already. A row for which plain rounding
    on the same grid, or ``round_nearest``, does better by that measure keeps it.
    """
    searched = round_search(weight, bits, group, gram.diagonal(), affine)
    q = _compensate(weight, searched, bits, spread or spread_of(gram))
    best = Rounded(q, searched.scale, searched.offset)
    others = [searched] if affine else [searched, round_nearest(weight, bits, group)]
    error = error_rows(weight, best, gram)
    for other in others:
        other_error = error_rows(weight, other, gram)
        worse = (other_error < error)[:, None]
        q = torch.where(worse, other.q, best.q)
        best = Rounded(q, torch.where(worse, other.scale, best.scale), best.offset)
        error = torch.minimum(error, other_error)
    return best
