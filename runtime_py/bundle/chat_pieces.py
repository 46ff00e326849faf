"""A dialogue's text by the manifest's pieces: what stands around the words of user and assistant.

A piece is text and the ids of special tokens. What lies between two special tokens, pieces and
words together, is one text, in which nothing is a special token: a user's words stay words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runtime_py.bundle.manifest import ChatPieces, Item, Strip, Tokenizer
from runtime_py.loop.dialogue import Turn

UNSAID = -1  # what no assistant's turn says


@dataclass(frozen=True)
class Part:
    """``item``: text, or a special token's id. ``said``: the index of the assistant's turn that it
    is of, and that a model which learns this turn has to write; ``UNSAID``: none."""

    item: Item
    said: int = UNSAID


@dataclass(frozen=True)
class Segment:
    """A special token's id, or the text up to the next one, and which of its characters are said:
    (begin, end, the turn's index)."""

    item: Item
    said: tuple[tuple[int, int, int], ...]


def parts_of(
    facts: Tokenizer, turns: Sequence[Turn], reply: bool = False, prefix: str = ""
) -> list[Part]:
    """What ``turns`` are written as; ``reply``: up to where the assistant begins to speak, and the
    ``prefix`` that its reply begins with."""
    chat, last = facts.chat, len(turns) - 1
    parts = [Part(item) for item in chat.begin]
    for index, turn in enumerate(turns):
        strip = _strip(chat, turn.role, index == last)
        if turn.role == "user":
            parts.append(Part(words(turn.content, strip, facts.normalize)))
            if index < last:
                parts += _opened(chat, index + 1 == last, index + 1)
            else:
                after = chat.reply if reply else chat.unanswered
                parts += [Part(item) for item in after]
            continue
        parts.append(Part(words(turn.content, strip, facts.normalize), index))
        following, ended = chat.end if index == last else chat.ask, closing(chat, facts.eos_ids)
        rest = without(following, ended)
        parts += [Part(item, index) for item in (() if rest is None else ended)]
        parts += [Part(item) for item in (following if rest is None else rest)]
    if prefix:
        parts.append(Part(words(prefix, Strip(), facts.normalize)))
    return parts


def _strip(chat: ChatPieces, role: str, last: bool) -> Strip:
    if role == "user":
        return chat.last_user if last else chat.user
    return chat.last_assistant if last else chat.assistant


def _opened(chat: ChatPieces, last: bool, turn: int) -> list[Part]:
    """What stands between the user's words and the assistant's: what a model is given before its
    reply, and what it has to write itself before its words."""
    items = chat.last_answer if last else chat.answer
    own = without(items, chat.reply)
    if own is None:  # such a turn is never learned
        return [Part(item) for item in items]
    return [Part(item) for item in chat.reply] + [Part(item, turn) for item in own]


def closing(chat: ChatPieces, eos_ids: Collection[int]) -> tuple[Item, ...]:
    """What ends the assistant's last words and is said too: up to the first end token, or all of
    ``end`` where it has none."""
    for place, item in enumerate(chat.end):
        if item in eos_ids:
            return chat.end[: place + 1]
    return chat.end


def written_alike(chat: ChatPieces, eos_ids: Collection[int]) -> bool:
    """Whether what is learned of an assistant's turn is the same where more turns follow."""
    return (
        chat.answer == chat.last_answer
        and chat.assistant == chat.last_assistant
        and without(chat.ask, closing(chat, eos_ids)) is not None
    )


def without(items: Sequence[Item], prefix: Sequence[Item]) -> tuple[Item, ...] | None:
    """``items`` without what they begin with; None where they begin otherwise."""
    rest = list(items)
    for place, item in enumerate(prefix):
        if not rest:
            return None
        if rest[0] == item:
            rest.pop(0)
            continue
        whole, last = rest[0], place == len(prefix) - 1
        if not (last and isinstance(whole, str) and isinstance(item, str)):
            return None
        if not whole.startswith(item):
            return None
        rest[0] = whole[len(item) :]
    return tuple(rest)


def words(content: str, strip: Strip, normalize: str | None) -> str:
    """A turn's content as it is written."""
    content = content.lstrip(strip.left) if strip.left else content
    content = content.rstrip(strip.right) if strip.right else content
    return unicodedata.normalize("NFC", content) if normalize == "NFC" else content


def segments(parts: Sequence[Part]) -> list[Segment]:
    """Adjacent texts joined."""
    joined: list[Segment] = []
    text, said = "", []
    for part in (*parts, Part(UNSAID)):
        if isinstance(part.item, str):
            if part.said != UNSAID and part.item:
                said.append((len(text), len(text) + len(part.item), part.said))
            text += part.item
            continue
        if text:
            joined.append(Segment(text, tuple(said)))
            text, said = "", []
        ranges = ((0, 1, part.said),) if part.said != UNSAID else ()
        joined.append(Segment(part.item, ranges))
    return joined[:-1]
