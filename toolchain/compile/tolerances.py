"""How far two computations of the same thing may be apart: where each bound comes from.

No bound is a number that some machine gave. It is one of three:

- *from the format and the length of the sums*: n roundings of relative size u, in whatever order,
  add up to more than λ √n u of the sum of magnitudes with a probability below 2 exp(−λ²/2) (Higham
  and Mary 2019, theorem 2.4). ``SURE`` is λ.
- *from a spread measured in the same run* (``toolchain.compile.spread``): what the precision's own
  rounding does in PyTorch to these inputs.
- *a limit on power*, said to be one: how bad a fault must be at most to be seen.

They belong to a precision, that is to how numbers are rounded, and never to a backend. ``max_rel``
is the largest difference as a part of the largest value expected, ``likeness`` the correlation of
the two (of each row of logits: the smallest).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from exporters.model.spec import ModelSpec
from toolchain.compile.spread import Spread

SINGLE, HALF = 2.0**-24, 2.0**-11  # half a step of float32 and of float16 at 1
SURE = 8.0
ABOVE = 8.0  # times PyTorch's own float32 against its float64, where sums cancel
# Two roundings to int8 differ by √2 of what each has. Twice that, so 4 times where it is squared.
INT8_ABOVE = 2.0 * math.sqrt(2.0)
FLOAT16_ABOVE = 4.0  # times PyTorch's own float16 against its float32
FLOAT16_MOST = 0.05  # a limit on power
ADAPTER_RATIO = 4 / 3  # a limit on power, either way: of what an adapter changes to what it should


@dataclass(frozen=True)
class Tolerance:
    """``max_rel``: at most; ``likeness``: at least; None: no bound, or a run computes it."""

    name: str
    max_rel: float | None
    likeness: float | None
    reason: str

    @property
    def most(self) -> float:
        """``max_rel``, infinite where there is no bound."""
        return math.inf if self.max_rel is None else self.max_rel


_SUMS = f"{SURE:g} √n · 2⁻²⁴ for the n terms of its sums"
_ROWS = (
    Tolerance("exact", 0.0, None, "the same bytes, or the same integers: nothing is computed"),
    Tolerance(
        "float32",
        None,
        None,
        f"{_SUMS} through all layers, or {ABOVE:g} times PyTorch's float32 against its own float64 "
        "on these inputs where that is more. A wrong constant of 1 % gives 1e-2",
    ),
    Tolerance("float32, one block", None, None, f"{_SUMS} through one block, from the same inputs"),
    Tolerance(
        "float32, loss",
        None,
        None,
        f"{_SUMS}, as a part of the logits' range and not of the loss: a loss is a difference of "
        "logits, and near zero where they are large",
    ),
    Tolerance(
        "float32, gradient",
        None,
        None,
        f"{_SUMS} there and back through all layers, as a part of the largest gradient, or "
        f"{ABOVE:g} times PyTorch's own float32 against float64",
    ),
    Tolerance(
        "float32, gradient of one block",
        None,
        None,
        f"{_SUMS} there and back through one block, as a part of the largest gradient of the call: "
        "smaller ones are what is left of terms that cancel",
    ),
    Tolerance(
        "float32, optimizer",
        None,
        None,
        f"{_SUMS} of the gradient's norm, as a part of the largest step, and 4 half-steps of the "
        "largest parameter, which the step is added to",
    ),
    Tolerance(
        "int8 activations",
        None,
        None,
        "a last bit turns some roundings of activations the other way, and later layers see other "
        "inputs (docs/quantization.md). At worst all turn: then two engines differ by √2 of what "
        "int8 activations do to float32 ones with the same weights. Twice that, measured here",
    ),
    Tolerance("int8 activations, pooled", None, None, "the same of the mean over all tokens"),
    Tolerance(
        "float16",
        None,
        None,
        f"{FLOAT16_ABOVE:g} times what float16 in PyTorch does to the same module on these inputs, "
        f"at least 8 half-steps (2⁻¹¹), up to {FLOAT16_MOST:g}",
    ),
    Tolerance(
        "rounded weights",
        None,
        0.8,
        "a limit on power. Not an error but what quantization costs, which perplexity has judged "
        "at export; logits that are less alike come from other weights, not from rounded ones",
    ),
    Tolerance(
        "adapter",
        None,
        None,
        "the logits with an adapter less those without: r is √2 times the bound of the logits over "
        "the size of the effect, and alike is 1 / √(1 + r²). How large the effect is shows a wrong "
        f"scale: within a factor of {ADAPTER_RATIO:.2f} at any precision",
    ),
    Tolerance("adapter, rounded weights", None, 0.8, "a limit on power, as of rounded weights"),
    Tolerance(
        "training run",
        1e-2,
        None,
        "a limit on power. Losses and the adapter's way over several steps: "
        "AdamW divides by the root of a square, which amplifies the last digits of small gradients",
    ),
)
TABLE = {row.name: row for row in _ROWS}


def rounding(terms: float) -> float:
    """What float32 may do to a sum of so many terms, as a part of the sum of their magnitudes."""
    return SURE * math.sqrt(terms) * SINGLE


def block_terms(spec: ModelSpec, tokens: int) -> int:
    """Terms of the sums that a number passes on its way through a block: norm, projection, scores,
    mixing, o, norm, gate, down."""
    return 4 * spec.hidden + spec.head_dim + tokens + spec.q_dim + spec.intermediate


def model_terms(spec: ModelSpec, tokens: int) -> int:
    """Through all layers, the last norm and the head."""
    return len(spec.layers) * block_terms(spec, tokens) + 2 * spec.hidden


def _of(name: str, max_rel: float | None, likeness: float | None = None) -> Tolerance:
    shown = None if max_rel is None else float(f"{max_rel:.2e}")
    return replace(TABLE[name], max_rel=shown, likeness=likeness)


def of_block(spec: ModelSpec, tokens: int) -> Tolerance:
    return _of("float32, one block", rounding(block_terms(spec, tokens)))


def of_block_gradient(spec: ModelSpec, tokens: int) -> Tolerance:
    """Forward and backward; a weight's gradient is a sum over tokens too."""
    return _of("float32, gradient of one block", rounding(3 * block_terms(spec, tokens)))


