"""Drawing tokens, and adapter files: what the phone's engine does besides running programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from exporters.model.spec import read_spec
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.engine.job_runner import read_values, runtime_file, write_values
from runtime_py.engine.phone_engine import sample
from runtime_py.loop.errors import LoopError
from runtime_py.loop.random_stream import SplitMix64
from tests import tiny

LOGITS = np.array([0.3, -1.0, 2.0, 0.0, 1.1], np.float32)
TENSORS = tuple(
    AdapterTensor(name=name, peft="", rows=(0, 1), shape=shape, offset=offset)
    for name, shape, offset in (("a", (1, 2, 3), 16), ("b", (1, 4), 48), ("scale", (1, 1, 1), 64))
)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_as_often_as_softmax_says(temperature: float) -> None:
    chance, draws = SplitMix64(3), 20_000
    found = Counter(sample(LOGITS, temperature, chance) for _ in range(draws))
    expected = softmax(LOGITS.astype(np.float64) / temperature) * draws
    assert chisquare([found[i] for i in range(5)], expected).pvalue > 1e-3


def test_the_same_seed_draws_the_same_tokens() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    one, other = SplitMix64(9), SplitMix64(9)
    assert [sample(row, 0.5, one) for row in rows] == [sample(row, 0.5, other) for row in rows]


def test_temperature_zero_draws_nothing() -> None:
    chance = SplitMix64(5)
    assert sample(LOGITS, 0.0, chance) == 2
    assert chance.state == 5


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    chance = SplitMix64(1)
    assert {sample(logits, 1.0, chance) for _ in range(200)} == {1}


def test_a_patched_adapter_differs_in_its_values_only(tmp_path: Path) -> None:
    source, file = tmp_path / "adapter.ptd", tmp_path / "new.ptd"
    source.write_bytes(bytes(range(80)))
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
        "b": np.full((1, 4), -0.25, np.float32),
        "scale": np.full((1, 1, 1), 2.0, np.float32),
    }
    write_values(file, source, TENSORS, values)
    back = read_values(file, TENSORS)
    assert all(np.array_equal(back[name], value) for name, value in values.items())
    old, new = source.read_bytes(), file.read_bytes()
    outside = [*range(16), *range(40, 48), *range(68, 80)]
    assert [old[i] for i in outside] == [new[i] for i in outside]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.ptd", "new.ptd"]


def test_a_short_file_is_no_adapter(tmp_path: Path) -> None:
    file = tmp_path / "adapter.ptd"
    file.write_bytes(bytes(60))
    with pytest.raises(LoopError, match="no place for b"):
        read_values(file, TENSORS)


def test_the_bundle_s_own_adapter_has_a_runtime_file(tmp_path: Path) -> None:
    spec = read_spec(tiny.config_of("llama"), tiny.CONTEXT)
    bundle = tiny.paper_bundle(tmp_path / "bundle", spec, ["q_proj"], 4)
    opened = open_bundle(bundle)
    own = bundle / "adapter" / "adapter_model.safetensors"
    assert runtime_file(opened, own) == bundle / "android" / "adapter.ptd"
    other = tmp_path / "00001.ptd"
    assert runtime_file(opened, other) == other
    with pytest.raises(LoopError, match="not an adapter file"):
        runtime_file(opened, tmp_path / "adapter_model.safetensors")
