"""A study from its plan to its results: prepared, run, resumed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError
from toolchain.study.cells import Cell, CellResult, StudyPlace
from toolchain.study.executor import Done, Failed, Work, run_in_processes
from toolchain.study.grid import Planned, cells_of
from toolchain.study.plan import StudyPlan, checked_plan
from toolchain.study.ray_executor import run_on_ray
from toolchain.study.results import STUDY, StudyFolder, open_folder, read_folder
from toolchain.study.sources import configuration


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, and why."""

    cell: Cell
    sentence: str


@dataclass(frozen=True)
class Study:
    """``done``: by key; ``damaged``: files of cells that are measured anew."""

    plan: StudyPlan
    planned: tuple[Planned, ...]
    folder: StudyFolder
    done: dict[str, CellResult]
    damaged: tuple[Path, ...]

    @property
    def cells(self) -> list[Cell]:
        """Each once, in the plan's order."""
        return list(dict.fromkeys(one.cell for one in self.planned))

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.key not in self.done]


@dataclass(frozen=True)
class Crew:
    """Who works: ``jobs`` workers at once (None: one, or what the cluster has room for), on this
    machine or the Ray cluster at ``ray``."""

    jobs: int | None = None
    ray: str | None = None


def prepare(plan: StudyPlan, place: StudyPlace, out: Path) -> Study:
    """Checks all that can be checked before a cell is run, then makes or opens the folder."""
    planned = cells_of(plan)
    settings = configuration(place, [one.cell for one in planned])
    folder = open_folder(out, settings, plan.model_dump(mode="json"))
    return _study(plan, planned, folder)


def reopen(out: Path) -> Study:
    """Results that are there, by the plan that they were measured for, without bundle and data."""
    folder, raw = read_folder(out)
    plan = checked_plan(raw, str(out / STUDY))
    return _study(plan, cells_of(plan), folder)


def _study(plan: StudyPlan, planned: Sequence[Planned], folder: StudyFolder) -> Study:
    done, damaged = folder.read(one.cell for one in planned)
    return Study(plan, tuple(planned), folder, done, tuple(damaged))


def chosen(study: Study, only: str | None, limit: int | None) -> list[Cell]:
    """The missing cells whose name (``LABEL @ STREAM #ORDERING``) matches ``only``, the first
    ``limit``. Raises ``LoopError`` where the pattern is none, or matches no cell."""
    if only is None:
        return study.missing[:limit]
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise LoopError(f"--only {only!r} is no regular expression: {error}.") from None
    matching = [one.cell for one in study.planned if pattern.search(name_of(one))]
    if not matching:
        raise LoopError(
            f"--only {only!r} matches no cell of the plan; the first is "
            f"{name_of(study.planned[0])!r}."
        )
    missing = set(study.missing)
    return [cell for cell in dict.fromkeys(matching) if cell in missing][:limit]


def name_of(planned: Planned) -> str:
    """As ``--only`` sees it and a report of failures tells it."""
    return f"{planned.label} @ {planned.cell.stream} #{planned.cell.ordering}"


def run(
    study: Study,
    cells: Sequence[Cell],
    crew: Crew,
    place: StudyPlace,
    open_world: Callable[[StudyPlace], Any],
    run_cell: Callable[[Cell, Any], CellResult],
    told: Callable[[CellResult | Failure], None] = lambda outcome: None,
) -> list[Failure]:
    """Measures ``cells``, each written as soon as it is there, and returns those that failed.

    Nothing is written where no worker can be had."""
    work: Work[StudyPlace, Cell, CellResult] = Work(open_world, run_cell, place)
    failures: list[Failure] = []
    if not cells:
        study.folder.begin()
    for number, outcome in enumerate(_outcomes(work, cells, crew)):
        if number == 0:
            study.folder.begin()
        cell = cells[outcome.index]
        if isinstance(outcome, Failed):
            failures.append(Failure(cell, outcome.sentence))
            study.folder.write_failure(cell, outcome)
            told(failures[-1])
            continue
        study.folder.write(outcome.result)
        study.done[cell.key] = outcome.result.settled()
        told(outcome.result)
    return failures


def _outcomes(
    work: Work[StudyPlace, Cell, CellResult], cells: Sequence[Cell], crew: Crew
) -> Iterator[Done[CellResult] | Failed]:
    if not cells:
        return iter(())
    if crew.ray is None:
        return run_in_processes(work, cells, crew.jobs or 1)
    gpus = int(work.place.device == "cuda")
    return run_on_ray(work, cells, crew.ray, crew.jobs, gpus=gpus, cpus=work.place.threads)
