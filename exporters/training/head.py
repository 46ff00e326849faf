"""The final norm, the head and the cross-entropy over a chunk of positions, forward and backward.

Full logits of a sequence never exist, and no one-hot of the vocabulary: the host hands over the
head's row of every target. With l_t = h · w_t, a softmax over the vocabulary *and l_t once more*
gives p' for that extra entry, from which p_t = p' / (1 − p') and every p_j = p'_j / (1 − p') follow
without a maximum or a sum over the vocabulary outside of the softmax:

    loss = −ln p_t = ln(1 − p') − ln p'
    ∂loss/∂h = Σ_j p_j w_j − w_t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import accumulate
from operator import add

import torch
from torch import Tensor

from exporters.model.spec import ModelSpec
from exporters.training import primitives as p
from exporters.training.storage import StoragePrecision

SLICE = 4096  # rows of the head in one product
_SMALLEST = 1e-37  # of p': a loss is at most 85


class TrainingHead:
    """``precision``: of the head's rows; ``rows``: those of each slice."""

    def __init__(self, spec: ModelSpec, precision: StoragePrecision) -> None:
        self.spec, self.precision = spec, precision
        whole, rest = divmod(spec.vocab, SLICE)
        self.rows = [SLICE] * whole + ([rest] if rest else [])

    def __call__(
        self,
        x: Tensor,
        norm: Tensor,
        slices: Sequence[Mapping[str, Tensor]],
        targets: Tensor,
        real: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, F, P]: the last block's output at P positions; norm [1, F, 1]; targets [1, P, F]:
        the head's row of each position's next token; real [1, P, 1]: 1, or 0 where a position is
        padding or has no label -> summed loss [1] in nats, count of labels [1], and the gradient
        of x [1, F, P], each loss counted once."""
        s = self.spec
        hidden = p.rms_norm(x, norm, s.norm_eps)
        rows = p.turn(hidden)  # [1, P, F]
        ones = torch.ones(1, s.hidden, 1)
        expected = self._logits(torch.bmm(rows * targets, ones))  # [1, P, 1]
        logits = [
            p.turn(self._logits(self.precision.forward(part, hidden))) for part in slices
        ]  # [1, P, rows]
        shares = torch.softmax(p.concatenate([*logits, expected], 2), dim=2)
        extra = shares[:, :, s.vocab :]  # [1, P, 1]
        rest = 1.0 - extra
        loss = torch.log(rest) - torch.log(torch.clamp(extra, min=_SMALLEST))
        ends = list(accumulate(self.rows))

        def pull(index: int) -> Tensor:
            """What a slice adds to the gradient of h [1, P, F]."""
            start = ends[index] - self.rows[index]
            share = self._through(shares[:, :, start : ends[index]], logits[index])
            return self.precision.backward(slices[index], p.turn(share))

        total = reduce(add, map(pull, range(len(ends))))
        grad = total * (real / rest) - targets * self._through(real, expected)
        if s.logit_scale != 1.0:
            grad = grad * s.logit_scale
        column = torch.ones(1, 1, x.shape[2])
        summed = torch.bmm(column, loss * real).view(1)
        count = torch.bmm(column, real).view(1)
        return summed, count, p.rms_norm_backward(x, norm, s.norm_eps, p.turn(grad))

    def _logits(self, y: Tensor) -> Tensor:
        if self.spec.logit_scale != 1.0:
            y = y * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return y if cap is None else p.softcap(y, cap)

    def _through(self, grad: Tensor, logits: Tensor) -> Tensor:
        """A gradient of logits back through their soft cap."""
        cap = self.spec.logit_softcap
        return grad if cap is None else grad * p.softcap_slope(logits, cap)
