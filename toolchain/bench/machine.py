"""What a figure was measured on, and the memory bandwidth that bounds decoding."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
_BYTES = 256 * 2**20  # far beyond any cache


def _processor() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OtherProcesses:
    """How much of the machine other processes took since this was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._since = _busy(), time.process_time(), time.monotonic()

    def cores(self) -> float | None:
        """Mean number of cores, or None where the system does not tell."""
        busy = _busy()
        if busy is None or self._busy is None:
            return None
        others = busy - self._busy - (time.process_time() - self._own)
        return max(0.0, others / (time.monotonic() - self._since))


def _busy() -> float | None:
    """Seconds that all cores together have worked, or were kept from it by other machines."""
    if not _STAT.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def describe() -> dict:
    """Processor, cores and system, as a report names them."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that ``threads`` threads read from memory: the best of ``rounds`` sums over
    256 MB. Sets torch's number of threads."""
    torch.set_num_threads(threads)
    values = torch.ones(_BYTES // 4)
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - begin)
    return _BYTES / best
