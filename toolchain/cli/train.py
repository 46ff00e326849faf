"""``attune train``: fine-tune a bundle's adapter on dialogues with the phone's own programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.progress import Progress

from runtime_py.engine.trainer import Settings, StepReport
from toolchain.cli.options import AndroidBundle, Dialogues, Json, KeepMb, Threads
from toolchain.defaults import HELD_OUT, KEEP_MB, MEMORY, SETTINGS, MemoryMode
from toolchain.report.console import console, counted_progress, output, print_json

if TYPE_CHECKING:
    from toolchain.adapter_training import TrainedAdapter


def train(
    bundle: AndroidBundle,
    data: Dialogues,
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
    ] = HELD_OUT,
    epochs: Annotated[int, typer.Option(min=1)] = SETTINGS.epochs,
    batch: Annotated[int, typer.Option(help="Dialogues a step.", min=1)] = SETTINGS.batch,
    learning_rate: Annotated[float, typer.Option()] = SETTINGS.learning_rate,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = SETTINGS.schedule,
    warmup: Annotated[
        int, typer.Option(help="Steps over which the rate rises.", min=0)
    ] = SETTINGS.warmup,
    weight_decay: Annotated[float, typer.Option(min=0)] = SETTINGS.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest global norm of a gradient.")] = SETTINGS.clip,
    seed: Annotated[
        int, typer.Option(help="Of the order of the dialogues.", min=0)
    ] = SETTINGS.seed,
    memory: Annotated[
        str,
        typer.Option(help="low computes the forward anew; high keeps of it what --keep-mb says."),
    ] = MEMORY,
    keep_mb: KeepMb = KEEP_MB,
    save_every: Annotated[int, typer.Option(help="Steps.", min=1)] = SETTINGS.save_every,
    refuse_long: Annotated[
        bool, typer.Option(help="Refuse dialogues that are too long instead of cutting them.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train the adapter on this machine as a phone would: streamed, resumable, exact.

    Writes OUT/adapter (PEFT), OUT/adapter.ptd (for the bundle's lm.pte) and OUT/curve.svg.

    Example: [bold]attune train out/tiny --data mine.jsonl --out out/mine[/]
    """
    from toolchain.adapter_training import train_adapter

    with counted_progress(as_json) as bar:
        trained = train_adapter(
            bundle,
            data,
            out,
            adapter=adapter,
            settings=Settings(
                epochs=epochs,
                batch=batch,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                clip=clip,
                schedule=cast(Literal["constant", "linear", "cosine"], schedule),
                warmup=warmup,
                seed=seed,
                save_every=save_every,
            ),
            held_out=held_out,
            memory=cast(MemoryMode, memory),
            keep_mb=keep_mb,
            refuse_long=refuse_long,
            threads=threads,
            on_step=_StepBar(bar, as_json),
            notify=lambda text: None if as_json else bar.console.print(text),
        )
    if as_json:
        print_json(trained.as_json())
    else:
        _summary(trained, bundle, out)


class _StepBar:
    """Shows each step: in the bar, or as a line where there is no terminal."""

    def __init__(self, bar: Progress, quiet: bool) -> None:
        self._bar, self._lines = bar, not quiet and not console.is_terminal
        self._task = bar.add_task("train", total=1)

    def __call__(self, step: StepReport, tokens_per_second: float) -> None:
        speed = f"{tokens_per_second:.0f} tokens/s"
        description = f"loss {step.loss:.3f}  {speed}"
        self._bar.update(self._task, total=step.of, completed=step.number, description=description)
        if self._lines:
            console.print(f"step {step.number}/{step.of}  loss {step.loss:.4f}  {speed}")


def _summary(trained: TrainedAdapter, bundle: Path, out: Path) -> None:
    before, after = trained.held_out
    losses = trained.losses
    output.print(
        f"training loss {losses[0]:.4f} → {losses[-1]:.4f} nats a token in {len(losses)} steps"
    )
    if before is not None and after is not None:
        output.print(f"held-out loss {before:.4f} → {after:.4f}")
    output.print(f"{trained.tokens_per_second:.0f} tokens/s, {trained.seconds:.0f} s")
    output.print(f"next: [bold]attune chat {bundle} --adapter {out / 'adapter.ptd'}[/]")
