"""Which stored sets the user is asked about next: the exchangeable rules.

A rule chooses one of the eligible bins, knowing what was asked before; it is called again for the
next question. The rule ``entry`` chooses none: with it a set is asked about when it enters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime_py.loop.buffer import Buffer
from runtime_py.loop.errors import LoopError
from runtime_py.loop.neighbours import coarse
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.tally import mean_cosines

ENTRY = "entry"


class Situation:
    """What a rule may look at. The buffer is not changed by it: what is chosen for one day is
    noted here, until the store has it.

    ``asked``: questions so far, ``answered``: how many were answered, of all time; ``was_asked``
    bool [bins]; ``asked_sum`` int64 [hidden] of ``asked_count`` directions.
    """

    def __init__(
        self, buffer: Buffer, stream: SplitMix64, loop: LoopPolicy, asked: int, answered: int
    ) -> None:
        self.buffer, self.stream, self.loop = buffer, stream, loop
        self.asked, self.answered = asked, answered
        self.was_asked = buffer.was_asked.copy()
        self.asked_sum, self.asked_count = buffer.asked.total, buffer.asked.count

    def note(self, bin: int) -> None:
        """This one will be asked about."""
        self.asked += 1
        self.was_asked[bin] = True
        self.asked_sum = self.asked_sum + coarse(self.buffer.directions[bin]).astype(np.int64)
        self.asked_count += 1


AskingRule = Callable[[Situation, np.ndarray], int | None]
"""``eligible`` int64 [n], ascending, not empty; gives one of them, or None for no more today."""

ASKING: dict[str, AskingRule] = {}


def asking_rule(name: str) -> Callable[[AskingRule], AskingRule]:
    def register(function: AskingRule) -> AskingRule:
        ASKING[name] = function
        return function

    return register


def find_asking_rule(name: str) -> AskingRule:
    if name not in ASKING:
        raise LoopError(
            f"there is no rule {name!r} for what is asked about (asking); expected one of "
            f"{', '.join(ASKING)}."
        )
    return ASKING[name]


@asking_rule(ENTRY)
def entry(now: Situation, eligible: np.ndarray) -> int | None:
    return None


@asking_rule("random")
def random(now: Situation, eligible: np.ndarray) -> int | None:
    return int(eligible[now.stream.below(len(eligible))])


@asking_rule("longest")
def longest(now: Situation, eligible: np.ndarray) -> int | None:
    """The answer with most words."""
    return _highest(now.buffer, eligible, now.buffer.answer_words[eligible])


@asking_rule("typical")
def typical(now: Situation, eligible: np.ndarray) -> int | None:
    """Like what was observed, and unlike what was asked about."""
    observed = now.buffer.observed
    directions = coarse(now.buffer.directions[eligible]).astype(np.int64)  # [n, hidden]
    to_observed = mean_cosines(directions @ observed.total, observed.count)
    to_asked = mean_cosines(directions @ now.asked_sum, now.asked_count)
    return _highest(now.buffer, eligible, to_observed - to_asked)


@asking_rule("uncertain")
def uncertain(now: Situation, eligible: np.ndarray) -> int | None:
    """The highest EOE below the tail: what is most uncertain is often noise."""
    buffer = now.buffer
    stored = np.flatnonzero(buffer.domains >= 0)
    order = stored[np.lexsort((buffer.numbers[stored], -buffer.scores[stored, 0]))]
    tail = int(now.loop.asking_tail * len(stored))
    rest = np.setdiff1d(eligible, order[:tail])
    return _highest(buffer, rest, buffer.scores[rest, 0]) if len(rest) else None


@asking_rule("dual")
def dual(now: Situation, eligible: np.ndarray) -> int | None:
    """While little is answered, what is typical teaches most; then what is uncertain."""
    every = now.loop.asking_random_every
    if every and (now.asked + 1) % every == 0:
        return random(now, eligible)
    rule = typical if now.answered < now.loop.asking_typical_first else uncertain
    return rule(now, eligible)


@asking_rule("balanced")
def balanced(now: Situation, eligible: np.ndarray) -> int | None:
    """By chance one of the domain of whose stored sets the smallest share was asked about."""
    buffer = now.buffer
    domains = buffer.domains[eligible]
    asked = np.bincount(buffer.domains[now.was_asked], minlength=len(buffer.counts))
    best = int(domains.min())
    for domain in map(int, np.unique(domains)):  # the first of equals stays
        if asked[domain] * buffer.counts[best] < asked[best] * buffer.counts[domain]:
            best = domain
    return random(now, eligible[domains == best])


def _highest(buffer: Buffer, bins: np.ndarray, values: np.ndarray) -> int:
    """The bin of the highest value, the set that was observed first of equals."""
    equals = bins[values == values.max()]
    return int(equals[np.argmin(buffer.numbers[equals])])
