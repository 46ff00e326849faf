"""The limits of a phone, put on a process of this machine (Linux).

Anonymous memory by RLIMIT_DATA, which mapped files do not count against; cores by affinity; storage
by the size of a folder. The interpreter and its libraries, which a phone has not, are measured
before the bundle is opened and come on top of the limit.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from runtime_py.loop.errors import DiskFull, LoopError
from runtime_py.loop.store import Store

PAGE = 4096  # bytes, SQLite's default
SLACK = 64 * 1024  # bytes that an ordinary change may take
BALLAST = "other-apps"  # a file that stands for what others put on a full disk


@dataclass(frozen=True)
class Usage:
    """Bytes. ``resident``: now, mapped files included; ``highest``: the most it ever was;
    ``data``: what RLIMIT_DATA counts."""

    resident: int
    highest: int
    data: int


def usage(pid: int | str = "self") -> Usage:
    """Raises ``OSError`` where there is no such process."""
    sizes = {}
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    for line in text.split("\n"):
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM", "VmData"):
            sizes[name] = int(rest.split()[0]) * 1024
    if not sizes:  # a process that has ended and was not waited for
        raise ProcessLookupError(f"process {pid} has ended")
    return Usage(sizes["VmRSS"], sizes["VmHWM"], sizes["VmData"])


def give_back() -> None:
    """Hands freed memory to the system, so that ``usage`` shows what is used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def limit_cores(count: int) -> int:
    """Binds this process to at most ``count`` cores; how many it has."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    return len(cores)


def limit_memory(app_mb: float) -> Usage:
    """From now on this process can take ``app_mb`` more. What it had before."""
    give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = usage()
    most = before.data + int(app_mb * 1e6)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return before


def available_mb() -> float:
    """What RLIMIT_DATA still leaves this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        return math.inf
    give_back()
    return (soft - usage().data) / 1e6


class Quota:
    """``folder`` and ``beside`` bytes more (the bundle's) may take ``app_mb``."""

    def __init__(self, folder: Path, beside: int, app_mb: float) -> None:
        self._folder, self._beside, self._most = folder, beside, int(app_mb * 1e6)

    @property
    def used(self) -> int:
        return self._beside + folder_bytes(self._folder)

    @property
    def left(self) -> int:
        return max(0, self._most - self.used)

    @property
    def others_fill_it(self) -> bool:
        return (self._folder / BALLAST).exists()

    def check(self, more: int) -> None:
        """Raises ``DiskFull`` where ``more`` bytes do not fit."""
        if (left := self.left) < more:
            raise DiskFull(
                f"the storage of {self._most / 1e6:,.0f} MB has {left / 1e6:,.2f} MB left, and "
                f"{more / 1e6:,.2f} MB are needed; free some space."
            )

    def limit(self, store: Store) -> None:
        """Lets SQLite itself refuse to grow past what is left."""
        self.check(SLACK)
        pages = store.rows("PRAGMA page_count")[0][0]
        store.rows(f"PRAGMA max_page_count = {pages + self.left // PAGE}")


def folder_bytes(folder: Path) -> int:
    """The sizes of its files; one that goes while they are counted counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def check_system() -> None:
    if not Path("/proc/self/status").exists() or not hasattr(resource, "prlimit"):
        raise LoopError(
            "attune simulate puts limits on a process as only Linux can: run it on Linux, or in a "
            "container."
        )
