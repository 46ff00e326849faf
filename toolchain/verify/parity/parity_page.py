"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from toolchain.compile.tolerances import TABLE
from toolchain.report import html
from toolchain.report.html import (
    Markup,
    TableCell,
    details,
    element,
    join,
    paragraph,
    section,
    table,
)
from toolchain.verify.parity import parity_pictures
from toolchain.verify.parity.verdict import NOT_ASKED, Check, Report, Rung

_WORST = 10
_KINDS = {"passed": "good", "failed": "bad", "not run": "quiet"}


def write_page(report: Report, path: Path) -> None:
    html.write_page(path, page(report))


def page(report: Report) -> str:
    """The whole text of the file."""
    precision = ", ".join(f"{name} {value}" for name, value in report.precisions.items())
    parts = [
        _verdict(report),
        section(
            "The ladder",
            paragraph(
                "Each rung is held against the one that it names, from PyTorch below to the whole "
                "loop on a phone's programs above."
            ),
            parity_pictures.ladder(report),
        ),
    ]
    if (layers := parity_pictures.by_layer(report)) is not None:
        text = (
            "The places inside of the model in the order of computation, on one dialogue. Rounded "
            "weights and int8 activations differ by per cents in every layer and do not add up; a "
            "fault stands out where it is."
        )
        parts.append(section("Differences by layer", paragraph(text), layers))
    if (drawn := parity_pictures.histograms(report)) is not None:
        parts.append(section("How large the differences are", drawn))
    parts.append(section("Nearest to their bounds", _worst(report)))
    parts.append(section("Every check", *map(_rung, report.rungs)))
    parts.append(section("Tolerances", _tolerances()))
    return html.page(
        f"Parity of {Path(report.bundle).resolve().name}",
        join(f"{report.model}; {precision}; {report.seconds:.0f} s"),
        *parts,
    )


def _verdict(report: Report) -> Markup:
    lines = []
    for rung in report.rungs:
        if rung.status == "failed":
            lines.append(join(element("b", f"{rung.rung} failed.", kind="bad"), " ", rung.reason))
        elif rung.status == "not run" and rung.reason != NOT_ASKED:
            first = element("b", f"{rung.rung} was not run:", kind="quiet")
            lines.append(join(first, " ", rung.reason))
    passed = sum(rung.status == "passed" for rung in report.rungs)
    if not report.failed:
        text = f"{passed} of {len(report.rungs)} rungs passed."
        lines.insert(0, element("b", text, kind="good"))
    return join(*map(paragraph, lines))


def _text_of(case: str, texts: dict[str, str]) -> str:
    return texts.get(case) or texts.get(case.rpartition(", ")[0], "")


def _worst(report: Report) -> Markup:
    checks = [(rung.rung, check) for rung in report.rungs for check in rung.checks]
    checks = [(name, check) for name, check in checks if check.bound != "exact" or not check.passed]
    checks.sort(key=lambda entry: (entry[1].passed, -entry[1].strain))
    rows = []
    for name, check in checks[:_WORST]:
        text = _text_of(check.case, report.texts)
        what = join(
            f"{check.program}: {check.output}{_layer(check)}",
            Markup("<br>"),
            f"on “{check.case}”",
            element("blockquote", text) if text else "",
        )
        rows.append([name, what, *_cells(check)])
    return table(("rung", "what, and on which input", *_HEADS), rows, numbers=_HEADS)


_HEADS = ("max abs", "max rel", "likeness", "same token", "KL", "allowed", "margin")


def _layer(check: Check) -> str:
    return "" if check.layer is None else f", layer {check.layer}"


def _cells(check: Check) -> list[TableCell]:
    if check.bound == "exact" and check.note:
        return [TableCell(check.note, "bad", span=len(_HEADS))]
    allowed = [] if check.tolerance is None else [f"≤ {check.tolerance:.2g}"]
    likeness = ""
    if check.likeness_tolerance is not None:
        allowed.append(f"likeness ≥ {check.likeness_tolerance:.5g}")
        likeness = f"{check.likeness:.5f}"
    token = "" if check.same_token is None else f"{check.same_token:.0%}"
    kl = "" if check.kl is None else f"{check.kl:.1e}"
    values = [f"{check.max_abs:.1e}", f"{check.max_rel:.1e}", likeness, token, kl]
    kind = "" if check.passed else "bad"
    margin = "" if check.margin is None else f"{check.margin:.2g}"
    return [TableCell(value, kind) for value in [*values, Markup("<br>".join(allowed)), margin]]


def _rung(rung: Rung) -> Markup:
    status = element("span", rung.status, kind=_KINDS[rung.status])
    title = join(element("b", rung.rung), " ", status)
    if not rung.checks:
        return details(title, paragraph(rung.reason))
    rows = [[c.program, f"{c.output}{_layer(c)}", c.case, *_cells(c)] for c in rung.checks]
    return details(
        join(title, f", {len(rung.checks)} checks in {rung.seconds:.1f} s"),
        table(("program", "output", "on", *_HEADS), rows, numbers=_HEADS),
    )


def _tolerances() -> Markup:
    rows = [
        [
            row.name,
            "" if row.max_rel is None else f"{row.max_rel:g}",
            "" if row.likeness is None else f"{row.likeness:g}",
            row.reason,
        ]
        for row in TABLE.values()
    ]
    heads = ("precision", "max rel at most", "likeness at least", "why")
    computed = paragraph(
        "Where no number stands, each run computes it: it is beside every figure above, with the "
        "margin, measured as a part of allowed."
    )
    return join(computed, table(heads, rows, numbers=heads[1:3]))
