"""Faults that real exports have had, one a test: each must be caught at its rung, by its name.

A bundle is changed and signed anew, so that hashes do not tell; or a program, or the engine that
calls it, is replaced by one with the fault. Where a check measures, the fault lies clearly above
what is allowed, and the clean bundle clearly below it in the same run: between ``CLEAN`` and
``SEEN`` of what is allowed there is nothing. ``-s`` prints both margins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coremltools.proto import Model_pb2
from torch import Tensor

import exporters.model.plain_attention
from exporters.executorch.training_program import lower_training
from exporters.model.assembly import build
from exporters.model.spec import ModelSpec, Rope
from exporters.training.adamw import AdamW
from exporters.training.programs import adamw_program, block_programs
from exporters.training.storage import PRECISIONS
from runtime_py.bundle import manifest as m
from runtime_py.bundle.bundle import open_bundle
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.loop.errors import BundleError
from tests.toolchain.conftest import Exported
from tests.toolchain.verify.conftest import Faulty, own_models, rewrite
from toolchain.compile.training_part import manifest_program
from toolchain.verify.arm64.emulate import Call
from toolchain.verify.parity import executorch_rungs, ladder
from toolchain.verify.parity.models import Models
from toolchain.verify.parity.native_child import run_calls
from toolchain.verify.parity.verdict import Rung

WEIGHTS = "training/base.safetensors"
MODEL = "ios/model.mlpackage/Data/com.apple.CoreML/model.mlmodel"


CLEAN, SEEN = (
    0.7,
    2.0,
)  # margins: a clean bundle's are at most the one, a fault's at least the other
CLIMBED = ("eager", "captured", "quantized", "executorch", "coreml")
Clean = Mapping[str, Rung]


def margins(rung: Rung, passed: bool) -> list[tuple[float, str]]:
    """Of the checks that measure and have this result, the worst last; with what they are of."""
    return sorted(
        (check.margin, f"{check.program}: {check.output} on {check.case}")
        for check in rung.checks
        if check.margin is not None and check.passed == passed
    )


@pytest.fixture(scope="module")
def clean(both: Exported, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """Rungs of the bundle as it was exported, run before any fault is planted."""
    bundle = open_bundle(both.bundle)
    context = ladder.open_context(bundle, tmp_path_factory.mktemp("clean"), quick=True)
    context = replace(context, models=models)
    return {name: ladder.run_rung(name, context) for name in CLIMBED}


def caught(clean: Clean, rung: Rung, *words: str, layer: int | None = None) -> None:
    """The rung failed and its reason has the words; ``layer`` is the one that it names. What its
    failed checks measured, if they do, is far from what a clean bundle has."""
    assert rung.status == "failed", f"{rung.rung} passed"
    for word in words:
        assert word in rung.reason, rung.reason
    if layer is not None:
        assert rung.found is not None, rung.reason
        assert rung.found.layer == layer, rung.reason
    usual, measured = margins(clean[rung.rung], True), margins(rung, False)
    print(f"{rung.rung}: clean {usual[-1:]}, fault {measured[-1:] or 'stated'}")
    if measured:
        assert measured[-1][0] >= SEEN, measured[-1]
        assert usual[-1][0] <= CLEAN, usual[-1]


# What a file of the bundle holds


def test_a_transposed_weight(faulty: Faulty, clean: Clean) -> None:
    file = faulty.bundle / WEIGHTS
    precision = PRECISIONS["int4"]
    weights = BaseWeights(file)
    parts = {
        p: torch.from_numpy(np.array(weights[f"layers.1.q.{p}"])) for p in ("q", "scale", "offset")
    }
    turned = precision.encode(precision.decode(parts)[0].T.contiguous())
    for part, value in turned.items():
        rewrite(file, f"layers.1.q.{part}", lambda old, value=value: value.numpy())
    caught(clean, faulty.climb("quantized"), "q projection", "layers.1.q", layer=1)


def test_one_flipped_byte_in_the_weights_file(faulty: Faulty, clean: Clean) -> None:
    def flip(old: np.ndarray) -> np.ndarray:
        new = old.copy()
        new.reshape(-1).view(np.uint8)[777] ^= 1
        return new

    rewrite(faulty.bundle / WEIGHTS, "layers.3.up.q", flip)
    with pytest.raises(BundleError, match=WEIGHTS):
        open_bundle(faulty.bundle)  # the hash tells, before any rung
    caught(clean, faulty.climb("quantized"), "up projection", "in 1 of", layer=3)


def test_scales_of_another_group_size(faulty: Faulty, clean: Clean) -> None:
    """Scales of groups of 64 where groups have 32."""
    file = faulty.bundle / WEIGHTS
    rewrite(file, "layers.2.down.scale", lambda s: np.repeat(s[:, :, ::2], 2, axis=2))
    caught(clean, faulty.climb("quantized"), "down projection (scale)", layer=2)


def test_rotary_tables_of_another_base(faulty: Faulty, clean: Clean) -> None:
    """One per cent more, as the training programs are given it."""
    file = faulty.bundle / WEIGHTS
    inv_freq = np.array(faulty.models.captured.ropes[0].inv_freq)
    n = len(inv_freq)
    other = inv_freq * 1.01 ** (-np.arange(n) / n)

    def table(old: np.ndarray) -> np.ndarray:
        return np.cos(np.outer(other, np.arange(old.shape[2])))[None]

    rewrite(file, "rope.0.cos", table)
    caught(clean, faulty.climb("quantized"), "rotary table (0.cos)")


def test_a_lora_scale_off_by_two(faulty: Faulty, clean: Clean) -> None:
    change_ptd(faulty, "layers.2.self_attn.k_proj.scale", lambda array: array * 2)
    caught(clean, faulty.climb("eager"), "layers.2.self_attn.k_proj.scale", layer=2)


def test_swapped_q_and_k_lora(faulty: Faulty, clean: Clean) -> None:
    names = [f"layers.1.self_attn.{which}_proj.lora_A" for which in "qk"]
    values = {name: read_ptd(faulty, name) for name in names}
    for name, other in zip(names, reversed(names), strict=True):
        change_ptd(faulty, name, lambda array, other=other: values[other])
    caught(clean, faulty.climb("eager"), "layers.1.self_attn.q_proj.lora_A", layer=1)


def read_ptd(faulty: Faulty, name: str) -> np.ndarray:
    tensor = next(t for t in faulty.models.bundle.manifest.adapter.tensors if t.name == name)
    assert tensor.offset is not None
    data = (faulty.bundle / "android/adapter.ptd").read_bytes()
    count = int(np.prod(tensor.shape))
    return np.frombuffer(data, "<f4", count, tensor.offset).reshape(tensor.shape).copy()


def change_ptd(faulty: Faulty, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in faulty.models.bundle.manifest.adapter.tensors if t.name == name)
    assert tensor.offset is not None
    new = change(read_ptd(faulty, name)).astype("<f4")
    with (faulty.bundle / "android/adapter.ptd").open("r+b") as file:
        file.seek(tensor.offset)
        file.write(new.tobytes())


def no_training(manifest: m.Manifest) -> m.Manifest:
    """For faults of ``lm.pte``: the rung then leaves the training programs alone."""
    return manifest.model_copy(update={"training": None})


def test_the_wrong_end_of_text_token(faulty: Faulty, clean: Clean) -> None:
    def change(manifest: m.Manifest) -> m.Manifest:
        tokenizer = manifest.tokenizer.model_copy(update={"eos_ids": (7,)})
        return no_training(manifest).model_copy(update={"tokenizer": tokenizer})

    caught(clean, faulty.climb("eager", change=change), "tokenizer: eos_ids", "[7]")
    caught(clean, faulty.climb("executorch", change=change), "get_eos_ids")


def _without_a_merge(raw: dict) -> None:
    raw["model"]["merges"].pop()


def _two_ids_exchanged(raw: dict) -> None:
    vocab = raw["model"]["vocab"]
    first, second = sorted(vocab, key=lambda token: -vocab[token])[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _normalized(raw: dict) -> None:
    raw["normalizer"] = {"type": "NFC"}


@pytest.mark.parametrize("change", [_without_a_merge, _two_ids_exchanged, _normalized])
def test_another_tokenizer(faulty: Faulty, clean: Clean, change: Callable[[dict], None]) -> None:
    path = faulty.bundle / "tokenizer.json"
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw))
    caught(clean, faulty.climb("eager"), "tokenizer.json")


def test_another_chat_piece(faulty: Faulty, clean: Clean) -> None:
    def change(manifest: m.Manifest) -> m.Manifest:
        chat = manifest.tokenizer.chat
        shorter = chat.model_copy(update={"ask": chat.ask[:-1]})
        tokenizer = manifest.tokenizer.model_copy(update={"chat": shorter})
        return manifest.model_copy(update={"tokenizer": tokenizer})

    rung = faulty.climb("eager", change=change)
    caught(clean, rung, "tokenizer: chat")
    assert any("as other tokens than Hugging Face's" in check.note for check in rung.checks)


# What the transformer computes that programs are captured from


def with_captured(clean: Models, change: Callable[[ModelSpec], ModelSpec]) -> Models:
    """The models of an export that read the config wrongly."""
    models = own_models(clean)
    spec = change(clean.captured.spec)
    adapter = clean.bundle.manifest.adapter
    models.__dict__["captured"] = build(
        spec, clean.source.checkpoint.state, adapter.targets, adapter.rank
    )
    return models


def test_a_rope_base_off_by_one_percent(faulty: Faulty, clean: Clean) -> None:
    def change(spec: ModelSpec) -> ModelSpec:
        def other(rope: Rope) -> Rope:
            n = len(rope.inv_freq)
            return replace(
                rope, inv_freq=tuple(f * 1.01 ** (-i / n) for i, f in enumerate(rope.inv_freq))
            )

        return replace(spec, layers=tuple(replace(y, rope=other(y.rope)) for y in spec.layers))

    models = with_captured(faulty.models, change)
    caught(clean, faulty.climb("captured", models), "rotary embedding")


def test_an_epsilon_that_is_off(faulty: Faulty, clean: Clean) -> None:
    models = with_captured(faulty.models, lambda spec: replace(spec, norm_eps=spec.norm_eps * 10))
    caught(clean, faulty.climb("captured", models), "norm before attention", layer=0)


def test_a_lost_entry_of_the_causal_mask(
    faulty: Faulty, clean: Clean, monkeypatch: pytest.MonkeyPatch
) -> None:
    unplanted = exporters.model.plain_attention.visible

    def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        seen = unplanted(queries, keys, window)
        if seen.shape[0] > 9:
            seen[9, 4] = False
        return seen

    monkeypatch.setattr(exporters.model.plain_attention, "visible", visible)
    caught(clean, faulty.climb("captured"), "attention", layer=0)


# What a program of training.pte computes


def relowered(faulty: Faulty, wrong: Sequence, file: str) -> Callable[[m.Manifest], m.Manifest]:
    """The programs in a file of their own, and the manifest that points there."""
    path = faulty.bundle / file
    lower_training(wrong, path)
    made = {
        program.signature.name: manifest_program(program.signature, file, path.stat().st_size)
        for program in wrong
    }

    def change(manifest: m.Manifest) -> m.Manifest:
        assert manifest.android is not None
        programs = tuple(made.get(p.name, p) for p in manifest.android.programs)
        android = manifest.android.model_copy(update={"programs": programs})
        return manifest.model_copy(update={"android": android})

    return change


def test_adamw_without_bias_correction(
    faulty: Faulty, clean: Clean, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdamW.forward

    def forward(self: AdamW, *tensors: Tensor) -> tuple[Tensor, ...]:
        *rest, mean, square = tensors
        return right(self, *rest, mean * 0.0 + 1.0, square * 0.0 + 1.0)

    monkeypatch.setattr(AdamW, "forward", forward)
    change = relowered(faulty, [adamw_program(faulty.models.training_spec)], "android/adamw.pte")
    monkeypatch.undo()
    caught(clean, faulty.climb("executorch", change=change), "adamw", "parameters")


def test_an_epsilon_that_is_off_in_a_lowered_block(faulty: Faulty, clean: Clean) -> None:
    spec = faulty.models.training_spec
    wrong = replace(spec, model=replace(spec.model, norm_eps=1e-2))
    assert faulty.models.bundle.manifest.training is not None
    length = max(faulty.models.bundle.manifest.training.lengths)
    change = relowered(faulty, block_programs(wrong, length)[:1], "android/block.pte")
    caught(
        clean, faulty.climb("executorch", change=change), "block_forward", "norm before it", layer=0
    )


# How an engine calls lm.pte


Calls = Sequence[Call]
Engine = Callable[[Path, Sequence[Path], Calls], list[list[np.ndarray]]]


def moved(call: Call, by: int) -> Call:
    tokens, start = call.inputs
    assert isinstance(start, np.ndarray)
    return Call(call.method, (tokens, start + by))


def test_an_adapter_that_is_silently_unused(
    faulty: Faulty, clean: Clean, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(program: Path, data: Sequence[Path], calls: Calls) -> list[list[np.ndarray]]:
        own = [faulty.bundle / "android/adapter.ptd" for _ in data]
        return run_calls(program, own, calls).outputs

    monkeypatch.setattr(executorch_rungs, "_here", engine)
    caught(
        clean, faulty.climb("executorch", change=no_training), "effect of the adapter", "not used"
    )


def test_a_kv_position_off_by_one(
    faulty: Faulty, clean: Clean, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(program: Path, data: Sequence[Path], calls: Calls) -> list[list[np.ndarray]]:
        wrong = [
            moved(call, 1) if call.method == "forward" and call.inputs[1][0] else call
            for call in calls
        ]
        return run_calls(program, data, wrong).outputs

    monkeypatch.setattr(executorch_rungs, "_here", engine)
    caught(clean, faulty.climb("executorch", change=no_training), "KV cache")


def test_a_stale_cache_between_calls(
    faulty: Faulty, clean: Clean, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new dialogue is put behind the last one, as if that still were in the context."""

    def engine(program: Path, data: Sequence[Path], calls: Calls) -> list[list[np.ndarray]]:
        wrong: list[Call] = []
        for call in calls:
            stale = wrong and call.method == "forward" and not call.inputs[1][0]
            wrong.append(moved(call, 8) if stale else call)
        return run_calls(program, data, wrong).outputs

    monkeypatch.setattr(executorch_rungs, "_here", engine)
    caught(clean, faulty.climb("executorch", change=no_training), "the cache is stale")


