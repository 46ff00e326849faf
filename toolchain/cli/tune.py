"""``attune tune``: the policy that gains most on development data, within what a phone can give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import write_bytes
from toolchain.cli.options import AndroidBundle, Json
from toolchain.report.console import console, counted_progress, output, print_json

if TYPE_CHECKING:
    from toolchain.study.cells import Cell, CellResult, StudyPlace
    from toolchain.study.results import StudyFolder
    from toolchain.tune.measuring import Limits
    from toolchain.tune.search import TrialRow, TuneOptions

REPORT = "tune-report"


def tune(
    bundle: AndroidBundle,
    data: Annotated[Path, typer.Option(help="The folder that the datasets lie in.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the results; a search that was cut off goes on from it."),
    ],
    trials: Annotated[int, typer.Option(help="Policies that are tried.", min=1)] = 40,
    hours: Annotated[
        float | None, typer.Option(help="After so many, no trial begins. Default: no end.")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="learning, selection, asking, synthesis, forgetting; by comma. Default: all."
        ),
    ] = None,
    streams: Annotated[
        str, typer.Option(help="Recipes or datasets, by comma; only rows for development.")
    ] = "development",
    orderings: Annotated[int, typer.Option(help="Of each stream, that a trial sees.")] = 2,
    confirm: Annotated[int, typer.Option(help="Others, that the best are tried on.")] = 3,
    finalists: Annotated[int, typer.Option(help="How many are tried on them.")] = 3,
    observed: Annotated[
        int | None, typer.Option(help="Dialogues of a stream. Default: the recipe's.", min=1)
    ] = None,
    tests: Annotated[
        int | None, typer.Option(help="Unseen dialogues. Default: the recipe's.", min=1)
    ] = None,
    phone: Annotated[
        str, typer.Option(help="The device profile whose time and memory must suffice.")
    ] = "pixel-8",
    minutes: Annotated[
        float | None, typer.Option(help="Of a night at most. Default: the profile's night.")
    ] = None,
    memory_mb: Annotated[
        float | None, typer.Option(help="At most. Default: what the profile lets an app hold.")
    ] = None,
    device: Annotated[str, typer.Option(help="What computes: cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of each worker.", min=1)] = 1,
    jobs: Annotated[int | None, typer.Option(help="Workers at once. Default: 1.", min=1)] = None,
    ray: Annotated[
        str | None, typer.Option(help="A Ray cluster: host:port, auto, or local.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Search the policy's fields on development data, and write OUT/policy.json for an export.

    It needs Optuna: pip install 'attune-mobile\\[tune]'. Nothing that is judged is seen: only rows
    for development are. The same seed finds the same, also after an interruption.

    Example: [bold]attune tune out/tiny --data ../shared/data --trials 40 --out out/tuned[/]
    """
    from runtime_py.bundle.bundle import open_bundle
    from toolchain.simulate.simulation import read_policy
    from toolchain.study.cells import StudyPlace
    from toolchain.study.study_run import Crew
    from toolchain.tune.measuring import Bench
    from toolchain.tune.search import TuneOptions, check_options
    from toolchain.tune.search import tune as search
    from toolchain.tune.space import check_groups

    chosen = TuneOptions(
        check_groups(_names(groups)), trials, hours, orderings, confirm, finalists, seed
    )
    check_options(chosen)
    manifest = open_bundle(bundle).manifest
    policy = read_policy(manifest, None)
    limits = _limits(phone, minutes, memory_mb, policy.forgetting_bound)
    place = StudyPlace(bundle.resolve(), data.resolve(), device, threads)
    names = _names(streams)
    options: dict[str, bool | int | float | str] = {
        "rows": "development",
        "observed": observed or 0,
        "tests": tests or 0,
    }
    folder = _folder(out, place, names, chosen, options, limits)
    opened, run_cell = world_and_cell()
    bench = Bench(folder, place, names, options, phone, opened, run_cell, Crew(jobs, ray))
    with counted_progress(as_json) as bar:
        task = bar.add_task("trials", total=trials)

        def told(row: TrialRow) -> None:
            bar.advance(task)
            if not as_json and not console.is_terminal:
                gain = "failed" if row.measured is None else f"{row.measured.gain:+.2%}"
                console.print(f"trial {row.number}  {gain}  {row.sentence}", soft_wrap=True)

        outcome = search(chosen, bench, limits, out, told)
    _show(outcome, out, manifest.model.name, as_json)


def world_and_cell() -> tuple[Callable[[StudyPlace], Any], Callable[[Cell, Any], CellResult]]:
    """What workers open and run: functions of a module."""
    from toolchain.study.cell import run_cell
    from toolchain.study.world import open_world

    return open_world, run_cell


def _names(value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _limits(
    phone: str, minutes: float | None, memory_mb: float | None, forgetting: float
) -> Limits:
    from toolchain.simulate.device import device_names, find_device
    from toolchain.tune.measuring import Limits

    if phone not in device_names():
        raise LoopError(
            f"there is no phone {phone!r}; known are {', '.join(device_names())}: minutes and "
            f"memory are modelled for those."
        )
    profile = find_device(phone)
    limits = Limits(
        phone,
        60 * profile.rhythm.night_hours if minutes is None else minutes,
        profile.memory.app_mb if memory_mb is None else memory_mb,
        forgetting,
    )
    if not (limits.minutes > 0 and limits.memory_mb > 0):
        raise LoopError("--minutes and --memory-mb are more than 0.")
    return limits


def _folder(
    out: Path,
    place: StudyPlace,
    streams: tuple[str, ...],
    chosen: TuneOptions,
    options: dict[str, Any],
    limits: Limits,
) -> StudyFolder:
    """Checks bundle and streams, then makes or opens the folder. The number of trials, the hours
    and the finalists may change."""
    from toolchain.study.cells import Cell
    from toolchain.study.results import open_folder
    from toolchain.study.sources import configuration
    from toolchain.tune.measuring import BASE

    if not streams:
        raise LoopError("--streams names none: give recipes or datasets, by comma.")
    cells = [Cell(stream, 0, BASE, {}, options) for stream in streams]
    search = {
        "streams": list(streams),
        "groups": list(chosen.groups),
        "orderings": chosen.orderings,
        "seed": chosen.seed,
        **asdict(limits),
        **options,
    }
    return open_folder(out, {**configuration(place, cells), "search": search}, {})


def _show(outcome: Any, out: Path, model: str, as_json: bool) -> None:
    from toolchain.tune.search import POLICY
    from toolchain.tune.tune_page import print_table, write_page

    write_page(out / f"{REPORT}.html", outcome, model)
    told = outcome.as_json()
    write_bytes(out / f"{REPORT}.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
    if as_json:
        print_json(told)
        return
    print_table(output, outcome)
    output.print(f"next: [bold]attune export MODEL --policy {out / POLICY}[/]", soft_wrap=True)
