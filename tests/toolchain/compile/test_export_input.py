"""What an export reads: names, and numbers that float16 loses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporters.errors import ExportError
from exporters.model.assembly import build
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer
from tests import tiny
from toolchain.compile.export_input import AdapterRequest, read_input
from toolchain.compile.precision import PrecisionChooser, lost_weights, rounded_for_coreml


@pytest.mark.parametrize("given", ["../Qwen2.5-0.5B-Instruct", "."])
def test_a_models_name_is_whole(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_checkpoint(tmp_path / "Qwen2.5-0.5B-Instruct", "qwen2")
    monkeypatch.chdir(folder)
    read = read_input(given, AdapterRequest(), None, None)
    assert read.name == "Qwen2.5-0.5B-Instruct"
    assert read.adapter.config["base_model_name_or_path"] == "Qwen2.5-0.5B-Instruct"
    assert read.checkpoint.source.startswith("Qwen2.5-0.5B-Instruct (safetensors): ")


def small(factor: float) -> Transformer:
    """One matrix of a tiny model times ``factor``."""
    theirs = tiny.hugging_face("llama")
    with torch.no_grad():
        theirs.model.layers[0].mlp.down_proj.weight.mul_(factor)
    return build(read_spec(theirs.config, tiny.CONTEXT), theirs.state_dict())


@pytest.mark.parametrize("quantize", ["int8", "fp16"])
@pytest.mark.parametrize(("factor", "lost"), [(1.0, False), (1e-3, False), (1e-7, True)])
def test_weights_below_float16(quantize: str, factor: float, lost: bool) -> None:
    model = small(factor)
    names = lost_weights(model, rounded_for_coreml(model, quantize))
    assert names == (["blocks.0.down.bases.0.weight"] if lost else [])


def test_a_precision_that_loses_weights_is_refused_or_passed_over() -> None:
    model = small(1e-7)
    read = [tiny.tokens_of(30, seed=seed) for seed in (1, 2)]
    texts = {"calibration": read, "perplexity": read}
    chooser = PrecisionChooser(model, texts)
    with pytest.raises(ExportError, match=r"down.* that int8 rounds them by: .*--quantize none"):
        chooser.choose("ios", "int8")
    chosen = chooser.choose("ios", None)
    assert (chosen.quantize, [one.quantize for one in chosen.measured]) == ("none", ["none"] * 2)
