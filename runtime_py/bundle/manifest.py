"""The bundle's manifest: what every part of attune, in any language, knows of a bundle.

``docs/bundle.md`` states the same for readers without Python. Unknown keys are errors.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import sha256
from runtime_py.loop.policy import LoopPolicy

SCHEMA_VERSION = 5
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"  # of the manifest itself, in hexadecimal


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Section):
    """A program's input, output or state. A dimension is a size or a range such as "1..512"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class Program(_Section):
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


class Model(_Section):
    """``heads``, ``kv_heads``: of queries, and of keys and values; ``head_dim``: channels of one;
    ``intermediate``: width of the MLP; ``context``: the most tokens; ``config``: the file with the
    model's Hugging Face configuration, for tools that build it anew."""

    name: str
    source: str
    architecture: str
    parameters: int
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    config: str


Item = str | int  # text, or the id of a special token


class Strip(_Section):
    """The characters that are taken off the ``left`` and the ``right`` end of what is said."""

    left: str = ""
    right: str = ""


class ChatPieces(_Section):
    """What the model's chat template writes around what is said, turns alternating from the user's
    on. ``begin``: before the first words; ``answer``, ``ask``: between the user's words and the
    assistant's, and between these and the user's next; ``last_answer``, ``end``: before and after
    the assistant's last words; ``reply``: after the user's last words where a reply is to be
    written, and what ``last_answer`` begins with; ``unanswered``: where none is. ``user``,
    ``assistant``: what is stripped off their words; ``last_user``, ``last_assistant``: where no
    turn follows. ``date``: which day it is for ever, where the template asks for it. ``read``:
    tokens that the template looks for in what is said; the pieces write them as they stand."""

    begin: tuple[Item, ...]
    answer: tuple[Item, ...]
    ask: tuple[Item, ...]
    last_answer: tuple[Item, ...]
    end: tuple[Item, ...]
    reply: tuple[Item, ...]
    unanswered: tuple[Item, ...]
    user: Strip = Strip()
    assistant: Strip = Strip()
    last_user: Strip = Strip()
    last_assistant: Strip = Strip()
    date: str | None = None
    read: tuple[str, ...] = ()


class Tokenizer(_Section):
    """``eos_ids``: every token that ends a reply, the tokenizer's own first. ``shown_ids``: special
    tokens that are part of a reply's text, as the beginning of a thought. ``normalize``: what a
    host does with a text before it is encoded. ``rewritten``: in what ``file`` differs from the
    model's own, so that all hosts read it alike."""

    file: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    shown_ids: tuple[int, ...] = ()
    normalize: Literal["NFC"] | None = None
    rewritten: tuple[str, ...] = ()
    chat: ChatPieces


class AdapterTensor(_Section):
    """Where a LoRA tensor lives: in PEFT's file, in the programs, and in the .ptd (byte offset).

    ``rows``: the rows [start, end) of PEFT's tensor that this one is.
    """

    name: str
    peft: str
    rows: tuple[int, int]
    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"
    offset: int | None = None


class Adapter(_Section):
    rank: int
    alpha: float
    targets: tuple[str, ...]
    peft: str
    runtime: str | None = None
    tensors: tuple[AdapterTensor, ...]


class MeasuredPrecision(_Section):
    """A quantization that was tried, and the perplexity it has on attune's short text."""

    quantize: str
    perplexity: float
    ratio_to_fp32: float


class PlatformTarget(_Section):
    quantize: str
    chosen_by: Literal["perplexity", "user"]
    measured: tuple[MeasuredPrecision, ...] = ()
    programs: tuple[Program, ...]


class MeasuredForm(_Section):
    """A way to ask for paraphrases that was tried: the dialogues, one attempt each, and how many
    of them gave a pair that may be learnt from."""

    form: str
    tried: int
    usable: int


class Synthesis(_Section):
    """The paraphrases' form, which ``loop`` has the texts of. ``measured``: the forms that were
    tried; none where the bundle has no program that the export could run."""

    form: str
    chosen_by: Literal["yield", "default"]
    measured: tuple[MeasuredForm, ...] = ()


class Policy(_Section):
    """The loop's choices. ``loop``: every field of ``LoopPolicy``, by name; ``lexicons``: the
    bundle's files, in the order in which ties between domains are decided; ``general``: the text
    that forgetting is measured on; ``replay``: dialogues to train on beside the user's."""

    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    embed_length: int = 512
    loop: dict[str, bool | int | float | str] = {}
    lexicons: tuple[str, ...] = ()
    synthesis: Synthesis | None = None
    general: str | None = None
    replay: str | None = None

    @field_validator("loop")
    @classmethod
    def _known(cls, value: dict[str, bool | int | float | str]) -> dict:
        try:
            LoopPolicy.from_fields(value)
        except LoopError as error:
            raise ValueError(str(error)) from error
        return value


class TrainingLayer(_Section):
    """``rope``: which of the weights file's rotary tables, or None for none; ``window``: tokens a
    query sees, itself included, or None for all before it."""

    rope: int | None
    window: int | None


class Optimizer(_Section):
    """AdamW's constants, compiled into ``adamw``."""

    beta1: float
    beta2: float
    epsilon: float


class Training(_Section):
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


class File(_Section):
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


class Manifest(_Section):
    schema_version: Literal[5] = 5
    attune: str
    versions: dict[str, str]
    model: Model
    tokenizer: Tokenizer
    adapter: Adapter
    policy: Policy
    android: PlatformTarget | None = None
    ios: PlatformTarget | None = None
    training: Training | None = None
    files: tuple[File, ...]

    @model_validator(mode="after")
    def _names_checked_files(self) -> Manifest:
        """Whatever a host will open is among ``files``, or a folder of them."""
        programs = [p for target in (self.android, self.ios) if target for p in target.programs]
        named = [self.model.config, self.tokenizer.file]
        named += [p.file for p in programs]
        named += [self.adapter.peft, self.adapter.runtime or self.adapter.peft]
        named += self.policy.lexicons
        named += [file for file in (self.policy.general, self.policy.replay) if file]
        if self.training:
            named.append(self.training.weights)
        listed = {file.path for file in self.files}
        folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents}
        if lost := sorted(set(named) - listed - (folders - {"."})):
            raise ValueError(f"{', '.join(lost)} is named, but not among the files")
        return self


def bundle_files(folder: Path) -> list[Path]:
    """Every file of a bundle but the manifest and its checksum, by path."""
    unlisted = (folder / MANIFEST, folder / CHECKSUM)
    return sorted(p for p in folder.rglob("*") if p.is_file() and p not in unlisted)


def list_files(folder: Path) -> tuple[File, ...]:
    """What the manifest says of each of ``bundle_files``."""
    return tuple(
        File(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256(p))
        for p in bundle_files(folder)
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    (folder / CHECKSUM).write_text(sha256(folder / MANIFEST) + "\n", encoding="ascii")
