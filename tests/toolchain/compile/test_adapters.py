"""An adapter's two forms: what goes into a program's file comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from exporters.model.spec import ModelSpec, read_spec
from runtime_py.bundle.adapter_tensors import META, from_runtime, to_runtime
from runtime_py.bundle.flat_tensor import read_ptd, write_ptd
from runtime_py.bundle.peft_adapter import PeftAdapter, fresh_config, read_peft, write_peft
from runtime_py.loop.errors import AdapterError
from tests import tiny
from tests.toolchain.conftest import Attune
from toolchain.compile.adapter_layout import fresh, layout, module_shapes

RANK = 8  # of the programs
SPECS: dict[str, ModelSpec] = {
    kind: read_spec(tiny.config_of(kind, intermediate_size=24, hidden_size=32), tiny.CONTEXT)
    for kind in ("llama", "phi3")
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def values(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Numbers of many sizes, and zeros of both signs, that ``dtype`` holds."""
    array = random.normal(size=shape) * 10.0 ** random.integers(-6, 3, shape)
    array *= random.integers(0, 6, shape) > 0
    return torch.from_numpy(array).to(DTYPES[dtype]).to(torch.float32).numpy()


@st.composite
def adapters(draw: st.DrawFn) -> tuple[ModelSpec, PeftAdapter]:
    """Any adapter that fits a program: of some modules of some layers, with ranks of their own."""
    kind = draw(st.sampled_from(sorted(SPECS)))
    spec, targets = SPECS[kind], tiny.every_target(kind)
    chosen = draw(st.sets(st.sampled_from(sorted(module_shapes(spec))), min_size=1))
    rank = draw(st.integers(1, RANK))
    config = fresh_config(rank, draw(st.sampled_from([1, 16, 0.5, 3.7])), targets, "a/bäse")
    config["use_rslora"] = draw(st.booleans())
    config["rank_pattern"] = draw(
        st.dictionaries(st.sampled_from(targets), st.integers(1, RANK), max_size=3)
    )
    config["alpha_pattern"] = draw(
        st.dictionaries(st.sampled_from(targets), st.integers(1, 40), max_size=2)
    )
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    bare = PeftAdapter(config, {}, dtype)
    tensors = {}
    for module in sorted(chosen):
        into, out = module_shapes(spec)[module]
        own = bare.rank_of(module)
        shapes = (own, into), (out, own)
        tensors[module] = (values(random, shapes[0], dtype), values(random, shapes[1], dtype))
    return spec, PeftAdapter(config, tensors, dtype)


def same(one: PeftAdapter, other: PeftAdapter) -> None:
    assert (one.config, one.dtype) == (other.config, other.dtype)
    assert one.tensors.keys() == other.tensors.keys()
    for module, pair in one.tensors.items():
        for mine, theirs in zip(pair, other.tensors[module], strict=True):
            assert mine.shape == theirs.shape
            assert mine.tobytes() == theirs.tobytes()


