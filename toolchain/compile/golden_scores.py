"""How far a precision's own rounding moves the scores of golden dialogues, and what it can tell.

A bound is at least twice the largest that two computations differ by which round the same model
each their own way, on the very dialogues that carry it: so none that is written lies beyond half of
its bound in any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporters.coreml.half import for_half
from exporters.model.transformer import Transformer
from runtime_py.loop.metrics import GRID
from toolchain.compile.noise import perturbed
from toolchain.compile.spread import float_activations, of_scores
from toolchain.compile.tolerances import (
    FLOAT16_ABOVE,
    HALF,
    INT8_ABOVE,
    model_terms,
    rounding,
)

Tokens = Sequence[int]
Measured = tuple[np.ndarray, float]  # pooled [hidden], entropy
Embed = Callable[[Tokens], Measured]
Read = Callable[[Transformer, Tokens], Measured]

TRIALS = 2  # perturbed models: each rounds as another engine does
TWICE = 2.0
_STEPS = TWICE / GRID  # scores are on a grid: what hardly differs may fall on either side


@dataclass(frozen=True, eq=False)
class Computation:
    """Another computation of what ``reference`` computes, in the same precision. ``times``: what
    its difference is multiplied by to be twice what two engines differ by."""

    times: float
    embed: Embed
    reference: Embed


@dataclass(frozen=True)
class GoldenScoreBounds:
    """The least that an entropy and a dissimilarity may be off; DSS counts words and is exact."""

    eoe: float
    idd: float

    @property
    def each(self) -> list[float]:
        """Of EOE, DSS and IDD."""
        return [self.eoe, 0.0, self.idd]

    def tell(self, gaps: np.ndarray) -> bool:
        """Whether a set surely beats each stored one on all scores, or surely does not. ``gaps``:
        the new set's scores less the stored ones', [bins, 3]."""
        bounds = np.array(self.each)
        return bool(((gaps > bounds).all(axis=1) | (gaps <= -bounds).any(axis=1)).all())


@dataclass(frozen=True, eq=False)
class ScoreSpread:
    """``floor``: what the number format alone may do; ``rows``: for each computation what it and
    its reference give for the dialogues that were added."""

    floor: GoldenScoreBounds
    computations: tuple[Computation, ...]
    rows: tuple[tuple[tuple[Measured, Measured], ...], ...]

    @staticmethod
    def of(floor: GoldenScoreBounds, computations: Sequence[Computation]) -> ScoreSpread:
        return ScoreSpread(floor, tuple(computations), tuple(() for _ in computations))

    def adding(self, tokens: Tokens) -> ScoreSpread:
        """With another dialogue."""
        measured = [(one.embed(tokens), one.reference(tokens)) for one in self.computations]
        rows = zip(self.rows, measured, strict=True)
        return replace(self, rows=tuple((*row, new) for row, new in rows))

    @property
    def bounds(self) -> GoldenScoreBounds:
        entropy = [
            one.times * max((abs(a[1] - b[1]) for a, b in row), default=0.0)
            for one, row in zip(self.computations, self.rows, strict=True)
        ]
        cosines = [
            one.times * of_scores([a[0] for a, _ in row], [b[0] for _, b in row])
            for one, row in zip(self.computations, self.rows, strict=True)
        ]
        return GoldenScoreBounds(
            self.floor.eoe + _STEPS + max(map(_finite, entropy), default=0.0),
            self.floor.idd + _STEPS + max(map(_finite, cosines), default=0.0),
        )


def _finite(off: float) -> float:
    """What PyTorch cannot compute in float16 excuses nothing: 8 half-steps are left."""
    return off if math.isfinite(off) else 8 * HALF


def score_spread(
    target: str, model: Transformer, own: Embed, read: Read, longest: int
) -> ScoreSpread:
    """Of no dialogue yet. ``model``: with the weights of the target's programs, ``own`` what it
    gives by ``read``; ``longest``: of the dialogues, in tokens. Of the entropy what all norms of a
    dialogue have in common cancels: left are the sums over channels and tokens."""
    entropy = rounding(model.spec.hidden + longest)
    single = GoldenScoreBounds(entropy, 4 * rounding(model_terms(model.spec, longest)))
    if target == "ios":
        half, plain = for_half(model).half(), for_half(model)
        computation = Computation(FLOAT16_ABOVE, remembered(half, read), remembered(plain, read))
        return ScoreSpread.of(replace(single, idd=8 * HALF), [computation])
    if model.is_float:
        return ScoreSpread.of(single, [])
    return ScoreSpread.of(single, int8_computations(model, own, read))


def int8_computations(model: Transformer, own: Embed, read: Read) -> list[Computation]:
    """What int8 activations do to float32 ones, of which two engines differ by √2; and two engines
    themselves: the model, and the model with another last bit in its embeddings."""

    def shaken(seed: int) -> Embed:
        def embed(tokens: Tokens) -> Measured:
            with perturbed(model, seed):
                return read(model, tokens)

        return embed

    others = [Computation(TWICE, shaken(seed), own) for seed in range(TRIALS)]
    return [Computation(INT8_ABOVE, remembered(float_activations(model), read), own), *others]


def remembered(model: Transformer, read: Read) -> Embed:
    """Computed once for each dialogue."""
    known: dict[tuple[int, ...], Measured] = {}

    def embed(tokens: Tokens) -> Measured:
        key = tuple(tokens)
        if key not in known:
            pooled, entropy = read(model, tokens)
            known[key] = pooled.astype(np.float32), entropy
        return known[key]

    return embed
