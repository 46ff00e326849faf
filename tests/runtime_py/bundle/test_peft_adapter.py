"""PEFT folders against PEFT itself: what it writes we read, what we write it loads."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from runtime_py.bundle import peft_config
from runtime_py.bundle.peft_adapter import (
    PeftAdapter,
    check_fits,
    fresh_config,
    read_peft,
    write_peft,
)
from runtime_py.loop.errors import AdapterError, DiskFull, WriteError
from toolchain.compile.tolerances import rounding

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def saved(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> PeftModel:
    """A PEFT adapter with B ≠ 0, saved by PEFT."""
    options: dict = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **(options | changes))
    model = get_peft_model(base_model(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn_like(parameter) * 0.1).to(dtype)
    model.save_pretrained(str(folder))
    return model


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of layer 0's q_proj; keys are the endings, with _ for a dot."""
    state = load_file(folder / WEIGHTS)
    for ending, value in changes.items():
        key = f"base_model.model.{Q0}.{ending}"
        state.pop(key, None)
        if value is not None:
            state[key] = value
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {r"layers\.1\..*": 6, "v_proj": 2}, "use_rslora": True},
        {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "proj": 7}},
        {"rank_pattern": {"layers.0.self_attn.v_proj": 3, "q_pro": 9}},
    ],
)
def test_scaling_rank_and_delta_equal_peft(tmp_path: Path, changes: dict) -> None:
    model = saved(tmp_path / "a", **changes)
    adapter = read_peft(tmp_path / "a")
    layers = lora_layers(model)
    assert adapter.tensors.keys() == layers.keys()
    assert (adapter.rank, adapter.alpha) == (4, 8)
    for name, layer in layers.items():
        a, b = adapter.tensors[name]
        assert adapter.rank_of(name) == layer.r["default"]
        assert adapter.alpha_of(name) == layer.lora_alpha["default"]
        assert adapter.scaling(name) == layer.scaling["default"]
        delta = layer.get_delta_weight("default").detach().numpy()
        scale = adapter.scaling(name)
        bound = rounding(a.shape[0]) * scale * (np.abs(b) @ np.abs(a)).max()
        np.testing.assert_allclose(b @ a * scale, delta, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_again_the_file_is_the_same_and_peft_loads_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = saved(tmp_path / "a", dtype)
    adapter = read_peft(tmp_path / "a")
    assert adapter.dtype == str(dtype).removeprefix("torch.")
    assert all(x.dtype == np.float32 for pair in adapter.tensors.values() for x in pair)
    write_peft(tmp_path / "b", adapter)

    before, after = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == dtype
        assert torch.equal(before[name], after[name])
    assert json.loads((tmp_path / "b" / CONFIG).read_text()) == adapter.config
    assert adapter.config == json.loads((tmp_path / "a" / CONFIG).read_text())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    loaded = PeftModel.from_pretrained(
        base_model(), str(tmp_path / "b"), autocast_adapter_dtype=False
    )
    for name, layer in lora_layers(loaded).items():
        original = lora_layers(model)[name]
        for part in ("lora_A", "lora_B"):
            ours, theirs = (getattr(x, part)["default"].weight for x in (layer, original))
            assert torch.equal(ours.to(dtype), theirs.to(dtype))


def test_bfloat16_rounds_like_torch(tmp_path: Path) -> None:
    saved(tmp_path / "a", torch.bfloat16)
    adapter = read_peft(tmp_path / "a")
    values = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    values[0, :4] = [1.00390625, 1.01171875, -0.0, 1e-40]  # ties, a signed zero, a denormal
    changed = dict(adapter.tensors) | {Q0: (values, adapter.tensors[Q0][1])}
    write_peft(tmp_path / "b", replace(adapter, tensors=changed))
    stored = load_file(tmp_path / "b" / WEIGHTS)[f"base_model.model.{Q0}.lora_A.weight"]
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(stored.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("bfloat16", 3.4e38)])
def test_a_value_too_large_for_the_dtype_is_refused(
    tmp_path: Path, folder: Path, dtype: str, value: float
) -> None:
    adapter = read_peft(folder)
    a, b = adapter.tensors[Q0]
    large = dict(adapter.tensors) | {Q0: (np.full_like(a, value), b)}
    with pytest.raises(AdapterError, match=f"too large for {dtype}"):
        write_peft(tmp_path / "b", replace(adapter, tensors=large, dtype=dtype))
    assert not (tmp_path / "b").exists()


