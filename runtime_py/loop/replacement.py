"""Which set leaves a full buffer for a new one, or that none does: the exchangeable policies.

A policy is a function of the buffer, the new set and a random stream, and changes neither of the
first two. It is asked only when no bin is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime_py.loop.buffer import Buffer, Candidate
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.random_stream import SplitMix64


@dataclass(frozen=True)
class Placement:
    """``bin``: where the new set goes, None where it is not kept. ``reason``: a code for the log.
    ``candidates``: how many sets it could have replaced."""

    bin: int | None
    reason: str
    candidates: int


ASKED_ABOUT = "asked_about"  # not kept: what would have to leave is asked about, or answered

Policy = Callable[[Buffer, Candidate, SplitMix64, LoopPolicy], Placement]
POLICIES: dict[str, Policy] = {}


def policy(name: str) -> Callable[[Policy], Policy]:
    def register(function: Policy) -> Policy:
        POLICIES[name] = function
        return function

    return register


def find_policy(name: str) -> Policy:
    if name not in POLICIES:
        raise LoopError(
            f"there is no selection policy {name!r}; expected one of {', '.join(POLICIES)}."
        )
    return POLICIES[name]


def choose(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """A free bin is filled, the lowest first; else the policy decides, if any set may leave."""
    free = buffer.first_free()
    if free is not None:
        return Placement(free, "free_bin", 0)
    if not may_leave(buffer, loop).any():
        return Placement(None, ASKED_ABOUT, 0)
    return find_policy(loop.selection)(buffer, new, stream, loop)


def may_leave(buffer: Buffer, loop: LoopPolicy) -> np.ndarray:
    """bool [bins]: false for sets with an open question, and for answered ones that no fine-tuning
    has used yet, if the policy keeps those."""
    if not loop.keep_asked:
        return np.ones(buffer.bins, bool)
    return ~(buffer.questions | buffer.waiting)


def _drawn(buffer: Buffer, bin: int, reason: str, candidates: int, loop: LoopPolicy) -> Placement:
    """A reservoir's draw counts also where the set that it hit may not leave."""
    if not may_leave(buffer, loop)[bin]:
        return Placement(None, ASKED_ABOUT, candidates)
    return Placement(bin, reason, candidates)


