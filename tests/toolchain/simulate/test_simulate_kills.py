"""Two hundred lives of the built-in model with five kills each end as one without any."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from runtime_py.loop.policy import LoopPolicy
from tests.toolchain.conftest import Exported
from tests.toolchain.simulate.test_simulate import POLICY, STREAM, contents
from toolchain.simulate.device import find_device
from toolchain.simulate.events import PhoneEvent
from toolchain.simulate.life import Phone
from toolchain.simulate.life_plan import LifePlan

RUNS, KILLS = 200, 5


def live(plan: LifePlan) -> None:
    """Forked from a server that has imported everything, so that a start takes no seconds."""
    from runtime_py.bundle.bundle import open_bundle

    with Phone(plan, open_bundle(plan.bundle), _ignore) as phone:
        phone.live()


def _ignore(event: PhoneEvent) -> None:
    pass


def _plan(bundle: Path, folder: Path) -> LifePlan:
    pixel = find_device("pixel-8")
    plan = LifePlan(
        bundle=bundle,
        stream=STREAM,
        folder=folder,
        device=replace(pixel, rhythm=replace(pixel.rhythm, dialogues=10)),
        policy=LoopPolicy.from_fields(POLICY),
        lexicons=None,
        places=20,
        answer_rate=1.0,
        seed=0,
        probes=0,
        model_replies=False,
        threads=1,
        lean=False,
    )
    plan.state.mkdir(parents=True)
    return plan


@pytest.mark.full
def test_many_kills_change_nothing(both: Exported, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "toolchain.simulate.life"])

    def process(plan: LifePlan) -> Any:
        child = context.Process(target=live, args=(plan,))
        child.start()
        return child

    straight = _plan(both.bundle, tmp_path / "straight")
    for folder in ("warm", "straight"):  # the first one starts the server
        plan = straight if folder == "straight" else _plan(both.bundle, tmp_path / folder)
        begun = time.monotonic()
        child = process(plan)
        child.join()
        assert child.exitcode == 0
    whole = time.monotonic() - begun
    expected = contents(tmp_path / "straight")
    assert expected["adapters/"]
    killed = 0
    for seed in range(RUNS):
        draw, folder = Random(seed), tmp_path / f"run{seed}"
        plan = _plan(both.bundle, folder)
        for _ in range(KILLS):
            child = process(plan)
            child.join(draw.uniform(0, 0.7 * whole))
            killed += child.exitcode is None
            child.kill()
            child.join()
        child = process(plan)
        child.join()
        assert child.exitcode == 0
        left = contents(folder)
        for name, rows in expected.items():
            assert left[name] == rows, f"{name} differs after the kills of seed {seed}"
    assert killed >= 2 * RUNS
