"""Evaluation: what it compares, what it reads, and what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from runtime_py.bundle.bundle import open_bundle
from tests.toolchain.conftest import Attune
from toolchain.compile.source import find_source, float_model
from toolchain.compile.tolerances import model_terms, rounding
from toolchain.verify.evaluation import difference, perturbed_logits

DIALOGUES = [
    [
        {"role": "user", "content": f"What is {i}?"},
        {"role": "assistant", "content": f"It is {i * i}."},
    ]
    for i in range(3)
]

GOOD = json.dumps({"id": "a", "turns": DIALOGUES[0]})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"id": f"d{i}", "turns": t}) + "\n" for i, t in enumerate(DIALOGUES)
        )
    return path


def test_evaluate_compares_with_pytorch(
    attune: Attune, random_bundle: Path, random_source: Path, data: Path
) -> None:
    arguments = (
        "evaluate",
        random_bundle,
        "--data",
        data,
        "--source",
        random_source,
        "--threads",
        "1",
    )
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
        ("", "no dialogue"),
        ("{", "line 1 of"),
        ('{"id": "a", "turns": [{"role": "user"}]}\n', "no content"),
        ('{"turns": []}\n', "no id"),
        (f"{GOOD}\n{GOOD}\n", "the id 'a' of line 1"),
        ('{"id": "a", "turns": [{"role": "system", "content": "Be kind."}]}\n', "expected 'user'"),
        (None, "there is no stream"),
    ],
)
def test_evaluate_refuses_data(
    attune: Attune, random_bundle: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "d.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    result = attune("evaluate", random_bundle, "--data", path)
    assert result.code == 2
    assert words in result.err


def test_evaluate_needs_the_source(attune: Attune, random_bundle: Path, data: Path) -> None:
    result = attune("evaluate", random_bundle, "--data", data)
    assert result.code == 2
    assert "--source" in result.err


def test_difference_against_a_closed_form() -> None:
    expected = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    found = expected + torch.tensor([[[0.0, 0.0], [4.5, 0.0]]])
    gap = difference(found, expected)
    assert gap.largest == 4.5 / 4
    assert gap.rms == pytest.approx(4.5 / 5, rel=2.0**-23, abs=0)  # a division in float32
    assert gap.same_token == 0.5


@torch.no_grad()
def test_perturbation_is_small_and_leaves_the_model_alone(
    random_bundle: Path, random_source: Path
) -> None:
    manifest = open_bundle(random_bundle).manifest
    original = find_source(manifest, str(random_source))
    assert not isinstance(original, str)
    model = float_model(manifest, original)
    tokens = torch.arange(20)[None]
    before = model(tokens)
    changed = perturbed_logits(model, tokens, 0)
    # A bit of noise on every embedding, and nothing is rounded to int8 here.
    assert 0 < difference(changed, before).largest <= rounding(model_terms(model.spec, 20))
    assert torch.equal(model(tokens), before)
