"""The weights file against its source, by what docs/bundle.md says of it: every precision, whether
it has the integers of ``lm`` or the source was rounded once more; and faults, each named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from exporters.model.assembly import build
from exporters.model.quantize import quantized
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer
from runtime_py.bundle.manifest import Training
from tests import tiny
from tests.toolchain.verify.conftest import rewrite
from toolchain.compile.precision import ANDROID
from toolchain.compile.training_part import training_spec, write_training
from toolchain.verify.parity.weights_checks import training_file

# What ``lm`` computes with, and what the file was asked for (None: the same).
CASES = [
    ("none", None),
    ("8da8w", None),
    ("8da4w", None),
    ("none", "int8"),
    ("none", "int4"),
    ("8da4w", "int8"),
    ("8da8w", "int4"),
    ("8da4w", "fp32"),
]


@dataclass(frozen=True, eq=False)
class Written:
    file: Path
    training: Training
    model: Transformer

    def reason(self) -> str:
        """Of the first fault; empty where there is none."""
        checks, found = training_file(self.file, self.training, self.model)
        assert (found is None) == all(check.passed for check in checks)
        return found.sentence if found else ""


@cache
def model_of(quantize: str, kind: str) -> Transformer:
    hf = tiny.hugging_face(kind)
    state = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    model = build(read_spec(hf.config, tiny.CONTEXT), state, tiny.every_target(kind), 4)
    if (scheme := ANDROID[quantize]) is None:
        return model
    return quantized(model, scheme, [tiny.tokens_of(40, seed) for seed in range(4)])


def write(folder: Path, quantize: str, weights: str | None, kind: str = "llama") -> Written:
    model = model_of(quantize, kind)
    spec = training_spec(model, tiny.every_target(kind), 4, weights)
    training = write_training(folder, model, spec, [32, 16])
    return Written(folder / training.weights, training, model)


@pytest.mark.parametrize(("quantize", "weights"), CASES)
def test_a_clean_file_and_a_flipped_bit(quantize: str, weights: str | None, tmp_path: Path) -> None:
    written = write(tmp_path, quantize, weights)
    assert written.reason() == ""
    part = "value" if written.training.precision == "fp32" else "q"
    name = f"layers.1.gate.{part}"

    def flip(old: np.ndarray) -> np.ndarray:
        new = old.copy()
        new.reshape(-1).view(np.uint8)[777] ^= 1
        return new

    rewrite(written.file, name, flip)
    reason = written.reason()
    assert reason.startswith(f"layer 1: gate projection ({part}), tensor {name} of ")
    assert "in 1 of 32768 numbers" in reason


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi3"])
def test_other_architectures_are_clean(kind: str, tmp_path: Path) -> None:
    """Biases, norms of queries and of updates, fused modules, partial rotary embedding."""
    assert write(tmp_path, "none", None, kind).reason() == ""


@pytest.mark.parametrize(("quantize", "weights"), [("8da4w", None), ("none", "int4")])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.down.scale", lambda s: np.roll(s, 1, axis=2)),
        ("layers.0.down.scale", lambda s: s[:, ::-1]),
        ("layers.1.up.offset", lambda o: np.roll(o, 1, axis=2)),
        ("layers.0.down.q", lambda q: np.roll(q, 32, axis=2)),
        ("layers.1.q.scale", lambda s: s * 2),
    ],
    ids=["a shifted group", "exchanged rows", "shifted offsets", "moved integers", "twice"],
)
def test_groups_and_scales(
    quantize: str, weights: str | None, name: str, change: Callable, tmp_path: Path
) -> None:
    written = write(tmp_path, quantize, weights)
    rewrite(written.file, name, change)
    reason = written.reason()
    layer, matrix = name.split(".")[1:3]
    assert reason.startswith(f"layer {layer}: {matrix} projection")
    # A matrix that was rounded once more is judged by its values: which part is wrong is open.
    assert f"tensor {name if weights is None else f'layers.{layer}.{matrix}.q'} of" in reason


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("rope.0.sin", "rotary table (0.sin)"),
        ("layers.1.norm.mlp", "layer 1: norm (mlp)"),
        ("norm", "final norm"),
        ("head.value", "head (value)"),
        ("layers.0.k.bias", "layer 0: k projection (bias)"),
    ],
)
def test_what_is_no_block_matrix(name: str, operator: str, tmp_path: Path) -> None:
    written = write(tmp_path, "none", None, "qwen2")
    rewrite(written.file, name, lambda old: old + np.float32(1e-3))
    assert written.reason().startswith(f"{operator}, tensor {name} of")


def test_a_transposed_matrix_is_told(tmp_path: Path) -> None:
    written = write(tmp_path, "none", None)
    rewrite(written.file, "layers.1.q.value", lambda w: w.transpose(0, 2, 1))
    assert "it is transposed; the same numbers in another order" in written.reason()


def test_a_damaged_file(tmp_path: Path) -> None:
    written = write(tmp_path, "none", None)
    written.file.write_bytes(written.file.read_bytes()[:1000])
    checks, _ = training_file(written.file, written.training, written.model)
    assert not checks[0].passed
    assert "not a whole safetensors file" in checks[0].note


def test_tensors_that_are_missing_or_too_many(tmp_path: Path) -> None:
    """As in the file of a model with other layers, or another precision."""
    written = write(tmp_path, "none", None)
    content = written.file.read_bytes()
    written.file.write_bytes(content.replace(b'"layers.1.up.value"', b'"layers.1.ap.value"'))
    checks, found = training_file(written.file, written.training, written.model)
    assert found is not None
    assert found.sentence.startswith("layer 1: up projection (value), tensor layers.1.up.value of")
    assert [check.note for check in checks] == ["is missing", "is no part of it"]
    other = written.training.model_copy(update={"precision": "int8"})
    _, found = training_file(written.file, other, written.model)
    assert found is not None
    assert "is missing" in found.sentence