def of_model(spec: ModelSpec, tokens: int) -> Tolerance:
    return _of("float32", rounding(model_terms(spec, tokens)))


def of_gradient(spec: ModelSpec, tokens: int) -> Tolerance:
    return _of("float32, gradient", rounding(3 * model_terms(spec, tokens)))


def of_loss(spec: ModelSpec, tokens: int) -> Tolerance:
    """Of the whole model: as a part of the logits' range."""
    return _of("float32, loss", rounding(model_terms(spec, tokens)))


def of_head_loss(spec: ModelSpec) -> Tolerance:
    """Of the head's own call: as a part of the magnitudes that make up the logits."""
    return _of("float32, loss", rounding(2 * spec.hidden))


def of_optimizer(numbers: int, largest: float, step: float) -> Tolerance:
    """``numbers`` in the norm, ``largest`` parameter, ``step``: how far the largest one moves."""
    return _of("float32, optimizer", rounding(numbers) + 4 * SINGLE * largest / max(step, 1e-30))


def of_int8(spread: Spread, pooled: bool = False) -> Tolerance:
    """``spread``: of int8 activations against float32 ones."""
    likeness = 1.0 - INT8_ABOVE**2 / 2.0 * spread.unlike
    if not pooled:
        return _of("int8 activations", None, likeness)
    return _of("int8 activations, pooled", INT8_ABOVE * spread.largest, likeness)


def of_float16(spread: Spread) -> Tolerance:
    """``spread``: of PyTorch's float16 against its float32."""
    off = FLOAT16_ABOVE * spread.largest
    return _of("float16", min(max(off, 8 * HALF), FLOAT16_MOST) if math.isfinite(off) else 8 * HALF)


def of_effect(row: Tolerance, noise: float | None, effect: float) -> Tolerance:
    """``noise``: what the logits may be off by, ``effect``: root mean square of what the adapter
    changes in them. None: the row's own bound."""
    if noise is None:
        return row
    r = math.sqrt(2.0) * noise / max(effect, 1e-30)
    return replace(row, likeness=1.0 / math.sqrt(1.0 + r * r))
