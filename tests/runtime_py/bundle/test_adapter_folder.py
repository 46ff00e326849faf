"""Adapters as people have them: named ones, MLX's, a multi-modal model's, of tables, as a path."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from runtime_py.bundle.adapter_folder import CONFIG, WEIGHTS
from runtime_py.bundle.adapter_forms import load_adapter
from runtime_py.bundle.peft_adapter import read_peft, write_peft
from runtime_py.loop.errors import AdapterError
from tests import tiny

SMALL = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
BOTH_ORDERS = ("model.language_model.", "language_model.model.")
Q1 = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny.hugging_face("gemma3_text", **SMALL)


def _saved(folder: Path, base: PreTrainedModel, *targets: str, **options: object) -> PeftModel:
    model = tiny.adapted(copy.deepcopy(base), targets or ("q_proj", "v_proj"), **options)
    model.save_pretrained(str(folder))
    return model


def _same(one: Path, other: Path) -> None:
    mine, theirs = read_peft(one).tensors, read_peft(other).tensors
    assert mine.keys() == theirs.keys()
    for name, pair in mine.items():
        assert all(np.array_equal(a, b) for a, b in zip(pair, theirs[name], strict=True))


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def _refused(path: Path, *parts: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("prefix", BOTH_ORDERS)
@pytest.mark.parametrize("rooted", [False, True])
def test_language_layers_of_a_multi_modal_model_are_the_text_models(
    tmp_path: Path, base: PreTrainedModel, prefix: str, rooted: bool
) -> None:
    """What PEFT merges under the text model's names, though each pattern says language_model."""
    own = {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {Q1: 3}, "use_rslora": rooted}
    model = _saved(tmp_path / "text", base, "q_proj", "v_proj", **own)
    multi = tmp_path / "multi"
    _saved(multi, base, "q_proj", "v_proj", **own)
    state = load_file(multi / WEIGHTS)
    save_file(
        {
            k.replace("base_model.model.model.", f"base_model.model.{prefix}"): v
            for k, v in state.items()
        },
        multi / WEIGHTS,
    )
    there = prefix.replace(".", r"\.")
    _edit(
        multi,
        target_modules=rf"{there}layers\.\d+\.self_attn\.(?:q|v)_proj",
        exclude_modules=r"vision_tower\..*",
        rank_pattern={rf"{there}layers\.1\..*": 2},
        alpha_pattern={prefix + Q1.removeprefix("model."): 3},
    )
    _same(multi, tmp_path / "text")
    write_peft(tmp_path / "written", read_peft(multi))
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "written"))
    expected = model.merge_and_unload().state_dict()
    for name, weight in merged.merge_and_unload().state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_one_module_under_two_names_is_refused(tmp_path: Path, base: PreTrainedModel) -> None:
    _saved(tmp_path / "a", base)
    state = load_file(tmp_path / "a" / WEIGHTS)
    twice = {
        k.replace("model.model.model.", "model.model.language_model."): v for k, v in state.items()
    }
    save_file(state | {k: v.clone() for k, v in twice.items()}, tmp_path / "a" / WEIGHTS)
    _refused(tmp_path / "a", "under two names, with language_model and without")


@pytest.mark.parametrize("table", ["lm_head", "embed_tokens"])
def test_lora_on_a_table_is_named(tmp_path: Path, base: PreTrainedModel, table: str) -> None:
    _saved(tmp_path / "a", base, "q_proj", table)
    _refused(
        tmp_path / "a",
        "tensors of the embedding table or the output head (base_model.model.",
        table,
        "train again without embed_tokens and lm_head",
    )


def test_a_table_that_is_targeted_without_tensors_changes_nothing(
    tmp_path: Path, base: PreTrainedModel
) -> None:
    _saved(tmp_path / "a", base)
    _saved(tmp_path / "b", base)
    _edit(tmp_path / "b", target_modules=["q_proj", "v_proj", "lm_head"])
    _same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("given", [WEIGHTS, CONFIG])
def test_a_file_of_the_folder_stands_for_it(
    tmp_path: Path, base: PreTrainedModel, given: str
) -> None:
    _saved(tmp_path / "a", base)
    _same(tmp_path / "a" / given, tmp_path / "a")


