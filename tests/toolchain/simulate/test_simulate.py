"""``attune simulate``: the whole loop with a bundle's programs, under limits and through faults."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_py.bundle.adapter_forms import read_values
from runtime_py.bundle.bundle import open_bundle
from runtime_py.engine.examples import example
from runtime_py.loop.personalizer import ADAPTERS, STORE
from runtime_py.loop.presets import preset
from runtime_py.loop.store import open_store
from runtime_py.loop.stream import read_dialogues
from tests.toolchain.conftest import Attune, Exported, Said, command
from toolchain.simulate.events import DiskFilled, DiskFreed, PhoneEvent
from toolchain.simulate.life import when_there_is_room
from toolchain.simulate.life_plan import STATE
from toolchain.simulate.limits import BALLAST, DiskFull, Quota, folder_bytes
from toolchain.simulate.simulation import prepare, read_policy, simulate
from toolchain.study.batched_model import BatchedModel

STREAM = Path(__file__).parents[3] / "toolchain" / "compile" / "data" / "demo_stream.jsonl"
POLICY = {
    "selection": "attune",
    "bins": 12,
    "questions_per_day": 6,
    "paraphrases": 1,
    "paraphrase_retries": 0,
    "paraphrase_max_tokens": 8,
    "fine_tune_every_sets": 10,
    "fine_tune_memory_mb": 30,
    "epochs": 1,
    "batch": 2,
    "fewest_steps": 1,
    "learning_rate": 5e-3,
}
ODD = (  # with the text of each reply; none of it is in the demo stream
    ("polish", "Czy mógłbyś mi polecić żółty parasol?", "Zażółć gęślą jaźń, proszę."),
    ("chinese", "今天天气怎么样?", "今天晴天,最高气温二十五度。"),
    ("arabic", "كيف حالك اليوم؟ 🙂", "أنا بخير، شكرًا لك! 👨‍👩‍👧 🇵🇱"),
    ("long", "word " * 20_000, "Too long for any bin."),
)


@dataclass(frozen=True)
class SimulatedRun:
    """What ``report.json`` has, and the run's folder."""

    report: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Inputs:
    """Files for two days of ten dialogues each; every run writes a folder of its own."""

    bundle: Path
    stream: Path
    policy: Path
    scratch: Path
    tests: Path  # dialogues that stand later in the stream than any life here gets


@pytest.fixture(scope="module")
def inputs(both: Exported, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    scratch = tmp_path_factory.mktemp("simulate")
    policy = scratch / "policy.json"
    policy.write_text(json.dumps(POLICY), encoding="utf-8")
    stream = scratch / "stream.jsonl"
    _write_stream(stream)
    tests = scratch / "tests.jsonl"
    tests.write_bytes(b"".join(STREAM.read_bytes().splitlines(keepends=True)[-8:]))
    return Inputs(both.bundle, stream, policy, scratch, tests)


def in_this_process(
    inputs: Inputs,
    name: str,
    *,
    limit: int = 20,
    kills: int = 0,
    full_disk: bool = False,
    low_memory: bool = False,
) -> SimulatedRun:
    """As the command does it, without a start of the command's own process."""
    simulation = prepare(
        bundle=inputs.bundle,
        stream=inputs.stream,
        device="pixel-8",
        out=inputs.scratch / name,
        policy=inputs.policy,
        dialogues_a_day=10,
        limit=limit,
        probes=5,
        kills=kills,
        full_disk=full_disk,
        low_memory=low_memory,
    )
    outcome = simulate(simulation, lambda event: None)
    report = json.loads(json.dumps(outcome.as_json()))
    return SimulatedRun(report, inputs.scratch / name)


def _write_stream(path: Path) -> None:
    """What a log may hold: odd texts, five lines that are no dialogues, and the demo stream."""

    def line(id: str, *turns: tuple[str, str]) -> bytes:
        rows = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"id": id, "turns": rows}, ensure_ascii=False).encode()

    lines = [line(id, ("user", question), ("assistant", answer)) for id, question, answer in ODD]
    lines += [
        line("polish", ("user", "A second time?"), ("assistant", "The same id.")),
        line("roles", ("assistant", "I begin."), ("user", "No, I do.")),
        line("empty", ("user", " \n"), ("assistant", "To nothing.")),
        line("control", ("user", "A bell\a?"), ("assistant", "Yes.")),
        line("latin", ("user", "x"), ("assistant", "y")).replace(b'"x"', b'"\xe9"'),
    ]
    path.write_bytes(b"\n".join([*lines, STREAM.read_bytes()]))


@pytest.fixture(scope="module")
def straight(inputs: Inputs) -> SimulatedRun:
    """By the command, as a person calls it, with nothing that goes wrong."""
    out = inputs.scratch / "straight"
    done = command(
        "simulate",
        inputs.bundle,
        *("--stream", inputs.stream, "--policy", inputs.policy, "--limit", 20),
        *("--dialogues-a-day", 10, "--probes", 5, "--out", out, "--json"),
        *("--tests", inputs.tests),
    )
    return SimulatedRun(done.json(), out)


