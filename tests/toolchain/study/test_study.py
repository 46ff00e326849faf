"""``attune study`` with a world that costs nothing: resumed, repeated, refused, reported."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime_py.loop.errors import LoopError
from tests.toolchain.conftest import Attune
from tests.toolchain.study import fake
from toolchain.study import sources
from toolchain.study.cells import Cell, StudyPlace
from toolchain.study.grid import cells_of
from toolchain.study.plan import read_plan
from toolchain.study.results import open_folder

PLAN = """
about = "a trial"
streams = ["toy"]
orderings = 2
[options]
observed = 40
tests = 10
rows = "all"
[primary]
row = "better"
against = "random"
streams = ["toy"]
[[secondary]]
against = "base"
[rows.base]
row = "base"
[rows.better]
policy = { selection = "attune" }
[rows.random]
policy = { selection = "random" }
[[vary]]
rows = ["random"]
options = { answers = [16, 32] }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan, a bundle by its manifest alone, sixty dialogues, and a measurement by ``fake``."""
    monkeypatch.setitem(sys.modules, "toolchain.study.cell", fake)
    monkeypatch.setitem(sys.modules, "toolchain.study.world", fake)
    monkeypatch.setattr(sources, "open_bundle", lambda path: None)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "trial.toml").write_text(PLAN)
    (tmp_path / "data").mkdir()
    write_dialogues(tmp_path / "data" / "toy.jsonl", 60)
    return tmp_path


def write_dialogues(path: Path, count: int, reply: str = "assistant") -> None:
    rows = [
        {
            "id": f"toy-{i}",
            "turns": [
                {"role": "user", "content": f"What is number {i}?"},
                {"role": reply, "content": f"It is {i}, {i * i} squared."},
            ],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder: Path, out: str, *more: object) -> list[object]:
    paths = {"--plan": "trial.toml", "--data": "data", "--out": out}
    given = [part for name, path in paths.items() for part in (name, folder / path)]
    return ["study", folder / "bundle", *given, *more]


def wait_for_the_end_of(process: int) -> None:
    """``fake`` tells its process as the seconds."""
    for _ in range(100):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"the worker {process} lives on without its parent")


def planned_cells(folder: Path) -> list[Cell]:
    return [one.cell for one in cells_of(read_plan(str(folder / "trial.toml")))]


def written(folder: Path) -> dict[str, bytes]:
    """All that two runs must have alike."""
    files = [folder / "study.json", *sorted((folder / "cells").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def test_two_workers_leave_the_bytes_of_one_and_of_an_interrupted_run(
    folder: Path, attune: Attune
) -> None:
    report = attune(*arguments(folder, "one", "--json")).json()
    attune(*arguments(folder, "two", "--jobs", 2))
    first = attune(*arguments(folder, "three", "--limit", 3, "--json")).json()
    attune(*arguments(folder, "three", "--jobs", 2, "--json"))
    assert first["missing"] == report["cells"] - 3 == 7
    assert len(written(folder / "one")) == 11
    assert written(folder / "one") == written(folder / "two") == written(folder / "three")
    assert (folder / "one/report.json").read_bytes() == (folder / "two/report.json").read_bytes()
    assert (folder / "one/report.html").read_bytes() == (folder / "three/report.html").read_bytes()


def test_what_is_there_is_not_measured_again(folder: Path, attune: Attune) -> None:
    attune(*arguments(folder, "out", "--json"))
    times = {p: p.stat().st_mtime_ns for p in (folder / "out/cells").iterdir()}
    for cell in planned_cells(folder):  # whoever ran would fail
        (folder / "data" / f"raise-{cell.key}").touch()
    said = attune(*arguments(folder, "out"))
    assert said.code == 0
    assert "10 cells, 10 there, 0 to be measured now" in said.err
    assert {p: p.stat().st_mtime_ns for p in (folder / "out/cells").iterdir()} == times


def test_it_goes_on_after_a_kill_of_the_whole_process(folder: Path, attune: Attune) -> None:
    """The command's process is killed once two cells are there; its worker ends with it."""
    place = StudyPlace(folder / "bundle", folder / "data")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.toolchain.study import fake\n"
        "from toolchain.study import sources, study_run\n"
        "from toolchain.study.cells import StudyPlace\n"
        "from toolchain.study.plan import read_plan\n"
        "sources.open_bundle = lambda path: None\n"
        f"place = StudyPlace(Path({str(place.bundle)!r}), Path({str(place.data)!r}))\n"
        f"plan = read_plan({str(folder / 'trial.toml')!r})\n"
        f"opened = study_run.prepare(plan, place, Path({str(folder / 'killed')!r}))\n"
        "def told(outcome):\n"
        "    if len(opened.done) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "study_run.run(opened, opened.missing, study_run.Crew(), place, fake.open_world, "
        "fake.run_cell, told)\n"
    )
    root = Path(__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(written(folder / "killed")) == 3
    measured = (folder / "killed/measured").iterdir()
    (worker,) = {int(json.loads(file.read_bytes())["seconds"]) for file in measured}
    wait_for_the_end_of(worker)
    attune(*arguments(folder, "killed", "--json"))
    attune(*arguments(folder, "whole", "--json"))
    assert written(folder / "killed") == written(folder / "whole")


def test_a_worker_that_is_killed_costs_its_cell_alone(folder: Path, attune: Attune) -> None:
    cells = planned_cells(folder)
    (folder / "data" / f"kill-{cells[0].key}").touch()
    (folder / "data" / f"break-{cells[1].key}").touch()
    said = attune(*arguments(folder, "out", "--jobs", 2))
    assert said.code == 1
    assert "failed: base @ toy #0: its worker ended without a word" in said.err
    assert "failed: better @ toy #0: ZeroDivisionError: a fault" in said.err
    assert "2 of 10 cells are missing" in said.out
    assert "ZeroDivisionError" in (folder / "out/failed" / f"{cells[1].key}.txt").read_text()
    (folder / "data" / f"break-{cells[1].key}").unlink()
    assert attune(*arguments(folder, "out", "--json")).json()["missing"] == 0
    assert not list((folder / "out/failed").iterdir())


def test_damaged_cells_are_told_and_measured_anew(folder: Path, attune: Attune) -> None:
    attune(*arguments(folder, "out", "--json"))
    before = written(folder / "out")
    files = sorted((folder / "out/cells").iterdir())
    swapped, blank = files[4].read_bytes(), files[5].read_bytes().replace(b":", b": ", 1)
    for file, text in zip(
        files, (b"", b"{", b'{"cell": 1}', swapped, b"null", blank), strict=False
    ):
        file.write_bytes(text)
    said = attune(*arguments(folder, "out"))
    assert said.code == 0
    for file in files[:6]:
        assert f"damaged, measured anew: {file}" in said.err
    assert said.err.count("damaged, measured anew:") == 6
    assert written(folder / "out") == before


def test_another_configuration_is_refused_with_the_difference(folder: Path, attune: Attune) -> None:
    attune(*arguments(folder, "out", "--json", "--limit", 1))
    before = written(folder / "out")
    (folder / "bundle/manifest.json").write_text('{"other": 1}')
    said = attune(*arguments(folder, "out", "--threads", 2))
    assert said.code == 2
    assert "holds a study of another configuration: bundle was" in said.err
    assert "threads was 1, is 2" in said.err
    assert written(folder / "out") == before
    (folder / "bundle/manifest.json").write_text("{}")
    text = PLAN.replace('against = "random"', 'against = "base"', 1)
    (folder / "trial.toml").write_text(text)
    said = attune(*arguments(folder, "out"))
    assert said.code == 2
    assert 'plan.primary.against was "random", is "base"' in said.err


def test_a_plan_may_grow(folder: Path, attune: Attune) -> None:
    attune(*arguments(folder, "out", "--json"))
    (folder / "trial.toml").write_text(PLAN + '[rows.fifo]\npolicy = { selection = "fifo" }\n')
    said = attune(*arguments(folder, "out"))
    assert "12 cells, 10 there, 2 to be measured now" in said.err
    write_dialogues(folder / "data" / "more.jsonl", 60)
    text = PLAN.replace('streams = ["toy"]', 'streams = ["toy", "more"]', 1)
    (folder / "trial.toml").write_text(text)
    said = attune(*arguments(folder, "out", "--markdown", folder / "t.md"))
    assert "20 cells, 10 there, 10 to be measured now" in said.err
    markdown = (folder / "t.md").read_text()
    points = re.findall(r"\(([+−][\d.]+(?:, [+−][\d.]+)+)\)", markdown)
    assert points  # of two orderings each, least first
    for each in points:
        numbers = [float(one.replace("−", "-")) for one in each.split(", ")]
        assert numbers == sorted(numbers)
    overview = markdown.split("**Held-out loss, change to base**")[1]
    head, _, better = overview.strip().splitlines()[:3]
    assert head == "| row | toy | more |"
    label, *changes = better.strip("|").split("|")
    assert label.strip() == "better"
    for change in changes:  # as ``fake`` makes it
        assert float(change.split("%")[0].replace("−", "-")) == pytest.approx(-12, abs=1)
    (folder / "trial.toml").write_text(PLAN)  # the first stream alone: the other's data stay known
    assert "10 cells, 10 there" in attune(*arguments(folder, "out")).err
    write_dialogues(folder / "data" / "more.jsonl", 70)
    (folder / "trial.toml").write_text(text)
    said = attune(*arguments(folder, "out"))
    assert (said.code, "another configuration: data.more.jsonl was" in said.err) == (2, True)


def test_only_what_is_asked_for(folder: Path, attune: Attune) -> None:
    report = attune(*arguments(folder, "out", "--json", "--only", "^random.*#1$")).json()
    assert report["missing"] == 7
    assert {line["label"] for line in report["lines"]} == {
        "random", "random, answers 16", "random, answers 32",
    }  # fmt: skip
    said = attune(*arguments(folder, "out", "--only", "randm"))
    assert said.code == 2
    assert "matches no cell of the plan; the first is 'base @ toy #0'" in said.err
    said = attune(*arguments(folder, "out", "--only", "("))
    assert "is no regular expression" in said.err


def test_the_report_tells_what_the_cells_say(folder: Path, attune: Attune) -> None:
    (folder / "trial.toml").write_text(PLAN.replace("orderings = 2", "orderings = 5"))
    report = attune(*arguments(folder, "out", "--json", "--markdown", folder / "t.md")).json()
    lines = {line["label"]: line for line in report["lines"]}
    cells = [c for c in planned_cells(folder) if c.row == "base"]
    scores = [fake.scored(cell).scores for cell in cells]
    nats = sum(sum(one.loss) for one in scores)
    labels = sum(sum(one.labels) for one in scores)
    assert lines["base"]["values"]["loss"] == pytest.approx(nats / labels)
    rouge = [value for one in scores for value in one.rouge1]
    assert lines["base"]["values"]["rouge1"] == pytest.approx(sum(rouge) / len(rouge))
    loss = lines["better"]["to_baseline"]["loss"]
    assert loss["relative"] == pytest.approx(-0.12, abs=0.01)  # as ``fake`` makes it
    assert loss["relative_interval"]["low"] < loss["relative"] < loss["relative_interval"]["high"]
    assert report["primary"]["contrast"]["dialogues"] == 10
    assert {one["label"] for one in report["secondary"]} == {"better", "random"}
    assert all(one["corrected"] >= one["contrast"]["p"] for one in report["secondary"])
    page = (folder / "out/report.html").read_text()
    for text in ("Gain by row", "Learning curves", "Quality against its cost", "better − random",
                 "Fixed beforehand", "EOE", "IDD"):  # fmt: skip
        assert text in page
    assert "cells are missing" not in page
    markdown = (folder / "t.md").read_text()
    assert "| better − random (primary) | toy | held-out loss | 10 |" in markdown
    change = f"−{-100 * loss['relative']:.1f} % ["
    shown = f"| better | 5 | {lines['better']['values']['loss']:.3f} | {change}"
    assert shown in markdown
    assert "![Gain by row](t-gain-by-row.svg)" in markdown
    assert ">better</text>" in (folder / "t-gain-by-row.svg").read_text()


def test_a_report_of_a_part_says_what_is_missing(folder: Path, attune: Attune) -> None:
    attune(*arguments(folder, "out", "--json", "--limit", 2))
    said = attune("study", "nowhere", "--out", folder / "out", "--report-only")
    assert said.code == 0, said.err
    assert "8 of 10 cells are missing" in said.out
    page = (folder / "out/report.html").read_text()
    assert "8 of 10 cells are missing" in page
    assert "Not measured yet." in page


def test_a_substitute_is_called_one(folder: Path, attune: Attune) -> None:
    (folder / "data/toy.jsonl").rename(folder / "data/meddialog_sub.jsonl")
    (folder / "trial.toml").write_text(PLAN.replace('"toy"', '"meddialog_sub"'))
    said = attune(*arguments(folder, "out"))
    assert "meddialog_sub (a substitute)" in said.out
    assert "meddialog_sub stand for corpora" in (folder / "out/report.html").read_text()


def test_data_that_does_not_do(folder: Path, attune: Attune) -> None:
    write_dialogues(folder / "data/toy.jsonl", 45)
    said = attune(*arguments(folder, "out"))
    assert said.code == 2
    assert "toy.jsonl has 35 dialogues beside the tests, 40 are wanted" in said.err
    write_dialogues(folder / "data/toy.jsonl", 60, reply="user")
    said = attune(*arguments(folder, "out"))
    assert said.code == 2
    assert "60" in said.err
    (folder / "trial.toml").write_text(PLAN.replace('["toy"]', '["troy"]'))
    said = attune(*arguments(folder, "out"))
    assert said.code == 2
    assert "there is no stream troy; there are the recipes" in said.err
    assert not (folder / "out").exists()


def test_no_cuda_and_no_study_are_sentences(
    folder: Path, attune: Attune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = attune(*arguments(folder, "out", "--device", "cuda"))
    assert (said.code, "PyTorch finds no CUDA here" in said.err) == (2, True)
    said = attune("study", folder / "bundle", "--out", folder / "none", "--report-only")
    assert (said.code, "there is no study in" in said.err) == (2, True)
    said = attune("study", folder / "bundle", "--out", folder / "out")
    assert (said.code, "by --data" in said.err) == (2, True)
    said = attune(*arguments(folder, "out", "--ray", "nowhere"))
    assert said.code == 2
    assert not (folder / "out").exists()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").touch()
    said = attune(*arguments(folder, "full"))
    assert (said.code, "has files and no study.json" in said.err) == (2, True)


def test_a_folder_that_is_damaged_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(LoopError, match="is damaged"):
        open_folder(tmp_path, {}, {})
