"""Rows of one message each as rows of whole conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from math import isfinite
from typing import Any

from runtime_py.loop.errors import LoopError
from toolchain.streams.convert_formats import ROLES, TEXTS, first_key
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
_DAY, _CLOCK = "date", "time"  # which may be one time in two columns
_FORMS = tuple(
    day + clock
    for day in (
        *("%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%Y/%m/%d", "%d.%m.%Y", "%d.%m.%y"),
        *("%d-%m-%Y", "%m-%d-%Y", "%d-%b-%Y", "%d-%b-%y", "%b %d %Y", "%d %b %Y"),
    )
    for clock in ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
)
_UNREAD = "times that cannot be read, or in two orders: write them as 2024-07-26 10:05"
_ANSWERED = ("parentid", "parentmessageid", "parent")
ROWS = "rows"  # the key under which a conversation has its rows


def conversations(rows: Iterable[Raw], fits: Callable[[Fields], bool]) -> Iterator[Raw]:
    """A row for each conversation, in the order of their first messages; a row that is no message
    stays by itself. Without a column that names them, all messages are one conversation. Messages
    are in the order of their numbers or times, where each of a conversation has one.

    Raises ``LoopError`` where a column that is not known seems to name them."""
    found: list[Raw | list[Raw]] = []
    groups: dict[Any, list[Raw]] = {}
    taken = list(rows)
    messages = [row.fields for row in taken if fits(row.fields)]
    key = _key(messages)
    if key is None and (columns := _perhaps(messages)):
        raise LoopError(
            f"several conversations seem to be told apart by {' or '.join(columns)}, which is no "
            f"name that is known for that: call the one that does conversation_id. Where all "
            f"messages are one conversation, leave those out."
        )
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


def _perhaps(rows: Sequence[Fields]) -> list[str]:
    """The columns most of whose values stand beside the messages of several speakers."""
    known = {*ROLES, *TEXTS, *_PLACES, *_TIMES}
    found = []
    for column in dict.fromkeys(name for row in rows for name in row if name not in known):
        speakers: dict[str, set[str]] = {}
        for row in rows:
            value = row.get(column)
            if isinstance(value, str | int | float) and (name := _name(value)):
                speakers.setdefault(name, set()).add(str(row[first_key(row, ROLES) or ""]))
        several = sum(len(who) > 1 for who in speakers.values())
        if several > 1 and 2 * several > len(speakers):
            found.append(column)
    return found


def _conversation(rows: Sequence[Raw], key: str | None) -> Raw:
    if any(_branches(rows, column) for column in _ANSWERED):
        return Raw(rows[0].place, problem="a tree: several messages answer the same one")
    ordered = _ordered(rows)
    if ordered is None:
        return Raw(rows[0].place, problem=_UNREAD)
    fields: Fields = {ROWS: [row.fields for row in ordered]}
    if key is not None:
        fields["id"] = rows[0].fields.get(key)
    return Raw(rows[0].place, fields)


def _branches(rows: Sequence[Raw], column: str) -> bool:
    """Whether ``column`` says of several messages that they answer the same one."""
    answered = Counter(_name(row.fields.get(column)) for row in rows)
    return any(count > 1 for one, count in answered.items() if one)


def _ordered(rows: Sequence[Raw]) -> Sequence[Raw] | None:
    """None where all have a time, and which of them is earlier cannot be told."""
    fields = [row.fields for row in rows]
    for key in _PLACES:
        try:
            places = [_number(row[key]) for row in fields]
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        return [rows[i] for i in sorted(range(len(rows)), key=places.__getitem__)]
    whole = [
        [" ".join(_name(row[key]) for key in keys) for row in fields]
        for keys in ((_DAY, _CLOCK), *((key,) for key in _TIMES))
        if all(_name(row.get(key)) for row in fields for key in keys)
    ]
    orders = next((found for times in whole if (found := _orders(times))), None)
    if orders is None:
        return None if whole else rows
    return [rows[i] for i in orders.pop()] if len(orders) == 1 else None


def _orders(times: Sequence[str]) -> set[tuple[int, ...]]:
    """Those of the rows by every way to read all the times: 2/1/2024 has two."""
    found = set()
    readings: list[Callable[[str], float]] = [_seconds, *(partial(_local, f) for f in _FORMS)]
    for reading in readings:
        try:
            places = [reading(time) for time in times]
        except (ValueError, OverflowError):
            continue
        found.add(tuple(sorted(range(len(times)), key=places.__getitem__)))
        if reading is _seconds:
            break
    return found


def _number(value: Any) -> float:
    """Raises ``ValueError`` also for what has no place among numbers."""
    number = float(value)
    if not isfinite(number):
        raise ValueError(f"{value} is no number.")
    return number


def _seconds(value: str) -> float:
    try:
        return _number(value)
    except ValueError:
        return _since_1970(datetime.fromisoformat(value))


def _local(form: str, value: str) -> float:
    return _since_1970(datetime.strptime(value.replace(",", ""), form))


def _since_1970(time: datetime) -> float:
    """Seconds; without a time zone in UTC, since no clock of this machine may decide an order."""
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
