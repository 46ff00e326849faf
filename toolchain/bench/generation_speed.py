"""``attune bench decode`` and ``attune bench prefill`` as a function."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.loop.errors import BundleError
from toolchain.bench import machine
from toolchain.bench.contestants import Contestants
from toolchain.bench.engines import GenerationEngine
from toolchain.bench.generation_report import GenerationReport, GenerationRun, Setting
from toolchain.bench.profile import ProfileRow, profile_decode
from toolchain.bench.rounds import Timing, decode, interleave, prefill
from toolchain.compile.shipped_text import shipped_dialogues
from toolchain.report.console import counted_progress


def bench_generation(
    bundle: Path,
    *,
    prompt_tokens: int,
    tokens: int,
    threads: Sequence[int] = (),
    source: str | None = None,
    llama: Path | None = None,
    rounds: int = 5,
    adapter_cost: bool = False,
    profile: bool = False,
    quiet: bool = False,
) -> GenerationReport:
    """Measures decoding ``tokens`` tokens after a prompt, or the prompt itself where ``tokens`` is
    0, beside the engines that can be had.

    ``threads``: one run for each; none means all cores. ``source``: the bundle's model, for
    PyTorch's row; ``llama``: a GGUF for llama.cpp's. ``quiet``: no progress on the terminal.
    Raises ``BundleError`` and ``ExportError`` for what cannot be run.
    """
    opened = open_bundle(bundle)
    files = opened.android
    _refuse_beyond_context(opened, prompt_tokens, tokens)
    counts = tuple(dict.fromkeys(threads)) or (machine.usable_cores(),)
    if min(counts) < 1:
        raise BundleError(f"--threads {min(counts)} runs nothing: give at least 1.")
    ids = text_ids(opened, prompt_tokens + tokens)
    prompt, continuation = ids[:prompt_tokens], ids[prompt_tokens:]
    runs, names = [], {}
    with tempfile.TemporaryDirectory(prefix="attune-") as folder:
        contestants = Contestants(
            opened,
            Path(folder),
            source=source,
            llama=llama,
            adapter_cost=adapter_cost,
            quiet=quiet,
        )
        for count in counts:
            with contestants.engines(count) as engines:
                names = {key: engine.name for key, engine in engines.items()}
                measured = _measure(engines, prompt, continuation, count, rounds, quiet)
            rows: list[ProfileRow] = []
            if profile:
                rows = profile_decode(files.lm, files.adapter, prompt, continuation, count)
            runs.append(GenerationRun(count, *measured, rows))
    setting = Setting(
        what="decode" if tokens else "prefill",
        bundle=str(bundle),
        quantize=files.quantize,
        prompt_tokens=prompt_tokens,
        tokens=tokens or prompt_tokens,
        rounds=rounds,
        weight_bytes=weight_bytes(opened),
        names=names,
        reasons=contestants.reasons,
    )
    return GenerationReport(setting, tuple(runs))


def _refuse_beyond_context(bundle: Bundle, prompt_tokens: int, tokens: int) -> None:
    context = bundle.manifest.model.context
    if prompt_tokens + tokens > context:
        raise BundleError(
            f"{prompt_tokens} tokens of prompt and {tokens} decoded do not fit: the bundle has a "
            f"context of {context} tokens."
        )


def text_ids(bundle: Bundle, count: int) -> list[int]:
    """Token ids of the text that ships with attune, repeated where it is too short."""
    turns = [turn["content"] for d in shipped_dialogues("perplexity") for turn in d]
    ids = ChatText.of(bundle).encode("\n".join(turns))
    return (ids * (count // len(ids) + 1))[:count]


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of weights that decoding one token reads: program and adapter, less the token table
    (of which it reads one row) where that is not the head as well."""
    manifest, files = bundle.manifest, bundle.android
    vocab, hidden = manifest.model.vocab, manifest.model.hidden
    total = files.lm.stat().st_size + files.adapter.stat().st_size
    if files.quantize != "none":
        return total - vocab * (hidden + 4)  # int8 rows, each with a float32 scale
    # A float32 program holds each of the model's parameters once; more than that is a second
    # copy of a table that the checkpoint has only once.
    copied = files.lm.stat().st_size - 4 * manifest.model.parameters
    return total - 4 * vocab * hidden * (copied > 2 * vocab * hidden)


def _measure(
    engines: Mapping[str, GenerationEngine],
    prompt: list[int],
    continuation: list[int],
    threads: int,
    rounds: int,
    quiet: bool,
) -> tuple[dict[str, Timing], float, float | None]:
    """-> timings, memory bandwidth in bytes a second, cores that other processes took."""
    bandwidth = machine.bandwidth(threads)  # also gives torch its threads
    measure = decode(prompt, continuation) if continuation else prefill(prompt)
    others = machine.OtherProcesses()
    with counted_progress(quiet) as bar:
        task = bar.add_task("", total=(rounds + 1) * len(engines))

        def progress(name: str) -> None:
            bar.update(task, advance=1, description=f"{threads} threads: {name}")

        counted = len(continuation) or len(prompt)
        timings = interleave(engines, measure, rounds, counted, progress)
    return timings, bandwidth, others.cores()
