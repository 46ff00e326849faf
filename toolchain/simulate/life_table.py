"""The outcome in a terminal, and the few figures that every form of the report begins with."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from toolchain.report.console import dim, line
from toolchain.report.fact import Fact
from toolchain.report.tables import plain_table
from toolchain.simulate.outcome import SimulationOutcome
from toolchain.simulate.run_record import FaultRecord


def facts(outcome: SimulationOutcome) -> list[Fact]:
    """In the order in which they are shown."""
    count, record, device = outcome.count, outcome.record, outcome.device
    before, after = outcome.heldout
    loss = "—" if before is None or after is None else f"{before:.3f} → {after:.3f}"
    peak, limit = record.peak / 1e6, device.memory.app_mb
    observed, asked = count("observed"), count("asked")
    days = max(1, len(outcome.nights))
    return [
        Fact("dialogues observed", f"{observed:,}"),
        Fact("kept", f"{count('kept'):,} ({count('kept') / max(1, observed):.0%})"),
        Fact(f"questions, {asked / days:.1f} a day", f"{asked:,}, {count('answered'):,} answered"),
        Fact("synthesized pairs", f"{count('synthesized'):,}"),
        Fact(
            "fine-tunings, adapters accepted",
            f"{count('fine_tunes')}, {count('adapters_accepted')}",
        ),
        Fact("held-out loss, nats a label, at the last new adapter", loss),
        Fact("perplexity of the general text, with that adapter", _forgotten(outcome)),
        *_unseen(outcome),
        Fact(f"peak memory, of {limit:,.0f} MB", f"{peak:,.0f} MB", peak > limit),
        Fact(f"storage, of {device.storage.app_mb:,.0f} MB", f"{outcome.storage_mb:,.1f} MB"),
        Fact(
            "faults, recoveries",
            f"{len(record.faults)}, {record.recoveries}",
            record.recoveries < len(record.faults),
        ),
        Fact("lost", f"{len(outcome.lost)}", bool(outcome.lost)),
        Fact("modelled work", duration(outcome.modelled_hours)),
        Fact("modelled energy", f"{outcome.watt_hours:.3g} Wh"),
        Fact("selection beyond embedding", f"{outcome.overhead_ms:.2f} ms a dialogue"),
        Fact("embedding here", f"{outcome.tokens_per_second:,.0f} tokens/s"),
        Fact("cores enforced, of the device's", f"{record.cores} of {device.compute.cores}"),
    ]


def _forgotten(outcome: SimulationOutcome) -> str:
    last = outcome.last_tuning
    if last is None or last.forgetting is None:
        return "—"
    scaled = "" if last.scale == 1.0 else f", the adapter scaled by {last.scale:g}"
    return f"{last.forgetting:+.1%} of the model's own{scaled}"


def _unseen(outcome: SimulationOutcome) -> list[Fact]:
    if outcome.unseen is None:
        return []
    found, left_out = outcome.unseen.contrast, outcome.unseen.left_out
    change = ""
    if found.relative is not None and (between := found.relative_interval) is not None:
        ends = f"{100 * between.low:+.1f}, {100 * between.high:+.1f}"
        change = f" ({100 * found.relative:+.1f} % [{ends}])"
    name = f"loss of {found.dialogues:,} unseen dialogues, the bundle's adapter → the last"
    if left_out:
        name += f" ({left_out:,} too long)"
    return [Fact(name, f"{found.against:.3f} → {found.row:.3f}{change}")]


def print_table(output: Console, outcome: SimulationOutcome) -> None:
    """The facts, acceptance by block, and every fault."""
    table = plain_table(("", "value"), texts=[""])
    table.show_header = False
    table.columns[0].style = "dim"
    for fact in facts(outcome):
        table.add_row(fact.name, Text(fact.value, style="red" if fact.bad else ""))
    output.print(table)
    blocks = plain_table(("block", "observed", "kept", "rate"), texts=["block"])
    blocks.title, blocks.title_justify = "acceptance by block", "left"
    for block in outcome.blocks:
        name = Text(block.name or "—")
        blocks.add_row(name, f"{block.observed}", f"{block.kept}", f"{block.rate:.0%}")
    output.print()
    output.print(blocks)
    for fault in outcome.record.faults:
        place = f"{fault_name(fault)} after dialogue {fault.place}:"
        output.print(line(dim(place), f" {fault.how or 'not got over'}"))


def fault_name(fault: FaultRecord) -> str:
    """Its kind in words."""
    return fault.kind.replace("_", " ")


def duration(hours: float) -> str:
    """In the unit that a person would take."""
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} s"
    return f"{60 * hours:.1f} min" if hours < 1 else f"{hours:.2f} h"
