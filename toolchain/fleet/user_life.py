"""One user's life: a stream, questions and answers by day, fine-tuning by night, and what came of
it for dialogues that neither has seen."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import LoopError
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuner
from toolchain.fleet.counted import CountedEngine, CountedTuner, Ledger
from toolchain.fleet.fleet_world import FleetWorld
from toolchain.fleet.manners import Manner, compliance, find_manner
from toolchain.fleet.users import FleetUser
from toolchain.simulate.device import Device
from toolchain.simulate.rhythm import Clock
from toolchain.simulate.user import User
from toolchain.streams.made import StreamDialogue, make_stream


@dataclass(frozen=True)
class LifeOptions:
    """The same for all users. ``nights``: fine-tunings that fall due, spread evenly;
    ``dialogues_a_day``: None for the phone's, or fewer, so that there are as many days as nights;
    ``policy``: fields in place of the bundle's; ``replies``: tests that are answered too, for the
    manner, each with at most ``reply_tokens``."""

    nights: int
    answer_rate: float
    dialogues_a_day: int | None
    replies: int
    reply_tokens: int
    policy: Mapping[str, Any]


@dataclass(frozen=True)
class LifeTask:
    user: FleetUser
    options: LifeOptions
    data: Path
    phone: Device


@dataclass(frozen=True)
class FleetNight:
    """``minutes`` (with the pauses for heat) and ``watt_hours`` are modelled; ``guard``: sets that
    judged; ``steps`` were taken."""

    day: int
    state: str
    reason: str
    minutes: float
    watt_hours: float
    steps: int
    guard: int
    too_long: bool  # more work than the night has hours


@dataclass(frozen=True)
class UserLife:
    """Losses are nats a label, one a test dialogue, of the bundle's own adapter and of the one that
    was active at the end; ``adapter``: its number, 0 the bundle's own. ``answered``: sets, by
    dataset; ``refused``: answers that their bins had no room for. ``day_minutes`` and
    ``watt_hours`` (of days and nights) are modelled."""

    number: int
    manner: str
    observed: int
    kept: int
    asked: int
    answered: dict[str, int]
    refused: int
    synthesized: int
    adapter: int
    nights: tuple[FleetNight, ...]
    tests: tuple[str, ...]  # their datasets
    before: tuple[float, ...]
    after: tuple[float, ...]
    compliance_before: float | None
    compliance_after: float | None
    day_minutes: float
    watt_hours: float

    @property
    def gain(self) -> float:
        """Nats a label, the mean over its own tests; more is better."""
        return sum(self.before) / len(self.before) - sum(self.after) / len(self.after)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> UserLife:
        """Raises ``ValueError`` for anything but what ``as_json`` gave."""
        return _LIVES.validate_python(raw)


_LIVES = TypeAdapter(UserLife)


@dataclass(frozen=True)
class UserLived:
    """``adapter``: the bytes of the active adapter's file; None: the bundle's own is active.
    ``seconds``: what the life took here."""

    life: UserLife
    adapter: bytes | None
    seconds: float


def live(task: LifeTask, world: FleetWorld) -> UserLived:
    """Decisions are the loop's own. Raises ``LoopError`` where the user's stream cannot be made."""
    begun = time.perf_counter()
    user, options = task.user, task.options
    stream, tests = make_stream(user.recipe, task.data, user.seed)
    manner = find_manner(user.manner)
    tests = tuple(as_wanted(tests, manner, world.tuner))
    wanted = [one.dialogue for one in tests]
    with tempfile.TemporaryDirectory(prefix="attune-fleet-") as folder:
        days = _Days(task, world, Path(folder), len(stream))
        with days.app:
            days.live_through(stream, manner)
            status = days.app.status()
        own, last = world.bundle.adapter_file, days.engine.file
        changed = last is not None and status.adapter != 0
        after = last if changed and last is not None else own
        life = UserLife(
            number=user.number,
            manner=user.manner,
            observed=status.observed,
            kept=status.kept,
            asked=status.questions_asked,
            answered=dict(sorted(days.answered.items())),
            refused=len(days.refused),
            synthesized=status.synthesized,
            adapter=status.adapter,
            nights=tuple(days.nights),
            tests=tuple(one.dataset for one in tests),
            before=tuple(world.losses(own, wanted)),
            after=tuple(world.losses(after, wanted)),
            compliance_before=_compliance(world, own, wanted, manner, options),
            compliance_after=_compliance(world, after, wanted, manner, options),
            day_minutes=days.ledger.day_seconds / 60,
            watt_hours=days.watt_hours,
        )
        adapter = after.read_bytes() if changed else None
        return UserLived(life, adapter, time.perf_counter() - begun)


def as_wanted(
    dialogues: Sequence[StreamDialogue], manner: Manner, tuner: FineTuner
) -> list[StreamDialogue]:
    """With the answers that the user would rather have, and as lessons are: without the oldest
    exchanges that ``tuner`` has no room for. What does not fit even so is no test.

    Raises ``LoopError`` where none fits."""
    capacity = Capacity(tuner.tokens, max(tuner.lengths))
    found = []
    for one in dialogues:
        wanted = one.dialogue.with_answer(manner.rewrite(one.dialogue.answer))
        fitting = lesson(wanted, capacity)
        if fitting is not None:
            found.append(replace(one, dialogue=fitting))
    if not found:
        raise LoopError(
            f"none of the {len(dialogues)} test dialogues fits the {capacity.longest} tokens that "
            f"the training programs have: give more --tests, or export longer --train-lengths."
        )
    return found


def a_day(phone: Device, options: LifeOptions, dialogues: int) -> int:
    """Dialogues of a day. Raises ``LoopError`` where there are fewer days than nights."""
    wanted = options.dialogues_a_day
    if wanted is None:
        return max(1, min(phone.rhythm.dialogues, dialogues // options.nights))
    days = -(-dialogues // wanted)
    if days < options.nights:
        raise LoopError(
            f"{dialogues:,} dialogues at {wanted:,} a day are {days:,} days, fewer than the "
            f"{options.nights} --nights: give fewer --dialogues-a-day."
        )
    return wanted


def evenings(per_day: int, nights: int, dialogues: int) -> tuple[int, ...]:
    """After how many dialogues a fine-tuning falls due: ``nights`` ends of days, spread evenly."""
    days = -(-dialogues // per_day)
    return tuple(
        min(dialogues, per_day * -(-number * days // nights)) for number in range(1, nights + 1)
    )


def policy_of(base: LoopPolicy, options: LifeOptions, seed: int, due: Sequence[int]) -> LoopPolicy:
    """With the user's seed, and a fine-tuning due after ``due`` dialogues each."""
    every = min(now - before for before, now in pairwise((0, *due)))
    fields = {**asdict(base), **options.policy, "fine_tune_every_sets": every, "seed": seed}
    return LoopPolicy.from_fields(fields)


