"""Messages as the turns that the loop can observe: by rules that docs/streams.md states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from runtime_py.loop.dialogue import Turn, unusable_character
from toolchain.streams.convert_formats import Message, Unusable

SYSTEM, EMPTY = "system texts", "empty turns"
JOINED = "turns joined to the one before, of the same role"
BEFORE, AFTER = "assistant's turns before the user's first", "user's turns after the last reply"
FOREIGN = "exchanges with an image, a sound or a file, and those after them"


@dataclass
class _Run:
    """Messages of one role, one after the other."""

    role: str
    texts: list[str]
    foreign: bool


def observed(messages: Sequence[Message]) -> tuple[tuple[Turn, ...], Counter[str]]:
    """User and assistant by turns, and how often which rule was needed. Raises ``Unusable`` where
    no reply is left, or a text holds what no dialogue may."""
    changed: Counter[str] = Counter()
    runs = _runs(messages, changed)
    while runs and runs[0].role == "assistant":
        runs.pop(0)
        changed[BEFORE] += 1
    if runs and runs[-1].role == "user":
        runs.pop()
        changed[AFTER] += 1
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    whole = next((i for i, pair in enumerate(pairs) if any(r.foreign for r in pair)), len(pairs))
    if whole < len(pairs):
        changed[FOREIGN] += len(pairs) - whole
    if not whole:
        why = "of those without an image, a sound or a file " if changed[FOREIGN] else ""
        raise Unusable(f"no reply to a user's turn {why}is left")
    turns = tuple(_turn(run) for pair in pairs[:whole] for run in pair)
    return turns, changed


def _runs(messages: Sequence[Message], changed: Counter[str]) -> list[_Run]:
    runs: list[_Run] = []
    for one in messages:
        changed.update(one.left)
        if one.role == "tool":
            continue
        if one.role == "system":
            changed[SYSTEM] += 1
            continue
        if not one.text.strip() and not one.foreign:
            changed[EMPTY] += not one.left
            continue
        if runs and runs[-1].role == one.role:
            runs[-1].texts.append(one.text)
            runs[-1].foreign |= one.foreign
            changed[JOINED] += 1
        else:
            runs.append(_Run(one.role, [one.text], one.foreign))
    return runs


def _turn(run: _Run) -> Turn:
    text = "\n\n".join(run.texts)
    found = unusable_character(text)
    if found is not None and found[0] >= "\ud800":
        raise Unusable("a lone surrogate, which is not Unicode text")
    if found is not None:
        raise Unusable(f"the control character U+{ord(found[0]):04X}")
    return Turn("user" if run.role == "user" else "assistant", text)
