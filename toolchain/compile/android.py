"""The Android part of a bundle: ``lm.pte``, the adapter it binds, and the training programs."""

from __future__ import annotations

from exporters.executorch.lm_program import lower_lm
from runtime_py.bundle import manifest as m
from runtime_py.bundle.flat_tensor import write_ptd
from toolchain.compile import proofs, training_part
from toolchain.compile.export_job import (
    ExportJob,
    Progress,
    TargetResult,
    training_spec,
    write_training_weights,
)
from toolchain.compile.precision import ChosenPrecision

PREFILL_ANDROID = 512  # tokens: longest chunk of a prompt in one call
LM, ADAPTER = "android/lm.pte", "android/adapter.ptd"


def compile_android(job: ExportJob, chosen: ChosenPrecision, progress: Progress) -> TargetResult:
    """Writes ``android/`` and the weights file of training into the job's folder, and proves the
    programs. Raises ``ExportError`` where they do not compute what PyTorch computes."""
    programs = _lm(job, chosen, progress)
    spec = training_spec(job, chosen.simulated)
    progress("write the training weights")
    weights = write_training_weights(job, chosen.simulated, spec)
    progress("android: lower the training programs")
    training = training_part.lower_programs("android", job.folder, spec, job.lengths)
    progress("android: check the training programs")
    training_part.prove(
        job.folder,
        training,
        weights.section,
        spec,
        job.layout,
        proofs.with_effect(job.adapter),
        chosen.simulated,
        job.texts["perplexity"][0],
    )
    return TargetResult(chosen, (*programs, *training), weights)


def _lm(job: ExportJob, chosen: ChosenPrecision, progress: Progress) -> tuple[m.Program, ...]:
    lm, adapter = job.folder / LM, job.folder / ADAPTER
    lm.parent.mkdir()
    lowered = lower_lm(
        chosen.model,
        lm,
        prefill_length=PREFILL_ANDROID,
        embed_length=job.embed_length,
        bos_id=job.input.bos_id,
        eos_ids=list(job.input.checkpoint.eos_ids),
        progress=lambda step: progress(f"android: {step}"),
    )
    write_ptd(adapter, job.adapter)
    progress("android: check the program")
    proofs.android_program(lm, adapter, chosen.model, job.adapter, job.texts["perplexity"][0])
    size = lm.stat().st_size
    return tuple(
        training_part.manifest_program(signature, LM, size).model_copy(
            update={
                "delegates": lowered.delegation[signature.name].delegates,
                "delegated_flops_fraction": lowered.delegation[signature.name].fraction,
                "not_delegated": lowered.delegation[signature.name].outside,
            }
        )
        for signature in lowered.programs
    )
