"""A picture of a report, drawn already."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.report.html import Markup


@dataclass(frozen=True)
class Picture:
    """``note``: a sentence below it."""

    title: str
    svg: Markup
    note: str
