"""Whole cells on a tiny bundle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime_py.engine.examples import example
from tests import tiny
from tests.toolchain.streams.kit import data_folder
from tests.toolchain.study.tiny_bundle import CONTEXT, SIZE, tiny_bundle
from toolchain.study import cell as cells
from toolchain.study.cell import run_cell, with_room
from toolchain.study.cells import ROWS, Cell, CellResult, StudyPlace, Value
from toolchain.study.world import World

OPTIONS: dict[str, Value] = {
    "observed": 24, "tests": 3, "rows": "all", "answers": 8, "reply_tokens": 3,
    "general_tokens": 40, "examples": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> StudyPlace:
    data = data_folder(tmp_path_factory.mktemp("data"), notes=60)
    return StudyPlace(tiny_bundle(tmp_path_factory.mktemp("bundle")), data)


@pytest.fixture(scope="module")
def world(place: StudyPlace) -> World:
    return World(place)


@pytest.fixture(autouse=True)
def _no_phones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle has no programs whose time could be modelled."""
    monkeypatch.setattr(cells, "device_names", lambda: [])


@pytest.fixture(scope="module")
def results(world: World) -> dict[str, CellResult]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "device_names", lambda: [])
        for row in ROWS:
            found[row] = run_cell(
                Cell("notes", 0, row, {"guard_false_acceptance": 1.0}, OPTIONS), world
            )
    return found


def test_rows_are_judged_on_the_same_labels(results: dict[str, CellResult]) -> None:
    for one in results.values():
        assert one.scores.ids == results["base"].scores.ids
        assert one.scores.labels == results["base"].scores.labels
        assert one.facts["tests"] == 3


def test_the_base_is_hugging_faces_model(world: World, results: dict[str, CellResult]) -> None:
    theirs = tiny.hugging_face("llama", **SIZE)
    made = world.stream(results["base"].cell)
    for at, dialogue in enumerate(cells.fitting(world, [one.dialogue for one in made.tests])):
        one = example(dialogue, world.model.text, last_only=True)
        with torch.no_grad():
            logits = theirs(torch.from_numpy(one.tokens)[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(one.labels[1:]), reduction="sum"
        )
        assert results["base"].scores.loss[at] == pytest.approx(float(loss), rel=1e-4)


def test_only_what_a_row_changes_is_changed(results: dict[str, CellResult]) -> None:
    base, cut = results["base"].scores, results["base_cut"].scores
    assert cut.loss == base.loss
    assert max(cut.words) <= max(base.words)
    for row in ("trained", "everything_steps", "everything_epochs", "retrieval", "random_examples",
                "retrieval_trained", "instruction"):  # fmt: skip
        assert results[row].scores.loss != base.loss, row
    assert results["retrieval"].scores.loss != results["random_examples"].scores.loss


def test_what_is_told_of_a_life(results: dict[str, CellResult]) -> None:
    for row in ("trained", "retrieval", "retrieval_trained", "random_examples"):
        facts = results[row].facts
        assert (facts["asked"], facts["answered"]) == (8, 8)
        assert facts["answer_tokens"] == results["trained"].facts["answer_tokens"]
    assert results["trained"].facts["steps"] == results["everything_steps"].facts["steps"] == 4
    assert results["everything_epochs"].facts["steps"] == 29  # 19 of 24 · 3 ÷ 2, rounded up
    trained = [row for row in ROWS if "forgetting" in results[row].facts]
    assert trained == ["trained", "everything_steps", "everything_epochs", "retrieval_trained"]
    assert results["trained"].facts["forgetting"] != 0.0
    assert "asked" not in results["base"].facts
    assert results["trained"].facts["kept"] == 8  # bins
    assert results["everything_steps"].facts["kept"] == 24


def test_a_refused_adapter_forgets_nothing(world: World) -> None:
    """It is told, so that a mean over orderings has it."""
    cell = Cell(
        "notes", 0, "trained", {"learning_rate": 10.0, "guard_false_acceptance": 0.0}, OPTIONS
    )
    facts = run_cell(cell, world).facts
    assert (facts["rejected"], facts["forgetting"], facts["kl"]) == (1, 0.0, 0.0)


def test_the_untouched_model_is_scored_once(
    place: StudyPlace, results: dict[str, CellResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(place)
    base = results["base"].cell
    assert run_cell(base, world).to_json() == results["base"].to_json()
    with monkeypatch.context() as patch:
        patch.setattr(world.model, "losses", None)
        assert run_cell(replace(base, ordering=1), world).scores == results["base"].scores
    cut = replace(base, row="base_cut")
    assert run_cell(cut, world).to_json() == results["base_cut"].to_json()


def test_equal_bytes_whatever_the_worker_did_before(
    place: StudyPlace, results: dict[str, CellResult]
) -> None:
    """In a fresh world, in another order, beside another stream."""
    world = World(place)
    own = results["retrieval_trained"].cell
    run_cell(replace(own, ordering=1), world)
    for row in ("retrieval_trained", "trained"):
        assert run_cell(results[row].cell, world).to_json() == results[row].to_json()


def test_orderings_share_their_tests_and_not_their_streams(world: World) -> None:
    first, second = (world.stream(Cell("notes", n, "base", {}, OPTIONS)) for n in (0, 1))
    assert first.tests == second.tests
    assert first.stream != second.stream
    seen = {one.dialogue.id for one in (*first.stream, *second.stream)}
    assert not seen & {one.dialogue.id for one in first.tests}


def test_examples_leave_room_for_the_reply(world: World) -> None:
    made = world.stream(Cell("notes", 0, "base", {}, OPTIONS))
    test = made.tests[0].dialogue
    before = {test.id: sum((one.dialogue.turns for one in made.stream), ())}
    counts = []
    for reply in (1, 200, 512):
        turns = with_room(world, before, [test], reply).get(test.id, ())
        assert turns == before[test.id][len(before[test.id]) - len(turns) :]  # the last ones
        prompt = world.model.prompt([*turns, *test.turns[:-1]])
        assert len(prompt) + reply <= CONTEXT or not turns
        counts.append(len(turns))
    assert counts[0] > counts[1] > counts[2] == 0
    assert np.all(np.array(counts) % 2 == 0)
