"""Peak memory of training steps, each contestant in a process of its own.

The child loads its libraries and weights, says so, and trains when told. The parent reads the
child's anonymous memory (``RssAnon``: heap and stacks, no mapped files) all the while; what counts
is the peak above the idle child.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from exporters.errors import ExportError

_PERIOD_S = 0.002
STEPS = 3


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of anonymous memory: of the idle child, and the most above it."""

    idle: int
    peak: int


def _anonymous(pid: int) -> int:
    """``RssAnon`` of a process in bytes; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in text.splitlines() if line.startswith("RssAnon")), "RssAnon 0 kB")
    return int(line.split()[1]) * 1024


def measure_kind(kind: str, arguments: Sequence[str]) -> PeakMemory:
    """Trains ``STEPS`` steps of ``kind`` (see ``main``) in a child."""
    return measure([sys.executable, "-m", __name__, kind, *arguments], kind)


def measure(command: Sequence[str], kind: str) -> PeakMemory:
    """Runs a child that says "ready" once it is idle, and begins when it is sent a line.

    Raises ``ExportError`` where it fails.
    """
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    requests, answers = cast(IO[str], child.stdin), cast(IO[str], child.stdout)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    if answers.readline().strip() != "ready":
        child.wait()
        reader.join()
        raise ExportError(
            f"the memory of {kind} cannot be measured: {''.join(errors)[-400:].strip()}"
        )
    idle = peak = _anonymous(child.pid)
    requests.write("go\n")
    requests.flush()
    while child.poll() is None:
        peak = max(peak, _anonymous(child.pid))
        time.sleep(_PERIOD_S)
    reader.join()
    if child.returncode:
        raise ExportError(f"training with {kind} failed: {''.join(errors)[-400:].strip()}")
    return PeakMemory(idle, peak - idle)


def main(kind: str, bundle: str, source: str, threads: str, keep_mb: str, example: str) -> None:
    """The child. ``kind``: ``attune``, ``torch`` or ``torch-checkpointing``; ``example``: a JSON
    object of tokens and labels."""
    import torch

    from runtime_py.bundle.bundle import open_bundle
    from toolchain.bench.training_engines import (
        Stepper,
        TorchStepper,
        attune_stepper,
        labelled,
        peft_model,
    )
    from toolchain.compile.source import find_source

    torch.set_num_threads(int(threads))
    data = json.loads(example)
    sequence = labelled(torch.tensor(data["tokens"]), torch.tensor(data["labels"]))
    opened = open_bundle(Path(bundle))
    stepper: Stepper
    if kind == "attune":
        stepper = attune_stepper("attune", opened, sequence, float(keep_mb), int(threads))
    else:
        original = find_source(opened.manifest, source or None)
        if isinstance(original, str):
            raise ExportError(original)
        model = peft_model(original.checkpoint.hf_model(), opened.manifest)
        del original
        stepper = TorchStepper(model, sequence, kind.endswith("checkpointing"))
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(STEPS):
        stepper.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
