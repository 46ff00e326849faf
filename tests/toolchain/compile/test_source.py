"""The checkpoint that a bundle was made from, found again; the weights that come out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_py.bundle.bundle import open_bundle
from runtime_py.loop.errors import BundleError
from tests.toolchain.conftest import save_random_llama
from toolchain.compile import source as sources


def test_another_model_is_not_the_source(random_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(random_bundle).manifest
    with pytest.raises(BundleError, match="not the model that this bundle was made from"):
        sources.find_source(manifest, str(save_random_llama(tmp_path / "other", 1)))
    with pytest.raises(BundleError, match="not the model"):
        sources.find_source(manifest, "tiny")


def test_quantizing_again_gives_the_weights_of_the_bundle(
    random_bundle: Path, random_source: Path
) -> None:
    bundle = open_bundle(random_bundle)
    original = sources.find_source(bundle.manifest, str(random_source))
    assert not isinstance(original, str)
    model = sources.float_model(bundle.manifest, original)
    model = sources.as_in_bundle(model, bundle, original)
    blob = bundle.android.lm.read_bytes()
    for tensor in (model.table.q, model.head.q, *(b.q for b in model.blocks[0].qkv.bases)):
        assert tensor.numpy().tobytes() in blob
