"""The fields of the policy that are searched, by group, and between what bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime_py.loop.asking import ASKING
from runtime_py.loop.errors import LoopError
from runtime_py.loop.exchanges import EXCHANGE_RULES
from runtime_py.loop.policy import USES
from runtime_py.loop.replacement import POLICIES

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = bool | int | float | str
_DIGITS = 3  # of a number that is drawn: more say nothing


@dataclass(frozen=True)
class Number:
    """From ``low`` to ``high``; ``log``: their logarithms are alike."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Whole:
    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    values: tuple[Value, ...]


Range = Number | Whole | Choice

SPACE: dict[str, dict[str, Range]] = {
    "learning": {
        "learning_rate": Number(2e-4, 4e-3, log=True),
        "b_rate_ratio": Choice((1.0, 2.0, 4.0, 8.0, 16.0)),
        "batch": Choice((4, 8, 16)),
        "epochs": Whole(1, 8),
        "fewest_steps": Whole(4, 24),
        "most_steps": Whole(24, 96),
        "check_every_steps": Choice((2, 4, 8)),
        "heldout_every": Whole(3, 8),
        "guard_false_acceptance": Number(0.05, 0.5),
    },
    "selection": {
        "selection": Choice(tuple(POLICIES)),
        "crowding": Number(0.0, 1.0),
        "age_fills": Number(5.0, 200.0, log=True),
    },
    "asking": {
        "asking": Choice(tuple(ASKING)),
        "ask_exchange": Choice(tuple(EXCHANGE_RULES)),
        "question_days": Whole(1, 7),
    },
    "synthesis": {
        "paraphrases": Whole(0, 4),
        "paraphrase_use": Choice(USES),
        "paraphrase_temperature": Number(0.2, 1.0),
        "rouge1_lowest": Number(0.0, 0.4),
        "rouge1_highest": Number(0.6, 0.95),
    },
    "forgetting": {
        "replay_share": Number(0.0, 0.25),
    },
}


def check_groups(groups: Sequence[str]) -> tuple[str, ...]:
    """All where none is named. Raises ``LoopError`` for one that is unknown."""
    if unknown := sorted(set(groups) - set(SPACE)):
        raise LoopError(
            f"there is no group of fields named {', '.join(unknown)}; known are {', '.join(SPACE)}."
        )
    return tuple(group for group in SPACE if group in groups or not groups)


def suggest(trial: Trial, groups: Sequence[str]) -> dict[str, Value]:
    """A value for each field of the groups."""
    return {
        name: _value(trial, name, span) for group in groups for name, span in SPACE[group].items()
    }


def _value(trial: Trial, name: str, span: Range) -> Value:
    if isinstance(span, Whole):
        return trial.suggest_int(name, span.low, span.high)
    if isinstance(span, Choice):
        return span.values[trial.suggest_categorical(name, range(len(span.values)))]
    return rounded(trial.suggest_float(name, span.low, span.high, log=span.log))


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
