"""``attune adapter``: what it shows, converts and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from runtime_py.bundle.peft_adapter import write_peft
from tests import tiny
from tests.runtime_py.bundle.adapter_kit import DTYPES, RANK, SIZES, SPECS, adapter_of
from tests.toolchain.conftest import Attune
from toolchain.compile.tolerances import rounding


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.paper_bundle(tmp_path / "bundle", SPECS["llama"], ["q_proj", "down_proj"], RANK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convert_there_and_back(dtype: str, bundle: Path, attune: Attune, tmp_path: Path) -> None:
    base = tiny.hugging_face("llama", **SIZES)
    peft = tiny.adapted(
        base, ["q_proj", "down_proj"], use_rslora=True, rank_pattern={"down_proj": 3}
    )
    peft.to(DTYPES[dtype]).save_pretrained(str(tmp_path / "a"))
    ptd, back = tmp_path / "a.ptd", tmp_path / "back"
    said = attune("adapter", "convert", tmp_path / "a", ptd, "--bundle", bundle, "--json").json()
    assert said == {
        "source": str(tmp_path / "a"),
        "out": str(ptd),
        "bytes": ptd.stat().st_size,
    }
    attune("adapter", "convert", ptd, back, "--json").json()
    stored, again = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "a", back))
    assert stored.keys() == again.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == again[name].dtype == DTYPES[dtype]
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8))
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "a", back)]
    assert configs[0] == configs[1]
    once_more = tmp_path / "b.ptd"
    attune("adapter", "convert", back, once_more, "--bundle", bundle)
    assert once_more.read_bytes() == ptd.read_bytes()


def test_show_says_what_peft_says(bundle: Path, attune: Attune, tmp_path: Path) -> None:
    base = tiny.hugging_face("llama", **SIZES)
    peft = tiny.adapted(base, ["q_proj", "down_proj"], rank_pattern={"down_proj": 3})
    peft.save_pretrained(str(tmp_path / "a"))
    attune("adapter", "convert", tmp_path / "a", tmp_path / "a.ptd", "--bundle", bundle)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in peft.named_modules()
        if isinstance(layer, LoraLayer)
    }
    for path in (tmp_path / "a", tmp_path / "a.ptd"):
        said = attune("adapter", "show", path, "--json").json()
        assert (said["rank"], said["alpha"], said["dtype"]) == (4, 6, "float32")
        counts = [p.numel() for n, p in peft.named_parameters() if "lora_" in n]
        assert said["parameters"] == sum(counts)
        assert {row["module"] for row in said["modules"]} == layers.keys()
        for row in said["modules"]:
            layer = layers[row["module"]]
            assert row["rank"] == layer.r["default"]
            assert row["scaling"] == layer.scaling["default"]
            norm = layer.get_delta_weight("default").norm().item()
            # Products of the rank's length, and the root of a sum of squares of them.
            terms = layer.r["default"] + layer.in_features * layer.out_features
            assert row["update_norm"] == pytest.approx(norm, rel=rounding(terms), abs=0)
            assert (row["inputs"], row["outputs"]) == (layer.in_features, layer.out_features)
        plain = attune("adapter", "show", path)
        assert plain.code == 0
        assert "LoRA r 4" in plain.out


def test_convert_refuses(bundle: Path, attune: Attune, tmp_path: Path) -> None:
    adapter = adapter_of(4, ["q_proj"], SPECS["llama"])
    write_peft(tmp_path / "a", adapter)
    other = adapter_of(4, ["k_proj"], SPECS["llama"])
    write_peft(tmp_path / "other", other)
    (tmp_path / "x.ptd").write_bytes(b"no")
    before = sorted(tmp_path.iterdir())
    for arguments, words in (
        ((tmp_path / "a", tmp_path / "new.ptd"), "name its bundle with --bundle"),
        ((tmp_path / "a", tmp_path / "x.ptd", "--bundle", bundle), "exists already"),
        ((tmp_path / "a", tmp_path / "other"), "exists already"),
        ((tmp_path / "none", tmp_path / "new"), "no such adapter folder"),
        ((tmp_path / "none.ptd", tmp_path / "new"), "there is no adapter file"),
        ((tmp_path / "x.ptd", tmp_path / "new"), "not a whole .ptd file"),
        ((tmp_path / "other", tmp_path / "new.ptd", "--bundle", bundle), "k_proj is not adapted"),
        ((tmp_path / "a", tmp_path / "new.ptd", "--bundle", tmp_path / "a"), "no manifest.json"),
    ):
        said = attune("adapter", "convert", *arguments)
        assert (said.code, said.out) == (2, "")
        assert words in said.err
        assert "Traceback" not in said.err
        assert sorted(tmp_path.iterdir()) == before
