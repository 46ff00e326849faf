"""A world that learns words: fast enough for many lives, and with gains that can be worked out.

An adapter is the set of words of the answers that it was trained on, and the last such answer. Its
loss of a dialogue is 3 minus the part of the last reply's words that it knows; its reply is that
answer. A bundle folder's file ``break`` holds an id: a dialogue with it cannot be scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import LoopError
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Engine, FineTuneJob, FineTuner, FineTuneResult
from runtime_py.loop.schedule import Moment
from tests.runtime_py.loop.toy import LEXICONS, ToyBundle, ToyEngine, ToyTuner
from toolchain.fleet.fleet_world import FleetPlace
from toolchain.simulate.device import Device

EMBED, REPLY, STEP = 0.5, 2.0, 30.0  # modelled seconds


def loss(adapter: Path, dialogue: Dialogue) -> float:
    words = dialogue.answer.split()
    known = set(json.loads(adapter.read_text())["words"])
    return 3.0 - sum(word in known for word in words) / len(words)


class WordTuner(ToyTuner):
    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        parent = json.loads(job.parent.read_text())
        words = set(parent["words"])
        for one in job.training:
            words.update(one.answer.split())
        adapter = folder / "adapter.json"
        learnt = {"words": sorted(words), "answer": job.training[-1].answer}
        adapter.write_text(json.dumps(learnt))
        before = tuple(loss(job.parent, one) for one in job.guard)
        after = tuple(loss(adapter, one) for one in job.guard)
        return FineTuneResult(adapter, before, after, (2.0,) * 5, (), 5, 1.0)


class ToyCosts:
    def embed(self, dialogue: Dialogue) -> float:
        return EMBED

    def reply(self, messages: Sequence[Turn], text: str) -> float:
        return REPLY

    def training(self, job: FineTuneJob, result: FineTuneResult) -> float:
        return STEP * len(result.losses)


class ToyWorld:
    def __init__(self, folder: Path) -> None:
        broken = folder / "break"
        self._broken = broken.read_text() if broken.exists() else None
        self.bundle = ToyBundle(folder)
        self.engine, self.tuner = ToyEngine(), WordTuner()
        self.policy = LoopPolicy(bins=64, bin_bytes=4096, paraphrases=0, selection="fifo")

    def loop(
        self,
        folder: Path,
        policy: LoopPolicy,
        engine: Engine,
        tuner: FineTuner,
        clock: Callable[[], Moment],
    ) -> Personalizer:
        return Personalizer(
            folder=folder,
            policy=policy,
            lexicons=LEXICONS,
            engine=engine,
            tuner=tuner,
            clock=clock,
            bundle=self.bundle,
        )

    def costs(self, phone: Device) -> ToyCosts:
        return ToyCosts()

    def losses(self, adapter: Path, dialogues: Sequence[Dialogue]) -> list[float]:
        for one in dialogues:
            if one.id == self._broken:
                raise LoopError(f"dialogue {one.id!r} cannot be scored.")
        return [loss(adapter, one) for one in dialogues]

    def replies(self, adapter: Path, dialogues: Sequence[Dialogue], most: int) -> list[str]:
        answer = json.loads(adapter.read_text())["answer"]
        return [answer for _ in dialogues]


def toy_bundle(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_text(json.dumps({"words": [], "answer": "A reply. B"}))
    (folder / "manifest.json").write_text("{}")
    return folder


def open_world(place: FleetPlace) -> ToyWorld:
    return ToyWorld(place.study.bundle)
