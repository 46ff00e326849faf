"""The report as one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from toolchain.report import html
from toolchain.report.html import Markup, TableCell, element, join, paragraph, section, table
from toolchain.simulate.life_pictures import pictures
from toolchain.simulate.life_table import duration, facts, fault_name
from toolchain.simulate.outcome import SimulationOutcome

_LONGEST = 600  # characters of an example


def write_page(path: Path, outcome: SimulationOutcome) -> None:
    html.write_page(path, page(outcome))


def page(outcome: SimulationOutcome) -> str:
    """The whole text of the file."""
    plan, stream = outcome.plan, outcome.stream
    lead = join(
        f"{len(outcome.scored):,} dialogues of {stream.path.name}, seed {plan.seed}, policy "
        f"{plan.policy.selection}. Memory, cores and storage were enforced on this machine; hours "
        f"and watt-hours are ",
        element("b", "modelled"),
        " from counted operations and bytes.",
    )
    tiles = [html.tile(fact.value, fact.name, fact.bad) for fact in facts(outcome)]
    figures = [html.figure(one.title, one.svg, one.note) for one in pictures(outcome)]
    return html.page(
        f"{outcome.manifest.model.name} on {outcome.device.name}",
        lead,
        *_notes(outcome),
        element("div", *tiles, kind="tiles"),
        section("Over the stream", element("div", *figures, kind="figures")),
        _blocks(outcome),
        _faults(outcome),
        _nights(outcome),
        _texts(outcome),
        _device(outcome),
    )


def _notes(outcome: SimulationOutcome) -> list[Markup]:
    notes = []
    if outcome.record.ended:
        notes.append(paragraph(f"The run ended early: {outcome.record.ended}", kind="note"))
    if bad := outcome.stream.bad:
        text = f"{len(bad):,} lines of the stream were left out; the first: {bad[0]}"
        notes.append(paragraph(text, kind="note"))
    return notes


def _blocks(outcome: SimulationOutcome) -> Markup:
    rows = [
        [block.name or "—", block.first, block.observed, block.kept, f"{block.rate:.0%}"]
        for block in outcome.blocks
    ]
    heads = ("block", "from", "observed", "kept", "acceptance")
    return section("Acceptance by block", table(heads, rows, numbers=heads[1:]))


def _faults(outcome: SimulationOutcome) -> Markup:
    if not outcome.record.faults:
        return section("Faults", paragraph("None were made.", kind="quiet"))
    rows = [
        [
            fault_name(fault),
            fault.place,
            f"{fault.seconds:.1f}",
            fault.how or TableCell("not got over", "bad"),
        ]
        for fault in outcome.record.faults
    ]
    heads = ("fault", "after dialogue", "second", "recovery")
    return section("Faults and recoveries", table(heads, rows, numbers=heads[1:3]))


def _nights(outcome: SimulationOutcome) -> Markup:
    worked = [night for night in outcome.nights if night.hours > 0 or night.state != "not_due"]
    if not worked:
        return section("Nights", paragraph("No fine-tuning was due.", kind="quiet"))
    rows = [
        [
            night.day + 1,
            night.state.replace("_", " "),
            duration(night.hours),
            f"{night.watt_hours:.3g}",
            f"{100 * night.battery:.2g} %",
        ]
        for night in worked
    ]
    heads = ("day", "fine-tuning", "work", "Wh", "of a full battery")
    return section("Nights (modelled)", table(heads, rows, numbers=heads[2:]))


def _texts(outcome: SimulationOutcome) -> Markup:
    columns = []
    for kind in ("kept", "refused", "synthesized"):
        cards = [
            element(
                "div",
                element("span", one.title, kind="quiet"),
                paragraph(_short(one.question)),
                paragraph(_short(one.answer), kind="reply"),
                kind="card",
            )
            for one in outcome.examples
            if one.kind == kind
        ]
        columns.append(
            element("div", element("h3", kind), *(cards or [paragraph("none", kind="quiet")]))
        )
    return section("Examples", element("div", *columns, kind="columns"))


def _device(outcome: SimulationOutcome) -> Markup:
    rows = []
    for place, source in outcome.device.sources.items():
        name, _, field = place.partition(".")
        rows.append([place, f"{getattr(getattr(outcome.device, name), field):g}", source])
    heads = ("figure", "value", "source")
    return section(f"{outcome.device.name}: the profile", table(heads, rows, numbers=["value"]))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " …"
