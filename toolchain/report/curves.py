"""Line charts as SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Series:
    """A named line through (x, y) points."""

    name: str
    points: tuple[tuple[float, float], ...]


def write_svg(path: Path, series: Sequence[Series], across: str, up: str) -> None:
    """Draws the lines over one pair of axes, labelled ``across`` and ``up``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for line in series:
        marker = "o" if len(line.points) < 30 else None
        axes.plot(*zip(*line.points, strict=True), marker=marker, markersize=3, label=line.name)
    axes.set(xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
