"""The parent: starts the phone's process, watches its memory, makes faults, and starts it again."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from runtime_py.engine.streamed_tuner import RESERVE
from runtime_py.loop.errors import LoopError
from toolchain.simulate.events import (
    AppOpened,
    DialogueObserved,
    DiskFilled,
    DiskFreed,
    LimitsSet,
    NightEnded,
    PhoneEvent,
    PhoneFailed,
    StepTrained,
    StreamEnded,
)
from toolchain.simulate.faults import Fault, FaultSchedule
from toolchain.simulate.life_plan import LifePlan
from toolchain.simulate.limits import BALLAST
from toolchain.simulate.phone_process import PhoneProcess
from toolchain.simulate.run_record import FaultKind, FaultRecord, MemorySample, RunRecord

TICK_S = 0.01
SAMPLE_S = 0.2
FULL_FOR_S = 0.3  # from when the phone has met it
SQUEEZED = 0.8  # of the reserve of fine-tuning is left to a process that the device squeezes
ENDED_AT_ONCE = 3  # deaths without a dialogue between them, then it is given up
_DEADLY = (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV)  # as by a system short of memory


class Watcher:
    """``needs``: bytes that fine-tuning takes with programs of so many tokens; ``on_event`` gets
    every event."""

    def __init__(
        self,
        plan: LifePlan,
        faults: Sequence[Fault],
        needs: dict[int, int],
        on_event: Callable[[PhoneEvent], None],
    ) -> None:
        self._plan, self._needs, self._on_event = plan, needs, on_event
        self._training_tokens = max(needs, default=0)
        self._memory_limit = int(plan.device.memory.app_mb * 1e6)
        self._storage_limit = int(plan.device.storage.app_mb * 1e6)
        self._faults = FaultSchedule(faults)
        self._ballast = plan.state / BALLAST
        self._full_until: float | None = None
        self._place, self._deaths = 0, 0
        self._begun = self._sampled = time.monotonic()
        # of the process that lives now: what Python had in memory, and whether it is squeezed
        self._python: int | None = None
        self._squeezed = False
        self._record = RunRecord()

    def run(self) -> RunRecord:
        """Process after process until the stream has ended, or one cannot go on."""
        self._begun = time.monotonic()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            file.write(self._plan.to_json())
            file.flush()
            while not self._one_process(Path(file.name)):
                pass
        self._record.seconds = self._elapsed
        return self._record

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _one_process(self, file: Path) -> bool:
        """Whether the run is over."""
        self._python, self._squeezed = None, False
        try:
            with PhoneProcess(file, self._plan.threads) as process:
                last = self._attend(process)
                return self._is_over(process, last)
        finally:
            self._ballast.unlink(missing_ok=True)

    def _attend(self, process: PhoneProcess) -> PhoneEvent | None:
        """Until the process ends; its last event."""
        last: PhoneEvent | None = None
        while (events := process.read(TICK_S)) is not None:
            for last in events:
                self._receive(process, last)
            self._weigh(process)
            self._strike(process)
        return last

    def _receive(self, process: PhoneProcess, event: PhoneEvent) -> None:
        self._record.events.append(event)
        match event:
            case LimitsSet():
                self._python = event.resident
                self._record.cores = event.cores
                self._record.python = max(self._record.python, event.resident)
            case AppOpened():
                self._got_over(f"it went on after dialogue {event.place}")
            case StepTrained():
                self._training_tokens = event.tokens
            case DialogueObserved():
                self._place, self._deaths = event.place, 0
            case DiskFilled():
                self._full_until = time.monotonic() + FULL_FOR_S
            case DiskFreed():
                self._got_over("the change was made when there was room again")
            case NightEnded() if self._squeezed:
                process.relax()
                self._squeezed = False
                self._got_over(f"fine-tuning was {event.state}, and the device went on")
        self._on_event(event)
        self._faults.light(event, self._place, time.monotonic())

    def _weigh(self, process: PhoneProcess) -> None:
        if self._python is None or (now := process.usage()) is None:
            return
        self._record.peak = max(self._record.peak, now.highest - self._python)
        if time.monotonic() - self._sampled >= SAMPLE_S:
            self._sampled = time.monotonic()
            self._record.samples.append(MemorySample(self._elapsed, now.resident - self._python))
        if now.highest - self._python > self._memory_limit:
            self._add_fault("memory_limit")
            process.kill()

    def _strike(self, process: PhoneProcess) -> None:
        now = time.monotonic()
        while process.runs and not process.killed and (fault := self._faults.take_due(now)):
            self._add_fault(fault.kind)
            if fault.kind == "kill":
                process.killed = True
                process.kill()
            elif fault.kind == "full_disk":
                with self._ballast.open("wb") as file:
                    file.truncate(self._storage_limit)  # a hole: nothing is really written
            else:
                need = self._needs.get(self._training_tokens, 0)
                process.squeeze(int(SQUEEZED * RESERVE * need))
                self._squeezed = True
        if self._full_until is not None and now >= self._full_until:
            self._ballast.unlink(missing_ok=True)
            self._full_until = None

    def _add_fault(self, kind: FaultKind) -> None:
        self._record.faults.append(FaultRecord(kind, self._place, self._elapsed))

    def _got_over(self, how: str) -> None:
        faults = self._record.faults
        self._record.faults = [f if f.how else replace(f, how=how) for f in faults]

    def _is_over(self, process: PhoneProcess, last: PhoneEvent | None) -> bool:
        """Whether the run ends with this process. Raises ``LoopError`` where the process ended in
        a way that no phone can cause."""
        code = process.exit_code
        if code == 0 and isinstance(last, StreamEnded):
            return True
        if isinstance(last, PhoneFailed):
            self._record.ended = last.why
            return True
        if process.killed:
            return False
        self._add_fault("crash")
        self._deaths += 1
        text = process.error_text
        if self._deaths >= ENDED_AT_ONCE:
            self._record.ended = (
                f"the process died {self._deaths} times without getting further than dialogue "
                f"{self._place} (last by exit code {code}; "
                f"{' '.join(text.split())[-300:] or 'it wrote no error'})."
            )
            return True
        if code not in _DEADLY:
            raise LoopError(f"the simulated phone ended with exit code {code}: {text[-2000:]}")
        return False
