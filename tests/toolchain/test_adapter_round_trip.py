"""An adapter's life through the loop and through the command line: what comes out is PEFT's.

PEFT itself is the judge: the folder that is written, loaded around the source model, gives the
logits that the bundle's program gives with the file that it was made from.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from exporters.model.spec import read_spec
from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.flat_tensor import write_ptd
from runtime_py.bundle.peft_adapter import read_peft, write_peft
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.phone_engine import PhoneEngine
from runtime_py.engine.streamed_tuner import StreamedFineTuner
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.lexicons import read_lexicons
from runtime_py.loop.personalizer import ADAPTERS, Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.schedule import Conditions, Moment
from tests import tiny
from tests.toolchain.conftest import Attune, Exported
from toolchain.cli import app
from toolchain.compile.export_input import builtin_folder
from toolchain.compile.tolerances import model_terms, rounding

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NIGHT = Conditions(charging=True, idle=True, celsius=25.0, free_memory_mb=1 << 20)
# What is said is the same in all, so that what is held out is learnt from the others.
DIALOGUES = [
    Dialogue(f"d{i}", (Turn("user", f"the {word}"), Turn("assistant", "sat on the mat")))
    for i, word in enumerate(("cat", "hat", "mat", "other", "mother", "cats"))
]


@dataclass(frozen=True)
class Origin:
    """A bundle, the model that it was made of, and the PEFT folder that it was exported with."""

    bundle: Bundle
    model: Path
    peft: Path


@pytest.fixture(scope="module")
def patterns(fp32: Exported, tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Ranks and alphas that differ from module to module and from layer to layer, and a module
    that the programs adapt and this adapter does not: the built-in model's bundle with another
    adapter in its place."""
    folder, model = tmp_path_factory.mktemp("patterns"), builtin_folder()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options: dict = {
        "rank_pattern": {"v_proj": 2, r"layers\.1\..*q_proj": 6},
        "alpha_pattern": {"v_proj": 9, "layers.0.self_attn.q_proj": 1},
    }
    tiny.adapted(base, ["q_proj", "v_proj"], **options).save_pretrained(str(folder / "peft"))
    bundle = folder / "bundle"
    shutil.copytree(fp32.bundle, bundle, copy_function=os.link)
    shutil.rmtree(bundle / "adapter")
    adapter, manifest = read_peft(folder / "peft"), open_bundle(fp32.bundle).manifest
    write_peft(bundle / "adapter", adapter)
    write_ptd(bundle / "android/adapter.ptd", to_runtime(adapter, manifest.adapter.tensors))
    for name in (m.MANIFEST, m.CHECKSUM):
        (bundle / name).unlink()
    m.write_manifest(bundle, manifest.model_copy(update={"files": m.list_files(bundle)}))
    return Origin(open_bundle(bundle), model, folder / "peft")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Phi3's ``qkv_proj``, whose B is three tensors of the programs; rsLoRA; values in bfloat16."""
    folder = tmp_path_factory.mktemp("fused")
    model, peft = tiny.save_checkpoint(folder / "model", "phi3"), folder / "peft"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options: dict = {"use_rslora": True, "rank_pattern": {"o_proj": 3}}
    adapted = tiny.adapted(base, ["qkv_proj", "o_proj"], **options)
    adapted.to(torch.bfloat16).save_pretrained(str(peft))
    export = ["export", str(model), "--adapter", str(peft), "--out", str(folder / "bundle")]
    with contextlib.redirect_stdout(io.StringIO()):
        app.app(
            [*export, "--target", "android", "--quantize", "none", "--json"], standalone_mode=False
        )
    return Origin(open_bundle(folder / "bundle"), model, peft)


@pytest.fixture(scope="module")
def uniform(fp32: Exported) -> Origin:
    """The built-in model with the adapter that an export begins with."""
    return Origin(open_bundle(fp32.bundle), builtin_folder(), fp32.bundle / "adapter")


@pytest.fixture(params=["uniform", "patterns", "fused"])
def origin(request: pytest.FixtureRequest) -> Origin:
    return request.getfixturevalue(request.param)


