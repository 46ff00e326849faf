"""The rows of a file of chats: JSON lines, a JSON array or object, CSV or TSV, plain or gzip.

What it is is told by what is in it, not by its name. Names of keys and columns are compared without
case, blanks and signs: ``Conversation ID`` is ``conversationid``.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from runtime_py.loop.errors import LoopError
from runtime_py.loop.raw_lines import raw_lines

Fields = dict[str, Any]
Known = Callable[[Fields], bool]

_ENCODINGS = {  # the longer marks first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DELIMITERS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "CSV with bars"}
_LISTS = {"messages", "conversations", "conversation", "turns", "dialogue", "dialog", "chat"}
_LONGEST_CELL = 2**31 - 1  # characters: what the csv module takes at most on any system


@dataclass(frozen=True)
class Raw:
    """``place``: in words; ``fields``: by name; ``problem``: why there are none."""

    place: str
    fields: Fields = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Rows:
    """``container``: what the file is; ``rows``: read as they are asked for."""

    container: str
    rows: Iterator[Raw]


def read_rows_of(
    path: Path, known: Known, headless: bool, told: Callable[[int], None] | None = None
) -> Rows:
    """``known``: whether some format has such a row; ``headless``: two columns without a header
    are taken for ``prompt`` and ``response``; ``told``: gets how many bytes are read.

    Raises ``LoopError`` where the file as a whole cannot be read.
    """
    lines = _text_lines(path, told)
    blank, head = 0, ""
    for _, head in lines:
        if head.strip():
            break
        blank += 1
    if not head.strip():
        raise LoopError(f"{path} is empty; expected chats in JSON, JSON lines, CSV or TSV.")
    if "\0" in head:
        raise LoopError(
            f"line {blank + 1} of {path} has a NUL; expected text. Where the file is UTF-16, save "
            f"it as UTF-8; else it is damaged."
        )
    second = next((pair for pair in lines if pair[1].strip()), None)
    numbered = chain([(blank + 1, head)], [second] if second else [], lines)
    start = head.lstrip()[0]
    value = _parsed(head) if start == "{" else None
    if isinstance(value, dict) and (second is not None or known(_row("", value).fields)):
        return _json_lines(numbered)
    text = "\n" * blank + "".join(line for _, line in numbered)
    if start in "[{":
        return _json(path, text, head, known)
    return _csv(path, text.lstrip("\n"), known, headless)


def _text_lines(path: Path, told: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
    lines = raw_lines(path, told)
    first = next(lines, (1, b""))
    for mark, encoding in _ENCODINGS.items():
        if first[1].startswith(mark):
            text = _decoded(b"".join([first[1], *(line for _, line in lines)]), encoding, f"{path}")
            yield from enumerate(io.StringIO(text, newline="\n"), start=1)
            return
    for number, line in chain([first], lines):
        text = _decoded(line, "utf-8", f"line {number} of {path}")
        yield number, text.removeprefix("\ufeff")


def _decoded(raw: bytes, encoding: str, where: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise LoopError(
            f"{where} is not {encoding.upper()} (byte {error.start + 1}: {error.reason}); save it "
            f"as UTF-8."
        ) from None


def _parsed(text: str) -> Any:
    """The value; a ``LoopError`` with the reason where it is no JSON, or too deep."""
    try:
        return json.loads(text, parse_constant=lambda name: None)  # NaN is how some write nothing
    except json.JSONDecodeError as error:
        return LoopError(f"line {error.lineno}, column {error.colno}: {error.msg}")
    except RecursionError:
        return LoopError("it is nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return LoopError(str(error))


def _row(place: str, value: Any) -> Raw:
    if isinstance(value, LoopError):
        return Raw(place, problem="no JSON")
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return Raw(place, {"messages": value})
    if not isinstance(value, dict):
        return Raw(place, problem="neither an object nor a list of messages")
    return Raw(place, {named(key): one for key, one in value.items()})


def named(key: str) -> str:
    """A key or a column's head as it is compared."""
    return "".join(c for c in key.lower() if c.isalnum())


def _json_lines(lines: Iterable[tuple[int, str]]) -> Rows:
    rows = (_row(f"line {number}", _parsed(line)) for number, line in lines if line.strip())
    return Rows("JSON lines", rows)


def _json(path: Path, text: str, head: str, known: Known) -> Rows:
    value = _parsed(text)
    if isinstance(value, LoopError):
        lines = list(enumerate(io.StringIO(text, newline="\n"), start=1))
        second = next((line for _, line in islice(lines, 1, None) if line.strip()), "")
        a_line = _parsed(head), _parsed(second)
        if isinstance(a_line[0], list) or (head.lstrip()[0] == "{" and isinstance(a_line[1], dict)):
            return _json_lines(lines)
        raise LoopError(f"{path} is no JSON ({value}); expected an array, or an object a line.")
    what, rows = "a JSON array", value
    if isinstance(value, dict):
        what, rows = _unwrapped(path, value, known)
    return Rows(what, (_row(f"row {number}", one) for number, one in enumerate(rows, start=1)))


def _unwrapped(path: Path, value: Fields, known: Known) -> tuple[str, list[Any]]:
    """A row by itself, or the one list of rows in an object."""
    if known(_row("", value).fields):
        return "a JSON object", [value]
    lists = {
        key: one
        for key, one in value.items()
        if isinstance(one, list) and one and all(isinstance(row, dict) for row in one)
    }
    if len(lists) != 1:
        raise LoopError(
            f"{path} is an object of {', '.join(map(repr, value)) or 'nothing'}; expected a list "
            f"of chats, or one list in an object."
        )
    ((key, rows),) = lists.items()
    return f"the JSON array {key!r}", rows


def _csv(path: Path, text: str, known: Known, headless: bool) -> Rows:
    csv.field_size_limit(_LONGEST_CELL)
    heads = {delimiter: _head(text, delimiter) for delimiter in _DELIMITERS}
    delimiter = max(heads, key=lambda d: (known(dict.fromkeys(heads[d], "")), len(heads[d])))
    head = heads[delimiter]
    whole = headless and len(head) == 2 and not known(dict.fromkeys(head, ""))
    if whole:
        head = ["prompt", "response"]
    rows: list[Raw] = []
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        skipinitialspace=_is_spaced(text, delimiter),
    )
    try:
        for number, cells in enumerate(reader, start=1):
            if not cells or (number == 1 and not whole):
                continue
            place = f"line {reader.line_num}"
            if len(cells) > len(head):
                rows.append(Raw(place, problem="more fields than the header names"))
            else:
                rows.append(Raw(place, dict(zip(head, map(_cell, head, cells), strict=False))))
    except csv.Error as error:
        raise LoopError(
            f"line {reader.line_num} of {path} is no {_DELIMITERS[delimiter]} ({error}); expected "
            f"fields with line breaks or quotes in double quotes."
        ) from None
    return Rows(_DELIMITERS[delimiter] + " without a header" * whole, iter(rows))


def _cell(head: str, text: str) -> Any:
    """A list of messages that stands in a cell as JSON or Python has it, or the text."""
    if head not in _LISTS:
        return text
    value = _parsed(text)
    if isinstance(value, LoopError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    return value if isinstance(value, list) else text


def _head(text: str, delimiter: str) -> list[str]:
    return [named(cell) for cell in _head_cells(text, delimiter)]


def _is_spaced(text: str, delimiter: str) -> bool:
    """Whether fields are set apart by a space too, behind which a quote opens one."""
    cells = _head_cells(text, delimiter)
    return len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])


def _head_cells(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error:
        return []
