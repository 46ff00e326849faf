"""The checkpoint that a bundle was made from, found again and proven to be the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from exporters.model.assembly import build
from exporters.model.checkpoint import Checkpoint, load_checkpoint
from exporters.model.quantize import quantized
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.manifest import Manifest
from runtime_py.loop.errors import BundleError
from toolchain.compile.export_input import builtin_folder
from toolchain.compile.precision import ANDROID
from toolchain.compile.shipped_text import shipped_turns, tokenize
from toolchain.defaults import BUILTIN

_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, eq=False)
class CheckpointSource:
    """``path``: the folder, file or hub id that ``checkpoint`` was read from."""

    checkpoint: Checkpoint
    path: str

    @property
    def gguf(self) -> Path | None:
        """The file, where it is a GGUF."""
        path = Path(self.path)
        return path if path.suffix.lower() == ".gguf" else None


def _is(manifest: Manifest, checkpoint: Checkpoint) -> bool:
    """Whether the weights files are those of the bundle: names may differ, hashes may not."""
    hashes = _SHA256.findall(manifest.model.source)
    return bool(hashes) and hashes == _SHA256.findall(checkpoint.source)


def find_source(manifest: Manifest, given: str | None) -> CheckpointSource | str:
    """``given`` (a folder, a .gguf file or a hub id), or the built-in model for a bundle of it;
    else the reason why there is none.

    Raises ``BundleError`` where ``given`` is another model than the bundle's, and ``ExportError``
    where it cannot be read.
    """
    if given is not None:
        path = str(builtin_folder()) if given == BUILTIN else given
        checkpoint = load_checkpoint(path)
        if not _is(manifest, checkpoint):
            raise BundleError(
                f"--source {given} is not the model that this bundle was made from: expected "
                f"{manifest.model.source}; found {checkpoint.source}."
            )
        return CheckpointSource(checkpoint, path)
    if manifest.model.name != BUILTIN:
        return f"the source is not known: name it with --source ({_short(manifest)})"
    checkpoint = load_checkpoint(str(builtin_folder()))
    if not _is(manifest, checkpoint):
        return "the built-in model is another one by now: export the bundle again, or give --source"
    return CheckpointSource(checkpoint, str(builtin_folder()))


def _short(manifest: Manifest) -> str:
    return manifest.model.source.partition(": ")[0]


def float_model(manifest: Manifest, source: CheckpointSource, adapted: bool = True) -> Transformer:
    """The float32 transformer of a bundle's context; ``adapted``: with room for its adapter."""
    spec = read_spec(source.checkpoint.config, manifest.model.context)
    targets = manifest.adapter.targets if adapted else ()
    return build(spec, source.checkpoint.state, targets, manifest.adapter.rank)


def as_in_bundle(model: Transformer, bundle: Bundle, source: CheckpointSource) -> Transformer:
    """``model`` quantized as the bundle's Android part is; itself where that is float32.

    The same weights come out each time: calibration reads the text that ships with attune.
    """
    scheme = ANDROID[bundle.android.quantize]
    if scheme is None:
        return model
    texts = tokenize(ChatText.of(bundle), shipped_turns("calibration"), model.spec.context)
    return quantized(model, scheme, texts)
