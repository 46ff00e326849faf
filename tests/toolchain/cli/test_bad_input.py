"""A user's mistake: one clear sentence on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporters.executorch.delegation import Delegation
from exporters.executorch.lm_program import LoweredLm
from exporters.model.spec import read_spec
from exporters.signature import ProgramSignature, TensorSpec
from runtime_py.bundle import manifest
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.manifest import CHECKSUM, MANIFEST, Program
from runtime_py.loop.errors import BundleError
from tests import tiny
from tests.toolchain.conftest import Attune, Exported, Said, command
from toolchain.compile import android, training_part


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.save_checkpoint(tmp_path / "m")


def inventory(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def is_a_sentence(said: Said, *words: str) -> None:
    assert said.code == 2, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    *stages, line = said.err.rstrip().splitlines()
    # An export says what it had done until then.
    assert all(re.fullmatch(r" +\d+\.\d s  .+", stage) for stage in stages), said.err
    assert line.startswith("error: ")
    assert line.endswith(".")
    for word in words:
        assert word in line


@pytest.fixture
def refused(attune: Attune, tmp_path: Path):
    """An export that must fail before it writes anything, at ``--out`` or beside it."""

    def run(model: object, words: str | tuple[str, ...], *arguments: object) -> None:
        before = inventory(tmp_path)
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        said = attune("export", model, *out, *arguments)
        is_a_sentence(said, *((words,) if isinstance(words, str) else words))
        assert inventory(tmp_path) == before

    return run


# The model


@pytest.mark.parametrize("name", ["./none", "none.gguf", "/no/such/place", "a/b/c", "~/nothing"])
def test_no_such_path(name: str, refused) -> None:
    refused(name, "no such file or folder")


def test_no_such_id_and_no_network(refused) -> None:
    refused("nobody/nothing-at-all", ("nobody/nothing-at-all", "network"))


def test_a_folder_without_config_or_weights(checkpoint: Path, refused) -> None:
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, ("pickles", "pytorch_model.bin", "safetensors"))
    (checkpoint / "pytorch_model.bin").unlink()
    refused(checkpoint, "has no weights")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "has no config.json")
    refused(checkpoint / "tokenizer.json", "expected a .gguf file, a folder")


def test_an_architecture_that_does_not_fit(checkpoint: Path, refused) -> None:
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    refused(checkpoint, ("'mamba' is not supported", "llama", "gemma3_text", "phi3"))


@pytest.mark.parametrize("keep", [0.0, 0.0005, 0.3, 0.999])
def test_truncated_safetensors(keep: float, checkpoint: Path, refused) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    refused(checkpoint, ("model.safetensors", "truncated or corrupt"))


def test_corrupt_safetensors(checkpoint: Path, refused) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[12] ^= 0x55  # in the header's JSON
    path.write_bytes(data)
    refused(checkpoint, "model.safetensors")
    save_file({"model.norm.weight": torch.zeros(3)}, path)
    # Every misfit of the weights in one message, if they are not too many to read.
    refused(
        checkpoint,
        ("(20)", "model.norm.weight is [3], expected [64].", "model.embed_tokens.weight [320, 64]"),
    )
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    refused(checkpoint, ("(29)", "model.layers.0.input_layernorm.weight [64] is missing", "; …"))


def gguf_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_vocab_size, 320),
        (writer.add_context_length, 64),
        (writer.add_block_count, 1),
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_rope_dimension_count, 16),
        (writer.add_layer_norm_rms_eps, 1e-6),
    ):
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((320, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 200, -5000])
def test_truncated_gguf(keep: int, refused, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "m.gguf")


def test_corrupt_gguf(refused, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(b"PK\x03\x04" + data[4:])
    refused(path, ("m.gguf", "not a GGUF file"))
    path.write_bytes(data[:8] + b"\xff" * 16 + data[24:])
    refused(path, ("m.gguf", "truncated or corrupt"))


POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
     "tokenizer_config.json", "chat_template.jinja"],
)  # fmt: skip
def test_a_git_lfs_pointer_in_a_model(name: str, checkpoint: Path, refused) -> None:
    (checkpoint / name).write_text(POINTER)
    refused(checkpoint, (f"m/{name} is a Git LFS pointer,", "git lfs pull"))


def test_git_lfs_pointers_are_all_named(checkpoint: Path, refused, tmp_path: Path) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": f"model.{n}" for n in (1, 2)}
    for name in ("tokenizer.json", *shards):
        (checkpoint / name).write_text(POINTER)
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {tensor: name for name, tensor in shards.items()}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    first, second = shards
    refused(checkpoint, (f"{first} is a Git LFS pointer (and beside it {second}, tokenizer.json)",))
    (tmp_path / "m.gguf").write_text(POINTER)
    refused(tmp_path / "m.gguf", ("m.gguf is a Git LFS pointer,", "git lfs pull"))
    given = tmp_path / "t.jinja"
    given.write_text(POINTER)
    model = tiny.save_checkpoint(tmp_path / "whole")
    refused(
        model, "t.jinja is a Git LFS pointer (and beside it m.gguf), not", "--chat-template", given
    )


def test_weights_that_are_no_numbers(checkpoint: Path, refused) -> None:
    """Weights damaged so that they still load do not become a bundle."""
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(state, path)
    refused(checkpoint, ("NaN", "weights are damaged"), "--quantize", "none")


def test_templates(checkpoint: Path, refused, tmp_path: Path) -> None:
    given = tmp_path / "t.jinja"
    refused(checkpoint, ("t.jinja", "cannot be read"), "--chat-template", given)
    given.write_text("{% for %}")
    refused(checkpoint, ("t.jinja", "cannot be rendered"), "--chat-template", given)


# The adapter


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """PEFT's, for ``checkpoint``."""
    model = tiny.hugging_face("llama", vocab_size=320)
    tiny.adapted(model, ["q_proj", "v_proj"]).save_pretrained(str(tmp_path / "lora"))
    return tmp_path / "lora"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_for_another_base(refused, tmp_path: Path) -> None:
    """All misfits, with both shapes."""
    wide = tiny.hugging_face("qwen3", hidden_size=96, head_dim=16, num_hidden_layers=3)
    tiny.adapted(wide, ["q_proj", "k_proj"]).save_pretrained(str(tmp_path / "lora"))
    base = tiny.save_checkpoint(tmp_path / "m", num_hidden_layers=1)
    refused(
        base,
        (
            "6 misfits",
            "model.layers.0.self_attn.q_proj A is [4, 96], expected [4, 64]",
            "model.layers.0.self_attn.k_proj A is [4, 96], expected [4, 64]",
            *(
                f"model.layers.{layer}.self_attn.{module} does not exist"
                for layer in (1, 2)
                for module in ("q_proj", "k_proj")
            ),
        ),
        *("--adapter", tmp_path / "lora"),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_new_method": {}}, "some_new_method"),
    ],
)
def test_an_adapter_that_is_not_plain_lora(
    changes: dict, words: str, checkpoint: Path, lora: Path, refused
) -> None:
    edit(lora, **changes)
    refused(checkpoint, ("adapter_config.json", words), "--adapter", lora)


