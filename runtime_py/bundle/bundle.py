"""A bundle on disk: opened and checked once, with its optional parts behind one sentence each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from runtime_py.bundle.adapter_forms import load_adapter
from runtime_py.bundle.manifest import (
    CHECKSUM,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    PlatformTarget,
    Program,
    Training,
    bundle_files,
)
from runtime_py.bundle.peft_adapter import write_peft
from runtime_py.loop.errors import BundleError
from runtime_py.loop.files import sha256
from runtime_py.loop.lfs import refuse_pointers

# Parts that the manifest does not name: they are there if ``files`` has them.
MEAN_VECTOR, ACKNOWLEDGEMENTS = "mean_vector.f32", "acknowledgements.txt"


@dataclass(frozen=True)
class AndroidPart:
    """``lm``: the file with ``forward`` and ``embed``; ``adapter``: the bundle's own adapter as
    that file binds it."""

    target: PlatformTarget
    lm: Path
    adapter: Path

    @property
    def quantize(self) -> str:
        return self.target.quantize

    def program(self, name: str) -> Program:
        """Raises ``BundleError`` where there is none of that name."""
        return _program(self.target, name, "Android")

    @property
    def training_programs(self) -> tuple[Program, ...]:
        """Those that lie in one file with ``adamw``."""
        file = self.program("adamw").file
        return tuple(program for program in self.target.programs if program.file == file)


@dataclass(frozen=True)
class IosPart:
    """The Core ML packages."""

    target: PlatformTarget

    @property
    def quantize(self) -> str:
        return self.target.quantize

    def program(self, name: str) -> Program:
        """Raises ``BundleError`` where there is none of that name."""
        return _program(self.target, name, "iOS")


def _program(target: PlatformTarget, name: str, part: str) -> Program:
    for program in target.programs:
        if program.name == name:
            return program
    known = ", ".join(sorted({program.name for program in target.programs}))
    raise BundleError(
        f"the bundle's {part} part has no program {name} (it has {known}): export it anew."
    )


@dataclass(frozen=True)
class Bundle:
    """``path``: the folder; ``manifest``: what its manifest says. ``open_bundle`` makes one whose
    files are checked; an export makes its own before it has a manifest on disk. It is the loop's
    ``AdapterBundle``, where it has an Android part."""

    path: Path
    manifest: Manifest

    @property
    def android(self) -> AndroidPart:
        """Raises ``BundleError`` where the bundle was not exported for Android."""
        target, adapter = self.manifest.android, self.manifest.adapter.runtime
        if target is None:
            raise BundleError(f"{self.path} has no Android part: export it with --target android.")
        if adapter is None:
            raise BundleError(f"{self.path} has no adapter file for Android: export it anew.")
        forward = _program(target, "forward", "Android")
        return AndroidPart(target, self.path / forward.file, self.path / adapter)

    @property
    def ios(self) -> IosPart:
        """Raises ``BundleError`` where the bundle was not exported for iOS."""
        if self.manifest.ios is None:
            raise BundleError(f"{self.path} has no iOS part: export it with --target ios.")
        return IosPart(self.manifest.ios)

    @property
    def training(self) -> Training:
        """Raises ``BundleError`` where the bundle cannot be trained."""
        if self.manifest.training is None:
            raise BundleError(f"{self.path} has no training part: export it anew.")
        return self.manifest.training

    @property
    def training_weights(self) -> Path:
        """The base weights of training."""
        return self.path / self.training.weights

    @property
    def training_digest(self) -> str:
        """The base weights' SHA-256, which tells a run on them from one on others."""
        weights = self.training.weights
        return next(file.sha256 for file in self.manifest.files if file.path == weights)

    @property
    def peft(self) -> Path:
        """The bundle's own adapter as a PEFT folder."""
        return self.path / self.manifest.adapter.peft

    @property
    def hidden(self) -> int:
        """The length of a pooled vector."""
        return self.manifest.model.hidden

    @property
    def mean_vector(self) -> np.ndarray | None:
        """float32 [hidden], of the vectors of general dialogues; None: the bundle has none."""
        if not self._has(MEAN_VECTOR):
            return None
        mean = np.fromfile(self.path / MEAN_VECTOR, "<f4")
        if mean.shape != (self.hidden,):
            raise BundleError(
                f"{self.path / MEAN_VECTOR} has {len(mean)} numbers; expected the "
                f"{self.hidden} of the model's vectors. Export the bundle again."
            )
        return mean.astype(np.float32)

    @property
    def acknowledgements(self) -> Path | None:
        """The list of words and phrases that only acknowledge; None: the bundle has none."""
        return self.path / ACKNOWLEDGEMENTS if self._has(ACKNOWLEDGEMENTS) else None

    def _has(self, name: str) -> bool:
        return any(file.path == name for file in self.manifest.files)

    @property
    def adapter_file(self) -> Path:
        """Version 0 of the loop's adapter. Raises ``BundleError`` without an Android part."""
        return self.android.adapter

    def as_peft(self, file: Path, folder: Path) -> None:
        """Writes a version's ``.ptd`` as the PEFT folder that it stands for, whole or not at all:
        the folder that it was made from, with the values that it has now. Raises ``AdapterError``.
        """
        write_peft(folder, load_adapter(file))


def open_bundle(folder: Path) -> Bundle:
    """Reads the manifest and checks every file against it, before anything native sees them.

    Raises ``BundleError`` with all misfits: missing, changed and unlisted files.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(
            f"there is no bundle at {folder}: expected a folder that attune export wrote."
        )
    if not path.is_file():
        raise BundleError(
            f"{folder} has no {MANIFEST}: expected a folder that attune export wrote."
        )
    refuse_pointers([path, folder / CHECKSUM, *bundle_files(folder)], BundleError)
    checksum = folder / CHECKSUM
    stored = checksum.read_bytes() if checksum.is_file() else b""
    if stored != sha256(path).encode() + b"\n":
        raise BundleError(
            f"{path} does not match {CHECKSUM} beside it: one of the two is damaged. Copy the "
            f"bundle again, or export anew."
        )
    manifest = _read_manifest(path)
    _check_files(folder, manifest)
    return Bundle(folder, manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not JSON ({error}): export the bundle again.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this attune reads {SCHEMA_VERSION}: export the "
            f"bundle again, or use the attune that made it."
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors()[:8]
        )
        raise BundleError(f"{path} does not follow the schema: {problems}.") from error


def _check_files(folder: Path, manifest: Manifest) -> None:
    problems = []
    listed = {file.path for file in manifest.files}
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            problems.append(f"{file.path} is missing")
        elif path.stat().st_size != file.bytes:
            problems.append(f"{file.path} has {path.stat().st_size} bytes instead of {file.bytes}")
        elif sha256(path) != file.sha256:
            problems.append(f"{file.path} is not the file that was exported (SHA-256 differs)")
    for path in bundle_files(folder):
        if (name := path.relative_to(folder).as_posix()) not in listed:
            problems.append(f"{name} is not in the manifest")
    if problems:
        raise BundleError(
            f"the bundle {folder} is damaged: {'; '.join(problems)}. Copy it again, or export anew."
        )
