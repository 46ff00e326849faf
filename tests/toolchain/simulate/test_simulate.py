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

from runtime_py.loop.store import open_store
from tests.toolchain.conftest import Attune, Exported, Said, command
from toolchain.simulate.limits import DiskFull, Quota, folder_bytes

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
    "learning_rate": 5e-3,
}
ODD = (  # with the text of each reply; none of it is in the demo stream
    ("polish", "Czy mógłbyś mi polecić żółty parasol?", "Zażółć gęślą jaźń, proszę."),
    ("chinese", "今天天气怎么样?", "今天晴天,最高气温二十五度。"),
    ("arabic", "كيف حالك اليوم؟ 🙂", "أنا بخير، شكرًا لك! 👨‍👩‍👧 🇵🇱"),
    ("long", "word " * 20_000, "Too long for any bin."),
)
TABLES = (
    "counters",
    "streams",
    "sets",
    "questions",
    "annotations",
    "synthetic",
    "adapters",
    "learnt",
    "jobs",
    "log",
)


@dataclass(frozen=True)
class Run:
    said: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def run(both: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Two days of ten dialogues each, with what is asked for besides."""
    scratch = tmp_path_factory.mktemp("simulate")
    policy = scratch / "policy.json"
    policy.write_text(json.dumps(POLICY), encoding="utf-8")
    stream = scratch / "stream.jsonl"
    _write_stream(stream)

    def simulated(name: str, *more: object) -> Run:
        out = scratch / name
        said = command(
            "simulate",
            both.bundle,
            *("--stream", stream, "--policy", policy, "--limit", 20, "--dialogues-a-day", 10),
            *("--probes", 4, "--out", out, "--json"),
            *more,
        )
        return Run(said.json(), out)

    return simulated


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
def straight(run: Callable[..., Run]) -> Run:
    return run("straight")


def test_the_loop_runs_within_the_device_s_limits(straight: Run) -> None:
    said = straight.said
    assert said["ended"] is None
    assert said["observed"] == 20
    assert said["bad_lines"] == 5
    assert said["kept"] >= 12
    assert said["questions"] == said["answered"] == 12
    assert said["fine_tunes"] == 2
    assert 5 < said["peak_memory_mb"] < said["memory_limit_mb"] == 640
    assert said["peak_memory_mb"] < 1.3 * said["memory_estimate_mb"]
    assert said["cores"]["enforced"] == min(4, len(os.sched_getaffinity(0)))
    assert (said["faults"], said["recoveries"], said["lost"]) == (0, 0, 0)
    assert said["heldout_loss_after"] < said["heldout_loss_before"]
    assert said["modelled"]["hours"] > 0
    assert said["modelled"]["watt_hours"] > 0
    assert len(said["rouge1"]) == 4
    assert sum(block["observed"] for block in said["acceptance"]) == 20
    assert sum(block["kept"] for block in said["acceptance"]) == said["kept"]
    assert said["embedding"]["tokens_per_second"] > 0


def test_the_report_is_one_page_that_loads_nothing(straight: Run) -> None:
    page = (straight.folder / "report.html").read_text(encoding="utf-8")
    assert json.loads((straight.folder / "report.json").read_text()) == straight.said

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


def test_kills_and_a_full_disk_change_nothing(straight: Run, run: Callable[..., Run]) -> None:
    faulty = run("faulty", "--faults", 2, "--full-disk")
    said = faulty.said
    assert said["ended"] is None
    assert said["faults"] == said["recoveries"] == 3
    assert {fault["kind"] for fault in said["fault_list"]} == {"kill", "full_disk"}
    assert said["lost"] == 0
    assert _contents(faulty) == _contents(straight)


def test_low_memory_amid_fine_tuning_ends_in_no_crash(run: Callable[..., Run]) -> None:
    said = run("squeezed", "--low-memory", "--limit", 10).said
    assert said["ended"] is None
    assert said["faults"] == said["recoveries"] == 1
    assert said["fault_list"][0]["kind"] == "low_memory"
    assert said["fault_list"][0]["how"].startswith("fine-tuning was ")
    assert said["lost"] == 0


def _contents(run: Run) -> dict[str, object]:
    phone = run.folder / "phone"
    with sqlite3.connect(phone / "loop.sqlite") as connection:
        found: dict[str, object] = {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in TABLES
        }
    found["adapters/"] = {p.name: p.read_bytes() for p in sorted((phone / "adapters").iterdir())}
    assert found["adapters/"]
    return found


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


def test_a_run_is_not_written_over(attune: Attune, both: Exported, straight: Run) -> None:
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


def test_a_store_is_recovered_by_the_command(attune: Attune, tmp_path: Path) -> None:
    path, out = tmp_path / "loop.sqlite", tmp_path / "new.sqlite"
    open_store(path).close()
    done = attune("store", "recover", path, out, "--json")
    assert set(done.json()) == {"out", "rows", "problems"}
    again = attune("store", "recover", path, out)
    assert again.code == 2
    assert "exists already" in again.err
