"""A fleet: lives, swaps, who gains what, and that it is the same however it is run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.bundle import bundle as bundles
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from tests.toolchain.conftest import Attune
from tests.toolchain.fleet import toy_world
from tests.toolchain.streams.kit import data_folder, row, write_dataset
from toolchain.cli import fleet as command
from toolchain.fleet.fleet_options import FleetOptions
from toolchain.fleet.fleet_outcome import FleetOutcome, mean_interval, why_worse
from toolchain.fleet.fleet_page import page
from toolchain.fleet.fleet_run import Fleet, prepare, run
from toolchain.fleet.fleet_world import FleetPlace
from toolchain.fleet.folder import FleetFolder
from toolchain.fleet.manners import MANNERS, find_manner
from toolchain.fleet.swap import partners_of
from toolchain.fleet.user_life import FleetNight, LifeOptions, LifeTask, as_wanted, evenings, live
from toolchain.fleet.users import make_crowd, make_user
from toolchain.simulate.device import find_device
from toolchain.streams.made import StreamDialogue, make_stream
from toolchain.study.cells import StudyPlace
from toolchain.study.study_run import Crew

LIFE = LifeOptions(
    nights=2, answer_rate=1.0, dialogues_a_day=20, replies=4, reply_tokens=16, policy={}
)
OPTIONS = FleetOptions(users=6, dialogues=60, tests=8, partners=3, seed=5, life=LIFE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("data"), a=90, b=80, c=80, tiny=20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data: Path) -> FleetPlace:
    folder = toy_world.toy_bundle(tmp_path_factory.mktemp("world") / "bundle")
    return FleetPlace(StudyPlace(folder, data), "pixel-8")


def prepared(place: FleetPlace, out: Path, options: FleetOptions = OPTIONS) -> Fleet:
    return prepare(place, options, out, toy_world.open_world(place).policy, {"bundle": "x"})


@pytest.fixture(scope="module")
def lived(
    place: FleetPlace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Fleet, FleetOutcome]:
    fleet = prepared(place, tmp_path_factory.mktemp("fleet") / "out")
    return fleet, run(fleet, Crew(2), toy_world.open_world)


def results(folder: Path) -> dict[str, bytes]:
    """All but what was measured of the machine."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "measured"
    }


def test_everybody_lives(lived: tuple[Fleet, FleetOutcome]) -> None:
    _, outcome = lived
    assert not outcome.failures
    assert [life.number for life in outcome.lives] == list(range(6))
    for life in outcome.lives:
        assert life.observed == 60
        assert len(life.before) == len(life.tests) == 8
        assert life.before == (3.0,) * 8
        assert sum(life.answered.values()) == life.asked == 15  # 5 a day
        assert len(life.nights) == 2
    assert {life.manner for life in outcome.lives} == set(MANNERS)
    assert outcome.small == ("tiny.jsonl.gz",)


def test_time_and_energy_are_counted(lived: tuple[Fleet, FleetOutcome]) -> None:
    """Two nights of five steps each, and an embedding for each dialogue; heat only pauses."""
    _, outcome = lived
    for life in outcome.lives:
        work = 60 * toy_world.EMBED + sum(night.steps for night in life.nights) * toy_world.STEP
        assert [night.steps for night in life.nights] == [5, 5]
        assert life.day_minutes == pytest.approx(60 * toy_world.EMBED / 60)
        assert life.watt_hours == pytest.approx(work / 3600 * outcome.phone.power.watts, rel=1e-6)
        assert all(night.minutes >= 2.5 - 1e-6 for night in life.nights)
        assert not any(night.too_long for night in life.nights)


def test_gains_are_those_of_the_adapters(
    lived: tuple[Fleet, FleetOutcome], place: FleetPlace, tmp_path: Path
) -> None:
    """Worked out anew: every adapter on every user's tests, in that user's manner."""
    fleet, outcome = lived
    lives = {life.number: life for life in outcome.lives}
    losses = np.empty((6, 6))  # [adapter, user]
    for user in fleet.crowd.users:
        tests = make_stream(user.recipe, place.study.data, user.seed).tests
        manner = find_manner(user.manner)
        wanted = [one.dialogue for one in as_wanted(tests, manner, toy_world.WordTuner())]
        for number, life in lives.items():
            file = tmp_path / f"{number}.json"
            file.write_bytes(fleet.folder.adapter(life) or b'{"words": []}')
            each = [toy_world.loss(file, one) for one in wanted]
            losses[number, user.number] = np.mean(each)
    own = np.diag(losses)
    assert outcome.gains == pytest.approx(list(3.0 - own))
    for number, swapped in enumerate(outcome.swaps):
        assert swapped is not None
        assert len(swapped.partners) == 3
        assert number not in swapped.partners
        others = np.mean([3.0 - losses[partner, number] for partner in swapped.partners])
        assert outcome.personal[number] == pytest.approx((3.0 - own[number]) - others)


