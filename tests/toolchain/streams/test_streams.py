"""Streams by a recipe: what is in them, in which order, and never what the tests have."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from runtime_py.loop.dialogue import Turn, check
from runtime_py.loop.errors import LoopError
from runtime_py.loop.random_stream import SplitMix64
from runtime_py.loop.stream import read_stream
from tests.toolchain.conftest import Attune
from tests.toolchain.streams.kit import data_folder, row, write_dataset
from toolchain.compile.general_ids import general_ids
from toolchain.streams.chance import apportioned, chance, shuffled, weighted
from toolchain.streams.dataset import for_development, observed_turns, read_dataset
from toolchain.streams.junk import reworded
from toolchain.streams.made import make_stream
from toolchain.streams.stream_recipe import (
    FOLDER,
    checked,
    dataset_files,
    find_recipe,
    read_recipe,
    recipe_names,
    single,
)

SHARED = Path(__file__).parents[4] / "shared" / "data"


def recipe(order: str = "blocks", **fields: object):
    sources = [
        {"file": "a.jsonl.gz", "observed": 30, "test": 6},
        {"file": "b.jsonl.gz", "observed": 20, "test": 4},
    ]
    return checked({"title": "two", "order": order, "sources": sources, **fields}, "of a test")


DRIFT = {
    "observed": 60,
    "sources": [
        {"file": "a.jsonl.gz", "weights": [1, 0], "test": 5},
        {"file": "b.jsonl.gz", "weights": [0, 1]},
    ],
}
JUNK = {"greetings": 5, "acknowledgements": 4, "gibberish": 3, "near_duplicates": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("data"), a=80, b=60)


def test_blocks_stand_one_after_the_other(data: Path) -> None:
    stream, tests = make_stream(recipe(), data, 3)
    assert [(name, len(list(of))) for name, of in groupby(stream, lambda one: one.block)] == [
        ("a", 30),
        ("b", 20),
    ]
    assert Counter(one.dataset for one in tests) == {"a": 6, "b": 4}


def test_blocks_are_cut_and_dealt(data: Path) -> None:
    stream, _ = make_stream(recipe(block_length=10), data, 3)
    assert Counter(one.dataset for one in stream) == {"a": 30, "b": 20}
    tens = [{one.dataset for one in stream[begin : begin + 10]} for begin in range(0, 50, 10)]
    assert all(len(names) == 1 for names in tens)
    assert [next(iter(names)) for names in tens] != ["a", "a", "a", "b", "b"]


def test_mixed_has_no_blocks(data: Path) -> None:
    stream, _ = make_stream(recipe("mixed"), data, 3)
    half = Counter(one.dataset for one in stream[:25])
    assert Counter(one.dataset for one in stream) == {"a": 30, "b": 20}
    assert half["a"] >= 8
    assert half["b"] >= 4


def test_drift_follows_its_weights(data: Path) -> None:
    """From a alone to b alone: the place of a b is a draw whose chance rises linearly."""
    shares = np.mean(
        [
            [one.dataset == "b" for one in make_stream(checked(
                {"title": "d", "order": "drift", **DRIFT}, "d"), data, seed).stream]
            for seed in range(60)
        ],
        axis=0,
    )  # fmt: skip
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    fit = stats.linregress(np.linspace(0, 1, 60), shares)
    assert fit.slope == pytest.approx(1.0, abs=0.1)
    assert fit.intercept == pytest.approx(0.0, abs=0.06)


def test_phases_of_a_drift(data: Path) -> None:
    fields = {
        "observed": 40,
        "sources": [
            {"file": "a.jsonl.gz", "weights": [1, 1, 0]},
            {"file": "b.jsonl.gz", "weights": [0, 1, 1]},
        ],
    }
    stream, _ = make_stream(checked({"title": "d", "order": "drift", **fields}, "d"), data, 1)
    blocks = [name for name, _ in groupby(stream, lambda one: one.block)]
    assert blocks == ["phase 1", "phase 2"]


@pytest.mark.parametrize(
    "made", [recipe(), recipe("mixed"), checked({"title": "d", "order": "drift", **DRIFT}, "d")]
)
def test_junk_lies_between(data: Path, made) -> None:
    made = made.model_copy(update={"junk": recipe(junk=JUNK).junk})
    stream, _ = make_stream(made, data, 5)
    found = Counter(one.dataset for one in stream)
    assert {kind: found[kind] for kind in ("greeting", "acknowledgement", "gibberish")} == {
        "greeting": 5,
        "acknowledgement": 4,
        "gibberish": 3,
    }
    assert found["near_duplicate"] == 6
    assert len(stream) == made.total
    assert len({one.dialogue.id for one in stream}) == len(stream)
    plain = make_stream(made.model_copy(update={"junk": recipe().junk}), data, 5).stream
    assert [one for one in stream if one.dataset in "ab"] == list(plain)
    texts = {one.dialogue.text for one in plain}
    answers = {one.dialogue.answer for one in plain}
    for one in stream:
        check(one.dialogue)
        if one.dataset == "near_duplicate":
            assert one.dialogue.text not in texts
            assert one.dialogue.answer in answers


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    order=st.sampled_from(["blocks", "mixed"]),
    length=st.integers(0, 15),
    junk=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_any_stream(seed: int, order: str, length: int, junk: list[int], data: Path) -> None:
    """The same seed gives the same; tests are the recipe's alone, and nothing of them is in it."""
    kinds = dict(zip(JUNK, junk, strict=True))
    made = recipe(order, junk=kinds, block_length=length if order == "blocks" else 0)
    stream, tests = make_stream(made, data, seed)
    assert (stream, tests) == make_stream(made, data, seed)
    assert tests == make_stream(made, data, seed + 1 if seed < 2**63 else seed - 1).tests
    assert {one.dialogue.id for one in stream}.isdisjoint(one.dialogue.id for one in tests)
    real = [one.dialogue for one in stream if one.dataset in "ab"]
    assert {one.text for one in real}.isdisjoint(one.dialogue.text for one in tests)
    assert {one.turns[:-1] for one in real}.isdisjoint(one.dialogue.turns[:-1] for one in tests)


