"""Reads a stream of dialogue sets from JSONL, plain or gzip, and names the line of what is wrong.

Keys besides ``id`` and ``turns`` are the stream's own and are handed on unread.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from runtime_py.loop.dialogue import Dialogue, Turn, check
from runtime_py.loop.errors import DuplicateDialogue, LoopError


@dataclass(frozen=True)
class StreamRow:
    """A line as it stands: neither the id nor the turns (role and content) are checked."""

    line: int
    id: Any
    turns: tuple[tuple[Any, Any], ...]
    extra: dict[str, Any]


@dataclass(frozen=True)
class StreamRecord:
    """``line``: its number, from 1 on. ``extra``: keys besides ``id`` and ``turns``."""

    line: int
    dialogue: Dialogue
    extra: dict[str, Any]


def read_rows(path: Path, refuse: Callable[[LoopError], None] | None = None) -> Iterator[StreamRow]:
    """The lines of ``path`` that have an id and turns, whatever these are.

    A bad line raises ``LoopError``; with ``refuse``, its error goes there and reading goes on.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = _row(number, line, f"line {number} of {path}")
        except LoopError as error:
            if refuse is None:
                raise
            refuse(error)
            continue
        yield row


def read_stream(
    path: Path, refuse: Callable[[LoopError], None] | None = None
) -> Iterator[StreamRecord]:
    """The dialogues of ``path`` one by one, in order: for a stream that may be long.

    A bad line raises ``LoopError``; with ``refuse``, its error goes there and reading goes on.
    """
    seen: dict[str, int] = {}
    for row in read_rows(path, refuse):
        where = f"line {row.line} of {path}"
        try:
            record = _record(row, where)
            if first := seen.get(record.dialogue.id):
                raise DuplicateDialogue(
                    f"{where} has the id {record.dialogue.id!r} of line {first}; expected a new "
                    f"id for each dialogue."
                )
        except LoopError as error:
            if refuse is None:
                raise
            refuse(error)
            continue
        seen[record.dialogue.id] = row.line
        yield record


def read_dialogues(path: Path, most: int | None = None) -> list[Dialogue]:
    """The dialogues of ``path``, the first ``most`` of them: at least one, and none that is bad.

    Raises ``LoopError`` for the first line that cannot be used, and where there is no dialogue.
    """
    dialogues = [record.dialogue for record in islice(read_stream(path), most)]
    if not dialogues:
        raise LoopError(f"{path} has no dialogue: give one JSON object a line.")
    return dialogues


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                yield number, line
    except FileNotFoundError:
        raise LoopError(f"there is no stream at {path}; expected a JSONL file.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LoopError(
            f"{path} is damaged after line {number} ({error}); expected gzip, because its name "
            f"ends in .gz. Copy it again."
        ) from None
    except OSError as error:
        raise LoopError(f"{path} cannot be read: {error.strerror or error}.") from None


def _row(number: int, line: bytes, where: str) -> StreamRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LoopError(
            f"{where} is not UTF-8 (byte {error.start + 1}: {error.reason}); save it as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise LoopError(
            f"{where} is not JSON (column {error.colno}: {error.msg}); expected one object a line."
        ) from None
    except RecursionError:
        raise LoopError(f"{where} is nested too deeply; expected id and turns.") from None
    if not isinstance(row, dict):
        raise LoopError(f"{where} holds a {type(row).__name__}; expected an object.")
    if missing := [key for key in ("id", "turns") if key not in row]:
        raise LoopError(f"{where} has no {' and no '.join(missing)}; expected id and turns.")
    turns = row["turns"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LoopError(f"{where} has turns that are not a list of objects with role and content.")
    for position, turn in enumerate(turns, start=1):
        if missing := [key for key in ("role", "content") if key not in turn]:
            raise LoopError(f"{where}: turn {position} has no {' and no '.join(missing)}.")
    extra = {key: value for key, value in row.items() if key not in ("id", "turns")}
    return StreamRow(number, row["id"], tuple((t["role"], t["content"]) for t in turns), extra)


def _record(row: StreamRow, where: str) -> StreamRecord:
    dialogue = Dialogue(row.id, tuple(Turn(role, content) for role, content in row.turns))
    try:
        check(dialogue)
    except LoopError as error:
        raise LoopError(f"{where}: {error}") from None
    return StreamRecord(row.line, dialogue, row.extra)
