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
from toolchain.report.console import bold, console, counted_progress, line, output, print_json

if TYPE_CHECKING:
    from toolchain.study.cells import Cell, CellResult, StudyPlace
    from toolchain.study.results import StudyFolder
    from toolchain.tune.measuring import Bench, Limits
    from toolchain.tune.search import TrialRow, TuneOptions, TuneOutcome

REPORT = "tune-report"

_Out = Annotated[
    Path,
    typer.Option(help="Folder of the results; a search that was cut off goes on from it."),
]
_Trials = Annotated[int, typer.Option(help="Policies that are tried.", min=1)]
_Hours = Annotated[
    float | None, typer.Option(help="After so many, no trial begins. Default: no end.")
]
_Groups = Annotated[
    str | None,
    typer.Option(
        help="learning, selection, asking, synthesis, forgetting; by comma. Default: all."
    ),
]
_Streams = Annotated[
    str, typer.Option(help="Recipes or datasets, by comma; only rows for development.")
]
_Orderings = Annotated[int, typer.Option(help="Of each stream, that a trial sees.")]
_Confirm = Annotated[int, typer.Option(help="Others, that the best are tried on.")]
_Finalists = Annotated[int, typer.Option(help="How many are tried on them.")]
_Observed = Annotated[
    int | None, typer.Option(help="Dialogues of a stream. Default: the recipe's.", min=1)
]
_Tests = Annotated[int | None, typer.Option(help="Unseen dialogues. Default: the recipe's.", min=1)]
_Phone = Annotated[str, typer.Option(help="The device profile whose time and memory must suffice.")]
_Minutes = Annotated[
    float | None, typer.Option(help="Of a night at most. Default: the profile's night.")
]
_MemoryMb = Annotated[
    float | None, typer.Option(help="At most. Default: what the profile lets an app hold.")
]
_Seed = Annotated[int, typer.Option(help="Of the search.", min=0)]


def tune(
    bundle: AndroidBundle,
    data: Datasets,
    out: _Out,
    trials: _Trials = 40,
    hours: _Hours = None,
    groups: _Groups = None,
    streams: _Streams = "development",
    orderings: _Orderings = 2,
    confirm: _Confirm = 3,
    finalists: _Finalists = 3,
    observed: _Observed = None,
    tests: _Tests = None,
    phone: _Phone = "pixel-8",
    minutes: _Minutes = None,
    memory_mb: _MemoryMb = None,
    device: Computes = "cpu",
    threads: WorkerThreads = 1,
    jobs: Jobs = None,
    ray: RayAddress = None,
    seed: _Seed = 0,
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
    from toolchain.tune.space import check_groups

    names = names_of("--streams", streams) or ()
    chosen = TuneOptions(
        check_groups(names_of("--groups", groups) or ()),
        trials,
        hours,
        orderings,
        confirm,
        finalists,
        seed,
    )
    check_options(chosen)
    manifest = open_bundle(bundle).manifest
    policy = read_policy(manifest, None)
    limits = _limits(phone, minutes, memory_mb, policy.forgetting_bound)
    place = StudyPlace(bundle.resolve(), data.resolve(), device, threads)
    options: dict[str, bool | int | float | str] = {
        "rows": "development",
        "observed": observed or 0,
        "tests": tests or 0,
    }
    folder = _folder(out, place, names, chosen, options, limits)
    opened, run_cell = world_and_cell()
    bench = Bench(folder, place, names, options, phone, opened, run_cell, Crew(jobs, ray))
    outcome = _with_progress(chosen, bench, limits, out, as_json)
    _show(outcome, out, manifest.model.name, as_json)


def world_and_cell() -> tuple[Callable[[StudyPlace], Any], Callable[[Cell, Any], CellResult]]:
    """What workers open and run: functions of a module."""
    from toolchain.study.cell import run_cell
    from toolchain.study.world import open_world

    return open_world, run_cell


def _with_progress(
    chosen: TuneOptions, bench: Bench, limits: Limits, out: Path, quiet: bool
) -> TuneOutcome:
    from toolchain.tune.search import tune as search

    with counted_progress(quiet) as bar:
        task = bar.add_task("trials", total=chosen.trials)

        def told(row: TrialRow) -> None:
            bar.advance(task)
            if not quiet and not console.is_terminal:
                gain = "failed" if row.measured is None else f"{row.measured.gain:+.2%}"
                console.print(f"trial {row.number}  {gain}  {row.sentence}", soft_wrap=True)

        return search(chosen, bench, limits, out, told)


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


def _show(outcome: TuneOutcome, out: Path, model: str, as_json: bool) -> None:
    from toolchain.tune.search import POLICY
    from toolchain.tune.tune_page import print_table, write_page

    write_page(out / f"{REPORT}.html", outcome, model)
    told = outcome.as_json()
    write_bytes(out / f"{REPORT}.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
    if as_json:
        print_json(told)
        return
    print_table(output, outcome)
    next_step = bold(f"attune export MODEL --policy {out / POLICY}")
    output.print(line("next: ", next_step), soft_wrap=True)
