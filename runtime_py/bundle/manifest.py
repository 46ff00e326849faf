"""The bundle's manifest: what every part of attune, in any language, knows of a bundle.

``docs/bundle.md`` states the same for readers without Python. Unknown keys are errors.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"  # of the manifest itself, in hexadecimal


class BundleError(Exception):
    """A bundle that cannot be used; the message says which file, what was expected, what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Strict):
    """A program's input, output or state. A dimension is a size or a range such as "1..512"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class Program(_Strict):
    """One callable: a method of a .pte file or a function of an .mlpackage. ``flops``: of its
    products, in one call, where shapes are fixed."""

    name: str
    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...] = ()
    bytes: int
    delegates: int | None = None
    delegated_flops_fraction: float | None = None
    not_delegated: dict[str, float] = {}
    flops: float | None = None


class Model(_Strict):
    name: str
    source: str
    architecture: str
    parameters: int
    vocab: int
    hidden: int
    layers: int
    context: int


class Tokenizer(_Strict):
    file: str
    chat_template: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None


class AdapterTensor(_Strict):
    """Where a LoRA tensor lives: in PEFT's file, in the programs, and in the .ptd (byte offset).

    ``rows``: the rows [start, end) of PEFT's tensor that this one is.
    """

    name: str
    peft: str
    rows: tuple[int, int]
    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"
    offset: int | None = None


class Adapter(_Strict):
    rank: int
    alpha: float
    targets: tuple[str, ...]
    peft: str
    runtime: str | None = None
    tensors: tuple[AdapterTensor, ...]


class Precision(_Strict):
    """A quantization that was tried, and the perplexity it has on attune's short text."""

    quantize: str
    perplexity: float
    ratio_to_fp32: float


class Target(_Strict):
    quantize: str
    chosen_by: Literal["perplexity", "user"]
    measured: tuple[Precision, ...] = ()
    programs: tuple[Program, ...]


class Policy(_Strict):
    """The loop's choices. ``loop``: every field of ``LoopPolicy``, by name; ``lexicons``: the
    bundle's files, in the order in which ties between domains are decided."""

    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    embed_length: int = 512
    loop: dict[str, bool | int | float | str] = {}
    lexicons: tuple[str, ...] = ()

    @field_validator("loop")
    @classmethod
    def _known(cls, value: dict[str, bool | int | float | str]) -> dict:
        try:
            LoopPolicy.from_fields(value)
        except LoopError as error:
            raise ValueError(str(error)) from error
        return value


class TrainingLayer(_Strict):
    """``rope``: which of the weights file's rotary tables, or None for none; ``window``: tokens a
    query sees, itself included, or None for all before it."""

    rope: int | None
    window: int | None


class Optimizer(_Strict):
    """AdamW's constants, compiled into ``adamw``."""

    beta1: float
    beta2: float
    epsilon: float


class Training(_Strict):
    """What a host needs to train with the bundle's training programs, besides their signatures.

    ``precision``, ``head_precision``: how the weights file keeps the matrices of the blocks, and
    the head and token table. ``table``: the tensors of that name are the token table. ``lengths``:
    tokens of the block programs. ``positions``: those of one ``head`` call. ``head_slice``: rows of
    the head in each of its inputs.
    """

    precision: Literal["fp32", "int8", "int4"]
    head_precision: Literal["fp32", "int8"]
    weights: str
    table: Literal["head", "table"]
    embed_scale: float
    lengths: tuple[int, ...]
    positions: int
    head_slice: int
    layers: tuple[TrainingLayer, ...]
    optimizer: Optimizer


class File(_Strict):
    path: str
    bytes: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("a bundle's paths stay inside it")
        return value


class Manifest(_Strict):
    schema_version: Literal[2] = 2
    attune: str
    versions: dict[str, str]
    model: Model
    tokenizer: Tokenizer
    adapter: Adapter
    policy: Policy
    android: Target | None = None
    ios: Target | None = None
    training: Training | None = None
    files: tuple[File, ...]

    @model_validator(mode="after")
    def _names_checked_files(self) -> Manifest:
        """Whatever a host will open is among ``files``, or a folder of them."""
        programs = [p for target in (self.android, self.ios) if target for p in target.programs]
        named = [self.tokenizer.file, self.tokenizer.chat_template, self.adapter.peft]
        named += [p.file for p in programs] + [self.adapter.runtime or self.adapter.peft]
        named += self.policy.lexicons
        if self.training:
            named.append(self.training.weights)
        listed = {file.path for file in self.files}
        folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents}
        if lost := sorted(set(named) - listed - (folders - {"."})):
            raise ValueError(f"{', '.join(lost)} is named, but not among the files")
        return self


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    own = (folder / MANIFEST, folder / CHECKSUM)
    return sorted(p for p in folder.rglob("*") if p.is_file() and p not in own)


def list_files(folder: Path) -> tuple[File, ...]:
    """Every file of a bundle but the manifest and its checksum, by path."""
    return tuple(
        File(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256(p))
        for p in _files(folder)
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    (folder / CHECKSUM).write_text(sha256(folder / MANIFEST) + "\n", encoding="ascii")


def open_bundle(folder: Path) -> Manifest:
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
    checksum = folder / CHECKSUM
    stored = checksum.read_bytes() if checksum.is_file() else b""
    if stored != sha256(path).encode() + b"\n":
        raise BundleError(
            f"{path} does not match {CHECKSUM} beside it: one of the two is damaged. Copy the "
            f"bundle again, or export anew."
        )
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
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors()[:8]
        )
        raise BundleError(f"{path} does not follow the schema: {problems}.") from error
    _check_files(folder, manifest)
    return manifest


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
    for path in _files(folder):
        if (name := path.relative_to(folder).as_posix()) not in listed:
            problems.append(f"{name} is not in the manifest")
    if problems:
        raise BundleError(
            f"the bundle {folder} is damaged: {'; '.join(problems)}. Copy it again, or export anew."
        )
