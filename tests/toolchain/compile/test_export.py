"""The built-in model through the real command line, and what is made of it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimum.commands import optimum_cli
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from exporters.coreml.multifunction import read_signatures
from exporters.model.spec import read_spec
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.manifest import CHECKSUM, MANIFEST, Manifest
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.stock_runner import StockRunner
from runtime_py.loop.dialogue import Turn
from runtime_py.loop.errors import BundleError
from tests import tiny
from tests.bounds import loss_bound
from tests.toolchain.conftest import Attune, Exported, command
from toolchain import defaults
from toolchain.compile import bundle_export
from toolchain.compile.export_input import builtin_folder
from toolchain.compile.export_job import Progress
from toolchain.compile.precision import ANDROID, WORST_RATIO
from toolchain.compile.tolerances import model_terms, rounding
from toolchain.report.console import output
from toolchain.simulate import short_life
from toolchain.verify.parity import ladder

PROMPTS = ["I am looking for a restaurant in San Jose.", "Hi! How are you?", "Where is it — 7?"]
COUNT = 24  # tokens of a reply


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        builtin_folder(), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_folder())


@torch.no_grad()
def greedy(model: torch.nn.Module, tokenizer, prompt: str, count: int = COUNT) -> str:
    """What transformers answers, up to the end of the reply."""
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# The bundle


def test_the_bundle_is_whole(both: Exported) -> None:
    assert both.beside == ["tiny"], "something was left beside the bundle"
    manifest = open_bundle(both.bundle).manifest
    names = {file.path for file in manifest.files}
    assert names >= {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "android/adapter.ptd",
        "android/lm.pte",
        "ios/model.mlpackage/Manifest.json",
        "tokenizer.json",
    }
    assert not [n for n in names if n.endswith((".part", ".tmp", ".old", ".pkl", ".pt"))]
    assert not list(both.bundle.rglob("trial.ptd"))


def test_the_bundle_speaks_of_its_model(both: Exported, reference: PreTrainedModel) -> None:
    manifest, config = open_bundle(both.bundle).manifest, reference.config
    model = manifest.model
    assert (model.architecture, model.vocab) == (config.model_type, config.vocab_size)
    assert (model.hidden, model.layers) == (config.hidden_size, config.num_hidden_layers)
    assert model.context == config.max_position_embeddings
    assert model.parameters == sum(p.numel() for p in reference.parameters())
    digest = hashlib.sha256((builtin_folder() / "model.safetensors").read_bytes()).hexdigest()
    assert digest in model.source
    assert config.eos_token_id in manifest.tokenizer.eos_ids


def test_inspect_json(both: Exported, attune: Attune, reference: PreTrainedModel) -> None:
    value = attune("inspect", both.bundle, "--json").json()
    on_disk = {
        p.relative_to(both.bundle).as_posix(): p for p in both.bundle.rglob("*") if p.is_file()
    }
    listed = {file["path"]: file for file in value["files"]}
    assert listed.keys() == on_disk.keys() - {MANIFEST, CHECKSUM}
    for name, file in listed.items():
        data = on_disk[name].read_bytes()
        assert file["bytes"] == len(data)
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
    programs = {(p["target"], p["name"]): p for p in value["programs"]}
    assert programs.keys() >= {
        *(("android", name) for name in ("forward", "embed")),
        *(("ios", name) for name in ("prefill", "decode", "embed")),
    }
    for program in programs.values():
        assert {"name", "inputs", "outputs", "bytes", "delegated_flops_fraction"} <= program.keys()
        assert program["bytes"] > 0
        for tensor in program["inputs"] + program["outputs"]:
            assert {"name", "shape", "dtype"} <= tensor.keys()
    for name in ("forward", "embed"):
        assert programs["android", name]["delegated_flops_fraction"] >= 0.95
        assert programs["android", name]["bytes"] == listed["android/lm.pte"]["bytes"]
    forward = programs["android", "forward"]
    assert forward["inputs"][0]["shape"] == [1, f"1..{reference.config.max_position_embeddings}"]
    assert forward["outputs"][0]["shape"] == [1, reference.config.vocab_size]
    assert value.items() <= both.said.items(), "export --json says something else"
    assert both.said["bundle"] == str(both.bundle)
    assert both.said["seconds"] > 0
    assert both.said["peak_memory_bytes"] > 0


def test_inspect_for_people(both: Exported, attune: Attune) -> None:
    said = attune("inspect", both.bundle)
    assert (said.code, said.err) == (0, "")
    for word in ("android/lm.pte", "ios", "forward", "decode", "perplexity", "LoRA r 8"):
        assert word in said.out


def test_the_manifest_says_what_the_core_ml_package_has(both: Exported) -> None:
    manifest = open_bundle(both.bundle).manifest
    assert manifest.ios is not None
    files = {program.file for program in manifest.ios.programs}
    found = {(file, s.name): s for file in files for s in read_signatures(both.bundle / file)}
    adapter = {t.name.replace(".", "_") for t in manifest.adapter.tensors}
    for program in manifest.ios.programs:
        own = found.pop((program.file, program.name))
        for kind in ("inputs", "outputs", "states"):
            mine = {t.name: tuple(t.shape) for t in getattr(program, kind)}
            assert mine == {t.name: tuple(t.shape) for t in getattr(own, kind)}
        if program.file == "ios/model.mlpackage":
            named = {t.name.replace(".", "_") for t in program.inputs}
            assert adapter <= named if program.name != "embed" else not adapter & named
    assert not found


def test_the_tokenizer_is_the_models(both: Exported, tokenizer) -> None:
    mine = Tokenizer.from_file(str(both.bundle / "tokenizer.json"))
    for text in ("The cat's 12 hats, naïve — 2024!\n\n 🐈", "<|user|>x<|end|>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert mine.encode(text, add_special_tokens=False).ids == ids
    facts = open_bundle(both.bundle).manifest.tokenizer
    assert (facts.rewritten, facts.normalize, facts.eos_ids[0]) == (
        (),
        None,
        tokenizer.eos_token_id,
    )


@torch.no_grad()
def test_the_adapter_loads_in_peft_and_does_nothing_yet(
    both: Exported, reference: PreTrainedModel
) -> None:
    tokens = tiny.tokens_of(16, vocab=1000)
    plain = reference(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(builtin_folder(), dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, str(both.bundle / "adapter")).eval()
    adapter = open_bundle(both.bundle).manifest.adapter
    assert peft.peft_config["default"].r == adapter.rank == 8
    assert set(peft.peft_config["default"].target_modules) == set(adapter.targets)
    assert tiny.relative(peft(tokens).logits, plain) <= rounding(
        model_terms(read_spec(reference.config, 16), 16)
    )


def test_offsets_are_where_the_adapters_bytes_are(both: Exported) -> None:
    adapter = open_bundle(both.bundle).manifest.adapter
    stored = load_file(both.bundle / "adapter/adapter_model.safetensors")
    assert adapter.runtime is not None
    data = (both.bundle / adapter.runtime).read_bytes()
    seen = set()
    for tensor in adapter.tensors:
        assert tensor.offset is not None
        array = np.frombuffer(data, np.float32, math.prod(tensor.shape), tensor.offset)
        if tensor.peft:
            rows = stored[tensor.peft][slice(*tensor.rows)].numpy()
            assert np.array_equal(array.reshape(tensor.shape)[0], rows)
            seen.add(tensor.peft)
        else:
            assert array.item() == adapter.alpha / adapter.rank
    assert seen == stored.keys()


def test_the_adapter_there_and_back(both: Exported, attune: Attune, tmp_path: Path) -> None:
    """The folder makes the bundle's own file, which makes the folder again."""
    source, file = both.bundle / "adapter", tmp_path / "a.ptd"
    attune("adapter", "convert", source, file, "--bundle", both.bundle, "--json").json()
    assert file.read_bytes() == (both.bundle / "android/adapter.ptd").read_bytes()
    attune("adapter", "convert", file, tmp_path / "back", "--json").json()
    first, second = read_peft(source), read_peft(tmp_path / "back")
    assert first.config == second.config
    assert first.tensors.keys() == second.tensors.keys()
    for module, pair in first.tensors.items():
        for one, other in zip(pair, second.tensors[module], strict=True):
            np.testing.assert_array_equal(one, other)
    shown = attune("adapter", "show", file, "--json").json()
    assert shown["parameters"] == sum(a.size + b.size for a, b in first.tensors.values())


