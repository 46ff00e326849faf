"""``attune bench``: tokens a second of a bundle beside PyTorch and llama.cpp, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.options import AndroidBundle, Dialogues, Json, KeepMb, Threads
from toolchain.defaults import KEEP_MB

if TYPE_CHECKING:  # PyTorch is loaded only once a command runs
    from toolchain.bench.generation_report import GenerationReport

app = typer.Typer(
    help="Measure a bundle's speed beside PyTorch and llama.cpp.", no_args_is_help=True
)

_Threads = Annotated[
    list[int] | None,
    typer.Option(help="Threads of every engine; may be given several times. Default: all cores."),
]
_SourceOption = Annotated[
    str | None,
    typer.Option(help="The model it was made from (folder, .gguf, hub id): for PyTorch's row."),
]
_Llama = Annotated[
    Path | None,
    typer.Option(help="A GGUF for llama.cpp, rounded to the bundle's bits. Default: the source."),
]
_Rounds = Annotated[int, typer.Option(help="Interleaved rounds; the median counts.", min=1)]


@app.command()
def decode(
    bundle: AndroidBundle,
    threads: _Threads = None,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens before them.", min=1)] = 32,
    source: _SourceOption = None,
    llama: _Llama = None,
    rounds: _Rounds = 5,
    adapter_cost: Annotated[
        bool, typer.Option("--adapter-cost", help="Export the model without LoRA, and compare.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where a token's time goes, by operator.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure decoding: one token a call, as a reply is written.

    Example: [bold]attune bench decode out/tiny --threads 1 --threads 2[/]
    """
    from toolchain.bench.generation_speed import bench_generation

    report = bench_generation(
        bundle,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        threads=tuple(threads or ()),
        source=source,
        llama=llama,
        rounds=rounds,
        adapter_cost=adapter_cost,
        profile=profile,
        quiet=as_json,
    )
    _print_generation(report, as_json)


