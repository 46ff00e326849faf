"""Charts by matplotlib in one style: as SVG within a page, and as files.

matplotlib is imported where something is drawn: commands that draw nothing start without it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime_py.loop.files import replacing
from toolchain.report.html import Markup
from toolchain.report.palette import FAINT, INK, LINE, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "attune",  # the same chart has the same bytes
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": LINE,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """A named line through (x, y) points."""

    name: str
    points: tuple[tuple[float, float], ...]


@contextmanager
def house_style() -> Iterator[None]:
    """Figures that are made within have the reports' style; decorates a function too."""
    import matplotlib
    from cycler import cycler

    style: Any = {**_STYLE, "axes.prop_cycle": cycler(color=SERIES)}
    with matplotlib.rc_context(style):
        yield


def inline_svg(figure: Figure, label: str) -> Markup:
    """A figure for a page; ``label``: what it is, for who cannot see it."""
    text = io.StringIO()
    with house_style():
        figure.savefig(
            text,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None},
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which has no place inside a page
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


@house_style()
def write_svg(path: Path, series: Sequence[Series], across: str, up: str) -> None:
    """Draws the lines over one pair of axes, labelled ``across`` and ``up``, as an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for line in series:
        marker = "o" if len(line.points) < 30 else None
        axes.plot(*zip(*line.points, strict=True), marker=marker, markersize=3, label=line.name)
    axes.set(xlabel=across, ylabel=up)
    axes.legend()
    with replacing(path) as beside:
        figure.savefig(beside, format="svg", metadata={"Date": None})