def test_the_smallest_precision_that_is_near_float32_was_chosen(both: Exported) -> None:
    manifest = open_bundle(both.bundle).manifest
    for name, target in (("android", manifest.android), ("ios", manifest.ios)):
        assert target is not None
        assert target.chosen_by == "perplexity"
        tried = {row.quantize: row for row in target.measured}
        order = defaults.PRECISIONS[name]
        for smaller in order[: order.index(target.quantize)]:
            assert tried[smaller].ratio_to_fp32 > WORST_RATIO
        assert tried[target.quantize].ratio_to_fp32 <= WORST_RATIO
        assert tried["none"].ratio_to_fp32 == 1.0
        for row in tried.values():
            assert row.ratio_to_fp32 == row.perplexity / tried["none"].perplexity


@torch.no_grad()
def test_the_perplexity_is_that_of_transformers(
    both: Exported, reference: PreTrainedModel, tokenizer
) -> None:
    """exp of the mean loss of each token that the template did not write before the first word."""
    path = builtin_folder().parents[1] / "data" / "text.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [
        tokenizer(
            tokenizer.apply_chat_template(row["turns"], tokenize=False), add_special_tokens=False
        )["input_ids"][:512]
        for row in rows
        if row["split"] == "perplexity"
    ]
    prefix = next(i for i, same in enumerate(zip(*texts, strict=False)) if len(set(same)) > 1)
    losses, bounds = [], []
    spec = read_spec(reference.config, 512)
    for ids in texts:
        tokens = torch.tensor([ids])
        logits = reference(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        losses.append(loss[prefix - 1 :])
        bounds.append(loss_bound(spec, logits, loss.max().item()))
    expected = torch.cat(losses).mean().item()
    assert max(bounds) < 1e-2  # a wrong constant of 1 % is seen
    android = open_bundle(both.bundle).manifest.android
    assert android is not None
    measured = {row.quantize: row.perplexity for row in android.measured}
    assert abs(math.log(measured["none"]) - expected) <= max(bounds)


def test_it_is_as_small_as_its_bits_allow(both: Exported, reference: PreTrainedModel) -> None:
    """Linear weights at 4.5 or 8.1 bits and an embedding at 8; the rest is a twentieth, and a
    graph of some hundred KB that a model of this size cannot hide."""
    android = open_bundle(both.bundle).manifest.android
    assert android is not None
    config = reference.config
    table = config.vocab_size * config.hidden_size
    linear = sum(p.numel() for n, p in reference.named_parameters() if "_proj" in n)
    bits = {"8da4w": 4.5, "8da8w": 8.1, "none": 32}[android.quantize]
    whole = 32 if android.quantize == "none" else 8
    ideal = (linear * bits + table * (whole + max(whole, 8.1))) / 8
    size = (both.bundle / "android/lm.pte").stat().st_size
    assert ideal < size < 1.15 * ideal + 300_000


# Talking


@pytest.fixture(scope="module")
def runner(fp32: Exported) -> StockRunner:
    return StockRunner(open_bundle(fp32.bundle))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_stock_runner_says_what_transformers_says(
    prompt: str, runner: StockRunner, reference: PreTrainedModel, tokenizer
) -> None:
    rendered = runner.text.for_runner([Turn("user", prompt)])
    turn = [{"role": "user", "content": prompt}]
    assert rendered == tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True
    )
    reply, statistics = runner.generate(rendered, COUNT, 0.0)
    assert reply == greedy(reference, tokenizer, prompt)
    assert statistics["prompt_tokens"] == len(tokenizer(rendered)["input_ids"])
    assert runner.generate(rendered, COUNT, 0.0)[0] == reply, "the second time it says another"


