"""The state of a run on disk: written beside and renamed, so that a kill leaves the old or the new.

One safetensors file holds the adapter, the moments, and where stopping examples choose among the
states, the best so far; its metadata holds where the run is. What is read back is bit for bit what
was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.loop.errors import TrainingStateUnusable
from runtime_py.loop.files import write_bytes

FILE = "training.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``step`` updates done; ``losses`` of each, nats a label; ``seconds`` of
    training so far; ``job``: a hash of everything that the run depends on. ``curve``: (step, loss
    of the stopping examples in nats a label) of every look at them."""

    step: int
    losses: tuple[float, ...]
    seconds: float
    job: str
    curve: tuple[tuple[int, float], ...] = ()


def job_digest(values: Mapping[str, object]) -> str:
    """A hash of JSON values: two runs with the same one do the same."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_state(
    folder: Path, state: AdapterState, progress: Progress, kept: np.ndarray | None = None
) -> None:
    """``kept``: the parameters of the best state so far, where the curve has a point.

    Raises ``DiskFull`` where there is no space; the state before is whole then."""
    metadata = {
        "progress": json.dumps(asdict(progress)),
        "layout": state.layout.digest,
        "step": str(state.step),
    }
    tensors = {"parameters": state.parameters, "mean": state.mean, "square": state.square}
    if progress.curve and kept is not None:
        tensors["kept"] = kept
    write_bytes(folder / FILE, save(tensors, metadata))


def load_state(
    folder: Path, state: AdapterState, job: str, kept: np.ndarray | None = None
) -> Progress | None:
    """Fills ``state``, and ``kept``, from what ``save_state`` left in ``folder``; None where there
    is nothing.

    Raises ``TrainingStateUnusable`` for the state of another adapter or another job, and for a
    damaged one; ``state`` and ``kept`` are then as they were.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = _progress(json.loads(metadata["progress"]))
        step = int(metadata["step"])
        found = {name: tensors[name] for name in ("parameters", "mean", "square")}
        best = tensors["kept"] if progress.curve and kept is not None else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingStateUnusable(
            f"{path} is not a whole training state ({error}): remove it to begin anew."
        ) from error
    if metadata.get("layout") != state.layout.digest:
        raise TrainingStateUnusable(
            f"{path} is the optimizer state of another adapter (its tensors have other names or "
            f"shapes): train it with the bundle it belongs to, or remove it to begin anew."
        )
    if progress.job != job:
        raise TrainingStateUnusable(
            f"{path} belongs to another run (other data, settings, base weights or adapter to "
            f"start from): give the run it belongs to, or another --out, or remove it to begin "
            f"anew."
        )
    for name, values in found.items():
        target: np.ndarray = getattr(state, name)
        target[...] = values
    if kept is not None and best is not None:
        kept[...] = best
    state.step = step
    return progress


def _progress(raw: dict) -> Progress:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is not one."""
    curve = tuple((int(step), float(loss)) for step, loss in raw.pop("curve", ()))
    return Progress(**raw | {"losses": tuple(raw["losses"]), "curve": curve})