def test_another_seed_is_another_stream(data: Path) -> None:
    one, other = (make_stream(recipe("mixed"), data, seed).stream for seed in (1, 2))
    assert {a.dialogue.id for a in one} != {a.dialogue.id for a in other}


def test_what_tests_have_under_another_name_is_left_out(tmp_path: Path) -> None:
    """The same text with other blanks and case, and the same question with another answer."""
    rows = [row(number, "a") for number in range(20)]
    copies = [json.loads(json.dumps(one)) for one in rows]
    for one in copies:
        one["id"] += "-copy"
        one["turns"][1]["content"] = one["turns"][1]["content"].upper().replace(" ", "  ")
    asked = [json.loads(json.dumps(one)) for one in rows]
    for one in asked:
        one["id"] += "-asked"
        one["turns"][1]["content"] = f"another answer to {one['id']}"
    write_dataset(tmp_path, "a", [*rows, *copies, *asked])
    stream, tests = make_stream(single("a.jsonl.gz", 24, 8, "all"), tmp_path, 4)
    numbers = [{one.dialogue.id.split("-")[1] for one in part} for part in (stream, tests)]
    assert len(numbers[1]) == 8
    assert numbers[0].isdisjoint(numbers[1])
    with pytest.raises(LoopError, match="has 24 dialogues beside the tests, 25 are wanted"):
        make_stream(single("a.jsonl.gz", 25, 8, "all"), tmp_path, 4)


