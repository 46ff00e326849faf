"""``attune export`` as a function: a checkpoint and an adapter in, a whole bundle out."""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from exporters.coreml.lm_package import lower as lower_coreml
from exporters.errors import ExportError
from exporters.executorch.lm_program import adapter_tensors, lower_lm
from exporters.model.checkpoint import Checkpoint, load_checkpoint
from exporters.model.spec import ModelSpec, read_spec
from exporters.model.transformer import Transformer, build
from exporters.training.programs import TrainingSpec
from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.flat_tensor import locate, write_ptd
from runtime_py.bundle.peft_adapter import (
    PeftAdapter,
    check_fits,
    fresh_config,
    read_peft,
    write_peft,
)
from runtime_py.engine.memory import training_bytes
from runtime_py.loop.lexicons import BUILTIN as LEXICONS
from runtime_py.loop.policy import LoopPolicy
from toolchain.compile import adapter_layout, golden_vectors, precision, proofs, training_part
from toolchain.compile.shipped_text import shipped_dialogues, tokenize
from toolchain.compile.tested_versions import tested_versions

PREFILL_ANDROID = 512  # longest chunk of a prompt in one call
PREFILL_IOS = 64  # fixed chunk: longer prompts take several, shorter ones are padded
BUILTIN = "tiny"


@dataclass(frozen=True)
class Request:
    """What a user asked for. ``quantize``: per target, None for the choice by perplexity."""

    model: str
    out: Path
    targets: tuple[str, ...]
    adapter: Path | None = None
    context: int | None = None
    quantize: dict[str, str | None] | None = None
    rank: int | None = None
    alpha: float | None = None
    modules: tuple[str, ...] | None = None
    chat_template: Path | None = None
    train_weights: str | None = None
    train_lengths: tuple[int, ...] = training_part.LENGTHS
    force: bool = False


@dataclass(frozen=True)
class _Source:
    checkpoint: Checkpoint
    spec: ModelSpec
    adapter: PeftAdapter
    modules: tuple[str, ...]
    rank: int
    name: str


def builtin_folder() -> Path:
    return Path(__file__).parent / "builtin" / "model"


