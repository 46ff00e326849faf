"""What can be learned, from the question that is asked to the sets that a job has."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py.loop.acknowledgements import read_acknowledgements
from runtime_py.loop.dialogue import Dialogue, Turn, turns_from_json
from runtime_py.loop.errors import AnswerTooLong, PromptTooLong
from runtime_py.loop.jobs import count_steps, held_out_parts
from runtime_py.loop.lesson import Capacity, lesson, longest_lesson
from runtime_py.loop.personalizer import STORE, Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult
from runtime_py.loop.recovery import recover
from runtime_py.loop.schedule import Conditions, Moment
from runtime_py.loop.store import open_store
from runtime_py.loop.store_schema import MIGRATIONS
from tests.runtime_py.loop.toy import NIGHT, WORDS, ToyEngine, ToyTuner, open_toy, small_policy


def count(dialogue: Dialogue) -> int:
    return len(dialogue.text.split())


def sized(id: str, *sizes: int) -> Dialogue:
    """A turn of so many words each."""
    start = sum(id.encode())
    turns = []
    for place, size in enumerate(sizes):
        text = " ".join(WORDS[(start + place + n * n) % len(WORDS)] for n in range(size))
        turns.append(Turn("assistant" if place % 2 else "user", text))
    return Dialogue(id, tuple(turns))


def free(megabytes: int) -> Conditions:
    """150 MB are what 512 tokens need."""
    return dataclasses.replace(NIGHT, free_memory_mb=megabytes)


POLICY = dataclasses.replace(
    small_policy("fifo", bins=64, every=1), bin_bytes=1 << 16, paraphrases=0, questions_per_day=1000
)


def answer_all(app: Personalizer) -> None:
    for question in app.pending_questions():
        app.answer(question.id)


def used(app: Personalizer) -> dict[str, int | None]:
    return dict(app.store.rows("SELECT id, used_in FROM annotations"))


def test_the_oldest_exchanges_are_left_out() -> None:
    long = sized("d", 10, 20, 30, 40, 5, 6, 7, 8)
    assert lesson(long, Capacity(count, 126)) == long
    assert lesson(long, Capacity(count, 125)) == Dialogue("d", long.turns[2:])
    assert lesson(long, Capacity(count, 26)) == Dialogue("d", long.turns[4:])
    assert lesson(long, Capacity(count, 15)) == Dialogue("d", long.turns[6:])
    assert lesson(long, Capacity(count, 14)) is None
    assert lesson(long, Capacity(count, 100), exchange=1) == Dialogue("d", long.turns[:4])
    assert lesson(long, Capacity(count, 99), exchange=1) == Dialogue("d", long.turns[2:4])
    assert lesson(long, Capacity(count, 69), exchange=1) is None


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=12).filter(lambda sizes: len(sizes) % 2 == 0),
    st.integers(1, 200),
    st.data(),
)
def test_a_lesson_is_the_longest_end_that_fits(
    sizes: list[int], longest: int, data: st.DataObject
) -> None:
    whole = sized("d", *sizes)
    exchange = data.draw(st.integers(0, len(sizes) // 2 - 1))
    found = lesson(whole, Capacity(count, longest), exchange)
    until = sizes[: 2 * exchange + 2]
    ends = [until[first:] for first in range(0, len(until), 2) if sum(until[first:]) <= longest]
    assert (found is None) == (not ends)
    if found:
        assert [len(turn.content.split()) for turn in found.turns] == ends[0]
        assert found.answer == whole.turns[2 * exchange + 1].content


def test_the_most_that_can_be_learned() -> None:
    assert longest_lesson((64, 256), LoopPolicy()) == 256
    assert longest_lesson((64, 1024), LoopPolicy()) == 512


@pytest.mark.parametrize(
    ("dialogues", "steps"), [(1, 12), (32, 12), (33, 13), (64, 24), (127, 48), (128, 48), (999, 48)]
)
def test_steps_follow_what_there_is_to_learn(dialogues: int, steps: int) -> None:
    policy = LoopPolicy(epochs=3, batch=8, fewest_steps=12, most_steps=48)
    assert count_steps(dialogues, 3, 8, policy) == steps


def test_half_of_many_held_out_sets_stop_the_training() -> None:
    assert held_out_parts(15, 24, 4) == ["guard"] * 15
    assert held_out_parts(16, 24, 4) == ["stopping", "guard"] * 8
    assert held_out_parts(17, 24, 4) == ["stopping", "guard"] * 8 + ["stopping"]
    assert held_out_parts(40, 4, 4) == ["guard"] * 40  # nothing to look at in between


def test_stopping_and_guard_are_disjoint_in_a_job(tmp_path: Path) -> None:
    policy, tuner = dataclasses.replace(POLICY, heldout_every=2), ToyTuner()
    with open_toy(tmp_path, policy, tuner) as app:
        for number in range(33):
            app.observe(sized(f"d{number}", 3, 3))
        answer_all(app)
        report = app.fine_tune(NIGHT)
        line = next(line for line in app.store.log() if line.event == "job_begun")
    (job,) = tuner.jobs
    held_out = [f"d{number}" for number in range(0, 33, 2)]
    assert [one.id for one in job.stopping] == held_out[::2]
    assert [one.id for one in job.guard] == held_out[1::2]
    assert [one.id for one in job.training] == [f"d{number}" for number in range(1, 33, 2)]
    assert job.steps == 12
    assert (line.data["training"], line.data["stopping"], line.data["guard"]) == (16, 9, 8)
    assert (report.state, report.changed, report.kept_step, report.steps) == ("accepted", 8, 4, 4)
    assert report.false_acceptance == pytest.approx(37 / 256)


def test_what_is_too_long_is_not_asked_about(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(64, 256))
    with open_toy(tmp_path, POLICY, tuner) as app:
        first = app.observe(sized("long", 10, 266))
        assert (first.kept, first.asked, first.not_asked) == (True, False, "too_long_to_learn")
        assert app.store.log()[-1].data["not_asked"] == "too_long_to_learn"
        assert app.pending_questions() == ()
        for number in range(11):
            decision = app.observe(sized(f"d{number}", 200, 200, 20, 30))  # its end fits
            assert (decision.asked, decision.not_asked) == (True, None)
        answer_all(app)
        report = app.fine_tune(NIGHT)
        assert report.state == "accepted"
        assert report.heldout_loss_before is not None
        assert set(used(app).values()) == {1}
    (job,) = tuner.jobs
    assert max(map(count, (*job.training, *job.guard))) == 50
    assert [one.id for one in job.guard] == ["d0", "d5", "d10"]


def test_an_answer_that_makes_it_too_long_is_refused(tmp_path: Path) -> None:
    with open_toy(tmp_path, POLICY, ToyTuner(lengths=(64,))) as app:
        app.observe(sized("d", 10, 10))
        with pytest.raises(AnswerTooLong, match="has 65 tokens with this answer, and at most 64 c"):
            app.answer("d", sized("x", 55, 1).question)
        assert [question.id for question in app.pending_questions()] == ["d"]
        app.answer("d", sized("x", 54, 1).question)
        assert app.status().answered == 1


def test_answers_of_before_that_are_too_long_stand_in_no_ones_way(tmp_path: Path) -> None:
    wide, narrow = ToyTuner(lengths=(512,)), ToyTuner(lengths=(64,))
    with open_toy(tmp_path, POLICY, wide) as app:
        app.observe(sized("old", 10, 200))  # the first answer, so it is held out
        answer_all(app)
    with open_toy(tmp_path, POLICY, narrow) as app:
        assert not app._buffer.waiting.any()  # else it would keep its bin for ever
        app.observe(sized("a", 10, 10))
        answer_all(app)
        report = app.fine_tune(NIGHT)
        assert (report.state, report.left_out) == ("too_few", ("old",))
        assert report.reason == (
            "no set is answered to learn from, or none that is held out; left out as longer than "
            "the 64 tokens that can be learned: old."
        )
        app.observe(sized("b", 10, 10))
        answer_all(app)
        report = app.fine_tune(NIGHT)
        assert (report.state, report.left_out) == ("accepted", ("old",))
        assert used(app) == {"old": None, "a": 1, "b": 1}
        assert app.store.rows("SELECT id FROM learnt") == [("b",)]
        begun = next(line for line in app.store.log() if line.event == "job_begun")
        assert begun.data["left_out"] == ["old"]
    assert [one.id for one in narrow.jobs[0].guard] == ["a"]  # "old" was not counted


def test_what_only_tonight_leaves_out_waits(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(64, 128))
    with open_toy(tmp_path, POLICY, tuner) as app:
        for id, size in (("a", 20), ("b", 20), ("c", 100), ("d", 100)):
            app.observe(sized(id, 10, size))
        answer_all(app)
        report = app.fine_tune(free(20))
        assert (report.state, report.left_out) == ("accepted", ("c", "d"))
        assert used(app) == {"a": 1, "b": 1, "c": None, "d": None}
        waiting = [app._buffer.ids[bin] for bin in app._buffer.waiting.nonzero()[0]]
        assert waiting == ["c", "d"]
        app.observe(sized("e", 10, 10))
        report = app.fine_tune(NIGHT)
        assert (report.state, report.left_out) == ("accepted", ())
        assert set(used(app).values()) == {2}
        assert app.store.rows("SELECT id FROM learnt WHERE adapter = 2") == [
            (id,) for id in ("b", "c", "d")
        ]


def test_a_night_too_short_for_one_side_is_postponed(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(64, 128))
    with open_toy(tmp_path, POLICY, tuner) as app:
        for id, size in (("a", 100), ("b", 20)):
            app.observe(sized(id, 10, size))
        answer_all(app)
        report = app.fine_tune(free(20))
        assert (report.state, report.job, report.left_out) == ("postponed", None, ("a",))
        assert "the memory allows 64 tokens now" in report.reason
        assert set(used(app).values()) == {None}
        assert app.fine_tune(NIGHT).state == "accepted"


def test_a_job_that_is_shortened_lets_go_what_no_longer_fits(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(64, 100, 300), too_long=100)
    policy = dataclasses.replace(POLICY, epochs=1, batch=1, fewest_steps=1)
    with open_toy(tmp_path, policy, tuner) as app:
        app.observe(sized("a", 10, 20))
        app.observe(sized("b", 80, 80, 10, 40))  # 210 tokens, or 50
        app.observe(sized("c", 10, 200))
        app.observe(sized("d", 10, 30))
        answer_all(app)
        report = app.fine_tune(NIGHT)
        assert (report.state, report.left_out) == ("accepted", ("c",))
        assert used(app) == {"a": 1, "b": 1, "c": None, "d": 1}
        assert app.store.rows("SELECT id FROM learnt") == [("b",), ("d",)]
        log = {line.event: line.data for line in app.store.log()}
        assert (log["job_begun"]["steps"], log["job_begun"]["left_out"]) == (3, [])
        assert (log["job_shortened"]["steps"], log["job_shortened"]["left_out"]) == (2, ["c"])
        assert log["job_shortened"]["sequence_tokens"] == 100
    first, second = tuner.jobs
    assert [count(one) for one in first.training] == [210, 210, 40]
    assert [count(one) for one in second.training] == [50, 40]


def test_a_job_that_cannot_be_shortened_is_postponed_as_it_is(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(64, 128), too_long=64)
    with open_toy(tmp_path, POLICY, tuner) as app:
        for id, size in (("a", 20), ("b", 100)):
            app.observe(sized(id, 10, size))
        answer_all(app)
        for conditions in (NIGHT, free(20)):
            report = app.fine_tune(conditions)
            assert (report.state, report.job, report.left_out) == ("postponed", 1, ("b",))
        tuner.too_long = 128
        report = app.fine_tune(NIGHT)
        assert (report.state, report.job, report.left_out) == ("accepted", 1, ())
        assert "job_shortened" not in {line.event for line in app.store.log()}


def test_a_job_that_no_program_fits_is_abandoned(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(512,))
    tuner.halt = True
    with open_toy(tmp_path, POLICY, tuner) as app:
        for id in ("a", "b"):
            app.observe(sized(id, 10, 100))
        answer_all(app)
        assert app.fine_tune(NIGHT).state == "stopped"
    with open_toy(tmp_path, POLICY, ToyTuner(lengths=(64,))) as app:  # another bundle's
        assert app.fine_tune(NIGHT).state == "too_few"
        assert app.store.log()[-1].event == "job_abandoned"
        assert app.store.log()[-1].data == {"job": 1, "left_out": ["a", "b"]}
        assert list((tmp_path / "state" / "jobs").iterdir()) == []
        assert set(used(app).values()) == {None}
        for id in ("c", "d"):
            app.observe(sized(id, 10, 10))
        answer_all(app)
        assert app.fine_tune(NIGHT).job == 2


class Wordy(ToyTuner):
    """Of another bundle: its template takes eight tokens more, and it refuses what is too long."""

    def tokens(self, dialogue: Dialogue) -> int:
        return super().tokens(dialogue) + 8

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        every = (*job.training, *job.stopping, *job.guard)
        assert max(map(self.tokens, every)) <= job.max_sequence_tokens
        assert job.guard
        return super().run(job, folder, stop)


def test_a_job_that_another_bundle_reads_longer_lets_go_what_no_longer_fits(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(64,))
    tuner.halt = True
    with open_toy(tmp_path, POLICY, tuner) as app:
        for id, size in (("a", 20), ("b", 20), ("c", 50)):
            app.observe(sized(id, 10, size))
        answer_all(app)
        assert app.fine_tune(NIGHT).state == "stopped"
    with open_toy(tmp_path, POLICY, Wordy(lengths=(64,))) as app:
        report = app.fine_tune(NIGHT)
        assert (report.state, report.job, report.left_out) == ("accepted", 1, ("c",))
        assert used(app) == {"a": 1, "b": 1, "c": None}


def test_a_job_that_has_lost_its_guard_shares_its_held_out_sets_anew(tmp_path: Path) -> None:
    """As a store can have it that was recovered from a damaged one."""
    tuner = ToyTuner()
    tuner.halt = True
    policy = dataclasses.replace(POLICY, heldout_every=2)
    with open_toy(tmp_path, policy, tuner) as app:
        for number in range(32):
            app.observe(sized(f"d{number}", 10, 10))
        answer_all(app)
        assert app.fine_tune(NIGHT).state == "stopped"
        assert len(tuner.jobs[-1].stopping) == 8
        app.store.execute("DELETE FROM job_sets WHERE part = 'guard'")
    tuner = Wordy()
    with open_toy(tmp_path, policy, tuner) as app:
        assert (app.fine_tune(NIGHT).state, app.status().job) == ("accepted", None)
    assert (len(tuner.jobs[-1].guard), len(tuner.jobs[-1].stopping)) == (8, 0)


def test_a_job_whose_parent_is_damaged_is_abandoned(tmp_path: Path) -> None:
    tuner = ToyTuner()
    with open_toy(tmp_path, POLICY, tuner) as app:
        for id in ("a", "b", "c"):
            app.observe(sized(id, 10, 10))
            answer_all(app)
            tuner.halt = id == "c"
            state = app.fine_tune(NIGHT).state
        assert (state, app.status().adapter, app.status().job) == ("stopped", 1, 2)
    (tmp_path / "state" / "adapters" / "00001.safetensors").write_text("flipped")
    tuner.halt = False
    with open_toy(tmp_path, POLICY, tuner) as app:
        report = app.fine_tune(NIGHT)
        assert (report.state, report.job, report.adapter) == ("accepted", 3, 2)
        log = {line.event: line.data for line in app.store.log()}
        assert log["job_abandoned"] == {"job": 2, "left_out": []}
        assert log["job_begun"]["parent"] == 0
        assert set(used(app).values()) == {3}


def test_one_bin_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A fine-tuning takes two sets, so one that waited alone would never leave."""
    for selection in ("fifo", "attune"):
        policy = dataclasses.replace(POLICY, bins=1, selection=selection, age_fills=0.01)
        folder = tmp_path / selection
        for number in range(1, 9):
            with open_toy(folder, policy) as app:
                if app.observe(sized(f"d{number}", 10, 10 + number)).kept:
                    answer_all(app)
                assert app.fine_tune(NIGHT).state == "too_few"
                answered = app.status().answered
        assert answered == 8


