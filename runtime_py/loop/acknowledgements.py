"""Turns of a user that only thank, agree or say good-bye: nothing can be learnt from the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_py.loop.errors import LoopError
from runtime_py.loop.lexicons import Lexicons, make_lexicons
from runtime_py.loop.words import words

BUILTIN = Path(__file__).parent / "data" / "acknowledgements.txt"  # English


@dataclass(frozen=True)
class Acknowledgements:
    """``terms`` has one domain, whose terms are words and phrases of such turns."""

    terms: Lexicons

    def has_all_of(self, text: str) -> bool:
        """Whether every word of a text lies in an occurrence of a term; true without a word."""
        found = words(_plain(text))
        return self.terms.hits(found)[0] == len(found)


def make_acknowledgements(terms: Sequence[str]) -> Acknowledgements:
    return Acknowledgements(make_lexicons({"acknowledgements": [*map(_plain, terms)]}))


def _plain(text: str) -> str:
    """Both apostrophes are one here: who says that's all may have typed either."""
    return text.replace("’", "'")


def read_acknowledgements(file: Path = BUILTIN) -> Acknowledgements:
    """A file like a lexicon: UTF-8, one word or phrase a line."""
    try:
        return make_acknowledgements(file.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise LoopError(
            f"the list of acknowledgements {file} is not UTF-8 (byte {error.start + 1}); save it "
            f"as UTF-8."
        ) from None
    except OSError as error:
        raise LoopError(
            f"the list of acknowledgements {file} cannot be read: {error.strerror}."
        ) from None
