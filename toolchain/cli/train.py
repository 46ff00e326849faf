"""``attune train``: fine-tune a bundle's adapter on dialogues with the phone's own programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.progress import Progress

from runtime_py.engine.trainer import StepReport
from runtime_py.engine.training_plan import Settings
from toolchain.cli.options import AndroidBundle, Dialogues, Json, KeepMb, Threads
from toolchain.defaults import HELD_OUT, KEEP_MB, MEMORY, SETTINGS, STOPPING_FROM, MemoryMode
from toolchain.report.console import bold, console, counted_progress, line, output, print_json

if TYPE_CHECKING:
    from toolchain.adapter_training import TrainedAdapter


NEVER = sys.maxsize  # held-out dialogues

_Out = Annotated[
    Path, typer.Option(help="Folder of the run; a run that was cut off goes on from it.")
]
_Adapter = Annotated[
    Path | None,
    typer.Option(help="Start from this PEFT folder or .ptd. Default: the bundle's."),
]
_HeldOut = Annotated[
    float,
    typer.Option(help="Part of the dialogues that are not learned.", min=0, max=0.9),
]
_Stop = Annotated[
    bool,
    typer.Option(
        help=f"With {STOPPING_FROM} held-out dialogues or more, half of them choose the step "
        "whose state is kept, and the other half is reported."
    ),
]
_CheckEvery = Annotated[
    int,
    typer.Option(
        help="Steps between two looks at held-out dialogues, more where these are many.", min=1
    ),
]
_Steps = Annotated[int | None, typer.Option(help="In place of --epochs.", min=1)]
_Epochs = Annotated[
    int | None,
    typer.Option(
        help=f"Default: {SETTINGS.epochs}, and at least {SETTINGS.fewest_steps} steps.", min=1
    ),
]
_Batch = Annotated[int, typer.Option(help="Dialogues a step.", min=1)]
_LearningRate = Annotated[float, typer.Option(help="Of A.")]
_BRateRatio = Annotated[float, typer.Option(help="B's learning rate is so many times A's (LoRA+).")]
_Schedule = Annotated[str, typer.Option(help="constant, linear or cosine.")]
_Warmup = Annotated[int, typer.Option(help="Steps over which the rate rises.", min=0)]
_WeightDecay = Annotated[float, typer.Option(min=0)]
_Clip = Annotated[float, typer.Option(help="Largest global norm of a gradient.")]
_Seed = Annotated[int, typer.Option(help="Of the order of the dialogues.", min=0)]
_Memory = Annotated[
    str,
    typer.Option(help="low computes the forward anew; high keeps of it what --keep-mb says."),
]
_SaveEvery = Annotated[int, typer.Option(help="Steps.", min=1)]
_RefuseLong = Annotated[
    bool, typer.Option(help="Refuse dialogues that are too long instead of cutting them.")
]


def train(
    bundle: AndroidBundle,
    data: Dialogues,
    out: _Out,
    adapter: _Adapter = None,
    held_out: _HeldOut = HELD_OUT,
    stop: _Stop = True,
    check_every: _CheckEvery = SETTINGS.check_every,
    steps: _Steps = None,
    epochs: _Epochs = None,
    batch: _Batch = SETTINGS.batch,
    learning_rate: _LearningRate = SETTINGS.learning_rate,
    b_rate_ratio: _BRateRatio = SETTINGS.b_rate_ratio,
    schedule: _Schedule = SETTINGS.schedule,
    warmup: _Warmup = SETTINGS.warmup,
    weight_decay: _WeightDecay = SETTINGS.weight_decay,
    clip: _Clip = SETTINGS.clip,
    seed: _Seed = SETTINGS.seed,
    memory: _Memory = MEMORY,
    keep_mb: KeepMb = KEEP_MB,
    save_every: _SaveEvery = SETTINGS.save_every,
    refuse_long: _RefuseLong = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train the adapter on this machine as a phone would: streamed, resumable, exact.

    All that the assistant says in a dialogue is learned. (The loop learns the last reply alone.)

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
                steps=steps,
                epochs=epochs or SETTINGS.epochs,
                fewest_steps=1 if epochs else SETTINGS.fewest_steps,
                batch=batch,
                learning_rate=learning_rate,
                b_rate_ratio=b_rate_ratio,
                weight_decay=weight_decay,
                clip=clip,
                schedule=cast(Literal["constant", "linear", "cosine"], schedule),
                warmup=warmup,
                seed=seed,
                check_every=check_every,
                save_every=save_every,
            ),
            held_out=held_out,
            stopping_from=STOPPING_FROM if stop else NEVER,
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
    if trained.stopping:
        output.print(
            f"kept step {trained.kept_step}, which {trained.stopping} held-out dialogues chose: "
            f"their loss {trained.stopping_curve[0][1]:.4f} → "
            f"{min(loss for _, loss in trained.stopping_curve):.4f}"
        )
    if before is not None and after is not None:
        output.print(
            f"held-out loss {before:.4f} → {after:.4f}, of {trained.judged} other dialogues"
        )
    output.print(f"{trained.tokens_per_second:.0f} tokens/s, {trained.seconds:.0f} s")
    output.print(line("next: ", bold(f"attune chat {bundle} --adapter {out / 'adapter.ptd'}")))
