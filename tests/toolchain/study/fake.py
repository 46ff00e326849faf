"""A world and a measurement that cost nothing: scores drawn from a cell's key, in any process.

A better row has a lower loss: `trained` by selection, so that reports have something to show.
Files in the data folder make a cell fail: `kill-KEY` once (the file goes first), `raise-KEY`.
"""

from __future__ import annotations

import os
import signal

import numpy as np

from runtime_py.loop.errors import BundleError, LoopError
from toolchain.study.cells import Cell, CellResult, CellScores, StudyPlace

GAINS = {"base": 0.0, "retrieval": 0.05, "base_cut": 0.0, "instruction": 0.01}  # of the loss


def open_world(place: StudyPlace) -> StudyPlace:
    if not place.bundle.is_dir():
        raise BundleError(f"there is no bundle at {place.bundle}.")
    return place


def run_cell(cell: Cell, world: StudyPlace) -> CellResult:
    if (kill := world.data / f"kill-{cell.key}").exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if (world.data / f"raise-{cell.key}").exists():
        raise LoopError(f"{cell.stream} has no reference.")
    if (world.data / f"break-{cell.key}").exists():
        raise ZeroDivisionError("a fault")
    return scored(cell)


def scored(cell: Cell) -> CellResult:
    tests = int(cell.options["tests"]) or 200
    shared = np.random.default_rng([len(cell.stream), 1])  # of the dialogues
    own = np.random.default_rng(int(cell.key, 16))
    labels = shared.integers(5, 80, tests)
    difficulty = shared.normal(2.5, 0.6, tests)
    gain = GAINS.get(cell.row, 0.1 + 0.02 * (cell.policy.get("selection") == "attune"))
    answers = int(cell.options["answers"]) or 64
    gain *= min(1.0, answers / 64)
    loss = (difficulty * (1 - gain) + own.normal(0, 0.02, tests)) * labels
    rouge = np.clip(0.25 + gain + own.normal(0, 0.02, tests), 0, 1)
    words = (labels * 0.7).astype(int)
    scores = CellScores(
        ids=tuple(f"{cell.stream}-{i}" for i in range(tests)),
        loss=tuple(map(float, loss)),
        labels=tuple(map(int, labels)),
        rouge1=tuple(map(float, rouge)),
        rougeL=tuple(map(float, rouge * 0.9)),
        words=tuple(map(int, words)),
    )
    trained = cell.row not in ("base", "base_cut", "instruction", "retrieval")
    bins = int(cell.policy.get("bins", 128))
    facts: dict[str, float | int | str | None] = {
        "kept": bins, "answered": answers, "steps": 24 if trained else 0,
        "mean_eoe": 0.9995 - gain / 100, "mean_dss": 0.05 + gain / 10, "mean_idd": 0.4,
        "forgetting": 0.02 if trained else 0.0, "minutes.pixel-8": 12.0 + bins / 16,
        "memory_mb.pixel-8": 300.0 + bins, "minutes.galaxy-a54": 31.0 + bins / 8,
        "memory_mb.galaxy-a54": 310.0 + bins, "seconds": float(os.getpid()),
    }  # fmt: skip
    return CellResult(cell, scores, facts)