@settings(max_examples=80, deadline=None)
@given(case=adapters())
def test_there_and_back_is_the_same(
    case: tuple[ModelSpec, PeftAdapter], tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec, adapter = case
    folder = tmp_path_factory.mktemp("adapter")
    arrays = to_runtime(adapter, layout(spec, tiny.every_target(spec.architecture), RANK))
    assert all(array.dtype == np.float32 for name, array in arrays.items() if name != META)
    write_ptd(folder / "x.ptd", arrays)
    back = from_runtime(read_ptd(folder / "x.ptd"), "x.ptd")
    same(back, adapter)
    write_peft(folder / "peft", back)
    same(read_peft(folder / "peft"), adapter)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2, "layers.1.*down_proj": 7}, "alpha_pattern": {"o_proj": 9}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_a_program_computes_the_update_of_peft(kind: str, options: dict, tmp_path: Path) -> None:
    """scale · B · A of the program's tensors, rows put together, is PEFT's own delta."""
    base = tiny.hugging_face(kind, intermediate_size=24, hidden_size=32)
    targets = tiny.every_target(kind)[1:]
    peft = tiny.adapted(base, targets, **options)
    peft.save_pretrained(str(tmp_path / "a"))
    spec = SPECS[kind]
    arrays = to_runtime(read_peft(tmp_path / "a"), layout(spec, tiny.every_target(kind), RANK))
    layers = {
        name.removeprefix("base_model.model.model."): layer
        for name, layer in peft.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(layers) == len(targets) * len(spec.layers)
    for path in module_shapes(spec):
        module = path.removeprefix("model.")
        parts = [n for n in arrays if n.startswith(f"{module}.lora_B")]
        b = np.concatenate([arrays[name][0] for name in parts])
        a, scale = arrays[f"{module}.lora_A"][0], arrays[f"{module}.scale"].item()
        if module in layers:
            delta = layers[module].get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(b @ a * scale, delta, atol=1e-6)
        else:  # not adapted by this one: nothing is added
            assert not a.any()
            assert not b.any()


def test_the_layout_says_where_peft_keeps_each_tensor(tmp_path: Path) -> None:
    for kind, spec in SPECS.items():
        targets = tiny.every_target(kind)
        peft = tiny.adapted(
            tiny.hugging_face(kind, intermediate_size=24, hidden_size=32), targets, RANK
        )
        peft.save_pretrained(str(tmp_path / kind))
        stored = load_file(tmp_path / kind / "adapter_model.safetensors")
        tensors = layout(spec, targets, RANK)
        arrays = to_runtime(read_peft(tmp_path / kind), tensors)
        assert arrays.keys() == {t.name for t in tensors} | {META}
        seen = set()
        for tensor in tensors:
            assert arrays[tensor.name].shape == tensor.shape
            if tensor.name.endswith(".scale"):
                continue
            rows = stored[tensor.peft][slice(*tensor.rows)].numpy()
            assert np.array_equal(arrays[tensor.name][0], rows)
            seen.add(tensor.peft)
        assert seen == stored.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_trained_since_keeps_its_new_values(dtype: str) -> None:
    spec, random = SPECS["llama"], np.random.default_rng(0)
    config = fresh_config(4, 8, ["q_proj"], "base")
    tensors = {
        f"model.layers.{i}.self_attn.q_proj": (
            values(random, (4, 32), dtype),
            values(random, (32, 4), dtype),
        )
        for i in range(2)
    }
    arrays = to_runtime(PeftAdapter(config, tensors, dtype), layout(spec, ["q_proj"], RANK))
    name = "layers.1.self_attn.q_proj.lora_B"
    arrays[name] = arrays[name].copy()
    arrays[name][0, 5, 2] = np.float32(1) + np.float32(2**-20)
    back = from_runtime(arrays, "x")
    assert back.dtype == "float32"
    assert back.tensors["model.layers.1.self_attn.q_proj"][1][5, 2] == arrays[name][0, 5, 2]


def test_a_fresh_adapter_is_as_peft_makes_one(tmp_path: Path) -> None:
    """A within Kaiming's bound and filling it, B zero, so that it changes nothing."""
    spec = SPECS["llama"]
    targets = ["q_proj", "down_proj"]
    adapter = fresh(spec, fresh_config(4, 8, targets, "base"), targets, 4)
    theirs = tiny.adapted(
        tiny.hugging_face("llama", intermediate_size=24, hidden_size=32), targets
    ).base_model.model
    for module, (a, b) in adapter.tensors.items():
        layer = theirs.get_submodule(module)
        assert a.shape == layer.lora_A["default"].weight.shape
        assert b.shape == layer.lora_B["default"].weight.shape
        assert not b.any()
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < np.abs(a).max() <= bound
    assert len(adapter.tensors) == len(targets) * len(spec.layers)
    assert len({a.tobytes() for a, _ in adapter.tensors.values()}) == len(adapter.tensors)


# Refusals


def adapter_of(rank: int, targets: list[str], spec: ModelSpec) -> PeftAdapter:
    return fresh(spec, fresh_config(rank, 8, targets, "base"), targets, rank)


def test_what_does_not_fit_a_program_is_listed_at_once() -> None:
    spec = SPECS["llama"]
    tensors = layout(spec, ["q_proj", "v_proj"], 4)
    wide = read_spec(tiny.config_of("llama", intermediate_size=24, hidden_size=64), tiny.CONTEXT)
    with pytest.raises(AdapterError) as caught:
        to_runtime(adapter_of(5, ["q_proj", "o_proj"], spec), tensors)
    message = str(caught.value)
    assert "4 misfits" in message
    for layer in range(2):
        assert f"model.layers.{layer}.self_attn.o_proj is not adapted" in message
        assert f"model.layers.{layer}.self_attn.q_proj has rank 5, the program has 4" in message
    with pytest.raises(AdapterError) as caught:
        to_runtime(adapter_of(4, ["v_proj"], wide), tensors)
    message = str(caught.value)
    for layer in range(2):
        where = f"model.layers.{layer}.self_attn.v_proj"
        assert f"{where} A is [4, 64], expected [4, 32]" in message


def test_a_file_that_is_no_adapter_is_refused() -> None:
    spec = SPECS["llama"]
    good = to_runtime(adapter_of(4, ["q_proj"], spec), layout(spec, ["q_proj"], 4))

    def refused(arrays: dict[str, np.ndarray], words: str) -> None:
        with pytest.raises(AdapterError, match=words) as caught:
            from_runtime(arrays, "x.ptd")
        assert "x.ptd" in str(caught.value)

    refused({k: v for k, v in good.items() if k != META}, "adapter_config.json")
    refused({META: good[META]}, "lacks tensors of model.layers.0.self_attn.q_proj")
    meta = json.loads(good[META].tobytes())
    for broken in (
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        json.dumps(meta | {"modules": 3}).encode(),
        json.dumps(meta | {"dtype": "int8"}).encode(),
        json.dumps(meta | {"config": None}).encode(),
    ):
        refused(good | {META: np.frombuffer(broken, np.uint8)}, "adapter_config.json")
    config = meta["config"] | {"use_dora": True}
    dora = json.dumps(meta | {"config": config}).encode()
    refused(good | {META: np.frombuffer(dora, np.uint8)}, "DoRA")


# The command


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.paper_bundle(tmp_path / "bundle", SPECS["llama"], ["q_proj", "down_proj"], RANK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convert_there_and_back(dtype: str, bundle: Path, attune: Attune, tmp_path: Path) -> None:
    base = tiny.hugging_face("llama", intermediate_size=24, hidden_size=32)
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
    base = tiny.hugging_face("llama", intermediate_size=24, hidden_size=32)
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
            assert row["update_norm"] == pytest.approx(norm, rel=1e-5)
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
