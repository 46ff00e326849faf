"""Adapters of tiny architectures, and what the tests of their forms share."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from exporters.model.spec import ModelSpec, read_spec
from runtime_py.bundle.peft_adapter import PeftAdapter, fresh_config
from tests import tiny
from toolchain.compile.adapter_layout import fresh, module_shapes

RANK = 8  # of the programs
SIZES = {"intermediate_size": 24, "hidden_size": 32}
SPECS: dict[str, ModelSpec] = {
    kind: read_spec(tiny.config_of(kind, **SIZES), tiny.CONTEXT) for kind in ("llama", "phi3")
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def numbers(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
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
        rank = bare.rank_of(module)
        shapes = (rank, into), (out, rank)
        tensors[module] = (numbers(random, shapes[0], dtype), numbers(random, shapes[1], dtype))
    return spec, PeftAdapter(config, tensors, dtype)


def same(one: PeftAdapter, other: PeftAdapter) -> None:
    assert (one.config, one.dtype) == (other.config, other.dtype)
    assert one.tensors.keys() == other.tensors.keys()
    for module, pair in one.tensors.items():
        for mine, theirs in zip(pair, other.tensors[module], strict=True):
            assert mine.shape == theirs.shape
            assert mine.tobytes() == theirs.tobytes()


def adapter_of(rank: int, targets: list[str], spec: ModelSpec) -> PeftAdapter:
    return fresh(spec, fresh_config(rank, 8, targets, "base"), targets, rank)
