"""What an adapter makes the model forget, and the one scale that keeps it within a bound.

Forgetting is what the adapter adds to the perplexity of the bundle's general text, as a part of the
model's own without it. Where that is more than the bound, every B is multiplied by one λ: the
update of each module is s · B (A x), so λ scales it as a whole, and at 0 the model is the base.

What decides is + − × ÷ alone: another language finds the same λ for the same losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime_py.bundle.adapter_state import AdapterState, is_b
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.general_text import GeneralText
from runtime_py.engine.examples import IGNORED, Example
from runtime_py.engine.training_engine import TrainingEngine, mean_loss
from runtime_py.loop.errors import TrainingError

GRID = 16  # λ is a multiple of 1 / GRID
_SMALL = 0.0625  # below it the exponential's series is exact to the last bit
_TERMS = 10


@dataclass(frozen=True)
class Retention:
    """Perplexities of the general text, a token: ``base`` without the adapter, ``whole`` with it,
    ``scaled`` with every B times ``scale``."""

    base: float
    whole: float
    scale: float
    scaled: float

    @property
    def forgetting(self) -> float:
        """What the scaled adapter adds, as a part of ``base``."""
        return self.scaled / self.base - 1.0


def general_examples(
    texts: Sequence[GeneralText], text: ChatText, longest: int, tokens: int
) -> tuple[Example, ...]:
    """The first ``tokens`` tokens of the general text, each a label, in sequences of at most
    ``longest`` input tokens.

    A dialogue is one sequence, cut at its end; plain text is as many as it needs. What the template
    begins every dialogue with is read and not counted, and neither is a sequence's first token.
    """
    dialogues = {one.id: text.tokens(one.turns).ids for one in texts if one.turns}
    start = max(_shared(list(dialogues.values())), 1)
    examples: list[Example] = []
    left = tokens
    for one in texts:
        if one.turns:
            pieces = [(dialogues[one.id][: longest + 1], start)]
        else:
            ids = text.encode(one.plain)  # a piece begins with the last token of the one before
            pieces = [(ids[i : i + longest + 1], 1) for i in range(0, len(ids) - 1, longest)]
        for ids, first in pieces:
            ids = ids[: first + left]
            if len(ids) > first:
                labels = np.array(ids, np.int64)
                labels[:first] = IGNORED
                examples.append(Example(one.id, np.array(ids, np.int64), labels))
                left -= len(ids) - first
        if not left:
            break
    if not examples:
        raise TrainingError(
            f"the general text has nothing to measure in sequences of {longest} tokens: export the "
            f"bundle with longer --train-lengths."
        )
    return tuple(examples)


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all of them begin with; 0 for fewer than two."""
    if len(sequences) < 2:
        return 0
    first = sequences[0]
    same = 0
    while all(len(ids) > same and ids[same] == first[same] for ids in sequences):
        same += 1
    return same


def exponential(x: float) -> float:
    """eˣ by + − × ÷: the series of x / 2ᵏ, which is small, squared k times."""
    if math.isnan(x) or math.isinf(x):
        return 0.0 if x < 0 else x
    halvings = 0
    while abs(x) > _SMALL:
        x, halvings = x / 2, halvings + 1
    series = 1.0
    for order in range(_TERMS, 0, -1):
        series = 1.0 + x / order * series
    for _ in range(halvings):
        series *= series
    return series


def perplexity(
    engine: TrainingEngine,
    state: AdapterState,
    examples: Sequence[Example],
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Of ``examples``, a label. None where ``stop`` said so between two calls."""
    loss = mean_loss(engine, state, examples, stop)
    return None if loss is None else exponential(loss)


def retain(
    engine: TrainingEngine,
    state: AdapterState,
    examples: Sequence[Example],
    bound: float,
    stop: Callable[[], bool] = lambda: False,
) -> Retention | None:
    """Scales every B of ``state`` by the λ that bisection finds: 1 where the whole adapter's
    perplexity on ``examples`` is at most (1 + ``bound``) times the base's; else a multiple of
    1 / ``GRID`` that keeps the bound while the next one does not.

    The base has λ = 0. It is measured anew each time: that is one reading of the text, and what was
    kept of it would have to be told from every other base's. None where ``stop`` said so between
    two calls: the state is then as it was.
    """
    whole = state.parameters.copy()

    def at(steps: int) -> float | None:
        _scale(state, whole, steps / GRID)
        return mean_loss(engine, state, examples, stop)

    found = _bisect(at, bound)
    if found is None:
        state.parameters[...] = whole
        return None
    losses, steps = found
    _scale(state, whole, steps / GRID)
    base, most, scaled = (exponential(losses[n]) for n in (0, GRID, steps))
    return Retention(base, most, steps / GRID, scaled)


def _bisect(at: Callable[[int], float | None], bound: float) -> tuple[dict[int, float], int] | None:
    """The losses that were measured, by λ · ``GRID``, and the λ · ``GRID`` that was found."""
    losses: dict[int, float] = {}

    def holds(steps: int) -> bool | None:
        loss = at(steps)
        if loss is None:
            return None
        losses[steps] = loss
        return exponential(loss - losses[0]) <= 1.0 + bound  # not where a loss is no number

    if holds(0) is None:
        return None
    if not math.isfinite(losses[0]):
        raise TrainingError(
            f"the model's own loss on the bundle's general text is {losses[0]}: export it anew."
        )
    whole = holds(GRID)
    if whole is None or whole:
        return None if whole is None else (losses, GRID)
    low, high = 0, GRID
    while high - low > 1:
        middle = (low + high) // 2
        kept = holds(middle)
        if kept is None:
            return None
        low, high = (middle, high) if kept else (low, middle)
    return losses, low


def _scale(state: AdapterState, whole: np.ndarray, factor: float) -> None:
    """``state`` with the numbers of ``whole`` [rows, 1024], and every B times ``factor``."""
    state.parameters[...] = whole
    for name, view in state.layout.views(state.parameters).items():
        if is_b(name):
            view *= np.float32(factor)
