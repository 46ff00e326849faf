"""Benchmarks: their arithmetic, their JSON and their refusals; never their times."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from runtime_py.bundle.bundle import open_bundle
from tests.toolchain.conftest import Attune
from toolchain.bench import generation_report, generation_speed, llama, machine, profile
from toolchain.bench.rounds import Timing, decode, interleave, prefill, ratio
from toolchain.compile.paraphrase_forms import FORMS


class _Recorder:
    """An engine that writes down what it is asked to do."""

    def __init__(self, name: str, log: list[tuple]) -> None:
        self.name, self.log = name, log

    def prefill(self, tokens: Sequence[int]) -> None:
        self.log.append((self.name, "prefill", list(tokens)))

    def step(self, token: int) -> None:
        self.log.append((self.name, "step", token))


def test_every_engine_does_the_same_work_in_turn() -> None:
    log: list[tuple] = []
    engines = {name: _Recorder(name, log) for name in ("a", "b")}
    shown: list[str] = []
    timings = interleave(engines, decode([5, 6], [7, 8]), 2, 2, shown.append)
    once = [("prefill", [5, 6]), ("step", 7), ("step", 8)]
    assert log == [(name, *call) for _ in range(3) for name in ("a", "b") for call in once]
    assert shown == ["a", "b"] * 3
    # The first round warms up.
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 2, "b": 2}
    log.clear()
    interleave(engines, prefill([1, 2, 3]), 1, 3)
    assert log == [(name, "prefill", [1, 2, 3]) for _ in range(2) for name in ("a", "b")]


def test_a_slow_round_does_not_change_the_ratio() -> None:
    # The second round ran on a busy machine, for both.
    ours, theirs = Timing((1.0, 9.0, 1.0), 10), Timing((2.0, 18.0, 2.0), 10)
    assert ratio(ours, theirs) == 2.0
    assert ours.median == 10.0
    assert ours.as_json()["slowest"] == pytest.approx(10 / 9)


def _setting(names: dict[str, str], reasons: dict[str, str]) -> generation_report.Setting:
    return generation_report.Setting("decode", "b", "8da8w", 4, 10, 2, 50, names, reasons)


def test_report_gives_ratios_for_rows_that_are_there_and_null_for_others() -> None:
    timings = {
        generation_report.BUNDLE: Timing((1.0, 1.0), 10),
        generation_report.TORCH: Timing((4.0, 4.0), 10),
        generation_report.WITHOUT: Timing((0.8, 0.8), 10),
    }
    run = generation_report.GenerationRun(1, timings, bandwidth=1000.0, neighbours=0.0)
    setting = _setting(dict.fromkeys(timings, "x"), {generation_report.LLAMA: "why"})
    value = generation_report.as_json(generation_report.GenerationReport(setting, (run, run)))
    assert value["tokens_per_second"] == 10.0
    assert value["ratio_to_torch"] == 4.0
    assert value["ratio_to_llama_cpp"] is None
    assert value["reasons"] == {"llama_cpp": "why"}
    assert value["adapter_cost"] == pytest.approx(0.25)
    assert value["memory_floor_tokens_per_second"] == 20.0
    assert value["fraction_of_memory_floor"] == 0.5
    assert len(value["runs"]) == 2


def test_profile_accounts_for_the_whole_call() -> None:
    # Three calls, the last disturbed: the faster half of them (two) is averaged.
    events = [
        profile.TraceEvent("GEMM #1", (0.2, 0.4, 9.0), True),
        profile.TraceEvent("GEMM #2", (0.1, 0.1, 9.0), True),
        profile.TraceEvent("DELEGATE_CALL", (0.6, 0.6, 9.0), False),
        profile.TraceEvent("native_call_add.out", (0.2, 0.2, 9.0), False),
        profile.TraceEvent("OPERATOR_CALL", (0.25, 0.25, 9.0), False),
        profile.TraceEvent("llama::sdpa.out", (0.1, 0.1, 9.0), False),
        profile.TraceEvent("Method::execute", (1.0, 1.0, 40.0), False),
    ]
    rows = {row.operator: row for row in profile.group(events)}
    assert rows["GEMM"].calls == 2
    assert rows["GEMM"].milliseconds == pytest.approx(0.4)
    assert rows[profile.WITHIN].milliseconds == pytest.approx(0.2)
    assert rows["add.out"].where == rows["llama::sdpa.out"].where == "kernel"
    assert rows[profile.AROUND].milliseconds == pytest.approx(0.1)
    assert sum(row.milliseconds for row in rows.values()) == pytest.approx(1.0)
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)


def test_neighbours_are_none_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "_STAT", stat)
    assert machine.OtherProcesses().cores() is None
    stat.write_text("cpu  10 0 10 500 1 0 0 0 0 0\ncpu0 1\n")
    assert machine.OtherProcesses().cores() == 0.0


def test_llama_cpp_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    reason = llama.import_llama()
    assert isinstance(reason, str)
    assert "attune-mobile[bench]" in reason


def test_decode_prints_one_object(attune: Attune, random_bundle: Path, random_source: Path) -> None:
    value = attune(
        "bench", "decode", random_bundle, "--source", random_source, "--threads", "1",
        "--tokens", "3", "--prompt-tokens", "5", "--rounds", "1", "--profile", "--adapter-cost",
        "--json",
    ).json()  # fmt: skip
    assert value["tokens_per_second"] > 0
    assert value["ratio_to_torch"] > 0
    assert value["ratio_to_llama_cpp"] is None  # a folder is no GGUF, or llama.cpp is absent
    assert set(value["reasons"]) == {"llama_cpp"}
    assert isinstance(value["adapter_cost"], float)
    assert set(value["engines"]) == {"bundle", "without_adapter", "torch"}
    assert sum(row["share"] for row in value["profile"]) == pytest.approx(1.0)
    assert {"processor", "cores"} <= set(value["machine"])


def test_prefill_says_why_rows_are_absent(attune: Attune, random_bundle: Path) -> None:
    arguments = ("bench", "prefill", random_bundle, "--threads", "1", "--prompt-tokens", "9")
    value = attune(*arguments, "--rounds", "1", "--json").json()
    assert value["ratio_to_torch"] is None
    assert value["adapter_cost"] is None
    assert set(value["reasons"]) == {"torch", "llama_cpp", "adapter_cost"}
    assert "--source" in value["reasons"]["torch"]
    shown = attune(*arguments, "--rounds", "1")
    assert shown.code == 0
    assert "no torch" in shown.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens", "500"), "do not fit"),
        (("--threads", "0"), "--threads 0"),
        (("--llama", "nothing.gguf"), "nothing.gguf"),
        (("--source", "no/such/folder/"), "no/such/folder"),
    ],
)
def test_decode_refuses(
    attune: Attune, random_bundle: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = attune("bench", "decode", random_bundle, *arguments)
    assert result.code == 2
    assert words in result.err


def test_embed_compares_with_pytorch(
    attune: Attune, random_bundle: Path, random_source: Path
) -> None:
    arguments = ("--source", random_source, "--tokens", 16, "--rounds", 3, "--threads", 1, "--json")
    (run,) = attune("bench", "embed", random_bundle, *arguments).json()["runs"]
    ours, theirs = (engine["rounds"] for engine in run["engines"].values())
    ratios = sorted(own / other for own, other in zip(ours, theirs, strict=True))
    assert run["ratio_to_torch"] == pytest.approx(ratios[1])
    assert run["tokens_per_second"] == pytest.approx(sorted(ours)[1])


def test_embed_refuses_more_than_the_program_reads(attune: Attune, random_bundle: Path) -> None:
    done = attune("bench", "embed", random_bundle, "--tokens", 100_000)
    assert done.code == 2
    assert "embed program reads" in done.err


def test_selection_is_measured_with_full_bins(attune: Attune) -> None:
    said = attune("bench", "selection", "--bins", 3, "--bins", 9, "--hidden", 8, "--json").json()
    assert [row["bins"] for row in said["rows"]] == [3, 9]
    for row in said["rows"]:
        assert 0 < row["median_ms"] <= row["slowest_ms"]
        assert 0 < row["kept"] < row["observed"]


def test_selection_refuses_an_unknown_policy(attune: Attune) -> None:
    done = attune("bench", "selection", "--policy", "best")
    assert done.code == 2
    assert "best" in done.err


def test_weights_that_a_token_reads(random_bundle: Path) -> None:
    """All of program and adapter but the int8 token table with its scales."""
    bundle = open_bundle(random_bundle)
    model, files = bundle.manifest.model, bundle.android
    both = files.lm.stat().st_size + files.adapter.stat().st_size
    assert generation_speed.weight_bytes(bundle) == both - model.vocab * (model.hidden + 4)


def test_a_bundles_yield_of_paraphrases(
    random_bundle: Path, attune: Attune, tmp_path: Path
) -> None:
    """Random weights write no paraphrase: an export finds that out, and so does the command."""
    policy = open_bundle(random_bundle).manifest.policy
    assert policy.synthesis is not None
    names = [form.name for form in FORMS]
    assert [(row.form, row.tried, row.usable) for row in policy.synthesis.measured] == [
        (name, 10, 0) for name in names
    ]
    assert (policy.synthesis.form, policy.loop["paraphrases"]) == (names[0], 0)
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the mat"}]
    data.write_text("".join(json.dumps({"id": n, "turns": turns}) + "\n" for n in "abc"))

    bench = ("bench", "synthesis", random_bundle, "--data", data, "--dialogues", 2, "--json")
    own = attune(*bench).json()["rows"]
    assert [row["form"] for row in own] == [names[0]]
    rows = attune(*bench, "--form", "brackets", "--form", "all").json()["rows"]
    assert [row["form"] for row in rows] == ["brackets", *names[:-1]]
    for row in (*own, *rows):
        assert (row["dialogues"], row["usable"], row["yield"]) == (2, 0, 0.0)
    # A prompt that fills the context of 128 tokens has no reply, and no reply is longer.
    assert {row["decoded"] for row in rows} <= set(range(2 * 128))
    said = attune(*bench, "--form", "rewrit")
    assert said.code == 2
    assert "no paraphrase form is named 'rewrit'; known: rewrite, examples" in said.err
