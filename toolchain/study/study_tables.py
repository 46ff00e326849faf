"""What a study's page, its Markdown and the terminal show: tables, the same for all three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolchain.report.html import TableCell
from toolchain.report.statistics import Contrast, Interval
from toolchain.study.plan import Score
from toolchain.study.summary import Line, Summary, Tested

NAMES: dict[Score, str] = {
    "loss": "held-out loss", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "words": "words",
}  # fmt: skip
SUBSTITUTES = ("meddialog_sub", "prosocial_sub")  # for corpora that cannot be had here
_LOWER_IS_BETTER: tuple[Score, ...] = ("loss",)
_FACTS = {  # head: fact, form
    "kept": ("kept", "{:.0f}"),
    "asked": ("asked", "{:.0f}"),
    "answered": ("answered", "{:.0f}"),
    "their tokens": ("answer_tokens", "{:,.0f}"),
    "steps": ("steps", "{:.0f}"),
    "accepted": ("accepted", "{:.1f}"),
    "rejected": ("rejected", "{:.1f}"),
    "EOE": ("mean_eoe", "{:.5f}"),
    "DSS": ("mean_dss", "{:.4f}"),
    "IDD": ("mean_idd", "{:.4f}"),
    "forgetting": ("forgetting", "{:+.2%}"),
    "KL": ("kl", "{:.4f}"),
}


@dataclass(frozen=True)
class StudyTable:
    """The first column is text, the others are numbers. A cell has a kind of the page's style."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]


def stream_name(stream: str) -> str:
    return f"{stream} (a substitute)" if stream in SUBSTITUTES else stream


def tables(summary: Summary) -> list[StudyTable]:
    """All but the contrasts: an overview of several streams, then stream by stream; only those that
    have a row."""
    made = [_overview(summary)] if len(summary.streams) > 1 else []
    for stream in summary.streams:
        lines = [line for line in summary.lines if line.stream == stream]
        name = stream_name(stream)
        made.append(_main(summary, name, [line for line in lines if not line.varied]))
        made.append(_varied(name, [line for line in lines if line.varied]))
        made.append(_facts(name, lines))
    return [table for table in made if table.rows]


def _overview(summary: Summary) -> StudyTable:
    """The change of the loss by row and stream."""
    baseline = summary.study.plan.baseline
    lines = [one for one in summary.lines if not one.varied and one.label != baseline]
    by_place = {(one.label, one.stream): one.to_baseline.get("loss") for one in lines}
    rows = [
        (
            TableCell(label),
            *(_change(by_place.get((label, stream)), "loss") for stream in summary.streams),
        )
        for label in dict.fromkeys(one.label for one in lines)
    ]
    heads = ("row", *map(stream_name, summary.streams))
    return StudyTable(f"{NAMES['loss'].capitalize()}, change to {baseline}", heads, tuple(rows))


def _main(summary: Summary, stream: str, lines: Sequence[Line]) -> StudyTable:
    rows = [
        (
            TableCell(line.label),
            TableCell(line.orderings),
            *_pair(line, "loss", line.to_baseline),
            *_pair(line, "rouge1", line.to_baseline),
            *_pair(line, "rougeL", line.to_baseline),
            TableCell(f"{line.values['words']:.1f}"),
        )
        for line in lines
    ]
    change = f"Δ to {summary.study.plan.baseline}"
    heads = ("row", "orderings", "loss", change, "ROUGE-1", change, "ROUGE-L", change, "words")
    return StudyTable(stream, heads, tuple(rows))


def _varied(stream: str, lines: Sequence[Line]) -> StudyTable:
    rows = [
        (
            TableCell(line.label),
            TableCell(line.orderings),
            *_pair(line, "loss", line.to_row),
            _change(line.to_baseline.get("loss"), "loss"),
            *_pair(line, "rouge1", line.to_row),
            _change(line.to_baseline.get("rouge1"), "rouge1"),
        )
        for line in lines
    ]
    heads = ("row, varied", "orderings", "loss", "Δ to its row", "Δ to base",
             "ROUGE-1", "Δ to its row", "Δ to base")  # fmt: skip
    return StudyTable(f"{stream}, varied alone", heads, tuple(rows))


