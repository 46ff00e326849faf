"""Rows of one message each as rows of whole conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from toolchain.streams.convert_rows import Fields, Raw

_CONVERSATIONS = tuple(
    f"{what}{end}"
    for what in (
        *("conversation", "conv", "dialogue", "dialog", "chat", "thread", "session"),
        *("ticket", "group", "channel"),
    )
    for end in ("id", "", "number")
)
_PLACES = ("turn", "turnid", "turnnumber", "messageindex", "messagenumber", "position", "seq")
_TIMES = ("timestamp", "time", "datetime", "date", "createdat", "created", "createtime", "sentat")
ROWS = "rows"  # the key under which a conversation has its rows


def conversations(rows: Iterable[Raw], fits: Callable[[Fields], bool]) -> Iterator[Raw]:
    """A row for each conversation, in the order of their first messages; a row that is no message
    stays by itself. Without a column that names them, all messages are one conversation. Messages
    are in the order of their numbers or times, where each of a conversation has one."""
    found: list[Raw | list[Raw]] = []
    groups: dict[Any, list[Raw]] = {}
    taken = list(rows)
    key = _key([row.fields for row in taken if fits(row.fields)])
    for row in taken:
        if row.problem or not fits(row.fields):
            found.append(row)
            continue
        name = _name(row.fields.get(key)) if key else None
        if name == "":
            found.append(Raw(row.place, problem="no conversation is named"))
            continue
        if name not in groups:
            found.append(groups.setdefault(name, []))
        groups[name].append(row)
    for one in found:
        yield one if isinstance(one, Raw) else _conversation(one, key)


def _name(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _key(rows: Sequence[Fields]) -> str | None:
    """An ``id`` names a conversation only where several rows have the same."""
    for key in _CONVERSATIONS:
        if any(not isinstance(row.get(key), list | dict | None) for row in rows):
            return key
    ids = [str(row["id"]) for row in rows if "id" in row]
    return "id" if len(set(ids)) < len(ids) else None


def _conversation(rows: Sequence[Raw], key: str | None) -> Raw:
    fields: Fields = {ROWS: [row.fields for row in _ordered(rows)]}
    if key is not None:
        fields["id"] = rows[0].fields.get(key)
    return Raw(rows[0].place, fields)


def _ordered(rows: Sequence[Raw]) -> Sequence[Raw]:
    for keys, reading in ((_PLACES, float), (_TIMES, _seconds)):
        for key in keys:
            try:
                places = [reading(row.fields[key]) for row in rows]
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
            return [rows[i] for i in sorted(range(len(rows)), key=places.__getitem__)]
    return rows


def _seconds(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        return datetime.fromisoformat(value).timestamp()
