"""What the estimators of a dialogue's worth say: of its length, and of what learning it gives.

Every dialogue is learned alone, from the bundle's own adapter, in a few steps of the policy's
recipe; its gain is the fall of the loss of the same unseen dialogues, in nats a label. An estimator
that is to choose what is learned should rank dialogues as their gains do, and not as their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from runtime_py.bundle.adapter_forms import read_values
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.engine.examples import Example, example
from runtime_py.engine.streaming import StepNumbers, step_numbers
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from toolchain.defaults import SETTINGS
from toolchain.study.batched_loop import BatchedTraining
from toolchain.study.batched_model import BatchedModel
from toolchain.study.estimators import ESTIMATORS

STEPS = 4  # of learning one dialogue
FEWEST = 10  # dialogues: of fewer, no rank correlation says anything


@dataclass(frozen=True)
class EstimatorRow:
    """Spearman's rank correlations of ``name`` with the dialogues' tokens and with their gains."""

    name: str
    with_length: float
    with_gain: float


@dataclass(frozen=True)
class EstimatorEvidence:
    """``chance``: two independent rankings of so many ``dialogues`` stay below it, in absolute
    value, in 95 of 100 cases (1.96 / √(n − 1)). ``gain``: the mean of the dialogues', nats a label
    of ``tests``; ``helped``: the part of the dialogues whose gain is above 0."""

    rows: tuple[EstimatorRow, ...]
    dialogues: int
    tests: int
    steps: int
    gain: float
    helped: float

    @property
    def chance(self) -> float:
        return 1.96 / math.sqrt(self.dialogues - 1)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"chance": self.chance}


def bench_estimators(
    model: BatchedModel,
    dialogues: Sequence[Dialogue],
    tests: Sequence[Dialogue],
    steps: int = STEPS,
    told: Callable[[int], None] = lambda done: None,
) -> EstimatorEvidence:
    """Those of ``dialogues`` and ``tests`` that a training program has room for, whole.

    Beside the estimators stand a dialogue's ``length`` in tokens, its ``answer length`` in labels,
    the ``answer loss`` in nats a label, and ``gradient match``: what its first step gains by the
    unseen dialogues' gradient. ``told`` gets how many are learned. Raises ``LoopError`` for too
    few."""
    longest = max(model.bundle.training.lengths)
    pairs = [(one, each) for one in dialogues if (each := _taught(model, one, longest))]
    unseen = [each for one in tests if (each := _taught(model, one, longest))]
    if len(pairs) < FEWEST or not unseen:
        raise LoopError(
            f"{len(pairs)} of the dialogues and {len(unseen)} of the tests fit {longest} tokens; "
            f"expected at least {FEWEST} and 1."
        )
    chosen = [one for one, _ in pairs]
    values = {
        name: np.array([found.entropy for found in model.embed(chosen, name)])
        for name in ESTIMATORS
    }
    taught = [each for _, each in pairs]
    values["length"] = np.array([one.inputs + 1 for one in taught], float)
    values["answer length"] = np.array([one.count for one in taught], float)
    gains, values["gradient match"], values["answer loss"] = _learned(
        model, taught, unseen, steps, told
    )
    rows = [
        EstimatorRow(name, spearman(value, values["length"]), spearman(value, gains))
        for name, value in values.items()
    ]
    return EstimatorEvidence(
        rows=tuple(sorted(rows, key=lambda row: -abs(row.with_gain))),
        dialogues=len(taught),
        tests=len(unseen),
        steps=steps,
        gain=float(gains.mean()),
        helped=float((gains > 0).mean()),
    )


def _taught(model: BatchedModel, dialogue: Dialogue, longest: int) -> Example | None:
    one = example(dialogue, model.text, last_only=True)
    return one if one.inputs <= longest else None


def _learned(
    model: BatchedModel,
    taught: Sequence[Example],
    unseen: Sequence[Example],
    steps: int,
    told: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each dialogue: its gain, what its first step gains to first order, and its loss a label
    before; [n] each."""
    bundle = model.bundle
    tensors = bundle.manifest.adapter.tensors
    own = read_values(bundle.adapter_file, tensors)
    training = BatchedTraining(model, bundle.training.optimizer)
    begun = AdapterState.of(tensors, own)
    count = sum(one.count for one in unseen)
    towards = begun.layout.zeros()
    before, _ = training.gradient(begun, unseen, towards)
    gains, matches, losses = np.zeros((3, len(taught)))
    for place, one in enumerate(taught):
        state = AdapterState.of(tensors, own)
        for step in range(1, steps + 1):
            gradient = state.layout.zeros()
            loss, _ = training.gradient(state, [one], gradient)
            training.update(state, gradient, _numbers(model, step, one.count))
            if step == 1:
                losses[place] = loss / one.count
                moved = state.parameters - begun.parameters
                matches[place] = -float(np.vdot(moved, towards)) / count
        after, _ = training.loss(state, unseen)
        gains[place] = (before - after) / count
        told(place + 1)
    return gains, matches, losses


def _numbers(model: BatchedModel, step: int, labels: int) -> StepNumbers:
    policy = LoopPolicy.from_fields(dict(model.bundle.manifest.policy.loop))
    optimizer = model.bundle.training.optimizer
    rates = policy.learning_rate, policy.learning_rate * policy.b_rate_ratio
    betas = optimizer.beta1, optimizer.beta2
    return step_numbers(step, labels, rates, SETTINGS.weight_decay, SETTINGS.clip, betas)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of two measures [n], equal values at their mean rank; 0 where one of them
    is the same for all (C. Spearman, American Journal of Psychology 15(1), 1904)."""
    ranks = np.stack([_ranks(one), _ranks(other)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