def test_what_a_user_wants_is_learnt(lived: tuple[Fleet, FleetOutcome]) -> None:
    """The toy's reply is an answer that it was taught; before, it is `A reply. B`."""
    rows = {row.manner: row for row in lived[1].manners()}
    for name in ("greeting", "bullets", "sign-off", "lower"):
        assert (rows[name].compliance_before, rows[name].compliance_after) == (0.0, 1.0)
    assert rows["short"].compliance_before == 1.0  # three words
    assert rows["british"].compliance_before is None  # nothing to tell by
    assert all(row.gain > 0 for row in rows.values())


def test_the_same_bytes_by_one_process_and_after_an_interruption(
    lived: tuple[Fleet, FleetOutcome], place: FleetPlace, tmp_path: Path
) -> None:
    fleet, outcome = lived
    assert prepared(place, tmp_path / "new").folder.lives() == {}
    assert not (tmp_path / "new").exists()  # until there is a world
    out = tmp_path / "out"
    shutil.copytree(fleet.folder.path, out)
    for gone in ("lives/000001.json", "swaps/000004.json", "adapters/000002.bin"):
        (out / gone).unlink()
    (out / "lives" / "000003.json").write_text('{"number": 3, ')
    shutil.rmtree(out / "swaps")
    phases: list[tuple[str, int, int]] = []
    again = run(
        prepared(place, out), Crew(1), toy_world.open_world, lambda *told: phases.append(told)
    )
    assert results(out) == results(fleet.folder.path)
    assert phases[0] == ("lives", 3, 6)
    assert again.gains == outcome.gains


def test_a_fleet_may_grow(lived: tuple[Fleet, FleetOutcome], place: FleetPlace) -> None:
    """A user is what its number makes it: the lives that are there stay good."""
    fleet, _ = lived
    more = make_crowd(place.study.data, range(9), 60, 8, 5)
    assert more.users[:6] == fleet.crowd.users
    assert make_crowd(place.study.data, range(4, 9), 60, 8, 5).users == more.users[4:]


def test_another_configuration_is_refused(
    lived: tuple[Fleet, FleetOutcome], place: FleetPlace, tmp_path: Path
) -> None:
    out = lived[0].folder.path
    other = replace(OPTIONS, seed=6, life=replace(LIFE, policy={"batch": 4}))
    with pytest.raises(LoopError) as error:
        prepared(place, out, other)
    assert 'policy was {}, is {"batch": 4}; seed was 5, is 6' in str(error.value)
    (tmp_path / "x").write_text("")
    with pytest.raises(LoopError, match="has files and no fleet"):
        prepared(place, tmp_path)


def test_who_fails_is_told_and_is_nobodys_partner(
    place: FleetPlace, tmp_path: Path, data: Path
) -> None:
    bundle = toy_world.toy_bundle(tmp_path / "bundle")
    broken = replace(place, study=replace(place.study, bundle=bundle))
    options = replace(OPTIONS, users=4)
    fleet = prepared(broken, tmp_path / "out", options)
    victim = fleet.crowd.users[2]
    tests = [
        {one.dialogue.id for one in make_stream(user.recipe, data, user.seed).tests}
        for user in fleet.crowd.users
    ]
    alone = sorted(tests[2].difference(*(tests[:2] + tests[3:])))
    (bundle / "break").write_text(alone[0])
    outcome = run(fleet, Crew(1), toy_world.open_world)
    assert [(one.number, one.phase) for one in outcome.failures] == [(victim.number, "life")]
    assert "cannot be scored" in outcome.failures[0].sentence
    assert [life.number for life in outcome.lives] == [0, 1, 3]
    assert all(one is not None and 2 not in one.partners for one in outcome.swaps)
    assert (tmp_path / "out" / "failed" / "000002.txt").exists()
    assert "1" in page(outcome, "toy")
    (bundle / "break").unlink()
    assert not run(
        prepared(broken, tmp_path / "out", options), Crew(1), toy_world.open_world
    ).failures
    assert not (tmp_path / "out" / "failed" / "000002.txt").exists()