def test_a_reply_ends_where_the_model_ends_it(
    runner: StockRunner, reference: PreTrainedModel, tokenizer
) -> None:
    """Without the token that ends it."""
    prompts = (f"{p} {q}" for p in PROMPTS for q in ("", "Please.", "Yes?", "No, thank you."))
    for prompt in prompts:
        expected = greedy(reference, tokenizer, prompt, 120)
        if len(tokenizer(expected, add_special_tokens=False)["input_ids"]) < 100:
            break
    else:
        pytest.skip("this model never ends")
    rendered = runner.text.for_runner([Turn("user", prompt)])
    assert runner.generate(rendered, 120, 0.0)[0] == expected


def test_chat_prints_the_reply(fp32: Exported, attune: Attune, reference, tokenizer) -> None:
    expected = greedy(reference, tokenizer, PROMPTS[0])
    arguments = ("chat", fp32.bundle, "--prompt", PROMPTS[0], "--max-new-tokens", COUNT)
    said = attune(*arguments, "--json").json()
    assert said["reply"] == expected
    assert said["prompt"] == PROMPTS[0]
    assert said["rendered"] == tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True
    )
    plain = attune(*arguments)
    assert (plain.code, plain.out) == (0, expected + "\n")


@torch.no_grad()
def test_the_longest_prompt(runner: StockRunner, reference: PreTrainedModel, tokenizer) -> None:
    """Room for one token is enough; without it, the runner is not asked."""
    context = runner.context
    text = " the" * (context - 1)
    assert len(runner.text.read_by_runner(text)) == context - 1
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    following = reference(ids).logits[0, -1].argmax()
    assert runner.generate(text, 5, 0.0)[0] == tokenizer.decode(following)
    with pytest.raises(BundleError, match=f"has {context} tokens.* context ends at {context}"):
        runner.generate(text + " the", 5, 0.0)


