"""What a tokenizer.json may be rewritten as, so that ExecuTorch's runner reads it too."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from toolchain.compile.chat_template import TemplateText

Normalize = Literal["NFC"] | None
Spaced = Literal["first", "each"] | None
AddedToken = dict[str, Any]  # as tokenizer.json has it
BAR = "\u2581"  # that SentencePiece writes for a space
_SPACE = " "
# What \s is to Hugging Face's library; to the runner's it is U+180E too.
_WHITE = r"\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}"
_SPLIT_AT_SPACES = ("Split", {"String": _SPACE})
_WORDS_OF_BARS = f"{BAR}[^{BAR}]*|[^{BAR}]+"


@dataclass(frozen=True)
class Rewriting:
    """A tokenizer.json to try: ``rewritten`` says how it was made. ``normalize``: what is left to
    the host. ``spaced``: before which texts the pieces have a space, the first of all or also each
    that follows a special token. ``apart``: a character that it may read otherwise than the source
    does, though all hosts alike; empty: none."""

    json: dict[str, Any]
    rewritten: tuple[str, ...]
    normalize: Normalize
    spaced: Spaced
    apart: str


def candidates(raw: dict[str, Any], template: TemplateText, vocab: int) -> Iterator[Rewriting]:
    """From the least to the most that is rewritten."""
    cleaned, changes = _cleaned(raw, template, vocab)
    for normalized, also, normalize in _normalizers(cleaned):
        for split, how, spaced in _metaspaces(normalized):
            for barred, bars, apart in _bars(split):
                for spelled, where in _patterns(barred):
                    made = (*changes, *also, *how, *bars, *where)
                    yield Rewriting(spelled, made, normalize, spaced, apart)


def _cleaned(
    raw: dict[str, Any], template: TemplateText, vocab: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Without padding, truncation, and added tokens that have no embedding; what the template
    writes as a token of its own is special, and eats no space around it (the pieces do)."""
    made, changes = copy.deepcopy(raw), []
    if made.get("padding") or made.get("truncation"):
        made["padding"] = made["truncation"] = None
        changes.append("padding and truncation dropped")
    lost = [token["content"] for token in made["added_tokens"] if token["id"] >= vocab]
    if lost:
        made["added_tokens"] = [t for t in made["added_tokens"] if t["id"] < vocab]
        changes.append(f"added tokens without an embedding dropped: {', '.join(lost)}")
    written = set(controls(made, template))
    promoted = [t for t in made["added_tokens"] if t["content"] in written and not t["special"]]
    for token in promoted:
        token["special"] = True
    if promoted:
        changes.append(f"special: {', '.join(token['content'] for token in promoted)}")
    eager = [t for t in made["added_tokens"] if t["special"] and (t["lstrip"] or t["rstrip"])]
    for token in eager:
        token["lstrip"] = token["rstrip"] = False
    if eager:
        changes.append(
            f"spaces around special tokens are the pieces' matter: "
            f"{', '.join(token['content'] for token in eager)}"
        )
    return made, tuple(changes)


def controls(raw: dict[str, Any], template: TemplateText) -> dict[str, AddedToken]:
    """The added tokens that are special, or that the template writes (white space apart, which is
    text), by their contents."""
    backend = Tokenizer.from_str(json.dumps(raw | {"padding": None, "truncation": None}))
    written = {
        index
        for text in template.texts
        for index in backend.encode(text, add_special_tokens=False).ids
    }
    return {
        token["content"]: token
        for token in raw["added_tokens"]
        if token["special"] or (token["id"] in written and not token["content"].isspace())
    }


def _normalizers(
    raw: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], tuple[str, ...], Normalize]]:
    """As it is; and without NFC, which changes nothing once a host has done it."""
    yield raw, (), None
    normalizer = raw.get("normalizer")
    steps = _steps(normalizer, "normalizers")
    if any(step["type"] == "NFC" for step in steps):
        rest = [step for step in steps if step["type"] != "NFC"]
        made = raw | {"normalizer": _sequence(rest, "normalizers")}
        yield made, ("NFC left to the host",), "NFC"


