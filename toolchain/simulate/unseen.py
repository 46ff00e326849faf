"""What a life's last adapter gains on dialogues that the life never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime_py.bundle.adapter_forms import read_values
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import example
from runtime_py.engine.streaming import open_training
from runtime_py.loop.adapter_versions import Versions
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import LoopError
from runtime_py.loop.lesson import Capacity, lesson
from runtime_py.loop.personalizer import ADAPTERS, STORE
from runtime_py.loop.store import open_store
from runtime_py.loop.stream import read_dialogues
from toolchain.report.statistics import Contrast, Paired, compare
from toolchain.simulate.life_plan import LifePlan


@dataclass(frozen=True)
class Unseen:
    """Losses in nats a label of the tests' last replies. ``contrast``: the last adapter's against
    the bundle's own on the same dialogues, its intervals over dialogues alone; ``left_out``: tests
    whose last exchange no training program has room for."""

    contrast: Contrast
    left_out: int


@dataclass(frozen=True)
class Tests:
    """``lessons``: the dialogues as they are judged, without the oldest exchanges that a training
    program has no room for; ``left_out``: how many have no room for their last exchange."""

    lessons: tuple[Dialogue, ...]
    left_out: int


def read_tests(path: Path, plan: LifePlan, bundle: Bundle) -> Tests:
    """Raises ``LoopError`` where a line is no dialogue, a dialogue is one that the life observes,
    or none fits: before the life, so that none is lived in vain."""
    tests = read_dialogues(path)
    seen = {dialogue.turns for dialogue in plan.dialogues()}
    if known := [dialogue.id for dialogue in tests if dialogue.turns in seen]:
        raise LoopError(
            f"{len(known)} of the {len(tests)} dialogues in {path} are in the stream too, the "
            f"first {known[0]!r}; expected others. attune stream --test writes such."
        )
    text = ChatText.of(bundle)
    capacity = Capacity(
        lambda dialogue: example(dialogue, text, last_only=True).inputs,
        max(bundle.training.lengths),
    )
    lessons = tuple(one for test in tests if (one := lesson(test, capacity)) is not None)
    if not lessons:
        raise LoopError(
            f"the last exchange of every test is longer than {capacity.longest} tokens, the most "
            f"that this bundle trains on: give shorter ones, or export with longer --train-lengths."
        )
    return Tests(lessons, len(tests) - len(lessons))


def last_adapter(bundle: Bundle, state: Path) -> Path:
    """The file of the adapter that is active in the store of a life in ``state``."""
    store = open_store(state / STORE)
    try:
        versions = Versions(store, state / ADAPTERS, bundle)
        return versions.file(versions.active)
    finally:
        store.close()


def measure_unseen(
    bundle: Bundle,
    adapter: Path,
    tests: Tests,
    threads: int,
    told: Callable[[int], None],
) -> Unseen:
    """Loss of every test with the bundle's own adapter and with ``adapter``, by the bundle's
    training programs. ``told`` gets how many are done."""
    text, lessons = ChatText.of(bundle), tests.lessons
    engine = open_training(bundle, threads=threads)
    tensors = bundle.manifest.adapter.tensors
    own, last = (
        AdapterState.of(tensors, read_values(file, tensors))
        for file in (bundle.adapter_file, adapter)
    )
    losses = np.zeros((3, len(lessons)))  # with the last, with the bundle's own, labels
    for place, one in enumerate(lessons):
        taught = example(one, text, last_only=True)
        losses[1, place], losses[2, place] = engine.loss(own, [taught])
        same = adapter == bundle.adapter_file
        losses[0, place] = losses[1, place] if same else engine.loss(last, [taught])[0]
        told(place + 1)
    pair = Paired(losses[None, 0], losses[None, 1], losses[None, 2])
    return Unseen(compare([pair], fewest=1), tests.left_out)
