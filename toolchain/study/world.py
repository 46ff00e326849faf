"""What a worker opens once: a bundle's model, its data, and what is pure of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from runtime_py.bundle.adapter_forms import read_values
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.general_text import read_general
from runtime_py.engine.examples import Example, example
from runtime_py.engine.retention import general_examples
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Engine, FineTuner
from runtime_py.loop.schedule import Moment
from toolchain.simulate.device import Device
from toolchain.simulate.phone_app import open_loop
from toolchain.streams.made import MadeStream, make_stream
from toolchain.study.batched_loop import BatchedEngine, BatchedFineTuner
from toolchain.study.batched_model import BatchedModel
from toolchain.study.cells import Cell, CellScores, StudyPlace
from toolchain.study.general import ForgettingMeter
from toolchain.study.phone_costs import PhoneCosts, phone_costs
from toolchain.study.sources import recipe_of


class World:
    """A model and its loop, as the fleet's lives take them, and what a study's cells need."""

    def __init__(self, place: StudyPlace) -> None:
        torch.set_num_threads(place.threads)
        self.place = place
        self.bundle = open_bundle(place.bundle)
        self.model = BatchedModel(self.bundle, torch.device(place.device))
        self.engine, self.tuner = BatchedEngine(self.model), BatchedFineTuner(self.model)
        self.policy = LoopPolicy.from_fields(dict(self.bundle.manifest.policy.loop))
        self._streams: dict[tuple[object, int], MadeStream] = {}
        self.untouched: dict[
            tuple[tuple[Dialogue, ...], int], CellScores
        ] = {}  # of the base, a stream
        self._general: dict[int, ForgettingMeter] = {}

    def stream(self, cell: Cell) -> MadeStream:
        """The dialogues that the cell observes, and its tests."""
        recipe = recipe_of(cell, self.place.data)
        key = recipe.model_dump_json(), cell.ordering
        if key not in self._streams:
            self._streams.clear()  # cells come sorted by their streams
            self._streams[key] = make_stream(recipe, self.place.data, cell.ordering)
        return self._streams[key]

    def use(self, adapter: Path) -> None:
        """Of all that follows."""
        self.model.set_values(read_values(adapter, self.model.shape.tensors))

    def examples(self, dialogues: Sequence[Dialogue]) -> list[Example]:
        """Each with its last reply as labels."""
        return [example(dialogue, self.model.text, last_only=True) for dialogue in dialogues]

    def general(self, tokens: int) -> ForgettingMeter:
        """The first ``tokens`` of the bundle's general text, or all there are, in sequences of the
        training programs' longest."""
        if tokens not in self._general:
            longest = max(self.bundle.training.lengths)
            texts = read_general(self.bundle)
            examples = general_examples(texts, self.model.text, longest, tokens)
            self._general[tokens] = ForgettingMeter(self.model, examples)
        return self._general[tokens]

    # What lives take

    def loop(
        self,
        folder: Path,
        policy: LoopPolicy,
        engine: Engine,
        tuner: FineTuner,
        clock: Callable[[], Moment],
    ) -> Personalizer:
        """With all that the bundle brings. Close it."""
        return open_loop(
            self.bundle, folder, policy, lexicons=None, engine=engine, tuner=tuner, clock=clock
        )

    def costs(self, phone: Device) -> PhoneCosts:
        return phone_costs(self.bundle, phone, self.model.text)

    def losses(self, adapter: Path, dialogues: Sequence[Dialogue]) -> Sequence[float]:
        self.use(adapter)
        examples = self.examples(dialogues)
        sums = self.model.losses(examples)
        return [float(nats) / one.count for nats, one in zip(sums, examples, strict=True)]

    def replies(self, adapter: Path, dialogues: Sequence[Dialogue], most: int) -> Sequence[str]:
        self.use(adapter)
        return self.model.replies([dialogue.turns[:-1] for dialogue in dialogues], most)


def open_world(place: StudyPlace) -> World:
    """Raises ``AttuneError`` where a bundle or device cannot be used."""
    return World(place)
