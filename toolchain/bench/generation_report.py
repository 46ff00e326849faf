"""A benchmark's result as a JSON object and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from toolchain.bench import machine
from toolchain.bench.profile import ProfileRow
from toolchain.bench.rounds import Timing, ratio
from toolchain.report.console import bold, dim, line, megabytes, output, styled
from toolchain.report.tables import plain_table

BUNDLE, TORCH, LLAMA, WITHOUT = "bundle", "torch", "llama_cpp", "without_adapter"
ADAPTER_COST = "adapter_cost"
DISTURBING = 0.1  # cores of other processes
TOP_ROWS = 15  # of a profile


@dataclass(frozen=True)
class GenerationRun:
    """Everything measured with one number of threads.

    ``timings`` by engine; ``bandwidth`` in bytes a second; ``neighbours``: cores that other
    processes took meanwhile, where the system tells.
    """

    threads: int
    timings: Mapping[str, Timing]
    bandwidth: float
    neighbours: float | None
    profile: Sequence[ProfileRow] = ()

    def ratio_to(self, other: str) -> float | None:
        """How many times as fast the bundle is."""
        if other not in self.timings:
            return None
        return ratio(self.timings[BUNDLE], self.timings[other])

    @property
    def adapter_cost(self) -> float | None:
        """Fraction of time that the adapter adds to the program without one."""
        if WITHOUT not in self.timings:
            return None
        return ratio(self.timings[WITHOUT], self.timings[BUNDLE]) - 1.0


@dataclass(frozen=True)
class Setting:
    """What was measured. ``weight_bytes``: what decoding one token reads of the bundle's weights;
    ``reasons``: for each row that is absent, why."""

    what: str  # "decode" | "prefill"
    bundle: str
    quantize: str
    prompt_tokens: int
    tokens: int
    rounds: int
    weight_bytes: int
    names: Mapping[str, str]
    reasons: Mapping[str, str]

    def floor(self, run: GenerationRun) -> float:
        """Tokens a second at which decoding would read the weights at the memory's full speed."""
        return run.bandwidth / self.weight_bytes


@dataclass(frozen=True)
class GenerationReport:
    """``runs``: one for each number of threads."""

    setting: Setting
    runs: tuple[GenerationRun, ...]


def _run_json(setting: Setting, run: GenerationRun) -> dict:
    value: dict = {
        "threads": run.threads,
        "tokens_per_second": run.timings[BUNDLE].median,
        "ratio_to_torch": run.ratio_to(TORCH),
        "ratio_to_llama_cpp": run.ratio_to(LLAMA),
        ADAPTER_COST: run.adapter_cost,
        "engines": {
            key: {"name": setting.names[key]} | timing.as_json()
            for key, timing in run.timings.items()
        },
        "memory_bandwidth_bytes_per_second": run.bandwidth,
        "cores_of_other_processes": run.neighbours,
    }
    if setting.what == "decode":
        value["memory_floor_tokens_per_second"] = setting.floor(run)
        value["fraction_of_memory_floor"] = run.timings[BUNDLE].median / setting.floor(run)
    if run.profile:
        value["profile"] = [asdict(row) for row in run.profile]
    return value


def as_json(report: GenerationReport) -> dict:
    """The first run's figures at the top; every run under ``runs``."""
    setting = report.setting
    every = [_run_json(setting, run) for run in report.runs]
    return {
        "benchmark": setting.what,
        "bundle": setting.bundle,
        "quantize": setting.quantize,
        "prompt_tokens": setting.prompt_tokens,
        "tokens": setting.tokens,
        "rounds": setting.rounds,
        "weight_bytes_per_token": setting.weight_bytes,
        "reasons": dict(setting.reasons),
        "machine": machine.describe(),
        **every[0],
        "runs": every,
    }


def show(report: GenerationReport) -> None:
    """Tables on standard output."""
    setting = report.setting
    about = machine.describe()
    output.print(
        line(
            bold(setting.what),
            f" of {setting.bundle} ({setting.quantize}): {setting.tokens} tokens"
            f"{_after(setting)}, {setting.rounds} interleaved rounds\n"
            f"{about['processor']}, {about['cores']} cores, {about['system']}",
        )
    )
    heads = ("threads", "engine", "median tokens/s", "slowest … fastest", "bundle is")
    table = plain_table(heads, texts=["engine"])
    for run in report.runs:
        for key, timing in run.timings.items():
            times = run.ratio_to(key)
            table.add_row(
                str(run.threads) if key == BUNDLE else "",
                setting.names[key],
                f"{timing.median:,.1f}",
                f"{timing.tokens / max(timing.seconds):,.1f} … "
                f"{timing.tokens / min(timing.seconds):,.1f}",
                "" if key == BUNDLE or times is None else f"{times:.2f} × as fast",
            )
    output.print(table)
    for key, reason in setting.reasons.items():
        output.print(dim(f"no {key}: {reason}"))
    for run in report.runs:
        _show_limits(setting, run)


def _after(setting: Setting) -> str:
    return f" after a prompt of {setting.prompt_tokens}" if setting.what == "decode" else ""


def _show_limits(setting: Setting, run: GenerationRun) -> None:
    if run.adapter_cost is not None:
        output.print(f"{run.threads} threads: the adapter adds {run.adapter_cost:+.1%} of time")
    if setting.what == "decode":
        share = run.timings[BUNDLE].median / setting.floor(run)
        output.print(
            f"{run.threads} threads: memory floor {setting.floor(run):,.0f} tokens/s "
            f"({megabytes(setting.weight_bytes)} a token at {run.bandwidth / 1e9:.1f} GB/s); the "
            f"bundle reaches {share:.0%} of it"
        )
    if run.neighbours is not None and run.neighbours > DISTURBING:
        output.print(
            styled(
                "yellow",
                f"{run.threads} threads: other processes took {run.neighbours:.1f} cores "
                f"meanwhile; trust the ratios more than the figures",
            )
        )
    if run.profile:
        _show_profile(run)


def _show_profile(run: GenerationRun) -> None:
    total = sum(row.milliseconds for row in run.profile)
    output.print(f"\nprofile of one token, {run.threads} threads: {total:.2f} ms with tracing on")
    heads = ("operator", "in", "calls", "ms", "share")
    table = plain_table(heads, texts=heads[:2])
    for row in run.profile[:TOP_ROWS]:
        table.add_row(
            row.operator, row.where, str(row.calls), f"{row.milliseconds:.3f}", f"{row.share:.1%}"
        )
    output.print(table)
