"""Plans: those that ship, cells that decide their own results, and everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.replacement import POLICIES
from tests.toolchain.study import fake
from toolchain.study.cells import Cell, CellResult
from toolchain.study.grid import cells_of
from toolchain.study.plan import plan_names, read_plan

PLAN = """
about = "a trial"
streams = ["toy"]
orderings = 2
[options]
answers = 8
[rows.base]
row = "base"
[rows.default]
[rows.random]
policy = { selection = "random" }
[[vary]]
rows = ["default"]
policy = { bins = [32, 64] }
options = { nights = [1, 2] }
"""


def plan_of(folder: Path, text: str = PLAN) -> Path:
    path = folder / "trial.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", plan_names())
def test_every_shipped_plan_can_be_used(name: str) -> None:
    planned = cells_of(read_plan(name))
    cells = {one.cell.key for one in planned}
    assert len(cells) == len(planned)  # nothing is measured twice


def test_the_main_plan_has_every_policy_and_what_a_user_would_pick() -> None:
    plan = read_plan("main")
    selections = {row.policy.get("selection") for row in plan.rows.values()}
    assert set(POLICIES) <= selections
    assert {"base", "retrieval", "retrieval_trained"} <= {row.row for row in plan.rows.values()}
    assert plan.orderings >= 5
    assert int(plan.options["answers"]) <= 0.8 * LoopPolicy().bins  # all policies have so many
    assert plan.primary is not None
    assert plan.primary.score == "loss"


def test_what_is_varied_is_a_product(tmp_path: Path) -> None:
    planned = cells_of(read_plan(str(plan_of(tmp_path))))
    assert len(planned) == (3 + 4) * 2
    assert [one.cell.ordering for one in planned] == [0] * 7 + [1] * 7
    varied = {one.label: one for one in planned if one.varied}
    one = varied["default, bins 32, nights 2"]
    assert (one.row, dict(one.varied)) == ("default", {"bins": 32, "nights": 2})
    assert (one.cell.policy, one.cell.options["nights"]) == ({"bins": 32}, 2)
    assert one.cell.options["answers"] == 8


def test_a_key_is_of_all_that_decides_and_of_nothing_else() -> None:
    cell = Cell("toy", 0, "trained", {"bins": 32, "batch": 4})
    assert cell.key == Cell("toy", 0, "trained", {"batch": 4, "bins": 32}, {"nights": 1}).key
    others = [
        Cell("toy", 1, "trained", {"bins": 32, "batch": 4}),
        Cell("toy", 0, "base", {"bins": 32, "batch": 4}),
        Cell("toy", 0, "trained", {"bins": 32}),
        Cell("toy", 0, "trained", {"bins": 32, "batch": 4}, {"nights": 2}),
    ]
    assert len({cell.key, *(one.key for one in others)}) == 5
    assert len(cell.key) == 24


def test_one_and_one_point_zero_are_the_same_cell(tmp_path: Path) -> None:
    keys = []
    for rate in ("1", "1.0"):
        text = PLAN.replace(
            'policy = { selection = "random" }', f"policy = {{ crowding = {rate} }}"
        )
        planned = cells_of(read_plan(str(plan_of(tmp_path, text))))
        keys.append([one.cell.key for one in planned])
    assert keys[0] == keys[1]


def test_a_result_comes_back_as_it_was_without_what_was_measured() -> None:
    result = fake.scored(Cell("toy", 0, "trained", {}, {"tests": 6}))
    assert "seconds" not in json.loads(result.to_json())["facts"]
    assert "seconds" in result.measured()
    again = CellResult.from_json(result.to_json())
    assert again == result.settled()
    assert again.to_json() == result.to_json()


WRONG = [
    ('streams = ["toy"]', 'streams = ["toy"]\ncolour = 1', "colour: Extra inputs"),
    ('row = "base"', 'row = "bass"', "base is a row 'bass'; there are trained, base, everything"),
    ('"random" }', '"randm" }', "no selection policy 'randm'; there are .*paper.*random.*kcenter"),
    (
        "bins = [32",
        'asking = ["daily"], bins = [32',
        "no asking rule 'daily'; there are entry, random",
    ),
    (
        "bins = [32",
        'ask_exchange = ["best"], bins = [32',
        "no exchange rule 'best'; there are last",
    ),
    ("bins = [32", "bans = [32", "unknown policy fields bans; there are selection, seed, scores"),
    ("bins = [32", "bins = [0", "bins is 0, expected 1 to 16384"),
    ("answers = 8", "answer = 8", "unknown option answer; there are observed, tests"),
    ("answers = 8", 'answers = "8"', "option answers is '8', expected an int"),
    ("answers = 8", 'estimator = "norms"', "no estimator 'norms'; there are norm, renyi2"),
    ("answers = 8", 'preset = "dac"', "no preset 'dac'; there are dac2024"),
    ("answers = 8", 'user = "kind"', "no user 'kind'; there are ideal, adequate, short, errs"),
    ("answers = 8", "answer_rate = 1.5", "answer_rate is 1.5, expected a part, 0 to 1"),
    ('rows = ["default"]', 'rows = ["defaults"]', "vary names the row 'defaults'; the plan has ba"),
    ("orderings = 2", 'orderings = 2\nbaseline = "bas"', "baseline names the row 'bas'"),
    ('about = "a trial"', "", "about: Field required"),
    ("orderings = 2", "orderings = ", "is not TOML"),
]


@pytest.mark.parametrize(("right", "wrong", "sentence"), WRONG)
def test_what_does_not_exist_is_told_with_what_does(
    tmp_path: Path, right: str, wrong: str, sentence: str
) -> None:
    assert right in PLAN
    with pytest.raises(LoopError, match=sentence):
        cells_of(read_plan(str(plan_of(tmp_path, PLAN.replace(right, wrong)))))


def test_all_misfits_are_one_error(tmp_path: Path) -> None:
    text = PLAN.replace("answers = 8", "answer = 8").replace('"random" }', '"randm" }')
    with pytest.raises(LoopError, match=r"unknown option answer.*no selection policy 'randm'"):
        cells_of(read_plan(str(plan_of(tmp_path, text))))


def test_a_plan_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(
        LoopError, match="no plan 'mian': give one of around, confirm, effort, main"
    ):
        read_plan("mian")