def _metaspaces(
    raw: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], tuple[str, ...], Spaced]]:
    """As it is, if it has no Metaspace; else with a normalizer that writes the bars, and the first
    one by the normalizer, by the pieces, or not at all."""
    steps = _steps(raw.get("pre_tokenizer"), "pretokenizers")
    places = [i for i, step in enumerate(steps) if step["type"] == "Metaspace"]
    if not places:
        yield raw, (), None
        return
    place = places[0]
    bar = steps[place].get("replacement", BAR)
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": bar}
    prepend = {"type": "Prepend", "prepend": bar}
    before = _steps(raw.get("normalizer"), "normalizers")
    pieces = {
        "type": "Split",
        "pattern": {"Regex": _WORDS_OF_BARS.replace(BAR, bar)},
        "behavior": "Isolated",
        "invert": False,
    }
    split = [pieces] if steps[place].get("split", True) else []
    rest = [*steps[:place], *split, *steps[place + 1 :]]
    ways: tuple[tuple[str, list[dict[str, Any]], Spaced], ...] = (
        ("Metaspace as Replace", [], None),
        ("Metaspace as Replace, its first space in the pieces", [], "first"),
        ("Metaspace as Replace, its spaces after special tokens in the pieces", [], "each"),
        ("Metaspace as Prepend and Replace", [prepend], None),
    )
    for how, first, spaced in ways:
        yield (
            raw
            | {
                "normalizer": _sequence([*before, *first, replace], "normalizers"),
                "pre_tokenizer": _sequence(rest, "pretokenizers"),
            },
            (how,),
            spaced,
        )


def _bars(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[str, ...], str]]:
    """As it is; and, where the normalizer writes spaces as bars, without a split at the spaces that
    are none any more, and with runs of bars as the vocabulary's tokens instead of added ones: those
    are only found where bars were written, and the runner does not merge into them."""
    yield raw, (), ""
    bar = next(
        (
            step["content"]
            for step in _steps(raw.get("normalizer"), "normalizers")
            if step["type"] == "Replace" and step["pattern"].get("String") == _SPACE
        ),
        _SPACE,
    )
    if len(bar) != 1 or bar == _SPACE:
        return
    steps = _steps(raw.get("pre_tokenizer"), "pretokenizers")
    kept = [one for one in steps if (one["type"], one.get("pattern")) != _SPLIT_AT_SPACES]
    known = raw["model"]["vocab"]
    tokens = [
        one
        for one in raw["added_tokens"]
        if one["special"] or set(one["content"]) != set(bar) or one["content"] not in known
    ]
    changes, apart = [], ""
    if len(kept) < len(steps):
        changes.append("no split at spaces, which are bars by then")
    if len(tokens) < len(raw["added_tokens"]):
        changes.append(f"runs of bars (U+{ord(bar):04X}) left to the vocabulary")
        apart = bar
    if changes:
        made = {"pre_tokenizer": _sequence(kept, "pretokenizers"), "added_tokens": tokens}
        yield raw | made, tuple(changes), apart


def _patterns(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """As it is; and with the white space of its regular expressions spelled out."""
    yield raw, ()
    steps = copy.deepcopy(_steps(raw.get("pre_tokenizer"), "pretokenizers"))
    for step in steps:
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            step["pattern"]["Regex"] = _spelled(step["pattern"]["Regex"])
    made = raw | {"pre_tokenizer": _sequence(steps, "pretokenizers")}
    if steps and made["pre_tokenizer"] != raw["pre_tokenizer"]:
        yield made, ("white space in patterns spelled out",)


def _spelled(pattern: str) -> str:
    made, depth = "", 0
    for part in re.findall(r"\\.|[^\\]", pattern, re.DOTALL):
        depth += (part == "[") - (part == "]")
        if part == r"\s":
            part = _WHITE if depth else f"[{_WHITE}]"
        elif part == r"\S" and not depth:
            part = f"[^{_WHITE}]"
        made += part
    return made


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a sequence, which may be none or the one itself."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _sequence(steps: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}
