"""A chat template, compiled: what it writes around the turns, found by trying, and proven.

Nothing interprets Jinja on the phone. A template that cannot be expressed in pieces is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from exporters.errors import ExportError
from runtime_py.bundle.chat_pieces import words
from runtime_py.bundle.manifest import Strip
from runtime_py.loop.dialogue import Role, Turn
from toolchain.compile.template_source import DATE, constants, on_that_day

_MARKS = ("quobblezanti", "verripmulto", "jaskendroph", "wolmettigra", "pelquisnorb", "dranfuvelki")
# What str.strip() takes off, and a template's trim filter with it.
SPACES = "".join(chr(c) for c in range(0x3001) if chr(c).isspace())
WORDS = (
    "Hello there.",
    "Two lines:\n\n- one\n- two",
    "  both ends  ",
    "\n\ttabs and breaks\r\n\n",
    "\u00a0\u2003wide spaces\u3000",
    "{{ braces }} {% if x %}{# no #}",
    "<b>&amp; 'quotes' \"double\" \\n",
    "caf\u00e9 Za\u017c\u00f3\u0142\u0107 \u6f22\u5b57 \ud55c\uad6d\uc5b4",
    "\u0440\u0443 \u0639\u0631 \u0905 \U0001f600",
    "Today is 26 Jul 2024, 1234567890.",
    "user assistant system None True",
    "42",
    "LOUD WORDS",
    "x",
)  # fmt: skip

# What a template's own expressions raise, Jinja's errors apart: 1 / 0, a key that is not there, …
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
Render = Callable[[Sequence[Turn], bool], str]  # turns, and whether a reply is asked for


@dataclass(frozen=True)
class TemplateText:
    """The pieces as text (see ``ChatPieces``), special tokens as the template writes them."""

    begin: str
    answer: str
    ask: str
    last_answer: str
    end: str
    reply: str
    unanswered: str
    strips: dict[str, Strip] = field(default_factory=dict)
    date: str | None = None
    read: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the template itself writes."""
        closing = (self.end, self.reply, self.unanswered)
        return (self.begin, self.answer, self.ask, self.last_answer, *closing)

    def write(self, turns: Sequence[Turn], reply: bool) -> str:
        """What the template writes, by the pieces."""
        text, last = self.begin, len(turns) - 1
        for index, turn in enumerate(turns):
            strip = self.strips[turn.role if index < last else f"last_{turn.role}"]
            text += words(turn.content, strip, None)
            if turn.role == "assistant":
                text += self.end if index == last else self.ask
            elif index == last:
                text += self.reply if reply else self.unanswered
            else:
                text += self.last_answer if index + 1 == last else self.answer
        return text


class Template:
    """A tokenizer's chat template as a function of turns. ``date``: the day that it is for ever,
    where the template asks for one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, origin: str) -> None:
        self._tokenizer, self._origin = tokenizer, origin
        asks = "strftime_now" in template
        self._template = on_that_day(template, origin) if asks else template
        self.date = DATE.date().isoformat() if asks else None
        self.constants = constants(template)
        self.added = frozenset(tokenizer.get_added_vocab())

    def __call__(self, turns: Sequence[Turn], reply: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=reply,
            )
        except _FAILURES as error:
            raise ExportError(
                f"{self._origin} cannot be rendered for {_mode(turns, reply)}: {error}; give one "
                f"with --chat-template FILE that can."
            ) from None
        return cast(str, text)


def _mode(turns: Sequence[Turn], reply: bool) -> str:
    exchanges = len(turns) // 2 + len(turns) % 2
    asked = " and a reply prompt" if reply else ""
    open_end = ", the last one open," if len(turns) % 2 and not reply else ""
    return f"{exchanges} exchange{'s' if exchanges > 1 else ''}{open_end}{asked}"


def turns_of(contents: Sequence[str]) -> tuple[Turn, ...]:
    """Turns that alternate from the user's on."""
    roles: tuple[Role, Role] = ("user", "assistant")
    return tuple(Turn(roles[index % 2], content) for index, content in enumerate(contents))


def compile_template(render: Template, origin: str) -> TemplateText:
    """The pieces that write what ``render`` writes; ``origin``: what the template is called.

    Raises ``ExportError`` where no pieces do, with the text on which they differ.
    """
    found = _pieces(render, origin)
    text = replace(found, strips=_strips(render), date=render.date)
    read = _read(render, text)
    tokens = {one: {token for token in render.added if token in one} for one in read}
    text = replace(text, read=tuple(sorted(set().union(*tokens.values()))))
    plain = sorted(one for one in read if not tokens[one])
    strange = [case for one in plain for said in _around_it(one) for case in _cases(said)]
    for turns, reply in [*probes(), *strange]:
        wanted, got = render(turns, reply), text.write(turns, reply)
        if wanted != got:
            at = next(
                (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b),
                min(len(wanted), len(got)),
            )
            raise ExportError(
                f"{origin} cannot be compiled: for {_mode(turns, reply)} it writes "
                f"{_around(wanted, at)} where its pieces give {_around(got, at)}. Pieces are what "
                f"stands before, between and after the turns, the same whatever these say; give a "
                f"template that has such with --chat-template FILE."
            )
    return text


