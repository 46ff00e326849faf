"""The command line in this process, and the bundles that several tests look at."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import tokenizer_of
from toolchain.cli import app
from toolchain.compile.bundle_export import export


@dataclass(frozen=True)
class Said:
    """What a command left: exit code, and all that reached its two streams."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        """Standard output, which must be exactly one JSON object."""
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Attune = Callable[..., Said]


@pytest.fixture
def attune(capfd: pytest.CaptureFixture[str]) -> Attune:
    """Runs one command here; the streams are those of the process, native code's words included."""

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        code: object = 0
        try:
            app.run([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        return Said(code, out, err)

    return run


def command(*arguments: object, program: str = "attune") -> Said:
    """Runs an installed console script, as a person does."""
    script = Path(sys.executable).with_name(program)
    done = subprocess.run([script, *map(str, arguments)], capture_output=True, text=True)
    return Said(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Exported:
    """A bundle, and what its export printed with ``--json``."""

    bundle: Path
    said: dict
    beside: list[str]  # names in the folder that the bundle was written to


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The built-in model for Android and iOS, all by default, as a person exports it."""
    folder = tmp_path_factory.mktemp("both")
    said = command("export", "tiny", "--out", folder / "tiny", "--json").json()
    return Exported(folder / "tiny", said, sorted(p.name for p in folder.iterdir()))


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The built-in model for Android, not quantized: comparable with transformers."""
    folder = tmp_path_factory.mktemp("fp32")
    export = ["export", "tiny", "--target", "android", "--quantize", "none", "--json", "--out"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        app.app([*export, str(folder / "tiny")], standalone_mode=False)
    said = json.loads(out.getvalue())
    return Exported(folder / "tiny", said, sorted(p.name for p in folder.iterdir()))


def save_random_llama(folder: Path, seed: int) -> Path:
    """A checkpoint of one layer with random weights and a byte-level tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of(config.vocab_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("random-source"), 0)


@pytest.fixture(scope="session")
def random_bundle(random_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``random_source`` for Android, with 8-bit weights."""
    out = tmp_path_factory.mktemp("random-bundle") / "b"
    export(str(random_source), out, targets=("android",), quantize={"android": "8da8w"})
    return out
