"""The tokens that end a reply."""

from __future__ import annotations

from collections.abc import Mapping

from exporters.errors import ExportError


def end_ids(named: Mapping[str, object], vocab: int, where: str) -> tuple[int, ...]:
    """The tokens that end a reply, each once, the tokenizer's own first. ``named``: an id, several
    or None, by who names it."""
    found: dict[int, None] = {}
    wrong = []
    for who, value in named.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < vocab:
                found[one] = None
            elif one is not None:
                wrong.append(f"{who} names {one!r}")
    if wrong:
        raise ExportError(
            f"{where}: {'; '.join(wrong)} as a token that ends a reply; expected ids from 0 to "
            f"{vocab - 1}. Correct eos_token_id there."
        )
    if not found:
        raise ExportError(
            f"{where} names no token that ends a reply, so no reply would end: name one as "
            f"eos_token in tokenizer_config.json, or as eos_token_id in generation_config.json."
        )
    return tuple(found)