def _read(render: Template, text: TemplateText) -> set[str]:
    """Those of the template's constants that it writes otherwise than other words: alone, at an end
    or amid them, or around them together with another."""

    def alike(said: str) -> bool:
        try:
            return all(render(*case) == text.write(*case) for case in _cases(said))
        except ExportError:  # it will not have it said
            return False

    read = set()
    for one in render.constants:
        if not all(map(alike, _around_it(one))):
            read.add(one)
    tokens = [one for one in render.constants if one in render.added and one not in read]
    for first in tokens:
        read |= {first, last} if (last := _partner(first, tokens, alike)) else set()
    return read


def _around_it(constant: str) -> tuple[str, ...]:
    if constant.isspace():  # no turn is blank
        return f"x y{constant}x y{constant}{constant}x", f"x{constant}y"
    return constant, f"{constant}x y", f"x y{constant}", f"x {constant} y"


def _cases(said: str) -> tuple[tuple[tuple[Turn, ...], bool], ...]:
    return (turns_of([said, said, said, said]), False), (turns_of([said]), True)


def _partner(first: str, tokens: Sequence[str], alike: Callable[[str], bool]) -> str | None:
    return next((last for last in tokens if not alike(f"{first}x y{last}")), None)


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 20) : at + 40])


def probes() -> list[tuple[tuple[Turn, ...], bool]]:
    """Dialogues of one to four exchanges, closed, open, and asked for a reply."""
    found = []
    for count in range(1, 9):
        for shift in range(len(WORDS)):
            contents = [WORDS[(shift + 3 * index) % len(WORDS)] for index in range(count)]
            for reply in (False, True) if count % 2 else (False,):
                found.append((turns_of(contents), reply))
    many = turns_of([WORDS[index % len(WORDS)] for index in range(40)])
    long = turns_of(["long " * 4000, "words " * 4000])
    return [*found, (many, False), (many[:-1], True), (long, False), (long[:1], True)]


def _between(text: str, count: int, origin: str) -> list[str]:
    """What stands before, between and after the first ``count`` marks."""
    pieces, rest = [], text
    for mark in _MARKS[:count]:
        if text.count(mark) != 1 or mark not in rest:
            raise ExportError(
                f"{origin} leaves out what user or assistant said, repeats it or changes the "
                f"order; expected a Jinja template that writes every turn of 'messages' once."
            )
        before, _, rest = rest.partition(mark)
        pieces.append(before)
    return [*pieces, rest]


def _pieces(render: Template, origin: str) -> TemplateText:
    def between(count: int, reply: bool) -> list[str]:
        return _between(render(turns_of(_MARKS[:count]), reply), count, origin)

    begin, answer, ask, last_answer, end = between(4, False)
    *_, reply = between(3, True)
    *_, unanswered = between(3, False)
    if not last_answer.startswith(reply):
        raise ExportError(
            f"{origin} begins a reply otherwise than it writes one that was given, so no reply can "
            f"be learned: give one with --chat-template FILE that does not, such as without the "
            f"start of a thought."
        )
    return TemplateText(begin, answer, ask, last_answer, end, reply, unanswered)


def _strips(render: Template) -> dict[str, Strip]:
    """By role, and by ``last_`` and role: the characters that vanish at the ends of what is said.

    Each is tried at one end of every turn, of a dialogue that ends with the assistant, and of one
    that ends with the user.
    """
    sides: dict[str, list[str]] = {}
    for count, reply in ((4, False), (3, True)):
        marks = _MARKS[:count]
        plain = len(render(turns_of(marks), reply))
        for index in range(count):
            role = turns_of(marks)[index].role
            taken = sides.setdefault(role if index < count - 1 else f"last_{role}", ["", ""])
            for character in SPACES:
                for side, said in enumerate((character + marks[index], marks[index] + character)):
                    contents = [*marks[:index], said, *marks[index + 1 :]]
                    gone = len(render(turns_of(contents), reply)) == plain
                    if gone and character not in taken[side]:
                        taken[side] += character
    return {name: Strip(left=left, right=right) for name, (left, right) in sides.items()}
