"""One benchmark from request to report."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.loop.errors import BundleError
from toolchain.bench import generation_report, machine, rounds
from toolchain.bench.contestants import Contestants
from toolchain.bench.engines import Engine
from toolchain.bench.profile import Row, profile_decode
from toolchain.compile.shipped_text import shipped_dialogues
from toolchain.report.console import console, print_json
from toolchain.verify.source import weight_bytes


@dataclass(frozen=True)
class Request:
    """What a user asked for. ``tokens``: decoded after the prompt; 0 measures the prompt itself.
    ``threads``: one run for each; none means all cores."""

    bundle: Path
    prompt_tokens: int
    tokens: int
    threads: tuple[int, ...] = ()
    source: str | None = None
    llama: Path | None = None
    rounds: int = 5
    adapter_cost: bool = False
    profile: bool = False
    as_json: bool = False


def bench(request: Request) -> None:
    """Measures and prints. Raises ``BundleError`` and ``ExportError`` for what cannot be run."""
    bundle = open_bundle(request.bundle)
    manifest, files = bundle.manifest, bundle.android
    needed = request.prompt_tokens + request.tokens
    if needed > manifest.model.context:
        raise BundleError(
            f"{request.prompt_tokens} tokens of prompt and {request.tokens} decoded do not fit: "
            f"the bundle has a context of {manifest.model.context} tokens."
        )
    threads = tuple(dict.fromkeys(request.threads)) or (machine.usable_cores(),)
    if min(threads) < 1:
        raise BundleError(f"--threads {min(threads)} runs nothing: give at least 1.")
    ids = text_ids(bundle, needed)
    prompt, continuation = ids[: request.prompt_tokens], ids[request.prompt_tokens :]
    runs, names = [], {}
    with tempfile.TemporaryDirectory(prefix="attune-") as folder:
        contestants = Contestants(
            bundle,
            Path(folder),
            source=request.source,
            llama=request.llama,
            adapter_cost=request.adapter_cost,
            quiet=request.as_json,
        )
        for count in threads:
            with contestants.engines(count) as engines:
                names = {key: engine.name for key, engine in engines.items()}
                measured = _measure(request, engines, prompt, continuation, count)
            profile: list[Row] = []
            if request.profile:
                profile = profile_decode(files.lm, files.adapter, prompt, continuation, count)
            runs.append(generation_report.Run(count, *measured, profile))
    setting = generation_report.Setting(
        what="decode" if request.tokens else "prefill",
        bundle=str(request.bundle),
        quantize=files.target.quantize,
        prompt_tokens=request.prompt_tokens,
        tokens=request.tokens or request.prompt_tokens,
        rounds=request.rounds,
        weight_bytes=weight_bytes(bundle),
        names=names,
        reasons=contestants.reasons,
    )
    if request.as_json:
        print_json(generation_report.as_json(setting, runs))
    else:
        generation_report.show(setting, runs)


def text_ids(bundle: Bundle, count: int) -> list[int]:
    """Token ids of the text that ships with attune, repeated where it is too short."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(bundle.path / bundle.manifest.tokenizer.file)
    )
    turns = [turn["content"] for d in shipped_dialogues("perplexity") for turn in d]
    ids = tokenizer("\n".join(turns), add_special_tokens=False)["input_ids"]
    return (ids * (count // len(ids) + 1))[:count]


def _measure(
    request: Request,
    engines: dict[str, Engine],
    prompt: list[int],
    continuation: list[int],
    threads: int,
) -> tuple[dict[str, rounds.Timing], float, float | None]:
    """-> timings, memory bandwidth in bytes a second, cores that other processes took."""
    bandwidth = machine.bandwidth(threads)  # also gives torch its threads
    measure = rounds.decode(prompt, continuation) if continuation else rounds.prefill(prompt)
    neighbours = machine.Neighbours()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=request.as_json or not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=(request.rounds + 1) * len(engines))

        def told(name: str) -> None:
            progress.update(task, advance=1, description=f"{threads} threads: {name}")

        timings = rounds.interleave(
            engines, measure, request.rounds, len(continuation) or len(prompt), told
        )
    return timings, bandwidth, neighbours.cores()
