"""The streams and files of a study: all that is wrong with them, before the first cell is run."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.manifest import MANIFEST
from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import sha256
from toolchain.streams.made import make_stream
from toolchain.streams.stream_recipe import Recipe, dataset_files, find_recipe, recipe_names
from toolchain.study.cells import Cell, StudyPlace


def configuration(place: StudyPlace, cells: Iterable[Cell]) -> dict[str, Any]:
    """What results depend on beside the cells: versions, and the SHA-256 of bundle and data.

    Raises ``BundleError`` and ``LoopError``: for a bundle that is not whole, a device that is not
    there, a stream that does not exist or has fewer dialogues with references than are wanted.
    """
    open_bundle(place.bundle)
    check_device(place.device)
    files = check_streams(place.data, cells)
    return {
        "bundle": sha256(place.bundle / MANIFEST),
        "data": {name: sha256(place.data / name) for name in sorted(files)},
        "device": place.device,
        "threads": place.threads,
        "versions": {name: version(name) for name in ("attune-mobile", "numpy", "torch")},
    }


def check_device(device: str) -> None:
    """Raises ``LoopError`` for a device that PyTorch does not have here."""
    if device == "cpu":
        return
    if device != "cuda":
        raise LoopError(f"there is no device {device!r}: give cpu or cuda.")
    import torch

    if not torch.cuda.is_available():
        raise LoopError("--device cuda: PyTorch finds no CUDA here. Leave it out, or give cpu.")


def recipe_of(cell: Cell, data: Path) -> Recipe:
    """Of the cell's stream, in the size that it asks for; its ordering is ``make_stream``'s seed.

    Raises ``LoopError`` where there is none of that name."""
    recipe = find_recipe(cell.stream, data)
    if rows := cell.options["rows"]:
        recipe = recipe.model_copy(update={"rows": rows})
    observed, tests = int(cell.options["observed"]), int(cell.options["tests"])
    return recipe.scaled(observed or None, tests or None)


def check_streams(data: Path, cells: Iterable[Cell]) -> list[str]:
    """The files that the cells' streams are made of, within ``data``. Every stream is made once,
    in each size that is asked for: the errors are all told at once."""
    files: set[str] = set()
    wrong: dict[str, None] = {}
    recipes: dict[tuple[object, ...], Cell] = {}
    cells = list(cells)
    datasets = dataset_files(data)
    known = {*recipe_names(), *datasets}
    if unknown := [name for name in dict.fromkeys(c.stream for c in cells) if name not in known]:
        raise LoopError(
            f"there is no stream {', '.join(unknown)}; there are the recipes "
            f"{', '.join(recipe_names())}, and the datasets of {data}: "
            f"{', '.join(datasets) or 'none'}."
        )
    for cell in cells:
        recipes[(cell.stream, *(cell.options[name] for name in ("observed", "tests", "rows")))] = (
            cell
        )
    for cell in recipes.values():
        try:
            recipe = recipe_of(cell, data)
            make_stream(recipe, data)
        except LoopError as error:
            wrong[str(error)] = None
            continue
        files.update(source.file for source in recipe.sources)
    if wrong:
        raise LoopError(" ".join(wrong))
    return sorted(files)