def test_the_loop_runs_within_the_device_s_limits(straight: SimulatedRun) -> None:
    report = straight.report
    assert report["ended"] is None
    assert report["observed"] == 20
    assert report["bad_lines"] == 5
    assert report["kept"] >= 12
    assert report["questions"] == report["answered"] == 12
    assert report["fine_tunes"] == 2
    assert 5 < report["peak_memory_mb"] < report["memory_limit_mb"] == 640
    assert report["peak_memory_mb"] < 1.3 * report["memory_estimate_mb"]
    assert report["cores"]["enforced"] == min(4, len(os.sched_getaffinity(0)))
    assert (report["faults"], report["recoveries"], report["lost"]) == (0, 0, 0)
    assert report["heldout_loss_after"] < report["heldout_loss_before"]
    assert report["modelled"]["hours"] > 0
    assert report["modelled"]["watt_hours"] > 0
    assert [place for place, _ in report["rouge1"]] == [4, 8, 12, 16, 20]
    assert report["rouge1"][0][1] == 0.0  # the question fills the context: there is no reply
    assert sum(block["observed"] for block in report["acceptance"]) == 20
    assert sum(block["kept"] for block in report["acceptance"]) == report["kept"]
    assert report["embedding"]["tokens_per_second"] > 0


def test_the_gain_on_unseen_dialogues_is_what_pytorch_says(
    straight: SimulatedRun, inputs: Inputs
) -> None:
    found = straight.report["unseen"]
    model = BatchedModel(open_bundle(inputs.bundle), torch.device("cpu"))  # plain PyTorch
    examples = [example(one, model.text, last_only=True) for one in read_dialogues(inputs.tests)]
    labels = sum(one.count for one in examples)
    with sqlite3.connect(straight.folder / STATE / STORE) as connection:
        ((name,),) = connection.execute(
            "SELECT file FROM adapters JOIN counters ON number = value "
            "WHERE name = 'active_adapter'"
        ).fetchall()
    files = {
        "against": model.bundle.adapter_file,
        "row": straight.folder / STATE / ADAPTERS / name,
    }
    for name, file in files.items():
        model.set_values(read_values(file, model.shape.tensors))
        loss = model.losses(examples).sum() / labels
        assert found["contrast"][name] == pytest.approx(loss, rel=1e-4)
    assert found["contrast"]["relative"] < -0.02
    assert found["contrast"]["relative_interval"]["high"] < 0
    assert (found["contrast"]["dialogues"], found["left_out"]) == (8, 0)
    assert "unseen dialogues" in (straight.folder / "report.html").read_text(encoding="utf-8")


def test_tests_that_the_life_observes_are_refused(inputs: Inputs) -> None:
    seen = inputs.scratch / "seen.jsonl"
    seen.write_bytes(b"".join(STREAM.read_bytes().splitlines(keepends=True)[:2]))
    out = inputs.scratch / "refused"
    done = command(
        "simulate", inputs.bundle, "--stream", inputs.stream, "--tests", seen, "--out", out
    )
    assert done.code == 2
    assert "2 of the 2 dialogues in" in done.err
    assert not out.exists()


def test_tests_that_are_all_too_long_are_refused_before_the_life(inputs: Inputs) -> None:
    long = inputs.scratch / "long.jsonl"
    turns = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "Yes."}]
    long.write_text(json.dumps({"id": "long", "turns": turns}), encoding="utf-8")
    out = inputs.scratch / "too-long"
    done = command(
        "simulate", inputs.bundle, "--stream", inputs.stream, "--tests", long, "--out", out
    )
    assert done.code == 2
    assert "the last exchange of every test is longer than" in done.err
    assert not out.exists()


def test_the_report_is_one_page_that_loads_nothing(straight: SimulatedRun) -> None:
    page = (straight.folder / "report.html").read_text(encoding="utf-8")
    assert json.loads((straight.folder / "report.json").read_text()) == straight.report

    class Reader(HTMLParser):
        seen: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append(tag)
            for name, value in attrs:
                loads = name in ("src", "href", "xlink:href", "data", "srcset")
                assert not loads or str(value).startswith("#"), (tag, name, value)

    reader = Reader()
    reader.seen = []
    reader.feed(page)
    assert reader.seen.count("svg") == 8
    assert not {"script", "link", "iframe", "img"} & set(reader.seen)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "harbour-" in page


def test_kills_and_a_full_disk_change_nothing(straight: SimulatedRun, inputs: Inputs) -> None:
    faulty = in_this_process(inputs, "faulty", kills=2, full_disk=True)
    report = faulty.report
    assert report["ended"] is None
    assert report["faults"] == report["recoveries"] == 3
    assert {fault["kind"] for fault in report["fault_list"]} == {"kill", "full_disk"}
    assert report["lost"] == 0
    assert contents(faulty.folder) == contents(straight.folder)


def test_low_memory_amid_fine_tuning_ends_in_no_crash(inputs: Inputs) -> None:
    report = in_this_process(inputs, "squeezed", limit=10, low_memory=True).report
    assert report["ended"] is None
    assert report["faults"] == report["recoveries"] == 1
    assert report["fault_list"][0]["kind"] == "low_memory"
    assert report["fault_list"][0]["how"].startswith("fine-tuning was ")
    assert report["lost"] == 0


