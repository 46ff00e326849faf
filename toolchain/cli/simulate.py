"""``attune simulate``: the whole loop on a simulated phone, with the bundle's own programs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime_py.loop.files import write_bytes
from runtime_py.loop.stream import in_one
from toolchain.cli.options import AndroidBundle, Dialogues, Json
from toolchain.report.console import (
    bold,
    console,
    counted_progress,
    line,
    output,
    print_json,
    styled,
)

if TYPE_CHECKING:
    from toolchain.simulate.events import PhoneEvent
    from toolchain.simulate.outcome import SimulationOutcome
    from toolchain.simulate.simulation import Simulation

_Device = Annotated[str, typer.Option(help="A profile's name or a .toml file.")]
_Out = Annotated[
    Path | None,
    typer.Option(help="Keep store, adapters, report.html and report.json in this new folder."),
]
_Lexicons = Annotated[
    Path | None, typer.Option(help="Folder of <domain>.txt files. Default: the bundle's.")
]
_Policy = Annotated[
    str | None,
    typer.Option(
        help="A preset (dac2024), or JSON with fields that replace the bundle's policy.",
        metavar="PRESET or FILE",
    ),
]
_AnswerRate = Annotated[
    float, typer.Option(help="Part of the questions that the user answers.", min=0, max=1)
]
_DialoguesADay = Annotated[int | None, typer.Option(help="Default: the device profile's.", min=1)]
_ModelReplies = Annotated[
    bool,
    typer.Option(
        "--model-replies",
        help="The assistant's last turn is the model's own; the stream's is what the user "
        "answers. Slower: every dialogue is generated.",
    ),
]
_Limit = Annotated[int | None, typer.Option(help="Only the stream's first dialogues.", min=1)]
_Probes = Annotated[
    int, typer.Option(help="Dialogues that the model answers too, for ROUGE-1.", min=0)
]
_Faults = Annotated[int, typer.Option(help="SIGKILLs at random moments.", min=0)]
_FullDisk = Annotated[
    bool, typer.Option("--full-disk", help="Others fill the disk once, for a while.")
]
_LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="The memory is taken once amid fine-tuning.")
]
_Tests = Annotated[
    Path | None,
    typer.Option(help="Dialogues outside the stream: what the last adapter gains on them is told."),
]
_Seed = Annotated[int, typer.Option(help="Of the user and the faults.", min=0)]


def simulate(
    bundle: AndroidBundle,
    stream: Dialogues,
    device: _Device = "pixel-8",
    out: _Out = None,
    tests: _Tests = None,
    lexicons: _Lexicons = None,
    policy: _Policy = None,
    answer_rate: _AnswerRate = 1.0,
    dialogues_a_day: _DialoguesADay = None,
    model_replies: _ModelReplies = False,
    limit: _Limit = None,
    probes: _Probes = 40,
    faults: _Faults = 0,
    full_disk: _FullDisk = False,
    low_memory: _LowMemory = False,
    seed: _Seed = 0,
    as_json: Json = False,
) -> None:
    """Live through a stream of dialogues as a phone would: select, ask, synthesize, fine-tune.

    Memory, cores and storage are enforced; time and energy are modelled.

    Example: [bold]attune simulate out/tiny --stream mine.jsonl --device pixel-8 --out out/sim[/]
    """
    from toolchain.simulate.simulation import prepare

    with tempfile.TemporaryDirectory(prefix="attune-simulate-") as scratch:
        simulation = prepare(
            bundle=bundle,
            stream=stream,
            device=device,
            out=out or Path(scratch) / "run",
            lexicons=lexicons,
            policy=policy,
            answer_rate=answer_rate,
            dialogues_a_day=dialogues_a_day,
            model_replies=model_replies,
            limit=limit,
            probes=probes,
            kills=faults,
            full_disk=full_disk,
            low_memory=low_memory,
            seed=seed,
            tests=tests,
        )
        _live(simulation, out, as_json)


def _live(simulation: Simulation, out: Path | None, as_json: bool) -> None:
    """Runs it, writes the reports to ``out``, and shows what came of it."""
    from toolchain.simulate.life_page import write_page
    from toolchain.simulate.life_table import print_table

    if not as_json:
        _announce(simulation)
    outcome = _with_progress(simulation, as_json)
    if out is not None:
        write_page(out / "report.html", outcome)
        write_bytes(out / "report.json", json.dumps(outcome.as_json(), indent=1).encode())
    if as_json:
        print_json(outcome.as_json())
    else:
        print_table(output, outcome)
        if out is not None:
            output.print(line("next: open ", bold(out / "report.html")))
    if ended := outcome.record.ended:
        console.print(line(styled("bold red", "the run ended early:"), f" {ended}"), soft_wrap=True)
        raise typer.Exit(1)


def _with_progress(simulation: Simulation, quiet: bool) -> SimulationOutcome:
    from toolchain.simulate.events import DialogueObserved
    from toolchain.simulate.simulation import simulate as run

    with counted_progress(quiet) as progress:
        task = progress.add_task("the phone starts", total=simulation.plan.places)

        def show(event: PhoneEvent) -> None:
            progress.update(task, description=_doing(event))
            if isinstance(event, DialogueObserved):
                progress.update(task, completed=event.place)

        def scored(done: int) -> None:
            total = len(simulation.tests.lessons) if simulation.tests else 0
            progress.update(task, description="unseen dialogues", completed=done, total=total)

        return run(simulation, show, scored)


def _doing(event: PhoneEvent) -> str | None:
    """What the phone does now; None: still the same."""
    from toolchain.simulate.events import (
        DialogueObserved,
        DiskFilled,
        LimitsSet,
        NightBegun,
        StepTrained,
    )

    match event:
        case LimitsSet():
            return "the phone starts"
        case DialogueObserved():
            return "by day"
        case NightBegun():
            return f"night {event.day + 1}"
        case StepTrained():
            return f"training, step {event.step}"
        case DiskFilled():
            return "the disk is full"
    return None


def _announce(simulation: Simulation) -> None:
    estimate, device = simulation.estimate, simulation.plan.device
    bad = simulation.stream.bad
    console.print(
        f"{simulation.bundle.manifest.model.name} on {device.name}: about "
        f"{estimate.within(device.memory.app_mb):,.0f} MB of "
        f"{device.memory.app_mb:,.0f} at the peak, {estimate.storage:,.0f} MB of "
        f"{device.storage.app_mb:,.0f} stored"
    )
    if bad:
        told = in_one(simulation.plan.stream, bad)
        console.print(f"left out of the stream: {told}", soft_wrap=True)
