"""A ladder's report for a terminal and for machines; ``parity_page`` has the one for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.text import Text

from toolchain.compile.tolerances import TABLE
from toolchain.report.console import bold, line, output, styled
from toolchain.report.tables import plain_table
from toolchain.verify.parity.verdict import NOT_ASKED, Check, Report, Rung

MARKS = {"passed": "green", "failed": "bold red", "not run": "yellow"}


def as_json(report: Report) -> dict:
    return {
        "bundle": report.bundle,
        "model": report.model,
        "precisions": report.precisions,
        "seconds": report.seconds,
        "passed": not report.failed,
        "rungs": [_rung(rung) for rung in report.rungs],
        "tolerances": [asdict(row) for row in TABLE.values()],
    }


def _rung(rung: Rung) -> dict:
    known = asdict(rung)
    known["checks"] = [
        {key: value for key, value in asdict(check).items() if key != "histogram"}
        | {"margin": check.margin}
        for check in rung.checks
    ]
    known["layers"] = [{"place": place, "max_rel": gap} for place, gap in rung.layers]
    return known


def worst_of(checks: Sequence[Check]) -> list[Check]:
    """For each program the check that strains its tolerance most; failed ones first."""
    best: dict[str, Check] = {}
    for check in checks:
        name = check.program.partition(":")[0]
        if name not in best or (not check.passed, check.strain) > (
            not best[name].passed,
            best[name].strain,
        ):
            best[name] = check
    return list(best.values())


def _bound(check: Check) -> str:
    parts = [] if check.tolerance is None else [f"≤ {check.tolerance:.2g}"]
    if check.likeness_tolerance is not None:
        parts.append(f"≥ {check.likeness_tolerance:.5g}")
    return ", ".join(parts)


def _margin(check: Check) -> str:
    return "" if check.margin is None else f"{check.margin:.2g}"


def _numbers(check: Check, every: bool) -> list[str]:
    plain = check.bound == "exact" and not check.max_abs
    relative = "" if plain else f"{check.max_rel:.1e}"
    likeness = "" if check.likeness_tolerance is None else f"{check.likeness:.4f}"
    if not every:
        return [relative, likeness]
    token = "" if check.same_token is None else f"{check.same_token:.0%}"
    kl = "" if check.kl is None else f"{check.kl:.1e}"
    absolute = "" if plain else f"{check.max_abs:.1e}"
    return [absolute, relative, likeness, token, kl]


def show(report: Report, every: bool = False) -> None:
    """``every``: all checks with all their numbers, for a wide terminal."""
    precision = ", ".join(f"{name} {value}" for name, value in report.precisions.items())
    output.print(line(bold(report.bundle), f" ({report.model}; {precision})"))
    _show_checks(report, every)
    for rung in report.rungs:
        if rung.status == "failed":
            output.print(line(styled("bold red", rung.rung), f": {rung.reason}"), soft_wrap=True)
        elif rung.status == "not run" and rung.reason != NOT_ASKED:
            told = styled("yellow", f"{rung.rung} was not run")
            output.print(line(told, f": {rung.reason}"), soft_wrap=True)
    failed = [rung.rung for rung in report.rungs if rung.status == "failed"]
    passed = sum(rung.status == "passed" for rung in report.rungs)
    if failed:
        verdict = styled("bold red", f"{', '.join(failed)} failed")
    else:
        verdict = styled("green", f"{passed} rungs passed")
    output.print(line(verdict, f" in {report.seconds:.0f} s"))


def _show_checks(report: Report, every: bool) -> None:
    names = ["all", "on"] if every else ["worst of each program"]
    numbers = ["max rel", "likeness"]
    if every:
        numbers = ["max abs", *numbers, "token", "KL"]
    heads = ["rung", "", "checks", *names, *numbers, "allowed", "margin"]
    texts = ["rung", "", *names, "allowed"]
    table = plain_table(heads, texts, whole=[head for head in heads if head not in names])
    for rung in report.rungs:
        checks = rung.checks if every else worst_of(rung.checks)
        first: list[str | Text] = [rung.rung, styled(MARKS[rung.status], rung.status)]
        first.append(str(len(rung.checks) or ""))
        if not checks:
            table.add_row(*first)
        for check in checks:
            named = styled("" if check.passed else "red", f"{check.program}: {check.output}")
            cells = [named, check.case] if every else [named]
            table.add_row(*first, *cells, *_numbers(check, every), _bound(check), _margin(check))
            first = ["", "", ""]
    output.print(table)
