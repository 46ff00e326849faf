"""One process that is the phone, as its parent has it: its events, its memory, its end."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path

from toolchain.simulate.events import PhoneEvent, from_line
from toolchain.simulate.limits import Usage, usage


class PhoneProcess:
    """Lives by the plan in a file. Use it in a ``with``: at its end the process is dead, whatever
    happened within. ``killed``: a fault that was planned has ended it."""

    def __init__(self, plan: Path, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._reading, writing = os.pipe()
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        # freed memory goes back at once, as a phone's allocators do under pressure
        limits |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        child = ["-m", "toolchain.simulate.phone_child", str(plan), str(threads), str(writing)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", *child],
            env={**os.environ, **limits, "HF_HUB_OFFLINE": "1"},
            pass_fds=[writing],
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        os.close(writing)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._reading, selectors.EVENT_READ)
        self._rest = b""
        self.killed = False

    def __enter__(self) -> PhoneProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._selector.close()
        os.close(self._reading)
        self.kill()
        self._process.wait()
        self._errors.close()

    def read(self, seconds: float) -> list[PhoneEvent] | None:
        """The events that came, after at most so many seconds; None: the process has ended."""
        if not self._selector.select(seconds):
            return []
        data = os.read(self._reading, 1 << 16)
        if not data:
            self._process.wait()
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [from_line(line) for line in lines]

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int:
        """Of a process that has ended; a signal's number below 0."""
        return self._process.wait()

    @property
    def error_text(self) -> str:
        """What it wrote to its standard error."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")

    def kill(self) -> None:
        self._process.kill()

    def usage(self) -> Usage | None:
        """None: it has ended."""
        try:
            return usage(self._process.pid)
        except OSError:
            return None

    def squeeze(self, left: int) -> None:
        """It may take ``left`` bytes more than it has, and no more than before."""
        before = self.usage()
        if before is not None:
            self._limit(before.data + left)

    def relax(self) -> None:
        """It may take as much as before it was squeezed."""
        self._limit(None)

    def _limit(self, most: int | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_DATA)
            soft = hard if most is None else min(hard, most)
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (soft, hard))
