"""The manifest of a bundle whose every other file is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from runtime_py.bundle import manifest as m
from runtime_py.bundle.bundle import ACKNOWLEDGEMENTS, Bundle
from runtime_py.bundle.flat_tensor import locate
from runtime_py.engine.memory import training_bytes
from runtime_py.engine.phone_engine import PhoneEngine
from runtime_py.loop.acknowledgements import BUILTIN as ACKNOWLEDGEMENT_LIST
from runtime_py.loop.lexicons import BUILTIN as LEXICONS
from runtime_py.loop.policy import LoopPolicy
from toolchain.compile.android import ADAPTER
from toolchain.compile.export_job import ExportJob, Progress, TargetResult
from toolchain.compile.paraphrase_forms import choose_form, trial_dialogues, unmeasured
from toolchain.compile.policy_file import FORM, within_lengths
from toolchain.compile.tested_versions import tested_versions

PEFT, CONFIG, LEXICON_FOLDER = "adapter", "config.json", "lexicons"


def write_lexicons(folder: Path) -> tuple[str, ...]:
    """Copies attune's own lexicons, and its list of acknowledgements, into the bundle ``folder``;
    the lexicons' paths in it."""
    shutil.copyfile(ACKNOWLEDGEMENT_LIST, folder / ACKNOWLEDGEMENTS)
    (folder / LEXICON_FOLDER).mkdir()
    paths = []
    for source in sorted(Path(str(LEXICONS)).glob("*.txt")):
        paths.append(f"{LEXICON_FOLDER}/{source.name}")
        shutil.copyfile(source, folder / paths[-1])
    return tuple(paths)


def make_manifest(
    job: ExportJob,
    results: Mapping[str, TargetResult],
    training: m.Training,
    lexicons: tuple[str, ...],
    general: tuple[str, str],
    progress: Progress,
) -> m.Manifest:
    """Of the files that now lie in the job's folder. ``results``: by target; ``general``: paths of
    the general text and of the dialogues to replay."""
    source = job.input
    runtime = ADAPTER if "android" in results else None
    offsets = locate(job.folder / ADAPTER) if runtime else {}
    manifest = m.Manifest(
        attune=version("attune-mobile"),
        versions=tested_versions(),
        model=_model(job),
        tokenizer=source.text.facts,
        adapter=m.Adapter(
            rank=source.rank,
            alpha=source.adapter.alpha,
            targets=source.modules,
            peft=PEFT,
            runtime=runtime,
            tensors=tuple(t.model_copy(update={"offset": offsets.get(t.name)}) for t in job.layout),
        ),
        policy=_policy(job, lexicons, general),
        android=results["android"].section if "android" in results else None,
        ios=results["ios"].section if "ios" in results else None,
        training=training,
        files=m.list_files(job.folder),
    )
    progress("try the forms of paraphrases")
    return _with_measured(Bundle(job.folder, manifest), job.policy)


def _model(job: ExportJob) -> m.Model:
    spec, checkpoint = job.input.spec, job.input.checkpoint
    return m.Model(
        name=job.input.name,
        source=checkpoint.source,
        architecture=spec.architecture,
        parameters=sum(tensor.numel() for _, tensor in checkpoint.state.items()),
        vocab=spec.vocab,
        hidden=spec.hidden,
        layers=len(spec.layers),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate=spec.intermediate,
        context=spec.context,
        config=CONFIG,
    )


def _policy(job: ExportJob, lexicons: tuple[str, ...], general: tuple[str, str]) -> m.Policy:
    loop = LoopPolicy.from_fields(within_lengths(job.policy, job.lengths))
    return m.Policy(
        lora_rank=job.input.rank,
        lora_alpha=job.input.adapter.alpha,
        lora_targets=job.input.modules,
        embed_length=job.embed_length,
        loop=asdict(loop),
        lexicons=lexicons,
        general=general[0],
        replay=general[1],
    )


def _with_measured(bundle: Bundle, asked: Collection[str]) -> m.Manifest:
    """The manifest whose policy has what only the programs tell: the memory that fine-tuning takes
    at the longest sequences, and the form in which the model paraphrases best; but for the fields
    that were ``asked`` for."""
    manifest = bundle.manifest
    loop = LoopPolicy.from_fields(manifest.policy.loop)
    if manifest.android is None:
        synthesis = unmeasured(loop)
    else:
        need = training_bytes(bundle, loop.longest_sequence_tokens) / 1e6
        if "fine_tune_memory_mb" not in asked:
            loop = replace(loop, fine_tune_memory_mb=math.ceil(need))
        off = loop.paraphrases == 0 and "paraphrases" in asked
        if off or not set(FORM).isdisjoint(asked):
            synthesis = unmeasured(loop)
        else:
            loop, synthesis = choose_form(PhoneEngine(bundle), loop, trial_dialogues())
    changes = {"loop": asdict(loop), "synthesis": synthesis}
    return manifest.model_copy(update={"policy": manifest.policy.model_copy(update=changes)})
