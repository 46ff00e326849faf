"""A phone's days: dialogues, answers and nights, from wherever the store is until the stream ends.

This is what an app does, in one process that may be killed at any moment and started again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.phone_engine import PhoneEngine
from runtime_py.engine.streamed_tuner import StreamedFineTuner
from runtime_py.loop.annotation import Question
from runtime_py.loop.dialogue import Dialogue, check_text
from runtime_py.loop.errors import DiskFull, LoopError
from runtime_py.loop.lexicons import BUILTIN, read_lexicons
from runtime_py.loop.metrics import rouge1
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.stream import read_stream
from runtime_py.loop.words import words
from toolchain.simulate.device import Device, find_device
from toolchain.simulate.limits import Quota, available_mb
from toolchain.simulate.metered import Meter, NightTuner
from toolchain.simulate.rhythm import Clock
from toolchain.simulate.roofline import Counter
from toolchain.simulate.user import User

STATE = "phone"  # in the run's folder: what the app keeps
PROBE_TOKENS = 64
_WAIT_S = 0.02  # for others to free the disk
_MOST_FREE_MB = 1 << 20  # said where there is no limit

Say = Callable[[dict[str, Any]], None]
"""Takes an event: a JSON object with ``event``, its name."""


@dataclass(frozen=True)
class Life:
    """``places``: dialogues of the stream that are lived; ``probes``: how many of them the model
    answers by itself too, for ROUGE-1. ``model_replies``: the assistant's last turn is the model's
    own, and the stream's is what the user would rather have. ``lean``: see ``PhoneEngine``."""

    bundle: str
    stream: str
    folder: str
    device: str
    policy: dict[str, Any]
    lexicons: str | None
    places: int
    dialogues_a_day: int
    answer_rate: float
    seed: int
    probes: int
    model_replies: bool
    threads: int
    lean: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def device_of(life: Life) -> Device:
    device = find_device(life.device)
    rhythm = replace(device.rhythm, dialogues=life.dialogues_a_day)
    return replace(device, rhythm=rhythm)


def dialogues_of(stream: Path, places: int | None = None) -> Iterator[Dialogue]:
    """The stream's sound dialogues; the others were named before the run began."""
    records = read_stream(stream, refuse=lambda error: None)
    return (record.dialogue for record in itertools.islice(records, places))


def lexicons_of(bundle: Bundle, own: str | None) -> Path:
    if own is not None:
        return Path(own)
    return bundle.path / "lexicons" if bundle.manifest.policy.lexicons else BUILTIN