def contents(run: Path) -> dict[str, object]:
    """Everything that a run's phone keeps: all tables of its store, and its adapters."""
    phone = run / STATE
    with sqlite3.connect(phone / STORE) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        kept: dict[str, object] = {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for (table,) in tables.fetchall()
        }
    kept["adapters/"] = {p.name: p.read_bytes() for p in sorted((phone / ADAPTERS).iterdir())}
    assert kept["adapters/"]
    return kept


# What is refused before anything runs


@pytest.fixture
def refused(attune: Attune, both: Exported, tmp_path: Path) -> Callable[..., str]:
    def said(*more: object, stream: Path = STREAM) -> str:
        out = tmp_path / "out"
        done: Said = attune("simulate", both.bundle, "--stream", stream, "--out", out, *more)
        assert done.code == 2, done.err
        assert not out.exists()
        assert not done.out
        return " ".join(done.err.split())

    return said


def test_a_policy_with_an_unknown_field(refused: Callable[..., str], tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"bins": 8, "bin": 8}', encoding="utf-8")
    said = refused("--policy", policy)
    assert f"{policy}: the policy has unknown fields: bin;" in said


def test_a_policy_that_there_is_not(refused: Callable[..., str]) -> None:
    said = refused("--policy", "dac2042")
    assert "there is no policy dac2042; expected a JSON file, or a preset: dac2024." in said


def test_a_preset_is_a_policy(both: Exported, tmp_path: Path) -> None:
    manifest = open_bundle(both.bundle).manifest
    assert read_policy(manifest, "dac2024") == preset("dac2024")
    file = tmp_path / "dac2024"
    file.write_text('{"batch": 5}', encoding="utf-8")
    assert read_policy(manifest, str(file)).batch == 5


def test_a_device_that_is_too_small(refused: Callable[..., str], tmp_path: Path) -> None:
    profiles = Path(__file__).parents[3] / "toolchain" / "simulate" / "devices"
    device = tmp_path / "small.toml"
    text = (profiles / "redmi-12c.toml").read_text(encoding="utf-8")
    device.write_text(text.replace("value = 160,", "value = 20,"), encoding="utf-8")
    said = refused("--device", device)
    assert "Xiaomi Redmi 12C cannot hold tiny: it lets an app have 20 MB" in said


def test_a_stream_without_a_usable_line(refused: Callable[..., str], tmp_path: Path) -> None:
    stream = tmp_path / "bad.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    stream.write_text(json.dumps({"id": "x", "turns": turns}) + "\n", encoding="utf-8")
    said = refused(stream=stream)
    assert "has no dialogue that can be used: line 1 of" in said
    assert "expected 'assistant'" in said


def test_a_run_is_not_written_over(attune: Attune, both: Exported, straight: SimulatedRun) -> None:
    out = straight.folder
    done = attune("simulate", both.bundle, "--stream", STREAM, "--out", out)
    assert done.code == 2
    assert "holds a run already" in " ".join(done.err.split())


def test_writes_beyond_the_quota_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "loop.sqlite")
    quota = Quota(tmp_path, 500_000, 1.0)
    quota.limit(store)
    store.execute("CREATE TABLE big (data BLOB)")
    with pytest.raises(DiskFull, match="no space is left"), store.transaction():
        store.execute("INSERT INTO big VALUES (zeroblob (900000))")
    store.close()
    assert folder_bytes(tmp_path) < 500_000
    (tmp_path / "more").write_bytes(bytes(quota.left))
    with pytest.raises(DiskFull, match=r"has 0\.00 MB left"):
        quota.check(1)


def test_room_that_came_while_the_disk_was_full_ends_nothing(tmp_path: Path) -> None:
    """Others can go between a refusal and the look at who fills the disk."""
    ballast, tries = tmp_path / BALLAST, []
    ballast.touch()
    quota = Quota(tmp_path, 0, 1.0)

    def change() -> int:
        tries.append(ballast.exists())
        if len(tries) == 1:
            ballast.unlink()
            raise DiskFull("full.")
        return 7

    events: list[PhoneEvent] = []
    store = open_store(tmp_path / "loop.sqlite")
    assert when_there_is_room(quota, store, change, events.append) == 7
    assert tries == [True, False]
    assert events == [DiskFilled(), DiskFreed()]

    def never() -> int:
        raise DiskFull("full.")

    with pytest.raises(DiskFull):
        when_there_is_room(quota, store, never, events.append)
    store.close()


def test_a_store_is_recovered_by_the_command(attune: Attune, tmp_path: Path) -> None:
    path, out = tmp_path / "loop.sqlite", tmp_path / "new.sqlite"
    open_store(path).close()
    done = attune("store", "recover", path, out, "--json")
    assert set(done.json()) == {"out", "rows", "problems"}
    again = attune("store", "recover", path, out)
    assert again.code == 2
    assert "exists already" in again.err
