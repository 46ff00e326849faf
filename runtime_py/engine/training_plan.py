"""How a run goes: its settings, which examples each step has, and how fast it learns.

Chance is SplitMix64, and rates are made by + − × ÷ alone: another language has the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from runtime_py.loop.random_stream import SplitMix64

_LAST_POWER = 21  # of the sine's polynomial


@dataclass(frozen=True)
class Settings:
    """``steps``: the budget; None for ``epochs`` over the examples, at least ``fewest_steps``.
    ``batch``: sequences a step. ``learning_rate``: of A; B's is ``b_rate_ratio`` times it (LoRA+:
    Hayou, Ghosh and Yu, 2024). ``warmup``: steps over which the rate rises. ``schedule``: what it
    does after them, down to 0 at the end unless constant. ``check_every``: steps between two looks
    at the stopping examples; ``patience``: looks without a better state after which the run ends, 0
    for never. ``save_every``: steps."""

    steps: int | None = None
    epochs: int = 3
    fewest_steps: int = 1
    batch: int = 8
    learning_rate: float = 1e-3
    b_rate_ratio: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    seed: int = 0
    check_every: int = 4
    patience: int = 3
    save_every: int = 10


def steps_of(count: int, settings: Settings) -> int:
    """The budget for ``count`` examples."""
    if settings.steps is not None:
        return settings.steps
    size = min(settings.batch, count)
    return max(settings.fewest_steps, -(-settings.epochs * count // size))


def batches(count: int, settings: Settings) -> list[list[int]]:
    """The examples of each step, by their places among ``count``.

    Orders of all examples, each drawn from the seed, stand one after another; a step takes the
    next ``batch`` of that line, or ``count`` where there are fewer. So no step is smaller than
    another, what an order has left over begins the next step, and the last order is cut.
    """
    size, chance = min(settings.batch, count), SplitMix64(settings.seed)
    line: list[int] = []
    plan = []
    for _ in range(steps_of(count, settings)):
        if len(line) < size:
            line += _order(count, chance)
        plan.append(line[:size])
        line = line[size:]
    return plan


def _order(count: int, chance: SplitMix64) -> list[int]:
    order = list(range(count))
    for last in range(count - 1, 0, -1):  # Fisher and Yates
        other = chance.below(last + 1)
        order[last], order[other] = order[other], order[last]
    return order


def rates_at(settings: Settings, step: int, steps: int) -> tuple[float, float]:
    """The learning rates of A and of B in step ``step`` (from 1 on) of ``steps``."""
    rate = _rate(settings, step, steps)
    return rate, rate * settings.b_rate_ratio


def _rate(settings: Settings, step: int, steps: int) -> float:
    peak = settings.learning_rate
    if step <= settings.warmup:
        return peak * step / settings.warmup
    if settings.schedule == "constant":
        return peak
    left = (steps - step + 1) / max(1, steps - settings.warmup)
    return peak * (left if settings.schedule == "linear" else half_cosine(left))


def half_cosine(left: float) -> float:
    """(1 − cos(π · ``left``)) / 2 for ``left`` in [0, 1], within 2⁻⁵¹.

    It is sin² t with t = π ``left`` / 2, and the sine is its Taylor polynomial up to t²¹ by
    Horner's rule: what that leaves out is at most (π/2)²³ / 23! < 2·10⁻¹⁸ (Taylor's remainder), and
    the rest is rounding.
    """
    t = math.pi * left / 2
    square, series = t * t, 1.0
    for order in range(_LAST_POWER, 1, -2):
        series = 1.0 - square / (order * (order - 1)) * series
    return t * series * (t * series)


def power(base: float, exponent: int) -> float:
    """By repeated product."""
    product = 1.0
    for _ in range(exponent):
        product *= base
    return product
