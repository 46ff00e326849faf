"""Reads a stream of dialogue sets from JSONL, plain or gzip, and names the line of what is wrong.

Every command reads dialogues here. The text is UTF-8, a byte order mark is skipped. Keys besides
``id`` and ``turns`` are the stream's own and are handed on unread.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from runtime_py.loop.dialogue import Dialogue, Turn, check
from runtime_py.loop.errors import DuplicateDialogue, LoopError
from runtime_py.loop.raw_lines import raw_lines

CONVERT = " attune data convert writes such a file from other formats."
_SHOWN = 20  # misfits in a message
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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

    Raises ``LoopError`` for all lines that cannot be used, and where there is no dialogue.
    """
    misfits: list[str] = []
    records = islice(read_stream(path, lambda error: misfits.append(str(error))), most)
    dialogues = [record.dialogue for record in records]
    if misfits:
        raise LoopError(in_one(path, misfits))
    if not dialogues:
        raise LoopError(f"{path} has no dialogue: give one JSON object a line.{CONVERT}")
    return dialogues


def in_one(path: Path, misfits: Sequence[str]) -> str:
    """The sentences of lines that cannot be used as one message; the first 20 of them."""
    if len(misfits) == 1:
        return misfits[0]
    sentences = [one.removesuffix(CONVERT) for one in misfits[:_SHOWN]]
    more = f" … and {len(misfits) - _SHOWN:,} more." if len(misfits) > _SHOWN else ""
    other = CONVERT if any(one.endswith(CONVERT) for one in misfits) else ""
    return f"{len(misfits):,} lines of {path} cannot be used. {' '.join(sentences)}{more}{other}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Those that are not blank, without a byte order mark; files of several may be joined."""
    for number, line in raw_lines(path):
        if number == 1 and line.startswith(_WIDE):
            raise LoopError(
                f"{path} is UTF-16 or UTF-32; expected UTF-8. Save it as UTF-8, or let attune data "
                f"convert do so."
            )
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _row(number: int, line: bytes, where: str) -> StreamRow:
    row = _object(line, where)
    if missing := [key for key in ("id", "turns") if key not in row]:
        raise LoopError(
            f"{where} has no {' and no '.join(missing)}; expected id and turns.{CONVERT}"
        )
    turns = row["turns"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LoopError(f"{where} has turns that are not a list of objects with role and content.")
    for position, turn in enumerate(turns, start=1):
        if missing := [key for key in ("role", "content") if key not in turn]:
            raise LoopError(f"{where}: turn {position} has no {' and no '.join(missing)}.")
    extra = {key: value for key, value in row.items() if key not in ("id", "turns")}
    _check_extra(extra, where)
    return StreamRow(number, row["id"], tuple((t["role"], t["content"]) for t in turns), extra)


def _object(line: bytes, where: str) -> dict[str, Any]:
    if 0 in line:
        raise LoopError(
            f"{where} has a NUL (byte {line.index(0) + 1}); expected text. Where the file is "
            f"UTF-16, save it as UTF-8; else it is damaged."
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LoopError(
            f"{where} is not UTF-8 (byte {error.start + 1}: {error.reason}); save it as UTF-8."
        ) from None
    try:
        row = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeated_key)
    except json.JSONDecodeError as error:
        raise LoopError(
            f"{where} is not JSON (column {error.colno}: {error.msg}); expected one object a "
            f"line.{CONVERT}"
        ) from None
    except RecursionError:
        raise LoopError(f"{where} is nested too deeply; expected id and turns.") from None
    except ValueError as error:  # of a number, a constant or a key
        raise LoopError(f"{where} is not JSON ({error}); expected one object a line.") from None
    if not isinstance(row, dict):
        raise LoopError(f"{where} holds a {type(row).__name__}; expected an object.{CONVERT}")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _no_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keyed = dict(pairs)
    if len(keyed) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return keyed


def _check_extra(extra: dict[str, Any], where: str) -> None:
    for key, value in extra.items():
        try:
            json.dumps([key, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise LoopError(
                f"{where} has a lone surrogate in {key!r}, which is not valid UTF-8; expected "
                f"Unicode text."
            ) from None


def _record(row: StreamRow, where: str) -> StreamRecord:
    dialogue = Dialogue(row.id, tuple(Turn(role, content) for role, content in row.turns))
    try:
        check(dialogue)
    except LoopError as error:
        known = all(role in ("user", "assistant") for role, _ in row.turns)
        hint = "" if known else CONVERT
        raise LoopError(f"{where}: {error}{hint}") from None
    return StreamRecord(row.line, dialogue, row.extra)
