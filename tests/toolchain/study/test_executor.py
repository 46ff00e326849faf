"""Tasks in processes: every outcome, a worker that is killed, a world that cannot be opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toolchain.study import fake
from toolchain.study.cells import Cell, StudyPlace
from toolchain.study.executor import DIED, Done, Failed, NoWorld, Work, run_in_processes

CELLS = [
    Cell("dolly", ordering, "trained", {"bins": bins}, {"tests": 5})
    for ordering in range(2)
    for bins in (32, 64)
]


def work_in(folder: Path) -> Work:
    return Work(fake.open_world, fake.run_cell, StudyPlace(folder, folder))


def test_one_that_is_killed_and_those_that_fail_leave_the_rest_alone(tmp_path: Path) -> None:
    (tmp_path / f"kill-{CELLS[0].key}").touch()
    (tmp_path / f"raise-{CELLS[1].key}").touch()
    (tmp_path / f"break-{CELLS[2].key}").touch()
    outcomes = {one.index: one for one in run_in_processes(work_in(tmp_path), CELLS, 2)}
    assert outcomes[0] == Failed(0, DIED, "")
    raised, broken = outcomes[1], outcomes[2]
    assert isinstance(raised, Failed)
    assert raised.sentence == "dolly has no reference."
    assert isinstance(broken, Failed)
    assert broken.sentence == "ZeroDivisionError: a fault"
    assert "fake.py" in broken.trace
    assert isinstance(outcomes[3], Done)
    assert outcomes[3].result.to_json() == fake.scored(CELLS[3]).to_json()


def test_a_world_that_cannot_be_opened_stops_all(tmp_path: Path) -> None:
    work = Work(fake.open_world, fake.run_cell, StudyPlace(tmp_path / "none", tmp_path))
    with pytest.raises(NoWorld, match="there is no bundle at"):
        list(run_in_processes(work, CELLS, 2))


def test_a_caller_that_stops_leaves_no_worker(tmp_path: Path) -> None:
    import multiprocessing

    outcomes = run_in_processes(work_in(tmp_path), CELLS, 2)
    next(outcomes)
    outcomes.close()
    assert not multiprocessing.active_children()
