"""``attune fleet``: many simulated users, each with a life of the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime_py.loop.files import write_bytes
from toolchain.cli.options import (
    AndroidBundle,
    Computes,
    Datasets,
    Jobs,
    Json,
    RayAddress,
    WorkerThreads,
    names_of,
)
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
    from toolchain.fleet.fleet_outcome import FleetOutcome
    from toolchain.fleet.fleet_run import Fleet
    from toolchain.fleet.fleet_world import FleetPlace, FleetWorld
    from toolchain.study.study_run import Crew

REPORT = "fleet-report"

_Out = Annotated[
    Path, typer.Option(help="Folder of the results; a fleet that was cut off goes on from it.")
]
_Users = Annotated[int, typer.Option(min=2)]
_First = Annotated[
    int, typer.Option(help="Number of the first user, for a large fleet in parts.", min=0)
]
_Dialogues = Annotated[int, typer.Option(help="Of each user.", min=1)]
_Nights = Annotated[int, typer.Option(help="Fine-tunings that fall due.", min=1)]
_Tests = Annotated[int, typer.Option(help="Unseen dialogues of each user, for the gain.", min=1)]
_Replies = Annotated[
    int, typer.Option(help="Of them, those that are answered, for the manner.", min=0)
]
_ReplyTokens = Annotated[int, typer.Option(help="Of such a reply at most.", min=1)]
_Partners = Annotated[
    int, typer.Option(help="Others whose adapters each user is tried with.", min=1)
]
_Datasets = Annotated[str | None, typer.Option(help="Names, by comma. Default: all in --data.")]
_Manners = Annotated[str | None, typer.Option(help="Names, by comma. Default: all that there are.")]
_AnswerRate = Annotated[
    float, typer.Option(help="Part of the questions that a user answers.", min=0, max=1)
]
_DialoguesADay = Annotated[
    int | None,
    typer.Option(help="Default: the phone profile's, at most a night's share.", min=1),
]
_Policy = Annotated[
    Path | None, typer.Option(help="JSON with fields that replace the bundle's policy.")
]
_Phone = Annotated[
    str, typer.Option(help="A device profile's name or .toml: time and energy are modelled.")
]
_Seed = Annotated[int, typer.Option(help="Of users, streams and partners.", min=0)]


def fleet(
    bundle: AndroidBundle,
    data: Datasets,
    out: _Out,
    users: _Users = 100,
    first: _First = 0,
    dialogues: _Dialogues = 300,
    nights: _Nights = 3,
    tests: _Tests = 30,
    replies: _Replies = 4,
    reply_tokens: _ReplyTokens = 128,
    partners: _Partners = 5,
    datasets: _Datasets = None,
    manners: _Manners = None,
    answer_rate: _AnswerRate = 1.0,
    dialogues_a_day: _DialoguesADay = None,
    policy: _Policy = None,
    phone: _Phone = "pixel-8",
    device: Computes = "cpu",
    threads: WorkerThreads = 1,
    jobs: Jobs = None,
    ray: RayAddress = None,
    seed: _Seed = 0,
    as_json: Json = False,
) -> None:
    """Let many simulated users live with the loop, and see who gains what.

    Each has its own mix of datasets, its own drift and its own manner. Adapters are swapped, to
    tell what is personal from what every adapter learns.

    Example: [bold]attune fleet out/tiny --data ../shared/data --users 100 --out out/fleet[/]
    """
    from runtime_py.bundle.bundle import open_bundle
    from runtime_py.bundle.manifest import MANIFEST
    from runtime_py.loop.files import sha256
    from toolchain.fleet.fleet_options import FleetOptions
    from toolchain.fleet.fleet_run import prepare
    from toolchain.fleet.fleet_world import FleetPlace
    from toolchain.fleet.user_life import LifeOptions
    from toolchain.simulate.simulation import read_policy
    from toolchain.study.cells import StudyPlace
    from toolchain.study.sources import check_device
    from toolchain.study.study_run import Crew

    chosen = names_of("--datasets", datasets) or (), names_of("--manners", manners) or ()
    opened = open_bundle(bundle)
    check_device(device)
    base = read_policy(opened.manifest, None)
    wanted = asdict(read_policy(opened.manifest, policy))
    changed = {name: value for name, value in wanted.items() if value != asdict(base)[name]}
    life = LifeOptions(nights, answer_rate, dialogues_a_day, replies, reply_tokens, changed)
    options = FleetOptions(users, dialogues, tests, partners, seed, life, *chosen, first)
    place = FleetPlace(StudyPlace(bundle.resolve(), data.resolve(), device, threads), phone)
    facts: dict[str, Any] = {"bundle": sha256(bundle / MANIFEST), "device": device}
    prepared = prepare(place, options, out, base, {**facts, "threads": threads})
    outcome = _with_progress(prepared, Crew(jobs, ray), as_json)
    _show(outcome, out, opened.manifest.model.name, as_json)


def world_opener() -> Callable[[FleetPlace], FleetWorld]:
    """What workers open: a function of a module."""
    from toolchain.fleet.opening import open_world

    return open_world


def _with_progress(prepared: Fleet, crew: Crew, quiet: bool) -> FleetOutcome:
    from toolchain.fleet.fleet_run import run

    with counted_progress(quiet) as progress:
        task = progress.add_task("lives", total=prepared.options.users)

        def told(phase: str, done: int, of: int) -> None:
            progress.update(task, description=phase, completed=done, total=of)

        return run(prepared, crew, world_opener(), told)


def _show(outcome: FleetOutcome, out: Path, model: str, as_json: bool) -> None:
    from toolchain.fleet.fleet_page import print_table, write_page

    write_page(out / f"{REPORT}.html", outcome, model)
    told = outcome.as_json()
    write_bytes(out / f"{REPORT}.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
    if as_json:
        print_json(told)
    else:
        print_table(output, outcome)
        output.print(line("next: open ", bold(out / f"{REPORT}.html")), soft_wrap=True)
    if outcome.failures:
        console.print(
            line(
                styled("bold red", f"{len(outcome.failures)} users failed"),
                f": run the command again to try them once more; what went wrong is in "
                f"{out / 'failed'}.",
            ),
            soft_wrap=True,
        )
        raise typer.Exit(1)
