"""A study's report as one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from toolchain.report import html
from toolchain.report.html import Markup, element, join, paragraph, section, table
from toolchain.report.statistics import FEWEST_ORDERINGS, RESAMPLES
from toolchain.study.pictures import pictures
from toolchain.study.study_tables import (
    NAMES,
    SUBSTITUTES,
    StudyTable,
    contrast_table,
    difference_text,
    relative_text,
    stream_name,
    tables,
)
from toolchain.study.summary import Summary


def write_page(path: Path, summary: Summary) -> None:
    html.write_page(path, page(summary))


def page(summary: Summary) -> str:
    """The whole text of the file."""
    plan = summary.study.plan
    drawn = [html.figure(one.title, one.svg, one.note) for one in pictures(summary)]
    contrasts = contrast_table(summary)
    return html.page(
        f"Study: {plan.name}",
        join(plan.about),
        *_notes(summary),
        element("div", *_tiles(summary), kind="tiles"),
        _primary(summary),
        element("div", *drawn, kind="stack"),
        *[section(one.title, _markup(one)) for one in tables(summary)],
        section("Contrasts", _markup(contrasts)) if contrasts.rows else Markup(""),
        _method(summary),
    )


def _notes(summary: Summary) -> list[Markup]:
    notes = []
    if summary.missing:
        text = (
            f"{summary.missing:,} of {summary.cells:,} cells are missing: what follows is of the "
            f"others, and a row with fewer orderings says so."
        )
        notes.append(paragraph(text, kind="note"))
    if named := [stream for stream in summary.streams if stream in SUBSTITUTES]:
        text = f"{' and '.join(named)} stand for corpora that cannot be had: they are substitutes."
        notes.append(paragraph(text, kind="note"))
    return notes


def _tiles(summary: Summary) -> list[Markup]:
    plan = summary.study.plan
    tiles = [
        html.tile(f"{summary.cells - summary.missing:,}", f"of {summary.cells:,} cells"),
        html.tile(str(len(summary.streams)), f"streams: {', '.join(summary.streams)}"),
        html.tile(str(plan.orderings), "orderings"),
    ]
    if summary.primary:
        one = summary.primary
        name = f"{NAMES[one.score]}, {one.label} − {one.against}"
        tiles.append(html.tile(relative_text(one.contrast).split(" %")[0] + " %", name))
    return tiles


def _primary(summary: Summary) -> Markup:
    """The contrast that was fixed beforehand, in a sentence."""
    plan, found = summary.study.plan.primary, summary.primary
    if plan is None:
        return section("Primary contrast", paragraph("The plan has none.", kind="quiet"))
    streams = ", ".join(map(stream_name, plan.streams))
    what = f"Fixed beforehand: {NAMES[plan.score]} of {plan.row} − {plan.against} on {streams}. "
    if found is None:
        return section("Primary contrast", paragraph(what, "Not measured yet."))
    contrast = found.contrast
    if contrast.interval is None:
        verdict = (
            f"Fewer than {FEWEST_ORDERINGS} orderings were measured, so there is no interval; in "
            f"brackets each one's."
        )
    elif contrast.clear:
        verdict = "The interval leaves zero out."
    else:
        verdict = "The interval holds zero: no difference is shown."
    text = (
        f"{difference_text(contrast)}, relative {relative_text(contrast)}, "
        f"{contrast.dialogues:,} dialogues. {verdict}"
    )
    return section("Primary contrast", paragraph(what, element("b", text)))


def _markup(one: StudyTable) -> Markup:
    return table(one.heads, one.rows, numbers=one.heads[1:])


def _method(summary: Summary) -> Markup:
    text = (
        "Held-out loss: nats a label of the tests' last replies, all nats over all labels. ROUGE-1 "
        "and ROUGE-L: mean F1 of the greedy reply with the reference. Differences are paired: the "
        "same ordering, the same dialogues. Intervals: 95 % percentiles of "
        f"{RESAMPLES:,} resamples that draw dialogues and orderings anew, independently (Owen's "
        "pigeonhole bootstrap); relative ones are of ratios of means. With fewer than "
        f"{FEWEST_ORDERINGS} orderings each one's value stands in brackets in place of an "
        "interval. p-values of all contrasts but the primary one are corrected together by Holm."
    )
    settings = [[name, str(value)] for name, value in sorted(summary.study.plan.options.items())]
    shown = table(("option of every cell", "value"), settings) if settings else Markup("")
    return section("How it was measured", paragraph(text), shown)