# What an .mlpackage says


def edit_package(faulty: Faulty, function: str, edit: Callable) -> None:
    path = faulty.bundle / MODEL
    model = Model_pb2.Model()
    model.ParseFromString(path.read_bytes())
    own = model.mlProgram.functions[function]
    before = model.SerializeToString(deterministic=True)
    edit(own.block_specializations[own.opset])
    assert model.SerializeToString(deterministic=True) != before
    path.write_bytes(model.SerializeToString())


def test_a_core_ml_state_that_is_not_written(faulty: Faulty, clean: Clean) -> None:
    def edit(block) -> None:
        kept = [
            op
            for op in block.operations
            if op.type != "write_state" or op.inputs["input"].arguments[0].name != "v_3"
        ]
        del block.operations[:]
        block.operations.extend(kept)

    edit_package(faulty, "decode", edit)
    caught(clean, faulty.climb("coreml"), "decode does not write state v_3", layer=3)


def test_an_epsilon_that_is_off_in_a_core_ml_norm(faulty: Faulty, clean: Clean) -> None:
    """Of the third block, by what changes its input by a few hundredths."""

    def edit(block) -> None:
        norm = [op for op in block.operations if op.type == "rsqrt"][4]
        name = norm.inputs["epsilon"].arguments[0].name
        (const,) = (op for op in block.operations if op.outputs and op.outputs[0].name == name)
        const.attributes["val"].immediateValue.tensor.floats.values[0] = 5e-3

    edit_package(faulty, "prefill", edit)
    caught(clean, faulty.climb("coreml"), "prefill writes other values into state k_2", layer=2)


def test_a_padding_token_that_is_counted(faulty: Faulty, clean: Clean) -> None:
    def edit(block) -> None:
        op = next(op for op in block.operations if op.type == "less")
        op.type = "less_equal"

    edit_package(faulty, "embed", edit)
    caught(clean, faulty.climb("coreml"), "padding", "counted")


def test_one_flipped_byte_in_a_package(faulty: Faulty, clean: Clean) -> None:
    path = faulty.bundle / "ios/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 4096):
        content[place] ^= 0x80
    path.write_bytes(bytes(content))
    caught(clean, faulty.climb("coreml"))


@pytest.mark.parametrize("name", CLIMBED)
def test_a_clean_bundle_is_clean(clean: Clean, name: str) -> None:
    rung = clean[name]
    assert rung.status == "passed", rung.reason
    assert rung.checks
    print(f"{name}: {margins(rung, True)[-3:]}")
    for margin, what in margins(rung, True):
        assert margin <= CLEAN, what
