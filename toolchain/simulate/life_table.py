"""The outcome in a terminal, and the few figures that every form of the report begins with."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from toolchain.simulate.outcome import Outcome


@dataclass(frozen=True)
class Fact:
    """``bad``: not as it should be."""

    name: str
    value: str
    bad: bool = False


def facts(outcome: Outcome) -> list[Fact]:
    told, watched = outcome.as_json(), outcome.watched
    before, after = told["heldout_loss_before"], told["heldout_loss_after"]
    loss = "—" if before is None or after is None else f"{before:.3f} → {after:.3f}"
    modelled = told["modelled"]
    peak, limit = told["peak_memory_mb"], told["memory_limit_mb"]
    days = max(1, len(outcome.nights))
    return [
        Fact("dialogues observed", f"{told['observed']:,}"),
        Fact("kept", f"{told['kept']:,} ({told['kept'] / max(1, told['observed']):.0%})"),
        Fact(
            f"questions, {told['questions'] / days:.1f} a day",
            f"{told['questions']:,}, {told['answered']:,} answered",
        ),
        Fact("synthesized pairs", f"{told['synthesized']:,}"),
        Fact(
            "fine-tunings, adapters accepted",
            f"{told['fine_tunes']}, {told['adapters_accepted']}",
        ),
        Fact("held-out loss, nats a label, at the last new adapter", loss),
        Fact(f"peak memory, of {limit:,.0f} MB", f"{peak:,.0f} MB", peak > limit),
        Fact(f"storage, of {told['storage_limit_mb']:,.0f} MB", f"{told['storage_mb']:,.1f} MB"),
        Fact(
            "faults, recoveries",
            f"{told['faults']}, {told['recoveries']}",
            told["recoveries"] < told["faults"],
        ),
        Fact("lost", f"{told['lost']}", bool(told["lost"])),
        Fact("modelled work", duration(modelled["hours"])),
        Fact("modelled energy", f"{modelled['watt_hours']:.3g} Wh"),
        Fact("selection beyond embedding", f"{told['selection_overhead_ms']:.2f} ms a dialogue"),
        Fact("embedding here", f"{told['embedding']['tokens_per_second']:,.0f} tokens/s"),
        Fact(
            "cores enforced, of the device's",
            f"{watched.cores} of {outcome.device.compute.cores}",
        ),
    ]


def print_table(output: Console, outcome: Outcome) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for fact in facts(outcome):
        table.add_row(fact.name, f"[red]{fact.value}[/]" if fact.bad else fact.value)
    output.print(table)
    blocks = Table(box=None, pad_edge=False, title="acceptance by block", title_justify="left")
    blocks.add_column("block")
    for name in ("observed", "kept", ""):
        blocks.add_column(name, justify="right")
    for block in outcome.blocks:
        share = f"{block.kept / block.observed:.0%}"
        blocks.add_row(block.name or "—", f"{block.observed}", f"{block.kept}", share)
    output.print()
    output.print(blocks)
    for fault in outcome.watched.faults:
        output.print(
            f"[dim]{fault.kind.replace('_', ' ')} after dialogue {fault.place}:[/] "
            f"{fault.how or 'not got over'}"
        )


def duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} s"
    return f"{60 * hours:.1f} min" if hours < 1 else f"{hours:.2f} h"