def test_rows_for_development_are_never_judged(data: Path) -> None:
    ids = [
        {one.dialogue.id for part in make_stream(
            single("a.jsonl.gz", 12, 4, rows), data, seed) for one in part}
        for rows in ("development", "judging")
        for seed in range(5)
    ]  # fmt: skip
    assert all(map(for_development, set.union(*ids[:5])))
    assert not any(map(for_development, set.union(*ids[5:])))


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        ("ua", "ua"),
        ("sua", "ua"),
        ("auaua", "uaua"),
        ("uau", "ua"),
        ("sauauu", "ua"),
        ("a", ""),
        ("u", ""),
        ("au", ""),
        ("", ""),
        ("uusa", "uua"),
    ],
)
def test_what_of_a_row_the_loop_can_observe(roles: str, kept: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    turns = tuple((names[role], f"{place}") for place, role in enumerate(roles))
    found = observed_turns(turns)
    assert "".join(turn.role[0] for turn in found) == kept
    assert all(Turn(*turns[int(turn.content)]) == turn for turn in found)


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    bad = [
        {"id": "no-reply", "turns": [{"role": "user", "content": "hello"}]},
        {"id": "blank", "turns": [{"role": "user", "content": " "},
                                  {"role": "assistant", "content": "x"}]},
        {"turns": []},
        row(3, "a"),
    ]  # fmt: skip
    path = write_dataset(tmp_path, "a", [row(number, "a") for number in range(10)] + bad)
    dataset = read_dataset(path)
    assert (len(dataset.dialogues), dataset.rows, dataset.without_reply) == (10, 13, 1)
    assert dataset.unusable == 3
    with pytest.raises(LoopError) as error:
        make_stream(single("a.jsonl.gz", 9, 3, "all"), tmp_path)
    assert "a.jsonl.gz has 7 dialogues beside the tests, 9 are wanted" in str(error.value)
    assert "of 13 rows 1 have no reply to refer to and 3 cannot be read" in str(error.value)


def test_the_general_text_is_in_no_stream(tmp_path: Path) -> None:
    """What forgetting is measured on, and what is replayed."""
    rows = [row(number, "a") for number in range(10)]
    for one, id in zip(rows[:4], sorted(general_ids())[::60], strict=True):
        one["id"] = id
    path = write_dataset(tmp_path, "a", rows)
    dataset = read_dataset(path)
    assert dataset.general == 4
    assert general_ids().isdisjoint(one.id for one in dataset.dialogues)
    with pytest.raises(LoopError, match="of 10 rows 4 are the general text"):
        make_stream(single("a.jsonl.gz", 7, 0, "all"), tmp_path)


def test_all_misfits_are_one_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(LoopError) as error:
        make_stream(recipe().scaled(500, 300), data)
    assert str(error.value).count("are wanted") == 4
    with pytest.raises(LoopError, match=r"lacks a\.jsonl\.gz, b\.jsonl\.gz"):
        make_stream(recipe(), tmp_path)
    with pytest.raises(LoopError, match="no data folder"):
        make_stream(recipe(), tmp_path / "none")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(LoopError, match="is damaged"):
        make_stream(single("a.jsonl.gz"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"speed": 3}, "speed: Extra inputs"),
        ({"order": "random"}, "order: Input should be"),
        ({"sources": []}, "sources: Tuple should have at least 1"),
        ({"sources": [{"file": "a", "observed": -1}]}, "observed: Input should be greater"),
        ({"sources": [{"file": "a"}]}, "the stream has no dialogue"),
        ({"sources": [{"file": "a", "observed": 1}] * 2}, "a stands twice"),
        ({"sources": [{"file": "a", "observed": 1, "weights": [1]}]}, "which only drift has"),
        ({"order": "mixed", "block_length": 3}, "block_length belongs to the order blocks"),
        ({"order": "drift", "observed": 3}, "has observed, which drift takes from the weights"),
        (
            {"order": "drift", "observed": 3, "sources": [{"file": "a"}]},
            "as many weights, at least one",
        ),
        (
            {"order": "drift", "observed": 3, "sources": [{"file": "a", "weights": [1, 0]}]},
            "all weights are 0 at point 2",
        ),
        (
            {"sources": [{"file": "a"}], "junk": {"near_duplicates": 1}},
            "near_duplicates needs dialogues",
        ),
    ],
)
def test_recipes_that_cannot_be(fields: dict, words: str) -> None:
    with pytest.raises(LoopError) as error:
        recipe(**{"order": "blocks", **fields})
    assert words in str(error.value)


def test_a_recipe_is_scaled_in_proportion() -> None:
    small = recipe(junk=JUNK).scaled(34, 5)  # of 68 and 10
    assert [source.observed for source in small.sources] == [15, 10]
    assert [source.test for source in small.sources] == [3, 2]
    assert small.junk.counts == (3, 2, 1, 3)
    assert small.total == 34
    drift = checked({"title": "d", "order": "drift", **DRIFT, "junk": JUNK}, "d").scaled(39, 2)
    assert (drift.observed, drift.total, drift.tests) == (30, 39, 2)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 500), min_size=1, max_size=9))
