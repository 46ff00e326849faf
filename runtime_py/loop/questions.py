"""Questions in the store: asked when a set enters, or at the day's look at the whole buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_py.loop import records
from runtime_py.loop.annotation import has_lapsed, may_ask
from runtime_py.loop.asking import ENTRY, Situation, find_asking_rule
from runtime_py.loop.buffer import Buffer, Candidate
from runtime_py.loop.exchanges import Exchanges, NotAsked
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store
from runtime_py.loop.tallies import count_direction


@dataclass(frozen=True)
class Chosen:
    """A stored set that will be asked about. ``number``: which observed set it was."""

    bin: int
    id: str
    number: int
    exchange: int


class Questions:
    def __init__(
        self,
        store: Store,
        buffer: Buffer,
        loop: LoopPolicy,
        lexicons: Lexicons,
        exchanges: Exchanges,
    ) -> None:
        self._store, self._buffer, self._loop = store, buffer, loop
        self._names, self._exchanges = lexicons.names, exchanges
        self._rule = find_asking_rule(loop.asking)

    def begin_day(self, now: Moment) -> None:
        """One transaction, at the first call of a day: what is too old lapses, and the rule chooses
        what the user is asked about."""
        if not self._is_new(now.day):
            return
        store, loop = self._store, self._loop
        rows = store.rows("SELECT id, coalesce (day, ?) FROM questions ORDER BY number", now.day)
        lapsed = [id for id, asked in rows if has_lapsed(asked, now.day, loop)]
        stream = store.stream("asking")
        state, chosen = stream.state, self._choose(now.day, stream)
        with store.transaction():
            store.set_count("asking_day", now.day)
            # one that was asked before days were kept, or on a day that the clock has taken back,
            # counts from this look on
            sql = "UPDATE questions SET day = ? WHERE day IS NULL OR day > ?"
            store.execute(sql, now.day, now.day)
            for id in lapsed:
                store.execute("DELETE FROM questions WHERE id = ?", id)
                store.add("lapsed")
                store.append(now, "lapsed", id, {})
            for one in chosen:
                domain, heading = (
                    int(self._buffer.domains[one.bin]),
                    self._buffer.directions[one.bin],
                )
                self._write(one.id, one.number, one.exchange, domain, heading, now.day)
                data = {"number": one.number, "exchange": one.exchange, "by": loop.asking}
                store.append(now, "asked", one.id, data)
            if stream.state != state:
                store.save_stream("asking", stream)
        for id in lapsed:
            self._buffer.end_question(id)
        for one in chosen:
            self._buffer.ask(one.bin)

    def _is_new(self, day: int) -> bool:
        """The day before the last one is not, so that a clock that goes back over midnight, on a
        journey or by a correction, does not ask twice."""
        last = self._store.counts().get("asking_day")
        return last is None or not last - 1 <= day <= last

    def why_not_at_entry(self, day: int) -> NotAsked | None:
        """Why a set that enters is not asked about; None where it is."""
        if self._loop.asking != ENTRY:
            return "asked_by_day"
        return None if may_ask(self._asked_on(day), self._loop) else "enough_today"

    def write_at_entry(self, new: Candidate, exchange: int, now: Moment) -> None:
        """Inside the transaction that stores the set."""
        self._write(new.id, new.number, exchange, new.domain, new.direction, now.day)

    def _write(
        self, id: str, number: int, exchange: int, domain: int, heading: np.ndarray, day: int
    ) -> None:
        store = self._store
        asked = self._asked_on(day)
        if store.count("question_day") != day + 1:
            store.set_count("question_day", day)
        store.set_count("asked_today", asked + 1)
        store.add("asked")
        records.write_question(store, id, number, exchange, day)
        count_direction(store, "asked", self._names[domain], heading)

    def _asked_on(self, day: int) -> int:
        """Those of the day after count too: a clock that goes back over midnight (``_is_new``)
        does not begin the day's questions anew."""
        today = 0 <= self._store.count("question_day") - day <= 1
        return self._store.count("asked_today") if today else 0

    def _choose(self, day: int, stream: SplitMix64) -> list[Chosen]:
        """One after the other, so that each sees those before it as asked about."""
        store, buffer, loop = self._store, self._buffer, self._loop
        answered = store.count("answered")
        now = Situation(buffer, stream, loop, store.count("asked"), answered)
        eligible = np.flatnonzero((buffer.domains >= 0) & ~buffer.was_asked)
        chosen: list[Chosen] = []
        asked = self._asked_on(day)
        while len(eligible) and may_ask(asked + len(chosen), loop):
            bin = self._rule(now, eligible)
            if bin is None:
                break
            eligible = eligible[eligible != bin]
            id = str(buffer.ids[bin])
            dialogue = records.read_set(store, id)
            exchange = None if dialogue is None else self._exchanges.to_ask_about(dialogue)
            if exchange is not None:
                now.note(bin)
                chosen.append(Chosen(bin, id, int(buffer.numbers[bin]), exchange))
        return chosen
