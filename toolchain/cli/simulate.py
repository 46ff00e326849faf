"""``attune simulate``: the whole loop on a simulated phone, with the bundle's own programs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from toolchain.report.console import console, counted_progress, output, print_json

if TYPE_CHECKING:
    from toolchain.simulate.simulation import Prepared


def simulate(
    bundle: Annotated[Path, typer.Argument(help="A bundle with an Android part.")],
    stream: Annotated[
        Path, typer.Option(help="Dialogues: .jsonl or .jsonl.gz with id and turns in each row.")
    ],
    device: Annotated[str, typer.Option(help="A profile's name or a .toml file.")] = "pixel-8",
    out: Annotated[
        Path | None,
        typer.Option(help="Keep store, adapters, report.html and report.json in this new folder."),
    ] = None,
    lexicons: Annotated[
        Path | None, typer.Option(help="Folder of <domain>.txt files. Default: the bundle's.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="JSON with fields that replace the bundle's policy.")
    ] = None,
    answer_rate: Annotated[
        float, typer.Option(help="Part of the questions that the user answers.", min=0, max=1)
    ] = 1.0,
    dialogues_a_day: Annotated[
        int | None, typer.Option(help="Default: the device profile's.", min=1)
    ] = None,
    model_replies: Annotated[
        bool,
        typer.Option(
            "--model-replies",
            help="The assistant's last turn is the model's own; the stream's is what the user "
            "answers. Slower: every dialogue is generated.",
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(help="Only the stream's first dialogues.", min=1)
    ] = None,
    probes: Annotated[
        int, typer.Option(help="Dialogues that the model answers too, for ROUGE-1.", min=0)
    ] = 40,
    faults: Annotated[int, typer.Option(help="SIGKILLs at random moments.", min=0)] = 0,
    full_disk: Annotated[
        bool, typer.Option("--full-disk", help="Others fill the disk once, for a while.")
    ] = False,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="The memory is taken once amid fine-tuning.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the user and the faults.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Live through a stream of dialogues as a phone would: select, ask, synthesize, fine-tune.

    Memory, cores and storage are enforced; time and energy are modelled.

    Example: [bold]attune simulate out/tiny --stream mine.jsonl --device pixel-8 --out out/sim[/]
    """
    from toolchain.simulate.life_page import write_page
    from toolchain.simulate.life_table import print_table
    from toolchain.simulate.simulation import Request, prepare
    from toolchain.simulate.simulation import simulate as run

    with tempfile.TemporaryDirectory(prefix="attune-simulate-") as scratch:
        folder = out or Path(scratch) / "run"
        request = Request(
            bundle=bundle,
            stream=stream,
            device=device,
            out=folder,
            lexicons=lexicons,
            policy=policy,
            answer_rate=answer_rate,
            dialogues_a_day=dialogues_a_day,
            model_replies=model_replies,
            limit=limit,
            probes=probes,
            faults=faults,
            full_disk=full_disk,
            low_memory=low_memory,
            seed=seed,
        )
        prepared = prepare(request)
        if not as_json:
            _announce(prepared)
        with counted_progress(as_json) as progress:
            task = progress.add_task("the phone starts", total=len(prepared.stream.blocks))

            def told(event: dict[str, Any]) -> None:
                name, place = event["event"], event.get("place")
                said = {
                    "dialogue": "by day",
                    "night": f"night {event.get('day', 0) + 1}",
                    "step": f"training, step {event.get('step')}",
                    "full": "the disk is full",
                    "limited": "the phone starts",
                }
                progress.update(task, description=said.get(name))
                if name == "dialogue":
                    progress.update(task, completed=place)

            outcome = run(prepared, told)
        found = json.loads(json.dumps(outcome.as_json()))
        if out is not None:
            write_page(out / "report.html", outcome)
            (out / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        print_table(output, outcome)
        if out is not None:
            output.print(f"next: open [bold]{out / 'report.html'}[/]")
    if outcome.watched.ended:
        console.print(
            f"[bold red]the run ended early:[/] {escape(outcome.watched.ended)}", soft_wrap=True
        )
        raise typer.Exit(1)


def _announce(prepared: Prepared) -> None:
    found, device = prepared.estimate, prepared.device
    bad = prepared.stream.bad
    console.print(
        f"{prepared.bundle.manifest.model.name} on {device.name}: about "
        f"{found.within(device.memory.app_mb):,.0f} MB of "
        f"{device.memory.app_mb:,.0f} at the peak, {found.storage:,.0f} MB of "
        f"{device.storage.app_mb:,.0f} stored"
    )
    if bad:
        console.print(
            f"{len(bad)} lines of the stream are left out; the first: {escape(bad[0])}",
            soft_wrap=True,
        )
