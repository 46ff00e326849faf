"""Operations on each number by itself: arithmetic, comparison, activations, casts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from exporters.errors import ExportError
from toolchain.verify.mil.registry import computes, moves
from toolchain.verify.mil.values import find_dtype

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": functional.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softsign": functional.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def _unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    def unary(x: Tensor) -> Tensor:
        return function(x)

    computes(name)(unary)


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    def binary(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    computes(name)(binary)


for _name, _one in _UNARY.items():
    _unary(_name, _one)
for _name, _two in _BINARY.items():
    _binary(_name, _two)


@computes("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype in _INTEGERS:
        raise ExportError("of integers is not defined: MIL does not say how it rounds.")
    return x / y


# The defaults of epsilon are MIL's. A program converted to float16 may hold one that has become 0.


@computes("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


@computes("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@computes("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return 1 / torch.sqrt(x + epsilon)


@computes("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@computes("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


@computes("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@computes("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * torch.expm1(x))


@computes("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@computes("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@computes("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@computes("softplus")
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@computes("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """The approximations by tanh and sigmoid are Hendrycks and Gimpel's, 2016, section 2."""
    if mode == "EXACT":
        return functional.gelu(x)
    if mode == "TANH_APPROXIMATION":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ExportError(
        f"mode '{mode}' is unknown; known: EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION."
    )


@moves("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@moves("identity")
def identity(x: Tensor) -> Tensor:
    return x


@moves("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    """Floats to integers by truncation; integers to narrower ones modulo their range; what is not
    zero is true."""
    target = find_dtype(dtype)
    if x.dtype.is_floating_point and target.carrier in _INTEGERS:
        x = x.to(torch.int64)
    result = x.to(target.carrier)
    if target.name == "uint16":  # carried in int32
        result = result & 0xFFFF
    return result
