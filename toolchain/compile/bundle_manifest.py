"""The manifest of a bundle whose every other file is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from runtime_py.bundle import manifest as m
from runtime_py.bundle.bundle import ACKNOWLEDGEMENTS, Bundle
from runtime_py.bundle.flat_tensor import locate
from runtime_py.engine.memory import training_bytes
from runtime_py.loop.acknowledgements import BUILTIN as ACKNOWLEDGEMENT_LIST
from runtime_py.loop.lexicons import BUILTIN as LEXICONS
from runtime_py.loop.policy import LoopPolicy
from toolchain.compile.android import ADAPTER
from toolchain.compile.export_job import ExportJob, TargetResult
from toolchain.compile.tested_versions import tested_versions

PEFT, TOKENIZER, CHAT_TEMPLATE, LEXICON_FOLDER = (
    "adapter",
    "tokenizer.json",
    "chat_template.jinja",
    "lexicons",
)


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
) -> m.Manifest:
    """Of the files that now lie in the job's folder. ``results``: by target."""
    source, checkpoint = job.input, job.input.checkpoint
    runtime = ADAPTER if "android" in results else None
    offsets = locate(job.folder / ADAPTER) if runtime else {}
    manifest = m.Manifest(
        attune=version("attune-mobile"),
        versions=tested_versions(),
        model=_model(job),
        tokenizer=m.Tokenizer(
            file=TOKENIZER,
            chat_template=CHAT_TEMPLATE,
            bos_id=checkpoint.tokenizer.bos_token_id,
            eos_ids=checkpoint.eos_ids,
            pad_id=checkpoint.tokenizer.pad_token_id,
        ),
        adapter=m.Adapter(
            rank=source.rank,
            alpha=source.adapter.alpha,
            targets=source.modules,
            peft=PEFT,
            runtime=runtime,
            tensors=tuple(t.model_copy(update={"offset": offsets.get(t.name)}) for t in job.layout),
        ),
        policy=_policy(job, lexicons),
        android=results["android"].section if "android" in results else None,
        ios=results["ios"].section if "ios" in results else None,
        training=training,
        files=m.list_files(job.folder),
    )
    return _with_memory(job.folder, manifest)


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
    )


def _policy(job: ExportJob, lexicons: tuple[str, ...]) -> m.Policy:
    loop = LoopPolicy(
        longest_sequence_tokens=max(job.lengths), shortest_sequence_tokens=min(64, *job.lengths)
    )
    return m.Policy(
        lora_rank=job.input.rank,
        lora_alpha=job.input.adapter.alpha,
        lora_targets=job.input.modules,
        embed_length=job.embed_length,
        loop=asdict(loop),
        lexicons=lexicons,
    )


def _with_memory(folder: Path, manifest: m.Manifest) -> m.Manifest:
    """The policy with what fine-tuning this model takes at the longest sequences."""
    if manifest.android is None:
        return manifest
    loop = manifest.policy.loop
    need = training_bytes(Bundle(folder, manifest), int(loop["longest_sequence_tokens"])) / 1e6
    measured = {**loop, "fine_tune_memory_mb": math.ceil(need)}
    policy = manifest.policy.model_copy(update={"loop": measured})
    return manifest.model_copy(update={"policy": policy})
