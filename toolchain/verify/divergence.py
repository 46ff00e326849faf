"""What an adapter makes a model forget: perplexity, and how far its predictions went from the base.

The phone measures perplexity alone (``runtime_py.engine.retention``); here are the distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime_py.engine.examples import IGNORED, Example

Logits = Callable[[Tensor], Tensor]  # int64 [1, S] -> [1, S, vocab]


@dataclass(frozen=True)
class Forgetting:
    """Over ``labels`` predicted tokens. ``kl``: Σ p ln(p / q) with p the base's distribution and q
    the adapted model's, in nats a token (Kullback and Leibler, 1951)."""

    base_perplexity: float
    perplexity: float
    kl: float
    labels: int

    @property
    def ratio(self) -> float:
        """What the adapter adds to the perplexity, as a part of the base's."""
        return self.perplexity / self.base_perplexity - 1.0


@torch.no_grad()
def measure(adapted: Logits, base: Logits, examples: Sequence[Example]) -> Forgetting:
    """Of ``examples``, such as ``general_examples`` makes of a bundle's general text."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for example in examples:
        tokens = torch.from_numpy(example.tokens[: example.inputs])[None]
        labels = torch.from_numpy(example.labels[1 : example.inputs + 1])
        real = labels != IGNORED
        p, q = (logits(tokens)[0][real].double().log_softmax(-1) for logits in (base, adapted))
        at = labels[real][:, None]
        losses = [-rows.gather(1, at).sum() for rows in (p, q)]
        sums += torch.stack([*losses, (p.exp() * (p - q)).sum()])
        count += int(real.sum())
    before, after, kl = (sums / count).tolist()
    return Forgetting(math.exp(before), math.exp(after), kl, count)
