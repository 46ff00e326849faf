"""An adapter's forms: each comes back from every other as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from exporters.model.spec import ModelSpec, read_spec
from runtime_py.bundle.adapter_forms import (
    META,
    check_runtime_file,
    from_runtime,
    load_adapter,
    read_values,
    to_runtime,
    write_values,
)
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.flat_tensor import locate, read_ptd, write_ptd
from runtime_py.bundle.manifest import AdapterTensor
from runtime_py.bundle.peft_adapter import PeftAdapter, fresh_config, read_peft, write_peft
from runtime_py.loop.errors import AdapterError
from tests import tiny
from tests.runtime_py.bundle.adapter_kit import (
    RANK,
    SIZES,
    SPECS,
    adapter_of,
    adapters,
    numbers,
    same,
)
from toolchain.compile.adapter_layout import layout, module_shapes
from toolchain.compile.tolerances import rounding


def placed(tensors: tuple[AdapterTensor, ...], file: Path) -> tuple[AdapterTensor, ...]:
    """As a manifest has them: with their offsets in the bundle's file."""
    offsets = locate(file)
    return tuple(t.model_copy(update={"offset": offsets[t.name]}) for t in tensors)


@settings(max_examples=80, deadline=None)
@given(case=adapters())
def test_through_every_form_and_back_it_is_the_same(
    case: tuple[ModelSpec, PeftAdapter], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """PEFT → the programs' tensors → a .ptd → its values → the flat state → a patched .ptd → PEFT;
    the file that is patched held other values."""
    spec, adapter = case
    folder = tmp_path_factory.mktemp("adapter")
    tensors = layout(spec, tiny.every_target(spec.architecture), RANK)
    arrays = to_runtime(adapter, tensors)
    assert all(array.dtype == np.float32 for name, array in arrays.items() if name != META)
    write_ptd(folder / "x.ptd", arrays)
    same(from_runtime(read_ptd(folder / "x.ptd"), "x.ptd"), adapter)
    tensors = placed(tensors, folder / "x.ptd")
    state = AdapterState.of(tensors, read_values(folder / "x.ptd", tensors))
    ones = {t.name: np.ones(t.shape, np.float32) for t in tensors}
    write_ptd(folder / "ones.ptd", {**ones, META: arrays[META]})
    write_values(folder / "y.ptd", folder / "ones.ptd", tensors, state.tensors)
    assert (folder / "y.ptd").read_bytes() == (folder / "x.ptd").read_bytes()
    write_peft(folder / "peft", load_adapter(folder / "y.ptd"))
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
    base = tiny.hugging_face(kind, **SIZES)
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
            bound = rounding(a.shape[0]) * scale * (np.abs(b) @ np.abs(a)).max()
            np.testing.assert_allclose(b @ a * scale, delta, rtol=0, atol=bound)
        else:  # not adapted by this one: nothing is added
            assert not a.any()
            assert not b.any()


def test_the_layout_says_where_peft_keeps_each_tensor(tmp_path: Path) -> None:
    for kind, spec in SPECS.items():
        targets = tiny.every_target(kind)
        peft = tiny.adapted(tiny.hugging_face(kind, **SIZES), targets, RANK)
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
            numbers(random, (4, 32), dtype),
            numbers(random, (32, 4), dtype),
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


# Refusals


@settings(max_examples=40, deadline=None)
@given(case=adapters(), place=st.integers(0, 10**6), value=st.sampled_from([1e-30, -2.0, np.nan]))
def test_what_a_peft_folder_could_not_hold_is_refused(
    case: tuple[ModelSpec, PeftAdapter], place: int, value: float
) -> None:
    """Any one number beyond a module's rank, or in a module that the adapter has not."""
    spec, adapter = case
    arrays = to_runtime(adapter, layout(spec, tiny.every_target(spec.architecture), RANK))
    outside = []
    for name, array in arrays.items():
        if ".lora_" not in name:
            continue
        module, part = name.rsplit(".", 1)
        path = f"model.{module}"
        rank = adapter.rank_of(path) if path in adapter.tensors else 0
        ranks = np.arange(RANK)[:, None] if part == "lora_A" else np.arange(RANK)[None, :]
        places = np.broadcast_to(ranks >= rank, array.shape[1:])
        outside += [(name, int(index)) for index in np.flatnonzero(places)]
    if not outside:  # every module, and each of the full rank
        return
    name, index = outside[place % len(outside)]
    changed = arrays[name].copy()
    changed.reshape(-1)[index] = value
    with pytest.raises(AdapterError, match=r"x\.ptd has values that no PEFT folder .* 1 misfits"):
        from_runtime({**arrays, name: changed}, "x.ptd")


def test_another_scale_is_refused() -> None:
    spec = SPECS["llama"]
    arrays = to_runtime(adapter_of(4, ["q_proj"], spec), layout(spec, ["q_proj"], RANK))
    name = "layers.1.self_attn.q_proj.scale"
    assert arrays[name].item() == 2.0
    with pytest.raises(AdapterError, match="q_proj has the scale 3, its configuration says 2"):
        from_runtime({**arrays, name: arrays[name] + 1}, "x")


def test_more_than_ten_parts_of_b_are_in_the_order_of_their_rows() -> None:
    config = fresh_config(2, 4, ["qkv_proj"], "base")
    b = np.arange(48, dtype=np.float32).reshape(24, 2)
    adapter = PeftAdapter(config, {"model.x.qkv_proj": (np.ones((2, 3), np.float32), b)})
    shapes = [("lora_A", (0, 2), (1, 2, 3)), ("scale", (0, 1), (1, 1, 1))]
    shapes += [(f"lora_B_{i}", (2 * i, 2 * i + 2), (1, 2, 2)) for i in range(12)]
    tensors = [
        AdapterTensor(name=f"x.qkv_proj.{part}", peft="p", rows=rows, shape=shape)
        for part, rows, shape in shapes
    ]
    same(from_runtime(to_runtime(adapter, tensors), "x"), adapter)


def test_what_does_not_fit_a_program_is_listed_at_once() -> None:
    spec = SPECS["llama"]
    tensors = layout(spec, ["q_proj", "v_proj"], 4)
    wide = read_spec(tiny.config_of("llama", **(SIZES | {"hidden_size": 64})), tiny.CONTEXT)
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


# A phone's way: at the manifest's offsets

TENSORS = tuple(
    AdapterTensor(name=name, peft="", rows=(0, 1), shape=shape, offset=offset)
    for name, shape, offset in (("a", (1, 2, 3), 16), ("b", (1, 4), 48), ("scale", (1, 1, 1), 64))
)


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
    with pytest.raises(AdapterError, match="no place for b"):
        read_values(file, TENSORS)


def test_a_manifest_without_android_has_no_offsets(tmp_path: Path) -> None:
    file = tmp_path / "adapter.ptd"
    file.write_bytes(bytes(80))
    bare = [t.model_copy(update={"offset": None}) for t in TENSORS]
    with pytest.raises(AdapterError, match="no place for a"):
        read_values(file, bare)
    with pytest.raises(AdapterError, match="no place for a"):
        write_values(tmp_path / "new.ptd", file, bare, {})
    assert not (tmp_path / "new.ptd").exists()


def test_a_program_binds_a_ptd_only(tmp_path: Path) -> None:
    file = tmp_path / "00001.ptd"
    assert check_runtime_file(file) == file
    for refuse in (check_runtime_file, lambda path: read_values(path, TENSORS)):
        with pytest.raises(AdapterError, match="not an adapter file"):
            refuse(tmp_path / "adapter_model.safetensors")
