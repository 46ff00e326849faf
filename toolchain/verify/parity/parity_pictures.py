"""The report's pictures as inline SVG: the ladder, differences by layer, histograms."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from toolchain.report.charts import house_style, inline_svg
from toolchain.report.html import Markup
from toolchain.report.palette import ACCENT, BAD, FAINT, GOOD, QUIET, SERIES
from toolchain.verify.parity.verdict import Report, Rung

COLORS = {"passed": GOOD, "failed": BAD, "not run": FAINT}
_FIRST, _STEP = -9.0, 0.5  # of the histograms: log10 of relative differences
_WIDE = 10.6  # inches: for the longest second line of a rung


@house_style()
def ladder(report: Report) -> Markup:
    """A box for each rung from eager up, with what it was held against and its hardest check."""
    figure = Figure(figsize=(_WIDE, 0.6 * len(report.rungs) + 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 10 * _WIDE / 9)
    axes.set_ylim(-0.2, len(report.rungs))
    for height, rung in enumerate(report.rungs):
        color = COLORS[rung.status]
        box = FancyBboxPatch(
            (0.05, height + 0.12), 2.3, 0.62, boxstyle="round,pad=0.04", color=color
        )
        axes.add_patch(box)
        label = axes.text(1.2, height + 0.43, rung.rung, ha="center", va="center", fontsize=11)
        label.set(color="white", weight="bold")
        if height:
            axes.plot([1.2, 1.2], [height - 0.22, height + 0.08], color=FAINT, lw=3, zorder=0)
        first = f"{rung.status}"
        if rung.against:
            first += f", against {rung.against}: {len(rung.checks)} checks, {rung.seconds:.0f} s"
        axes.text(2.6, height + 0.58, first, fontsize=9.5, va="center", color=color, weight="bold")
        axes.text(2.6, height + 0.25, _second(rung), fontsize=8.5, va="center", color=QUIET)
    return inline_svg(figure, "The ladder of rungs")


def _second(rung: Rung) -> str:
    if rung.status != "passed":
        return rung.reason if len(rung.reason) <= 105 else rung.reason[:104] + "…"
    counted = [check for check in rung.checks if check.bound != "exact"]
    if not counted:
        return "everything is the same"
    hardest = max(counted, key=lambda check: check.strain)
    return (
        f"nearest to its bound ({hardest.strain:.0%} of it): {hardest.program}, {hardest.output} "
        f"on '{hardest.case}'"
    )[:115]


@house_style()
def by_layer(report: Report) -> Markup | None:
    """Largest difference at each place that was looked at, in the order of computation. None:
    no rung was looked into."""
    shown = [rung for rung in report.rungs if rung.layers]
    if not shown:
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.add_subplot()
    layers = 1
    for rung, color in zip(shown, SERIES, strict=False):
        places = _positions([place for place, _ in rung.layers])
        layers = max(layers, int(max(places)) + 1)
        # What is equal to the bit has no place on the axis, and leaves a gap.
        gaps = [min(gap, 10.0) if gap > 0 else np.nan for _, gap in rung.layers]
        axes.plot(places, gaps, ".-", color=color, lw=1.2, ms=5, label=f"{rung.rung}")
        if rung.found is not None:
            index = _index(rung, rung.found.layer)
            axes.annotate(
                "first difference",
                (places[index], gaps[index]),
                textcoords="offset points",
                xytext=(8, 10),
                fontsize=8,
                color=color,
            )
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, layers, max(1, layers // 15)))
    axes.set_ylabel("largest difference,\npart of the range")
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return inline_svg(figure, "Differences by layer")


def _positions(places: list[str]) -> list[float]:
    """Where each place stands on the axis of layers: those of a layer within its unit."""
    layer_of = [int(p.split(".")[1]) if p.startswith("layers.") else None for p in places]
    inside = [layer for layer in layer_of if layer is not None]
    positions = []
    for index, layer in enumerate(layer_of):
        if layer is None:
            before = not any(inner is not None for inner in layer_of[:index])
            positions.append(-0.5 + 0.2 * index if before else max(inside, default=0) + 1.2)
        else:
            earlier = layer_of[:index].count(layer)
            positions.append(layer + earlier / layer_of.count(layer))
    return positions


def _index(rung: Rung, layer: int | None) -> int:
    """The first place of a layer."""
    for index, (place, _) in enumerate(rung.layers):
        if layer is not None and place.startswith(f"layers.{layer}."):
            return index
    return 0


@house_style()
def histograms(report: Report) -> Markup | None:
    """How large the single differences are, by rung. None: nothing was computed."""
    shown = []
    for rung in report.rungs:
        computed = [check for check in rung.checks if check.bound != "exact"]
        counts = np.array([check.histogram for check in computed if check.histogram])
        if len(counts):
            shown.append((rung.rung, counts.sum(0)))
    if not shown:
        return None
    figure = Figure(figsize=(9, 1.15 * len(shown) + 0.5), layout="constrained")
    for row, (name, counts) in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, row + 1)
        left = _FIRST + _STEP * np.arange(len(counts))
        axes.bar(left, counts / counts.sum(), width=_STEP * 0.92, align="edge", color=ACCENT)
        axes.set_xlim(_FIRST, 1.0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axes.text(0.995, 0.8, name, transform=axes.transAxes, ha="right", fontsize=10)
        if row + 1 < len(shown):
            axes.set_xticklabels([])
        else:
            ticks = range(-9, 1, 1)
            axes.set_xticks(list(ticks), [f"$10^{{{t}}}$" for t in ticks])
            axes.set_xlabel("difference of a number, as a part of its tensor's range")
    return inline_svg(figure, "Histograms of differences")
