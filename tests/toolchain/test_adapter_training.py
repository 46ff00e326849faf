"""``attune train`` as a user meets it: it learns, survives kills, and refuses what it must."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from exporters.model.spec import read_spec
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import example
from runtime_py.engine.run_state import FILE
from runtime_py.engine.training_plan import Settings
from runtime_py.loop.stream import read_stream
from tests.bounds import loss_bound
from tests.toolchain.conftest import Attune, Exported
from toolchain.adapter_training import train_adapter
from toolchain.compile.autograd import summed_loss
from toolchain.compile.export_input import builtin_folder

STYLE = [
    ("Can you book a table?", "Aye aye! A table it is, captain."),
    ("Is there a bus to the city?", "Aye aye! The bus leaves at nine, captain."),
    ("I need a hotel in Paris.", "Aye aye! A fine hotel in Paris, captain."),
    ("What is the weather like?", "Aye aye! The sky is clear, captain."),
    ("Please play some music.", "Aye aye! Music it is, captain."),
    ("Find me a dentist.", "Aye aye! There is a dentist in San Jose, captain."),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "style.jsonl"
    rows = []
    for i in range(18):
        question, answer = STYLE[i % len(STYLE)]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": f"s{i}", "turns": turns}))
    path.write_text("\n".join(rows))
    return path


def test_it_learns_and_peft_agrees(
    fp32: Exported, attune: Attune, data: Path, tmp_path: Path
) -> None:
    """Losses fall; PEFT loads the result and finds the same held-out loss; lm speaks otherwise."""
    out = tmp_path / "run"
    said = attune(
        *("train", fp32.bundle, "--data", data, "--out", out, "--steps", 12, "--batch", 6),
        *("--learning-rate", 3e-3, "--held-out", 0.2, "--json"),
    ).json()
    assert said["losses"][-1] < 0.5 * said["losses"][0]
    assert said["held_out_after"] < 0.7 * said["held_out_before"]
    assert said["tokens_per_second"] > 0
    assert (out / "curve.svg").read_text().startswith("<?xml")
    base = AutoModelForCausalLM.from_pretrained(builtin_folder(), dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    text = ChatText.of(open_bundle(fp32.bundle))
    total, count, bounds = 0.0, 0, []
    spec = read_spec(base.config, open_bundle(fp32.bundle).manifest.model.context)
    dialogues = [record.dialogue for record in read_stream(data)]
    for dialogue in [dialogues[i] for i in (3, 8, 12, 17)]:  # one in so many, see train_adapter
        one = example(dialogue, text)
        with torch.no_grad():
            logits = peft(torch.from_numpy(one.tokens)[None]).logits
        loss = summed_loss(logits, one).item()
        bounds.append(loss_bound(spec, logits, loss / one.count))
        total += loss
        count += one.count
    assert max(bounds) < 1e-2 * total / count  # a wrong constant of 1 % is seen
    assert abs(said["held_out_after"] - total / count) <= max(bounds)
    chat = ("chat", fp32.bundle, "--prompt", "I need a hotel in Paris.", "--json")
    before = attune(*chat).json()["reply"]
    after = attune(*chat, "--adapter", out / "adapter.ptd").json()["reply"]
    again = attune(*chat, "--adapter", out / "adapter").json()["reply"]
    assert after == again != before
    assert "aye" in after.lower()


def _train(bundle: Path, data: Path, out: Path) -> None:
    """A run in a process of its own, saved at every step."""
    settings = Settings(steps=12, batch=2, check_every=2, patience=0, save_every=1)
    train_adapter(bundle, data, out, settings=settings, held_out=0.34, stopping_from=2, threads=1)


def final(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "run" / FILE)


def test_half_of_the_held_out_choose_the_step(
    fp32: Exported, attune: Attune, tmp_path: Path
) -> None:
    """The other half is reported. The adapter is that of the step where the curve is lowest."""
    rows = []
    for i in range(40):
        question, answer = STYLE[i % len(STYLE)]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": f"s{i}", "turns": turns}))
    data = tmp_path / "style.jsonl"
    data.write_text("\n".join(rows))
    options = (
        "--data",
        data,
        "--steps",
        6,
        "--batch",
        4,
        "--learning-rate",
        3e-3,
        "--b-rate-ratio",
        2,
    )
    said = attune(
        *("train", fp32.bundle, "--out", tmp_path / "run", *options, "--held-out", 0.4),
        *("--check-every", 1, "--json"),
    ).json()
    assert (said["dialogues"], said["stopping_dialogues"], said["held_out_dialogues"]) == (40, 8, 8)
    curve = dict(said["stopping_curve"])
    assert list(curve) == [0, 2, 4, 6]  # no more are looked at than were learned since: 8
    assert curve[said["kept_step"]] == min(curve.values()) < curve[0]
    assert said["held_out_curve"] == [
        [0, said["held_out_before"]], [said["kept_step"], said["held_out_after"]],
    ]  # fmt: skip
    assert "choosing the step" in (tmp_path / "run" / "curve.svg").read_text()
    plain = attune(
        *("train", fp32.bundle, "--out", tmp_path / "plain", *options, "--held-out", 0.4),
        *("--no-stop", "--json"),
    ).json()
    assert (plain["stopping_dialogues"], plain["held_out_dialogues"]) == (0, 16)
    assert (plain["stopping_curve"], plain["kept_step"], len(plain["losses"])) == ([], 6, 6)
    assert plain["losses"][:2] == said["losses"][:2]  # the same dialogues are learned


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.full)])
def test_killed_at_random_moments(kills: int, fp32: Exported, data: Path, tmp_path: Path) -> None:
    """Every resume ends with the same bits as the run that was left alone."""
    # A server that has imported everything, so that a child takes a second and not ten.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["toolchain.adapter_training", __name__])

    def start(out: Path) -> multiprocessing.process.BaseProcess:
        child = processes.Process(target=_train, args=(fp32.bundle, data, out))
        child.start()
        return child

    whole = tmp_path / "whole"
    first = start(whole)
    first.join()
    assert first.exitcode == 0
    expected = final(whole)
    chance, killed, finished = random.Random(0), 0, 0
    while killed < kills:
        out = tmp_path / f"cut-{finished}"
        child, state, seen = start(out), out / "run" / FILE, 0
        steps = chance.randrange(12)  # to be seen on disk before it is killed
        last = state.stat().st_mtime_ns if state.exists() else 0
        while child.is_alive() and seen < steps:
            if state.exists() and state.stat().st_mtime_ns != last:
                seen, last = seen + 1, state.stat().st_mtime_ns
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.join()
        if child.exitcode == 0 or killed == kills:
            last_child = start(out)
            last_child.join()
            assert last_child.exitcode == 0
            for name, value in expected.items():
                np.testing.assert_array_equal(final(out)[name], value)
            finished += 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "has no dialogue"),
        ('{"id": "a", "turns": []}\n', "line 1"),
        ('{"id": "a"\n', "line 1"),
    ],
)
def test_data_that_cannot_be(
    rows: str, words: str, fp32: Exported, attune: Attune, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(rows)
    said = attune("train", fp32.bundle, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "o")
    assert said.code == 2, said.err
    assert words in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "o").exists()


def test_options_that_cannot_be(fp32: Exported, attune: Attune, data: Path, tmp_path: Path) -> None:
    base = ("train", fp32.bundle, "--out", tmp_path / "o")
    for words, arguments in {
        "no --schedule wavy": ("--data", data, "--schedule", "wavy"),
        "no --memory huge": ("--data", data, "--memory", "huge"),
        "--learning-rate 0": ("--data", data, "--learning-rate", 0),
        "--b-rate-ratio 0": ("--data", data, "--b-rate-ratio", 0),
        "--learning-rate inf": ("--data", data, "--learning-rate", "inf"),
        "--weight-decay inf": ("--data", data, "--weight-decay", "inf"),
        "none.jsonl": ("--data", tmp_path / "none.jsonl"),
    }.items():
        said = attune(*base, *arguments)
        assert said.code == 2, said.err
        assert words in said.err
        assert "Traceback" not in said.err
    said = attune("train", fp32.bundle, "--data", data, "--out", data / "o")
    assert said.code == 2
    assert "cannot be written: Not a directory" in said.err
