"""A study's pictures: gains by row, learning curves, what is varied, quality against its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolchain.report.charts import house_style, inline_svg
from toolchain.report.palette import FAINT, INK, SERIES
from toolchain.report.picture import Picture
from toolchain.report.statistics import Contrast
from toolchain.study.study_tables import stream_name
from toolchain.study.summary import Line, Summary

_WIDTH, _HEIGHT = 3.5, 2.9  # inches of one pair of axes


def pictures(summary: Summary) -> list[Picture]:
    """Those for which there is something to show."""
    base = summary.study.plan.baseline
    made = [
        _gains(summary, f"Change of held-out loss to {base}, in percent: further left is better. "
               "Bars are 95 % intervals; open dots are single orderings, where they are too few."),
    ]  # fmt: skip
    for name in _columns(summary):
        title = "Learning curves" if name == "answers" else f"By {name.replace('_', ' ')}"
        note = f"Change of held-out loss to {base}; all else as in the row."
        made.append(_curves(summary, name, title, note))
    made.append(
        _costs(
            summary,
            "Held-out loss against what a night takes of each phone (modelled), means over the "
            "streams; named are rows that no other beats on both.",
        )
    )
    return [picture for picture in made if picture is not None]


def _compared(lines: Sequence[Line]) -> list[tuple[Line, Contrast]]:
    """With their change of loss, those that have one."""
    found = [(line, line.to_baseline.get("loss")) for line in lines]
    return [
        (line, contrast) for line, contrast in found if contrast and contrast.relative is not None
    ]


@house_style()
def _gains(summary: Summary, note: str) -> Picture | None:
    panels = [
        (stream, compared)
        for stream in summary.streams
        if (
            compared := _compared(
                [one for one in summary.lines if one.stream == stream and not one.varied]
            )
        )
    ]
    if not panels:
        return None
    most = max(len(compared) for _, compared in panels)
    figure, axes = _grid(len(panels), height=1.0 + 0.24 * most)
    for index, (where, (stream, compared)) in enumerate(zip(axes, panels, strict=True)):
        for place, (_, contrast) in enumerate(compared):
            _gain(where, place, contrast, SERIES[index % len(SERIES)])
        where.set_yticks(range(len(compared)), [line.label for line, _ in compared])
        where.set_ylim(len(compared) - 0.5, -0.5)
        where.axvline(0.0, color=INK, linewidth=0.8)
        where.set_title(stream_name(stream), fontsize=10)
        where.set_xlabel("loss, %")
    return Picture("Gain by row", inline_svg(figure, "Gain by row"), note)


def _gain(axes: Axes, place: int, contrast: Contrast, color: str) -> None:
    axes.plot([100 * float(contrast.relative or 0.0)], [place], "o", color=color, markersize=5)
    if interval := contrast.relative_interval:
        ends = [100 * interval.low, 100 * interval.high]
        axes.plot(ends, [place, place], color=color, linewidth=2)
    elif points := contrast.relative_points:
        places: Any = [place] * len(points)
        axes.plot([100 * p for p in points], places, "o", color=color, fillstyle="none")


def _columns(summary: Summary) -> list[str]:
    """Names that lines vary by several numbers; ``answers`` first."""
    values: dict[str, set[object]] = {}
    for line in summary.lines:
        for name, value in line.varied:
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(name, set()).add(value)
    names = [name for name, found in values.items() if len(found) > 1]
    return sorted(names, key=lambda name: name != "answers")


@house_style()
def _curves(summary: Summary, name: str, title: str, note: str) -> Picture | None:
    panels = [
        (stream, found) for stream in summary.streams if (found := _lines_by(summary, stream, name))
    ]
    if not panels:
        return None
    figure, axes = _grid(len(panels), height=_HEIGHT)
    for where, (stream, curves) in zip(axes, panels, strict=True):
        for label, points in curves.items():
            _curve(where, label, points)
        where.axhline(0.0, color=FAINT, linewidth=0.8)
        where.set_xscale("log", base=2)
        where.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        where.set(xlabel=name.replace("_", " "), ylabel="loss, %")
        where.set_title(stream_name(stream), fontsize=10)
        if 1 < len(curves) <= len(SERIES):
            where.legend(fontsize=8)
    return Picture(title, inline_svg(figure, title), note)


_Points = list[tuple[float, Contrast]]


def _lines_by(summary: Summary, stream: str, name: str) -> dict[str, _Points]:
    """Curves along ``name``: one for each row and what else is varied, with the row's own point
    where it says its value."""
    curves: dict[str, _Points] = {}
    own: dict[str, tuple[float, Contrast]] = {}
    for line, contrast in _compared([one for one in summary.lines if one.stream == stream]):
        value = dict(line.varied).get(name)
        if isinstance(value, int | float) and value > 0:
            others = [f"{key} {other}" for key, other in line.varied if key != name]
            curves.setdefault(", ".join([line.row, *others]), []).append((value, contrast))
        elif not line.varied and (place := _place(summary, line, name)) is not None:
            own[line.label] = place, contrast
    for label, points in curves.items():
        if label in own and own[label][0] not in [value for value, _ in points]:
            points.append(own[label])
    return {
        label: sorted(points, key=lambda point: point[0])
        for label, points in curves.items()
        if len(points) > 1
    }


def _place(summary: Summary, line: Line, name: str) -> float | None:
    """The value of a row that does not vary it, where its cells tell it."""
    cell = next(one.cell for one in summary.study.planned if one.label == line.label)
    value = cell.options.get(name, cell.policy.get(name))
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _curve(axes: Axes, label: str, points: _Points) -> None:
    across = [value for value, _ in points]
    (line,) = axes.plot(
        across,
        [100 * float(contrast.relative or 0.0) for _, contrast in points],
        marker="o",
        markersize=4,
        label=label,
    )
    if all(contrast.relative_interval for _, contrast in points):
        ends = [contrast.relative_interval for _, contrast in points if contrast.relative_interval]
        low, high = [100 * end.low for end in ends], [100 * end.high for end in ends]
        axes.fill_between(across, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
        return
    for value, contrast in points:
        for point in contrast.relative_points or ():
            axes.plot([value], [100 * point], ".", color=line.get_color(), markersize=3)


@dataclass(frozen=True)
class _Cost:
    """Of a line on a phone, means over its streams. ``gain``: change of loss in percent."""

    label: str
    cost: float
    gain: float


@house_style()
def _costs(summary: Summary, note: str) -> Picture | None:
    kinds = {"minutes.": "minutes of a night", "memory_mb.": "peak memory, MB"}
    found = {kind: _phones(summary, kind) for kind in kinds}
    found = {kind: phones for kind, phones in found.items() if phones}
    if not found:
        return None
    figure, axes = _grid(len(found), height=_HEIGHT + 0.4, width=4.6)
    for where, (kind, phones) in zip(axes, found.items(), strict=True):
        for index, (phone, costs) in enumerate(phones.items()):
            color = SERIES[index % len(SERIES)]
            across, up = [one.cost for one in costs], [one.gain for one in costs]
            where.plot(across, up, "o", markersize=4, alpha=0.8, label=phone, color=color)
            for one in _unbeaten(costs):
                place: Any = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7}
                where.annotate(one.label, (one.cost, one.gain), color=color, **place)
        where.set(xlabel=kinds[kind], ylabel="loss, %")
        where.legend(fontsize=8)
    return Picture("Quality against its cost", inline_svg(figure, "Quality and cost"), note)


def _phones(summary: Summary, kind: str) -> dict[str, list[_Cost]]:
    """By phone: every line that was trained and has a cost of this kind."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line, contrast in _compared(summary.lines):
        if line.facts.get("steps", 0.0) > 0.0:
            for name, value in line.facts.items():
                if name.startswith(kind):
                    gain = 100 * float(contrast.relative or 0.0)
                    phone = name.removeprefix(kind)
                    points.setdefault((phone, line.label), []).append((value, gain))
    phones: dict[str, list[_Cost]] = {}
    for (phone, label), pairs in points.items():
        cost, gain = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        phones.setdefault(phone, []).append(_Cost(label, cost, gain))
    return phones


def _unbeaten(costs: Sequence[_Cost]) -> list[_Cost]:
    """Those than which none is both cheaper and better, by a part of the range that can be seen;
    of equals the first."""
    gains = [one.gain for one in costs]
    seen = 0.03 * (max(gains) - min(gains))
    best: list[_Cost] = []
    for one in sorted(costs, key=lambda one: (one.cost, one.gain)):
        if not best or one.gain < best[-1].gain - seen:
            best.append(one)
    return best


def _grid(count: int, height: float, width: float = _WIDTH) -> tuple[Figure, list[Axes]]:
    across = min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    axes = [figure.add_subplot(down, across, index + 1) for index in range(count)]
    return figure, axes
