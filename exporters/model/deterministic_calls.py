"""Runs PyTorch modules so that they give the same bits on every processor.

``SameBits`` stands between a module and PyTorch's kernels. Operators whose result IEEE 754 fixes go
through; products, softmax and the like are computed by ``exporters.model.deterministic``; any other
operator is refused, so that nothing slips in that another processor would round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exporters.errors import ExportError
from exporters.model import deterministic as d

_aten = torch.ops.aten
# Views, copies, integers, comparisons, and elementwise arithmetic that rounds once.
_EXACT = frozenset(
    """
    _local_scalar_dense _to_copy _unsafe_view abs add alias all amax amin any arange bitwise_and
    bitwise_not bitwise_or bitwise_xor cat clamp clamp_max clamp_min clone copy detach div
    embedding empty empty_like eq expand floor full full_like ge gt index index_put le
    lift_fresh logical_and logical_not lt masked_fill maximum minimum mul ne neg new_zeros ones
    ones_like permute reciprocal reshape round rsub scalar_tensor select select_scatter slice
    split split_with_sizes sqrt squeeze stack sub t transpose tril triu unbind unsqueeze view
    where zeros zeros_like
    """.split()  # noqa: SIM905
)
# Of torch.ao's reference operators: elementwise arithmetic, extremes, rounding.
_INTEGERS = frozenset(
    """
    choose_qparams_per_token_asymmetric dequantize_per_channel dequantize_per_channel_group
    dequantize_per_token embedding_byte quantize_per_token
    """.split()  # noqa: SIM905
)


class SameBits(TorchDispatchMode):
    """Under it, a module's results depend on its inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self._grids: dict[tuple, tuple[Tensor, d.Operand]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        given = dict(kwargs or {})
        if space == "aten" and (replacement := _REPLACEMENTS.get(name)) is not None:
            return replacement(self, *args, **given)
        known = name.rstrip("_") in _EXACT if space == "aten" else name in _INTEGERS
        if not known or given.get("alpha", 1) != 1:
            raise ExportError(
                f"{func} is not known to give the same bits on every processor, so it has no place "
                f"in what an export writes."
            )
        return func(*args, **given)

    def right(self, matrix: Tensor) -> d.Operand:
        """A right operand: a weight, laid on its grid once for all calls under one mode."""
        key = (
            matrix.data_ptr(), tuple(matrix.shape), matrix.stride(), matrix.dtype, matrix._version
        )  # fmt: skip
        if key not in self._grids:
            # The tensor too: as long as it lives, nothing else has its address.
            self._grids[key] = (matrix, d.Operand(matrix, False))
        return self._grids[key][1]


def _mm(mode: SameBits, a: Tensor, b: Tensor) -> Tensor:
    return d.matmul(d.Operand(a, True), mode.right(b)).to(a.dtype)


def _addmm(
    mode: SameBits, c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1
) -> Tensor:
    if beta != 1 or alpha != 1:
        raise ExportError(
            f"addmm with beta {beta} and alpha {alpha} is not known to give the same bits "
            f"everywhere: only 1 and 1 are."
        )
    return _mm(mode, a, b) + c


def _bmm(mode: SameBits, a: Tensor, b: Tensor) -> Tensor:
    return d.product(a, b).to(a.dtype)


def _softmax(mode: SameBits, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shares = d.exp((x - x.amax(dim, keepdim=True)).movedim(dim, 0))
    return (shares / d.sum_first(shares)).movedim(0, dim).to(x.dtype)


def _sigmoid(mode: SameBits, x: Tensor) -> Tensor:
    return (1.0 / (d.exp(-x) + 1.0)).to(x.dtype)


def _tanh(mode: SameBits, x: Tensor) -> Tensor:
    return (1.0 - 2.0 / (d.exp(x.double() * 2.0) + 1.0)).to(x.dtype)


def _rsqrt(mode: SameBits, x: Tensor) -> Tensor:
    return 1.0 / x.sqrt()


def _pow(mode: SameBits, base: Any, exponent: Any) -> Tensor:
    if isinstance(base, int | float) and isinstance(exponent, Tensor):
        return d.powers(float(base), exponent).to(exponent.dtype)
    if exponent == 2:
        return base * base
    raise ExportError(f"a power of {exponent} is not known to give the same bits everywhere.")


def _sum(
    mode: SameBits, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    dims = [dim] if isinstance(dim, int) else dim
    if not dims:
        return d.total(x)
    if len(dims) != 1:
        raise ExportError(
            f"a sum over dimensions {list(dims)} at once is not known to give the same bits "
            f"everywhere: sum over one, or over all."
        )
    result = d.sum_first(x.movedim(dims[0], 0).contiguous())
    return result.unsqueeze(dims[0]) if keepdim else result


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "_softmax": _softmax,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "rsqrt": _rsqrt,
    "pow": _pow,
    "sum": _sum,
}
