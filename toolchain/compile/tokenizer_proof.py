"""Whether all hosts read a text as Hugging Face's library reads it by the model's own files."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.native import silenced
from runtime_py.loop.dialogue import Turn
from toolchain.compile.chat_template import TemplateText, probes, turns_of
from toolchain.compile.tokenizer_rewriting import BAR, controls

AT_EXPORT = 7  # of 130,000 ideographs and syllables one in so many is tried; parity tries all
_CHARACTERS_A_PROBE = 48
_CASES_AT_ONCE = 256
_MANY = ((0x3400, 0x9FFF), (0xAC00, 0xD7A3), (0x17000, 0x18CFF), (0x20000, 0x3FFFF))
Read = Callable[[tuple[Turn, ...], bool], list[int]]


class HuggingFaceReading:
    """What Hugging Face's library makes of the text of a compiled ``template``, by the model's own
    tokenizer. ``every``: of many ideographs and syllables one is tried."""

    def __init__(self, backend: Backend, template: TemplateText, every: int = AT_EXPORT) -> None:
        raw = json.loads(backend.to_str())
        control = controls(raw, template)
        self._backend, self._template = Backend.from_str(json.dumps(raw)), template
        self._backend.no_padding()  # which transformers sets anew at every call
        self._backend.no_truncation()
        self._controls = [content for content, token in control.items() if content.strip()]
        said = [t["content"] for t in raw["added_tokens"] if t["content"] not in control]
        self._probes = [*probes(), *_asked(_beside(said)), *_asked(_all_characters(every))]

    def _ids(self, cases: Sequence[tuple[tuple[Turn, ...], bool]]) -> list[list[int]]:
        texts = [self._template.write(turns, reply) for turns, reply in cases]
        read = self._backend.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in read]

    def misread(self, tokenizer: str, text: ChatText, apart: str) -> str | None:
        """What is wrong, in a sentence's words, with a host that has the file ``tokenizer`` and
        writes by ``text``; None: nothing. Texts with ``apart`` need only be the same to all
        hosts."""
        with tempfile.TemporaryDirectory(prefix="attune-") as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text(tokenizer, encoding="utf-8")
            with silenced():
                return self._misread_by(path, text, apart)

    def _misread_by(self, path: Path, text: ChatText, apart: str) -> str | None:
        from pytorch_tokenizers import CppHFTokenizer

        runner: Any = CppHFTokenizer()
        try:
            runner.load(str(path))
        except RuntimeError as error:
            return f"ExecuTorch's runner cannot read it ({error})"

        if obeyed := [content for content in self._controls if _obeyed(text, content)]:
            return f"{obeyed[0]!r} in what is said becomes the special token of that name"
        return self._first_misread(text, runner, apart)

    def _first_misread(self, text: ChatText, runner: Any, apart: str) -> str | None:
        def ours(turns: tuple[Turn, ...], reply: bool) -> list[int]:
            return text.tokens(turns, reply).ids

        def the_runners(turns: tuple[Turn, ...], reply: bool) -> list[int]:
            try:
                return list(runner.encode(text.render(turns, reply), 0, 0))
            except RuntimeError:  # it has no tokens for this text
                return []

        hosts: dict[str, Read] = {"attune": ours, "ExecuTorch's runner": the_runners}
        for start in range(0, len(self._probes), _CASES_AT_ONCE):
            cases = self._probes[start : start + _CASES_AT_ONCE]
            for (turns, reply), wanted in zip(cases, self._ids(cases), strict=True):
                if apart and any(apart in turn.content for turn in turns):
                    wanted = ours(turns, reply)
                for who, read in hosts.items():
                    if read(turns, reply) != wanted:
                        said = self._shortest(turns, reply, read)
                        return f"{who} reads {said!r} as other tokens than Hugging Face's library"
        return None

    def _shortest(self, turns: tuple[Turn, ...], reply: bool, read: Read) -> str:
        """One character that is misread, or else the beginning of what was said last."""
        said = turns[-1].content
        for character in dict.fromkeys(said):
            case = (*turns[:-1], Turn(turns[-1].role, f"a{character}b"))
            if read(case, reply) != self._ids([(case, reply)])[0]:
                return character
        return said[:60]


def _obeyed(text: ChatText, content: str) -> bool:
    """Whether a control's text becomes its id, as where merges or a whole word build it."""
    harmless, said = (text.tokens(turns_of([one]), True).ids for one in ("x", f"x{content}y"))
    alone = text.tokens(turns_of([content]), True).ids
    index = text.tokenizer.token_to_id(content)
    if index is None:
        return False
    return any(ids.count(index) > harmless.count(index) for ids in (said, alone))


def _asked(contents: Sequence[str]) -> list[tuple[tuple[Turn, ...], bool]]:
    return [(turns_of([content]), True) for content in contents]


def _beside(added: Sequence[str]) -> list[str]:
    """Added tokens that a text may hold, alone and among words."""
    found = []
    for token in added:
        found += [f"a{token}b", f"one {token} two", f"{token}{token} 1"]
    return found


def _all_characters(every: int) -> list[str]:
    """Every character that a turn may have, each beside letters, digits, spaces and itself, and
    some decomposed ones. Of the ``_MANY`` one in ``every``. ``BAR`` has a probe of its own, since
    some rewritings set it apart."""
    known = [
        chr(code)
        for code in range(0x20, 0x110000)
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co", "Cc")
        and chr(code) != BAR
        and (code % every == 0 or not any(low <= code <= high for low, high in _MANY))
    ]
    known += ["\t", "\n", "\r", "\x85"]
    marked = [f"{letter}{mark}" for letter in "aeou\u03b1" for mark in "\u0301\u0308\u0323\u0327"]
    groups = [
        known[start : start + _CHARACTERS_A_PROBE]
        for start in range(0, len(known), _CHARACTERS_A_PROBE)
    ]
    each = ["".join(f"{c} a{c}b1{c}2 {c}{c}, {c}." for c in some) for some in [*groups, [BAR]]]
    return [*each, " ".join(marked)]
