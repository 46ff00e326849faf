"""Reads an outcome from a run's store, and from the events of the phone's processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from runtime_py.bundle.manifest import Manifest
from runtime_py.loop.log import LogLine
from runtime_py.loop.personalizer import STORE
from runtime_py.loop.status import lost
from runtime_py.loop.store import open_store
from toolchain.simulate.device import Device
from toolchain.simulate.estimate import Estimate
from toolchain.simulate.events import DialogueObserved, NightEnded, PhoneEvent, ReplyProbed
from toolchain.simulate.life_plan import LifePlan
from toolchain.simulate.outcome import (
    NightOutcome,
    Occupancy,
    ScoredDialogue,
    SimulationOutcome,
    StreamBlock,
    StreamScan,
    TextExample,
    TuningOutcome,
)
from toolchain.simulate.rhythm import HOUR
from toolchain.simulate.run_record import RunRecord

EXAMPLES = 4  # of each kind of text
PARTS = 10  # of a stream that names no blocks

Placed = TypeVar("Placed", DialogueObserved, ReplyProbed)


def read_outcome(
    manifest: Manifest, stream: StreamScan, estimate: Estimate, plan: LifePlan, record: RunRecord
) -> SimulationOutcome:
    """Reads the store of a run that is over, in ``plan.state``."""
    store = open_store(plan.state / STORE)
    try:
        log = store.log()
        counts, missing = store.counts(), lost(store)
        stored = {str(id) for (id,) in store.rows("SELECT id FROM sets")}
        pairs = store.rows("SELECT source, question, answer FROM synthetic ORDER BY number")
    finally:
        store.close()
    scored = tuple(_scored(line) for line in log if line.event in ("kept", "refused"))
    observed = list(_latest(record.events, DialogueObserved).values())
    overhead = sorted(1e3 * (event.observe_s - event.embed_s) for event in observed)
    embedded = [event for event in observed if event.tokens]
    seconds = sum(event.embed_s for event in embedded)
    probes = _latest(record.events, ReplyProbed)
    nights = [event for event in record.events if isinstance(event, NightEnded)]
    return SimulationOutcome(
        plan=plan,
        manifest=manifest,
        stream=stream,
        estimate=estimate,
        record=record,
        counts=counts,
        lost=missing,
        blocks=_blocks(stream.blocks, [one.kept for one in scored]),
        tunings=_tunings(log, nights),
        nights=_nights(plan.device, nights),
        scored=scored,
        rouge1=tuple((place, event.rouge1) for place, event in sorted(probes.items())),
        examples=_examples(plan, log, stored, pairs),
        occupancy=_occupancy(log),
        overhead_ms=overhead[len(overhead) // 2] if overhead else 0.0,
        embed_ms=1e3 * seconds / len(embedded) if embedded else 0.0,
        tokens_per_second=sum(e.tokens for e in embedded) / seconds if seconds else 0.0,
        day_hours=sum(event.modelled_s for event in observed) / HOUR,
    )


def _latest(events: Sequence[PhoneEvent], kind: type[Placed]) -> dict[int, Placed]:
    """By place; what was done again after a kill counts once."""
    return {event.place: event for event in events if isinstance(event, kind)}


def _scored(line: LogLine) -> ScoredDialogue:
    data = line.data
    return ScoredDialogue(
        data["number"], line.event == "kept", data["domain"], data["eoe"], data["dss"], data["idd"]
    )


def _blocks(names: tuple[str, ...], kept: list[bool]) -> tuple[StreamBlock, ...]:
    """Runs of one name; a stream with a single name is cut into ``PARTS`` parts."""
    count = len(kept)
    if len(set(names)) <= 1:
        size = max(1, math.ceil(count / PARTS))
        names = tuple(
            f"{i // size * size + 1}–{min(count, (i // size + 1) * size)}" for i in range(count)
        )
    blocks: list[StreamBlock] = []
    begin = 0
    for place in range(1, count + 1):
        if place == count or names[place] != names[begin]:
            observed, entered = place - begin, sum(kept[begin:place])
            blocks.append(StreamBlock(names[begin], begin + 1, observed, entered))
            begin = place
    return tuple(blocks)


def _tunings(log: list[LogLine], nights: list[NightEnded]) -> tuple[TuningOutcome, ...]:
    losses = {event.job: event.losses for event in nights if event.job}
    tunings, place = [], 0
    for line in log:
        data = line.data
        if line.event in ("kept", "refused"):
            place = data["number"]
        elif line.event in ("adapter_accepted", "adapter_rejected"):
            tuning = TuningOutcome(
                job=data["job"],
                place=place,
                day=line.day,
                accepted=line.event == "adapter_accepted",
                before=_loss(data["heldout_loss_before"]),
                after=_loss(data["heldout_loss_after"]),
                losses=losses.get(data["job"], ()),
                scale=data.get("scale", 1.0),
                forgetting=_forgetting(data.get("base_perplexity"), data.get("perplexity")),
            )
            tunings.append(tuning)
    return tuple(tunings)


def _loss(logged: float | str | None) -> float:
    """NaN where it was no number; logs of before have that as a word."""
    return math.nan if logged is None else float(logged)


def _forgetting(base: float | None, adapted: float | None) -> float | None:
    """None where it was not measured; logs of before have neither."""
    return None if base is None or adapted is None else adapted / base - 1.0


def _nights(device: Device, nights: list[NightEnded]) -> tuple[NightOutcome, ...]:
    """Of a night that was lived again after a kill, the event with most in it."""
    by_day: dict[int, NightEnded] = {}
    for event in nights:
        if event.day not in by_day or event.state not in ("not_due", "too_few"):
            by_day[event.day] = event
    return tuple(_night(device, event) for _, event in sorted(by_day.items()))


def _night(device: Device, event: NightEnded) -> NightOutcome:
    watt_hours = event.work_s / HOUR * device.power.watts
    return NightOutcome(
        day=event.day,
        state=event.state,
        hours=event.wall_s / HOUR,
        watt_hours=watt_hours,
        battery=watt_hours / device.power.battery_wh,
        storage_mb=event.storage / 1e6,
        domains=event.domains,
        place=event.place,
    )


def _examples(
    plan: LifePlan, log: list[LogLine], stored: set[str], pairs: list[tuple[Any, ...]]
) -> tuple[TextExample, ...]:
    """The newest of each kind."""
    refused = [str(line.id) for line in log if line.event == "refused"][-EXAMPLES:]
    kept = [str(line.id) for line in log if line.event == "kept" and line.id in stored][-EXAMPLES:]
    why = {line.id: line.data for line in log if line.event in ("kept", "refused")}
    wanted = {*refused, *kept}
    texts = {dialogue.id: dialogue for dialogue in plan.dialogues() if dialogue.id in wanted}
    examples = [
        TextExample(
            "kept" if id in kept else "refused",
            f"{id}: {why[id]['reason'].replace('_', ' ')}, {why[id]['domain'] or 'not measured'}",
            texts[id].question,
            texts[id].answer,
        )
        for id in (*kept, *refused)
    ]
    for source, question, answer in pairs[-EXAMPLES:]:
        examples.append(TextExample("synthesized", f"from {source}", question, answer))
    return tuple(examples)


def _occupancy(log: list[LogLine]) -> Occupancy:
    """How many sets of each domain are stored after every observed one."""
    bins: dict[int, str] = {}
    states: list[dict[str, int]] = []
    for line in log:
        if line.event == "kept":
            bins[line.data["bin"]] = line.data["domain"]
        if line.event in ("kept", "refused"):
            states.append({name: list(bins.values()).count(name) for name in set(bins.values())})
    names = tuple(sorted({name for state in states for name in state}))
    return Occupancy(names, tuple(tuple(state.get(name, 0) for name in names) for state in states))
