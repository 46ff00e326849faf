"""What a policy gains on the development streams, and whether a phone can give what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime_py.loop.errors import AttuneError, LoopError
from toolchain.study.cells import Cell, CellResult, StudyPlace
from toolchain.study.executor import (
    Done,
    Failed,
    NoWorld,
    Work,
    failed,
    perform,
    run_in_processes,
)
from toolchain.study.ray_executor import run_on_ray
from toolchain.study.results import StudyFolder
from toolchain.study.study_run import Crew
from toolchain.tune.space import Value

TRAINED, BASE = "trained", "base"  # rows of the study


@dataclass(frozen=True)
class Limits:
    """``phone``: the profile's name, by which cells tell minutes and memory; ``minutes`` of a
    night; ``forgetting``: what the general text's perplexity may grow by."""

    phone: str
    minutes: float
    memory_mb: float
    forgetting: float


@dataclass(frozen=True)
class Measured:
    """``gain``: the part of the untouched model's loss on unseen dialogues that is gone, the mean
    over streams and orderings; ``gains``: of each. Of the rest the largest over them; None: the
    cells do not tell it."""

    gain: float
    gains: tuple[float, ...]
    minutes: float | None
    memory_mb: float | None
    forgetting: float | None

    def excess(self, limits: Limits) -> dict[str, float]:
        """How far each known figure is above its limit, as a part of it; at most 0 where it
        holds."""
        known = {
            "minutes": (self.minutes, limits.minutes),
            "memory_mb": (self.memory_mb, limits.memory_mb),
            "forgetting": (self.forgetting, limits.forgetting),
        }
        return {
            name: value / limit - 1.0 for name, (value, limit) in known.items() if value is not None
        }

    def fits(self, limits: Limits) -> bool:
        return all(value <= 0 for value in self.excess(limits).values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Measured:
        return Measured(**{**raw, "gains": tuple(raw["gains"])})


class Bench:
    """Measures policies by the study's cells, each once: what lies in the folder is not run
    again."""

    def __init__(
        self,
        folder: StudyFolder,
        place: StudyPlace,
        streams: Sequence[str],
        options: Mapping[str, Value],
        phone: str,
        open_world: Callable[[StudyPlace], Any],
        run_cell: Callable[[Cell, Any], CellResult],
        crew: Crew,
    ) -> None:
        self._folder, self._place, self._crew = folder, place, crew
        self._streams, self._options, self._phone = tuple(streams), dict(options), phone
        self._work: Work[StudyPlace, Cell, CellResult] = Work(open_world, run_cell, place)

    def measure(self, policy: Mapping[str, Value], orderings: Sequence[int]) -> Measured:
        """``policy``: fields in place of the bundle's. Raises ``LoopError`` where a cell fails."""
        pairs = [(stream, ordering) for stream in self._streams for ordering in orderings]
        trained = [Cell(s, o, TRAINED, policy, self._options) for s, o in pairs]
        base = [Cell(s, o, BASE, {}, self._options) for s, o in pairs]
        results = self._results([*trained, *base])
        gains = tuple(
            1.0 - _loss(results[own.key]) / _loss(results[other.key])
            for own, other in zip(trained, base, strict=True)
        )
        facts = [results[cell.key].facts for cell in trained]
        return Measured(
            gain=sum(gains) / len(gains),
            gains=gains,
            minutes=_largest(facts, f"minutes.{self._phone}"),
            memory_mb=_largest(facts, f"memory_mb.{self._phone}"),
            forgetting=_largest(facts, "forgetting"),
        )

    def _results(self, cells: Sequence[Cell]) -> dict[str, CellResult]:
        done, _ = self._folder.read(cells)
        missing = [cell for cell in dict.fromkeys(cells) if cell.key not in done]
        wrong: list[str] = []
        for outcome in self._outcomes(missing):
            self._folder.begin()
            cell = missing[outcome.index]
            if isinstance(outcome, Failed):
                self._folder.write_failure(cell, outcome)
                wrong.append(f"{cell.row} on {cell.stream}, ordering {cell.ordering}: "
                             f"{outcome.sentence}")  # fmt: skip
                continue
            self._folder.write(outcome.result)
            done[cell.key] = outcome.result
        if wrong:
            raise LoopError(" ".join(wrong))
        return done

    def _outcomes(self, cells: Sequence[Cell]) -> Iterator[Done[CellResult] | Failed]:
        crew, place = self._crew, self._place
        if not cells:
            return iter(())
        if crew.ray is None:
            if (crew.jobs or 1) == 1:
                return self._here(cells)
            return run_in_processes(self._work, cells, crew.jobs or 1)
        gpus = int(place.device == "cuda")
        return run_on_ray(self._work, cells, crew.ray, crew.jobs, gpus=gpus, cpus=place.threads)

    def _here(self, cells: Sequence[Cell]) -> Iterator[Done[CellResult] | Failed]:
        """In this process, whose world stays open from trial to trial."""
        for index, cell in enumerate(cells):
            try:
                yield Done(index, perform(self._work, cell))
            except NoWorld:
                raise
            except AttuneError as error:
                yield failed(index, error)


def _loss(result: CellResult) -> float:
    """Nats a label."""
    return sum(result.scores.loss) / sum(result.scores.labels)


def _largest(facts: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [fact[name] for fact in facts if fact.get(name) is not None]
    return float(max(known)) if known else None