def night(state: str, guard: int) -> FleetNight:
    return FleetNight(0, state, f"was {state}.", 1.0, 0.1, 5, guard, False)


def test_why_somebody_got_worse(lived: tuple[Fleet, FleetOutcome]) -> None:
    user = make_user(1, 1, ["x.jsonl", "y.jsonl", "z.jsonl"], "short", 50, 10)
    names = [source.name for source in user.recipe.sources]
    life = replace(lived[1].lives[0], tests=(names[-1],) * 10, answered={"none": 3})
    assert f"no answer was about {names[0]}" in why_worse(user, life)
    asked = replace(life, answered=dict.fromkeys(names, 4))
    few = replace(asked, nights=(night("accepted", 2), night("rejected", 9)))
    assert why_worse(user, few) == "the guard had 2 held-out sets to judge an adapter by"
    many = replace(asked, nights=(night("accepted", 6),))
    assert "the unseen dialogues did not" in why_worse(user, many)


def test_reports(lived: tuple[Fleet, FleetOutcome]) -> None:
    outcome = lived[1]
    life = outcome.lives[0]
    bad = replace(life, after=tuple(loss + 0.5 for loss in life.before))
    worse = replace(outcome, lives=(bad, *outcome.lives[1:]))
    told = worse.as_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == json.loads(json.dumps(told))
    assert [one["number"] for one in told["got_worse"]] == [0]
    assert told["gain"]["mean"] == pytest.approx(np.mean(worse.gains))
    # in one night no word of the guard's sets was learned
    assert told["nights"]["states"] == {"accepted": 11, "rejected": 1}
    text = page(worse, "toy")
    for part in ("Who got worse", "tiny.jsonl.gz", "greeting", "<svg", "Pixel 8"):
        assert part in text
    empty = replace(outcome, users=(), lives=(), swaps=(), seconds=())
    assert "—" in page(empty, "toy")


def test_the_mean_has_an_interval() -> None:
    """Against the normal one, which it must be near for many users."""
    values = np.random.default_rng(1).normal(0.1, 0.5, 400)
    found = mean_interval(values)
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.006)
    assert found.high == pytest.approx(values.mean() + half, abs=0.006)
    assert mean_interval(values[:1]) is None


