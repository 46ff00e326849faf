"""A phone's days: dialogues, answers and nights, from wherever the store is until the stream ends.

This is what an app does, in one process that may be killed at any moment and started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from runtime_py.bundle.bundle import Bundle
from runtime_py.loop.annotation import Question
from runtime_py.loop.dialogue import Dialogue, check_text
from runtime_py.loop.errors import AnswerTooLong, DiskFull, LoopError, PromptTooLong
from runtime_py.loop.fine_tune_report import FineTuneReport
from runtime_py.loop.metrics import rouge1
from runtime_py.loop.store import Store
from runtime_py.loop.words import words
from toolchain.simulate.events import (
    AppOpened,
    DialogueObserved,
    DiskFilled,
    DiskFreed,
    NightBegun,
    NightEnded,
    PhoneEvent,
    ReplyProbed,
    StreamEnded,
)
from toolchain.simulate.life_plan import LifePlan
from toolchain.simulate.limits import Quota, available_mb
from toolchain.simulate.metered import Meter, NightTuner
from toolchain.simulate.phone_app import load_programs, open_loop
from toolchain.simulate.rhythm import Clock
from toolchain.simulate.roofline import Counter
from toolchain.simulate.user import User

PROBE_TOKENS = 64
_WAIT_S = 0.02  # for others to free the disk
_MOST_FREE_MB = 1 << 20  # given where there is no limit

T = TypeVar("T")


class Phone:
    """An app with a bundle, its meter and its clock. Use it in a ``with``. ``emit`` takes every
    event."""

    def __init__(self, plan: LifePlan, bundle: Bundle, emit: Callable[[PhoneEvent], None]) -> None:
        self._plan, self._emit = plan, emit
        device = plan.device
        self._clock = Clock(device, plan.policy)
        self._meter = Meter(self._clock, Counter(bundle), device.compute)
        beside = sum(file.bytes for file in bundle.manifest.files)
        self._quota = Quota(plan.state, beside, device.storage.app_mb)
        programs = load_programs(
            bundle,
            threads=plan.threads,
            lean=plan.lean,
            on_lm_call=self._meter.lm,
            on_training_call=self._meter.training,
            available_mb=available_mb,
        )
        self._engine = programs.engine
        self._user = User(plan.seed, plan.answer_rate)
        self._given_up: set[str] = set()  # ids of questions
        self._ideal: dict[str, Dialogue] = {}  # the stream's dialogues, by id
        self._app = open_loop(
            bundle,
            plan.state,
            plan.policy,
            lexicons=plan.lexicons,
            engine=self._meter.timed(programs.engine),
            tuner=NightTuner(programs.tuner, self._meter, self._quota, bundle, emit),
            clock=self._clock,
        )

    def __enter__(self) -> Phone:
        return self

    def __exit__(self, *error: object) -> None:
        self._app.close()

    def live(self) -> None:
        """Until the stream ends; ends with ``StreamEnded``."""
        app, plan, clock = self._app, self._plan, self._clock
        place = app.status().observed
        self._emit(AppOpened(place))
        every = max(1, plan.places // plan.probes) if plan.probes else plan.places + 1
        for number, dialogue in enumerate(plan.dialogues(), start=1):
            self._ideal[dialogue.id] = dialogue
            if number < place:
                continue
            clock.by_day(number)
            if number > place:
                self._observe(dialogue, number, number % every == 0)
            for question in app.pending_questions():
                self._consider(question)
            if clock.ends_day(number) or number == plan.places:
                self._spend_night(number)
        self._emit(StreamEnded())

    def _observe(self, dialogue: Dialogue, number: int, probe: bool) -> None:
        reply = self._reply(dialogue, number) if probe or self._plan.model_replies else ""
        if self._plan.model_replies and is_text(reply):
            dialogue = dialogue.with_answer(reply)
        seconds = self._retried(lambda: self._timed_observe(dialogue))
        meter = self._meter
        self._emit(
            DialogueObserved(
                place=number,
                observe_s=seconds,
                embed_s=meter.embed_seconds,
                tokens=meter.embed_tokens,
                modelled_s=meter.day_seconds,
            )
        )

    def _timed_observe(self, dialogue: Dialogue) -> float:
        self._meter.begin()
        begun = time.perf_counter()
        self._app.observe(dialogue)
        return time.perf_counter() - begun

    def _reply(self, dialogue: Dialogue, number: int) -> str:
        """The model's own reply; an event has how near it is to the stream's. "" where the
        question leaves no room for one."""
        policy = self._plan.policy
        try:
            reply = self._engine.generate(
                dialogue.turns[:-1],
                temperature=policy.reply_temperature,
                seed=0,
                max_new_tokens=min(PROBE_TOKENS, policy.reply_max_tokens),
            )
        except PromptTooLong:
            reply = ""
        self._emit(ReplyProbed(number, rouge1(words(dialogue.answer), words(reply))))
        return reply

    def _consider(self, question: Question) -> None:
        """The user answers it, or does not; a user whose answer is refused as too long gives up."""
        if question.id in self._given_up or not self._user.answers(question.id):
            return
        ideal = self._ideal[question.id]
        # All replies but a set's last are the stream's already.
        own = self._plan.model_replies and question.exchange == ideal.exchanges - 1
        text = ideal.answer if own else None
        try:
            self._retried(lambda: self._app.answer(question.id, text))
        except AnswerTooLong:
            self._given_up.add(question.id)

    def _spend_night(self, number: int) -> None:
        """The night after dialogue ``number``: on the charger, unused."""
        app, clock = self._app, self._clock
        clock.by_night()
        last = app.store.rows("SELECT max (seconds) FROM log WHERE day = ?", clock.day)[0][0]
        if last is not None and (past := clock.since_night(last)) > 0:
            clock.wall = past  # it was killed in this night
        self._engine.release()
        free = int(min(available_mb(), _MOST_FREE_MB))
        self._emit(NightBegun(number, clock.day))
        report = self._retried(lambda: self._fine_tune(free))
        self._emit(
            NightEnded(
                place=number,
                day=clock.day,
                state=report.state,
                job=report.job,
                losses=report.losses,
                work_s=clock.work,
                wall_s=clock.wall,
                storage=self._quota.used,
                domains=app.status().domains,
            )
        )

    def _fine_tune(self, free_mb: int) -> FineTuneReport:
        clock = self._clock
        return self._app.fine_tune(clock.conditions(free_mb), stop=lambda: clock.night_is_over)

    def _retried(self, change: Callable[[], T]) -> T:
        return when_there_is_room(self._quota, self._app.store, change, self._emit)


def when_there_is_room(
    quota: Quota, store: Store, change: Callable[[], T], emit: Callable[[PhoneEvent], None]
) -> T:
    """Makes a change, again and again where others fill the disk, until there is room. They may
    have gone by the time that a refusal is heard, so who was there before it counts too."""
    waiting = False
    while True:
        others = quota.others_fill_it
        try:
            quota.limit(store)
            result = change()
        except DiskFull:
            if not (others or quota.others_fill_it):
                raise
            if not waiting:
                emit(DiskFilled())
            waiting = True
            time.sleep(_WAIT_S)
            continue
        if waiting:
            emit(DiskFreed())
        return result


def is_text(text: str) -> bool:
    """Whether a turn may have it as content."""
    try:
        check_text(text, "a reply")
    except LoopError:
        return False
    return True
