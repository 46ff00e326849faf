"""How far results may be apart that are not logits, from the length of float32's sums."""

from __future__ import annotations

import math

from torch import Tensor

from exporters.model.spec import ModelSpec
from toolchain.compile.tolerances import model_terms, rounding


def entropy_bound(norms: Tensor, off: float) -> float:
    """How far the entropy −Σ p ln p / ln n of ``norms`` [n] may be from what it is, where each norm
    may be ``off`` by this part of it: to first order Σ p |ln p + H| / ln n times that, of a second
    order n · off² at most, and what float32 does to the sum itself."""
    n = len(norms)
    if n == 1:
        return 0.0
    p = norms.double() / norms.double().sum()
    leaning = (p * (p.log() - (p * p.log()).sum()).abs()).sum().item()
    return (off * leaning + n * off * off) / math.log(n) + rounding(2 * n)


def loss_bound(spec: ModelSpec, logits: Tensor, loss: float) -> float:
    """Of a mean loss in nats over tokens with these ``logits`` [1, S, vocab]: it is a difference of
    them."""
    return rounding(model_terms(spec, logits.shape[1])) * (logits.abs().max().item() + loss)
