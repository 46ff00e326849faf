"""Tuning: finds what a formula says is best, within limits, resumably and the same every time."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime_py.bundle import bundle as bundles
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.replacement import POLICIES
from tests.toolchain.conftest import Attune
from tests.toolchain.streams.kit import data_folder
from tests.toolchain.tune import fake
from toolchain.cli import tune as command
from toolchain.compile.policy_file import read_policy_file
from toolchain.study import sources
from toolchain.study.cells import StudyPlace
from toolchain.study.results import open_folder
from toolchain.study.study_run import Crew
from toolchain.tune.measuring import Bench, Limits, Measured
from toolchain.tune.search import (
    Finalist,
    TrialRow,
    TuneOptions,
    TuneOutcome,
    best_rows,
    tune,
    winner_of,
)
from toolchain.tune.space import SPACE, Choice, Number, check_groups
from toolchain.tune.tune_page import page, verdict

optuna = pytest.importorskip("optuna", reason="needs the extra tune")

LIMITS = Limits("pixel-8", minutes=300.0, memory_mb=640.0, forgetting=0.03)
OPTIONS = TuneOptions(("learning",), 14, None, orderings=2, confirm=2, finalists=3, seed=3)


def bench(folder: Path, crew: Crew = Crew()) -> Bench:  # noqa: B008 - it is frozen
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    opened = open_folder(folder / "out", {"bundle": "x"}, {})
    place = StudyPlace(bundle, folder)
    return Bench(
        opened, place, ["development"], {}, "pixel-8", fake.open_world, fake.run_cell, crew
    )


def search(folder: Path, options: TuneOptions = OPTIONS, limits: Limits = LIMITS) -> TuneOutcome:
    return tune(options, bench(folder), limits, folder / "out")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuneOutcome]:
    folder = tmp_path_factory.mktemp("tune")
    return folder, search(folder)


def test_it_finds_what_is_best_within_the_limits(found: tuple[Path, TuneOutcome]) -> None:
    """Epochs cost an hour each, and a night has five: more gain more and do not fit."""
    folder, outcome = found
    winner = outcome.winner
    assert len(outcome.trials) == 14
    assert winner.number is not None
    assert winner.policy["epochs"] <= 5
    assert any(not row.fits for row in outcome.trials)
    fitting = [row for row in outcome.trials if row.fits and row.measured]
    best = max(fitting, key=lambda row: row.measured.gain)  # type: ignore[union-attr]
    assert winner.policy == best.policy
    assert winner.gain == pytest.approx(fake.gain(best.policy) + 0.0025)  # orderings 2 and 3
    assert winner.seen.gain == pytest.approx(fake.gain(best.policy) + 0.0005)
    own = outcome.finalists[0]
    assert own.gain == pytest.approx(fake.gain({}) + 0.0025)
    assert winner.gain > own.gain
    assert json.loads((folder / "out" / "policy.json").read_text()) == winner.policy


def test_an_export_takes_what_is_written(found: tuple[Path, TuneOutcome]) -> None:
    folder, outcome = found
    assert read_policy_file(folder / "out" / "policy.json", (256,)).loop == outcome.winner.policy


def test_an_interrupted_search_goes_on_as_if_it_had_not(
    found: tuple[Path, TuneOutcome], tmp_path: Path
) -> None:
    """Killed in the midst of a trial: nothing is measured twice, and the rest is the same."""
    _, outcome = found
    fake.ran.clear()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "stop-20").touch()
    with pytest.raises(fake.Interrupted):
        search(tmp_path)
    (tmp_path / "bundle" / "stop-20").unlink()
    again = search(tmp_path)
    assert len(fake.ran) - 1 == len(set(fake.ran))  # the one that was cut off
    assert [row.policy for row in again.trials] == [row.policy for row in outcome.trials]
    assert again.winner.policy == outcome.winner.policy
    fake.ran.clear()
    assert search(tmp_path).winner.policy == outcome.winner.policy
    assert fake.ran == []
    more = search(tmp_path, replace(OPTIONS, trials=16))
    assert [row.policy for row in more.trials[:14]] == [row.policy for row in outcome.trials]
    assert len(more.trials) == 16


def test_another_seed_searches_elsewhere(found: tuple[Path, TuneOutcome], tmp_path: Path) -> None:
    other = search(tmp_path, replace(OPTIONS, seed=4, trials=2))
    assert [row.policy for row in other.trials] != [row.policy for row in found[1].trials[:2]]


def test_a_trial_that_fails_is_told(tmp_path: Path) -> None:
    options = replace(OPTIONS, groups=("selection",), trials=12, orderings=1, confirm=1)
    outcome = search(tmp_path, options)
    failed = [row for row in outcome.trials if row.measured is None]
    assert failed
    assert {row.policy["selection"] for row in failed} == {"kcenter"}
    assert "trained on development, ordering 0: kcenter has too" in failed[0].sentence
    assert outcome.winner.number is None  # selection changes nothing here
    assert json.loads((tmp_path / "out" / "policy.json").read_text()) == {}
    assert "stays as it is" in verdict(outcome)
    assert "kcenter has too little memory" in page(outcome, "toy")


def test_where_nothing_fits_the_policy_stays(tmp_path: Path) -> None:
    options = replace(OPTIONS, trials=3, orderings=1, confirm=1)
    outcome = search(tmp_path, options, replace(LIMITS, memory_mb=299.0))
    assert not any(row.fits for row in outcome.trials)
    assert outcome.finalists[1:] == ()
    assert outcome.winner.number is None


def measured(gain: float, minutes: float | None = 10.0) -> Measured:
    return Measured(gain, (gain,), minutes, 100.0, 0.01)


def test_what_fits() -> None:
    assert measured(0.1).fits(LIMITS)
    assert measured(0.1).excess(LIMITS)["minutes"] == pytest.approx(10 / 300 - 1)
    assert not measured(0.1, 301.0).fits(LIMITS)
    assert not replace(measured(0.1), forgetting=0.04).fits(LIMITS)
    assert "minutes" not in measured(0.1, None).excess(LIMITS)


def test_who_wins() -> None:
    """Fresh orderings decide, not those that the search has seen."""
    own = Finalist(None, {}, measured(0.1), measured(0.1))
    lucky = Finalist(3, {"batch": 4}, measured(0.4), measured(0.05))
    sound = Finalist(5, {"batch": 8}, measured(0.3), measured(0.2))
    heavy = Finalist(6, {"batch": 16}, measured(0.3), measured(0.3, 400.0))
    broken = Finalist(7, {"batch": 2}, measured(0.5), None, "it failed.")
    assert winner_of([own, lucky, sound, heavy, broken], LIMITS) is sound
    assert winner_of([own, lucky, heavy, broken], LIMITS) is own
    rows = [
        TrialRow(0, {"batch": 4}, measured(0.1), True, ""),
        TrialRow(1, {"batch": 8}, measured(0.3), True, ""),
        TrialRow(2, {"batch": 8}, measured(0.3), True, ""),
        TrialRow(3, {"batch": 9}, measured(0.9), False, ""),
        TrialRow(4, {"batch": 3}, None, False, "no"),
    ]
    assert [row.number for row in best_rows(rows, 3)] == [1, 0]
    outcome = TuneOutcome(LIMITS, tuple(rows), (own, lucky, broken), own)
    text = page(outcome, "toy")
    for part in ("does not fit", "failed", "as it is", "<svg"):
        assert part in text


def test_every_field_that_is_searched_is_the_policys() -> None:
    """And every value may be, also the lowest ones together and the highest ones together."""
    names = [name for group in SPACE.values() for name in group]
    assert set(names) <= {one.name for one in fields(LoopPolicy)}
    assert len(names) == len(set(names))
    spans = {name: span for group in SPACE.values() for name, span in group.items()}
    for end in (0, -1):
        chosen = {
            name: span.values[end] if isinstance(span, Choice) else (span.low, span.high)[end]
            for name, span in spans.items()
        }
        LoopPolicy(**chosen)  # type: ignore[arg-type]
    selection = spans["selection"]
    assert isinstance(selection, Choice)
    assert set(selection.values) == set(POLICIES)
    assert isinstance(spans["learning_rate"], Number)


def test_groups() -> None:
    assert check_groups(()) == tuple(SPACE)
    assert check_groups(("selection", "learning")) == ("learning", "selection")
    with pytest.raises(LoopError, match="no group of fields named luck; known are learning"):
        check_groups(("luck",))


def test_the_command(attune: Attune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = json.loads(LoopPolicy().to_json())
    policy = SimpleNamespace(loop=loop)
    manifest = SimpleNamespace(policy=policy, model=SimpleNamespace(name="toy"))
    opened = SimpleNamespace(manifest=manifest)
    monkeypatch.setattr(bundles, "open_bundle", lambda path: opened)
    monkeypatch.setattr(sources, "open_bundle", lambda path: opened)
    monkeypatch.setattr(command, "world_and_cell", lambda: (fake.open_world, fake.run_cell))
    bundle, out = tmp_path / "b", tmp_path / "out"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    data = data_folder(tmp_path / "data", a=200)
    common = ("--data", data, "--out", out, "--streams", "a", "--observed", 20, "--tests", 5)
    sizes = ("--trials", 4, "--groups", "learning", "--orderings", 1, "--confirm", 1)
    said = attune("tune", bundle, *common, *sizes, "--json")
    assert len(said.json()["trials"]) == 4
    assert (out / "tune-report.html").exists()
    assert json.loads((out / "policy.json").read_text()) == said.json()["winner"]["policy"]
    said = attune("tune", bundle, *common, *sizes)
    assert "gain, fresh" in said.out
    for wrong, words in (
        (("--seed", 1), "search.seed was 0, is 1"),
        (("--phone", "nokia"), "there is no phone 'nokia'; known are"),
        (("--groups", "luck"), "no group of fields named luck"),
        (("--orderings", 0), "--orderings is 0, expected at least 1"),
        (("--minutes", 0), "--minutes and --memory-mb are more than 0"),
    ):
        said = attune("tune", bundle, *common, *sizes, *wrong)
        assert said.code == 2, wrong
        assert words in said.err
