"""Reads an outcome from a run's store, and from what the phone's process said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from runtime_py.bundle.manifest import Manifest
from runtime_py.loop.log import LogLine
from runtime_py.loop.personalizer import STORE
from runtime_py.loop.status import lost
from runtime_py.loop.store import open_store
from toolchain.simulate.device import Device
from toolchain.simulate.estimate import Estimate
from toolchain.simulate.life import STATE, Life, dialogues_of
from toolchain.simulate.outcome import Block, Example, Night, Outcome, Scored, Stream, Tuning
from toolchain.simulate.rhythm import HOUR
from toolchain.simulate.watcher import Watched

EXAMPLES = 4  # of each kind of text
PARTS = 10  # of a stream that names no blocks


def gather(
    manifest: Manifest,
    device: Device,
    stream: Stream,
    estimate: Estimate,
    life: Life,
    watched: Watched,
) -> Outcome:
    store = open_store(Path(life.folder) / STATE / STORE)
    try:
        log = store.log()
        counts, missing = store.counts(), lost(store)
        sets = {str(id): turns for id, turns in store.rows("SELECT id, turns FROM sets")}
        pairs = store.rows("SELECT source, question, answer FROM synthetic ORDER BY number")
    finally:
        store.close()
    scored = tuple(_scored(line) for line in log if line.event in ("kept", "refused"))
    last = _latest(watched.events, "dialogue")
    overhead = sorted(1e3 * (e["observe_s"] - e["embed_s"]) for e in last.values())
    embed = [e for e in last.values() if e["tokens"]]
    seconds = sum(e["embed_s"] for e in embed)
    probes = _latest(watched.events, "probe")
    return Outcome(
        life=life,
        device=device,
        manifest=manifest,
        stream=stream,
        estimate=estimate,
        watched=watched,
        counts=counts,
        lost=missing,
        blocks=_blocks(stream.blocks, [one.kept for one in scored]),
        tunings=_tunings(log, watched.events),
        nights=_nights(device, watched.events),
        scored=scored,
        rouge1=tuple((place, event["rouge1"]) for place, event in sorted(probes.items())),
        examples=_examples(life, log, set(sets), pairs),
        occupancy=_occupancy(log),
        overhead_ms=overhead[len(overhead) // 2] if overhead else 0.0,
        embed_ms=1e3 * seconds / len(embed) if embed else 0.0,
        tokens_per_second=sum(e["tokens"] for e in embed) / seconds if seconds else 0.0,
        day_hours=sum(e["modelled_s"] for e in last.values()) / HOUR,
    )


def _latest(events: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """By place; what was done again after a kill counts once."""
    return {event["place"]: event for event in events if event["event"] == name}


def _scored(line: LogLine) -> Scored:
    data = line.data
    return Scored(
        data["number"], line.event == "kept", data["domain"], data["eoe"], data["dss"], data["idd"]
    )


def _blocks(names: tuple[str, ...], kept: list[bool]) -> tuple[Block, ...]:
    """Runs of one name; a stream with a single name is cut into ``PARTS`` parts."""
    count = len(kept)
    if len(set(names)) <= 1:
        size = max(1, math.ceil(count / PARTS))
        names = tuple(
            f"{i // size * size + 1}–{min(count, (i // size + 1) * size)}" for i in range(count)
        )
    found: list[Block] = []
    begin = 0
    for place in range(1, count + 1):
        if place == count or names[place] != names[begin]:
            found.append(Block(names[begin], begin + 1, place - begin, sum(kept[begin:place])))
            begin = place
    return tuple(found)


def _tunings(log: list[LogLine], events: list[dict[str, Any]]) -> tuple[Tuning, ...]:
    losses = {e["job"]: tuple(e["losses"]) for e in events if e["event"] == "morning" and e["job"]}
    found, place = [], 0
    for line in log:
        if line.event in ("kept", "refused"):
            place = line.data["number"]
        if line.event in ("adapter_accepted", "adapter_rejected"):
            data = line.data
            found.append(
                Tuning(
                    data["job"],
                    place,
                    line.day,
                    line.event == "adapter_accepted",
                    float(data["heldout_loss_before"]),
                    float(data["heldout_loss_after"]),
                    losses.get(data["job"], ()),
                )
            )
    return tuple(found)


def _nights(device: Device, events: list[dict[str, Any]]) -> tuple[Night, ...]:
    """Of a night that was lived again after a kill, the telling with most in it."""
    by_day: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "morning":
            known = by_day.get(event["day"])
            if known is None or event["state"] not in ("not_due", "too_few"):
                by_day[event["day"]] = event
    found = []
    for day, event in sorted(by_day.items()):
        spent = event["work_s"] / HOUR * device.power.watts
        found.append(
            Night(
                day=day,
                state=event["state"],
                hours=event["wall_s"] / HOUR,
                watt_hours=spent,
                battery=spent / device.power.battery_wh,
                storage_mb=event["storage"] / 1e6,
                domains=event["domains"],
                place=event["place"],
            )
        )
    return tuple(found)


def _examples(
    life: Life, log: list[LogLine], stored: set[str], pairs: list[tuple[Any, ...]]
) -> tuple[Example, ...]:
    """The newest of each kind."""
    refused = [str(line.id) for line in log if line.event == "refused"][-EXAMPLES:]
    kept = [str(line.id) for line in log if line.event == "kept" and line.id in stored][-EXAMPLES:]
    why = {line.id: line.data for line in log if line.event in ("kept", "refused")}
    wanted = {*refused, *kept, *(str(pair[0]) for pair in pairs[-EXAMPLES:])}
    texts = {
        dialogue.id: dialogue
        for dialogue in dialogues_of(Path(life.stream), life.places)
        if dialogue.id in wanted
    }
    found = [
        Example(
            "kept" if id in kept else "refused",
            f"{id}: {why[id]['reason'].replace('_', ' ')}, {why[id]['domain'] or 'not measured'}",
            texts[id].question,
            texts[id].answer,
        )
        for id in (*kept, *refused)
    ]
    for source, question, answer in pairs[-EXAMPLES:]:
        found.append(Example("synthesized", f"from {source}", question, answer))
    return tuple(found)


def _occupancy(log: list[LogLine]) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Domains, and how many sets of each are stored after every observed one."""
    bins: dict[int, str] = {}
    states: list[dict[str, int]] = []
    for line in log:
        if line.event == "kept":
            bins[line.data["bin"]] = line.data["domain"]
        if line.event in ("kept", "refused"):
            states.append({name: list(bins.values()).count(name) for name in set(bins.values())})
    names = tuple(sorted({name for state in states for name in state}))
    return names, tuple(tuple(state.get(name, 0) for name in names) for state in states)
