"""Policy files: what an export takes of them, and what it refuses before anything is computed."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporters.errors import ExportError
from runtime_py.loop.policy import LoopPolicy
from tests.toolchain.conftest import Attune
from toolchain.compile import bundle_manifest
from toolchain.compile.policy_file import PolicyFile, read_policy_file


def written(folder: Path, value: object) -> Path:
    path = folder / "policy.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_what_a_file_says(tmp_path: Path) -> None:
    named = {"learning_rate": 0.002, "batch": 4, "longest_sequence_tokens": 128}
    lora = {"lora_rank": 4, "lora_alpha": 8, "lora_targets": ["q_proj", "up_proj"]}
    found = read_policy_file(written(tmp_path, {**named, **lora}), (256,))
    assert found == PolicyFile(named, 4, 8.0, ("q_proj", "up_proj"))
    assert read_policy_file(None, (256,)) == PolicyFile()
    assert not read_policy_file(written(tmp_path, {}), (256,)).has_adapter


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"speed": 1, "batch": 4, "colour": 2},
            "unknown fields: colour, speed; it knows selection",
        ),
        ({"lora_rang": 1}, "lora_rank, lora_alpha, lora_targets."),
        ({"batch": 0, "bins": "many"}, "bins is 'many', expected a int; batch is 0"),
        ({"selection": "magic"}, "magic"),
        ({"asking": "magic"}, "magic"),
        ({"ask_exchange": "magic"}, "magic"),
        ({"longest_sequence_tokens": 512}, "give --train-lengths 512"),
        ({"shortest_sequence_tokens": 300}, "at most longest_sequence_tokens"),
        (
            {"lora_rank": 0, "lora_alpha": "x", "lora_targets": "q_proj"},
            "lora_rank is 0, expected a whole number of at least 1; lora_alpha is 'x', expected a "
            "number above 0; lora_targets is 'q_proj'",
        ),
        ("[1]", "is a JSON list"),
        ("{", "is not JSON (line 1"),
    ],
)
def test_what_is_refused(value: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as error:
        read_policy_file(written(tmp_path, value), (256,))
    assert words in str(error.value)


def test_every_field_may_be_named(tmp_path: Path) -> None:
    """Each with its default, but for the length, which is the programs'."""
    everything = {one.name: one.default for one in fields(LoopPolicy)}
    found = read_policy_file(written(tmp_path, everything), (512,))
    assert dict(found.loop) == everything


def test_the_command_refuses_before_it_writes(attune: Attune, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = attune("export", "tiny", "--out", out, "--policy", written(tmp_path, {"speed": 1}))
    assert (said.code, out.exists()) == (2, False)
    assert "unknown fields: speed" in said.err
    said = attune("export", "tiny", "--out", out, "--policy", tmp_path / "none.json")
    assert "there is no policy" in said.err
    file = written(tmp_path, {"lora_rank": 2})
    said = attune("export", "tiny", "--out", out, "--policy", file, "--adapter", tmp_path)
    assert said.code == 2
    assert "leave lora_rank, lora_alpha, lora_targets out of the policy" in said.err


def test_the_manifest_has_what_was_asked_for() -> None:
    """The lengths are the programs' where the file names none."""
    job = SimpleNamespace(
        policy={"batch": 4, "fine_tune_memory_mb": 77},
        lengths=(128, 256),
        input=SimpleNamespace(rank=4, modules=("q_proj",), adapter=SimpleNamespace(alpha=8.0)),
        embed_length=512,
    )
    policy = bundle_manifest._policy(job, (), ("g", "r"))  # type: ignore[arg-type]
    loop = LoopPolicy.from_fields(policy.loop)
    assert (loop.batch, loop.fine_tune_memory_mb) == (4, 77)
    assert (loop.longest_sequence_tokens, loop.shortest_sequence_tokens) == (256, 64)
    assert (policy.lora_rank, policy.lora_alpha, policy.lora_targets) == (4, 8.0, ("q_proj",))


@pytest.mark.parametrize(
    ("asked", "memory", "form"),
    [
        ({}, 5, "tried"),
        ({"fine_tune_memory_mb": 77}, 77, "tried"),
        ({"paraphrase_prefix": "Here:"}, 5, "own"),
        ({"paraphrases": 0}, 5, "rewrite"),
        ({"paraphrases": 3}, 5, "tried"),
    ],
)
def test_what_was_asked_for_is_not_measured(
    asked: dict, memory: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``rewrite`` is the default policy's form, ``own`` none of the known ones."""

    def tried(engine: object, loop: LoopPolicy, dialogues: object) -> tuple[LoopPolicy, object]:
        return loop, SimpleNamespace(form="tried")

    monkeypatch.setattr(bundle_manifest, "training_bytes", lambda bundle, length: 4.2e6)
    monkeypatch.setattr(bundle_manifest, "PhoneEngine", lambda bundle: None)
    monkeypatch.setattr(bundle_manifest, "choose_form", tried)
    changed: dict = {}

    def copy(update: dict) -> object:
        changed.update(update)
        return None

    loop = asdict(replace(LoopPolicy(), **asked))
    policy = SimpleNamespace(loop=loop, model_copy=copy)
    manifest = SimpleNamespace(android=True, policy=policy, model_copy=copy)
    bundle_manifest._with_measured(SimpleNamespace(manifest=manifest), asked)  # type: ignore[arg-type]
    assert changed["loop"]["fine_tune_memory_mb"] == memory
    assert changed["synthesis"].form == form