def test_a_conversation(
    fp32: Exported, attune: Attune, reference, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that is too long does not end it, and is forgotten."""
    lines = [PROMPTS[0], "/new", "too long " * 600, "", PROMPTS[1]]

    def typed(prompt: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", typed)
    told = attune("chat", fp32.bundle, "--max-new-tokens", COUNT)
    assert told.code == 0
    replies = [greedy(reference, tokenizer, prompt) for prompt in PROMPTS[:2]]
    assert told.out == "".join(f"{reply}\n" for reply in replies)
    assert told.err.count("error: the prompt has") == 1


def test_chat_talks_with_the_quantized_bundle(both: Exported, attune: Attune) -> None:
    arguments = ("chat", both.bundle, "--prompt", PROMPTS[0], "--max-new-tokens", COUNT, "--json")
    said = attune(*arguments).json()
    assert said["reply"].strip()
    assert attune(*arguments).json()["reply"] == said["reply"]


def test_chat_with_other_adapters(
    fp32: Exported, attune: Attune, tokenizer, tmp_path: Path
) -> None:
    """One program, two adapters that PEFT wrote, as a folder and as a file: each says what
    transformers + peft say."""
    replies = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(builtin_folder(), dtype=torch.float32)
        peft = tiny.adapted(model, open_bundle(fp32.bundle).manifest.adapter.targets, 8, seed)
        folder, file = tmp_path / f"a{seed}", tmp_path / f"a{seed}.ptd"
        peft.save_pretrained(str(folder))
        attune("adapter", "convert", folder, file, "--bundle", fp32.bundle, "--json").json()
        expected = greedy(peft, tokenizer, PROMPTS[0])
        for adapter in (folder, file):
            said = attune(
                *("chat", fp32.bundle, "--prompt", PROMPTS[0], "--max-new-tokens", COUNT),
                *("--adapter", adapter, "--json"),
            ).json()
            assert said["reply"] == expected
        replies.append(expected)
    plain = attune("chat", fp32.bundle, "--prompt", PROMPTS[0], "--json").json()["reply"]
    assert len({*replies, plain}) == 3


# Other exports


def test_export_with_an_adapter_a_context_and_a_template(attune: Attune, tmp_path: Path) -> None:
    """A random model, to a program that has the adapter's ranks, modules and values."""
    folder = tiny.save_checkpoint(tmp_path / "m", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = tiny.adapted(model, ["v_proj", "down_proj"], 3, rank_pattern={"v_proj": 5})
    peft.save_pretrained(str(tmp_path / "lora"))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}</s>{% endfor %}")
    out = tmp_path / "new" / "bundle"
    said = attune(
        *("export", folder, "--out", out, "--target", "android", "--quantize", "none"),
        *("--adapter", tmp_path / "lora", "--context", 40, "--chat-template", template, "--json"),
    ).json()
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]
    manifest = open_bundle(out).manifest
    assert said["ios"] is None
    assert manifest.model.context == 40
    assert manifest.adapter.rank == 5
    assert set(manifest.adapter.targets) == {"v_proj", "down_proj"}
    assert manifest.tokenizer.chat.begin == ("[",)
    assert manifest.tokenizer.chat.answer == (2, "[")
    first, second = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path / "lora", out / "adapter")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    lm = ExecutorchLm(out / "android/lm.pte", out / "android/adapter.ptd")
    # A random model says bytes that are no characters, and half ones: they are shown as such.
    text = ChatText.of(open_bundle(out))
    for prompt in (f"the {word} {other}" for word in ("cat", "hat", "mat") for other in "abcdef"):
        asked = text.tokens([Turn("user", prompt)], True).ids
        written = list(lm.greedy(asked, 20, (2,)))
        if max(written) < text.tokenizer.get_vocab_size():  # it has rows that are no tokens
            break
    chat = ("chat", out, "--prompt", prompt, "--max-new-tokens", 20)
    assert attune(*chat, "--json").json()["reply"] == text.decode(written)
    assert attune(*chat).out == output.shown(text.decode(written)) + "\n"
    assert lm.context == 40
    tokens = tiny.tokens_of(40, vocab=320)
    with torch.no_grad():
        expected = peft(tokens).logits[:, -1]
    terms = model_terms(read_spec(model.config, 40), 40)
    assert tiny.relative(lm.prefill(tokens), expected) <= rounding(terms)


