"""The report's pictures: SVG without anything around them, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolchain.simulate.outcome import Outcome

INK, QUIET, KEPT, REFUSED, ALERT = "#1f2933", "#9aa5b1", "#1f7a8c", "#c9cfd6", "#c8553d"
COLORS = ("#1f7a8c", "#e9a23b", "#7b5ea7", "#4f9d69", "#c8553d", "#3d6cb9", "#b0728f", "#8b8f3f")
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "attune",  # the same picture has the same bytes
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """``note``: a sentence below it."""

    title: str
    svg: str
    note: str


def pictures(outcome: Outcome) -> list[Picture]:
    """Those for which the run has something to show."""
    drawn = [
        ("Buffer by domain", _domains, "Stored dialogue sets of each domain, as the log replays."),
        ("Acceptance", _acceptance, "Part of each block of the stream that entered the buffer."),
        ("Scores, kept against refused", _scores, "Each dot is a dialogue; both axes by its log."),
        ("Loss", _loss, "Training loss of each step; held-out loss before and after each run."),
        ("ROUGE-1", _rouge, "Of the model's own replies with the stream's, every so often."),
        ("Memory", _memory, "Resident, mapped weights included, above what Python itself takes."),
        ("Storage", _storage, "Bundle, store, adapters and training state, each morning."),
        ("Nights (modelled)", _nights, "Hours of work, and its part of a full battery."),
    ]
    with matplotlib.rc_context(_STYLE):
        made = [(title, _draw(drawing, outcome), note) for title, drawing, note in drawn]
    return [Picture(title, svg, note) for title, svg, note in made if svg]


def _draw(drawing: Callable[[Axes, Outcome], bool], outcome: Outcome) -> str:
    figure = Figure(figsize=(6.4, 3.1), layout="constrained")
    if not drawing(figure.add_subplot(), outcome):
        return ""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prolog, which has no place inside a page


def _domains(axes: Axes, outcome: Outcome) -> bool:
    known, counts = outcome.occupancy
    if not known:
        return False
    axes.stackplot(
        range(1, len(counts) + 1),
        *zip(*counts, strict=True),
        labels=known,
        colors=[COLORS[i % len(COLORS)] for i in range(len(known))],
    )
    axes.set(xlabel="dialogues observed", ylabel="dialogue sets", xlim=(1, max(2, len(counts))))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return True


def _acceptance(axes: Axes, outcome: Outcome) -> bool:
    blocks = outcome.blocks
    upright = len(blocks) > 5
    for index, block in enumerate(blocks):
        share, middle = block.kept / block.observed, block.first + block.observed / 2
        color = KEPT if index % 2 else "#4fa3b3"
        axes.bar(block.first, share, block.observed, align="edge", color=color)
        if len(blocks) <= 16:
            turn = 90 if upright else 0
            place: Any = {"ha": "center", "va": "bottom", "rotation": turn}
            axes.text(middle, share + 0.02, block.name, fontsize=8, **place)
    axes.set(xlabel="dialogues observed", ylabel="kept", ylim=(0, 1.6 if upright else 1.15))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.0f} %")
    return bool(blocks)


def _scores(axes: Axes, outcome: Outcome) -> bool:
    measured = [one for one in outcome.scored if one.eoe is not None]
    for kept, color, label in ((False, REFUSED, "refused"), (True, KEPT, "kept")):
        some = [one for one in measured if one.kept is kept]
        axes.scatter(
            [_score(one.dss) for one in some],
            [_score(one.idd) for one in some],
            14,
            color=color,
            label=f"{label} ({len(some)})",
            linewidths=0,
            alpha=0.75,
        )
    axes.set(xlabel="domain-specific score", ylabel="in-domain dissimilarity")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return bool(measured)


def _score(value: float | None) -> float:
    return math.nan if value is None else value


def _loss(axes: Axes, outcome: Outcome) -> bool:
    drawn = False
    for number, tuning in enumerate(outcome.tunings):
        if tuning.losses:  # spread over the dialogues up to the next run, to be seen
            last = (
                outcome.tunings[number + 1].place
                if number + 1 < len(outcome.tunings)
                else (outcome.counts["observed"] * 1.06 + 1)
            )
            width = 0.8 * (last - tuning.place) / max(1, len(tuning.losses))
            along = [tuning.place + width * i for i in range(len(tuning.losses))]
            axes.plot(
                along,
                tuning.losses,
                color=QUIET,
                linewidth=1,
                label=None if drawn else "training, steps of the run spread out",
            )
            drawn = True
        if math.isfinite(tuning.before) and math.isfinite(tuning.after):
            color = KEPT if tuning.accepted else ALERT
            axes.annotate(
                "",
                (tuning.place, tuning.after),
                (tuning.place, tuning.before),
                arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6},
            )
            axes.plot([tuning.place], [tuning.before], "o", color=color, markersize=4)
            drawn = True
    axes.plot([], [], color=KEPT, marker="o", markersize=4, label="held out, accepted")
    axes.plot([], [], color=ALERT, marker="o", markersize=4, label="held out, refused")
    axes.set(xlabel="dialogues observed", ylabel="nats a label")
    axes.legend(fontsize=8)
    return drawn


def _rouge(axes: Axes, outcome: Outcome) -> bool:
    if not outcome.rouge1:
        return False
    places, scores = zip(*outcome.rouge1, strict=True)
    axes.plot(places, scores, "o", color=QUIET, markersize=4, label="one reply")
    size = max(1, len(scores) // 8)
    means = [
        sum(scores[max(0, i - size) : i + 1]) / (i + 1 - max(0, i - size))
        for i in range(len(scores))
    ]
    axes.plot(places, means, color=KEPT, label=f"mean of the last {size + 1}")
    for tuning in outcome.tunings:
        if tuning.accepted:
            axes.axvline(tuning.place, color=COLORS[1], linewidth=1, linestyle=":")
    axes.plot([], [], color=COLORS[1], linestyle=":", label="a new adapter")
    axes.set(xlabel="dialogues observed", ylabel="ROUGE-1 F1", ylim=(0, None))
    axes.legend(fontsize=8)
    return True


def _memory(axes: Axes, outcome: Outcome) -> bool:
    samples = outcome.watched.samples
    if not samples:
        return False
    limit = outcome.device.memory.app_mb
    axes.plot([s[0] for s in samples], [s[2] / 1e6 for s in samples], color=KEPT, label="now")
    axes.axhline(limit, color=ALERT, label=f"limit, {limit:,.0f} MB")
    peak = outcome.watched.peak / 1e6
    axes.axhline(peak, color=COLORS[1], linestyle="--", label=f"peak, {peak:,.0f} MB")
    for number, fault in enumerate(outcome.watched.faults):
        axes.axvline(
            fault.seconds,
            color=INK,
            linewidth=0.8,
            linestyle=":",
            label=None if number else "a fault",
        )
    axes.set(xlabel="seconds of the run on this machine", ylabel="MB", ylim=(0, None))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _storage(axes: Axes, outcome: Outcome) -> bool:
    nights = outcome.nights
    axes.plot(
        [n.day + 1 for n in nights],
        [n.storage_mb for n in nights],
        color=KEPT,
        marker="o",
        markersize=4,
    )
    axes.set(xlabel="day", ylabel=f"MB of {outcome.device.storage.app_mb:,.0f}", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bool(nights)


def _nights(axes: Axes, outcome: Outcome) -> bool:
    nights: Any = outcome.nights
    axes.bar([n.day + 1 for n in nights], [n.hours for n in nights], color=KEPT)
    for night in nights:
        if night.hours > 0 and len(nights) <= 40:
            axes.text(
                night.day + 1,
                night.hours,
                f"{100 * night.battery:.2g} %",
                ha="center",
                va="bottom",
                fontsize=8,
            )
    axes.set(xlabel="day", ylabel="hours")
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bool(nights)
