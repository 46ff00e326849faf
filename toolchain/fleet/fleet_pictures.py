"""The fleet report's pictures: SVG, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from toolchain.fleet.fleet_outcome import FleetOutcome
from toolchain.report.charts import house_style, inline_svg
from toolchain.report.html import Markup
from toolchain.report.palette import ACCENT, BAD, FAINT, INK, WARNING
from toolchain.report.picture import Picture


def pictures(outcome: FleetOutcome) -> list[Picture]:
    """Those for which the fleet has something to show."""
    drawn = [
        ("Gain", _gain, "Users by how much the loss of their own unseen dialogues fell."),
        (
            "Personal gain",
            _personal,
            "Each dot is a user. Up: what is left of the gain beside the mean of others' adapters.",
        ),
        ("Manners", _manners, "Part of the replies that comply, before (light) and after."),
        ("Nights (modelled)", _nights, "Minutes of work of each night, pauses for heat included."),
    ]
    charts = [(title, _draw(drawing, outcome, title), note) for title, drawing, note in drawn]
    return [Picture(title, svg, note) for title, svg, note in charts if svg is not None]


@house_style()
def _draw(
    drawing: Callable[[Axes, FleetOutcome], bool], outcome: FleetOutcome, title: str
) -> Markup | None:
    figure = Figure(figsize=(6.4, 3.1), layout="constrained")
    return inline_svg(figure, title) if drawing(figure.add_subplot(), outcome) else None


def _gain(axes: Axes, outcome: FleetOutcome) -> bool:
    gains = outcome.gains
    if not gains:
        return False
    edges = np.histogram_bin_edges(gains, min(30, max(5, len(gains) // 3)))
    for part, color in (([g for g in gains if g >= 0], ACCENT), ([g for g in gains if g < 0], BAD)):
        axes.hist(part, bins=edges.tolist(), color=color)
    axes.axvline(0.0, color=INK, linewidth=1)
    axes.set(xlabel="nats a label", ylabel="users")
    return True


def _personal(axes: Axes, outcome: FleetOutcome) -> bool:
    pairs = [
        (gain, own)
        for gain, own in zip(outcome.gains, outcome.personal, strict=True)
        if own is not None
    ]
    if not pairs:
        return False
    axes.axhline(0.0, color=INK, linewidth=1)
    axes.axvline(0.0, color=INK, linewidth=1)
    axes.scatter(
        [gain for gain, _ in pairs], [own for _, own in pairs], s=12, color=ACCENT, alpha=0.7
    )
    axes.set(xlabel="gain, nats a label", ylabel="personal gain")
    return True


def _manners(axes: Axes, outcome: FleetOutcome) -> bool:
    rows = [row for row in outcome.manners() if row.compliance_after is not None]
    if not rows:
        return False
    for place, row in enumerate(rows):
        axes.barh(place + 0.2, row.compliance_before or 0.0, 0.38, color=FAINT)
        axes.barh(place - 0.2, row.compliance_after or 0.0, 0.38, color=ACCENT)
    axes.set_yticks(range(len(rows)), [row.manner for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    return True


def _nights(axes: Axes, outcome: FleetOutcome) -> bool:
    minutes = outcome.night_minutes
    if not minutes:
        return False
    axes.hist(minutes, bins=min(30, max(5, len(minutes) // 3)), color=WARNING)
    axes.set(xlabel="minutes", ylabel="nights")
    return True