@dataclass(frozen=True)
class Asked:
    """The arguments of an export."""

    model: str
    out: Path
    options: dict[str, Any]


@pytest.fixture
def instant_export(monkeypatch: pytest.MonkeyPatch, fp32: Exported) -> list[Asked]:
    """``export`` as a copy of a bundle made before; what was asked for is kept."""
    asked: list[Asked] = []

    def copy(model: str, out: Path, *, progress: Progress, **options: Any) -> Manifest:
        asked.append(Asked(model, out, options))
        progress("copy")
        shutil.copytree(fp32.bundle, out)
        return open_bundle(out).manifest

    monkeypatch.setattr(bundle_export, "export", copy)
    return asked


def defaults_of(function: Callable) -> dict[str, Any]:
    """Its keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_options_reach_the_export(
    attune: Attune, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain = defaults_of(bundle_export.export) | {"quantize": {}}
    del plain["progress"]
    asked: list[Asked] = request.getfixturevalue("instant_export")
    out = tmp_path / "a"
    common = ("export", "some/model", "--out", out, "--json")
    attune(
        *common,
        *("--target", "ios", "--target", "android", "--quantize", "int4", "--quantize", "8da8w"),
        *("--lora-rank", 3, "--lora-alpha", 5.5, "--lora-targets", "q_proj, o_proj"),
    ).json()
    changed = {
        "targets": ("ios", "android"),
        "quantize": {"ios": "int4", "android": "8da8w"},
        "rank": 3,
        "alpha": 5.5,
        "modules": ("q_proj", "o_proj"),
    }
    assert asked.pop() == Asked("some/model", out, plain | changed)
    shutil.rmtree(out)
    attune(*common).json()
    assert asked.pop() == Asked("some/model", out, plain)
    shutil.rmtree(out)
    attune(*common, "--quantize", "none", "--quantize", "ios=fp16").json()
    assert asked.pop().options["quantize"] == {"android": "none", "ios": "fp16"}
    shutil.rmtree(out)
    attune(*common, "--train-lengths", "64,512", "--train-weights", "int8", "--context", 99).json()
    changed = {"train_lengths": (64, 512), "train_weights": "int8", "context": 99}
    assert asked.pop().options == plain | changed


def test_precisions_that_are_offered_are_known() -> None:
    assert tuple(ANDROID) == defaults.PRECISIONS["android"]
    assert defaults.PRECISIONS.keys() == set(defaults.TARGETS)


def once(function: Callable) -> Callable:
    """``function``, whose later calls must fit it as well, and get what the first one gave."""
    results: list[Any] = []

    def call(*arguments: Any, **options: Any) -> Any:
        inspect.signature(function).bind(*arguments, **options)
        if not results:
            results.append(function(*arguments, **options))
        return results[0]

    return call


def test_demo(
    instant_export: list[Asked], attune: Attune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For machines and for people: the proof and the loop run once for both."""
    monkeypatch.setattr(ladder, "climb", once(ladder.climb))
    monkeypatch.setattr(short_life, "run_short_loop", once(short_life.run_short_loop))
    value = attune("demo", "--json", "--out", tmp_path / "kept").json()
    shortest = {"train_lengths": defaults.TRAIN_LENGTHS[:1]}
    assert instant_export[0] == Asked(defaults.BUILTIN, tmp_path / "kept", shortest)
    assert value["reply"].strip()
    assert value["bundle_bytes"] == sum(
        f.bytes for f in open_bundle(tmp_path / "kept").manifest.files
    )
    plain = attune("demo")
    assert plain.code == 0
    assert value["reply"].strip() in plain.out + plain.err
    assert "What to try next" in plain.out + plain.err
    assert not instant_export[1].out.exists(), "a bundle that nobody asked to keep"


