"""What every stage of an export works on, and what a target's stage hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from exporters.model.assembly import build
from exporters.model.lora_tensors import set_adapter
from exporters.model.transformer import Transformer
from exporters.training.programs import TrainingSpec
from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_forms import to_runtime
from toolchain.compile import adapter_layout, proofs, training_part
from toolchain.compile.export_input import ExportInput
from toolchain.compile.precision import ChosenPrecision
from toolchain.compile.shipped_text import shipped_turns, tokenize

EMBED_LENGTH = 512  # most tokens of a dialogue that ``embed`` reads
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class ExportJob:
    """``folder``: the bundle that is being written. ``model``: float32, with the adapter set.
    ``layout``: the programs' adapter tensors; ``adapter``: their values, by name. ``texts``:
    attune's dialogues by split, as tokens [1, S] each. ``lengths``: tokens of the training
    programs. ``train_weights``: precision of training, None for the one that ``lm`` gets.
    ``policy``: fields of the loop's policy that were asked for."""

    folder: Path
    input: ExportInput
    model: Transformer
    layout: tuple[m.AdapterTensor, ...]
    adapter: Mapping[str, np.ndarray]
    texts: Mapping[str, Sequence[Tensor]]
    lengths: tuple[int, ...]
    train_weights: str | None
    policy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def embed_length(self) -> int:
        """Tokens that ``embed`` reads at most."""
        return min(EMBED_LENGTH, self.input.spec.context)


@dataclass(frozen=True, eq=False)
class TrainingWeights:
    """The weights file that a stage wrote: its section of the manifest, and its training spec."""

    section: m.Training
    spec: TrainingSpec


@dataclass(frozen=True, eq=False)
class TargetResult:
    """A target that was compiled. ``weights``: None where the other target's file serves it."""

    chosen: ChosenPrecision
    programs: tuple[m.Program, ...]
    weights: TrainingWeights | None

    @property
    def section(self) -> m.PlatformTarget:
        """The manifest's."""
        return m.PlatformTarget(
            quantize=self.chosen.quantize,
            chosen_by=self.chosen.chosen_by,
            measured=self.chosen.measured,
            programs=self.programs,
        )


def prepare(
    folder: Path,
    source: ExportInput,
    train_weights: str | None,
    train_lengths: Sequence[int],
    policy: Mapping[str, Any],
    progress: Progress,
) -> ExportJob:
    """Builds the transformer, proves it equal to transformers', and gives it the adapter.

    Raises ``ExportError`` where it computes something else or ``train_lengths`` cannot be.
    """
    spec, checkpoint = source.spec, source.checkpoint
    model = build(spec, checkpoint.state, source.modules, source.rank)
    layout = adapter_layout.layout(spec, source.modules, source.rank)
    adapter = to_runtime(source.adapter, layout)
    texts = {
        split: tokenize(source.text.chat_text(spec.context), shipped_turns(split), spec.context)
        for split in ("calibration", "perplexity")
    }
    progress("prove equal to transformers")
    proofs.equal_to_hugging_face(model, checkpoint.hf_model(), texts["perplexity"])
    set_adapter(model, adapter)
    lengths = training_part.lengths_within(train_lengths, spec.context)
    return ExportJob(folder, source, model, layout, adapter, texts, lengths, train_weights, policy)


def write_training_weights(
    job: ExportJob, model: Transformer, spec: TrainingSpec
) -> TrainingWeights:
    """Writes the weights file of training with the values that ``model`` computes with."""
    section = training_part.write_training(job.folder, model, spec, job.lengths)
    return TrainingWeights(section, spec)


def training_spec(job: ExportJob, model: Transformer) -> TrainingSpec:
    """What the job's training programs are made for, where ``model`` has the target's weights."""
    source = job.input
    return training_part.training_spec(model, source.modules, source.rank, job.train_weights)
