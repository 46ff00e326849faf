"""Benchmarks and evaluation: their arithmetic, their JSON and their refusals; never their times."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runtime_py.bundle.bundle import open_bundle
from runtime_py.loop.errors import BundleError
from tests.tiny import tokenizer_of
from tests.toolchain.conftest import Attune
from toolchain.bench import generation_report, llama, machine, profile
from toolchain.bench.rounds import Timing, decode, interleave, prefill, ratio
from toolchain.compile.bundle_export import export
from toolchain.verify import source as sources
from toolchain.verify.evaluation import difference, perturbed_logits

CONTEXT, HIDDEN, VOCAB = 128, 128, 320
DIALOGUES = [
    [
        {"role": "user", "content": f"What is {i}?"},
        {"role": "assistant", "content": f"It is {i * i}."},
    ]
    for i in range(3)
]


def _checkpoint(folder: Path, seed: int) -> Path:
    """A random Llama of one layer with a byte-level tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of(VOCAB).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("source"), 0)


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    export(str(source), out, targets=("android",), quantize={"android": "8da8w"})
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": 0, "turns": turns}) + "\n" for turns in DIALOGUES)
    return path


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
    told: list[str] = []
    timings = interleave(engines, decode([5, 6], [7, 8]), 2, 2, told.append)
    once = [("prefill", [5, 6]), ("step", 7), ("step", 8)]
    assert log == [(name, *call) for _ in range(3) for name in ("a", "b") for call in once]
    assert told == ["a", "b"] * 3
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
    run = generation_report.Run(1, timings, bandwidth=1000.0, neighbours=0.0)
    value = generation_report.as_json(
        _setting(dict.fromkeys(timings, "x"), {generation_report.LLAMA: "why"}), [run, run]
    )
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
        profile.Event("GEMM #1", (0.2, 0.4, 9.0), True),
        profile.Event("GEMM #2", (0.1, 0.1, 9.0), True),
        profile.Event("DELEGATE_CALL", (0.6, 0.6, 9.0), False),
        profile.Event("native_call_add.out", (0.2, 0.2, 9.0), False),
        profile.Event("OPERATOR_CALL", (0.25, 0.25, 9.0), False),
        profile.Event("llama::sdpa.out", (0.1, 0.1, 9.0), False),
        profile.Event("Method::execute", (1.0, 1.0, 40.0), False),
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
    assert machine.Neighbours().cores() is None
    stat.write_text("cpu  10 0 10 500 1 0 0 0 0 0\ncpu0 1\n")
    assert machine.Neighbours().cores() == 0.0


def test_llama_cpp_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    reason = llama.import_llama()
    assert isinstance(reason, str)
    assert "attune-mobile[bench]" in reason


def test_decode_prints_one_object(attune: Attune, bundle: Path, source: Path) -> None:
    value = attune(
        "bench", "decode", bundle, "--source", source, "--threads", "1", "--tokens", "3",
        "--prompt-tokens", "5", "--rounds", "1", "--profile", "--adapter-cost", "--json",
    ).json()  # fmt: skip
    assert value["tokens_per_second"] > 0
    assert value["ratio_to_torch"] > 0
    assert value["ratio_to_llama_cpp"] is None  # a folder is no GGUF, or llama.cpp is absent
    assert set(value["reasons"]) == {"llama_cpp"}
    assert isinstance(value["adapter_cost"], float)
    assert set(value["engines"]) == {"bundle", "without_adapter", "torch"}
    assert sum(row["share"] for row in value["profile"]) == pytest.approx(1.0)
    assert {"processor", "cores"} <= set(value["machine"])


def test_prefill_says_why_rows_are_absent(attune: Attune, bundle: Path) -> None:
    arguments = ("bench", "prefill", bundle, "--threads", "1", "--prompt-tokens", "9")
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
    attune: Attune, bundle: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = attune("bench", "decode", bundle, *arguments)
    assert result.code == 2
    assert words in result.err


