"""The report's pictures: SVG without anything around them, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolchain.report.charts import house_style, inline_svg
from toolchain.report.html import Markup
from toolchain.report.palette import ACCENT, BAD, FAINT, INK, SERIES, WARNING
from toolchain.report.picture import Picture
from toolchain.simulate.outcome import SimulationOutcome, TuningOutcome

REFUSED, SECOND = "#c9cfd6", "#4fa3b3"  # dots that stand back; every other block


def pictures(outcome: SimulationOutcome) -> list[Picture]:
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
    charts = [(title, _draw(drawing, outcome, title), note) for title, drawing, note in drawn]
    return [Picture(title, svg, note) for title, svg, note in charts if svg is not None]


@house_style()
def _draw(
    drawing: Callable[[Axes, SimulationOutcome], bool], outcome: SimulationOutcome, title: str
) -> Markup | None:
    """None: there was nothing to show."""
    figure = Figure(figsize=(6.4, 3.1), layout="constrained")
    return inline_svg(figure, title) if drawing(figure.add_subplot(), outcome) else None


def _domains(axes: Axes, outcome: SimulationOutcome) -> bool:
    domains, counts = outcome.occupancy.domains, outcome.occupancy.counts
    if not domains:
        return False
    axes.stackplot(
        range(1, len(counts) + 1),
        *zip(*counts, strict=True),
        labels=domains,
        colors=[SERIES[i % len(SERIES)] for i in range(len(domains))],
    )
    axes.set(xlabel="dialogues observed", ylabel="dialogue sets", xlim=(1, max(2, len(counts))))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return True


def _acceptance(axes: Axes, outcome: SimulationOutcome) -> bool:
    blocks = outcome.blocks
    upright = len(blocks) > 5
    for index, block in enumerate(blocks):
        share, middle = block.rate, block.first + block.observed / 2
        color = ACCENT if index % 2 else SECOND
        axes.bar(block.first, share, block.observed, align="edge", color=color)
        if len(blocks) <= 16:
            turn = 90 if upright else 0
            place: Any = {"ha": "center", "va": "bottom", "rotation": turn}
            axes.text(middle, share + 0.02, block.name, fontsize=8, **place)
    axes.set(xlabel="dialogues observed", ylabel="kept", ylim=(0, 1.6 if upright else 1.15))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.0f} %")
    return bool(blocks)


def _scores(axes: Axes, outcome: SimulationOutcome) -> bool:
    measured = [one for one in outcome.scored if one.eoe is not None]
    for kept, color, label in ((False, REFUSED, "refused"), (True, ACCENT, "kept")):
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


def _loss(axes: Axes, outcome: SimulationOutcome) -> bool:
    tunings = outcome.tunings
    ends = [*(tuning.place for tuning in tunings[1:]), outcome.count("observed") * 1.06 + 1]
    drawn = False
    for tuning, following in zip(tunings, ends, strict=True):
        trained = bool(tuning.losses)
        if trained:
            _training_loss(axes, tuning, following)
        if math.isfinite(tuning.before) and math.isfinite(tuning.after):
            _heldout_loss(axes, tuning)
            trained = True
        drawn = drawn or trained
    line = "training, steps of the run spread out"
    axes.plot([], [], color=FAINT, linewidth=1, label=line)
    axes.plot([], [], color=ACCENT, marker="o", markersize=4, label="held out, accepted")
    axes.plot([], [], color=BAD, marker="o", markersize=4, label="held out, refused")
    axes.set(xlabel="dialogues observed", ylabel="nats a label")
    axes.legend(fontsize=8)
    return drawn


def _training_loss(axes: Axes, tuning: TuningOutcome, following: float) -> None:
    """A run's steps, spread over the dialogues up to the ``following`` run, to be seen."""
    width = 0.8 * (following - tuning.place) / len(tuning.losses)
    along = [tuning.place + width * i for i in range(len(tuning.losses))]
    axes.plot(along, tuning.losses, color=FAINT, linewidth=1)


def _heldout_loss(axes: Axes, tuning: TuningOutcome) -> None:
    color = ACCENT if tuning.accepted else BAD
    axes.annotate(
        "",
        (tuning.place, tuning.after),
        (tuning.place, tuning.before),
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6},
    )
    axes.plot([tuning.place], [tuning.before], "o", color=color, markersize=4)


def _rouge(axes: Axes, outcome: SimulationOutcome) -> bool:
    if not outcome.rouge1:
        return False
    places, scores = zip(*outcome.rouge1, strict=True)
    axes.plot(places, scores, "o", color=FAINT, markersize=4, label="one reply")
    size = max(1, len(scores) // 8)
    means = [
        sum(scores[max(0, i - size) : i + 1]) / (i + 1 - max(0, i - size))
        for i in range(len(scores))
    ]
    axes.plot(places, means, color=ACCENT, label=f"mean of the last {size + 1}")
    for tuning in outcome.tunings:
        if tuning.accepted:
            axes.axvline(tuning.place, color=WARNING, linewidth=1, linestyle=":")
    axes.plot([], [], color=WARNING, linestyle=":", label="a new adapter")
    axes.set(xlabel="dialogues observed", ylabel="ROUGE-1 F1", ylim=(0, None))
    axes.legend(fontsize=8)
    return True


def _memory(axes: Axes, outcome: SimulationOutcome) -> bool:
    samples = outcome.record.samples
    if not samples:
        return False
    limit = outcome.device.memory.app_mb
    axes.plot(
        [s.seconds for s in samples],
        [s.resident / 1e6 for s in samples],
        color=ACCENT,
        label="now",
    )
    axes.axhline(limit, color=BAD, label=f"limit, {limit:,.0f} MB")
    peak = outcome.record.peak / 1e6
    axes.axhline(peak, color=WARNING, linestyle="--", label=f"peak, {peak:,.0f} MB")
    for number, fault in enumerate(outcome.record.faults):
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


def _storage(axes: Axes, outcome: SimulationOutcome) -> bool:
    nights = outcome.nights
    axes.plot(
        [n.day + 1 for n in nights],
        [n.storage_mb for n in nights],
        color=ACCENT,
        marker="o",
        markersize=4,
    )
    axes.set(xlabel="day", ylabel=f"MB of {outcome.device.storage.app_mb:,.0f}", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return bool(nights)


def _nights(axes: Axes, outcome: SimulationOutcome) -> bool:
    nights: Any = outcome.nights
    axes.bar([n.day + 1 for n in nights], [n.hours for n in nights], color=ACCENT)
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
