"""A stream by its recipe: the dialogues in order, and others of the same datasets for tests.

The tests depend on the recipe alone, and a seed's stream is drawn from what they leave: streams of
all seeds are judged on the same dialogues. No dialogue that is drawn for a stream has a test's id,
its text or its prompt; junk is made up, and the words of a greeting may be anyone's.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import write_bytes
from runtime_py.loop.random_stream import SplitMix64
from toolchain.streams import junk
from toolchain.streams.chance import chance, shuffled
from toolchain.streams.dataset import Dataset, read_dataset
from toolchain.streams.order import StreamPlace, places
from toolchain.streams.stream_recipe import Recipe, StreamSource

JUNK = ("greeting", "acknowledgement", "gibberish", "near_duplicate")  # as ``KINDS`` counts them


@dataclass(frozen=True)
class StreamDialogue:
    """``dataset``: the source's name, or the kind of junk; ``block``: the part of the stream."""

    dialogue: Dialogue
    dataset: str
    block: str


class MadeStream(NamedTuple):
    stream: tuple[StreamDialogue, ...]
    tests: tuple[StreamDialogue, ...]


def make_stream(recipe: Recipe, data: Path, seed: int | None = None) -> MadeStream:
    """``data``: the folder that the recipe's files lie in; ``seed``: None for the recipe's own.

    Raises ``LoopError`` for files that are missing or damaged, or have too few dialogues.
    """
    seed = recipe.seed if seed is None else seed
    datasets = read_sources(recipe, data)
    order = places(recipe, chance(seed, "order"))
    wanted = [sum(place.source == number for place in order) for number in range(len(datasets))]
    taken = _Taken()
    short: list[str] = []
    tests = []
    for source, dataset in zip(recipe.sources, datasets, strict=True):
        rows = shuffled(dataset.of(recipe.rows), chance(0, "test", source.file))
        found = taken.tests(rows, source.test)
        tests += [StreamDialogue(one, source.name, source.name) for one in found]
        if len(found) < source.test:
            short.append(_too_few(source, dataset, recipe, source.test, len(found), "tests"))
    chosen = []
    for source, dataset, count in zip(recipe.sources, datasets, wanted, strict=True):
        rows = shuffled(dataset.of(recipe.rows), chance(seed, "stream", source.file))
        found = taken.observed(rows, count)
        chosen.append(iter(found))
        if len(found) < count:
            rest = "dialogues beside the tests" if source.test else "dialogues"
            short.append(_too_few(source, dataset, recipe, count, len(found), rest))
    if short:
        raise LoopError(
            f"the stream {recipe.title!r} cannot be made: {'; '.join(short)}. Ask for fewer."
        )
    real = [
        StreamDialogue(next(chosen[place.source]), recipe.sources[place.source].name, place.block)
        for place in order
    ]
    return MadeStream(tuple(_strewn(real, order, recipe, chance(seed, "junk"))), tuple(tests))


def read_sources(recipe: Recipe, data: Path) -> list[Dataset]:
    """The recipe's files. All that are missing are one error."""
    if not data.is_dir():
        raise LoopError(f"there is no data folder {data}: give the one that has the datasets.")
    if missing := [s.file for s in recipe.sources if not (data / s.file).is_file()]:
        raise LoopError(
            f"{data} lacks {', '.join(missing)}, which the stream {recipe.title!r} is made of."
        )
    return [read_dataset(data / source.file) for source in recipe.sources]


class _Taken:
    """What was chosen, so that nothing is chosen twice."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._texts: set[str] = set()
        self._prompts: set[str] = set()  # of tests

    def tests(self, rows: Sequence[Dialogue], count: int) -> list[Dialogue]:
        found = self._take(rows, count)
        self._prompts.update(map(_prompt, found))
        return found

    def observed(self, rows: Sequence[Dialogue], count: int) -> list[Dialogue]:
        return self._take(rows, count)

    def _take(self, rows: Sequence[Dialogue], count: int) -> list[Dialogue]:
        found: list[Dialogue] = []
        for dialogue in rows:
            if len(found) == count:
                break
            text = _plain(dialogue.text)
            if dialogue.id in self._ids or text in self._texts or self._is_asked(dialogue):
                continue
            self._ids.add(dialogue.id)
            self._texts.add(text)
            found.append(dialogue)
        return found

    def _is_asked(self, dialogue: Dialogue) -> bool:
        return _prompt(dialogue) in self._prompts


def _plain(text: str) -> str:
    """Without what a copy often changes: case, and how words are spaced."""
    return " ".join(text.split()).casefold()


def _prompt(dialogue: Dialogue) -> str:
    return _plain("\n".join(turn.content for turn in dialogue.turns[:-1]))


def _too_few(
    source: StreamSource, dataset: Dataset, recipe: Recipe, wanted: int, found: int, what: str
) -> str:
    rows = "" if recipe.rows == "all" else f" among its rows for {recipe.rows}"
    text = f"{source.file} has {found:,} {what}{rows}, {wanted:,} are wanted"
    lost = []
    if dataset.general:
        lost.append(f"{dataset.general:,} are the general text of bundles")
    if dataset.without_reply:
        lost.append(f"{dataset.without_reply:,} have no reply to refer to")
    if dataset.unusable:
        lost.append(f"{dataset.unusable:,} cannot be read, the first because {dataset.bad}")
    return f"{text} (of {dataset.rows:,} rows {' and '.join(lost)})" if lost else text


def _strewn(
    real: list[StreamDialogue], order: Sequence[StreamPlace], recipe: Recipe, stream: SplitMix64
) -> list[StreamDialogue]:
    """The stream with its junk, each at a place that is drawn, in the block it falls into."""
    kinds = [
        kind for kind, count in zip(JUNK, recipe.junk.counts, strict=True) for _ in range(count)
    ]
    slots = shuffled(range(len(real) + len(kinds)), stream)[: len(kinds)]
    at = dict(zip(slots, kinds, strict=True))
    made: list[StreamDialogue] = []
    ids, used = {one.dialogue.id for one in real}, 0
    for slot in range(len(real) + len(kinds)):
        if slot not in at:
            made.append(real[used])
            used += 1
            continue
        kind, id = at[slot], f"{at[slot]}-{slot + 1}"
        while id in ids:
            id += "+"
        block = order[min(used, len(order) - 1)].block if order else "junk"
        made.append(StreamDialogue(_junk(kind, id, real, used, stream), kind, block))
    return made


def _junk(
    kind: str, id: str, real: list[StreamDialogue], used: int, stream: SplitMix64
) -> Dialogue:
    """``used``: dialogues that were observed before; of them a near duplicate is made, or of the
    first that will be."""
    if kind == "greeting":
        return junk.greeting(id, stream)
    if kind == "acknowledgement":
        return junk.acknowledgement(id, stream)
    if kind == "gibberish":
        return junk.gibberish(id, stream)
    return junk.near_duplicate(id, real[stream.below(max(1, used))].dialogue, stream)


def write_lines(path: Path, dialogues: Sequence[StreamDialogue]) -> None:
    """One JSON object a line; gzip where the name ends in ``.gz``, the same bytes each time."""
    lines = "".join(
        json.dumps(
            {
                "id": one.dialogue.id,
                "dataset": one.dataset,
                "block": one.block,
                "turns": [{"role": t.role, "content": t.content} for t in one.dialogue.turns],
            },
            ensure_ascii=False,
        )
        + "\n"
        for one in dialogues
    ).encode()
    write_bytes(path, gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
