"""The transformer's adapter by name: set whole, or not at all."""

from __future__ import annotations

import re

import numpy as np
import pytest

from exporters.errors import ExportError
from exporters.model.assembly import build
from exporters.model.lora_tensors import adapter_tensors, set_adapter
from exporters.model.spec import read_spec
from tests import tiny


def test_an_adapter_that_does_not_fit() -> None:
    hf = tiny.hugging_face("llama")
    model = build(read_spec(hf.config, tiny.CONTEXT), hf.state_dict(), ["q_proj", "v_proj"], 4)
    values = {
        name: np.full(tuple(tensor.shape), 0.5, np.float32)
        for name, tensor in adapter_tensors(model).items()
    }
    set_adapter(model, {**values, "adapter_config.json": np.zeros(3, np.uint8)})
    for tensor in adapter_tensors(model).values():
        assert (tensor == 0.5).all()
    wrong = {name: value * 2 for name, value in values.items()}
    del wrong["layers.0.self_attn.v_proj.scale"]
    wrong["layers.1.self_attn.q_proj.lora_A"] = np.ones((1, 8, 64), np.float32)
    with pytest.raises(
        ExportError,
        match=re.escape(
            "2 misfits: layers.0.self_attn.v_proj.scale is missing, expected [1, 1, 1]; "
            "layers.1.self_attn.q_proj.lora_A is [1, 8, 64], expected [1, 4, 64]."
        ),
    ):
        set_adapter(model, wrong)
    for tensor in adapter_tensors(model).values():
        assert (tensor == 0.5).all()