@policy("paper")
def paper(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """Qin et al.: one of the sets that the new one beats on all its scores, by chance."""
    scores = np.array([new.scores.eoe, new.scores.dss, new.scores.idd])
    won = (scores > buffer.scores)[:, loop.score_columns].all(axis=1)
    beaten = np.flatnonzero(won & may_leave(buffer, loop))  # in the bins' order
    if len(beaten) == 0:
        return Placement(None, ASKED_ABOUT if won.any() else "beats_none_on_all_scores", 0)
    return Placement(int(beaten[stream.below(len(beaten))]), "beats_on_all_scores", len(beaten))


@policy("random")
def random(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """Reservoir sampling (Vitter's algorithm R, 1985): every observed set is as likely kept."""
    drawn = stream.below(new.number)
    if drawn >= buffer.bins:
        return Placement(None, "not_drawn", 0)
    return _drawn(buffer, drawn, "drawn", buffer.bins, loop)


@policy("fifo")
def fifo(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """The set that entered first leaves."""
    open_bins = np.flatnonzero(may_leave(buffer, loop))
    oldest = open_bins[np.argmin(buffer.numbers[open_bins])]
    return Placement(int(oldest), "oldest", len(open_bins))


@policy("kcenter")
def kcenter(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """Keeps the stored sets far apart: if the new one is farther from all of them than the two
    closest are from each other, the older of these two leaves, or the one that may."""
    near = buffer.neighbours
    one = int(np.argmax(near.closeness))  # the first of the closest pair
    if near.closest_to(new.direction) >= near.closeness[one]:
        return Placement(None, "not_farther_than_closest_pair", 0)
    other = int(near.nearest[one])
    free = may_leave(buffer, loop)
    leaving = sorted((bin for bin in (one, other) if free[bin]), key=lambda b: buffer.numbers[b])
    if not leaving:
        return Placement(None, ASKED_ABOUT, 2)
    return Placement(leaving[0], "farther_than_closest_pair", 2)


@policy("balanced")
def balanced(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """A reservoir for each domain, of nearly equal sizes (after Chrysakis and Moens, 2020): a set
    of the fullest domain leaves, by chance; where the new one's has hardly fewer, one of its own,
    as often as Vitter's reservoir has it."""
    most = int(buffer.counts.max())
    mine = int(buffer.counts[new.domain])
    if mine < most - 1:
        fullest = np.flatnonzero(buffer.domains == int(np.argmax(buffer.counts)))
        drawn = int(fullest[stream.below(most)])
        return _drawn(buffer, drawn, "drawn_from_fullest_domain", most, loop)
    place = stream.below(int(buffer.observed.counts[new.domain]) + 1)
    if place >= mine:
        return Placement(None, "not_drawn", 0)
    drawn = int(np.flatnonzero(buffer.domains == new.domain)[place])
    return _drawn(buffer, drawn, "drawn_from_own_domain", mine, loop)


@policy("longest")
def longest(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """The set with the shortest answer leaves, the oldest of equals, if the new one's is longer."""
    open_bins = np.flatnonzero(may_leave(buffer, loop))
    lengths = buffer.answer_words[open_bins]
    equals = open_bins[lengths == lengths.min()]
    shortest = int(equals[np.argmin(buffer.numbers[equals])])
    if new.answer_words <= buffer.answer_words[shortest]:
        return Placement(None, "answer_no_longer", len(open_bins))
    return Placement(shortest, "longer_answer", len(open_bins))


@policy("typical")
def typical(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """Keeps what is like the stream and unlike the rest of the buffer (after TypiClust, Hacohen,
    Dekel and Weinshall, 2022): the set for which that holds least leaves."""
    stored, value = buffer.typicality.values(new.direction, buffer.observed.count + 1)
    open_bins = np.flatnonzero(may_leave(buffer, loop))
    weakest = int(open_bins[np.argmin(stored[open_bins])])
    if value <= stored[weakest]:
        return Placement(None, "no_more_typical", len(open_bins))
    return Placement(weakest, "more_typical", len(open_bins))


@policy("attune")
def attune(buffer: Buffer, new: Candidate, stream: SplitMix64, loop: LoopPolicy) -> Placement:
    """The set of least worth leaves, if the new one's worth is greater (``worths``)."""
    stored, worth = worths(buffer, new, loop)
    open_bins = np.flatnonzero(may_leave(buffer, loop) & ~buffer.waiting)
    if len(open_bins) == 0:
        return Placement(None, "all_wait_for_fine_tuning", 0)
    weakest = int(open_bins[np.argmin(stored[open_bins])])
    if worth <= stored[weakest]:
        return Placement(None, "worth_no_more", len(open_bins))
    return Placement(weakest, "worth_more", len(open_bins))


def worths(buffer: Buffer, new: Candidate, loop: LoopPolicy) -> tuple[np.ndarray, float]:
    """The worth of every stored set, float64 [bins], and of the new one.

    worth = rank − age − crowding. The paper's rule asks a new set to win on three frozen scores at
    once, and stops accepting when all bins score high. Here scores count by their rank among the
    stored sets and the new one, so that no scale or outlier decides; a stored set loses worth with
    every set observed since, so that no bin is taken for ever; and the more bins a domain has, the
    less each of its sets is worth, so that a long run of one subject does not fill the buffer.
    """
    scores = np.array([new.scores.eoe, new.scores.dss, new.scores.idd])
    ranks = np.zeros(buffer.bins + 1, np.int64)
    columns = loop.score_columns
    for column in np.vstack([buffer.scores, scores]).T[columns]:  # [bins + 1], the new set last
        order = np.argsort(column)
        ordered = column[order]
        first = np.append(True, ordered[1:] != ordered[:-1])  # of a run of equals
        starts = np.flatnonzero(first)
        ends = np.append(starts[1:], len(ordered))
        twice = starts + ends - 1  # 2 · how many are less + how many others are equal
        ranks[order] += twice[np.cumsum(first) - 1]
    rank = ranks / (2 * len(columns) * buffer.bins)  # in [0, 1], their mean
    age = (new.number - buffer.numbers) / (loop.age_fills * buffer.bins)
    others = buffer.counts[buffer.domains] - 1
    stored = rank[:-1] - age - loop.crowding * (others / buffer.bins)
    crowd = loop.crowding * (int(buffer.counts[new.domain]) / buffer.bins)
    return stored, float(rank[-1] - crowd)
