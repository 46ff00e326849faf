"""How two rows' results are paired: by ordering and by dialogue, labels counted once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from runtime_py.loop.errors import LoopError
from toolchain.report.statistics import compare
from toolchain.study.cells import Cell, CellResult, CellScores
from toolchain.study.summary import paired


def result(row: str, ordering: int, ids: str, loss: list[float], labels: list[int]) -> CellResult:
    ones = tuple(0.5 for _ in ids)
    scores = CellScores(tuple(ids), tuple(loss), tuple(labels), ones, ones, tuple(labels))
    return CellResult(Cell("toy", ordering, row), scores, {})


def test_only_what_both_have_is_compared() -> None:
    own = {
        0: result("trained", 0, "abc", [1.0, 2.0, 3.0], [1, 2, 3]),
        1: result("trained", 1, "ad", [4.0, 5.0], [2, 2]),
        2: result("trained", 2, "a", [9.0], [1]),
    }
    base = {
        0: result("base", 0, "cba", [6.0, 4.0, 2.0], [3, 2, 1]),
        1: result("base", 1, "dx", [10.0, 7.0], [2, 7]),
    }
    pair = paired(own, base, "loss")
    assert pair is not None
    np.testing.assert_array_equal(pair.unit, [[1, 2, 3, 0], [0, 0, 0, 2]])  # a b c d
    np.testing.assert_array_equal(pair.row, [[1, 2, 3, 0], [0, 0, 0, 5]])
    np.testing.assert_array_equal(pair.against, [[2, 4, 6, 0], [0, 0, 0, 10]])
    assert compare([pair]).relative == pytest.approx(-0.5)
    assert paired(own, {}, "loss") is None
    assert paired({2: own[2]}, {2: result("base", 2, "z", [1.0], [1])}, "loss") is None


def test_a_dialogue_counts_by_the_labels_of_the_other() -> None:
    """As where examples in the prompt leave fewer labels: nats a label are compared."""
    own, base = result("retrieval", 0, "a", [3.0], [3]), result("base", 0, "a", [12.0], [6])
    pair = paired({0: own}, {0: base}, "loss")
    assert pair is not None
    contrast = compare([pair])
    assert (contrast.row, contrast.against) == pytest.approx((1.0, 2.0))


def test_what_cannot_be_written_is_refused_where_it_is_made() -> None:
    one = result("base", 0, "a", [1.0], [1])
    for fact in (math.nan, np.int64(3), np.float32(1.0)):
        with pytest.raises(LoopError, match="expected plain, finite numbers"):
            replace(one, facts={"kept": fact})  # type: ignore[dict-item]
    for loss in (math.nan, math.inf):
        with pytest.raises(LoopError, match="no number"):
            replace(one.scores, loss=(loss,))
    with pytest.raises(LoopError, match="equal numbers"):
        replace(one.scores, loss=(1.0, 2.0))
    with pytest.raises(LoopError, match="name a test dialogue twice"):
        result("base", 0, "aa", [1.0, 1.0], [1, 1])
