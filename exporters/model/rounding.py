"""How a float matrix becomes integers and scales, on the grids that XNNPACK's dynamic linears take.

Two grids, both symmetric with a positive scale: 8 bits, one scale per output channel, integers in
[-127, 127] (kernels that add two products in 16 bits overflow at -128); 4 bits, one scale per
group of inputs, integers in [-8, 7], scales exact in bfloat16. A matrix may carry an *offset* per
group besides, which makes its grid asymmetric: ``Rounded`` says how a program computes it.

``round_nearest`` looks at each group's extremes, ``round_search`` at all its weights
(``exporters.model.gptq`` also at what the inputs look like). Each gives the same bits on every
processor (``exporters.model.deterministic``): parity recomputes them and compares bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.errors import ExportError
from exporters.model.deterministic import power_of_two, sum_first, total

_RANGES = {4: (-8, 7), 8: (-127, 127)}
# XNNPACK refuses zero and subnormal scales, and divides those of 4-bit groups by 16 once more.
_SMALLEST = 2.0**-100
# Steps that the search tries, as parts of the one that just covers the group: for 4 bits those
# that spread its range over 10 to 21 intervals. Whole numbers up to 15 find the step of a file
# whose groups did not use all 16 values.
_FACTORS = {
    4: tuple(15 / n for n in (15, 10, 11, 12, 13, 14, 15.5, 16, 16.5, 17, 17.5, 18, 19, 20, 21)),
    8: (1.0, 0.99, 0.97, 0.95, 0.9),
}
_CHUNK = 1 << 17  # elements searched at once: what fits a core's cache


@dataclass(frozen=True)
class Rounded:
    """A matrix W [out, in] as ``scale * q + offset``.

    ``q`` int8 [out, in]; ``scale`` float32 [out, groups]; ``offset`` is itself a rounded matrix
    [out, groups], or None for 0. As one constant serves a whole group, a program computes
    ``W x = (scale * q) x + offset s`` with s [groups] the sums of x over each group: the offset
    costs a second linear, 1/group of the first.
    """

    q: Tensor
    scale: Tensor
    offset: Rounded | None = None

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.q.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [out, in]"""
        grouped = self.q.float().view(*self.scale.shape, -1) * self.scale[..., None]
        if self.offset is not None:
            grouped = grouped + self.offset.dequantize()[..., None]
        return grouped.flatten(1)


def _grouped(weight: Tensor, bits: int, group: int) -> Tensor:
    """[out, in] -> float32 [out, in / group, group]"""
    if bits not in _RANGES:
        raise ExportError(f"weights of {bits} bits are not supported; supported: {[*_RANGES]}.")
    if weight.dim() != 2 or group < 1 or weight.shape[1] % group:
        raise ExportError(
            f"a matrix of shape {list(weight.shape)} cannot be rounded in groups of {group} inputs."
        )
    if not torch.isfinite(weight).all():
        raise ExportError("a matrix with NaN or infinite weights cannot be quantized.")
    return weight.detach().float().view(weight.shape[0], -1, group)


def _storable(scale: Tensor, bits: int, unit: Tensor | float = 1.0) -> Tensor:
    """Scales as the delegate keeps them, in multiples of ``unit``, a power of two."""
    scale = torch.maximum(scale, torch.as_tensor(_SMALLEST / unit))
    return scale.to(torch.bfloat16).float() if bits == 4 else scale


def unit_of(weight: Tensor) -> Tensor:
    """The power of two that brings the last dimension near 1, where squares neither vanish nor
    overflow, with nothing rounded on the way there or back: [..., n] -> [...]."""
    return power_of_two(torch.frexp(weight.abs().amax(-1)).exponent.clamp(-100, 120)).float()