def test_the_folder_around_a_named_adapter(tmp_path: Path, base: PreTrainedModel) -> None:
    model = _saved(tmp_path / "plain", base)
    model.add_adapter("mine", model.peft_config["default"])
    model.save_pretrained(str(tmp_path / "out"), selected_adapters=["mine"])
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["mine"]
    _same(tmp_path / "out", tmp_path / "out" / "mine")

    model.save_pretrained(str(tmp_path / "both"))  # PEFT reads "default" there
    _same(tmp_path / "both", tmp_path / "plain")

    for name in ("checkpoint-10", "checkpoint-20"):
        _saved(tmp_path / "run" / name, base)
    _refused(tmp_path / "run", "holds 2 adapters", "checkpoint-10, checkpoint-20", "name one")


def _mlx(folder: Path, **config: object) -> dict[str, torch.Tensor]:
    """As mlx-lm writes it: X.lora_a [in, r], X.lora_b [r, out], y = W x + scale · ((x a) b)."""
    random = torch.Generator().manual_seed(0)
    state = {
        f"{Q1}.lora_a": torch.randn((16, 2), generator=random),
        f"{Q1}.lora_b": torch.randn((2, 64), generator=random),
    }
    folder.mkdir()
    save_file(state, folder / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (folder / CONFIG).write_text(json.dumps(fields | {"num_layers": 16} | config))
    return state


def test_an_adapter_of_mlx_is_named_and_its_recipe_is_right(tmp_path: Path) -> None:
    state = _mlx(tmp_path / "mlx")
    recipe = (
        "is an adapter of MLX (mlx-lm)",
        "base_model.model.X.lora_A.weight = X.lora_a transposed",
        "base_model.model.X.lora_B.weight = X.lora_b transposed",
        "lora_alpha = scale · rank (here r = 2, lora_alpha = 40)",
    )
    _refused(tmp_path / "mlx", *recipe)
    _refused(tmp_path / "mlx" / "adapters.safetensors", *recipe)

    converted = tmp_path / "converted"
    converted.mkdir()
    save_file(
        {
            f"base_model.model.{Q1}.lora_A.weight": state[f"{Q1}.lora_a"].T.contiguous(),
            f"base_model.model.{Q1}.lora_B.weight": state[f"{Q1}.lora_b"].T.contiguous(),
        },
        converted / WEIGHTS,
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 40, "target_modules": ["q_proj"]}
    (converted / CONFIG).write_text(json.dumps(config))
    adapter = read_peft(converted)
    a, b = adapter.tensors[Q1]
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    expected = 20.0 * ((x @ state[f"{Q1}.lora_a"].numpy()) @ state[f"{Q1}.lora_b"].numpy())
    np.testing.assert_allclose(b @ (a @ x) * adapter.scaling(Q1), expected, rtol=1e-5, atol=1e-5)


def test_mlx_in_other_guises(tmp_path: Path, base: PreTrainedModel) -> None:
    state = _mlx(tmp_path / "dora", fine_tune_type="dora")
    _refused(tmp_path / "dora", "fine_tune_type 'dora'", "mlx_lm.fuse")
    _mlx(tmp_path / "bare")
    (tmp_path / "bare" / CONFIG).unlink()
    _refused(tmp_path / "bare", "is an adapter of MLX", "lora_alpha = scale · rank and")
    _saved(tmp_path / "renamed", base)
    save_file(state, tmp_path / "renamed" / WEIGHTS)
    _refused(tmp_path / "renamed", "is an adapter of MLX", "X.lora_a transposed")


def test_files_that_are_no_adapter(tmp_path: Path, base: PreTrainedModel) -> None:
    _saved(tmp_path / "a", base)
    torch.save({}, tmp_path / "a" / "adapter_model.bin")
    _refused(tmp_path / "a" / "adapter_model.bin", "only as a pickle", "save the adapter again")
    _same(tmp_path / "a", tmp_path / "a" / WEIGHTS)  # PEFT prefers safetensors, too
    (tmp_path / "a" / "other.safetensors").write_bytes(b"")
    _refused(tmp_path / "a" / "other.safetensors", "is a file that PEFT does not read")
    with pytest.raises(AdapterError, match=re.escape("no such adapter folder")):
        load_adapter(tmp_path / "nowhere")
