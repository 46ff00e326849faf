"""What an adapter makes the model forget, on the bundle's general text, in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from runtime_py.engine.examples import Example
from toolchain.study.batched import hidden_states
from toolchain.study.batched_model import BatchedModel
from toolchain.verify.divergence import Forgetting

_ROWS = 512  # distributions at once


class ForgettingMeter:
    """``examples``, and the base's token vectors of them, which are computed once."""

    def __init__(self, model: BatchedModel, examples: Sequence[Example]) -> None:
        self._model, self._examples = model, examples
        self._base: list[Tensor] | None = None

    @torch.no_grad()
    def _vectors(self, adapted: bool) -> list[Tensor]:
        """At the labels of each call: [n, hidden]."""
        model = self._model
        found = []
        for call in model.batches([e.inputs for e in self._examples]):
            batch, labels = model.labelled([self._examples[index] for index in call])
            found.append(hidden_states(model.model, batch, adapted)[labels >= 0])
        return found

    def _labels(self) -> list[Tensor]:
        calls = self._model.batches([e.inputs for e in self._examples])
        rows = [self._model.labelled([self._examples[i] for i in call])[1] for call in calls]
        return [labels[labels >= 0] for labels in rows]

    @torch.no_grad()
    def forgetting(self) -> Forgetting:
        """With the adapter that is in use. Distributions are float32, sums float64."""
        if self._base is None:
            self._base = self._vectors(adapted=False)
        sums, count = np.zeros(3), 0
        for base, adapted, labels in zip(
            self._base, self._vectors(adapted=True), self._labels(), strict=True
        ):
            for start in range(0, len(labels), _ROWS):
                part = slice(start, start + _ROWS)
                p, q = (
                    torch.log_softmax(self._model.model.logits(vectors[part]), dim=-1)
                    for vectors in (base, adapted)
                )
                at = labels[part][:, None]
                terms = (-p.gather(1, at), -q.gather(1, at), p.exp() * (p - q))
                sums += [float(term.double().sum()) for term in terms]
            count += len(labels)
        before, after, kl = sums / count
        return Forgetting(math.exp(before), math.exp(after), float(kl), count)
