"""The result of ``attune bench train`` as a JSON object and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.examples import Example
from toolchain.bench import machine
from toolchain.bench.peak_memory import PeakMemory
from toolchain.bench.rounds import Timing, ratio
from toolchain.report.console import bold, dim, line, megabytes, output
from toolchain.report.tables import plain_table

LOW, HIGH, TORCH, CHECKPOINTING = "low", "high", "torch", "torch_checkpointing"
KERNELS_ONE, KERNELS_FOUR = "executorch_kernels_1", "executorch_kernels_4"
_MB = 1e6
NAMES = {
    LOW: "attune, low",
    HIGH: "attune, high",
    TORCH: "torch + peft, eager",
    CHECKPOINTING: "torch + peft, checkpointing",
}


@dataclass(frozen=True)
class TrainingRun:
    """One number of threads. ``timings`` by contestant; ``peak`` in FLOP/s, of the better of torch
    and XNNPACK; ``flops`` of a step of low and of high; ``losses`` before the first update;
    ``neighbours``: cores that others took."""

    threads: int
    timings: Mapping[str, Timing]
    peak: float
    flops: Mapping[str, float]
    losses: Mapping[str, float]
    neighbours: float | None


@dataclass(frozen=True)
class TrainingReport:
    """``memory`` by contestant; ``programs_bytes`` of the file of programs; ``lowering_seconds`` of
    CPU time; ``reasons``: for each contestant that is absent, why."""

    bundle: Bundle
    rounds: int
    sequence: Example
    runs: tuple[TrainingRun, ...]
    memory: Mapping[str, PeakMemory]
    programs_bytes: int
    lowering_seconds: float | None
    reasons: Mapping[str, str]


def kernel_seconds(report: TrainingReport, run: TrainingRun) -> float | None:
    """A whole step in ExecuTorch's kernels, extrapolated from one layer and four:
    t₁ + (layers − 1)(t₄ − t₁) / 3."""
    if KERNELS_ONE not in run.timings:
        return None
    one, four = (min(run.timings[key].seconds) for key in (KERNELS_ONE, KERNELS_FOUR))
    layers = len(report.bundle.training.layers)
    # A model of fewer than four layers was measured whole.
    return four if layers <= 4 else one + (layers - 1) * (four - one) / 3


def _mode(report: TrainingReport, run: TrainingRun, key: str) -> dict:
    timing = run.timings[key]
    kernels = kernel_seconds(report, run)
    best = min(timing.seconds)

    def to(other: str) -> float | None:
        return ratio(timing, run.timings[other]) if other in run.timings else None

    def memory(which: str) -> float | None:
        return report.memory[which].peak / _MB if which in report.memory else None

    return {
        **timing.as_json(),
        "ratio_to_torch": to(TORCH),
        "ratio_to_torch_checkpointing": to(CHECKPOINTING),
        "ratio_to_executorch_kernels": kernels / best if kernels else None,
        "fraction_of_peak": run.flops[key] / best / run.peak,
        "flops": run.flops[key],
        "loss": run.losses[key],
        "peak_memory_mb": memory(key),
        "torch_peak_memory_mb": memory(TORCH),
        "torch_checkpointing_peak_memory_mb": memory(CHECKPOINTING),
        "programs_bytes": report.programs_bytes,
        "lowering_seconds": report.lowering_seconds,
    }


def as_json(report: TrainingReport) -> dict:
    """``low`` and ``high`` are those of the first number of threads; ``runs`` has all."""
    runs = [
        {
            "threads": run.threads,
            LOW: _mode(report, run, LOW),
            HIGH: _mode(report, run, HIGH),
            "peak_gflops": run.peak / 1e9,
            "other_processes_cores": run.neighbours,
            "timings": {key: timing.as_json() for key, timing in run.timings.items()},
        }
        for run in report.runs
    ]
    return {
        "bundle": str(report.bundle.path),
        "tokens": len(report.sequence.tokens),
        "labels": report.sequence.count,
        "dialogue": report.sequence.id,
        "precision": report.bundle.training.precision,
        "rounds": report.rounds,
        "machine": machine.describe(),
        LOW: runs[0][LOW],
        HIGH: runs[0][HIGH],
        "runs": runs,
        "reasons": dict(report.reasons),
    }


def show(report: TrainingReport) -> None:
    """Prints a table for each number of threads: tokens a second, the share of the processor's
    peak in FLOPs a second, peak memory in megabytes."""
    output.print(
        line(
            bold(report.bundle.path),
            f"  a step of {len(report.sequence.tokens)} tokens, {report.sequence.count} of them "
            f"labels, base weights {report.bundle.training.precision}; {report.rounds} "
            f"interleaved rounds",
        )
    )
    for run in report.runs:
        threads = f"{run.threads} threads"
        heads = (threads, "tokens/s", "× torch", "of peak", "peak memory")
        table = plain_table(heads, texts=[threads])
        for key, name in NAMES.items():
            if key not in run.timings:
                continue
            ours = key in (LOW, HIGH)
            speed = ratio(run.timings[key], run.timings[TORCH]) if TORCH in run.timings else None
            share = run.flops[key] / min(run.timings[key].seconds) / run.peak if ours else None
            memory = report.memory.get(key)
            table.add_row(
                name,
                f"{run.timings[key].median:.0f}",
                "" if speed is None else f"{speed:.2f}",
                "" if share is None else f"{share:.0%}",
                "" if memory is None else f"+{megabytes(memory.peak)}",
            )
        if (seconds := kernel_seconds(report, run)) is not None:
            table.add_row(
                "ExecuTorch's kernels (1 and 4 layers, extrapolated)",
                f"{len(report.sequence.tokens) / seconds:.0f}",
            )
        output.print(table)
        busy = run.neighbours
        output.print(
            dim(
                f"product peak {run.peak / 1e9:.0f} GFLOP/s"
                + ("" if busy is None else f"; other processes took {busy:.1f} cores")
            )
        )
    cpu = report.lowering_seconds
    output.print(
        f"training programs {megabytes(report.programs_bytes)}"
        + ("" if cpu is None else f", lowered in {cpu:.0f} s of CPU time")
    )
    for reason in report.reasons.values():
        output.print(dim(f"not measured: {reason}"))
