"""The policy that a cell's life is lived by, and what is asked and answered in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.presets import preset
from tests.toolchain.streams.kit import data_folder
from tests.toolchain.study.tiny_bundle import tiny_bundle
from toolchain.study.cell_life import CellLife, CellLived, cell_policy, steps_for
from toolchain.study.cells import ROWS, UNTRAINED, Cell, StudyPlace, Value
from toolchain.study.world import World

OWN = LoopPolicy(bins=64, most_steps=48, seed=9)


def policy(
    row: str = "trained",
    observed: int = 100,
    fields: dict[str, Value] | None = None,
    **options: Value,
) -> LoopPolicy:
    world = SimpleNamespace(policy=OWN)
    cell = Cell("dolly", 3, row, fields or {}, options)
    return cell_policy(cell, world, observed)  # type: ignore[arg-type]


def test_the_seed_is_the_ordering_and_the_rest_the_bundles() -> None:
    found = policy()
    assert found == LoopPolicy(bins=64, seed=3, fine_tune_every_sets=100)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in UNTRAINED])
def test_every_row_keeps_the_cells_own_fields(row: str) -> None:
    found = policy(row, fields={"learning_rate": 0.5, "asking": "typical"}, answers=30, nights=3)
    assert (found.learning_rate, found.seed, found.fine_tune_every_sets) == (0.5, 3, 33)
    if row.startswith("everything"):
        assert (found.selection, found.bins, found.questions_per_day) == ("fifo", 100, 100)
        assert (found.guard_false_acceptance, found.paraphrases) == (1.0, 0)
    else:
        assert (found.selection, found.bins, found.questions_per_day) == ("paper", 64, 10)
    assert found.asking == "typical"
    steps = (found.fewest_steps, found.most_steps)
    assert steps == {"everything_steps": (12, 12), "everything_epochs": (12, 10_000)}.get(
        row, (12, 48)
    )


def test_steps_of_everything_are_those_of_the_loop() -> None:
    """128 answers, 26 of them held out: 102 · 3 epochs ÷ 8, rounded up; no more than fit."""
    assert steps_for(LoopPolicy(), 128) == 39
    assert policy("everything_steps", answers=200, fields={"bins": 128}).most_steps == 39
    assert policy("everything_steps", answers=128, steps=7, fields={"bins": 128}).most_steps == 7
    assert policy("trained", steps=7).fewest_steps == 7


def test_questions_by_day_are_the_policys_own() -> None:
    assert (policy().asking, policy().questions_per_day) == ("entry", 5)
    assert policy(answers=16).asking == "random"  # of what is stored in the end


def test_a_preset_takes_the_place_of_the_bundles_policy() -> None:
    found = policy(preset="dac2024", fields={"bins": 32})
    known = preset("dac2024")
    assert (found.bins, found.learning_rate, found.batch) == (32, known.learning_rate, known.batch)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    data = data_folder(tmp_path_factory.mktemp("data"), notes=60)
    return World(StudyPlace(tiny_bundle(tmp_path_factory.mktemp("bundle")), data))


def lived(
    world: World, folder: Path, fields: dict[str, Value] | None = None, **options: Value
) -> CellLived:
    """Retrieval: a life without training. What it tells is read before its store is closed."""
    whole: dict[str, Value] = {
        "observed": 24,
        "tests": 2,
        "rows": "all",
        "reply_tokens": 2,
        **options,
    }
    cell = Cell("notes", 0, "retrieval", fields or {}, whole)
    stream = [one.dialogue for one in world.stream(cell).stream]
    life = CellLife(cell, world, stream, folder)
    with life.app:
        return life.live()


@pytest.mark.parametrize("nights", [1, 2, 3, 5])
def test_answers_are_as_many_however_many_nights(world: World, tmp_path: Path, nights: int) -> None:
    """Each night asks its share, once."""
    found = lived(world, tmp_path, {"bins": 24}, answers=7, nights=nights)
    assert len(found.answered) == 7
    assert found.asked == -(-7 // nights) * nights
    answers = (dialogue.answer for dialogue in found.answered)
    assert found.tokens == sum(len(world.model.text.encode(text)) for text in answers)


def test_a_question_is_looked_at_once(world: World, tmp_path: Path) -> None:
    """By day an open question stands there after every dialogue."""
    found = lived(world, tmp_path, {"questions_per_day": 3}, answer_rate=0.0)
    assert (found.asked, found.answered, found.tokens) == (3, (), 0)


def test_tokens_of_all_answers_have_a_bound(world: World, tmp_path: Path) -> None:
    free = lived(world, tmp_path / "free", answers=8)
    bound = lived(world, tmp_path / "bound", answers=8, answer_tokens=free.tokens // 2)
    assert 0 < len(bound.answered) < len(free.answered)
    assert bound.tokens <= free.tokens // 2
    assert bound.asked == free.asked


def test_a_life_has_what_the_bundle_brings(world: World, tmp_path: Path) -> None:
    """Its mean vector, without which a policy that centres cannot begin."""
    found = lived(world, tmp_path, {"centre": "bundle"}, answers=4)
    assert len(found.answered) == 4
