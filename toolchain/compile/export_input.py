"""What an export starts from: a checkpoint, and the adapter that its programs are made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporters.model.checkpoint import Checkpoint, load_checkpoint
from exporters.model.spec import ModelSpec, read_spec
from runtime_py.bundle.manifest import Policy
from runtime_py.bundle.peft_adapter import PeftAdapter, check_fits, fresh_config, read_peft
from toolchain.compile import adapter_layout
from toolchain.compile.phone_text import PhoneText, text_of
from toolchain.defaults import BUILTIN


@dataclass(frozen=True)
class AdapterRequest:
    """A PEFT ``folder``; or, without one, a fresh adapter's ``rank``, ``alpha`` and ``modules``
    (short names, such as ``q_proj``), each None for attune's default."""

    folder: Path | None = None
    rank: int | None = None
    alpha: float | None = None
    modules: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class ExportInput:
    """``name``: the model's, as the manifest has it; ``modules``, ``rank``: of the programs, which
    hold every rank of ``adapter``."""

    name: str
    checkpoint: Checkpoint
    spec: ModelSpec
    adapter: PeftAdapter
    modules: tuple[str, ...]
    rank: int
    text: PhoneText

    @property
    def bos_id(self) -> int:
        """Where the tokenizer has none, a sequence's end stands for its beginning."""
        bos = self.text.facts.bos_id
        return bos if bos is not None else self.checkpoint.eos_ids[0]


def builtin_folder() -> Path:
    """The checkpoint that ships with attune."""
    return Path(__file__).parent / "builtin" / "model"


def read_input(
    model: str, adapter: AdapterRequest, context: int | None, chat_template: Path | None
) -> ExportInput:
    """Reads ``model`` (the built-in one's name, a folder, a .gguf file or a hub id) and an adapter
    for it. ``context``: tokens, None for the model's own; ``chat_template``: a Jinja file in place
    of the checkpoint's.

    Raises ``ExportError`` or ``AdapterError`` for what cannot be read or does not fit.
    """
    folder = str(builtin_folder()) if model == BUILTIN else model
    checkpoint = load_checkpoint(folder, chat_template=chat_template)
    spec = read_spec(checkpoint.config, context)
    name = BUILTIN if model == BUILTIN else checkpoint.name
    if adapter.folder is not None:
        peft = read_peft(adapter.folder)
        check_fits(peft, adapter_layout.module_shapes(spec))
        modules, rank = adapter_layout.modules_of(peft), adapter_layout.highest_rank(peft)
        text = text_of(checkpoint, model)
        return ExportInput(name, checkpoint, spec, peft, modules, rank, text)
    policy = Policy()
    rank = policy.lora_rank if adapter.rank is None else adapter.rank
    alpha = policy.lora_alpha if adapter.alpha is None else adapter.alpha
    usual = ("qkv_proj",) if spec.fused else policy.lora_targets
    modules = usual if adapter.modules is None else adapter.modules
    config = fresh_config(rank, alpha, modules, name)
    peft = adapter_layout.fresh(spec, config, modules, rank)
    text = text_of(checkpoint, model)
    return ExportInput(name, checkpoint, spec, peft, modules, rank, text)
