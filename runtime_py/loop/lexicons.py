"""The lexicons: which words belong to which domain, and how often a text uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime_py.loop.errors import LoopError
from runtime_py.loop.words import words

OTHER = "other"  # the domain of a text that no lexicon knows
BUILTIN = Path(__file__).parent / "data" / "lexicons"


@dataclass(frozen=True)
class Lexicons:
    """``domains`` in the order that decides ties.

    ``terms`` maps a term's first word to (index of the domain, the term's words).
    """

    domains: tuple[str, ...]
    terms: Mapping[str, Sequence[tuple[int, tuple[str, ...]]]] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains that a set can have: one a lexicon, and ``other``."""
        return (*self.domains, OTHER)

    def hits(self, text: Sequence[str]) -> list[int]:
        """For each lexicon, how many of the text's words lie in an occurrence of a term."""
        covered: list[set[int]] = [set() for _ in self.domains]
        for start, word in enumerate(text):
            for domain, term in self.terms.get(word, ()):
                end = start + len(term)
                if len(term) == 1 or tuple(text[start:end]) == term:
                    covered[domain].update(range(start, end))
        return [len(positions) for positions in covered]


def make_lexicons(terms: Mapping[str, Sequence[str]]) -> Lexicons:
    """From the terms of each domain, in order."""
    index: dict[str, dict[tuple[int, tuple[str, ...]], None]] = {}
    for domain, (name, lines) in enumerate(terms.items()):
        if name == OTHER:
            raise LoopError(
                f"a lexicon is called {OTHER!r}, which stands for texts outside all lexicons; "
                f"choose another name."
            )
        split = [tuple(words(line)) for line in lines]
        if not any(split):
            raise LoopError(f"the lexicon {name!r} has no words; expected one term a line.")
        for term in filter(None, split):
            index.setdefault(term[0], {})[domain, term] = None
    return Lexicons(tuple(terms), {first: tuple(places) for first, places in index.items()})


def read_lexicons(folder: Path = BUILTIN) -> Lexicons:
    """Every ``<domain>.txt`` of a folder, sorted by name: UTF-8, one term a line."""
    paths = sorted(folder.glob("*.txt"), key=lambda path: path.name)
    if not paths:
        raise LoopError(
            f"{folder} has no lexicons; expected files such as travel.txt with one term a line."
        )
    terms = {}
    for path in paths:
        try:
            terms[path.stem] = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise LoopError(
                f"the lexicon {path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8."
            ) from None
        except OSError as error:
            raise LoopError(f"the lexicon {path} cannot be read: {error.strerror}.") from None
    return make_lexicons(terms)
