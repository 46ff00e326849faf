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
# Two engines that round to int8 each their own way differ by √2 of what int8 does to float32, and
# by 2 of its 1 − correlation, which is a square. Of either, twice that.
INT8_ABOVE, INT8_UNLIKE = 2.0 * math.sqrt(2.0), 2.0 * 2.0
FLOAT16_ABOVE = 4.0  # times PyTorch's own float16 against its float32; squared for 1 − correlation

# Limits on power: whatever a run measures, a bound is never wider.
LEAST_LIKE = 0.9  # of logits, with int8 activations: a wrong weight or mask gives less
LEAST_LIKE_POOLED = 0.99  # of a mean over all tokens, in which single roundings nearly cancel
FLOAT16_MOST = 0.05
FLOAT16_LIKE = (0.99, 0.999)  # correlation that float16 must have: at least, and at most
GRADIENT_MOST = 1e-2  # of a tensor's largest gradient: a wrong formula, scale or mask gives a tenth
GRADIENT_SMALL = 1e-2  # of the step's largest: what is smaller is left of terms that cancel
ADAPTER_RATIO = 4 / 3  # either way: of what an adapter changes to what it should


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
        f"{ABOVE:g} times PyTorch's own float32 against float64. At most {GRADIENT_MOST:g} of the "
        f"tensor's own largest, or of {GRADIENT_SMALL:g} of the step's: a limit on power",
    ),
    Tolerance(
        "float32, gradient of one block",
        None,
        None,
        f"{_SUMS} there and back through one block, as a part of the largest gradient of the call: "
        "smaller ones are what is left of terms that cancel. The same limit on power as of a step",
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
        "int8 activations do to float32 ones with the same weights, measured here, and by 2 of its "
        f"1 − correlation. Twice either, but never below {LEAST_LIKE:g}, which a wrong weight or "
        "mask is: a limit on power",
    ),
    Tolerance(
        "int8 activations, pooled",
        None,
        None,
        f"the same of the mean over all tokens, never below {LEAST_LIKE_POOLED:g}",
    ),
    Tolerance(
        "float16",
        None,
        None,
        f"{FLOAT16_ABOVE:g} times what float16 in PyTorch does to the same module on these inputs: "
        "twice, as a package may keep sums in float16 where PyTorch keeps them in float32, and "
        "twice, as the largest of many differences falls otherwise in another order. "
        f"At least 8 half-steps (2⁻¹¹), up to {FLOAT16_MOST:g}. 1 − correlation is a square: "
        f"{FLOAT16_ABOVE**2:g} times; a correlation of {FLOAT16_LIKE[1]:g} suffices, below "
        f"{FLOAT16_LIKE[0]:g} none does. The last and the {FLOAT16_MOST:g} are limits on power",
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
    likeness = 1.0 - INT8_UNLIKE * spread.unlike
    if not pooled:
        return _of("int8 activations", None, max(LEAST_LIKE, likeness))
    most = INT8_ABOVE * spread.largest
    return _of("int8 activations, pooled", most, max(LEAST_LIKE_POOLED, likeness))


def of_float16(spread: Spread) -> Tolerance:
    """``spread``: of PyTorch's float16 against its float32. Where that is not finite it excuses
    nothing: the format's own half-steps are left."""
    off, likeness = FLOAT16_ABOVE * spread.largest, 1.0 - FLOAT16_ABOVE**2 * spread.unlike
    least, enough = FLOAT16_LIKE
    if not (math.isfinite(off) and math.isfinite(likeness)):
        return _of("float16", 8 * HALF, enough)
    return _of("float16", min(max(off, 8 * HALF), FLOAT16_MOST), min(max(likeness, least), enough))


def gradient_limit(tensor: float, step: float) -> float:
    """A limit on power, as a part of ``step``, the largest gradient of a step or a call;
    ``tensor``: the largest of one tensor."""
    return GRADIENT_MOST * max(tensor / max(step, 1e-30), GRADIENT_SMALL)


def of_effect(row: Tolerance, noise: float | None, effect: float) -> Tolerance:
    """``noise``: what the logits may be off by, ``effect``: root mean square of what the adapter
    changes in them. None: the row's own bound, which it must have."""
    if noise is None:
        return row
    r = math.sqrt(2.0) * noise / max(effect, 1e-30)
    return replace(row, likeness=1.0 / math.sqrt(1.0 + r * r))
