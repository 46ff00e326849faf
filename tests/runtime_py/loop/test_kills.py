"""Killed at random moments and started again, the loop ends where it would have ended anyway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.schedule import Moment
from tests.runtime_py.loop.toy import NIGHT, dialogue, open_toy, small_policy

LENGTH = 90


def policy_of(name: str) -> LoopPolicy:
    """A selection's, or one that asks by looking at the whole buffer."""
    if name != "asking":
        return small_policy(name)
    return replace(
        small_policy("typical"),
        asking="dual",
        ask_exchange="salient",
        asking_typical_first=4,
        asking_random_every=3,
        question_days=1,
    )


def live(folder: Path, selection: str, fuse_ms: float | None) -> None:
    """What an app does, from wherever the store is; SIGKILL after ``fuse_ms`` of it."""
    place = [0]
    policy = policy_of(selection)
    with open_toy(folder, policy, clock=lambda: Moment(place[0], place[0] // 9)) as app:
        if fuse_ms is not None:
            kill = threading.Timer(fuse_ms / 1000, os.kill, (os.getpid(), signal.SIGKILL))
            kill.daemon = True
            kill.start()
        place[0] = app.status().observed
        while True:
            for question in app.pending_questions():
                kind = place[0] % 3
                if kind < 2 or selection != "asking":  # else it may lapse
                    app.answer(question.id, f"walk to {question.reply}" if kind else None)
            app.fine_tune(NIGHT)
            if place[0] == LENGTH:
                return
            place[0] += 1
            app.observe(dialogue(place[0], exchanges=1 + place[0] % 3))


def everything(folder: Path) -> dict[str, object]:
    def read(app: Personalizer) -> dict[str, object]:
        tables = ("counters", "streams", "tallies", "sets", "questions", "annotations", "synthetic")
        found: dict[str, object] = {
            table: app.store.rows(f"SELECT * FROM {table} ORDER BY 1, 2")
            for table in (*tables, "adapters", "learnt", "jobs", "log")
        }
        found["lost"] = app.lost()
        return found

    with open_toy(folder, policy_of(folder.name)) as app:
        found = read(app)
    adapters = folder / "state" / "adapters"
    found["files"] = {path.name: path.read_bytes() for path in sorted(adapters.iterdir())}
    return found


def run_with_kills(folder: Path, selection: str, seed: int, kills: int, whole_ms: float) -> int:
    """How often the child was really killed before it was done; ``whole_ms``: what all of it takes
    here without a fault, so that fuses are short enough on any machine."""
    draw, killed = Random(seed), 0
    for number in range(kills + 1):
        fuse = draw.uniform(0, 0.5 * whole_ms) if number < kills else None
        argument = json.dumps([str(folder), selection, fuse])
        child = subprocess.run([sys.executable, "-m", __name__, argument], check=False)
        assert child.returncode in (0, -signal.SIGKILL)
        killed += child.returncode != 0
    return killed


def compare(tmp_path: Path, selection: str, runs: int) -> None:
    straight = tmp_path / "straight" / selection
    straight.mkdir(parents=True)
    since = time.monotonic()
    live(straight, selection, None)
    whole_ms = 1000 * (time.monotonic() - since)
    expected = everything(straight)
    assert expected["lost"] == ()
    assert expected["files"]
    killed = 0
    for seed in range(runs):
        folder = tmp_path / f"run{seed}" / selection
        folder.mkdir(parents=True)
        killed += run_with_kills(folder, selection, seed, 5, whole_ms)
        found = everything(folder)
        for name, rows in expected.items():
            assert found[name] == rows, f"{name} differs after the kills of seed {seed}"
    assert killed >= runs


@pytest.mark.parametrize("selection", ["paper", "attune", "asking"])
def test_kills_change_nothing(tmp_path: Path, selection: str) -> None:
    compare(tmp_path, selection, runs=1)


@pytest.mark.full
@pytest.mark.parametrize("selection", ["paper", "random", "kcenter", "attune", "asking"])
def test_many_kills_change_nothing(tmp_path: Path, selection: str) -> None:
    compare(tmp_path, selection, runs=50)


if __name__ == "__main__":
    where, name, milliseconds = json.loads(sys.argv[1])
    live(Path(where), name, milliseconds)
