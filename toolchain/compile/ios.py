"""The iOS part of a bundle: one Core ML package of the model, and one of the training programs."""

from __future__ import annotations

from exporters.coreml.lm_package import lower
from toolchain.compile import training_part
from toolchain.compile.export_job import (
    ExportJob,
    Progress,
    TargetResult,
    training_spec,
    write_training_weights,
)
from toolchain.compile.precision import ChosenPrecision
from toolchain.compile.score_range import check_scores

PREFILL_IOS = 64  # tokens: fixed chunk; longer prompts take several, shorter ones are padded
PACKAGE = "ios/model.mlpackage"


def compile_ios(
    job: ExportJob, chosen: ChosenPrecision, progress: Progress, *, with_weights: bool
) -> TargetResult:
    """Writes ``ios/`` into the job's folder; ``with_weights``: the weights file of training as
    well. Raises ``ExportError`` for a package that is not what was lowered, and for a model whose
    attention float16 cannot hold."""
    check_scores(chosen.simulated, job.texts["calibration"])
    package = job.folder / PACKAGE
    signatures = lower(
        chosen.model,
        package,
        quantize=chosen.quantize,
        prefill_length=min(PREFILL_IOS, job.input.spec.context),
        embed_length=job.embed_length,
        progress=lambda step: progress(f"ios: {step}"),
    )
    size = sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
    programs = tuple(training_part.manifest_program(s, PACKAGE, size) for s in signatures)
    spec = training_spec(job, chosen.simulated)
    weights = None
    if with_weights:
        progress("write the training weights")
        weights = write_training_weights(job, chosen.simulated, spec)
    progress("ios: lower the training programs")
    training = training_part.lower_programs("ios", job.folder, spec, job.lengths)
    return TargetResult(chosen, (*programs, *training), weights)
