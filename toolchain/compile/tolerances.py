"""How far two computations of the same thing may be apart: one table, with the reason for each.

A tolerance belongs to a precision, that is to how numbers are rounded, and never to a backend. The
bounds are on the tensor as a whole: ``max_rel`` is the largest difference as a part of the largest
value expected, ``likeness`` the correlation of the two (of each row of logits: the smallest).
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.compile.proofs import FLOAT_TOLERANCE, QUANTIZED_CORRELATION
from toolchain.compile.training_part import GRADIENT_TOLERANCE, LOSS_TOLERANCE


@dataclass(frozen=True)
class Tolerance:
    """``max_rel``: at most; ``likeness``: at least; None is no bound."""

    name: str
    max_rel: float | None
    likeness: float | None
    reason: str


FLOAT16_ABOVE, FLOAT16_MOST = 3.0, 0.05  # times PyTorch's own float16; never more than
ADAPTER_RATIO = 4 / 3  # of what an adapter changes to what it should, or the inverse
_ROWS = (
    Tolerance("exact", 0.0, None, "the same bytes, or the same integers: nothing is computed"),
    Tolerance(
        "float32",
        FLOAT_TOLERANCE,
        None,
        "sums of float32 in another order, through all layers: 1.2e-5 was measured on 30 layers, "
        "and a wrong constant of 1 % gives 1e-2",
    ),
    Tolerance(
        "float32, one block",
        5e-5,
        None,
        "the same through one block only, from the same inputs: some 1e-6 are usual",
    ),
    Tolerance(
        "float32, loss",
        LOSS_TOLERANCE,
        None,
        "a sum of many float32 losses: 1e-6 is usual",
    ),
    Tolerance(
        "float32, gradient",
        GRADIENT_TOLERANCE,
        None,
        "PyTorch's own float32 gradients are off those of float64 by 5e-4 through 30 layers, with "
        "adapters far larger than training makes them; a wrong formula is off by a tenth",
    ),
    Tolerance(
        "float32, gradient of one block",
        1e-3,
        None,
        "differences of nearly equal products (softmax, norm) lose digits: 1e-5 is usual",
    ),
    Tolerance(
        "float32, same program",
        1e-4,
        None,
        "the same file on other vector widths: up to 1.5e-5 of logits was measured, and 2.9e-5 of "
        "the gradient of a head with 49,152 rows",
    ),
    Tolerance(
        "int8 activations",
        None,
        QUANTIZED_CORRELATION,
        "a float32 difference of 1e-7 turns some roundings of activations the other way, and later "
        "layers see other inputs (docs/quantization.md): PyTorch differs from itself as much; a "
        "wrong weight or mask gives below 0.9",
    ),
    Tolerance(
        "int8 activations, pooled",
        0.1,
        0.99,
        "the same for a mean over all tokens, in which single flips nearly cancel",
    ),
    Tolerance(
        "int8 activations, same program",
        0.15,
        0.97,
        "the same file rounds an activation the other way where sums have another order: 0.1 with "
        "a correlation of 0.987 was measured on 30 layers at 4 bits",
    ),
    Tolerance(
        "float16",
        1e-2,
        0.999,
        "each operation rounds to 11 bits: 1e-3 to 6e-3 of the logits' range was measured. Where "
        "PyTorch's float16 does more than a third of that to the same module (1e-2 on 30 layers "
        f"and repeated tokens), {FLOAT16_ABOVE:g} times as much is allowed, up to "
        f"{FLOAT16_MOST:g}",
    ),
    Tolerance(
        "rounded weights",
        None,
        0.8,
        "not an error but what quantization costs, which perplexity has judged at export; logits "
        "that are less alike come from other weights, not from rounded ones",
    ),
    Tolerance(
        "adapter, float32",
        None,
        0.999,
        "the logits with an adapter less those without: alike to the last digits",
    ),
    Tolerance(
        "adapter, float16",
        None,
        0.85,
        "the same, where all of the rounding of two runs is left in a small difference: 0.92 was "
        "measured on 30 layers with one token repeated, 0.99 on four",
    ),
    Tolerance(
        "adapter, 8-bit weights",
        None,
        0.8,
        "the same, with int8 activations or rounded weights: 0.84 to 0.99 was measured",
    ),
    Tolerance(
        "adapter, 4-bit weights",
        None,
        0.6,
        "the same at 4 bits: PyTorch with a last bit changed is like itself by 0.83 on 30 layers, "
        "and two such runs by 0.72. How large the effect is shows a wrong scale: within a factor "
        f"of {ADAPTER_RATIO:.2f} at any precision, where 1.0 to 1.2 was measured",
    ),
    Tolerance(
        "training run",
        1e-2,
        None,
        "the adapter's way over several steps, as a part of how far it moved: AdamW divides by the "
        "root of a square, which amplifies the last digits of small gradients",
    ),
)
TABLE = {row.name: row for row in _ROWS}


def of_logits(quantize: str) -> Tolerance:
    """For PyTorch against a target's program with the same weights."""
    names = {
        "none": "float32",
        "fp16": "float16",
        "int4": "float16",
        "int8": "float16",
        "8da8w": "int8 activations",
        "8da4w": "int8 activations",
    }
    return TABLE[names[quantize]]


def of_pooled(quantize: str) -> Tolerance:
    own = of_logits(quantize)
    return TABLE["int8 activations, pooled"] if own.name == "int8 activations" else own


def of_adapter(quantize: str) -> Tolerance:
    """For what an adapter changes, with the same weights on both sides."""
    names = {
        "none": "float32",
        "fp16": "float16",
        "int8": "float16",
        "int4": "float16",
        "8da8w": "8-bit weights",
        "8da4w": "4-bit weights",
    }
    return TABLE[f"adapter, {names[quantize]}"]


def same_program(quantize: str) -> Tolerance:
    kind = "float32" if quantize == "none" else "int8 activations"
    return TABLE[f"{kind}, same program"]
