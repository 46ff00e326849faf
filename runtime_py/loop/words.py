"""Words: maximal runs of letters and numbers, by Unicode category, so that every language agrees.

The same as ``[\\p{L}\\p{N}]+(?:['’]\\p{L}+)*`` over the text in NFC and lower case.
"""

from __future__ import annotations

import unicodedata

_APOSTROPHES = "'’"


def words(text: str) -> list[str]:
    """The words of a text in NFC and lower case, in order."""
    text = unicodedata.normalize("NFC", text).lower()
    kinds = [unicodedata.category(character)[0] for character in text]  # "L", "N" or another
    result, start, length = [], 0, len(text)
    while start < length:
        if kinds[start] not in "LN":
            start += 1
            continue
        end = start + 1
        while end < length and kinds[end] in "LN":
            end += 1
        while end + 1 < length and text[end] in _APOSTROPHES and kinds[end + 1] == "L":
            end += 2
            while end < length and kinds[end] == "L":
                end += 1
        result.append(text[start:end])
        start = end
    return result
