"""Ray on this machine: the same bytes as processes, and addresses that do not answer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from runtime_py.loop.errors import LoopError
from tests.toolchain.study import fake
from tests.toolchain.study.test_executor import CELLS, work_in
from toolchain.study.cells import StudyPlace
from toolchain.study.executor import DIED, Done, Failed, NoWorld, Work
from toolchain.study.ray_executor import run_on_ray

pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.mark.full
def test_the_same_outcomes_on_a_local_cluster(tmp_path: Path) -> None:
    (tmp_path / f"kill-{CELLS[0].key}").touch()
    (tmp_path / f"raise-{CELLS[1].key}").touch()
    outcomes = {one.index: one for one in run_on_ray(work_in(tmp_path), CELLS, "local", 2)}
    died, raised = outcomes[0], outcomes[1]
    assert isinstance(died, Failed)
    assert died.sentence == DIED
    assert isinstance(raised, Failed)
    assert raised.sentence == "dolly has no reference."
    for index in (2, 3):
        done = outcomes[index]
        assert isinstance(done, Done)
        assert done.result.to_json() == fake.scored(CELLS[index]).to_json()
    missing = Work(fake.open_world, fake.run_cell, StudyPlace(tmp_path / "none", tmp_path))
    with pytest.raises(NoWorld, match="there is no bundle at"):
        list(run_on_ray(missing, CELLS, "local", 1))


def test_an_address_that_does_not_answer_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "nowhere", "host:port"):
            with pytest.raises(LoopError, match=f"no Ray cluster answers at '{address}'"):
                list(run_on_ray(work_in(tmp_path), CELLS, address, 1))