def test_shares_add_up(total: int, parts: list[int]) -> None:
    shares = apportioned(total, parts)
    exact = [total * part / max(1, sum(parts)) for part in parts]
    assert sum(shares) == (total if sum(parts) else 0)
    assert all(abs(share - right) < 1 for share, right in zip(shares, exact, strict=True))


@given(st.lists(st.integers()), st.integers(0, 2**64 - 1))
def test_shuffling_keeps_everything(items: list[int], seed: int) -> None:
    assert sorted(shuffled(items, SplitMix64(seed))) == sorted(items)


def test_chance_is_fair() -> None:
    stream = chance(1, "fair")
    drawn = Counter(weighted([1.0, 0.0, 3.0], stream) for _ in range(4000))
    assert drawn[1] == 0
    assert stats.binomtest(drawn[0], 4000, 0.25).pvalue > 1e-3
    orders = Counter(tuple(shuffled(range(3), chance(seed, "all"))) for seed in range(3000))
    assert len(orders) == 6
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


@given(st.text(min_size=1).filter(str.strip), st.integers(0, 2**64 - 1))
def test_other_words(text: str, seed: int) -> None:
    other = reworded(text, SplitMix64(seed))
    assert other != text
    assert other.strip()


def test_the_recipes_that_ship() -> None:
    assert recipe_names() == ["development", "drift", "mixed", "readme"]
    shipped = {name: read_recipe(FOLDER / f"{name}.toml") for name in recipe_names()}
    assert {n: (r.total, r.tests) for n, r in shipped.items()} == {
        "development": (1200, 120),
        "drift": (2400, 240),
        "mixed": (2400, 240),
        "readme": (2000, 200),
    }
    assert [source.observed for source in shipped["readme"].sources] == [
        *(363, 250, 250, 137, 250, 250, 250, 250)
    ]
    assert shipped["development"].rows == "development"
    assert shipped["mixed"].rows == shipped["drift"].rows == "judging"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["mixed", "drift", "development"])
def test_the_recipes_that_ship_can_be_made(name: str) -> None:
    made = find_recipe(name, SHARED)
    stream, tests = make_stream(made, SHARED)
    assert (len(stream), len(tests)) == (made.total, made.tests)


def test_the_command(attune: Attune, data: Path, tmp_path: Path) -> None:
    out, unseen = tmp_path / "s.jsonl.gz", tmp_path / "t.jsonl"
    size = ("--observed", 24, "--tests", 5, "--seed", 3)
    said = attune("stream", "a", "--data", data, "--out", out, "--test", unseen, *size, "--json")
    assert said.json()["stream"] == {"a": 24}
    first = out.read_bytes()
    lines = [json.loads(line) for line in gzip.decompress(first).decode().splitlines()]
    assert set(lines[0]) == {"id", "dataset", "block", "turns"}
    assert [record.dialogue.id for record in read_stream(out)] == [one["id"] for one in lines]
    assert len(list(read_stream(unseen))) == 5
    said = attune("stream", "a", "--data", data, "--out", out, *size)
    assert "in all" in said.out
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "there is no recipe 'nope'; known are development, drift, mixed, readme"),
        (["nope"], "a, b."),
        ([], "give either a recipe's name"),
        (["a", "--recipe", "x.toml"], "give either a recipe's name"),
        (["--recipe", "x.toml"], "there is no recipe x.toml"),
        (["readme"], "lacks dev/dolly.jsonl.gz"),
        (["a", "--out", "s.txt"], "is no name for a stream"),
        (["a", "--test", "s.jsonl"], "are both"),
    ],
)
def test_the_command_refuses(
    arguments: list[str], words: str, attune: Attune, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rest = [] if "--out" in arguments else ["--out", "s.jsonl"]
    said = attune("stream", *arguments, *rest, "--data", data)
    assert said.code == 2
    assert words in said.err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_datasets_are_found_in_folders(tmp_path: Path) -> None:
    data_folder(tmp_path / "dev", x=1)
    data_folder(tmp_path, y=1)
    assert dataset_files(tmp_path) == {"x": "dev/x.jsonl.gz", "y": "y.jsonl.gz"}
