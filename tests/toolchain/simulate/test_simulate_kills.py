"""Two hundred lives of the built-in model with five kills each end as one without any."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.toolchain.conftest import Exported
from tests.toolchain.simulate.test_simulate import POLICY, STREAM, TABLES
from toolchain.simulate.life import STATE, Life, Phone

RUNS, KILLS = 200, 5


def live(life: Life) -> None:
    """Forked from a server that has imported everything, so that a start takes no seconds."""
    from runtime_py.bundle.bundle import open_bundle

    with Phone(life, open_bundle(Path(life.bundle)), _unheard) as phone:
        phone.live()


def _unheard(event: dict[str, Any]) -> None:
    pass


def _life(bundle: Path, folder: Path) -> Life:
    (folder / STATE).mkdir(parents=True)
    return Life(
        bundle=str(bundle),
        stream=str(STREAM),
        folder=str(folder),
        device="pixel-8",
        policy=POLICY,
        lexicons=None,
        places=20,
        dialogues_a_day=10,
        answer_rate=1.0,
        seed=0,
        probes=0,
        model_replies=False,
        threads=1,
        lean=False,
    )


def _contents(folder: Path) -> dict[str, object]:
    phone = folder / STATE
    with sqlite3.connect(phone / "loop.sqlite") as connection:
        found: dict[str, object] = {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in TABLES
        }
    found["adapters/"] = {p.name: p.read_bytes() for p in sorted((phone / "adapters").iterdir())}
    return found


@pytest.mark.full
def test_many_kills_change_nothing(both: Exported, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "toolchain.simulate.life"])

    def process(life: Life) -> Any:
        child = context.Process(target=live, args=(life,))
        child.start()
        return child

    straight = _life(both.bundle, tmp_path / "straight")
    for folder in ("warm", "straight"):  # the first one starts the server
        life = straight if folder == "straight" else _life(both.bundle, tmp_path / folder)
        begun = time.monotonic()
        child = process(life)
        child.join()
        assert child.exitcode == 0
    whole = time.monotonic() - begun
    expected = _contents(tmp_path / "straight")
    assert expected["adapters/"]
    killed = 0
    for seed in range(RUNS):
        draw, folder = Random(seed), tmp_path / f"run{seed}"
        life = _life(both.bundle, folder)
        for _ in range(KILLS):
            child = process(life)
            child.join(draw.uniform(0, 0.7 * whole))
            killed += child.exitcode is None
            child.kill()
            child.join()
        child = process(life)
        child.join()
        assert child.exitcode == 0
        found = _contents(folder)
        for name, rows in expected.items():
            assert found[name] == rows, f"{name} differs after the kills of seed {seed}"
    assert killed >= 2 * RUNS
