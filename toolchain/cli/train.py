"""``attune train``: fine-tune a bundle's adapter on dialogues with the phone's own programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from toolchain.report.console import console, counted_progress, output, print_json


def train(
    bundle: Annotated[Path, typer.Argument(help="A bundle with an Android part.")],
    data: Annotated[
        Path, typer.Option(help="Dialogues: .jsonl or .jsonl.gz with id and turns in each row.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run; a run that was cut off goes on from it.")
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(help="Start from this PEFT folder or .ptd. Default: the bundle's."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(help="Part of the dialogues whose loss is only watched.", min=0, max=0.9),
    ] = 0.1,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch: Annotated[int, typer.Option(help="Dialogues a step.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option()] = 3e-4,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps over which the rate rises.", min=0)] = 0,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest global norm of a gradient.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the order of the dialogues.", min=0)] = 0,
    memory: Annotated[
        str,
        typer.Option(help="low computes the forward anew; high keeps of it what --keep-mb says."),
    ] = "low",
    keep_mb: Annotated[float, typer.Option(help="Budget of --memory high in MB.", min=0)] = 160.0,
    save_every: Annotated[int, typer.Option(help="Steps.", min=1)] = 10,
    refuse_long: Annotated[
        bool, typer.Option(help="Refuse dialogues that are too long instead of cutting them.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train the adapter on this machine as a phone would: streamed, resumable, exact.

    Writes OUT/adapter (PEFT), OUT/adapter.ptd (for the bundle's lm.pte) and OUT/curve.svg.

    Example: [bold]attune train out/tiny --data mine.jsonl --out out/mine[/]
    """
    from runtime_py.engine.trainer import StepReport
    from toolchain.fine_tune import Request, fine_tune

    request = Request(
        bundle=bundle,
        data=data,
        out=out,
        adapter=adapter,
        held_out=held_out,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        memory=memory,
        keep_mb=keep_mb,
        save_every=save_every,
        refuse_long=refuse_long,
        threads=threads,
    )
    with counted_progress(as_json) as progress:
        task = progress.add_task("train", total=1)

        def told(step: StepReport, rate: float) -> None:
            progress.update(
                task,
                total=step.of,
                completed=step.number,
                description=f"loss {step.loss:.3f}  {rate:.0f} tokens/s",
            )
            if not as_json and not console.is_terminal:
                console.print(
                    f"step {step.number}/{step.of}  loss {step.loss:.4f}  {rate:.0f} tokens/s"
                )

        def said(text: str) -> None:
            if not as_json:
                progress.console.print(text)

        result = fine_tune(request, told, said)
    if as_json:
        print_json(json.loads(json.dumps(result.as_json())))
        return
    before, after = result.held_out
    losses = result.losses
    output.print(
        f"training loss {losses[0]:.4f} → {losses[-1]:.4f} nats a token in {len(losses)} steps"
    )
    if before is not None and after is not None:
        output.print(f"held-out loss {before:.4f} → {after:.4f}")
    output.print(f"{result.tokens_per_second:.0f} tokens/s, {result.seconds:.0f} s")
    output.print(f"next: [bold]attune chat {bundle} --adapter {out / 'adapter.ptd'}[/]")
