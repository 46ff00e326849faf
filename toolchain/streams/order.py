"""Which source stands at each place of a stream, before any dialogue is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from runtime_py.loop.random_stream import SplitMix64
from toolchain.streams.chance import shuffled, weighted
from toolchain.streams.stream_recipe import Recipe


@dataclass(frozen=True)
class StreamPlace:
    """``source``: its number in the recipe; ``block``: the name of the part that it lies in."""

    source: int
    block: str


def places(recipe: Recipe, stream: SplitMix64) -> list[StreamPlace]:
    """Of every dialogue but the junk, in order."""
    if recipe.order == "drift":
        return _drift(recipe, stream)
    counts = [source.observed for source in recipe.sources]
    if recipe.order == "mixed":
        each = [place for place, count in enumerate(counts) for _ in range(count)]
        return [StreamPlace(source, "mixed") for source in shuffled(each, stream)]
    names = [source.name for source in recipe.sources]
    length = recipe.block_length
    blocks = [
        (source, min(length or count, count - begin))
        for source, count in enumerate(counts)
        if count
        for begin in range(0, count, length or count)
    ]
    if length:
        blocks = shuffled(blocks, stream)
    return [StreamPlace(source, names[source]) for source, count in blocks for _ in range(count)]


def _drift(recipe: Recipe, stream: SplitMix64) -> list[StreamPlace]:
    """A source at each place by the weights there; a block lies between two points."""
    points, total = len(recipe.sources[0].weights), recipe.observed
    found = []
    for number in range(total):
        # from 0 at the first dialogue to points − 1 at the last
        along = number * (points - 1) / (total - 1) if total > 1 else 0.0
        begin = min(int(along), max(0, points - 2))
        part, end = along - begin, min(begin + 1, points - 1)
        weights = [
            source.weights[begin] * (1.0 - part) + source.weights[end] * part
            for source in recipe.sources
        ]
        found.append(StreamPlace(weighted(weights, stream), f"phase {begin + 1}"))
    return found