def test_a_broken_adapter(checkpoint: Path, lora: Path, refused, tmp_path: Path) -> None:
    refused(checkpoint, "no such adapter folder", "--adapter", tmp_path / "none")
    weights = lora / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-7])
    refused(checkpoint, ("adapter_model.safetensors", "truncated"), "--adapter", lora)
    weights.rename(lora / "adapter_model.bin")
    refused(checkpoint, ("pickle", "adapter_model.bin"), "--adapter", lora)
    refused(lora, "is a PEFT adapter, not a model")


@pytest.mark.parametrize("option", [("--lora-rank", 4), ("--lora-targets", "q_proj")])
def test_an_adapter_and_options_for_a_fresh_one(
    option: tuple, checkpoint: Path, lora: Path, refused
) -> None:
    refused(checkpoint, "--adapter brings its own", "--adapter", lora, *option)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_git_lfs_pointer_in_an_adapter(name: str, checkpoint: Path, lora: Path, refused) -> None:
    (lora / name).write_text(POINTER)
    refused(checkpoint, (f"{name} is a Git LFS pointer,", "git lfs pull"), "--adapter", lora)


# The options


@pytest.mark.parametrize("context", [65, 1, 0, -3])
def test_a_context_beyond_the_models(context: int, checkpoint: Path, refused) -> None:
    refused(checkpoint, (f"--context {context}", "64"), "--context", context)