@given(dialogues=st.integers(1, 500), days=st.integers(1, 40), nights=st.integers(1, 12))
def test_nights_are_spread_evenly(dialogues: int, days: int, nights: int) -> None:
    per_day = -(-dialogues // days)
    days = -(-dialogues // per_day)
    nights = min(nights, days)
    due = evenings(per_day, nights, dialogues)
    assert len(set(due)) == nights
    assert due[-1] == dialogues
    assert all(place % per_day == 0 for place in due[:-1])
    gaps = [-(-place // per_day) for place in due]
    assert max(np.diff([0, *gaps])) - min(np.diff([0, *gaps])) <= 1


@settings(max_examples=60, deadline=None)
@given(
    number=st.integers(0, 10**6), seed=st.integers(0, 2**32), files=st.integers(1, 6),
    dialogues=st.integers(30, 400), tests=st.integers(1, 40),
)  # fmt: skip
def test_any_user(number: int, seed: int, files: int, dialogues: int, tests: int) -> None:
    names = [f"{n}.jsonl" for n in range(files)]
    user = make_user(number, seed, names, "short", dialogues, tests)
    assert user == make_user(number, seed, names, "short", dialogues, tests)
    assert user.recipe.total == dialogues
    assert user.recipe.tests == tests
    assert all(any(source.weights) for source in user.recipe.sources)
    assert 0 <= user.seed < 2**63


def test_partners_are_others() -> None:
    lived = list(range(0, 40, 2))
    drawn = [partners_of(number, lived, 5, 1) for number in lived]
    assert all(len(set(p)) == 5 and n not in p for n, p in zip(lived, drawn, strict=True))
    assert set().union(*drawn) == set(lived)
    assert partners_of(0, [0, 2, 4], 5, 1) == (2, 4)


def test_an_answer_that_its_bin_cannot_hold_is_counted(place: FleetPlace, tmp_path: Path) -> None:
    """The user is as before; the set stays unanswered."""
    world = toy_world.open_world(place)
    write_dataset(tmp_path, "a", [row(number, "a", exchanges=2) for number in range(90)])
    user = make_user(3, 1, ["a.jsonl.gz"], "sign-off", 40, 5)
    small = replace(LIFE, policy={"bin_bytes": 400})
    phone = find_device("pixel-8")
    life = live(LifeTask(user, small, tmp_path, phone), world).life
    assert life.refused > 0
    assert 0 < sum(life.answered.values()) < life.asked
    assert sum(life.answered.values()) + life.refused <= life.asked  # each is counted once
    assert live(LifeTask(user, LIFE, tmp_path, phone), world).life.refused == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dialogues": 500}, "no dataset of"),
        ({"datasets": ("nope",)}, "has no dataset named nope; it has a, b, c, tiny"),
        ({"manners": ("rude",)}, "no manner 'rude'"),
        ({"users": 1}, "--users is at least 2"),
        ({"life": replace(LIFE, nights=4)}, "60 dialogues at 20 a day are 3 days"),
        ({"life": replace(LIFE, nights=61)}, "--nights is at least 1, and at most --dialogues"),
        ({"life": replace(LIFE, policy={"selection": "magic"})}, "magic"),
        ({"life": replace(LIFE, policy={"speed": 1})}, "unknown fields: speed"),
    ],
)
def test_what_cannot_be_run(change: dict, words: str, place: FleetPlace, tmp_path: Path) -> None:
    with pytest.raises(LoopError) as error:
        prepared(place, tmp_path / "out", replace(OPTIONS, **change))
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command(
    attune: Attune, place: FleetPlace, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = LoopPolicy(bins=64, bin_bytes=4096, paraphrases=0, selection="fifo")
    policy = SimpleNamespace(loop=json.loads(loop.to_json()))
    manifest = SimpleNamespace(policy=policy, model=SimpleNamespace(name="toy"))
    monkeypatch.setattr(bundles, "open_bundle", lambda path: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(command, "world_opener", lambda: toy_world.open_world)
    bundle, out = place.study.bundle, tmp_path / "out"
    sizes = ("--users", 2, "--dialogues", 30, "--tests", 4, "--nights", 1)
    said = attune("fleet", bundle, "--data", data, "--out", out, *sizes, "--json")
    assert said.json()["lived"] == 2
    assert json.loads((out / "fleet-report.json").read_text()) == said.json()
    said = attune("fleet", bundle, "--data", data, "--out", out, *sizes)
    assert "personal gain" in said.out
    assert "<svg" in (out / "fleet-report.html").read_text()
    said = attune("fleet", bundle, "--data", data, "--out", out, *sizes, "--seed", 1)
    assert said.code == 2
    assert "seed was 0, is 1" in said.err
    said = attune("fleet", bundle, "--data", data, "--out", tmp_path / "o", "--phone", "nokia")
    assert said.code == 2
    assert "there is no device 'nokia'" in said.err
    assert FleetFolder(out, b"").lives().keys() == {0, 1}


def test_tests_are_cut_as_lessons_are() -> None:
    """A token is a word: the oldest exchange goes, and what is too long alone is no test."""

    def told(id: str, *words: int) -> StreamDialogue:
        roles = ("user", "assistant") * (len(words) // 2)
        turns = [Turn(role, "w " * n) for role, n in zip(roles, words, strict=True)]
        return StreamDialogue(Dialogue(id, tuple(turns)), "a", "a")

    tuner = toy_world.WordTuner(lengths=(4, 12))
    dialogues = [told("fits", 4, 4), told("cut", 9, 9, 3, 3), told("long", 9, 9)]
    found = as_wanted(dialogues, MANNERS["lower"], tuner)
    assert [(one.dialogue.id, len(one.dialogue.turns)) for one in found] == [
        ("fits", 2),
        ("cut", 2),
    ]
    with pytest.raises(LoopError, match="none of the 1 test dialogues fits the 12 tokens"):
        as_wanted(dialogues[2:], MANNERS["lower"], tuner)
