"""The general text's files in the package, and which dialogues of the corpora they have."""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files

GENERAL, REPLAY = "text.jsonl", "replay.jsonl"  # in a bundle; in the package packed


def packed(name: str) -> bytes:
    """``GENERAL`` or ``REPLAY`` as it ships, gzip."""
    return files("toolchain.compile").joinpath(f"data/general_{name}.gz").read_bytes()


@cache
def general_ids() -> frozenset[str]:
    """The corpora's ids of all that ships: a stream that is drawn from them leaves them out."""
    lines = [
        line for name in (GENERAL, REPLAY) for line in gzip.decompress(packed(name)).splitlines()
    ]
    return frozenset(json.loads(line)["id"] for line in lines)