def test_a_context_beyond_the_built_in_models(refused) -> None:
    refused("tiny", ("--context 99999", "at most 512"), "--context", 99999)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_of_nothing(rank: int, checkpoint: Path, refused) -> None:
    refused(checkpoint, f"--lora-rank {rank}", "--lora-rank", rank)


@pytest.mark.parametrize("alpha", ["0", "-0.0", "-8", "nan", "inf"])
def test_an_alpha_of_nothing(alpha: str, checkpoint: Path, lora: Path, refused) -> None:
    words = (f"--lora-alpha {float(alpha):g} ", "Give a number above 0")
    refused(checkpoint, words, "--lora-alpha", alpha)
    refused(checkpoint, words, "--lora-alpha", alpha, "--adapter", lora)


@pytest.mark.parametrize("names", ["", ",", " , "])
def test_names_of_nothing_are_not_the_default(
    names: str, attune: Attune, checkpoint: Path, refused, tmp_path: Path
) -> None:
    refused(checkpoint, f"--lora-targets {names!r} names nothing", "--lora-targets", names)
    out = ("--out", tmp_path / "out")
    lists = {"--groups": "tune", "--streams": "tune", "--datasets": "fleet", "--manners": "fleet"}
    for option, name in lists.items():
        said = attune(name, tmp_path / "none", option, names, "--data", tmp_path, *out)
        is_a_sentence(said, f"{option} {names!r} names nothing")


def test_a_target_module_that_does_not_exist(checkpoint: Path, refused) -> None:
    refused(checkpoint, ("nose", "q_proj", "down_proj"), "--lora-targets", "q_proj,nose")


def test_targets_and_precisions_that_do_not_exist(checkpoint: Path, refused) -> None:
    refused(checkpoint, ("watch", "android, ios"), "--target", "watch")
    refused(checkpoint, ("3bit", "8da4w", "int4"), "--quantize", "3bit")
    refused(checkpoint, ("int4", "8da4w"), "--target", "android", "--quantize", "int4")
    refused(checkpoint, ("ios=8da4w", "int8"), "--quantize", "ios=8da4w")
    refused(checkpoint, ("ios=none", "8da8w"), "--target", "android", "--quantize", "ios=none")
    refused(checkpoint, ("watch=none", "8da8w", "int4"), "--quantize", "watch=none")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output(kind: str, checkpoint: Path, refused, tmp_path: Path) -> None:
    out = tmp_path / "there"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    refused(checkpoint, ("there", "exists already", "--force"), "--out", out)
    assert os.path.lexists(out)