def _facts(stream: str, lines: Sequence[Line]) -> StudyTable:
    """Only facts that some line has, and lines that have one."""
    heads = [
        head for head, (fact, _) in _FACTS.items() if any(fact in line.facts for line in lines)
    ]
    rows = [
        (TableCell(line.label), *(TableCell(_fact(line, *_FACTS[head])) for head in heads))
        for line in lines
    ]
    title = f"{stream}, what was kept and learned"
    return StudyTable(title, ("row", *heads), tuple(rows) if heads else ())


def _fact(line: Line, name: str, form: str) -> str:
    return form.format(line.facts[name]) if name in line.facts else "—"


def _pair(
    line: Line, score: Score, contrasts: Mapping[Score, Contrast]
) -> tuple[TableCell, TableCell]:
    form = "{:.3f}" if score == "loss" else "{:.4f}"
    return TableCell(form.format(line.values[score])), _change(contrasts.get(score), score)


def _change(contrast: Contrast | None, score: Score) -> TableCell:
    if contrast is None:
        return TableCell("")
    return TableCell(relative_text(contrast), verdict(contrast, score))


def verdict(contrast: Contrast, score: Score) -> str:
    """A kind of the page's style: better or worse, where the interval leaves zero out."""
    if not contrast.clear:
        return ""
    better = (contrast.difference < 0) is (score in _LOWER_IS_BETTER)
    return "good" if better else "bad"


def relative_text(contrast: Contrast) -> str:
    """``−5.2 % [−6.0, −4.4]``, or with few orderings each one's: ``−5.2 % (−6.0, −5.1, −4.4)``."""
    if contrast.relative is None:
        return "—"
    if (interval := contrast.relative_interval) is not None:
        return f"{_percent(contrast.relative)} % [{_between(interval)}]"
    points = contrast.relative_points or ()
    return f"{_percent(contrast.relative)} % ({', '.join(map(_percent, sorted(points)))})"


def _between(interval: Interval) -> str:
    return f"{_percent(interval.low)}, {_percent(interval.high)}"


def _percent(part: float) -> str:
    return f"{100 * part:+.1f}".replace("-", "−")


def contrast_table(summary: Summary) -> StudyTable:
    """The primary contrast first, uncorrected; then the others."""
    named = [(summary.primary, "primary")] if summary.primary else []
    rows = [
        tuple(_tested(one, kind)) for one, kind in [*named, *((s, "") for s in summary.secondary)]
    ]
    heads = ("contrast", "streams", "score", "dialogues", "difference", "relative", "p",
             "p, Holm")  # fmt: skip
    return StudyTable("Contrasts", heads, tuple(rows))


def _tested(one: Tested, kind: str) -> Iterator[TableCell]:
    contrast = one.contrast
    yield TableCell(f"{one.label} − {one.against}" + (f" ({kind})" if kind else ""))
    yield TableCell(", ".join(map(stream_name, one.streams)))
    yield TableCell(NAMES[one.score])
    yield TableCell(f"{contrast.dialogues:,}")
    yield TableCell(difference_text(contrast))
    yield TableCell(relative_text(contrast), verdict(contrast, one.score))
    yield TableCell(_p(contrast.p))
    yield TableCell("not corrected" if kind else _p(one.corrected))


def difference_text(contrast: Contrast) -> str:
    if contrast.interval is None:
        points = ", ".join(f"{point:+.4f}" for point in sorted(contrast.points))
        return f"{contrast.difference:+.4f} ({points})".replace("-", "−")
    low, high = contrast.interval.low, contrast.interval.high
    return f"{contrast.difference:+.4f} [{low:+.4f}, {high:+.4f}]".replace("-", "−")


def _p(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