@app.command()
def prefill(
    bundle: AndroidBundle,
    threads: _Threads = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=2)] = 256,
    source: _SourceOption = None,
    llama: _Llama = None,
    rounds: _Rounds = 5,
    adapter_cost: Annotated[
        bool, typer.Option("--adapter-cost", help="Export the model without LoRA, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure reading a prompt.

    Example: [bold]attune bench prefill out/tiny --prompt-tokens 256[/]
    """
    from toolchain.bench.generation_speed import bench_generation

    report = bench_generation(
        bundle,
        prompt_tokens=prompt_tokens,
        tokens=0,
        threads=tuple(threads or ()),
        source=source,
        llama=llama,
        rounds=rounds,
        adapter_cost=adapter_cost,
        quiet=as_json,
    )
    _print_generation(report, as_json)


def _print_generation(report: GenerationReport, as_json: bool) -> None:
    from toolchain.bench import generation_report
    from toolchain.report.console import print_json

    if as_json:
        print_json(generation_report.as_json(report))
    else:
        generation_report.show(report)


@app.command()
def embed(
    bundle: AndroidBundle,
    threads: _Threads = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the dialogue. Default: 256, or all that it reads.", min=2),
    ] = None,
    source: _SourceOption = None,
    rounds: _Rounds = 5,
    as_json: Json = False,
) -> None:
    """Measure the embedding of a dialogue, which selection waits for.

    Example: [bold]attune bench embed out/tiny --tokens 256[/]
    """
    from rich.table import Table

    from toolchain.bench import embed_speed
    from toolchain.bench.machine import usable_cores
    from toolchain.report.console import Stages, output, print_json

    with Stages(f"bench {bundle.resolve().name}", quiet=as_json) as stages:
        report = embed_speed.bench_embed(
            bundle,
            tokens=tokens,
            threads=tuple(threads or (usable_cores(),)),
            source=source,
            rounds=rounds,
            progress=stages,
        )
    if as_json:
        print_json(embed_speed.as_json(report))
        return
    table = Table("threads", "engine", "tokens/s", "bundle is", box=None, pad_edge=False)
    for run in report.runs:
        for key, timing in run.timings.items():
            times = "" if key == "bundle" else f"{run.ratio_to_torch:.2f} × as fast"
            table.add_row(str(run.threads), report.names[key], f"{timing.median:,.0f}", times)
    output.print(table)
    if report.reason:
        output.print(f"PyTorch: {report.reason}")


@app.command()
def train(
    bundle: AndroidBundle,
    threads: _Threads = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence.", min=32)] = 256,
    source: _SourceOption = None,
    data: Annotated[
        Path | None, typer.Option(help="Dialogues to take the sequence from. Default: attune's.")
    ] = None,
    rounds: _Rounds = 5,
    keep_mb: KeepMb = KEEP_MB,
    memory: Annotated[bool, typer.Option(help="Measure memory, in children.")] = True,
    kernels: Annotated[bool, typer.Option(help="Measure ExecuTorch's own kernels.")] = True,
    as_json: Json = False,
) -> None:
    """Measure a training step in both memory modes, beside PyTorch with PEFT.

    Example: [bold]attune bench train out/tiny --threads 1 --threads 2[/]
    """
    from toolchain.bench import training_report
    from toolchain.bench.training_speed import bench_training
    from toolchain.report.console import Stages, print_json

    with Stages(f"bench {bundle.resolve().name}", quiet=True) as stages:
        report = bench_training(
            bundle,
            tokens=tokens,
            threads=tuple(threads or (1,)),
            rounds=rounds,
            keep_mb=keep_mb,
            source=source,
            data=data,
            memory=memory,
            kernels=kernels,
            progress=stages,
        )
    if as_json:
        print_json(training_report.as_json(report))
    else:
        training_report.show(report)


@app.command()
def growth(as_json: Json = False) -> None:
    """Measure how training's memory grows with layers and tokens, on small random models.

    Example: [bold]attune bench growth[/]
    """
    from dataclasses import asdict

    from rich.table import Table

    from toolchain.bench.memory_growth import bench_growth
    from toolchain.report.console import Stages, megabytes, output, print_json

    with Stages("bench growth", quiet=as_json) as stages:
        rows = bench_growth(stages)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    headings = ("layers", "tokens", "peak", "kept inputs", "adapter and moments", "mapped file")
    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        sizes = (row.peak, row.inputs, row.adapter, row.file)
        table.add_row(str(row.layers), str(row.tokens), *map(megabytes, sizes))
    output.print(table)


@app.command()
def selection(
    bins: Annotated[
        list[int] | None, typer.Option(help="Bins of the buffer, all full. Default: 128 and 10000.")
    ] = None,
    hidden: Annotated[int, typer.Option(help="Numbers of a pooled vector.", min=1)] = 576,
    policy: Annotated[str, typer.Option(help="The selection policy.")] = "paper",
    as_json: Json = False,
) -> None:
    """Measure what selection takes beyond the embedding, with the store's transaction.

    Example: [bold]attune bench selection --bins 128[/]
    """
    from dataclasses import asdict

    from rich.table import Table

    from toolchain.bench.selection_cost import bench_selection
    from toolchain.report.console import Stages, output, print_json

    with Stages("bench selection", quiet=as_json) as stages:
        rows = bench_selection(
            tuple(bins or (128, 10_000)), hidden=hidden, selection=policy, progress=stages
        )
    if as_json:
        print_json({"policy": policy, "hidden": hidden, "rows": [asdict(row) for row in rows]})
        return
    table = Table("bins", "median", "slowest", "kept", box=None, pad_edge=False)
    for row in rows:
        times = f"{row.median_ms:.2f} ms", f"{row.slowest_ms:.2f} ms"
        table.add_row(f"{row.bins:,}", *times, f"{row.kept} of {row.observed}")
    output.print(table)


@app.command()
def synthesis(
    bundle: AndroidBundle,
    data: Dialogues,
    dialogues: Annotated[int, typer.Option(help="The first so many of them.", min=1)] = 20,
    form: Annotated[
        list[str] | None,
        typer.Option(help="A known form, or all; may be given several times. Default: its own."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A .ptd file in place of the bundle's adapter.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how many usable pairs of paraphrases the model writes, one attempt a dialogue.

    Example: [bold]attune bench synthesis out/tiny --data dialogues.jsonl --form all[/]
    """
    from rich.table import Table

    from runtime_py.bundle.bundle import open_bundle
    from runtime_py.loop.stream import read_dialogues
    from toolchain.bench.synthesis_yield import bench_synthesis
    from toolchain.report.console import Stages, output, print_json

    opened, chosen = open_bundle(bundle), read_dialogues(data, dialogues)
    with Stages(f"bench {bundle.resolve().name}", quiet=as_json) as stages:
        rows = bench_synthesis(
            opened, chosen, form or (), adapter=adapter, threads=threads, progress=stages
        )
    if as_json:
        print_json({"data": str(data), "rows": [row.as_json() for row in rows]})
        return
    table = Table("form", "usable pairs", "yield", "tokens written", box=None, pad_edge=False)
    for row in rows:
        pairs, tokens = f"{row.usable} of {row.dialogues}", f"{row.decoded:,}"
        table.add_row(row.form, pairs, f"{row.share:.0%}", tokens)
    output.print(table)


@app.command()
def estimators(
    bundle: AndroidBundle,
    data: Dialogues,
    tests: Annotated[Path, typer.Option(help="Unseen dialogues that gains are measured on.")],
    dialogues: Annotated[int, typer.Option(help="The first so many of --data.", min=1)] = 200,
    unseen: Annotated[int, typer.Option(help="The first so many of --tests.", min=1)] = 60,
    steps: Annotated[int, typer.Option(help="Of learning one dialogue.", min=1)] = 4,
    as_json: Json = False,
) -> None:
    """Compare estimators of a dialogue's worth with what learning that dialogue alone gives.

    Example: [bold]attune bench estimators out/tiny --data dolly.jsonl --tests unseen.jsonl[/]
    """
    import torch

    from runtime_py.bundle.bundle import open_bundle
    from runtime_py.loop.stream import read_dialogues
    from toolchain.report.console import counted_progress, output, print_json
    from toolchain.report.tables import plain_table
    from toolchain.study.batched_model import BatchedModel
    from toolchain.study.estimator_evidence import bench_estimators

    learned, judged = read_dialogues(data, dialogues), read_dialogues(tests, unseen)
    model = BatchedModel(open_bundle(bundle), torch.device("cpu"))
    with counted_progress(as_json) as bar:
        task = bar.add_task("learning each alone", total=len(learned))
        found = bench_estimators(
            model, learned, judged, steps, lambda done: bar.update(task, completed=done)
        )
    if as_json:
        print_json({"data": str(data), "tests": str(tests), **found.as_json()})
        return
    table = plain_table(("estimator", "ρ with length", "ρ with gain"), texts=["estimator"])
    for row in found.rows:
        table.add_row(row.name, f"{row.with_length:+.2f}", f"{row.with_gain:+.2f}")
    output.print(table)
    output.print(
        f"{found.dialogues:,} dialogues, each learned alone in {found.steps} steps: on "
        f"{found.tests:,} unseen ones {found.helped:.0%} of them help, by {found.gain:+.4f} nats a "
        f"label in the mean; |ρ| below {found.chance:.2f} is chance"
    )
