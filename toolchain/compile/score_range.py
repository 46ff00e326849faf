"""How large a model's attention scores are, which Core ML's float16 must hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exporters.errors import ExportError
from exporters.model.plain_attention import Attend, plain_attention, visible
from exporters.model.transformer import Transformer

MOST = 30_000.0  # float16 ends at 65,504, and tells numbers of this size apart by 16
_TEXTS = 8


@torch.no_grad()
def check_scores(model: Transformer, texts: Sequence[Tensor]) -> None:
    """Raises ``ExportError`` if on one of the first ``texts`` [1, S] a query scores a key that it
    sees beyond ±``MOST``. Scores that are capped are none of this."""
    if model.spec.attention_softcap is not None:
        return
    largest = [0.0] * len(model.spec.layers)

    def watched(index: int) -> Attend:
        layer = model.spec.layers[index]
        plain = plain_attention(model.spec, layer)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            steps = torch.arange(q.shape[1])
            groups = model.spec.heads // model.spec.kv_heads
            keys = k.repeat_interleave(groups, dim=2)
            scores = torch.einsum("bshd,bthd->bhst", q * model.spec.attention_scale, keys)
            seen = visible(steps, steps, layer.window)
            found = float(scores.abs().masked_fill(~seen, 0.0).max())
            largest[index] = max(largest[index], found)
            return plain(q, k, v)

        return attend

    attends = [watched(index) for index in range(len(largest))]
    for tokens in texts[:_TEXTS]:
        model.stream(tokens, torch.arange(tokens.shape[1]), attends)
    wrong = [f"{i} ({value:,.0f})" for i, value in enumerate(largest) if not value <= MOST]
    if wrong:
        raise ExportError(
            f"attention scores reach beyond {MOST:,.0f} on the text that ships with attune, in "
            f"layers {', '.join(wrong)}; Core ML's float16 cache does not tell them apart. Export "
            f"with --target android, whose attention is float32."
        )
