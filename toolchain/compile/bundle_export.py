"""``attune export`` as a function: a checkpoint and an adapter in, a whole bundle out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporters.errors import ExportError
from runtime_py.bundle.manifest import Manifest, write_manifest
from runtime_py.bundle.peft_adapter import write_peft
from runtime_py.loop.files import replacing
from toolchain import defaults
from toolchain.compile.android import compile_android
from toolchain.compile.bundle_manifest import (
    CONFIG,
    PEFT,
    make_manifest,
    write_lexicons,
)
from toolchain.compile.export_input import AdapterRequest, read_input
from toolchain.compile.export_job import (
    ExportJob,
    Progress,
    TargetResult,
    TrainingWeights,
    prepare,
)
from toolchain.compile.golden_vectors import GoldenReference, GoldenTraining, stream, write_golden
from toolchain.compile.ios import compile_ios
from toolchain.compile.mean_vector import write_mean_vector
from toolchain.compile.phone_text import TOKENIZER
from toolchain.compile.policy_file import LORA, PolicyFile, read_policy_file
from toolchain.compile.precision import PrecisionChooser
from toolchain.compile.shipped_general import write_general
from toolchain.compile.shipped_text import shipped_dialogues


def export(
    model: str,
    out: Path,
    *,
    targets: Sequence[str] = defaults.TARGETS,
    adapter: Path | None = None,
    context: int | None = None,
    quantize: Mapping[str, str] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    modules: tuple[str, ...] | None = None,
    chat_template: Path | None = None,
    train_weights: str | None = None,
    train_lengths: Sequence[int] = defaults.TRAIN_LENGTHS,
    policy: Path | None = None,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Manifest:
    """Compiles ``model`` into the bundle ``out``, which appears whole or not at all.

    ``model``: the built-in one's name, a hub id, a folder or a .gguf file. ``adapter``: a PEFT
    folder; without it a fresh one with ``rank``, ``alpha`` and ``modules`` (None for attune's
    defaults). ``context``: tokens, None for the model's own. ``quantize``: the precision of a
    target, by its name; a target without one gets the smallest whose perplexity stays near
    float32's. ``chat_template``: a Jinja file in place of the model's. ``train_weights``:
    precision of the base weights of training, None for those that ``lm`` has; ``train_lengths``:
    tokens of the training programs. ``policy``: a JSON file with fields in place of the default
    policy's, and with ``lora_rank``, ``lora_alpha`` and ``lora_targets`` of a fresh adapter, where
    they are not given. ``force``: replaces a folder at ``out``. ``progress`` is told
    each stage as it begins.

    Raises ``ExportError`` or ``AdapterError`` for what cannot be exported, ``WriteError`` where
    ``out`` cannot be written; what was there before is then untouched.
    """
    chosen = quantize or {}
    _check_out(out, force)
    asked = read_policy_file(policy, train_lengths)
    _check_policy(asked, adapter)
    request = AdapterRequest(
        adapter,
        asked.rank if rank is None else rank,
        asked.alpha if alpha is None else alpha,
        asked.targets if modules is None else modules,
    )
    _check_choices(targets, chosen, train_weights)
    _check_adapter(request)
    progress("read the checkpoint")
    source = read_input(model, request, context, chat_template)
    with replacing(out) as folder:
        folder.mkdir()
        job = prepare(folder, source, train_weights, train_lengths, asked.loop, progress)
        results = _compile(job, tuple(dict.fromkeys(targets)), chosen, progress)
        progress("write the bundle")
        return _finish(job, results, progress)


def _check_out(out: Path, force: bool) -> None:
    if os.path.lexists(out) and not force:
        raise ExportError(
            f"{out} exists already: choose another --out, or give --force to replace it."
        )
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise ExportError(
            f"{out} is no folder, and --force replaces only folders: choose another --out, or "
            f"remove it."
        )


def _check_policy(asked: PolicyFile, adapter: Path | None) -> None:
    if adapter is not None and asked.has_adapter:
        raise ExportError(
            f"--adapter brings its own rank, alpha and targets: leave {', '.join(LORA)} out of the "
            f"policy."
        )


def _check_choices(
    targets: Sequence[str], quantize: Mapping[str, str], train_weights: str | None
) -> None:
    known = ", ".join(defaults.TARGETS)
    if unknown := sorted({*targets, *quantize} - set(defaults.TARGETS)):
        raise ExportError(f"no target named {', '.join(unknown)}; known: {known}.")
    if not targets:
        raise ExportError(f"no --target given; known: {known}.")
    for target, precision in quantize.items():
        if precision not in defaults.PRECISIONS[target]:
            raise ExportError(
                f"no --quantize {precision} for {target}; known: "
                f"{', '.join(defaults.PRECISIONS[target])}."
            )
    if train_weights not in (None, *defaults.TRAIN_WEIGHTS):
        raise ExportError(
            f"no --train-weights {train_weights}; known: {', '.join(defaults.TRAIN_WEIGHTS)}."
        )


def _check_adapter(request: AdapterRequest) -> None:
    if request.rank is not None and request.rank < 1:
        raise ExportError(f"--lora-rank {request.rank} adapts nothing: give at least 1.")
    if request.alpha is not None and not 0 < request.alpha < math.inf:
        raise ExportError(
            f"--lora-alpha {request.alpha:g} makes no adapter: what it learns is multiplied by "
            f"alpha / rank. Give a number above 0."
        )
    if request.modules is not None and not request.modules:
        raise ExportError("--lora-targets names no module: give names by comma, such as q_proj.")
    asked = (request.rank, request.alpha, request.modules)
    if request.folder is not None and any(value is not None for value in asked):
        raise ExportError(
            "--adapter brings its own rank, alpha and targets: leave out --lora-rank, --lora-alpha "
            "and --lora-targets."
        )


def _compile(
    job: ExportJob, targets: Sequence[str], quantize: Mapping[str, str], progress: Progress
) -> dict[str, TargetResult]:
    """Each target's part, in the order of ``targets``."""
    chooser = PrecisionChooser(job.model, job.texts)
    results = {}
    for target in targets:
        requested = quantize.get(target)
        step = "choose the precision" if requested is None else "quantize"
        progress(f"{target}: {step}")
        chosen = chooser.choose(target, requested)
        if target == "android":
            results[target] = compile_android(job, chosen, progress)
        else:
            # One weights file serves both targets: Android's programs read it as it lies.
            with_weights = "android" not in targets
            results[target] = compile_ios(job, chosen, progress, with_weights=with_weights)
    return results