def test_force_replaces_a_bundle(
    fp32: Exported, monkeypatch: pytest.MonkeyPatch, attune: Attune, tmp_path: Path
) -> None:
    """The new one whole in the place of the old; where it fails, the old one as it was."""
    out = tmp_path / "b"
    out.mkdir()
    (out / "old.txt").write_text("old")

    def prepare(folder: Path, *arguments: object) -> Path:
        assert (out / "old.txt").exists()
        (folder / "half").write_text("x")
        return folder

    def compile_nothing(folder: Path, *arguments: object) -> Path:
        return folder

    def finish(folder: Path, results: object, progress: object) -> Manifest:
        (folder / "half").unlink()
        shutil.copytree(fp32.bundle, folder, dirs_exist_ok=True)
        return open_bundle(folder).manifest

    def fail(folder: Path, results: object, progress: object) -> Manifest:
        raise OSError(28, "No space left on device")

    export = ("export", "tiny", "--out", out, "--force", "--json")
    monkeypatch.setattr(bundle_export, "prepare", prepare)
    monkeypatch.setattr(bundle_export, "_compile", compile_nothing)
    monkeypatch.setattr(bundle_export, "_finish", fail)
    assert attune(*export).code == 2
    assert [p.name for p in tmp_path.rglob("*")] == ["b", "old.txt"]
    monkeypatch.setattr(bundle_export, "_finish", finish)
    attune(*export).json()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert not (out / "old.txt").exists()
    open_bundle(out)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_force_replaces_nothing_but_a_folder(kind: str, attune: Attune, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "b", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(elsewhere)
    result = attune("export", "tiny", "--out", out, "--force")
    assert result.code == 2
    assert "is no folder" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "elsewhere"]
    assert list(elsewhere.iterdir()) == []


# The rest of the command line


def test_doctor(attune: Attune) -> None:
    said = attune("doctor", "--json")
    value = json.loads(said.out)
    assert value["ok"] is (said.code == 0)
    packages = {row["package"]: row for row in value["packages"]}
    assert {"torch", "executorch", "coremltools", "transformers", "peft"} <= packages.keys()
    assert value["ok"] is (value["python"]["ok"] and all(p["ok"] for p in packages.values()))
    assert packages["torch"]["installed"] == torch.__version__.split("+")[0]


def test_doctor_notices_another_version(attune: Attune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.cli.doctor.installed_version", lambda name: None)
    said = attune("doctor", "--json")
    assert said.code == 1
    assert json.loads(said.out)["ok"] is False
    assert "not installed" in attune("doctor").out


def test_optimum_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Optimum lists the subcommand and hands it its arguments; a mistake is still code 2."""
    said = command(
        *("export", "attune", "./none", "--out", tmp_path / "x", "--target", "android"),
        program="optimum-cli",
    )
    assert said.code == 2, said.err
    assert "no such file or folder: ./none" in said.err
    assert list(tmp_path.iterdir()) == []
    for arguments in (("export", "--help"), ("export", "attune", "--help")):
        monkeypatch.setattr("sys.argv", ["optimum-cli", *arguments])
        with pytest.raises(SystemExit) as end:
            optimum_cli.main()
        assert end.value.code == 0
        assert "attune" in capfd.readouterr().out


def test_help_names_every_command(attune: Attune) -> None:
    said = attune("--help")
    assert said.code == 0
    for name in ("export", "inspect", "chat", "adapter", "bench", "doctor", "demo"):
        assert name in said.out