class Phone:
    """An app with a bundle, its meter and its clock. Use it in a ``with``."""

    def __init__(self, life: Life, bundle: Bundle, say: Say) -> None:
        self._life, self._say = life, say
        device = device_of(life)
        policy = LoopPolicy.from_fields(life.policy)
        self.clock = Clock(device, policy)
        self._meter = Meter(self.clock, Counter(bundle), device.compute)
        self._engine = PhoneEngine(bundle, life.threads, self._meter.lm, lean=life.lean)
        folder = Path(life.folder) / STATE
        beside = sum(file.bytes for file in bundle.manifest.files)
        self._quota = Quota(folder, beside, device.storage.app_mb)
        streamed = StreamedFineTuner(
            bundle,
            self._engine.text,
            threads=life.threads,
            before=self._engine.release,
            available_mb=available_mb,
            on_call=self._meter.training,
        )
        self._user = User(life.seed, life.answer_rate)
        self._ideal: dict[str, Dialogue] = {}  # the stream's own, by id
        self._policy = policy
        self._app = Personalizer(
            folder=folder,
            policy=policy,
            lexicons=read_lexicons(lexicons_of(bundle, life.lexicons)),
            engine=self._meter.timed(self._engine),
            tuner=NightTuner(streamed, self._meter, self._quota, bundle, say),
            clock=self.clock,
            bundle=bundle,
        )

    def __enter__(self) -> Phone:
        return self

    def __exit__(self, *error: object) -> None:
        self._app.close()

    def live(self) -> None:
        """Until the stream ends; ends with the event ``done``."""
        app, life = self._app, self._life
        place = app.status().observed
        self._say({"event": "awake", "place": place})
        every = max(1, life.places // life.probes) if life.probes else life.places + 1
        for number, dialogue in enumerate(dialogues_of(Path(life.stream), life.places), start=1):
            self._ideal[dialogue.id] = dialogue
            if number < place:
                continue
            self.clock.by_day(number)
            if number > place:
                self._see(dialogue, number, number % every == 0)
            for question in app.pending_questions():
                self._perhaps_answer(question)
            if self.clock.ends_day(number) or number == life.places:
                self._sleep(number)
        self._say({"event": "done", "status": asdict(app.status()), "lost": list(app.lost())})

    def _see(self, dialogue: Dialogue, number: int, probe: bool) -> None:
        reply = self._reply(dialogue, number) if probe or self._life.model_replies else ""
        if self._life.model_replies and is_text(reply):
            dialogue = dialogue.with_answer(reply)
        taken = 0.0

        def observe() -> None:
            nonlocal taken
            self._meter.begin()
            begun = time.perf_counter()
            self._app.observe(dialogue)
            taken = time.perf_counter() - begun

        self._write(observe)
        self._say(
            {
                "event": "dialogue",
                "place": number,
                "observe_s": taken,
                "embed_s": self._meter.embed_seconds,
                "tokens": self._meter.embed_tokens,
                "modelled_s": self._meter.day_seconds,
            }
        )

    def _reply(self, dialogue: Dialogue, number: int) -> str:
        """What the model itself says, and how near that is to the stream's reply."""
        reply = self._engine.generate(
            dialogue.turns[:-1],
            temperature=self._policy.reply_temperature,
            seed=0,
            max_new_tokens=min(PROBE_TOKENS, self._policy.reply_max_tokens),
        )
        score = rouge1(words(dialogue.answer), words(reply))
        self._say({"event": "probe", "place": number, "rouge1": score})
        return reply

    def _perhaps_answer(self, question: Question) -> None:
        if not self._user.answers(question.id):
            return
        ideal = self._ideal[question.id]
        # A set that was cut in its bin ends with a reply that is the stream's already.
        whole = len(ideal.turns) == len(question.dialogue.turns)
        text = ideal.answer if self._life.model_replies and whole else None
        self._write(lambda: self._app.answer(question.id, text))

    def _sleep(self, number: int) -> None:
        """The night after dialogue ``number``: on the charger, unused."""
        app, clock = self._app, self.clock
        clock.by_night()
        last = app.store.rows("SELECT max (seconds) FROM log WHERE day = ?", clock.day)[0][0]
        if last is not None and (past := clock.since_night(last)) > 0:
            clock.wall = past  # it was killed in this night
        self._engine.release()
        free = int(min(available_mb(), _MOST_FREE_MB))
        self._say({"event": "night", "place": number, "day": clock.day, "free_mb": free})
        report = self._write(
            lambda: app.fine_tune(clock.conditions(free), stop=lambda: clock.night_is_over)
        )
        said = {key: value for key, value in asdict(report).items() if key != "seconds"}
        self._say(
            {
                "event": "morning",
                "place": number,
                "day": clock.day,
                "work_s": clock.work,
                "wall_s": clock.wall,
                "storage": self._quota.used,
                "domains": app.status().domains,
                **said,
            }
        )

    def _write(self, change: Callable[[], Any]) -> Any:
        """Tries again where others fill the disk, until there is room."""
        waiting = False
        while True:
            try:
                self._quota.limit(self._app.store)
                result = change()
            except DiskFull as error:
                if not self._quota.others_fill_it:
                    raise
                if not waiting:
                    self._say({"event": "full", "why": str(error)})
                waiting = True
                time.sleep(_WAIT_S)
                continue
            if waiting:
                self._say({"event": "freed"})
            return result


def is_text(text: str) -> bool:
    """Whether a turn may have it as content."""
    try:
        check_text(text, "a reply")
    except LoopError:
        return False
    return True