def _compliance(
    world: FleetWorld, adapter: Path, wanted: Sequence[Dialogue], manner: Manner, o: LifeOptions
) -> float | None:
    asked = wanted[: o.replies]
    replies = world.replies(adapter, asked, o.reply_tokens) if asked else ()
    return compliance(manner, tuple(replies))


class _Days:
    """The loop on a simulated phone, one day after the other."""

    def __init__(self, task: LifeTask, world: FleetWorld, folder: Path, places: int) -> None:
        phone, options = task.phone, task.options
        per_day = a_day(phone, options, places)
        phone = replace(phone, rhythm=replace(phone.rhythm, dialogues=per_day))
        self._due = evenings(per_day, options.nights, places)
        policy = policy_of(world.policy, options, task.user.seed, self._due)
        self._phone = phone
        self._clock = Clock(phone, policy)
        self.ledger = Ledger(self._clock)
        costs = world.costs(phone)
        self.engine = CountedEngine(world.engine, costs, self.ledger)
        self._tuner = CountedTuner(world.tuner, costs, self.ledger)
        self._user = User(task.user.seed, options.answer_rate)
        self.nights: list[FleetNight] = []
        self.answered: Counter[str] = Counter()
        self.refused: set[str] = set()
        self.app = world.loop(folder, policy, self.engine, self._tuner, self._clock)

    @property
    def watt_hours(self) -> float:
        by_day = self.ledger.day_seconds / 3600 * self._phone.power.watts
        return by_day + sum(night.watt_hours for night in self.nights)

    def live_through(self, stream: Sequence[StreamDialogue], manner: Manner) -> None:
        kinds = {one.dialogue.id: one.dataset for one in stream}
        for place, one in enumerate(stream, start=1):
            self._clock.by_day(place)
            self.app.observe(one.dialogue)
            self._answer(manner, kinds)
            if place in self._due or (self._clock.ends_day(place) and self._is_unfinished()):
                self._sleep()

    def _answer(self, manner: Manner, kinds: Mapping[str, str]) -> None:
        for question in self.app.pending_questions():
            if not self._user.answers(question.id):
                continue
            try:
                self.app.answer(question.id, manner.rewrite(question.reply))
            except LoopError:  # its bin has no room for it
                self.refused.add(question.id)
                continue
            self.answered[kinds[question.id]] += 1

    def _is_unfinished(self) -> bool:
        return self.app.status().job is not None

    def _sleep(self) -> None:
        clock, phone, tuner = self._clock, self._phone, self._tuner
        clock.by_night()
        tuner.steps = tuner.guard = 0
        stop: Callable[[], bool] = lambda: clock.night_is_over  # noqa: E731
        report = self.app.fine_tune(clock.conditions(int(phone.memory.app_mb)), stop=stop)
        if report.state == "not_due":
            return
        self.nights.append(
            FleetNight(
                day=clock.day,
                state=report.state,
                reason=report.reason,
                minutes=clock.wall / 60,
                watt_hours=clock.work / 3600 * phone.power.watts,
                steps=tuner.steps,
                guard=tuner.guard,
                too_long=clock.night_is_over,
            )
        )
