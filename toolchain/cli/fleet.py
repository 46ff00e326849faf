"""``attune fleet``: many simulated users, each with a life of the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime_py.loop.files import write_bytes
from toolchain.cli.options import AndroidBundle, Json
from toolchain.report.console import console, counted_progress, output, print_json

if TYPE_CHECKING:
    from toolchain.fleet.fleet_outcome import FleetOutcome
    from toolchain.fleet.fleet_world import FleetPlace, FleetWorld

REPORT = "fleet-report"


def fleet(
    bundle: AndroidBundle,
    data: Annotated[Path, typer.Option(help="The folder that the datasets lie in.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the results; a fleet that was cut off goes on from it.")
    ],
    users: Annotated[int, typer.Option(min=2)] = 100,
    first: Annotated[
        int, typer.Option(help="Number of the first user, for a large fleet in parts.", min=0)
    ] = 0,
    dialogues: Annotated[int, typer.Option(help="Of each user.", min=1)] = 300,
    nights: Annotated[int, typer.Option(help="Fine-tunings that fall due.", min=1)] = 3,
    tests: Annotated[
        int, typer.Option(help="Unseen dialogues of each user, for the gain.", min=1)
    ] = 30,
    replies: Annotated[
        int, typer.Option(help="Of them, those that are answered, for the manner.", min=0)
    ] = 4,
    reply_tokens: Annotated[int, typer.Option(help="Of such a reply at most.", min=1)] = 128,
    partners: Annotated[
        int, typer.Option(help="Others whose adapters each user is tried with.", min=1)
    ] = 5,
    datasets: Annotated[
        str | None, typer.Option(help="Names, by comma. Default: all in --data.")
    ] = None,
    manners: Annotated[
        str | None, typer.Option(help="Names, by comma. Default: all that there are.")
    ] = None,
    answer_rate: Annotated[
        float, typer.Option(help="Part of the questions that a user answers.", min=0, max=1)
    ] = 1.0,
    dialogues_a_day: Annotated[
        int | None,
        typer.Option(help="Default: the phone profile's, at most a night's share.", min=1),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="JSON with fields that replace the bundle's policy.")
    ] = None,
    phone: Annotated[
        str, typer.Option(help="A device profile's name or .toml: time and energy are modelled.")
    ] = "pixel-8",
    device: Annotated[str, typer.Option(help="What computes: cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of each worker.", min=1)] = 1,
    jobs: Annotated[int | None, typer.Option(help="Workers at once. Default: 1.", min=1)] = None,
    ray: Annotated[
        str | None, typer.Option(help="A Ray cluster: host:port, auto, or local.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of users, streams and partners.", min=0)] = 0,
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
    from toolchain.fleet.fleet_run import prepare, run
    from toolchain.fleet.fleet_world import FleetPlace
    from toolchain.fleet.user_life import LifeOptions
    from toolchain.simulate.simulation import read_policy
    from toolchain.study.cells import StudyPlace
    from toolchain.study.sources import check_device
    from toolchain.study.study_run import Crew

    opened = open_bundle(bundle)
    check_device(device)
    base = read_policy(opened.manifest, None)
    wanted = asdict(read_policy(opened.manifest, policy))
    changed = {name: value for name, value in wanted.items() if value != asdict(base)[name]}
    life = LifeOptions(nights, answer_rate, dialogues_a_day, replies, reply_tokens, changed)
    options = FleetOptions(
        users, dialogues, tests, partners, seed, life, _names(datasets), _names(manners), first
    )
    place = FleetPlace(StudyPlace(bundle.resolve(), data.resolve(), device, threads), phone)
    facts: dict[str, Any] = {"bundle": sha256(bundle / MANIFEST), "device": device}
    prepared = prepare(place, options, out, base, {**facts, "threads": threads})
    with counted_progress(as_json) as progress:
        task = progress.add_task("lives", total=users)

        def told(phase: str, done: int, of: int) -> None:
            progress.update(task, description=phase, completed=done, total=of)

        outcome = run(prepared, Crew(jobs, ray), world_opener(), told)
    _show(outcome, out, opened.manifest.model.name, as_json)


def world_opener() -> Callable[[FleetPlace], FleetWorld]:
    """What workers open: a function of a module."""
    from toolchain.fleet.opening import open_world

    return open_world


def _names(value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _show(outcome: FleetOutcome, out: Path, model: str, as_json: bool) -> None:
    from toolchain.fleet.fleet_page import print_table, write_page

    write_page(out / f"{REPORT}.html", outcome, model)
    told = outcome.as_json()
    write_bytes(out / f"{REPORT}.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
    if as_json:
        print_json(told)
    else:
        print_table(output, outcome)
        output.print(f"next: open [bold]{out / f'{REPORT}.html'}[/]", soft_wrap=True)
    if outcome.failures:
        console.print(
            f"[bold red]{len(outcome.failures)} users failed[/]: run the command again to try them "
            f"once more; what went wrong is in {out / 'failed'}.",
            soft_wrap=True,
        )
        raise typer.Exit(1)
