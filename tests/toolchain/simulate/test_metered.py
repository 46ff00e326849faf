"""A night's modelled work is the same whenever the process dies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.loop.policy import LoopPolicy
from tests.runtime_py.engine.toy import chat_text
from tests.runtime_py.engine.toy_tuner import ToyTuner, toy_job, toy_parent
from toolchain.simulate.device import find_device
from toolchain.simulate.events import StepTrained
from toolchain.simulate.limits import Quota
from toolchain.simulate.metered import Meter, NightTuner
from toolchain.simulate.rhythm import Clock
from toolchain.simulate.roofline import Cost, Counter

SECONDS = {"loss": 3.0, "gradient": 11.0, "update": 0.5, "check": 0.0}


class KillError(Exception):
    """In place of a process that ends."""


class Seconds:
    """In place of a bundle's programs: so many seconds a call on a device of 1 GFLOPS."""

    def training(self, call: TrainingCall) -> Cost:
        return Cost(flops=SECONDS[call.kind] * 1e9)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ChatText:
    return chat_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_parent(tmp_path_factory.mktemp("parent"))


class Night:
    """A process in the night: ``run`` until call ``kill``, or to its end."""

    def __init__(self, text: ChatText, parent: Path, folder: Path) -> None:
        self._text, self._parent, self._folder = text, parent, folder

    def run(self, kill: int | None = None) -> tuple[float, list[StepTrained], list[TrainingCall]]:
        """-> the clock's seconds, the events and the calls."""
        pixel = find_device("pixel-8")
        clock = Clock(pixel, LoopPolicy())
        clock.by_night()
        compute = replace(pixel.compute, gflops=1.0)
        meter = Meter(clock, cast(Counter, Seconds()), compute)
        calls: list[TrainingCall] = []
        events: list[StepTrained] = []

        def on_call(call: TrainingCall) -> None:
            meter.training(call)
            calls.append(call)
            if len(calls) == kill:
                raise KillError

        tuner = ToyTuner(self._text, self._parent, on_call=on_call)
        adapter = SimpleNamespace(tensors=tuner.tensors)
        bundle = cast(Bundle, SimpleNamespace(manifest=SimpleNamespace(adapter=adapter)))
        self._folder.mkdir(exist_ok=True)
        night = NightTuner(tuner, meter, Quota(self._folder, 0, 100.0), bundle, events.append)
        assert night.run(toy_job(self._parent), self._folder, lambda: False) is not None
        return clock.wall, events, calls


def test_every_call_counts(text: ChatText, parent: Path, tmp_path: Path) -> None:
    """The looks at the stopping sets and the guard's sets too."""
    wall, events, calls = Night(text, parent, tmp_path / "whole").run()
    kinds = [call.kind for call in calls]
    assert kinds.count("check") >= 3
    assert kinds.count("loss") == 2 * 3 + kinds.count("check")  # two stopping sets share a call
    work = sum(SECONDS[kind] for kind in kinds)
    clock = Clock(find_device("pixel-8"), LoopPolicy())
    clock.add(work)
    assert wall == pytest.approx(clock.wall, rel=1e-9)
    assert [event.step for event in events] == list(range(1, kinds.count("update") + 1))


def test_killed_after_any_call(text: ChatText, parent: Path, tmp_path: Path) -> None:
    """Twice: the clock ends where it ends without a kill."""
    wall, _, calls = Night(text, parent, tmp_path / "whole").run()
    for kill in range(1, len(calls) + 1, 2):
        night = Night(text, parent, tmp_path / str(kill))
        for moment in (kill, 1 + kill % 7):
            with pytest.raises(KillError):
                night.run(moment)
        found, _, _ = night.run()
        assert found == wall, kill
