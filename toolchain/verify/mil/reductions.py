"""Operations that gather along axes: sums, extremes, softmax, norms, running sums, order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from toolchain.verify.mil.registry import Ints, computes, moves


def _sum(x: Tensor, axes: Ints) -> Tensor:
    return x.sum(axes, keepdim=True, dtype=x.dtype)


def _mean(x: Tensor, axes: Ints) -> Tensor:
    if x.dtype.is_floating_point:
        return x.mean(axes, keepdim=True)
    return x.mean(axes, keepdim=True, dtype=torch.float64).to(x.dtype)


def _prod(x: Tensor, axes: Ints) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, Ints], Tensor]] = {
    "reduce_sum": _sum,
    "reduce_mean": _mean,
    "reduce_prod": _prod,
    "reduce_max": lambda x, axes: x.amax(axes, keepdim=True),
    "reduce_min": lambda x, axes: x.amin(axes, keepdim=True),
    "reduce_sum_square": lambda x, axes: _sum(x * x, axes),
    "reduce_l1_norm": lambda x, axes: _sum(x.abs(), axes),
    "reduce_l2_norm": lambda x, axes: _sum(x * x, axes).sqrt(),
    "reduce_log_sum": lambda x, axes: _sum(x, axes).log(),
    "reduce_log_sum_exp": lambda x, axes: x.logsumexp(axes, keepdim=True),
}


def _reduction(name: str, function: Callable[[Tensor, Ints], Tensor]) -> None:
    def reduction(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        over = tuple(range(x.ndim)) if axes is None else tuple(axis % x.ndim for axis in axes)
        if not over:  # a scalar, which PyTorch would reduce over no axis as over all
            return function(x[None], (0,))[0]
        kept = function(x, over)
        if keep_dims:
            return kept
        return kept.reshape([n for axis, n in enumerate(x.shape) if axis not in over])

    computes(name)(reduction)


for _name, _function in _REDUCTIONS.items():
    _reduction(_name, _function)


def _argument(name: str, function: Callable[[Tensor, int, bool], Tensor]) -> None:
    def argument(
        x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
    ) -> Tensor:
        carrier = torch.int32 if output_dtype in ("int32", "uint16") else torch.int16
        return function(x, axis, keep_dims).to(carrier)

    computes(name)(argument)


_argument("reduce_argmax", torch.argmax)
_argument("reduce_argmin", torch.argmin)


@computes("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@computes("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """``exclusive``: each number is the sum of those before it; ``reverse``: from the end."""
    source = x.flip(axis) if reverse else x
    total = source.cumsum(axis, dtype=x.dtype)
    if exclusive:
        total = total - source
    return total.flip(axis) if reverse else total


@computes("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """gamma and beta have the sizes of ``axes``, which need not be the last ones."""
    over = tuple(range(x.ndim)) if axes is None else tuple(axis % x.ndim for axis in axes)
    shape = [n if axis in over else 1 for axis, n in enumerate(x.shape)]
    centered = x - x.mean(over, keepdim=True)
    result = centered / torch.sqrt((centered * centered).mean(over, keepdim=True) + epsilon)
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@computes("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes."""
    return x / torch.sqrt((x * x).sum((-3, -2, -1), keepdim=True) + epsilon)


@moves("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return x.argsort(dim=axis, descending=not ascending, stable=True).to(torch.int32)


@moves("topk")
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, ...]:
    """Sorted always, which ``sort`` permits. Of equal numbers the first come first."""
    order = x.argsort(dim=axis, descending=not ascending, stable=True).narrow(axis, 0, k)
    values = x.gather(axis, order)
    if not return_indices:
        return values
    carrier = torch.int32 if output_indices_dtype in ("int32", "uint16") else torch.int16
    return values, order.to(carrier)
