"""A study's tables and pictures for a document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from runtime_py.loop.files import write_bytes
from toolchain.study.pictures import pictures
from toolchain.study.study_tables import StudyTable, contrast_table, tables
from toolchain.study.summary import Summary


def write_markdown(path: Path, summary: Summary) -> None:
    """Every picture and table. A picture is a file of its own beside ``path``, named after both."""
    parts = []
    for picture in pictures(summary):
        name = re.sub(r"[^a-z0-9]+", "-", picture.title.lower()).strip("-")
        drawn = path.with_name(f"{path.stem}-{name}.svg")
        write_bytes(drawn, picture.svg.encode())
        parts.append(f"![{picture.title}]({drawn.name})\n\n{picture.note}")
    parts += [_table(one) for one in (contrast_table(summary), *tables(summary)) if one.rows]
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())


def _table(one: StudyTable) -> str:
    lines = [_line(one.heads), _line(["---", *["--:"] * (len(one.heads) - 1)])]
    lines += [_line([str(cell.content) for cell in row]) for row in one.rows]
    return "\n".join([f"**{one.title}**", "", *lines])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
