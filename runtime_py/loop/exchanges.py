"""Which exchange of a set is asked about: the last that can teach something, or the most salient.

An exchange is a user's turn and the reply, numbered from 0. One whose user's turn only
acknowledges, and one that cannot be learnt, is never asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime_py.loop.acknowledgements import Acknowledgements
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import LoopError
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.words import words

NotAsked = Literal[
    "not_kept", "nothing_to_ask", "too_long_to_learn", "asked_by_day", "enough_today"
]
"""Why a set is not asked about when it enters: the first of these that holds."""

Learnable = Callable[[Dialogue, int], bool]
"""Whether a fine-tuning can learn an exchange of a set, the turns before it included."""


def always(dialogue: Dialogue, exchange: int) -> bool:
    return True


ExchangeRule = Callable[[Dialogue, Sequence[int], Lexicons], int]
"""Chooses one of a set's exchanges, of which there is at least one."""

EXCHANGE_RULES: dict[str, ExchangeRule] = {}


def exchange_rule(name: str) -> Callable[[ExchangeRule], ExchangeRule]:
    def register(function: ExchangeRule) -> ExchangeRule:
        EXCHANGE_RULES[name] = function
        return function

    return register


def find_exchange_rule(name: str) -> ExchangeRule:
    if name not in EXCHANGE_RULES:
        raise LoopError(
            f"there is no rule {name!r} for the exchange that is asked about (ask_exchange); "
            f"expected one of {', '.join(EXCHANGE_RULES)}."
        )
    return EXCHANGE_RULES[name]


@exchange_rule("last")
def last(dialogue: Dialogue, eligible: Sequence[int], lexicons: Lexicons) -> int:
    return eligible[-1]


@exchange_rule("salient")
def salient(dialogue: Dialogue, eligible: Sequence[int], lexicons: Lexicons) -> int:
    """High among the eligible in both: the lexicons' hits for its words, and how many different
    words it has. Both count by rank, as no scale joins them; the later one of equals."""
    measured = []
    for exchange in eligible:
        found = words("\n".join(turn.content for turn in dialogue.exchange(exchange)))
        measured.append((sum(lexicons.hits(found)), len(found), len(set(found))))

    def rank(mine: tuple[int, int, int]) -> int:
        hits, length, different = mine
        # 2 · less + equal, the exchange itself among the equal
        by_hits = [hits * n - h * length for h, n, _ in measured]
        by_words = [different - d for _, _, d in measured]
        return sum((gap > 0) + (gap >= 0) for gap in (*by_hits, *by_words))

    ranks = [rank(mine) for mine in measured]
    best = max(range(len(eligible)), key=lambda place: (ranks[place], place))
    return eligible[best]


@dataclass(frozen=True)
class Exchanges:
    """The rule of a policy with what it needs."""

    rule: ExchangeRule
    lexicons: Lexicons
    acknowledgements: Acknowledgements
    learnable: Learnable = always

    def to_ask_about(self, dialogue: Dialogue) -> int | None:
        """None: there is none that can be asked about."""
        eligible = [one for one in self._telling(dialogue) if self.learnable(dialogue, one)]
        return self.rule(dialogue, eligible, self.lexicons) if eligible else None

    def why_none(self, dialogue: Dialogue) -> NotAsked:
        """Of a dialogue that has no exchange to ask about."""
        return "too_long_to_learn" if self._telling(dialogue) else "nothing_to_ask"

    def _telling(self, dialogue: Dialogue) -> list[int]:
        """The exchanges whose user's turn does more than acknowledge."""
        return [
            exchange
            for exchange in range(dialogue.exchanges)
            if not self.acknowledgements.has_all_of(dialogue.exchange(exchange)[0].content)
        ]