@contextlib.contextmanager
def opened(origin: Origin, folder: Path) -> Iterator[Personalizer]:
    policy = replace(
        LoopPolicy.from_fields(dict(origin.bundle.manifest.policy.loop)),
        bins=8,
        questions_per_day=99,
        heldout_every=3,
        paraphrases=0,
        fine_tune_every_sets=len(DIALOGUES),
        epochs=3,
        batch=2,
        learning_rate=1e-3,
        fine_tune_memory_mb=0,
    )
    engine = PhoneEngine(origin.bundle, threads=1)
    ticks = itertools.count()
    with Personalizer(
        folder=folder,
        policy=policy,
        lexicons=read_lexicons(),
        engine=engine,
        tuner=StreamedFineTuner(origin.bundle, engine.text, before=engine.release),
        clock=lambda: Moment(float(next(ticks)), 0),
        bundle=origin.bundle,
    ) as personalizer:
        yield personalizer


def logits_of_peft(origin: Origin, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(origin.model, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder)).eval()(tokens).logits[:, -1]


def check_same_logits(origin: Origin, file: Path, folder: Path) -> None:
    tokens = tiny.tokens_of(24, vocab=320)
    program = ExecutorchLm(origin.bundle.android.lm, file).prefill(tokens)
    expected = logits_of_peft(origin, folder, tokens)
    spec = read_spec(AutoConfig.from_pretrained(origin.model), 24)
    bound = rounding(model_terms(spec, 24))
    assert tiny.relative(program, expected) <= bound
    before = logits_of_peft(origin, origin.peft, tokens)
    assert tiny.relative(before, expected) > 10 * bound  # it was trained, and that is seen


def check_like_the_first(origin: Origin, folder: Path) -> None:
    """The same modules, ranks, alphas and kind of scaling as the adapter that all began with."""
    first, trained = (json.loads((f / CONFIG).read_text()) for f in (origin.peft, folder))
    assert trained == first
    shapes = [
        {name: tensor.shape for name, tensor in load_file(f / WEIGHTS).items()}
        for f in (origin.peft, folder)
    ]
    assert shapes[0] == shapes[1]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_through_the_loop(origin: Origin, attune: Attune, tmp_path: Path) -> None:
    """Trained, accepted and exported; the command line converts the same file to the same folder,
    and that folder to the same file. The bundle's own adapter comes out as it went in."""
    with opened(origin, tmp_path / "app") as loop:
        for dialogue in DIALOGUES:
            loop.observe(dialogue)
        for question in loop.pending_questions():
            loop.answer(question.id)
        report = loop.fine_tune(NIGHT)
        assert report.state == "accepted", report.reason
        loop.export_adapter(tmp_path / "trained")
        loop.rollback()
        loop.export_adapter(tmp_path / "first")
    file = tmp_path / "app" / ADAPTERS / "00001.ptd"
    check_like_the_first(origin, tmp_path / "trained")
    check_same_logits(origin, file, tmp_path / "trained")
    assert files(tmp_path / "first") == files(origin.bundle.peft)
    attune("adapter", "convert", file, tmp_path / "converted", "--json").json()
    assert files(tmp_path / "converted") == files(tmp_path / "trained")
    back = ("adapter", "convert", tmp_path / "converted", tmp_path / "back.ptd")
    attune(*back, "--bundle", origin.bundle.path, "--json").json()
    convert_first = ("adapter", "convert", origin.bundle.peft, tmp_path / "first.ptd")
    attune(*convert_first, "--bundle", origin.bundle.path, "--json").json()
    assert (tmp_path / "first.ptd").read_bytes() == origin.bundle.adapter_file.read_bytes()
    check_same_logits(origin, tmp_path / "back.ptd", tmp_path / "trained")


def test_through_the_command_line(origin: Origin, attune: Attune, tmp_path: Path) -> None:
    """Trained by ``attune train``; both forms that it writes are the same adapter."""
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    rows = [
        {"id": d.id, "turns": [{"role": t.role, "content": t.content} for t in d.turns]}
        for d in DIALOGUES
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    train = ("train", origin.bundle.path, "--data", data, "--out", out, "--epochs", 2, "--json")
    losses = attune(*train, "--batch", 2, "--learning-rate", 1e-3).json()["losses"]
    assert losses[-1] < losses[0]
    check_like_the_first(origin, out / "adapter")
    check_same_logits(origin, out / "adapter.ptd", out / "adapter")
    attune("adapter", "convert", out / "adapter.ptd", tmp_path / "converted", "--json").json()
    assert files(tmp_path / "converted") == files(out / "adapter")
