"""What a person sees while a command runs: stages with a spinner, times, tables; on stderr."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)
output = Console(highlight=False)


class Stages:
    """Named stages of one job, shown as they run; ``seconds`` keeps what each took."""

    def __init__(self, title: str, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._current: str | None = None
        self._since = 0.0
        self._title = title
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._quiet = quiet
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:  # a stage that failed has not taken its time
            self._close()
        self._progress.stop()

    def _close(self) -> None:
        if self._current is not None:
            taken = time.monotonic() - self._since
            self.seconds[self._current] = self.seconds.get(self._current, 0.0) + taken
            if not self._quiet:
                self._progress.console.print(f"  [dim]{taken:6.1f} s[/]  {self._current}")
        self._current = None

    def __call__(self, stage: str) -> None:
        """Ends the stage before, begins this one."""
        self._close()
        self._current, self._since = stage, time.monotonic()
        self._progress.update(self._task, description=f"{self._title}: {stage}")


def counted_progress(quiet: bool) -> Progress:
    """A bar with done and total, time taken and time left; nothing where nobody looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def print_json(value: Any) -> None:
    """Exactly one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def megabytes(count: float) -> str:
    """Bytes as a person reads them (1 MB = 10⁶ bytes)."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} KB"
