"""What a person sees while a command runs: stages with a spinner, times, tables; on stderr.

No text is ever read as markup, an emoji's name or a control sequence: a path, a name or a dialogue
is shown letter by letter, whatever it holds. What is to stand out says so (``styled``, ``bold``).
"""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text


class PlainConsole(Console):
    """Shows text as it is. What a terminal would take for a command, or cannot encode, is written
    out: ESC as ``\\x1b``."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=self.shown(segment.text))

    def shown(self, text: str) -> str:
        """``text`` as it is shown."""
        if text.isascii() and text.isprintable():
            return text
        plain = "".join(
            c if c == "\n" or unicodedata.category(c) != "Cc" else _named(c) for c in text
        )
        return plain.encode(self.encoding, "backslashreplace").decode(self.encoding)


def _named(control: str) -> str:
    return f"\\x{ord(control):02x}"


console = PlainConsole(stderr=True)
output = PlainConsole()


def styled(style: str, content: object) -> Text:
    """``content`` in one of Rich's styles, such as ``bold red``."""
    return Text(str(content), style)


def bold(content: object) -> Text:
    return styled("bold", content)


def dim(content: object) -> Text:
    return styled("dim", content)


def line(*parts: str | Text) -> Text:
    """``parts``, one after the other."""
    return Text.assemble(*parts)


def print_error(error: object) -> None:
    """A sentence on stderr."""
    console.print(line(styled("bold red", "error:"), f" {error}"), soft_wrap=True)


class Stages:
    """Named stages of one job, shown as they run; ``seconds`` keeps what each took."""

    def __init__(self, title: str, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._current: str | None = None
        self._since = 0.0
        self._title = title
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
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
                self._progress.console.print(line(dim(f"  {taken:6.1f} s"), f"  {self._current}"))
        self._current = None

    def __call__(self, stage: str) -> None:
        """Ends the stage before, begins this one."""
        self._close()
        self._current, self._since = stage, time.monotonic()
        self._progress.update(self._task, description=f"{self._title}: {stage}")


def counted_progress(quiet: bool) -> Progress:
    """A bar with done and total, time taken and time left; nothing where nobody looks."""
    return Progress(
        TextColumn("{task.description}", markup=False),
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
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8, or a terminal that is not
        text = json.dumps(value, indent=1)
    sys.stdout.write(text + "\n")


def megabytes(count: float) -> str:
    """Bytes as a person reads them (1 MB = 10⁶ bytes)."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} KB"
