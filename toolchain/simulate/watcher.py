"""The parent: starts the phone's process, watches its memory, makes faults, and starts it again."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime_py.engine.streamed_tuner import RESERVE
from runtime_py.loop.errors import LoopError
from toolchain.simulate.device import Device
from toolchain.simulate.faults import Fault
from toolchain.simulate.life import STATE, Life
from toolchain.simulate.limits import BALLAST, Usage, usage

TICK_S = 0.01
SAMPLE_S = 0.2
FULL_FOR_S = 0.3
SQUEEZED = 0.8  # of the reserve of fine-tuning is left to a process that the device squeezes
ENDED_AT_ONCE = 3  # deaths without a dialogue between them, then it is given up


@dataclass(frozen=True)
class Struck:
    """A fault that came to pass, after dialogue ``place``; ``how`` it was got over, if it was."""

    kind: str
    place: int
    seconds: float
    how: str | None = None


@dataclass
class Watched:
    """``events`` of all processes, in order. ``peak``: the highest resident memory above what
    Python had, bytes; ``samples``: (seconds, place, the same now). ``ended``: why it ended early,
    a sentence."""

    events: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Struck] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    peak: int = 0
    cores: int = 0
    python: int = 0
    seconds: float = 0.0
    ended: str | None = None

    @property
    def recoveries(self) -> int:
        return sum(fault.how is not None for fault in self.faults)


class Watcher:
    """``needs``: bytes that fine-tuning takes with programs of so many tokens; ``told`` hears of
    every event."""

    def __init__(
        self,
        life: Life,
        device: Device,
        faults: list[Fault],
        needs: dict[int, int],
        told: Callable[[dict[str, Any]], None],
    ) -> None:
        self._life, self._needs, self._told = life, needs, told
        self._training_tokens = max(needs, default=0)
        self._limit = int(device.memory.app_mb * 1e6)
        self._pending = list(faults)
        self._ballast = Path(life.folder) / STATE / BALLAST
        self._quota = int(device.storage.app_mb * 1e6)
        self._place, self._deaths = 0, 0
        self._full_until: float | None = None
        self._lit: list[tuple[float, Fault]] = []
        self.found = Watched()

    def run(self) -> Watched:
        begun = time.monotonic()
        self._begun = begun
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            file.write(self._life.to_json())
            file.flush()
            while not self._one_process(file.name):
                pass
        self.found.seconds = time.monotonic() - begun
        return self.found

    def _one_process(self, file: str) -> bool:
        """Whether the run is over."""
        reading, writing = os.pipe()
        threads = str(self._life.threads)
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        # freed memory goes back at once, as a phone's allocators do under pressure
        limits |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "toolchain.simulate.phone_child", file, str(writing)],
                env={**os.environ, **limits, "HF_HUB_OFFLINE": "1"},
                pass_fds=[writing],
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            os.close(writing)
            last = self._attend(process, reading)
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace")
        return self._over(process.returncode, last, said)

    def _attend(self, process: subprocess.Popen, reading: int) -> dict[str, Any]:
        """From the start of a process to its end, whatever happens here; its last event."""
        self._before: Usage | None = None
        self._squeezed, self._killed = False, False
        try:
            return self._listen(process, reading)
        finally:
            os.close(reading)
            process.kill()
            process.wait()
            self._ballast.unlink(missing_ok=True)

    def _listen(self, process: subprocess.Popen, reading: int) -> dict[str, Any]:
        """Until the process ends; its last event."""
        last: dict[str, Any] = {}
        rest, sampled = b"", 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            while True:
                if selector.select(TICK_S):
                    data = os.read(reading, 1 << 16)
                    if not data:
                        process.wait()
                        return last
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        last = json.loads(line)
                        self._hear(process, last)
                now = time.monotonic()
                self._weigh(process, now - sampled >= SAMPLE_S)
                sampled = now if now - sampled >= SAMPLE_S else sampled
                self._strike(process, now)

    def _weigh(self, process: subprocess.Popen, sample: bool) -> None:
        if self._before is None:
            return
        try:
            now = usage(process.pid)
        except OSError:
            return
        self.found.peak = max(self.found.peak, now.highest - self._before.resident)
        if sample:
            own = now.resident - self._before.resident
            self.found.samples.append((time.monotonic() - self._begun, self._place, own))
        if now.highest - self._before.resident > self._limit:
            self._fault("memory_limit")
            process.kill()

    def _hear(self, process: subprocess.Popen, event: dict[str, Any]) -> None:
        name, now = event["event"], time.monotonic()
        self.found.events.append({**event, "at": now - self._begun})
        if name == "limited":
            self._before = Usage(event["resident"], 0, event["data"])
            self.found.cores = event["cores"]
            self.found.python = max(self.found.python, event["resident"])
        elif name == "awake":
            self._got_over(f"it went on after dialogue {event['place']}")
        elif name == "step":
            self._training_tokens = event["tokens"]
        elif name == "dialogue":
            self._place, self._deaths = event["place"], 0
        elif name == "freed":
            self._got_over("the change was made when there was room again")
        elif name == "morning" and self._squeezed:
            self._squeeze(process, None)
            self._got_over(f"fine-tuning was {event['state']}, and the device went on")
        self._told(event)
        for fault in [f for f in self._pending if f.trigger == name and self._place >= f.place]:
            self._pending.remove(fault)
            self._lit.append((now + fault.fuse_s, fault))

    def _strike(self, process: subprocess.Popen, now: float) -> None:
        for when, fault in list(self._lit):
            if now < when or process.poll() is not None:
                continue
            self._lit.remove((when, fault))
            self._fault(fault.kind)
            if fault.kind == "kill":
                self._killed = True
                process.kill()
                return
            if fault.kind == "full_disk":
                with self._ballast.open("wb") as file:
                    file.truncate(self._quota)  # a hole: nothing is really written
                self._full_until = now + FULL_FOR_S
            else:
                need = self._needs.get(self._training_tokens, 0)
                self._squeeze(process, int(SQUEEZED * RESERVE * need))
        if self._full_until is not None and now >= self._full_until:
            self._ballast.unlink(missing_ok=True)
            self._full_until = None

    def _squeeze(self, process: subprocess.Popen, left: int | None) -> None:
        """Lowers what the process may take to ``left`` bytes above what it has; None: as it was."""
        self._squeezed = left is not None
        try:
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_DATA)
            soft = hard
            if left is not None:
                soft = min(hard, usage(process.pid).data + left)
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (soft, hard))
        except ProcessLookupError:
            return

    def _fault(self, kind: str) -> None:
        self.found.faults.append(Struck(kind, self._place, time.monotonic() - self._begun))

    def _got_over(self, how: str) -> None:
        self.found.faults = [
            fault if fault.how else replace(fault, how=how) for fault in self.found.faults
        ]

    def _over(self, code: int, last: dict[str, Any], said: str) -> bool:
        if code == 0 and last.get("event") == "done":
            return True
        if last.get("event") == "error":
            self.found.ended = last["why"]
            return True
        if self._killed:
            return False
        self._fault("crash")
        self._deaths += 1
        if self._deaths >= ENDED_AT_ONCE:
            tail = " ".join(said.split())[-300:]
            self.found.ended = (
                f"the process died {self._deaths} times without getting further than dialogue "
                f"{self._place} (last by exit code {code}; {tail or 'it said nothing'})."
            )
            return True
        if code not in (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV):
            raise LoopError(f"the simulated phone ended with exit code {code}: {said[-2000:]}")
        return False
