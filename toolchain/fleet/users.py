"""The simulated users: each has datasets, a drift, junk and a manner of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError
from toolchain.fleet.manners import MANNERS, find_manner
from toolchain.streams.chance import apportioned, chance, shuffled
from toolchain.streams.dataset import read_dataset
from toolchain.streams.stream_recipe import KINDS, Recipe, checked, dataset_files

MOST_DATASETS = 3
MOST_POINTS = 3  # of a drift; one: the shares stay
JUNK_PART = 24  # of each kind at most one dialogue in so many


@dataclass(frozen=True)
class FleetUser:
    """``seed``: of its stream and its policy."""

    number: int
    seed: int
    manner: str
    recipe: Recipe

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "seed": self.seed,
            "manner": self.manner,
            "recipe": self.recipe.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Crowd:
    """``small``: datasets that are left out because one user could need more than they have."""

    users: tuple[FleetUser, ...]
    files: tuple[str, ...]
    small: tuple[str, ...]


def make_crowd(
    data: Path,
    numbers: Sequence[int],
    dialogues: int,
    tests: int,
    seed: int,
    datasets: Sequence[str] = (),
    manners: Sequence[str] = (),
) -> Crowd:
    """``datasets``, ``manners``: names, none for all that there are. A user is what its number and
    the seed make it, whatever the others are. Raises ``LoopError``."""
    names = tuple(manners) or tuple(MANNERS)
    for name in names:
        find_manner(name)
    files = _files(data, datasets)
    sizes = {file: len(read_dataset(data / file).dialogues) for file in files}
    large = [file for file in files if sizes[file] >= dialogues + tests]
    small = tuple(file for file in files if file not in large)
    if not large:
        found = ", ".join(f"{file} {sizes[file]:,}" for file in files)
        raise LoopError(
            f"no dataset of {data} has the {dialogues + tests:,} dialogues that a user can need "
            f"({found}): ask for fewer --dialogues or --tests."
        )
    crowd = tuple(
        make_user(number, seed, large, names[number % len(names)], dialogues, tests)
        for number in numbers
    )
    return Crowd(crowd, tuple(large), small)


def _files(data: Path, datasets: Sequence[str]) -> list[str]:
    there = dataset_files(data)
    if not there:
        raise LoopError(f"{data} has no datasets: expected .jsonl or .jsonl.gz files in it.")
    if unknown := sorted(set(datasets) - set(there)):
        raise LoopError(
            f"{data} has no dataset named {', '.join(unknown)}; it has {', '.join(there)}."
        )
    return [there[name] for name in (datasets or there)]


def make_user(
    number: int, seed: int, files: Sequence[str], manner: str, dialogues: int, tests: int
) -> FleetUser:
    """``dialogues`` of its stream, junk included, and ``tests`` outside it, from ``files``."""
    stream = chance(seed, "user", number)
    count = 1 + stream.below(min(MOST_DATASETS, len(files)))
    chosen = shuffled(files, stream)[:count]
    points = 1 + stream.below(MOST_POINTS) if count > 1 else 1
    weights = [[stream.below(5) for _ in range(points)] for _ in chosen]
    for point in range(points):
        if not any(row[point] for row in weights):
            weights[point % count][point] = 1
    for row in weights:
        row[0] = row[0] if any(row) else 1
    junk = {kind: stream.below(dialogues // JUNK_PART + 1) for kind in KINDS}
    shares = apportioned(tests, [sum(row) for row in weights])
    recipe = checked(
        {
            "title": f"user {number}",
            "order": "drift",
            "observed": dialogues - sum(junk.values()),
            "junk": junk,
            "sources": [
                {"file": file, "weights": row, "test": share}
                for file, row, share in zip(chosen, weights, shares, strict=True)
            ],
        },
        f"of user {number}",
    )
    return FleetUser(number, chance(seed, "life", number).seed(), manner, recipe)
