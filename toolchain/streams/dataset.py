"""A file of dialogues as material for streams: what of it the loop can observe.

The loop knows a user and an assistant who take turns, the user first and the assistant last. So a
system's turns are left out, the turns before the user's first, and those after the assistant's last
one; a row's ``system`` and ``trailing_user`` are no turns. A row in which no reply is left has no
reference and cannot be used; nor can one whose turns do not alternate. What ships in every bundle
as general text, to measure forgetting on and to replay, is in no stream.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from runtime_py.loop.dialogue import Dialogue, Turn, check
from runtime_py.loop.errors import LoopError
from runtime_py.loop.stream import CONVERT, in_one, read_rows
from toolchain.compile.general_ids import general_ids

Rows = Literal["all", "development", "judging"]


@dataclass(frozen=True)
class Dataset:
    """``dialogues``: those that can be used, in the file's order. Of the ``rows`` so many are
    general text, so many have no reply, and so many are bad for another reason, of which ``bad``
    has the first sentence."""

    path: Path
    rows: int
    dialogues: tuple[Dialogue, ...]
    general: int
    without_reply: int
    unusable: int
    bad: str

    def of(self, rows: Rows) -> tuple[Dialogue, ...]:
        """A third, by the hash of the id, is for development; the rest is for judging."""
        if rows == "all":
            return self.dialogues
        wanted = rows == "development"
        return tuple(one for one in self.dialogues if for_development(one.id) is wanted)


def for_development(id: str) -> bool:
    """Whether a row is tuned on: whatever stream, seed or file it is in."""
    digest = hashlib.sha256(f"rows:{id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % 3 == 0


def read_dataset(path: Path) -> Dataset:
    """Raises ``LoopError`` where there is no such file, or it is damaged. A file that has not
    changed is read once a process."""
    try:
        known = path.stat()
    except OSError:
        return _read(path)
    return _cached(path.resolve(), known.st_mtime_ns, known.st_size)


@lru_cache(maxsize=32)
def _cached(path: Path, changed: int, size: int) -> Dataset:
    return _read(path)


def _read(path: Path) -> Dataset:
    bad: list[str] = []
    rows, without, general = 0, 0, 0
    found: dict[str, Dialogue] = {}
    for row in read_rows(path, lambda error: bad.append(str(error))):
        rows += 1
        if isinstance(row.id, str) and row.id in general_ids():
            general += 1
            continue
        turns = observed_turns(row.turns)
        if not turns:
            without += 1
            continue
        try:
            dialogue = check(Dialogue(row.id, turns))
            if dialogue.id in found:
                raise LoopError(f"the id {dialogue.id!r} stood in an earlier line.")
        except LoopError as error:
            bad.append(f"line {row.line} of {path}: {error}")
            continue
        found[dialogue.id] = dialogue
    if not rows:
        raise LoopError(
            in_one(path, bad)
            if bad
            else f"{path} has no dialogue: give one JSON object with id and turns a line.{CONVERT}"
        )
    sound = tuple(found.values())
    return Dataset(path, rows, sound, general, without, len(bad), bad[0] if bad else "")


def observed_turns(turns: tuple[tuple[Any, Any], ...]) -> tuple[Turn, ...]:
    """What the loop can observe of some turns; none where no reply is left."""
    spoken = [Turn(role, content) for role, content in turns if role != "system"]
    first = next((i for i, turn in enumerate(spoken) if turn.role != "assistant"), len(spoken))
    last = next((i for i in range(len(spoken), first, -1) if spoken[i - 1].role != "user"), first)
    return tuple(spoken[first:last])