def test_losses_that_are_no_numbers_do_not_reach_the_store(tmp_path: Path) -> None:
    tuner = ToyTuner(change=math.nan)
    with open_toy(tmp_path, POLICY, tuner) as app:
        for id in ("a", "b"):
            app.observe(sized(id, 10, 10))
        answer_all(app)
        report = app.fine_tune(NIGHT)
        assert (report.state, report.heldout_loss_before) == ("rejected", 2.0)
        assert report.heldout_loss_after is None
        assert report.reason == "a held-out loss is not a number, so the old adapter stays."
        (line,) = [line for line in app.store.log() if line.event == "adapter_rejected"]
        assert (line.data["heldout_loss_after"], line.data["adapter"]) == (None, None)
        assert_whole(app)


def older(path: Path) -> None:
    """Makes the store what version 1 of the schema had of it, an unfinished job included."""
    other = path.with_suffix(".old")
    with sqlite3.connect(other) as old:
        for statement in MIGRATIONS[0]:
            old.execute(statement)
        old.execute("PRAGMA application_id = 0x6174746E")
        old.execute("PRAGMA user_version = 1")
        old.commit()
        old.execute("ATTACH ? AS new", (str(path),))
        for (table,) in old.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table'"):
            if table != "sqlite_sequence":
                names = ", ".join(row[1] for row in old.execute(f"PRAGMA main.table_info({table})"))
                old.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM new.{table}")
    old.close()
    for suffix in ("", "-wal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    other.rename(path)


def test_a_job_of_an_older_store_goes_on(tmp_path: Path) -> None:
    tuner = ToyTuner(lengths=(512,))
    tuner.halt = True
    with open_toy(tmp_path, POLICY, tuner) as app:
        for number in range(10):
            app.observe(sized(f"d{number}", 10, 300 if number == 1 else 20))
        answer_all(app)
        assert app.fine_tune(NIGHT).state == "stopped"
    older(tmp_path / "state" / STORE)
    tuner = ToyTuner(lengths=(64, 256))
    with open_toy(tmp_path, POLICY, tuner) as app:
        assert app.status().job == 1
        assert list((tmp_path / "state" / "jobs").iterdir()) == []  # trained without steps
        report = app.fine_tune(NIGHT)
        assert (report.state, report.job, report.left_out) == ("accepted", 1, ("d1",))
        assert {id for id, job in used(app).items() if job is None} == {"d1"}
        assert_whole(app)
    (job,) = tuner.jobs
    assert (job.steps, job.max_sequence_tokens) == (12, 256)
    assert [one.id for one in job.guard] == ["d0", "d5"]
    assert len(job.training) == 7


class Mute(ToyEngine):
    """Its context is ``room`` words."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.asked = room, 0

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        self.asked += 1
        if len(messages[-1].content.split()) >= self.room:
            raise PromptTooLong("the last message is too long; shorten it.")
        return super().generate(
            messages,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            prefix=prefix,
        )


def test_a_text_that_fills_the_context_has_no_paraphrase(tmp_path: Path) -> None:
    engine = Mute(room=100)
    with open_toy(tmp_path, dataclasses.replace(POLICY, paraphrases=2), engine=engine) as app:
        with pytest.raises(PromptTooLong, match="shorten it"):
            app.generate(sized("x", 100, 1).question)
        for id in ("a", "b"):
            app.observe(sized(id, 120, 10))
        answer_all(app)
        engine.asked = 0
        assert app.fine_tune(NIGHT).state == "accepted"
        events = [line.event for line in app.store.log()]
    assert events.count("not_synthesized") == 2
    assert engine.asked == 2  # another try would fill it too


class Forgetful(ToyTuner):
    """Its adapters add so much to the general text's perplexity, at that scale."""

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        found = super().run(job, folder, stop)
        if found is None:
            return None
        return dataclasses.replace(found, scale=0.75, base_perplexity=20.0, perplexity=20.5)


def test_a_job_keeps_its_bound_and_says_what_was_forgotten(tmp_path: Path) -> None:
    """Also where the policy is another one when the job goes on."""
    tuner = Forgetful()
    tuner.halt = True
    before = dataclasses.replace(
        POLICY, forgetting_bound=0.05, forgetting_tokens=300, replay_share=0.25
    )
    with open_toy(tmp_path, before, tuner) as app:
        for id in ("a", "b"):
            app.observe(sized(id, 20, 10))
        answer_all(app)
        assert app.fine_tune(NIGHT).state == "stopped"
    tuner.halt = False
    with open_toy(tmp_path, dataclasses.replace(before, forgetting_bound=1.0), tuner) as app:
        report = app.fine_tune(NIGHT)
        (line,) = (line for line in app.store.log() if line.event == "adapter_accepted")
    jobs = [(job.forgetting_bound, job.forgetting_tokens, job.replay_share) for job in tuner.jobs]
    assert set(jobs) == {(0.05, 300, 0.25)}
    assert len(jobs) > 1
    assert (report.state, report.scale) == ("accepted", 0.75)
    assert report.forgetting == pytest.approx(0.025)
    known = (line.data["scale"], line.data["base_perplexity"], line.data["perplexity"])
    assert known == (0.75, 20.0, 20.5)


def assert_whole(app: Personalizer) -> None:
    """No number in the store that JSON has not, and nothing learnt or used that was in no job."""

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is in the log")

    for (data,) in app.store.rows("SELECT data FROM log"):
        json.loads(data, parse_constant=refuse)
    for before, after in app.store.rows(
        "SELECT heldout_loss_before, heldout_loss_after FROM adapters WHERE number > 0"
    ):
        assert math.isfinite(before)
        assert math.isfinite(after)


NIGHTS = st.tuples(
    st.lists(st.lists(st.integers(1, 90), min_size=2, max_size=4), min_size=1, max_size=7),
    st.integers(0, 60),  # free MB
    st.sampled_from([64, 96, 160, 999]),  # above so many tokens the memory fails
    st.sampled_from([-0.1, 0.1, math.nan]),
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(NIGHTS, min_size=1, max_size=4),
    st.lists(st.integers(8, 200), min_size=1, max_size=3, unique=True),
)
def test_what_is_asked_can_be_learned_and_what_is_learnt_was_trained(
    nights: list[tuple[list[list[int]], int, int, float]], lengths: list[int]
) -> None:
    policy = dataclasses.replace(
        POLICY, paraphrases=1, heldout_every=2, shortest_sequence_tokens=8, fine_tune_memory_mb=100
    )
    tuner = ToyTuner(lengths=tuple(sorted(lengths)))
    capacity, known = Capacity(count, max(lengths)), read_acknowledgements()
    with (
        tempfile.TemporaryDirectory() as folder,
        open_toy(Path(folder), policy, tuner) as app,
    ):
        places = iter(range(1000))
        for sets, megabytes, tuner.too_long, tuner.change in nights:
            for sizes in sets:
                whole = sizes if len(sizes) % 2 == 0 else sizes[:-1]
                decision = app.observe(sized(f"d{next(places)}", *whole))
                one = app.store.rows("SELECT turns FROM sets WHERE id = ?", decision.id)[0][0]
                stored = Dialogue("", turns_from_json(one))
                fitting = [
                    exchange
                    for exchange in range(stored.exchanges)
                    if lesson(stored, capacity, exchange) is not None
                    and not known.has_all_of(stored.exchange(exchange)[0].content)
                ]
                assert decision.exchange == (fitting[-1] if fitting else None)
            for question in app.pending_questions()[::2]:
                app.answer(question.id)
            before = used(app)
            ran = len(tuner.jobs)
            report = app.fine_tune(free(megabytes))
            after = used(app)
            over = report.state in ("accepted", "rejected")
            assert over == (len(tuner.jobs) > ran and report.state != "postponed")
            members: set[str] = set()
            if over:
                job = tuner.jobs[-1]
                dialogues = (*job.training, *job.stopping, *job.guard)
                members = {one.id.partition("#")[0] for one in dialogues}
                assert job.training
                assert job.guard
                assert max(map(count, dialogues)) <= job.max_sequence_tokens
                assert len({one.id for one in dialogues}) == len(dialogues)
                assert not members & set(report.left_out)
            if report.state == "accepted":
                sql = "SELECT id FROM learnt WHERE adapter = ?"
                learnt = {id for (id,) in app.store.rows(sql, report.adapter)}
                assert learnt == {one.id.partition("#")[0] for one in job.training}
            changed = {id for id in after if after[id] != before[id]}
            assert changed == members
            waiting = {app._buffer.ids[bin] for bin in app._buffer.waiting.nonzero()[0]}
            assert waiting == {id for id, job_number in after.items() if job_number is None}
        assert_whole(app)


def test_a_recovered_store_keeps_what_a_job_is_made_of(tmp_path: Path) -> None:
    tuner = ToyTuner()
    tuner.halt = True
    with open_toy(tmp_path, POLICY, tuner) as app:
        for number in range(6):
            app.observe(sized(f"d{number}", 10, 20))
        answer_all(app)
        app.fine_tune(NIGHT)
        rows = app.store.rows("SELECT * FROM jobs"), app.store.rows("SELECT * FROM job_sets")
    path, out = tmp_path / "state" / STORE, tmp_path / "new.sqlite"
    older(path)
    open_store(path).close()  # brought to the newest schema, in another order than a new one
    damaged = bytearray(path.read_bytes())
    damaged[:4096] = bytes(4096)
    path.write_bytes(damaged)
    report = recover(path, out, Moment(1.0, 1))
    assert report.rows["job_sets"] == len(rows[1]) == 6
    assert report.rows["sets"] == 6
