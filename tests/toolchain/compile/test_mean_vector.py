"""The mean vector that a bundle brings, against transformers, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.model.assembly import build
from exporters.model.spec import read_spec
from runtime_py.bundle.bundle import ACKNOWLEDGEMENTS, MEAN_VECTOR, Bundle, open_bundle
from runtime_py.bundle.manifest import MANIFEST, Manifest, list_files, write_manifest
from runtime_py.loop.errors import BundleError
from tests import tiny
from toolchain.compile.mean_vector import write_mean_vector


@torch.no_grad()
def test_the_mean_is_that_of_the_last_norms_output(tmp_path: Path) -> None:
    source = tiny.hugging_face("llama")
    model = build(read_spec(source.config, tiny.CONTEXT), source.state_dict(), [], rank=4)
    texts = [tiny.tokens_of(count, seed=count) for count in (5, 19, 40)]
    write_mean_vector(tmp_path, model, texts, 24)
    vectors = [source.model(text[:, :24]).last_hidden_state[0].mean(dim=0) for text in texts]
    expected = torch.stack(vectors).mean(dim=0).numpy()
    found = np.fromfile(tmp_path / MEAN_VECTOR, "<f4")
    assert found.shape == (tiny.SIZES["hidden_size"],)
    np.testing.assert_allclose(found, expected, atol=2e-6 * float(np.abs(expected).max()), rtol=0)


def listed(folder: Path, change: Callable[[Path], object]) -> Bundle:
    """A bundle with files that the manifest lists and does not name."""
    spec = read_spec(tiny.config_of("llama"), tiny.CONTEXT)
    tiny.paper_bundle(folder, spec, ["q_proj"], 2)
    change(folder)
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    write_manifest(folder, manifest.model_copy(update={"files": list_files(folder)}))
    return open_bundle(folder)


def test_a_bundle_with_and_without_them(tmp_path: Path) -> None:
    mean = np.arange(tiny.SIZES["hidden_size"], dtype="<f4")

    def both(folder: Path) -> None:
        (folder / MEAN_VECTOR).write_bytes(mean.tobytes())
        (folder / ACKNOWLEDGEMENTS).write_text("danke")

    bundle = listed(tmp_path / "with", both)
    read = bundle.mean_vector
    assert read is not None
    assert (read == mean).all()
    assert bundle.acknowledgements == tmp_path / "with" / ACKNOWLEDGEMENTS
    bare = listed(tmp_path / "without", lambda folder: None)
    assert (bare.mean_vector, bare.acknowledgements) == (None, None)
    short = listed(tmp_path / "short", lambda folder: (folder / MEAN_VECTOR).write_bytes(bytes(8)))
    with pytest.raises(BundleError, match=r"mean_vector\.f32 has 2 numbers; expected the 64 of"):
        _ = short.mean_vector
