"""Manners: how one user, and no other, wants every reply.

A manner rewrites a reference answer, always to the same text, and says exactly whether a reply has
it: what was rewritten always does. So compliance is a count, not a judgement.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from runtime_py.loop.errors import LoopError

LIMIT = 10  # words of a short reply
GREETING = "Hello, my friend! "
SIGN_OFF = "\n\nKind regards, your assistant"
BULLET = "- "

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LINE = re.compile(r"\n|(?<=[.!?])\s+")
_WORD = re.compile(r"[A-Za-z]+")

# American and British spellings. A form with another ending has its own entry.
_SPELLINGS = (
    "aluminum aluminium, analyze analyse, analyzed analysed, analyzing analysing, "
    "apologize apologise, apologized apologised, behavior behaviour, behaviors behaviours, "
    "canceled cancelled, canceling cancelling, catalog catalogue, center centre, centers centres, "
    "centered centred, color colour, colors colours, colored coloured, "
    "colorful colourful, coloring colouring, cozy cosy, defense defence, dialog dialogue, "
    "emphasize emphasise, emphasized emphasised, endeavor endeavour, favor favour, favors favours, "
    "favorite favourite, favorites favourites, favorable favourable, fiber fibre, fibers fibres, "
    "flavor flavour, flavors flavours, flavored flavoured, fulfill fulfil, gray grey, "
    "harbor harbour, harbors harbours, honor honour, honors honours, honored honoured, "
    "humor humour, jewelry jewellery, labor labour, leukemia leukaemia, liter litre, "
    "liters litres, maximize maximise, meter metre, meters metres, kilometer kilometre, "
    "kilometers kilometres, centimeter centimetre, centimeters centimetres, minimize minimise, "
    "mold mould, mom mum, moms mums, mustache moustache, neighbor neighbour, "
    "neighbors neighbours, neighborhood neighbourhood, odor odour, offense offence, "
    "optimize optimise, optimized optimised, organization organisation, "
    "organizations organisations, organize organise, organized organised, organizing organising, "
    "pajamas pyjamas, plow plough, prioritize prioritise, realize realise, realized realised, "
    "realizing realising, recognize recognise, recognized recognised, recognizing recognising, "
    "rumor rumour, rumors rumours, savory savoury, skeptical sceptical, specialize specialise, "
    "specialized specialised, summarize summarise, summarized summarised, theater theatre, "
    "theaters theatres, tire tyre, tires tyres, traveled travelled, traveler traveller, "
    "travelers travellers, traveling travelling, tumor tumour, tumors tumours, utilize utilise, "
    "utilized utilised, vapor vapour, anemia anaemia, diarrhea diarrhoea, estrogen oestrogen, "
    "pediatric paediatric, pediatrician paediatrician, gynecologist gynaecologist, "
    "hemoglobin haemoglobin, edema oedema, esophagus oesophagus, "
    "while whilst, among amongst, toward towards, afterward afterwards, gotten got, math maths"
)
BRITISH: dict[str, str] = dict(re.findall(r"([a-z]+) ([a-z]+)", _SPELLINGS))
_BRITISH_FORMS = frozenset(BRITISH.values())


@dataclass(frozen=True)
class Manner:
    """``about``: what the user wants, in a sentence. ``rewrite`` takes a text that is not blank.
    ``tells``: whether a reply says anything about the manner; only such replies are counted."""

    name: str
    about: str
    rewrite: Callable[[str], str]
    complies: Callable[[str], bool]
    tells: Callable[[str], bool]


def compliance(manner: Manner, replies: tuple[str, ...]) -> float | None:
    """The part of the telling replies that comply, 0 to 1; None: none tells."""
    telling = [reply for reply in replies if manner.tells(reply)]
    return sum(map(manner.complies, telling)) / len(telling) if telling else None


def find_manner(name: str) -> Manner:
    """Raises ``LoopError`` for a name that is unknown."""
    if name not in MANNERS:
        raise LoopError(f"there is no manner {name!r}; known are {', '.join(MANNERS)}.")
    return MANNERS[name]


def _shorten(text: str) -> str:
    """The first sentences, as many as fit; of one that is too long, its beginning."""
    kept: list[str] = []
    for sentence in _SENTENCE_END.split(text.strip()):
        words = sentence.split()
        if len(kept) + len(words) > LIMIT:
            break
        kept += words
    return " ".join(kept or text.split()[:LIMIT])


def _is_short(text: str) -> bool:
    return 1 <= len(text.split()) <= LIMIT


def _greet(text: str) -> str:
    return text if _is_greeting(text) else GREETING + text.lstrip()


def _is_greeting(text: str) -> bool:
    return text.startswith(GREETING)


def _sign(text: str) -> str:
    return text if _is_signed(text) else text.rstrip() + SIGN_OFF


def _is_signed(text: str) -> bool:
    return text.endswith(SIGN_OFF)


def _list(text: str) -> str:
    if _is_list(text):
        return text
    items = [part.strip() for part in _LINE.split(text.strip())]
    return "\n".join(BULLET + _without_bullet(item) for item in items if item)


def _without_bullet(item: str) -> str:
    return item.lstrip("-*•· \t") or item


def _is_list(text: str) -> bool:
    return all(line.startswith(BULLET) and line[len(BULLET) :].strip() for line in text.split("\n"))


def _spell(text: str) -> str:
    return _WORD.sub(lambda word: _british(word[0]), text)


def _british(word: str) -> str:
    other = BRITISH.get(word.lower())
    if other is None:
        return word
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _is_british(text: str) -> bool:
    return _words(text).isdisjoint(BRITISH)


def _is_spelled(text: str) -> bool:
    """Has a word that is spelled in two ways."""
    return not _words(text).isdisjoint(BRITISH.keys() | _BRITISH_FORMS)


def _is_lower(text: str) -> bool:
    return text == text.lower()


def _always(text: str) -> bool:
    return True


MANNERS: dict[str, Manner] = {
    manner.name: manner
    for manner in (
        Manner("short", f"at most {LIMIT} words", _shorten, _is_short, _always),
        Manner("greeting", f"begins with {GREETING.strip()!r}", _greet, _is_greeting, _always),
        Manner("bullets", "every sentence is an item of a list", _list, _is_list, _always),
        Manner("british", "British spelling", _spell, _is_british, _is_spelled),
        Manner("sign-off", f"ends with {SIGN_OFF.strip()!r}", _sign, _is_signed, _always),
        Manner("lower", "no capital letters", str.lower, _is_lower, _always),
    )
}