def test_embed_compares_with_pytorch(attune: Attune, bundle: Path, source: Path) -> None:
    arguments = ("--source", source, "--tokens", 16, "--rounds", 3, "--threads", 1, "--json")
    (run,) = attune("bench", "embed", bundle, *arguments).json()["runs"]
    ours, theirs = (engine["rounds"] for engine in run["engines"].values())
    ratios = sorted(own / other for own, other in zip(ours, theirs, strict=True))
    assert run["ratio_to_torch"] == pytest.approx(ratios[1])
    assert run["tokens_per_second"] == pytest.approx(sorted(ours)[1])


def test_embed_refuses_more_than_the_program_reads(attune: Attune, bundle: Path) -> None:
    done = attune("bench", "embed", bundle, "--tokens", 100_000)
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


def test_another_model_is_not_the_source(bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(bundle).manifest
    with pytest.raises(BundleError, match="not the model that this bundle was made from"):
        sources.find_source(manifest, str(_checkpoint(tmp_path / "other", 1)))
    with pytest.raises(BundleError, match="not the model"):
        sources.find_source(manifest, "tiny")


def test_quantizing_again_gives_the_weights_of_the_bundle(bundle: Path, source: Path) -> None:
    manifest = open_bundle(bundle).manifest
    found = sources.find_source(manifest, str(source))
    assert not isinstance(found, str)
    model = sources.as_in_bundle(sources.float_model(manifest, found), manifest, found)
    files = open_bundle(bundle).android
    blob = files.lm.read_bytes()
    for tensor in (model.table.q, model.head.q, *(b.q for b in model.blocks[0].qkv.bases)):
        assert tensor.numpy().tobytes() in blob
    table = VOCAB * (HIDDEN + 4)
    both = files.lm.stat().st_size + files.adapter.stat().st_size
    assert sources.weight_bytes(open_bundle(bundle)) == both - table


def test_evaluate_compares_with_pytorch(
    attune: Attune, bundle: Path, source: Path, data: Path
) -> None:
    arguments = ("evaluate", bundle, "--data", data, "--source", source, "--threads", "1")
    value = attune(*arguments, "--json").json()
    assert value["within_1_percent"]
    assert value["dialogues"] == len(DIALOGUES)
    assert value["perplexity"]["pytorch_float32"] != value["perplexity"]["pytorch_same_weights"]
    assert value["first_dialogue"]["rms"] < 0.05
    assert 0 <= value["noise_floor"]["rms"] < 0.05
    assert "within 1 %" in attune(*arguments, "--dialogues", "2").out
    alone = attune(*arguments, "--dialogues", "1")
    assert alone.code == 2
    assert "two different dialogues" in alone.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no dialogues"),
        ("{", "not JSON Lines"),
        ('{"turns": [{"role": "user"}]}\n', "line 1"),
        (None, "there is no file"),
    ],
)
def test_evaluate_refuses_data(
    attune: Attune, bundle: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "d.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    result = attune("evaluate", bundle, "--data", path)
    assert result.code == 2
    assert words in result.err


def test_evaluate_needs_the_source(attune: Attune, bundle: Path, data: Path) -> None:
    result = attune("evaluate", bundle, "--data", data)
    assert result.code == 2
    assert "--source" in result.err


def test_difference_against_a_closed_form() -> None:
    expected = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    found = expected + torch.tensor([[[0.0, 0.0], [4.5, 0.0]]])
    gap = difference(found, expected)
    assert gap.largest == pytest.approx(4.5 / 4)
    assert gap.rms == pytest.approx(4.5 / 5)
    assert gap.same_token == 0.5


@torch.no_grad()
def test_perturbation_is_small_and_leaves_the_model_alone(bundle: Path, source: Path) -> None:
    manifest = open_bundle(bundle).manifest
    found = sources.find_source(manifest, str(source))
    assert not isinstance(found, str)
    model = sources.float_model(manifest, found)
    tokens = torch.arange(20)[None]
    before = model(tokens)
    changed = perturbed_logits(model, tokens, 0)
    assert 0 < difference(changed, before).largest < 1e-5  # nothing is rounded to int8 here
    assert torch.equal(model(tokens), before)
