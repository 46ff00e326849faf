"""The buffer: a fixed number of bins, and the sums that make scoring a new set cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.metrics import (
    direction,
    domain_specific_score,
    dominant_domain,
    in_domain_dissimilarity,
    on_grid,
)
from runtime_py.loop.neighbours import Neighbours
from runtime_py.loop.protocols import Embedding
from runtime_py.loop.tally import Tally
from runtime_py.loop.typicality import Typicality


@dataclass(frozen=True)
class Scores:
    """Higher is better in all three; each on the grid of 2^-20."""

    eoe: float
    dss: float
    idd: float


@dataclass(frozen=True, eq=False)
class Candidate:
    """A set as a policy sees it. ``domain`` indexes ``Lexicons.names``; ``number`` counts observed
    sets from 1; ``direction`` is int64 [hidden]; ``answer_words``: how many words has the reply
    that the user would be asked about, 0 where there is none."""

    id: str
    number: int
    domain: int
    scores: Scores
    direction: np.ndarray
    answer_words: int = 0


class Buffer:
    """What policies decide on: per-bin arrays whose row is the bin's number.

    ``ids`` [bins], None where free; ``scores`` float64 [bins, 3]; ``domains``, ``numbers`` int64
    [bins]; ``answer_words`` int64 [bins]; ``directions`` int32 [bins, hidden]; ``waiting`` bool
    [bins], sets that were answered and that no fine-tuning has used yet; ``questions`` bool [bins],
    sets with an open question; ``was_asked`` bool [bins], sets that had one at any time; ``sums``
    int64 [domains, hidden], directions by domain. ``observed`` is of all sets that were measured,
    ``asked`` of those that the user was asked about, whatever became of them. ``mean`` float32
    [hidden] is taken from vectors before they become directions.
    """

    def __init__(
        self, bins: int, domains: int, hidden: int, mean: np.ndarray | None = None
    ) -> None:
        self.ids: list[str | None] = [None] * bins
        self.scores = np.zeros((bins, 3))
        self.domains = np.full(bins, -1, np.int64)
        self.numbers = np.zeros(bins, np.int64)
        self.answer_words = np.zeros(bins, np.int64)
        self.waiting = np.zeros(bins, bool)
        self.questions = np.zeros(bins, bool)
        self.was_asked = np.zeros(bins, bool)
        self.directions = np.zeros((bins, hidden), np.int32)
        self.sums = np.zeros((domains, hidden), np.int64)
        self.counts = np.zeros(domains, np.int64)
        self.observed, self.asked = Tally(domains, hidden), Tally(domains, hidden)
        self.mean = mean
        self._bin_of: dict[str, int] = {}
        self._neighbours: Neighbours | None = None
        self._typicality: Typicality | None = None

    @property
    def neighbours(self) -> Neighbours:
        """Made when first asked for: only some policies need it."""
        if self._neighbours is None:
            self._neighbours = Neighbours(self.directions, self.domains >= 0)
        return self._neighbours

    @property
    def typicality(self) -> Typicality:
        """Made when first asked for, as ``neighbours`` are."""
        if self._typicality is None:
            self._typicality = Typicality(self.directions, self.observed.total)
        return self._typicality

    def __len__(self) -> int:
        return len(self._bin_of)

    @property
    def bins(self) -> int:
        return len(self.ids)

    @property
    def full(self) -> bool:
        return len(self) == self.bins

    def bin_of(self, id: str) -> int | None:
        return self._bin_of.get(id)

    def first_free(self) -> int | None:
        return None if self.full else self.ids.index(None)

    def put(self, bin: int, new: Candidate) -> None:
        """Fills a bin; whatever was in it is gone."""
        self.clear(bin)
        self.ids[bin] = new.id
        self._bin_of[new.id] = bin
        self.scores[bin] = new.scores.eoe, new.scores.dss, new.scores.idd
        self.domains[bin] = new.domain
        self.numbers[bin] = new.number
        self.answer_words[bin] = new.answer_words
        self.directions[bin] = new.direction
        self.sums[new.domain] += new.direction
        self.counts[new.domain] += 1
        if self._neighbours:
            self._neighbours.put(bin, new.direction)
        if self._typicality:
            self._typicality.put(bin, new.direction)

    def clear(self, bin: int) -> None:
        """Empties a bin, and takes its set out of all sums."""
        id = self.ids[bin]
        if id is None:
            return
        domain = self.domains[bin]
        self.sums[domain] -= self.directions[bin]
        self.counts[domain] -= 1
        del self._bin_of[id]
        self.ids[bin], self.domains[bin], self.directions[bin] = None, -1, 0
        self.waiting[bin] = self.questions[bin] = self.was_asked[bin] = False
        if self._neighbours:
            self._neighbours.clear(bin)
        if self._typicality:
            self._typicality.clear(bin)

    def count_stored(self) -> None:
        """Begins the tallies with the stored sets."""
        for tally, mask in ((self.observed, self.domains >= 0), (self.asked, self.was_asked)):
            tally.clear()
            for bin in np.flatnonzero(mask):
                tally.add(int(self.domains[bin]), self.directions[bin])

    def see(self, new: Candidate) -> None:
        """Counts a measured set, kept or not, to what was observed."""
        self.observed.add(new.domain, new.direction)
        if self._typicality:
            self._typicality.see(new.direction)

    def unsee(self, bin: int) -> None:
        """Takes a stored set that is forgotten out of what was observed and asked about."""
        domain, heading = int(self.domains[bin]), self.directions[bin]
        self.observed.remove(domain, heading)
        if self.was_asked[bin]:
            self.asked.remove(domain, heading)
        if self._typicality:
            self._typicality.unsee(heading)

    def ask(self, bin: int) -> None:
        """A stored set has a question."""
        self.questions[bin] = self.was_asked[bin] = True
        self.asked.add(int(self.domains[bin]), self.directions[bin])

    def end_question(self, id: str) -> None:
        """It was answered or has lapsed; nothing for a set that has left."""
        if (bin := self._bin_of.get(id)) is not None:
            self.questions[bin] = False

    def set_waiting(self, id: str, waiting: bool) -> None:
        """Whether a stored set waits for a fine-tuning; nothing for one that has left. The only bin
        never does: a fine-tuning takes two sets."""
        if (bin := self._bin_of.get(id)) is not None:
            self.waiting[bin] = waiting and self.bins > 1

    def measure(
        self,
        id: str,
        number: int,
        text: Sequence[str],
        embedding: Embedding,
        lexicons: Lexicons,
        answer_words: int = 0,
    ) -> Candidate:
        """Scores a set against the buffer; ``text`` is its words."""
        hits = lexicons.hits(text)
        domain = dominant_domain(hits)
        heading = direction(embedding.pooled, self.mean)
        scores = Scores(
            eoe=on_grid(embedding.entropy),
            dss=domain_specific_score(hits, len(text)),
            idd=in_domain_dissimilarity(heading, self.sums[domain], int(self.counts[domain])),
        )
        return Candidate(id, number, domain, scores, heading, answer_words)
