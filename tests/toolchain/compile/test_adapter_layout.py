"""The adapter that an export begins with."""

from __future__ import annotations

import numpy as np

from runtime_py.bundle.peft_adapter import fresh_config
from tests import tiny
from tests.runtime_py.bundle.adapter_kit import SIZES, SPECS
from toolchain.compile.adapter_layout import fresh


def test_a_fresh_adapter_is_as_peft_makes_one() -> None:
    """A within Kaiming's bound and filling it, B zero, so that it changes nothing."""
    spec = SPECS["llama"]
    targets = ["q_proj", "down_proj"]
    adapter = fresh(spec, fresh_config(4, 8, targets, "base"), targets, 4)
    theirs = tiny.adapted(tiny.hugging_face("llama", **SIZES), targets).base_model.model
    for module, (a, b) in adapter.tensors.items():
        layer = theirs.get_submodule(module)
        assert a.shape == layer.lora_A["default"].weight.shape
        assert b.shape == layer.lora_B["default"].weight.shape
        assert not b.any()
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < np.abs(a).max() <= bound
    assert len(adapter.tensors) == len(targets) * len(spec.layers)
    assert len({a.tobytes() for a, _ in adapter.tensors.values()}) == len(adapter.tensors)
