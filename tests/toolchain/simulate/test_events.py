"""What goes over the pipe and into files: back as it was, or an error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from toolchain.simulate import events
from toolchain.simulate.device import find_device
from toolchain.simulate.events import PhoneEvent, from_line, to_line
from toolchain.simulate.faults import Fault, FaultSchedule
from toolchain.simulate.life_plan import LifePlan
from toolchain.simulate.metered import NightRecord
from toolchain.simulate.rhythm import on_grid

NIGHT = events.NightEnded(
    place=10,
    day=0,
    state="accepted",
    job=1,
    losses=(1.5, 0.1),
    work_s=0.1,
    wall_s=on_grid(12345.678),
    storage=5,
    domains={"voyage — 旅行": 2},
)
EVENTS: list[PhoneEvent] = [
    events.LimitsSet(1 << 30, 4),
    events.AppOpened(0),
    events.DialogueObserved(1, 0.1, 0.05, 7, 1e-9),
    events.ReplyProbed(4, 1 / 3),
    events.NightBegun(10, 0),
    events.StepTrained(1, 64),
    NIGHT,
    replace(NIGHT, state="not_due", job=None, losses=()),
    replace(NIGHT, losses=(math.inf, 1.0)),  # training that diverged
    events.DiskFilled(),
    events.DiskFreed(),
    events.PhoneFailed("a sentence,\nof two lines."),
    events.StreamEnded(),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_an_event_comes_back_as_it_was(event: PhoneEvent) -> None:
    line = to_line(event)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert from_line(line) == event


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"event": "dinner", "place": 1}', "'dinner'"),
        (b'{"place": 1}', "discriminator"),
        (b'{"event": "awake"}', "awake.place"),
        (b'{"event": "awake", "place": "1"}', "awake.place"),
        (b'{"event": "awake", "place": 1, "at": 2}', "awake.at"),
        (b'{"event": "awake", "pla', "Invalid JSON"),
    ],
)
def test_what_is_no_event_is_an_error(line: bytes, why: str) -> None:
    with pytest.raises(LoopError, match="which is no event") as caught:
        from_line(line)
    assert why in str(caught.value)


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    plan = LifePlan(
        bundle=tmp_path / "bundle",
        stream=tmp_path / "stream.jsonl",
        folder=tmp_path,
        device=find_device("iphone-15"),
        policy=LoopPolicy(seed=(1 << 64) - 1, learning_rate=1e-5, question="Zażółć?"),
        lexicons=None,
        places=3,
        answer_rate=0.1,
        seed=0,
        probes=1,
        model_replies=True,
        threads=2,
        lean=False,
    )
    assert LifePlan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="unknown_field"):
        LifePlan.from_json(json.dumps({**json.loads(plan.to_json()), "unknown_field": 1}).encode())


def test_a_night_s_record_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "night.json"
    assert NightRecord.read(path) is None
    night = NightRecord(3, 1, {1: 0.0})
    for mark in range(2, 40):
        night = night.after(mark, on_grid(mark * 1234.5678901))
    night.write(path)
    assert NightRecord.read(path) == night


def test_a_fault_waits_for_its_trigger_and_its_fuse() -> None:
    late, step = Fault("kill", "dialogue", 5, 0.25), Fault("low_memory", "step", 0, 0.0)
    schedule = FaultSchedule([late, step])
    schedule.light(EVENTS[2], 4, now=10.0)  # a dialogue, too early
    schedule.light(EVENTS[4], 5, now=10.0)  # a night
    assert schedule.take_due(20.0) is None
    schedule.light(EVENTS[2], 6, now=20.0)
    schedule.light(EVENTS[5], 6, now=20.0)
    assert schedule.take_due(20.1) == step
    assert schedule.take_due(20.1) is None
    assert schedule.take_due(20.25) == late
    schedule.light(EVENTS[2], 7, now=30.0)
    assert schedule.take_due(40.0) is None
