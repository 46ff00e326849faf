"""Embedding speed: the bundle's ``embed`` beside PyTorch, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from runtime_py.bundle.bundle import open_bundle
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.native import silenced
from runtime_py.loop.errors import BundleError
from toolchain.bench import machine
from toolchain.bench.generation_report import BUNDLE, TORCH
from toolchain.bench.generation_speed import text_ids
from toolchain.bench.rounds import Timing, interleave, ratio
from toolchain.compile.source import find_source

TOKENS = 256


class _BundleEmbed:
    def __init__(self, name: str, program: Path, adapter: Path | None, threads: int) -> None:
        self.name = name
        self._lm = ExecutorchLm(program, adapter, threads)

    def embed(self, tokens: Sequence[int]) -> None:
        self._lm.embed(torch.tensor([list(tokens)]))


class _TorchEmbed:
    """The mean over tokens of the last hidden states, and the entropy of their norms; no head."""

    name = "PyTorch eager fp32"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.base_model

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> None:
        vectors = self._model(torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]
        shares = vectors.norm(dim=-1)
        shares = shares / shares.sum()
        vectors.mean(0), -(shares * shares.log()).sum()


@dataclass(frozen=True)
class EmbedRun:
    """Timings by engine, with so many threads."""

    threads: int
    timings: dict[str, Timing]

    @property
    def ratio_to_torch(self) -> float | None:
        if TORCH not in self.timings:
            return None
        return ratio(self.timings[BUNDLE], self.timings[TORCH])


@dataclass(frozen=True)
class EmbedReport:
    """``reason``: why PyTorch's row is absent."""

    bundle: str
    quantize: str
    tokens: int
    names: dict[str, str]
    runs: tuple[EmbedRun, ...]
    reason: str | None


def bench_embed(
    bundle: Path,
    *,
    tokens: int | None = None,
    threads: Sequence[int] = (1,),
    source: str | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> EmbedReport:
    """Measures the embedding of one dialogue, one run for each of ``threads``. ``tokens``: None for
    ``TOKENS``, or as many as the program reads. Raises ``BundleError`` and ``ExportError`` for what
    cannot be run."""
    opened = open_bundle(bundle)
    manifest, files = opened.manifest, opened.android
    tokens = tokens or min(TOKENS, manifest.policy.embed_length)
    if tokens > manifest.policy.embed_length:
        raise BundleError(
            f"--tokens {tokens} is more than the {manifest.policy.embed_length} that this bundle's "
            f"embed program reads."
        )
    if min(threads) < 1:
        raise BundleError(f"--threads {min(threads)} runs nothing: give at least 1.")
    progress("read the source")
    original = find_source(manifest, source)
    model = None if isinstance(original, str) else original.checkpoint.hf_model()
    ids = text_ids(opened, tokens)

    def measure(engine: _BundleEmbed | _TorchEmbed) -> float:
        begin = time.perf_counter()
        engine.embed(ids)
        return time.perf_counter() - begin

    runs, names = [], {}
    for count in dict.fromkeys(threads):
        torch.set_num_threads(count)
        with silenced():
            name = f"attune {files.quantize}"
            engines: dict[str, _BundleEmbed | _TorchEmbed] = {
                BUNDLE: _BundleEmbed(name, files.lm, files.adapter, count)
            }
        if model is not None:
            engines[TORCH] = _TorchEmbed(model)
        names = {key: engine.name for key, engine in engines.items()}

        def shown(name: str, count: int = count) -> None:
            progress(f"{count} threads: {name}")

        runs.append(EmbedRun(count, interleave(engines, measure, rounds, tokens, shown)))
    reason = original if isinstance(original, str) else None
    return EmbedReport(str(bundle), files.quantize, tokens, names, tuple(runs), reason)


def as_json(report: EmbedReport) -> dict:
    """For ``--json``: speeds in tokens a second, ratios as plain numbers."""
    return {
        "bundle": report.bundle,
        "quantize": report.quantize,
        "tokens": report.tokens,
        "machine": machine.describe(),
        "reason": report.reason,
        "runs": [
            {
                "threads": run.threads,
                "tokens_per_second": run.timings[BUNDLE].median,
                "ratio_to_torch": run.ratio_to_torch,
                "engines": {
                    report.names[key]: timing.as_json() for key, timing in run.timings.items()
                },
            }
            for run in report.runs
        ],
    }
