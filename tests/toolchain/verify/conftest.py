"""One clean bundle and its models in PyTorch, made once; faults are planted in copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from runtime_py.bundle import manifest as m
from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.engine.base_weights import BaseWeights
from tests.toolchain.conftest import Exported, attune, both, fp32  # noqa: F401  (fixtures)
from toolchain.verify.parity import ladder
from toolchain.verify.parity.context import Context
from toolchain.verify.parity.models import Models
from toolchain.verify.parity.verdict import Rung

Change = Callable[[m.Manifest], m.Manifest]


@pytest.fixture(scope="session")
def models(both: Exported) -> Models:  # noqa: F811
    """Of the built-in model, with what takes seconds done: reading and quantizing."""
    found = ladder.open_context(open_bundle(both.bundle), both.bundle).source
    assert found.android is not None
    assert found.stored is not None
    return found


def signed(bundle: Path, change: Change = lambda manifest: manifest) -> m.Manifest:
    """The manifest of a changed bundle, with true hashes: the change must be found otherwise."""
    text = (bundle / m.MANIFEST).read_text(encoding="utf-8")
    manifest = m.Manifest.model_validate_json(text)
    files = m.list_files(bundle)
    changed = change(manifest.model_copy(update={"files": files}))
    m.write_manifest(bundle, changed)
    return open_bundle(bundle).manifest


@dataclass(frozen=True, eq=False)
class Faulty:
    """A copy of the clean bundle to plant something in; ``climb`` runs one rung of it."""

    bundle: Path
    scratch: Path
    models: Models

    def context(self, models: Models | None = None, change: Change | None = None) -> Context:
        manifest = signed(self.bundle, change or (lambda manifest: manifest))
        bundle = Bundle(self.bundle, manifest)
        context = ladder.open_context(bundle, self.scratch, quick=True)
        found = models or self.models
        return replace(context, models=found)

    def climb(self, rung: str, models: Models | None = None, change: Change | None = None) -> Rung:
        return ladder.run_rung(rung, self.context(models, change))


@pytest.fixture
def faulty(both: Exported, models: Models, tmp_path: Path) -> Faulty:  # noqa: F811
    bundle, scratch = tmp_path / "faulty", tmp_path / "scratch"
    shutil.copytree(both.bundle, bundle)
    scratch.mkdir()
    return Faulty(bundle, scratch, models)


def own_models(clean: Models) -> Models:
    """A copy whose parts may be replaced."""
    copy = Models(clean.bundle, clean.source, clean.initial, clean.eager, clean.as_read)
    for name in ("text", "captured", "android", "ios", "training_spec", "stored"):
        if name in clean.__dict__:
            copy.__dict__[name] = clean.__dict__[name]
    return copy


def rewrite(file: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """One tensor of the weights file, changed where it lies."""
    weights = BaseWeights(file)
    old = np.array(weights[name])
    dtype, shape, offset = weights._entries[name]
    new = np.ascontiguousarray(change(old), dtype)
    assert new.shape == shape
    assert (new != old).any()
    with file.open("r+b") as out:
        out.seek(offset)
        out.write(new.tobytes())
