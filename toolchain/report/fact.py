"""A named value of a report: a tile of its page, a line of its table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """``bad``: not as it should be."""

    name: str
    value: str
    bad: bool = False
