"""The command line as a user meets it: one export of the built-in model, and every mistake."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime_py.manifest import BundleError, open_bundle
from runtime_py.peft_adapter import read_peft
from toolchain.export import builtin_folder


def attune(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolchain", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def refused(*arguments: object) -> str:
    """Runs what must fail as a user's mistake; its one sentence."""
    done = attune(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return " ".join(done.stderr.split())


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    done = attune(
        "export", "tiny", "--out", out, "--target", "android", "--quantize", "none", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bundle"] == str(out)
    assert report["android"]["quantize"] == "none"
    assert report["peak_memory_bytes"] > 0
    return out


def test_inspect(bundle: Path) -> None:
    report = json.loads(attune("inspect", bundle, "--json").stdout)
    listed = {file["path"]: file for file in report["files"]}
    for path in (p for p in bundle.rglob("*") if p.is_file()):
        name = path.relative_to(bundle).as_posix()
        if not name.startswith("manifest."):
            assert listed[name]["bytes"] == path.stat().st_size
            assert len(listed[name]["sha256"]) == 64
    programs = {program["name"]: program for program in report["programs"]}
    assert programs.keys() == {"forward", "embed"}
    assert programs["forward"]["inputs"][0]["shape"] == [1, "1..512"]
    assert programs["forward"]["outputs"][0]["shape"] == [1, 4096]
    assert programs["forward"]["bytes"] == listed["android/lm.pte"]["bytes"]
    assert programs["forward"]["delegated_flops_fraction"] > 0.95
    assert "android/lm.pte" in attune("inspect", bundle).stdout


def test_chat_says_what_transformers_says(bundle: Path) -> None:
    prompt = "I am looking for a restaurant in San Jose."
    done = attune("chat", bundle, "--prompt", prompt, "--max-new-tokens", 24, "--json")
    report = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder())
    model = AutoModelForCausalLM.from_pretrained(builtin_folder(), dtype=torch.float32)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert report["rendered"] == rendered
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert report["reply"] == tokenizer.decode(out, skip_special_tokens=True)
    streamed = attune("chat", bundle, "--prompt", prompt, "--max-new-tokens", 24)
    assert streamed.stdout == report["reply"] + "\n"


def test_adapter_there_and_back(bundle: Path, tmp_path: Path) -> None:
    source = bundle / "adapter"
    assert (
        attune("adapter", "convert", source, tmp_path / "a.ptd", "--bundle", bundle).returncode == 0
    )
    assert (tmp_path / "a.ptd").read_bytes() == (bundle / "android/adapter.ptd").read_bytes()
    assert attune("adapter", "convert", tmp_path / "a.ptd", tmp_path / "back").returncode == 0
    first, second = read_peft(source), read_peft(tmp_path / "back")
    assert first.config == second.config
    assert first.tensors.keys() == second.tensors.keys()
    for module, pair in first.tensors.items():
        for one, other in zip(pair, second.tensors[module], strict=True):
            np.testing.assert_array_equal(one, other)
    shown = json.loads(attune("adapter", "show", tmp_path / "a.ptd", "--json").stdout)
    assert shown["parameters"] == sum(a.size + b.size for a, b in first.tensors.values())
    assert "exists already" in refused("adapter", "convert", source, tmp_path / "back")
    assert "--bundle" in refused("adapter", "convert", source, tmp_path / "b.ptd")


def test_one_flipped_bit(bundle: Path, tmp_path: Path) -> None:
    """Anywhere in any file: the bundle is refused and the file named."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    source = random.Random(0)
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for _ in range(4):
            place, bit = source.randrange(len(original)), 1 << source.randrange(8)
            changed = bytearray(original)
            changed[place] ^= bit
            path.write_bytes(changed)
            with pytest.raises(BundleError, match=path.name.split(".")[0]):
                open_bundle(copy)
        path.write_bytes(original)
    open_bundle(copy)
    program = bytearray((copy / "android/lm.pte").read_bytes())
    program[len(program) // 2] ^= 1
    (copy / "android/lm.pte").write_bytes(program)
    assert "android/lm.pte" in refused("inspect", copy)
    assert "android/lm.pte" in refused("chat", copy, "--prompt", "Hi")
    shutil.rmtree(copy / "android")
    assert "android/lm.pte is missing" in refused("inspect", copy)
    (copy / "extra.txt").write_text("x")
    assert "extra.txt is not in the manifest" in refused("inspect", copy)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./nowhere"], "no such file or folder"),
        (["tiny", "--context", "99999"], "at most 512"),
        (["tiny", "--lora-rank", "0"], "--lora-rank 0"),
        (["tiny", "--lora-targets", "q_proj,nose"], "nose"),
        (["tiny", "--quantize", "3bit"], "8da4w"),
        (["tiny", "--target", "watch"], "watch"),
        (["tiny", "--adapter", "nowhere"], "no such adapter folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: str, tmp_path: Path) -> None:
    assert words in refused("export", *arguments, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_mistakes(bundle: Path, tmp_path: Path) -> None:
    assert "exists already" in refused("export", "tiny", "--out", bundle)
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(builtin_folder() / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickle" in refused("export", folder, "--out", tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(builtin_folder(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused("export", broken, "--out", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "x.gguf" in refused("export", tmp_path / "x.gguf", "--out", tmp_path / "out")
    other = tmp_path / "adapter"
    shutil.copytree(bundle / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "use_dora" in refused("export", "tiny", "--adapter", other, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        command = ("export", "tiny", "--target", "android", "--quantize", "none")
        assert "No space left" in refused(*command, "--out", disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_doctor_and_optimum() -> None:
    report = json.loads(attune("doctor", "--json").stdout)
    assert {"torch", "executorch", "coremltools"} <= {row["package"] for row in report["packages"]}
    assert report["ok"] is all(row["ok"] for row in report["packages"])
    optimum = Path(sys.executable).with_name("optimum-cli")
    listed = subprocess.run(
        [optimum, "export", "--help"], capture_output=True, text=True, check=True
    )
    assert "attune" in listed.stdout