def nearest_integers(weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    """The nearest integers, as float32; ``scale`` and ``offset`` broadcast against ``weight``."""
    low, high = _RANGES[bits]
    shifted = weight if offset is None else weight - offset
    return (shifted / scale).round_().clamp_(low, high)


def _covering(grouped: Tensor, bits: int, affine: bool) -> Tensor:
    """The smallest step with which no weight is clipped, [..., group] -> [...]."""
    low, high = _RANGES[bits]
    least, most = grouped.aminmax(dim=-1)
    if affine:
        return (most - least) / (high - low)
    return torch.maximum(most / high, least / low)


def round_nearest(weight: Tensor, bits: int, group: int) -> Rounded:
    """The nearest points of the finest grid that clips no weight (but for its scale's rounding)."""
    grouped = _grouped(weight, bits, group)
    scale = _storable(_covering(grouped, bits, affine=False), bits)
    return _assign(weight, scale, None, bits)


def _assign(weight: Tensor, scale: Tensor, offset: Rounded | None, bits: int) -> Rounded:
    grouped = weight.detach().float().view(*scale.shape, -1)
    shift = None if offset is None else offset.dequantize()[..., None]
    q = nearest_integers(grouped, scale[..., None], shift, bits)
    return Rounded(q.flatten(1).to(torch.int8), scale, offset)


def _search_groups(
    groups: Tensor, importance: Tensor, bits: int, affine: bool
) -> tuple[Tensor, Tensor]:
    """The best scale and offset found for each group: [group, N] -> two of [N].

    Every candidate step is tried as it is and after one weighted least-squares fit of scale and
    offset to the integers that it gave. ``importance`` [group, N]. Weights of a group lie along the
    first dimension, so that sums over a group add whole rows.
    """
    low, high = _RANGES[bits]
    unit = unit_of(groups.T)
    groups = groups / unit
    step = _covering(groups.T, bits, affine)
    least, most = groups.aminmax(dim=0)
    best = torch.full_like(step, torch.inf)
    scale, offset = _storable(step, bits, unit), torch.zeros_like(step)
    mass = sum_first(importance)
    weighed = sum_first(importance * groups)

    def consider(s: Tensor, o: Tensor) -> Tensor:
        nonlocal best, scale, offset
        shift = o if affine else None
        q = nearest_integers(groups, s, shift, bits)
        gap = groups - q * s
        if shift is not None:
            gap = gap - shift
        error = sum_first(gap.mul_(gap).mul_(importance))
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
        return q

    for factor in _FACTORS[bits]:
        s = _storable(step * factor, bits, unit)
        # Anchored at the least weight while all fit, else clipped alike at both ends.
        o = least - low * s + ((most - least) - (high - low) * s).clamp_min(0) / 2
        q = consider(s, o)
        hq = q * importance
        fit_q = sum_first(hq * q)
        fit_w = sum_first(hq * groups)
        if affine:
            mean_q, mean_w = sum_first(hq) / mass, weighed / mass
            fit_q, fit_w = fit_q - mass * (mean_q * mean_q), fit_w - mass * (mean_q * mean_w)
            s = _storable(torch.where(fit_q > 1e-6 * mass, fit_w / fit_q, s), bits, unit)
            consider(s, mean_w - s * mean_q)
        else:
            consider(_storable(torch.where(fit_q > 0, fit_w / fit_q, s), bits, unit), o)
    return _storable(scale * unit, bits), offset * unit


def _search(
    weight: Tensor, bits: int, group: int, importance: Tensor | None, affine: bool
) -> tuple[Tensor, Rounded | None]:
    grouped = _grouped(weight, bits, group)
    out, groups, _ = grouped.shape
    each = torch.ones(groups * group) if importance is None else importance.float()
    # Inputs never seen still count a little, so that every group has a best scale.
    each = each / (total(each) / each.numel()).clamp_min(1e-30) + 1e-6
    each = each.view(groups, group).T.contiguous()  # [group, groups]
    scale, offset = torch.empty(out, groups), torch.empty(out, groups)
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, out, rows):
        part = grouped[start : start + rows]
        count = part.shape[0]
        columns = part.permute(2, 0, 1).reshape(group, -1)  # [group, rows * groups]
        best = _search_groups(columns, each.repeat(1, count), bits, affine)
        for whole, piece in zip((scale, offset), best, strict=True):
            whole[start : start + count] = piece.view(count, groups)
    return scale, round_nearest(offset, 8, groups) if affine else None


def round_search(
    weight: Tensor, bits: int, group: int, importance: Tensor | None = None, affine: bool = False
) -> Rounded:
    """The scale of each group chosen to minimise ``Σ importance_i (w_i - ŵ_i)²`` over candidates.

    weight [out, in]; importance [in], such as the mean square of each input (llama.cpp calls it an
    importance matrix), None for equal. ``affine`` adds an 8-bit offset per group: weights that come
    from an asymmetric 4-bit file (GGUF's Q4_1: w = d q + m) are then recovered, not rounded again.
    """
    scale, offset = _search(weight, bits, group, importance, affine)
    return _assign(weight, scale, offset, bits)