def export(request: Request, progress: Callable[[str], None]) -> m.Manifest:
    """Writes the bundle ``request.out``; it appears whole or not at all.

    Raises ``ExportError`` or ``AdapterError`` with a sentence for what cannot be exported.
    """
    if os.path.lexists(request.out) and not request.force:
        raise ExportError(
            f"{request.out} exists already: choose another --out, or give --force to replace it."
        )
    _check_request(request)
    beside = request.out.parent / f".{request.out.name}.{os.getpid()}.part"
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise ExportError(
            f"{request.out} cannot be written ({error.strerror}): choose another --out."
        ) from error
    try:
        manifest = _fill(beside, request, progress)
        if request.force and os.path.lexists(request.out):
            old = request.out.parent / f".{request.out.name}.{os.getpid()}.old"
            request.out.rename(old)
            beside.rename(request.out)
            shutil.rmtree(old)
        else:
            beside.rename(request.out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise ExportError(
                f"{request.out} cannot be written ({error.strerror}): nothing was left behind; "
                f"free space or choose another --out."
            ) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest


def _check_request(request: Request) -> None:
    if unknown := sorted(set(request.targets) - {"android", "ios"}):
        raise ExportError(f"no target named {', '.join(unknown)}; known: android, ios.")
    if not request.targets:
        raise ExportError("no --target given; known: android, ios.")
    for target, scheme in (request.quantize or {}).items():
        known = precision.SCHEMES[target]
        if scheme is not None and scheme not in known:
            raise ExportError(f"no --quantize {scheme} for {target}; known: {', '.join(known)}.")
    if request.train_weights not in (None, *training_part.WEIGHT_CHOICES):
        raise ExportError(
            f"no --train-weights {request.train_weights}; known: "
            f"{', '.join(training_part.WEIGHT_CHOICES)}."
        )
    if request.rank is not None and request.rank < 1:
        raise ExportError(f"--lora-rank {request.rank} adapts nothing: give at least 1.")
    if request.adapter and (request.rank or request.alpha or request.modules):
        raise ExportError(
            "--adapter brings its own rank, alpha and targets: leave out --lora-rank, --lora-alpha "
            "and --lora-targets."
        )


def _open(request: Request) -> _Source:
    folder = str(builtin_folder()) if request.model == BUILTIN else request.model
    checkpoint = load_checkpoint(folder, chat_template=request.chat_template)
    spec = read_spec(checkpoint.config, request.context)
    name = request.model if request.model == BUILTIN else Path(request.model).stem
    if request.adapter:
        adapter = read_peft(request.adapter)
        check_fits(adapter, adapter_layout.module_shapes(spec))
        modules, rank = adapter_layout.modules_of(adapter), adapter_layout.highest_rank(adapter)
    else:
        policy = m.Policy()
        rank = request.rank or policy.lora_rank
        default = ("qkv_proj",) if spec.fused else policy.lora_targets
        modules = request.modules or default
        config = fresh_config(rank, request.alpha or policy.lora_alpha, modules, name)
        adapter = adapter_layout.fresh(spec, config, modules, rank)
    return _Source(checkpoint, spec, adapter, modules, rank, name)


def _load_adapter(model: Transformer, arrays: dict) -> None:
    for name, tensor in adapter_tensors(model).items():
        tensor.copy_(torch.from_numpy(arrays[name]))


def _fill(folder: Path, request: Request, progress: Callable[[str], None]) -> m.Manifest:
    progress("read the checkpoint")
    source = _open(request)
    spec, checkpoint = source.spec, source.checkpoint
    model = build(spec, checkpoint.state, source.modules, source.rank)
    layout = adapter_layout.layout(spec, source.modules, source.rank)
    arrays = to_runtime(source.adapter, layout)
    texts = {
        split: tokenize(
            checkpoint.tokenizer, checkpoint.chat_template, shipped_dialogues(split), spec.context
        )
        for split in ("calibration", "perplexity")
    }
    progress("prove equal to transformers")
    proofs.equal_to_hugging_face(model, checkpoint.hf_model(), texts["perplexity"])
    _load_adapter(model, arrays)
    lengths = training_part.lengths_within(request.train_lengths, spec.context)
    policy = m.Policy(
        lora_rank=source.rank,
        lora_alpha=source.adapter.alpha,
        lora_targets=source.modules,
        embed_length=min(512, spec.context),
        loop=asdict(
            LoopPolicy(
                longest_sequence_tokens=max(lengths), shortest_sequence_tokens=min(64, *lengths)
            )
        ),
        lexicons=_copy_lexicons(folder),
    )
    targets: dict[str, m.PlatformTarget] = {}
    trained: m.Training | None = None
    trained_for: TrainingSpec | None = None
    references: dict[str, golden_vectors.Reference] = {}
    # One weights file serves both targets: Android's programs read it as it lies.
    keeper = "android" if "android" in request.targets else "ios"
    measure = precision.Measure(model, texts)
    for target in request.targets:
        asked = (request.quantize or {}).get(target)
        progress(f"{target}: choose the precision" if asked is None else f"{target}: quantize")
        choice = measure.choose(target, asked)
        lower = _lower_android if target == "android" else _lower_ios
        programs = lower(folder, choice, source, policy, arrays, progress)
        made = training_part.training_spec(
            choice.simulated, source.modules, source.rank, request.train_weights
        )
        if target == keeper:
            progress("write the training weights")
            trained = training_part.write_training(folder, choice.simulated, made, lengths)
            trained_for = made
        progress(f"{target}: lower the training programs")
        learning = training_part.lower_programs(target, folder, made, lengths)
        if target == "android" and trained is not None:
            progress("android: check the training programs")
            model_and_text = choice.simulated, texts["perplexity"][0]
            training_part.prove(
                folder, learning, trained, made, layout, proofs.with_effect(arrays), *model_and_text
            )
        programs = (*programs, *learning)
        references[target] = golden_vectors.Reference(choice.quantize, choice.simulated)
        targets[target] = m.PlatformTarget(
            quantize=choice.quantize,
            chosen_by="perplexity" if asked is None else "user",
            measured=choice.measured,
            programs=programs,
        )
    progress("write the bundle")
    write_peft(folder / "adapter", source.adapter)
    # Not the library's save, which has no error of its own for a full disk.
    tokenizer_json = checkpoint.tokenizer.backend_tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    golden_vectors.write_golden(
        folder,
        texts["perplexity"],
        golden_vectors.stream(shipped_dialogues("perplexity"), texts["perplexity"]),
        checkpoint.eos_ids[0],
        arrays,
        layout,
        policy.embed_length,
        {keeper: references[keeper], **references},
        trained,
        trained_for,
    )
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(0o644)  # some writers keep theirs to the user who exported
    return _manifest(folder, source, policy, layout, targets, trained)


def _with_memory(folder: Path, manifest: m.Manifest) -> m.Manifest:
    """The policy with what fine-tuning this model takes at the longest sequences."""
    trained, loop = manifest.training, manifest.policy.loop
    if trained is None or manifest.android is None:
        return manifest
    longest = int(loop["longest_sequence_tokens"])
    need = training_bytes(Bundle(folder, manifest), longest) / 1e6
    own = {**loop, "fine_tune_memory_mb": math.ceil(need)}
    policy = manifest.policy.model_copy(update={"loop": own})
    return manifest.model_copy(update={"policy": policy})


def _copy_lexicons(folder: Path) -> tuple[str, ...]:
    """Attune's own lexicons into the bundle; their paths in it."""
    (folder / "lexicons").mkdir()
    paths = []
    for source in sorted(Path(str(LEXICONS)).glob("*.txt")):
        paths.append(f"lexicons/{source.name}")
        shutil.copyfile(source, folder / paths[-1])
    return tuple(paths)


def _manifest(
    folder: Path,
    source: _Source,
    policy: m.Policy,
    layout: Sequence[m.AdapterTensor],
    targets: dict[str, m.PlatformTarget],
    trained: m.Training | None,
) -> m.Manifest:
    spec, checkpoint = source.spec, source.checkpoint
    runtime = "android/adapter.ptd" if "android" in targets else None
    offsets = locate(folder / runtime) if runtime else {}
    tokenizer = checkpoint.tokenizer
    manifest = m.Manifest(
        attune=version("attune-mobile"),
        versions=tested_versions(),
        model=m.Model(
            name=source.name,
            source=checkpoint.source,
            architecture=spec.architecture,
            parameters=sum(t.numel() for n, t in checkpoint.state.items()),
            vocab=spec.vocab,
            hidden=spec.hidden,
            layers=len(spec.layers),
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate,
            context=spec.context,
        ),
        tokenizer=m.Tokenizer(
            file="tokenizer.json",
            chat_template="chat_template.jinja",
            bos_id=tokenizer.bos_token_id,
            eos_ids=checkpoint.eos_ids,
            pad_id=tokenizer.pad_token_id,
        ),
        adapter=m.Adapter(
            rank=source.rank,
            alpha=source.adapter.alpha,
            targets=source.modules,
            peft="adapter",
            runtime=runtime,
            tensors=tuple(t.model_copy(update={"offset": offsets.get(t.name)}) for t in layout),
        ),
        policy=policy,
        android=targets.get("android"),
        ios=targets.get("ios"),
        training=trained,
        files=m.list_files(folder),
    )
    manifest = _with_memory(folder, manifest)
    m.write_manifest(folder, manifest)
    return manifest


def _lower_android(
    folder: Path,
    choice: precision.Choice,
    source: _Source,
    policy: m.Policy,
    arrays: dict,
    progress: Callable[[str], None],
) -> tuple[m.Program, ...]:
    home = folder / "android"
    home.mkdir()
    tokenizer = source.checkpoint.tokenizer
    eos = source.checkpoint.eos_ids
    lowered = lower_lm(
        choice.model,
        home / "lm.pte",
        prefill_length=PREFILL_ANDROID,
        embed_length=policy.embed_length,
        bos_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos[0],
        eos_ids=list(eos),
        progress=lambda step: progress(f"android: {step}"),
    )
    write_ptd(home / "adapter.ptd", arrays)
    progress("android: check the program")
    text = tokenize(tokenizer, source.checkpoint.chat_template, shipped_dialogues("perplexity"))[0]
    proofs.android_program(home / "lm.pte", home / "adapter.ptd", choice.model, arrays, text)
    programs = []
    for signature in lowered.programs:
        delegation = lowered.delegation[signature.name]
        programs.append(
            training_part.manifest_program(
                signature, "android/lm.pte", (home / "lm.pte").stat().st_size
            ).model_copy(
                update={
                    "delegates": delegation.delegates,
                    "delegated_flops_fraction": delegation.fraction,
                    "not_delegated": delegation.outside,
                }
            )
        )
    return tuple(programs)


def _lower_ios(
    folder: Path,
    choice: precision.Choice,
    source: _Source,
    policy: m.Policy,
    arrays: dict,
    progress: Callable[[str], None],
) -> tuple[m.Program, ...]:
    package = folder / "ios" / "model.mlpackage"
    signatures = lower_coreml(
        choice.model,
        package,
        quantize=choice.quantize,
        prefill_length=min(PREFILL_IOS, source.spec.context),
        embed_length=policy.embed_length,
        progress=lambda step: progress(f"ios: {step}"),
    )
    size = sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
    return tuple(training_part.manifest_program(s, "ios/model.mlpackage", size) for s in signatures)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
