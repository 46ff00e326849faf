"""Regular expressions of a downloaded adapter: Python's answers, in a bounded time.

Python's ``re`` tries one way through an expression after the other, and ``(a+)+$`` has more ways
than anyone waits for. Here the tree that ``re`` parses is walked with all places at once that a
prefix may end at (Thompson, 1968). What does not remember what it matched has the same answer then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]  # re has no public parser
from re import _parser  # type: ignore[attr-defined]

from runtime_py.loop.errors import AdapterError

_STEPS = 100_000  # of one match; the expressions of real adapters need a few thousand
_CLASSES: dict[object, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_ONE_CHARACTER = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_LOOKS, _AHEAD = (op.ASSERT, op.ASSERT_NOT), 1
_PLACES = (
    op.AT_BEGINNING,
    op.AT_BEGINNING_STRING,
    op.AT_END,
    op.AT_END_STRING,
    op.AT_BOUNDARY,
    op.AT_NON_BOUNDARY,
)


def full_match(pattern: str, name: str) -> bool:
    """Whether ``re.fullmatch(pattern, name)`` finds something.

    Raises ``AdapterError`` for a pattern that ``check_pattern`` refuses, or that is too long a work
    for this name.
    """
    return len(name) in _Walk(pattern, name).ends(_parsed(pattern), {0})


def tail_match(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the end of ``name`` from its start or a dot on, as the keys of
    PEFT's rank_pattern and alpha_pattern do. Raises ``AdapterError`` as ``full_match``."""
    if _is_name(pattern):  # may be one of hundreds
        return _tail(pattern).match(name) is not None
    whole = _tail_of(pattern)
    return bool(_Walk(pattern, name).ends(_parsed(whole), {0}))


def check_pattern(pattern: str, field: str, tail: bool = False) -> None:
    """Raises ``AdapterError``, naming ``field``, for no regular expression, or one that remembers:
    with flags, references, looks back or atomic groups. ``tail``: it is for ``tail_match``."""
    try:
        re.compile(pattern)  # its error names the right column
        tree = _parsed(_tail_of(pattern) if tail else pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{field} has {pattern!r}, no regular expression: {error}.") from None
    if tree.state.flags & ~re.UNICODE or (odd := _odd(tree)):
        what = "flags" if tree.state.flags & ~re.UNICODE else odd
        raise AdapterError(
            f"{field} has {pattern!r}, a regular expression with {what}; expected one of names, "
            f"classes, groups, alternatives, repetitions and looks ahead. List the modules' names."
        )


def _is_name(pattern: str) -> bool:
    return re.fullmatch(r"(?:[\w-]|\\?\.)+", pattern) is not None


def _tail_of(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


@lru_cache(4096)
def _tail(pattern: str) -> re.Pattern[str]:
    return re.compile(_tail_of(pattern))


@lru_cache(4096)
def _parsed(pattern: str) -> _parser.SubPattern:
    return _parser.parse(pattern)


def _odd(tree: _parser.SubPattern) -> str | None:
    """The first thing in it that ``_Walk`` does not know, by re's name."""
    for kind, value in tree:
        inner: list[_parser.SubPattern] = []
        if kind is op.BRANCH:
            inner = value[1]
        elif kind is op.SUBPATTERN:
            if value[1] or value[2]:
                return "flags"
            inner = [value[3]]
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            inner = [value[2]]
        elif kind in _LOOKS and value[0] == _AHEAD:
            inner = [value[1]]
        elif not (kind in _ONE_CHARACTER or (kind is op.AT and value in _PLACES)):
            return str(kind)
        for part in inner:
            if (odd := _odd(part)) is not None:
                return odd
    return None


class _Walk:
    """One pattern in one name. A place is a number of characters from the name's start."""

    def __init__(self, pattern: str, name: str) -> None:
        self._pattern, self._name = pattern, name
        self._left = _STEPS

    def ends(self, tree: _parser.SubPattern, starts: Set[int]) -> Set[int]:
        """The places where ``tree`` can end that begins at one of ``starts``."""
        places = starts
        for kind, value in tree:
            self._left -= 1 + len(places)
            if self._left < 0:
                raise AdapterError(
                    f"the regular expression {self._pattern!r} is too long a work for "
                    f"{self._name!r}; list the modules' names."
                )
            if kind in _ONE_CHARACTER:
                places = {p + 1 for p in places if self._fits(kind, value, p)}
            elif kind is op.AT:
                places = {p for p in places if self._is_at(value, p)}
            elif kind is op.BRANCH:
                places = frozenset().union(*(self.ends(part, places) for part in value[1]))
            elif kind is op.SUBPATTERN:
                places = self.ends(value[3], places)
            elif kind in _LOOKS:
                wanted = kind is op.ASSERT
                places = {p for p in places if bool(self.ends(value[1], {p})) == wanted}
            else:
                places = self._repeated(value, places)
            if not places:
                break
        return places

    def _repeated(self, what: tuple[int, int, _parser.SubPattern], at: Set[int]) -> Set[int]:
        least, most, tree = what
        # Places only grow: after as many times as there are places, one more changes nothing.
        enough = len(self._name) + 2
        for _ in range(min(least, enough)):
            at = self.ends(tree, at)
        new, every = at, set(at)
        for _ in range(min(most - least, enough)):
            new = self.ends(tree, new) - every
            if not new:
                break
            every |= new
        return every

    def _fits(self, kind: object, value: object, place: int) -> bool:
        if place == len(self._name):
            return False
        character = self._name[place]
        if kind is op.ANY:
            return character != "\n"
        if kind is op.IN:
            return _is_in(value, character)
        return (ord(character) == value) == (kind is op.LITERAL)

    def _is_at(self, where: object, place: int) -> bool:
        name, end = self._name, len(self._name)
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return place == 0
        if where is op.AT_END_STRING:
            return place == end
        if where is op.AT_END:
            return place == end or (place == end - 1 and name[place] == "\n")
        word = _CLASSES[op.CATEGORY_WORD]
        before = place > 0 and word(name[place - 1])
        after = place < end and word(name[place])
        # An empty text has no boundary, and to Python 3.11 no place that is none.
        return end > 0 and (before != after) == (where is op.AT_BOUNDARY)


def _is_in(parts: object, character: str) -> bool:
    negated, found = False, False
    for kind, value in parts:  # type: ignore[attr-defined]
        if kind is op.NEGATE:
            negated = True
        elif kind is op.LITERAL:
            found |= ord(character) == value
        elif kind is op.RANGE:
            found |= value[0] <= ord(character) <= value[1]
        else:
            found |= _CLASSES[value](character)
    return found != negated
