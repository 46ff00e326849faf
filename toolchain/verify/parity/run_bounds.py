"""The bounds of one run's ``lm`` checks: from the sums' length, or from a spread measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporters.model.lora_tensors import set_adapter
from exporters.model.transformer import Transformer
from runtime_py.loop.protocols import Embedding
from toolchain.compile.spread import (
    Rows,
    between,
    float_activations,
    largest,
    of_float16,
    of_scores,
)
from toolchain.compile.tolerances import (
    FLOAT16_ABOVE,
    INT8_ABOVE,
    TABLE,
    model_terms,
    of_int8,
    of_model,
    rounding,
)
from toolchain.compile.tolerances import of_float16 as tolerance_of_float16
from toolchain.compile.wide import Wide
from toolchain.verify.parity.cases import Case
from toolchain.verify.parity.context import Context, outputs_of
from toolchain.verify.parity.lm_checks import Bounds, LmOutputs
from toolchain.verify.parity.models import Values, logits_of


def of_floats(
    context: Context, expected: LmOutputs, wide: Callable[[str, str], np.ndarray] | None = None
) -> Bounds:
    """Float32 on both sides. ``wide``: the expected logits in float64."""
    tokens = max(len(case.tokens) for case in context.cases)
    bound = of_model(context.source.captured.spec, tokens)
    largest_logit = max(float(np.abs(rows).max()) for rows in expected.logits.values())
    noise = bound.most * largest_logit
    return Bounds(bound, bound, TABLE["adapter"], noise, bound.most, wide)


def of_android(context: Context) -> Bounds:
    """PyTorch with the weights of ``lm.pte`` against any engine that runs it."""
    model = context.source.android
    if not model.is_float:
        expected = context.android
        plain = outputs_of(
            float_activations(model), context.cases, context.adapters, context.bundle.manifest
        )
        logits = largest([between(plain.logits[k], v) for k, v in expected.logits.items()])
        pooled = largest([between(plain.pooled[k], v) for k, v in expected.pooled.items()])
        return Bounds(
            of_int8(logits),
            of_int8(pooled, True),
            TABLE["adapter"],
            INT8_ABOVE * logits.rms,
            INT8_ABOVE * logits.largest,
        )
    known = {case.name: case for case in context.cases}

    def wide(adapter: str, case: str) -> np.ndarray:
        set_adapter(model, context.adapters[adapter])
        with Wide():
            return logits_of(model, known[case].tokens, known[case].prompt - 1)

    return of_floats(context, context.android, wide)


def of_ios(
    model: Transformer, cases: Sequence[Case], adapters: Mapping[str, Values], steps: int
) -> Bounds:
    """PyTorch's float32 with the package's weights against the package, whose numbers or cache are
    float16."""

    def rows_of(case: Case, values: Values) -> Rows:
        def rows(module: Transformer) -> np.ndarray:
            set_adapter(module, values)
            return logits_of(module, case.tokens[: case.prompt + steps], case.prompt - 1)

        return rows

    measured = of_float16(model, [rows_of(c, v) for v in adapters.values() for c in cases])
    bound = tolerance_of_float16(measured)
    noise = FLOAT16_ABOVE * measured.rms
    if not np.isfinite(noise):  # PyTorch's float16 overflows: the format's own half-steps are left
        noise = bound.most * max(
            largest_logit(model, case.tokens[: case.prompt + steps], values)
            for values in adapters.values()
            for case in cases
        )
    return Bounds(bound, bound, TABLE["adapter"], noise)


@torch.no_grad()
def largest_logit(model: Transformer, tokens: np.ndarray, values: Values) -> float:
    """Over ``tokens``: what their loss is a difference of."""
    set_adapter(model, values)
    return float(np.abs(logits_of(model, tokens, 0)).max())


@dataclass(frozen=True)
class ScoreBounds:
    """How far scores may be apart. ``ties``: whether a choice between closer ones may fall either
    way, as it may where activations are rounded."""

    eoe: float
    idd: float
    ties: bool

    @property
    def each(self) -> dict[str, float]:
        """By score. DSS counts words: it is exact."""
        return {"eoe": self.eoe, "dss": 0.0, "idd": self.idd}

    def tied(self, margins: Mapping[str, float]) -> bool:
        """Whether a score, each by its own bound, is so near another's that both being off may turn
        a choice. ``margins``: by score."""
        return self.ties and any(margins[name] <= 2.0 * most for name, most in self.each.items())


def of_loop(context: Context, embed: Callable[[Transformer], Sequence[Embedding]]) -> ScoreBounds:
    """From the length of the sums, and of int8 activations from what they do to the very dialogues
    of the stream: entropy is a share from 0 to 1, dissimilarity a difference of cosines. ``embed``:
    the stream, by a model."""
    model = context.source.android
    plain = 4.0 * rounding(model_terms(model.spec, context.bundle.manifest.policy.embed_length))
    if model.is_float:
        return ScoreBounds(plain, plain, ties=False)
    streams = [embed(one) for one in (float_activations(model), model)]
    vectors = [[one.pooled for one in rows] for rows in streams]
    entropy = max(abs(a.entropy - b.entropy) for a, b in zip(*streams, strict=True))
    return ScoreBounds(
        plain + INT8_ABOVE * entropy, plain + INT8_ABOVE * of_scores(*vectors), ties=True
    )
