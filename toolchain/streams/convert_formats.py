"""The formats that chats are kept in: which keys each has, and the messages of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolchain.streams.convert_rows import Fields, named

TOOLS, REASONING = "tool calls and their results", "reasoning"
_USERS = {"user", "human", "prompter", "customer", "client", "question", "visitor", "me"}
_ASSISTANTS = {"assistant", "gpt", "bot", "ai", "model", "chatgpt", "chatbot", "agent", "answer"}
_SYSTEMS = {"system", "developer"}
_TOOLS = {"tool", "function", "functioncall", "toolcall", "toolresponse", "observation", "ipython"}

ROLES = ("role", "from", "speaker", "sender", "author", "name")
TEXTS = ("content", "value", "text", "message", "utterance", "body")
_TEXT_PARTS = {None, "text", "inputtext", "outputtext", "refusal"}
_TOOL_PARTS = {"tooluse", "toolresult", "toolcall", "functioncall", "functioncalloutput"}
_REASONING_PARTS = {"thinking", "redactedthinking", "reasoning"}
_PAIRS = (
    *(("prompt", answer) for answer in ("response", "completion", "output", "answer", "reply")),
    *(("question", answer) for answer in ("answer", "response", "reply")),
    *(("query", answer) for answer in ("response", "answer")),
    *(("input", "output"), ("inputs", "targets"), ("request", "response"), ("q", "a")),
    *(("user", "assistant"), ("human", "assistant"), ("human", "bot"), ("human", "gpt")),
)


class Unusable(Exception):  # noqa: N818 - what a row is, not that it is an error
    """Why a row gives no dialogue, in a few words that many rows can share."""


@dataclass(frozen=True)
class Message:
    """``role``: user, assistant, system or tool. ``left``: what of it is left out, by name;
    ``foreign``: it holds an image, a sound or a file."""

    role: str
    text: str
    left: tuple[str, ...] = ()
    foreign: bool = False


@dataclass(frozen=True)
class Speakers:
    """Names of users and assistants besides those that are known."""

    users: frozenset[str] = field(default_factory=frozenset)
    assistants: frozenset[str] = field(default_factory=frozenset)

    def role(self, name: Any) -> str:
        """Raises ``Unusable``."""
        if isinstance(name, Mapping):  # ChatGPT's author
            name = name.get("role")
        if not isinstance(name, str) or not name.strip():
            raise Unusable("a message has no role")
        if name in self.users or name in self.assistants:
            return "user" if name in self.users else "assistant"
        known = {"user": _USERS, "assistant": _ASSISTANTS, "system": _SYSTEMS, "tool": _TOOLS}
        for role, names in known.items():
            if named(name) in names:
                return role
        raise Unusable(f"the role {name!r:.40} is not known")


@dataclass(frozen=True)
class Format:
    """``fits``: whether a row is such; ``read``: its messages, or ``Unusable``. ``tabular``: a row
    is one message, and those of a conversation belong together."""

    what: str
    fits: Callable[[Fields], bool]
    read: Callable[[Fields, Speakers], list[Message]]
    tabular: bool = False


def first_key(fields: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of ``keys`` that ``fields`` has; None: it has none."""
    return next((key for key in keys if key in fields), None)


def message(fields: Mapping[str, Any], speakers: Speakers) -> Message:
    """One message, whatever its keys are called. Raises ``Unusable``."""
    plain = {named(key): value for key, value in fields.items()}
    role = speakers.role(plain.get(first_key(plain, ROLES) or ""))
    weight = plain.get("weight")
    if role == "assistant" and type(weight) in (int, float) and weight == 0:
        raise Unusable("a reply that its weight of 0 says not to learn")
    key = first_key(plain, TEXTS)
    text, left, foreign = content(None if key is None else plain[key])
    if plain.get("toolcalls") or plain.get("functioncall") or role == "tool":
        left = (*left, TOOLS)
    return Message(role, text, left, foreign)


