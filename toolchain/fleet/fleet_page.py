"""The fleet as one HTML page that needs nothing from anywhere else, and in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from toolchain.fleet.fleet_outcome import AcrossUsers, FleetOutcome, summary
from toolchain.fleet.fleet_pictures import pictures
from toolchain.fleet.manners import MANNERS
from toolchain.report import html
from toolchain.report.fact import Fact
from toolchain.report.html import Markup, TableCell, element, join, paragraph, section, table
from toolchain.report.tables import plain_table

_MOST = 200  # rows of a table


def facts(outcome: FleetOutcome) -> list[Fact]:
    """In the order in which they are shown."""
    lived, worse = len(outcome.lives), len(outcome.worse)
    gain, relative = summary(outcome.gains), summary(outcome.relative_gains)
    personal = summary([own for own in outcome.personal if own is not None])
    minutes = summary(outcome.night_minutes)
    energy = summary([life.watt_hours for life in outcome.lives])
    seconds = summary(outcome.seconds)
    return [
        Fact("users lived", f"{lived:,} of {outcome.options.users:,}", bool(outcome.failures)),
        Fact("gain, nats a label (95 %)", _mean(gain)),
        Fact("gain, of the loss before", "—" if relative is None else f"{relative.mean:+.1%}"),
        Fact("gain of 10, 50, 90 % of users", _quantiles(gain)),
        Fact("personal gain, beside others' adapters (95 %)", _mean(personal)),
        Fact("got worse", f"{worse:,} ({worse / max(1, lived):.0%})", worse > 0),
        Fact("nights that were accepted", f"{outcome.states.get('accepted', 0):,}"),
        Fact("modelled minutes a night", "—" if minutes is None else f"{minutes.mean:.1f}"),
        Fact("modelled energy a life", "—" if energy is None else f"{energy.mean:.3g} Wh"),
        Fact("seconds a life took here", "—" if seconds is None else f"{seconds.mean:.2f}"),
        Fact("failures", f"{len(outcome.failures):,}", bool(outcome.failures)),
    ]


def _mean(found: AcrossUsers | None) -> str:
    if found is None:
        return "—"
    if found.interval is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ({found.interval.low:+.3f} to {found.interval.high:+.3f})"


def _quantiles(found: AcrossUsers | None) -> str:
    return "—" if found is None else ", ".join(f"{value:+.3f}" for value in found.quantiles)


def print_table(output: Console, outcome: FleetOutcome) -> None:
    """The facts, the manners, and every failure."""
    shown = plain_table(("", "value"), texts=[""])
    shown.show_header = False
    shown.columns[0].style = "dim"
    for fact in facts(outcome):
        shown.add_row(fact.name, Text(fact.value, style="red" if fact.bad else ""))
    output.print(shown)
    manners = plain_table(_HEADS, texts=["manner"])
    for row in _manner_rows(outcome):
        manners.add_row(*row)
    output.print()
    output.print(manners)
    for failure in outcome.failures:
        text = f"user {failure.number}, {failure.phase}: {failure.sentence}"
        output.print(text, soft_wrap=True)


_HEADS = ("manner", "users", "gain", "personal", "complies before", "after")


def _manner_rows(outcome: FleetOutcome) -> list[list[str]]:
    return [
        [
            row.manner,
            f"{row.users:,}",
            f"{row.gain:+.3f}",
            "—" if row.personal is None else f"{row.personal:+.3f}",
            _share(row.compliance_before),
            _share(row.compliance_after),
        ]
        for row in outcome.manners()
    ]


def _share(part: float | None) -> str:
    return "—" if part is None else f"{part:.0%}"


def write_page(path: Path, outcome: FleetOutcome, model: str) -> None:
    """``model``: its name."""
    html.write_page(path, page(outcome, model))


def page(outcome: FleetOutcome, model: str) -> str:
    """The whole text of the file."""
    options = outcome.options
    lead = join(
        f"{options.users:,} simulated users with {options.dialogues:,} dialogues each, "
        f"{options.life.nights} nights of fine-tuning, seed {options.seed}. Each has its own mix "
        f"of datasets, drift and manner. Gains are of {options.tests} dialogues that the user's "
        f"life has not seen, answered in the user's manner. Minutes and watt-hours are ",
        element("b", "modelled"),
        f" for {outcome.phone.name}.",
    )
    tiles = [html.tile(fact.value, fact.name, fact.bad) for fact in facts(outcome)]
    figures = [html.figure(one.title, one.svg, one.note) for one in pictures(outcome)]
    return html.page(
        f"A fleet of {model}",
        lead,
        *_notes(outcome),
        element("div", *tiles, kind="tiles"),
        section("Distributions", element("div", *figures, kind="figures")),
        _manners(outcome),
        _worse(outcome),
        _nights(outcome),
        _failures(outcome),
        _users(outcome),
    )


def _notes(outcome: FleetOutcome) -> list[Markup]:
    if not outcome.small:
        return []
    text = f"Left out, having fewer dialogues than a user can need: {', '.join(outcome.small)}."
    return [paragraph(text, kind="note")]


def _manners(outcome: FleetOutcome) -> Markup:
    about = [paragraph(f"{m.name}: {m.about}.", kind="quiet") for m in MANNERS.values()]
    rows = _manner_rows(outcome)
    return section("By manner", table(_HEADS, rows, numbers=_HEADS[1:]), *about)


def _worse(outcome: FleetOutcome) -> Markup:
    if not outcome.worse:
        return section("Who got worse", paragraph("Nobody.", kind="quiet"))
    rows = [[one.number, f"{one.gain:+.3f}", one.reason] for one in outcome.worse[:_MOST]]
    heads = ("user", "gain", "why")
    return section("Who got worse", table(heads, rows, numbers=heads[:2]))


def _nights(outcome: FleetOutcome) -> Markup:
    rows: list[list[object]] = [
        [state.replace("_", " "), f"{count:,}"] for state, count in sorted(outcome.states.items())
    ]
    rows += [[f"not accepted: {why}", f"{n:,}"] for why, n in outcome.reasons.items()]
    if outcome.too_long:
        rows.append(
            ["more work than the night has hours", TableCell(f"{outcome.too_long:,}", "bad")]
        )
    return section("Nights", table(("ended", "nights"), rows, numbers=["nights"]))


def _failures(outcome: FleetOutcome) -> Markup:
    if not outcome.failures:
        return section("Failures", paragraph("None.", kind="quiet"))
    rows = [[one.number, one.phase, one.sentence] for one in outcome.failures[:_MOST]]
    return section("Failures", table(("user", "in its", "what"), rows, numbers=["user"]))


def _users(outcome: FleetOutcome) -> Markup:
    rows = []
    for user, life, own in zip(outcome.users, outcome.lives, outcome.personal, strict=True):
        mix = ", ".join(source.name for source in user.recipe.sources)
        answers = sum(life.answered.values())
        personal = "—" if own is None else f"{own:+.3f}"
        rows.append(
            [life.number, mix, life.manner, answers, life.adapter, f"{life.gain:+.3f}", personal]
        )
    heads = ("user", "datasets", "manner", "answers", "adapter", "gain", "personal")
    numbers = ("user", "answers", "adapter", "gain", "personal")
    more = len(rows) - _MOST
    note = [paragraph(f"{more:,} more are in fleet-report.json.", kind="quiet")] if more > 0 else []
    return section("Users", table(heads, rows[:_MOST], numbers=numbers), *note)
