"""A compiled template's text as the manifest's pieces: text, and the ids of special tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from runtime_py.bundle import manifest as m
from toolchain.compile.chat_template import SPACES, TemplateText
from toolchain.compile.tokenizer_rewriting import AddedToken, Spaced

TEXTS = ("begin", "answer", "ask", "last_answer", "end", "reply", "unanswered")
# Whose words stand before and after each of them.
_BESIDE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "begin": ((), ("user", "last_user")),
    "answer": (("user",), ("assistant",)),
    "ask": (("assistant",), ("user", "last_user")),
    "last_answer": (("user",), ("last_assistant",)),
    "end": (("last_assistant",), ()),
    "reply": (("last_user",), ()),
    "unanswered": (("last_user",), ()),
}
_SPACE = " "


def chat_pieces(
    template: TemplateText, controls: Mapping[str, AddedToken], spaced: Spaced
) -> m.ChatPieces:
    """The template's text with the ids of special tokens in it. What a special token eats of the
    white space beside it is not written, or is stripped off the words."""
    strips = dict(template.strips)
    found: dict[str, tuple[m.Item, ...]] = {}
    for name in TEXTS:
        text = getattr(template, name)
        items = _spaced(_itemized(text, controls), spaced, name == "begin")
        found[name] = tuple(item if isinstance(item, str) else item["id"] for item in items)
        before, after = _BESIDE[name]
        if items and not isinstance(items[0], str) and items[0]["lstrip"]:
            _strip(strips, before, "right")
        if items and not isinstance(items[-1], str) and items[-1]["rstrip"]:
            _strip(strips, after, "left")
    pieces: dict[str, Any] = {**found, **strips}
    return m.ChatPieces(**pieces, date=template.date, read=template.read)


def _strip(strips: dict[str, m.Strip], whose: Sequence[str], side: str) -> None:
    for name in whose:
        strips[name] = strips[name].model_copy(update={side: SPACES})


def _itemized(text: str, controls: Mapping[str, AddedToken]) -> list[str | AddedToken]:
    """Text and special tokens, the longest of those that begin at one place."""
    longest_first = sorted(controls, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    items: list[str | AddedToken] = []
    for part in re.split(f"({pattern})", text):
        if part in controls:
            token = controls[part]
            if token["lstrip"] and items and isinstance(items[-1], str):
                items[-1] = items[-1].rstrip(SPACES)
            items.append(token)
        elif part:
            eaten = items and not isinstance(items[-1], str) and items[-1]["rstrip"]
            items.append(part.lstrip(SPACES) if eaten else part)
    return [item for item in items if item != ""]


def _spaced(items: list[str | AddedToken], spaced: Spaced, begins: bool) -> list[str | AddedToken]:
    """With the spaces that Metaspace would write; what is said may follow the last item."""
    made: list[str | AddedToken] = []
    for place, item in enumerate([*items, ""]):
        first = begins and place == 0
        after = place > 0 and not isinstance(items[place - 1], str)
        wanted = (spaced is not None and first) or (spaced == "each" and after)
        if isinstance(item, str):
            item = _SPACE + item if wanted and not item.startswith(_SPACE) else item
        made.append(item)
    return [item for item in made if item != ""]