@pytest.mark.parametrize("out", ["file/out", "x" * 300])
def test_an_output_that_cannot_be(out: str, checkpoint: Path, refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(checkpoint, "cannot be written", "--out", tmp_path / out)


@pytest.mark.parametrize(
    "arguments", [("export",), ("export", "tiny"), ("inspect",), ("frobnicate",), ("export", "--x")]
)
def test_a_command_that_is_not_complete(arguments: tuple, attune: Attune) -> None:
    said = attune(*arguments)
    assert (said.code, said.out) == (2, "")
    assert "Usage" in said.err
    assert "Traceback" not in said.err


def test_the_console_script_ends_with_code_2(tmp_path: Path) -> None:
    is_a_sentence(command("inspect", tmp_path / "none"), "no bundle")


# A full disk


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(attune: Attune, tmp_path: Path) -> None:
    """In the middle of ``lm.pte``, which is larger than all of the disk."""
    model = tiny.save_checkpoint(tmp_path / "m", num_hidden_layers=1, intermediate_size=4096)
    with small_disk(tmp_path / "disk", "2m") as disk:
        said = attune(
            *("export", model, "--out", disk / "out", "--target", "android", "--quantize", "none")
        )
        is_a_sentence(said, str(disk / "out"), "cannot be written", "space")
        assert list(disk.iterdir()) == []


@pytest.fixture
def instant_android(fp32: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes programs lowered before, so that the disk can fill up in each of the later steps."""

    programs = open_bundle(fp32.bundle).android.target.programs

    def tensors(of: Sequence[manifest.Tensor]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in of)

    signatures = tuple(
        ProgramSignature(program.name, tensors(program.inputs), tensors(program.outputs))
        for program in programs
        if program.file == android.LM
    )
    delegation = {signature.name: Delegation(0, 1.0, {}) for signature in signatures}

    def lower_lm(model, out: Path, **options: object) -> LoweredLm:
        shutil.copyfile(fp32.bundle / android.LM, out)
        return LoweredLm(signatures, delegation, {})

    def lower_training(target: str, folder: Path, *arguments: object) -> tuple[Program, ...]:
        name = training_part.PROGRAMS[target]
        shutil.copyfile(fp32.bundle / name, folder / name)
        return tuple(program for program in programs if program.file == name)

    monkeypatch.setattr(android, "lower_lm", lower_lm)
    monkeypatch.setattr(training_part, "lower_programs", lower_training)
    monkeypatch.setattr("toolchain.compile.precision.perplexity", lambda *arguments: 1.0)
    for proof in ("proofs.equal_to_hugging_face", "proofs.android_program", "training_part.prove"):
        monkeypatch.setattr(f"toolchain.compile.{proof}", lambda *arguments: None)


@pytest.mark.usefixtures("instant_android")
def test_a_disk_that_is_full_at_any_moment(fp32: Exported, attune: Attune, tmp_path: Path) -> None:
    """Free space for every file but the next: all are told alike, and all are taken away again."""
    pages = {
        path.relative_to(fp32.bundle).as_posix(): -(-path.stat().st_size // 4096)
        for path in fp32.bundle.rglob("*")
        if path.is_file()
    }
    written = [
        "android/lm.pte",
        "android/adapter.ptd",
        training_part.WEIGHTS,
        "android/training.pte",
    ]
    written += ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    written += ["tokenizer.json"]
    pages[MANIFEST] = 1  # at least: here it says less of how programs were lowered
    written += [*sorted(pages.keys() - {*written, MANIFEST, CHECKSUM}), MANIFEST]
    assert pages.keys() == {*written, CHECKSUM}
    export = ("export", "tiny", "--target", "android", "--quantize", "none", "--out")
    for index, name in enumerate(written):
        free = sum(pages[before] for before in written[:index]) + pages[name] - 1
        with small_disk(tmp_path / f"disk{index}", f"{max(1, free) * 4}k") as disk:
            said = attune(*export, disk / "out")
            assert said.code == 2, f"{name}: {said.err}"
            is_a_sentence(said, "cannot be written", "space")
            assert list(disk.iterdir()) == []


# A damaged bundle


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    spec = read_spec(tiny.config_of("llama"), tiny.CONTEXT)
    return tiny.paper_bundle(tmp_path / "bundle", spec, ["q_proj"], 2)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << (bit % 8)
    path.write_bytes(data)


def commands(bundle: Path, elsewhere: Path) -> list[tuple]:
    """Everything that opens a bundle."""
    return [
        ("inspect", bundle),
        ("inspect", bundle, "--json"),
        ("chat", bundle, "--prompt", "Hi"),
        ("chat", bundle, "--prompt", "Hi", "--json"),
        ("adapter", "convert", elsewhere / "lora", elsewhere / "new.ptd", "--bundle", bundle),
        ("bench", "decode", bundle),
        ("bench", "prefill", bundle),
        ("evaluate", bundle, "--data", elsewhere / "none.jsonl"),
    ]


@pytest.mark.parametrize(
    "name", ["android/lm.pte", "android/adapter.ptd", "tokenizer.json", MANIFEST, CHECKSUM]
)
def test_one_flipped_bit_is_refused_by_every_command(
    name: str, paper: Path, lora: Path, attune: Attune, tmp_path: Path
) -> None:
    flip(paper / name, 77)
    before = inventory(tmp_path)
    for arguments in commands(paper, tmp_path):
        is_a_sentence(attune(*arguments), name)
    assert inventory(tmp_path) == before


# Dialogues

GOOD = b'{"id": "a", "turns": [{"role": "user", "content": "hi"}, '
GOOD += b'{"role": "assistant", "content": "ho"}]}\n'
PACKED = gzip.compress(GOOD * 30, mtime=0)


@pytest.mark.parametrize("name", [("evaluate",), ("bench", "synthesis")])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (PACKED[:25] + bytes([PACKED[25] ^ 1]) + PACKED[26:], ("d[1].jsonl.gz is damaged",)),
        (PACKED[:-9], ("d[1].jsonl.gz is damaged", "Copy it again")),
        (gzip.compress(GOOD.replace(b"hi", b"\\ud800")), ("line 1 of", "lone surrogate")),
        (gzip.compress(GOOD.replace(b"user", b"system")), ("line 1 of", "attune data convert")),
        (gzip.compress(GOOD.replace(b"hi", b"")), ("line 1 of", "is empty")),
        (gzip.compress(GOOD.decode().encode("utf-16")), ("d[1].jsonl.gz is UTF-16", "UTF-8")),
        (gzip.compress(GOOD + b"\n{\n" + GOOD), ("2 lines of", "line 3 of", "line 4 of")),
    ],
    ids=["flipped", "cut", "surrogate", "system", "empty", "utf-16", "several"],
)
def test_dialogues_that_cannot_be_used(
    name: tuple[str, ...],
    data: bytes,
    words: tuple[str, ...],
    paper: Path,
    attune: Attune,
    tmp_path: Path,
) -> None:
    """Whichever command reads them."""
    path = tmp_path / "d[1].jsonl.gz"
    path.write_bytes(data)
    is_a_sentence(attune(*name, paper, "--data", path), *words)


def test_missing_and_unlisted_files_are_named(paper: Path, attune: Attune) -> None:
    (paper / "tokenizer.json").unlink()
    is_a_sentence(attune("inspect", paper), "tokenizer.json is missing")
    (paper / "extra.txt").write_text("x")
    is_a_sentence(attune("inspect", paper), "extra.txt is not in the manifest")


def test_flipped_bits_in_every_file_of_a_real_bundle(both: Exported) -> None:
    source = random.Random(0)
    for path in sorted(p for p in both.bundle.rglob("*") if p.is_file()):
        for _ in range(4):
            bit = source.randrange(8 * path.stat().st_size)
            flip(path, bit)
            try:
                with pytest.raises(BundleError) as caught:
                    open_bundle(both.bundle)
                assert path.relative_to(both.bundle).as_posix() in str(caught.value)
            finally:
                flip(path, bit)
    open_bundle(both.bundle)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_one_flipped_bit_anywhere_in_a_real_bundle(
    both: Exported, attune: Attune, data: st.DataObject
) -> None:
    """Inspect and chat name the file; nothing native sees it."""
    files = sorted(p for p in both.bundle.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    flip(path, bit)
    try:
        name = path.relative_to(both.bundle).as_posix()
        is_a_sentence(attune("inspect", both.bundle), name)
        is_a_sentence(attune("chat", both.bundle, "--prompt", "Hi"), name)
    finally:
        flip(path, bit)
    assert attune("inspect", both.bundle).code == 0


def test_no_bundle_at_all(attune: Attune, checkpoint: Path, lora: Path, tmp_path: Path) -> None:
    for arguments in commands(tmp_path / "none", tmp_path):
        is_a_sentence(attune(*arguments), "no bundle at")
    for arguments in commands(checkpoint, tmp_path):
        is_a_sentence(attune(*arguments), f"no {MANIFEST}")


# Talking


def test_chat_refuses(fp32: Exported, attune: Attune, lora: Path, tmp_path: Path) -> None:
    chat = ("chat", fp32.bundle, "--prompt", "Hi")
    is_a_sentence(attune(*chat, "--adapter", tmp_path / "none"), "no such adapter folder")
    is_a_sentence(attune(*chat, "--adapter", tmp_path / "none.ptd"), "no adapter file")
    # Made for another base, of other sizes: all misfits, before anything native reads it.
    said = attune(*chat, "--adapter", lora)
    is_a_sentence(said, "self_attn.q_proj A is [4, 64], expected [4, 256]", "self_attn.v_proj A")
    (tmp_path / "x.ptd").write_bytes(bytes(500))
    is_a_sentence(attune(*chat, "--adapter", tmp_path / "x.ptd"), "x.ptd")
    is_a_sentence(attune("chat", fp32.bundle, "--json"), "--prompt")


def test_chat_with_more_than_the_context_holds(fp32: Exported, attune: Attune) -> None:
    words = "please tell me more about it " * 400
    is_a_sentence(
        attune("chat", fp32.bundle, "--prompt", words), "context ends at 512", "--context"
    )
