"""One cell of a study, measured: the loop's life, what the row does with it, and the scores."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from runtime_py.engine.memory import training_bytes
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.random_stream import SplitMix64
from toolchain.simulate.device import device_names, find_device
from toolchain.study.cell_life import UNTOUCHED, CellLife, CellLived
from toolchain.study.cells import UNTRAINED, Cell, CellResult, CellScores
from toolchain.study.recorded import Night
from toolchain.study.world import World

Fact = float | int | str | None
Examples = Mapping[str, tuple[Turn, ...]]  # what stands before a test dialogue, by its id

_INSTRUCTION = "Reply in about {words} words, in the tone of a helpful friend."


@dataclass(frozen=True)
class Judged:
    """What a row has come to: ``adapter``: of the replies; ``before``: what is put before each
    test; ``most``: words of a reply, the rest is cut; None: as it is."""

    adapter: Path
    before: Examples
    most: int | None
    facts: Mapping[str, Fact]


def run_cell(cell: Cell, world: World) -> CellResult:
    """Decisions are ``runtime_py``'s own, and so are seeds: the same cell gives the same result."""
    begun = time.perf_counter()
    made = world.stream(cell)
    tests = fitting(world, [one.dialogue for one in made.tests])
    stream = [one.dialogue for one in made.stream]
    with (
        tempfile.TemporaryDirectory(prefix="attune-study-") as folder,
        judged(cell, world, stream, tests, Path(folder)) as row,
    ):
        world.use(row.adapter)
        scores = _scored(world, tests, row, int(cell.options["reply_tokens"]))
        facts = dict(row.facts)
        if cell.row not in UNTRAINED and cell.row not in UNTOUCHED:
            lost = world.general(int(cell.options["general_tokens"])).forgetting()
            facts |= {"forgetting": lost.ratio, "kl": lost.kl}
    facts["tests"] = len(tests)
    facts["seconds"] = time.perf_counter() - begun
    facts["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return CellResult(cell, scores, facts)


def fitting(world: World, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """As lessons: without the oldest exchanges that the training programs have no room for; a
    dialogue whose last exchange does not fit is no test."""
    capacity = Capacity(world.tuner.tokens, max(world.tuner.lengths))
    lessons = (lesson(dialogue, capacity) for dialogue in dialogues)
    return [one for one in lessons if one is not None]


@contextmanager
def judged(
    cell: Cell, world: World, stream: Sequence[Dialogue], tests: Sequence[Dialogue], folder: Path
) -> Iterator[Judged]:
    """Everything that the row's kind needs; what lies in ``folder`` is used within the context."""
    own = world.bundle.adapter_file
    if cell.row in UNTRAINED:
        yield _untrained(cell, own, tests)
        return
    life = CellLife(cell, world, stream, folder)
    with life.app:
        lived = life.live()
        facts = {**_facts(lived), **_modelled(world, lived.work)}
        before: Examples = {}
        count = int(cell.options["examples"])
        if cell.row in ("retrieval", "retrieval_trained"):
            life.prepare([Dialogue("prompt", d.turns[:-1]) for d in tests])
            before = {d.id: lived.app.recalled(d.turns[:-1], count) for d in tests}
        elif cell.row == "random_examples":
            before = _at_random(cell.ordering, count, lived.answered, tests)
        adapter = own if cell.row in UNTOUCHED else lived.adapter
        reply_tokens = int(cell.options["reply_tokens"])
        yield Judged(adapter, with_room(world, before, tests, reply_tokens), None, facts)


def _untrained(cell: Cell, own: Path, tests: Sequence[Dialogue]) -> Judged:
    mean = round(sum(len(d.answer.split()) for d in tests) / len(tests))
    if cell.row == "base_cut":
        return Judged(own, {}, mean, {})
    if cell.row == "instruction":
        told = Turn("user", _INSTRUCTION.format(words=mean)), Turn("assistant", "I will.")
        return Judged(own, {d.id: told for d in tests}, None, {})
    return Judged(own, {}, None, {})


def _at_random(
    seed: int, count: int, answered: Sequence[Dialogue], tests: Sequence[Dialogue]
) -> Examples:
    chance, drawn = SplitMix64(seed), {}
    for dialogue in tests:
        places = list(range(len(answered)))
        chosen = [places.pop(chance.below(len(places))) for _ in range(min(count, len(answered)))]
        drawn[dialogue.id] = tuple(
            turn for place in sorted(chosen) for turn in answered[place].turns[-2:]
        )
    return drawn


def with_room(
    world: World, before: Examples, tests: Sequence[Dialogue], reply_tokens: int
) -> Examples:
    """Without the oldest of the examples where all of them, the dialogue and its reply, the
    reference or one of ``reply_tokens``, would not fit the context."""
    context = world.bundle.manifest.model.context

    def fits(whole: Dialogue) -> bool:
        prompt = len(world.model.text.tokens(whole.turns[:-1], reply=True).ids)
        return world.tuner.tokens(whole) < context and prompt + reply_tokens <= context

    kept = {}
    for dialogue in tests:
        turns = before.get(dialogue.id, ())
        while turns and not fits(_after(turns, dialogue)):
            turns = turns[2:]
        if turns:
            kept[dialogue.id] = turns
    return kept


def _after(turns: tuple[Turn, ...], dialogue: Dialogue) -> Dialogue:
    return Dialogue(dialogue.id, (*turns, *dialogue.turns))


def _scored(world: World, tests: Sequence[Dialogue], row: Judged, reply_tokens: int) -> CellScores:
    """The untouched model is the same in every ordering, and where the guard refused: it is scored
    once."""
    if row.adapter != world.bundle.adapter_file or row.before or row.most is not None:
        return score(world, tests, row, reply_tokens)
    key = tuple(tests), reply_tokens
    if key not in world.untouched:
        world.untouched[key] = score(world, tests, row, reply_tokens)
    return world.untouched[key]


def score(world: World, tests: Sequence[Dialogue], row: Judged, reply_tokens: int) -> CellScores:
    """With the adapter that is in use."""
    whole = [_after(row.before.get(d.id, ()), d) for d in tests]
    examples = world.examples(whole)
    losses = world.model.losses(examples)
    replies = world.model.replies([d.turns[:-1] for d in whole], reply_tokens)
    if row.most is not None:
        replies = [" ".join(reply.split()[: row.most]) for reply in replies]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    rouge = [scorer.score(d.answer, reply) for d, reply in zip(tests, replies, strict=True)]
    return CellScores(
        ids=tuple(d.id for d in tests),
        loss=tuple(map(float, losses)),
        labels=tuple(example.count for example in examples),
        rouge1=tuple(found["rouge1"].fmeasure for found in rouge),
        rougeL=tuple(found["rougeL"].fmeasure for found in rouge),
        words=tuple(len(reply.split()) for reply in replies),
    )


def _facts(lived: CellLived) -> dict[str, Fact]:
    status, nights = lived.app.status(), lived.nights
    rows = lived.app.store.rows("SELECT eoe, dss, idd FROM sets")
    means = np.array(rows, float).reshape(-1, 3).mean(axis=0) if rows else [None] * 3
    return {
        "kept": len(rows),
        "asked": lived.asked,
        "answered": status.answered,
        "answer_tokens": lived.tokens,
        "answers_refused": lived.refused,
        "synthesized": status.synthesized,
        "adapter": status.adapter,
        "accepted": sum(night.state == "accepted" for night in nights),
        "rejected": sum(night.state == "rejected" for night in nights),
        "steps": sum(night.steps for night in nights),
        "kept_step": nights[-1].kept_step if nights else None,
        "guard_before": nights[-1].heldout_loss_before if nights else None,
        "guard_after": nights[-1].heldout_loss_after if nights else None,
        "mean_eoe": _number(means[0]),
        "mean_dss": _number(means[1]),
        "mean_idd": _number(means[2]),
    }


def _number(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]


def _modelled(world: World, nights: Sequence[Night]) -> dict[str, Fact]:
    """Of the longest night, and the training that takes most memory, on each phone that ships with
    attune, where the bundle has the programs that a phone runs."""
    if world.bundle.manifest.android is None:
        return {}
    facts: dict[str, Fact] = {}
    for name in device_names():
        costs = world.costs(find_device(name))
        seconds = [costs.night(night.replies, night.runs) for night in nights]
        facts[f"minutes.{name}"] = max(seconds, default=0.0) / 60
        lengths = {costs.length(job) for night in nights for job, _ in night.runs}
        if lengths:
            facts[f"memory_mb.{name}"] = training_bytes(world.bundle, max(lengths)) / 1e6
    return facts
