"""A life in which everything happens that the log has an event for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.log import LogLine
from runtime_py.loop.personalizer import ADAPTERS, STORE, Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult
from runtime_py.loop.recovery import recover
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import open_store
from tests.runtime_py.loop.toy import NIGHT, Clock, ToyTuner, dialogue, open_toy, small_policy

HUGE = Dialogue("huge", (Turn("user", "x" * 100_000), Turn("assistant", "y")))


class _Tuner(ToyTuner):
    """``numbers``: whether losses are some; ``measured``: whether forgetting was."""

    numbers, measured = True, False

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        result = super().run(job, folder, stop)
        if result is not None and not self.numbers:
            none = (math.nan,) * len(job.guard)
            result = replace(result, guard_before=none, guard_after=none)
        if result is not None and self.measured:
            result = replace(result, base_perplexity=20.0, perplexity=20.5)
        return result


class _Life:
    def __init__(self, folder: Path) -> None:
        self._folder, self._seen = folder, 0
        self.clock, self.tuner = Clock(day=40), _Tuner()
        self.policy = small_policy(bins=16)

    @property
    def store(self) -> Path:
        return self._folder / "state" / STORE

    def opened(self, policy: LoopPolicy | None = None) -> Personalizer:
        self.policy = policy or self.policy
        return open_toy(self._folder, self.policy, self.tuner, clock=self.clock)

    def days(self, app: Personalizer, sets: int = 20, answered: bool = True) -> None:
        for number in range(self._seen, self._seen + sets):
            app.observe(dialogue(number, exchanges=1 + number % 3))
            for question in app.pending_questions() if answered else ():
                app.answer(question.id)
        self._seen += sets

    def changed(self, sql: str) -> None:
        """What an older attune or an accident left."""
        store = open_store(self.store)
        with store.transaction():
            store.execute(sql)
        store.close()


def life(folder: Path) -> list[LogLine]:
    """The log of a life in ``folder``, and of what was recovered of its store."""
    one = _Life(folder)
    with one.opened() as app:  # two adapters, the first with short sequences
        app.observe(HUGE)
        one.days(app)
        one.tuner.too_long = 256
        app.fine_tune(NIGHT)
        one.tuner.measured = True
        one.days(app)
        app.fine_tune(NIGHT)
        app.rollback()
        one.tuner.numbers = False
        one.days(app)
        app.fine_tune(NIGHT)
        one.tuner.numbers, one.tuner.halt = True, True
        one.days(app)
        app.fine_tune(NIGHT)  # begun, and not ended
    active = folder / "state" / ADAPTERS / "00001.safetensors"
    active.write_text("damaged")
    with one.opened() as app:
        app.fine_tune(NIGHT)
        app.forget(app.store.rows("SELECT id FROM sets")[0][0])
    with one.opened(replace(one.policy, asking="random", question_days=1)) as app:
        one.days(app, 200, answered=False)
    one.changed("DELETE FROM streams WHERE name = 'asking'")
    one.opened().close()
    one.changed("DELETE FROM tallies")
    with one.opened() as app:
        lines = app.store.log()
    recover(one.store, folder / "recovered.sqlite", Moment(0.0, 0))
    store = open_store(folder / "recovered.sqlite")
    lines += store.log()[len(lines) :]
    store.close()
    return lines
