"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from toolchain.compile.tolerances import TABLE
from toolchain.verify.parity import parity_pictures
from toolchain.verify.parity.verdict import NOT_ASKED, Check, Report, Rung

_WORST = 10
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; background: #fff; margin: 0 auto;
  padding: 2rem 1.25rem 4rem; max-width: 62rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; } .sub { color: #5b616b; margin: 0 0 1.2rem; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: left; padding: .28rem .6rem .28rem 0; border-bottom: 1px solid #e6e8ec;
  vertical-align: top; }
th { font-weight: 600; color: #5b616b; } td.n { font-variant-numeric: tabular-nums;
  white-space: nowrap; } .passed { color: #1a7f5a; } .failed { color: #c0362c; font-weight: 600; }
.not { color: #80858e; } blockquote { margin: .2rem 0 0; color: #5b616b; font-size: .84rem; }
details { border-bottom: 1px solid #e6e8ec; padding: .45rem 0; } summary { cursor: pointer; }
.scroll { overflow-x: auto; } .verdict { font-size: 1.05rem; }
"""


def write_page(report: Report, path: Path) -> None:
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    precision = ", ".join(f"{name} {value}" for name, value in report.precisions.items())
    name = escape(Path(report.bundle).name)
    parts = [
        f"<h1>Parity of {name}</h1>",
        f'<p class="sub">{escape(report.model)}; {escape(precision)}; {report.seconds:.0f} s</p>',
        _verdict(report),
        "<h2>The ladder</h2>",
        "<p>Each rung is held against the one that it names, from PyTorch below to the whole loop "
        "on a phone's programs above.</p>",
        parity_pictures.ladder(report),
    ]
    if layers := parity_pictures.by_layer(report):
        parts += [
            "<h2>Differences by layer</h2>",
            "<p>The places inside of the model in the order of computation, on one dialogue. "
            "Rounded weights and int8 activations differ by per cents in every layer and do not "
            "add up; a fault stands out where it is.</p>",
            layers,
        ]
    if drawn := parity_pictures.histograms(report):
        parts += ["<h2>How large the differences are</h2>", drawn]
    parts += ["<h2>Nearest to their bounds</h2>", _worst(report)]
    parts += ["<h2>Every check</h2>", *map(_rung, report.rungs)]
    parts += ["<h2>Tolerances</h2>", _tolerances()]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Parity of {name}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _verdict(report: Report) -> str:
    lines = []
    for rung in report.rungs:
        if rung.status == "failed":
            lines.append(f'<b class="failed">{rung.rung} failed.</b> {escape(rung.reason)}')
        elif rung.status == "not run" and rung.reason != NOT_ASKED:
            lines.append(f'<b class="not">{rung.rung} was not run:</b> {escape(rung.reason)}')
    passed = sum(rung.status == "passed" for rung in report.rungs)
    if not report.failed:
        lines.insert(0, f'<b class="passed">{passed} of {len(report.rungs)} rungs passed.</b>')
    return "".join(f'<p class="verdict">{line}</p>' for line in lines)


def _text_of(case: str, texts: dict[str, str]) -> str:
    return texts.get(case) or texts.get(case.rpartition(", ")[0], "")


def _worst(report: Report) -> str:
    rows = [(rung.rung, check) for rung in report.rungs for check in rung.checks]
    rows = [(name, check) for name, check in rows if check.bound != "exact" or not check.passed]
    rows.sort(key=lambda row: (row[1].passed, -row[1].strain))
    body = []
    for name, check in rows[:_WORST]:
        text = _text_of(check.case, report.texts)
        quote = f"<blockquote>{escape(text)}</blockquote>" if text else ""
        body.append(
            f"<tr><td>{name}</td><td>{escape(check.program)}: {escape(check.output)}"
            f"{_layer(check)}<br>on “{escape(check.case)}”{quote}</td>{_cells(check)}</tr>"
        )
    return _table(("rung", "what, and on which input", *_HEADS), body)


_HEADS = ("max abs", "max rel", "likeness", "same token", "KL", "allowed", "margin")


def _layer(check: Check) -> str:
    return "" if check.layer is None else f", layer {check.layer}"


def _cells(check: Check) -> str:
    if check.bound == "exact" and check.note:
        return f'<td class="failed" colspan="{len(_HEADS)}">{escape(check.note)}</td>'
    allowed = [] if check.tolerance is None else [f"≤ {check.tolerance:.2g}"]
    likeness = ""
    if check.likeness_tolerance is not None:
        allowed.append(f"likeness ≥ {check.likeness_tolerance:.5g}")
        likeness = f"{check.likeness:.5f}"
    token = "" if check.same_token is None else f"{check.same_token:.0%}"
    kl = "" if check.kl is None else f"{check.kl:.1e}"
    values = [f"{check.max_abs:.1e}", f"{check.max_rel:.1e}", likeness, token, kl]
    kind = "n" if check.passed else "n failed"
    margin = "" if check.margin is None else f"{check.margin:.2g}"
    cells = [*values, "<br>".join(allowed), margin]
    return "".join(f'<td class="{kind}">{cell}</td>' for cell in cells)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _rung(rung: Rung) -> str:
    kind = rung.status.split()[0]
    title = f'<b>{rung.rung}</b> <span class="{kind}">{rung.status}</span>'
    if not rung.checks:
        return f"<details><summary>{title}</summary><p>{escape(rung.reason)}</p></details>"
    rows = [
        f"<tr><td>{escape(c.program)}</td><td>{escape(c.output)}{_layer(c)}</td>"
        f"<td>{escape(c.case)}</td>{_cells(c)}</tr>"
        for c in rung.checks
    ]
    table = _table(("program", "output", "on", *_HEADS), rows)
    return (
        f"<details><summary>{title}, {len(rung.checks)} checks in {rung.seconds:.1f} s"
        f"</summary>{table}</details>"
    )


def _tolerances() -> str:
    rows = []
    for row in TABLE.values():
        most = "" if row.max_rel is None else f"{row.max_rel:g}"
        least = "" if row.likeness is None else f"{row.likeness:g}"
        rows.append(
            f'<tr><td>{escape(row.name)}</td><td class="n">{most}</td><td class="n">{least}</td>'
            f"<td>{escape(row.reason)}</td></tr>"
        )
    said = (
        "<p>Where no number stands, each run computes it: it is beside every figure above, with "
        "the margin, measured as a part of allowed.</p>"
    )
    return said + _table(("precision", "max rel at most", "likeness at least", "why"), rows)
