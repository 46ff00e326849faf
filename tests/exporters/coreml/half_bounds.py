"""How far a Core ML package may be from the plain forward: by what PyTorch's own float16, or its
float32 with a float16 cache, does to the same model and tokens in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporters.coreml.functions import Pool
from exporters.coreml.half import for_half
from exporters.model.plain_attention import Attend, plain_attention
from exporters.model.spec import LayerSpec, ModelSpec
from exporters.model.transformer import Transformer
from toolchain.compile import spread
from toolchain.compile.tolerances import FLOAT16_ABOVE, model_terms, of_float16, rounding


def _half_cache(spec: ModelSpec, layer: LayerSpec) -> Attend:
    attend = plain_attention(spec, layer)
    return lambda q, k, v: attend(q, k.half().float(), v.half().float())


@dataclass(frozen=True)
class HalfBounds:
    """``logits`` and ``pooled``: largest difference as a part of the largest value, over the whole
    sequence; ``norm``: of a token's hidden state, as a part of it."""

    logits: float
    pooled: float
    norm: float


@torch.no_grad()
def measured(model: Transformer, tokens: Tensor, count: int, half: bool) -> HalfBounds:
    """For logits after each of ``tokens`` int32 [1, S], and the embedding of the first ``count``.
    ``half``: the package computes in float16, and not only its cache is."""
    steps = torch.arange(tokens.shape[1])
    layers = model.spec.layers

    def hidden(module: Transformer) -> Tensor:
        attends = [plain_attention(module.spec, layer) for layer in layers]
        return module.hidden(tokens, steps, attends, adapted=False)[:, :count].float()

    def pooled(module: Transformer) -> np.ndarray:
        return Pool()(hidden(module), torch.tensor([count], dtype=torch.int32))[0].numpy()

    if not half:
        attends = [_half_cache(model.spec, layer) for layer in layers]
        rounded = model.logits(model.hidden(tokens, steps, attends))
        cache = spread.between(rounded[0].numpy(), model(tokens)[0].numpy()).largest
        plain = rounding(model_terms(model.spec, tokens.shape[1]))
        return HalfBounds(plain + FLOAT16_ABOVE * cache, plain, plain)
    logits, vector = (
        of_float16(spread.of_float16(model, [rows])).max_rel
        for rows in (lambda module: module(tokens)[0].numpy(), pooled)
    )
    assert logits is not None
    assert vector is not None
    wanted, found = (hidden(m)[0].norm(dim=-1) for m in (for_half(model), for_half(model).half()))
    norm = FLOAT16_ABOVE * ((found - wanted).abs() / wanted).max().item()
    return HalfBounds(logits, vector, norm)