def _finish(job: ExportJob, results: Mapping[str, TargetResult], progress: Progress) -> Manifest:
    """Writes what belongs to no target, the golden vectors, and last the manifest."""
    folder, checkpoint = job.folder, job.input.checkpoint
    lexicons, general = write_lexicons(folder), write_general(folder)
    write_peft(folder / PEFT, job.input.adapter)
    (folder / TOKENIZER).write_text(job.input.text.tokenizer, encoding="utf-8")
    config = json.dumps(checkpoint.config.to_dict(), indent=1, sort_keys=True, default=str)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    keeper, weights = _weights(results)
    order = dict.fromkeys((keeper, *results))
    write_golden(
        folder,
        texts=job.texts["perplexity"],
        dialogues=stream(shipped_dialogues("perplexity"), job.texts["perplexity"]),
        eos=checkpoint.eos_ids[0],
        adapter=job.adapter,
        layout=job.layout,
        embed_length=job.embed_length,
        references={
            target: GoldenReference(
                results[target].chosen.quantize, results[target].chosen.simulated
            )
            for target in order
        },
        training=GoldenTraining(
            results[keeper].chosen.simulated, weights.spec, weights.section.lengths
        ),
    )
    texts = job.texts["calibration"]
    write_mean_vector(folder, results[keeper].chosen.simulated, texts, job.embed_length)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(0o644)  # some writers keep theirs to the user who exported
    manifest = make_manifest(job, results, weights.section, lexicons, general, progress)
    write_manifest(folder, manifest)
    return manifest


def _weights(results: Mapping[str, TargetResult]) -> tuple[str, TrainingWeights]:
    """The target whose stage wrote the weights file, and the file."""
    return next((t, r.weights) for t, r in results.items() if r.weights is not None)
