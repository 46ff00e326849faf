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
from toolchain.bench import machine, rounds
from toolchain.bench.generation_report import BUNDLE, TORCH
from toolchain.bench.generation_speed import text_ids
from toolchain.verify.source import find_source

TOKENS = 256


class _Bundle:
    def __init__(self, name: str, program: Path, adapter: Path | None, threads: int) -> None:
        self.name = name
        self._lm = ExecutorchLm(program, adapter, threads)

    def embed(self, tokens: Sequence[int]) -> None:
        self._lm.embed(torch.tensor([list(tokens)]))


class _Torch:
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
class Run:
    """Timings by engine, with so many threads."""

    threads: int
    timings: dict[str, rounds.Timing]

    @property
    def ratio_to_torch(self) -> float | None:
        if TORCH not in self.timings:
            return None
        return rounds.ratio(self.timings[BUNDLE], self.timings[TORCH])


@dataclass(frozen=True)
class Report:
    """``reason``: why PyTorch's row is absent."""

    bundle: str
    quantize: str
    tokens: int
    names: dict[str, str]
    runs: tuple[Run, ...]
    reason: str | None


def bench(
    bundle: Path,
    tokens: int | None,
    threads: Sequence[int],
    source: str | None,
    count: int,
    told: Callable[[str], None],
) -> Report:
    """``tokens``: None for ``TOKENS``, or as many as the program reads. Raises ``BundleError`` and
    ``ExportError`` for what cannot be run."""
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
    told("read the source")
    found = find_source(manifest, source)
    model = None if isinstance(found, str) else found.checkpoint.hf_model()
    ids = text_ids(opened, tokens)
    runs, names = [], {}
    for own in dict.fromkeys(threads):
        torch.set_num_threads(own)
        with silenced():
            name = f"attune {files.quantize}"
            engines: dict[str, _Bundle | _Torch] = {
                BUNDLE: _Bundle(name, files.lm, files.adapter, own)
            }
        if model is not None:
            engines[TORCH] = _Torch(model)
        names = {key: engine.name for key, engine in engines.items()}

        def measure(engine: _Bundle | _Torch) -> float:
            begin = time.perf_counter()
            engine.embed(ids)
            return time.perf_counter() - begin

        def telling(name: str, own: int = own) -> None:
            told(f"{own} threads: {name}")

        timings = rounds.interleave(engines, measure, count, tokens, telling)
        runs.append(Run(own, timings))
    reason = found if isinstance(found, str) else None
    return Report(str(bundle), files.quantize, tokens, names, tuple(runs), reason)


def as_json(report: Report) -> dict:
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