def content(value: Any) -> tuple[str, tuple[str, ...], bool]:
    """The text, what is left out, and whether it holds an image, a sound or a file. The texts of
    several parts are joined by a line break. Raises ``Unusable``."""
    if value is None or isinstance(value, str):
        return value or "", (), False
    parts = value.get("parts", [value]) if isinstance(value, Mapping) else value
    if not isinstance(parts, list):
        raise Unusable("a content that is no text")
    texts: list[str] = []
    left: list[str] = []
    foreign = False
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise Unusable("a content that is no text")
        kind = named(str(part["type"])) if part.get("type") is not None else None
        text = part.get("refusal" if kind == "refusal" else "text")
        text = text.get("value") if isinstance(text, Mapping) else text  # OpenAI's Assistants
        if kind in _TEXT_PARTS and (isinstance(text, str) or (kind and text is None)):
            texts += [text] if text else []
        elif kind in _TOOL_PARTS:
            left.append(TOOLS)
        elif kind in _REASONING_PARTS:
            left.append(REASONING)
        else:
            foreign = True
    return "\n".join(texts), tuple(left), foreign


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def _system(fields: Fields) -> list[Message]:
    text = fields.get("system")
    return [Message("system", text)] if isinstance(text, str) and text.strip() else []


def _listed(what: str, *keys: str, also: str | None = None) -> Format:
    def fits(fields: Fields) -> bool:
        key = first_key(fields, keys)
        return key is not None and _is_messages(fields[key]) and (also is None or also in fields)

    def read(fields: Fields, speakers: Speakers) -> list[Message]:
        listed = fields[first_key(fields, keys) or ""]
        return _system(fields) + [message(one, speakers) for one in listed]

    return Format(what, fits, read)


def _said(role: str, value: Any, speakers: Speakers) -> list[Message]:
    if _is_messages(value) and value:
        return [message(one, speakers) for one in value]
    text, left, foreign = content(value)
    return [Message(role, text, left, foreign)]


def _instructed(fields: Fields) -> str | None:
    return first_key(fields, ("output", "response", "answer"))


def _alpaca(fields: Fields, speakers: Speakers) -> list[Message]:
    """The input follows the instruction after an empty line; earlier exchanges come first."""
    asked = [content(fields["instruction"])[0]]
    asked += [content(fields.get(key))[0] for key in ("input", "context")]
    messages = _system(fields)
    history = fields.get("history")
    for exchange in history if isinstance(history, list) else ():
        if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
            raise Unusable("a history that is no list of pairs")
        messages += _said("user", exchange[0], speakers)
        messages += _said("assistant", exchange[1], speakers)
    messages.append(Message("user", "\n\n".join(text for text in asked if text.strip())))
    return messages + _said("assistant", fields[_instructed(fields) or ""], speakers)


def _pair(fields: Fields) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in fields and pair[1] in fields), None)


def _read_pair(fields: Fields, speakers: Speakers) -> list[Message]:
    asked, answered = _pair(fields) or ("", "")
    said = _said("user", fields[asked], speakers)
    return _system(fields) + said + _said("assistant", fields[answered], speakers)


def _is_row(fields: Fields) -> bool:
    keys = first_key(fields, ROLES), first_key(fields, TEXTS)
    return None not in keys and keys[0] != keys[1]


FORMATS = {
    "attune": _listed("attune's own: id and turns", "turns", also="id"),
    "sharegpt": _listed("ShareGPT: conversations of from and value", "conversations",
                        "conversation", "items"),
    "messages": _listed("OpenAI: messages of role and content", "messages", "dialogue", "dialog",
                        "chat", "turns"),
    "alpaca": Format(
        "Alpaca: instruction, input and output",
        lambda fields: "instruction" in fields and _instructed(fields) is not None,
        _alpaca,
    ),
    "pairs": Format(
        "a prompt and its response", lambda fields: _pair(fields) is not None, _read_pair
    ),
    "table": Format(
        "a message a row: conversation, role and text",
        _is_row,
        lambda fields, speakers: [message(fields, speakers)],
        tabular=True,
    ),
}  # fmt: skip


def fitting(fields: Fields) -> list[str]:
    """The formats that a row is of; the first is meant where it is of several."""
    return [name for name, one in FORMATS.items() if one.fits(fields)]