def test_fresh_config_is_one_that_peft_reads(tmp_path: Path) -> None:
    config = fresh_config(8, 16, ["v_proj", "q_proj", "k_proj"], "org/base")
    read = LoraConfig.from_peft_type(**config)
    assert isinstance(read, LoraConfig)
    assert (read.r, read.lora_alpha, read.bias) == (8, 16, "none")
    assert read.target_modules == {"q_proj", "k_proj", "v_proj"}
    assert (read.base_model_name_or_path, read.task_type) == ("org/base", "CAUSAL_LM")
    tensors = {
        name: (np.ones((8, m.in_features), np.float32), np.zeros((m.out_features, 8), np.float32))
        for name, m in base_model().named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj"))
    }
    write_peft(tmp_path / "fresh", PeftAdapter(config, tensors))
    layers = lora_layers(PeftModel.from_pretrained(base_model(), str(tmp_path / "fresh")))
    assert layers.keys() == tensors.keys()
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}


def test_fits_lists_every_misfit_with_both_shapes(folder: Path) -> None:
    adapter = read_peft(folder)
    shapes = {m: (a.shape[1], b.shape[0]) for m, (a, b) in adapter.tensors.items()}
    check_fits(adapter, shapes | {"model.layers.0.mlp.up_proj": (32, 48)})
    shapes[Q0] = (40, 24)
    del shapes["model.layers.1.self_attn.v_proj"]
    with pytest.raises(AdapterError) as caught:
        check_fits(adapter, shapes)
    message = str(caught.value)
    assert "3 misfits" in message
    assert f"{Q0} A is [4, 32], expected [4, 40]" in message
    assert f"{Q0} B is [32, 4], expected [24, 4]" in message
    assert "model.layers.1.self_attn.v_proj does not exist in the base model" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"method_of_2031": "on"}, "method_of_2031"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"rank_pattern": {"q_(": 4}}, "no regular expression"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"target_modules": ["q_proj"]}, "v_proj is not among target_modules"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"r": 5}, r"A \[4, 32\] and B \[32, 4\], expected A \[5, in\]"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused(
    folder: Path, changes: dict, words: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(AdapterError, match=words):
        read_peft(folder)


def test_every_field_of_peft_is_known(folder: Path) -> None:
    """A new PEFT with a new field must be looked at before it is trusted."""
    known = peft_config._PLAIN | set(peft_config._REFUSED)
    assert {f.name for f in fields(LoraConfig)} <= known


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_B.weight": None}, "only one of lora_A and lora_B for model.layers.0"),
        ({"lora_A.weight": torch.full((4, 32), math.nan)}, "not finite"),
        ({"lora_A.weight": torch.zeros(3, 32)}, r"A \[3, 32\]"),
        ({"lora_A.weight": torch.zeros(4, 32, dtype=torch.float16)}, "F16, F32"),
        ({"lora_embedding_A": torch.zeros(4, 32)}, "lora_embedding_A"),
        ({"lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector"),
    ],
)
def test_tensors_that_are_not_plain_lora_are_refused(
    folder: Path, changes: dict, words: str
) -> None:
    retensor(folder, **changes)
    with pytest.raises(AdapterError, match=words):
        read_peft(folder)


def test_it_needs_no_torch() -> None:
    script = "import sys, runtime_py.bundle.peft_adapter; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_broken_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    def refused(words: str, where: Path = folder) -> None:
        with pytest.raises(AdapterError, match=words):
            read_peft(where)

    refused("no such adapter folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no adapter_config.json", tmp_path / "empty")

    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        refused("truncated or corrupt")
    (folder / WEIGHTS).unlink()
    refused("has no adapter_model.safetensors")
    torch.save({}, folder / "adapter_model.bin")
    refused("only as a pickle")
    (folder / CONFIG).write_text("{")
    refused("not valid JSON")
    (folder / CONFIG).write_text("[]")
    refused("holds a list")
    (folder / CONFIG).write_bytes(b"\xff\xfe")
    refused("not UTF-8")


def test_no_tensors_are_refused(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="no LoRA tensors"):
        read_peft(folder)


def test_writing_never_replaces_and_leaves_nothing_behind(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_peft(folder)
    with pytest.raises(AdapterError, match="exists already"):
        write_peft(folder, adapter)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DiskFull, match="no space is left"):
        write_peft(tmp_path / "new", adapter)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"):
        write_peft(tmp_path / "file" / "new", adapter)
