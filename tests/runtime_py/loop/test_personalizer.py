"""The whole loop with a toy model: what is asked, learnt, refused, resumed, undone, forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import DuplicateDialogue, LoopError
from runtime_py.loop.lexicons import Lexicons, make_lexicons
from runtime_py.loop.log import replay
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding
from runtime_py.loop.replacement import POLICIES
from runtime_py.loop.schedule import Conditions
from tests.runtime_py.loop.toy import (
    DAY,
    HIDDEN,
    LEXICONS,
    NIGHT,
    Clock,
    ToyBundle,
    ToyEngine,
    ToyTuner,
    dialogue,
    open_toy,
    small_policy,
    toy_bundle,
)


def live(app: Personalizer, first: int, last: int, answer: str | None = None) -> None:
    for number in range(first, last):
        app.observe(dialogue(number, exchanges=1 + number % 3))
        for question in app.pending_questions():
            app.answer(question.id, answer)


@pytest.mark.parametrize("selection", sorted(POLICIES))
def test_the_log_replays_to_the_buffer(tmp_path: Path, selection: str) -> None:
    with open_toy(tmp_path, small_policy(selection)) as app:
        live(app, 0, 120)
        stored = {
            bin: (id, number, eoe, dss, idd, domain)
            for bin, id, number, eoe, dss, idd, domain in app.store.rows(
                "SELECT bin, id, number, eoe, dss, idd, domain FROM sets"
            )
        }
        replayed = {
            bin: (b.id, b.number, b.scores.eoe, b.scores.dss, b.scores.idd, b.domain)
            for bin, b in replay(app.store.log()).items()
        }
        assert replayed == stored
        assert app.lost() == ()
        status = app.status()
        assert (status.observed, status.stored) == (120, 8)
        assert status.kept + status.refused == 120


def test_opened_again_it_decides_the_same(tmp_path: Path) -> None:
    policy, logs = small_policy("paper"), []
    for folder, pieces in (("one", [(0, 90)]), ("many", [(n, n + 9) for n in range(0, 90, 9)])):
        clock = Clock(10**9)
        for first, last in pieces:
            with open_toy(tmp_path / folder, policy, clock=clock) as app:
                live(app, first, last)
                log = app.store.log()
        logs.append([(line.event, line.id, line.data) for line in log])
    assert logs[0] == logs[1]


def test_decisions_say_why(tmp_path: Path) -> None:
    policy = dataclasses.replace(small_policy("fifo", bins=2), keep_asked=False)
    with open_toy(tmp_path, policy) as app:
        one = app.observe(dialogue(1))
        assert (one.bin, one.reason, one.replaced, one.asked) == (0, "free_bin", None, True)
        app.observe(dialogue(2))
        three = app.observe(dialogue(3))
        assert (three.bin, three.reason, three.replaced) == (0, "oldest", "d1")
        assert [q.id for q in app.pending_questions()] == ["d2", "d3"]  # d1's ended
        assert app.pending_questions()[0].text == LoopPolicy().question
        line = app.store.log()[-1]
        assert (line.event, line.id, line.data["replaced"]) == ("kept", "d3", "d1")
        assert three.scores is not None
        assert line.data["idd"] == three.scores.idd


def test_questions_are_limited_by_the_day(tmp_path: Path) -> None:
    policy = dataclasses.replace(small_policy("fifo"), questions_per_day=2)
    with open_toy(tmp_path, policy, clock=Clock(day=10)) as app:
        asked = [app.observe(dialogue(n)).asked for n in range(25)]
        days = [line.day for line in app.store.log() if line.event == "kept"]
    for day in set(days):
        flags = [flag for flag, other in zip(asked, days, strict=True) if other == day]
        assert flags[:2] == [True, True][: len(flags)]
        assert not any(flags[2:])


def test_sets_too_large_are_cut_or_refused(tmp_path: Path) -> None:
    with open_toy(tmp_path) as app:
        huge = Dialogue("huge", (Turn("user", "x" * 100_000), Turn("assistant", "y")))
        refused = app.observe(huge)
        assert (refused.kept, refused.reason, refused.scores) == (False, "too_large", None)
        long = Dialogue("long", (*dialogue(1).turns, *huge.turns))
        cut = app.observe(long)
        assert (cut.kept, cut.dropped) == (True, 2)
        assert app.pending_questions()[0].dialogue.turns == dialogue(1).turns
        assert app.status().observed == 2


def test_bad_input_changes_nothing(tmp_path: Path) -> None:
    class Broken(ToyEngine):
        pooled = np.zeros(HIDDEN, np.float32)

        def embed(self, dialogue: Dialogue) -> Embedding:
            return Embedding(self.pooled, 0.5)

    engine = Broken()
    with open_toy(tmp_path, engine=engine) as app:
        app.observe(dialogue(1))  # no direction: as unlike as can be
        before = (app.status(), len(app.store.log()))
        with pytest.raises(DuplicateDialogue, match="observed already, as number 1"):
            app.observe(dialogue(1))
        with pytest.raises(LoopError, match="has no turns"):
            app.observe(Dialogue("x", ()))
        engine.pooled = np.full(HIDDEN, np.nan, np.float32)
        with pytest.raises(LoopError, match="not finite"):
            app.observe(dialogue(2))
        engine.pooled = np.zeros(HIDDEN + 1, np.float32)
        with pytest.raises(LoopError, match=r"float32 \[13\]; expected float32 \[12\]"):
            app.observe(dialogue(2))
        with pytest.raises(LoopError, match="no question about dialogue 'x' is open"):
            app.answer("x")
        with pytest.raises(LoopError, match="is empty"):
            app.answer("d1", " ")
        with pytest.raises(LoopError, match="shorten it"):
            app.answer("d1", "x" * 5000)
        with pytest.raises(LoopError, match="none before it"):
            app.rollback()
        with pytest.raises(LoopError, match="ever observed"):
            app.forget("x")
        with pytest.raises(LoopError, match="turn 1 of the prompt is empty"):
            app.generate("")
        for unfinished in ((), (Turn("user", "walk"), Turn("assistant", "run"))):
            with pytest.raises(LoopError, match="has to end with a turn of the user's"):
                app.generate(unfinished)
        assert (app.status(), len(app.store.log())) == before


def test_a_night(tmp_path: Path) -> None:
    engine, tuner = ToyEngine(), ToyTuner()
    with open_toy(tmp_path, engine=engine, tuner=tuner) as app:
        live(app, 0, 19, "walk to the sun")
        assert app.fine_tune(NIGHT).state == "not_due"
        live(app, 19, 20)
        report = app.fine_tune(DAY)
        assert report.state == "postponed"
        assert report.reason == "the device is not charging, and the device is in use."
        report = app.fine_tune(NIGHT)
        assert (report.state, report.adapter, len(report.losses)) == ("accepted", 1, 4)
        assert report.synthesized > 0
        assert app.fine_tune(NIGHT).state == "not_due"
        assert engine.adapter == tmp_path / "state" / "adapters" / "00001.safetensors"
        sources = {row[0] for row in app.store.rows("SELECT DISTINCT source FROM synthetic")}
        held_out = {
            row[0] for row in app.store.rows("SELECT id FROM annotations WHERE held_out = 1")
        }
        assert held_out
        assert not sources & held_out
        for low in app.store.rows("SELECT question_rouge1, answer_rouge1 FROM synthetic"):
            assert all(0.2 <= score <= 0.9 for score in low)
        app.export_adapter(tmp_path / "peft")
        assert (tmp_path / "peft" / "adapter_config.json").read_text() == "{}"
        weights = (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
        assert weights == engine.adapter.read_bytes()
        with pytest.raises(LoopError, match="exists already"):
            app.export_adapter(tmp_path / "peft")
        assert list((tmp_path / "state" / "jobs").iterdir()) == []


def test_only_answered_sets_are_learnt(tmp_path: Path) -> None:
    tuner = ToyTuner()
    with open_toy(tmp_path, small_policy("fifo", bins=64), tuner=tuner) as app:
        for number in range(20):
            app.observe(dialogue(number))
        assert app.fine_tune(NIGHT).state == "too_few"
        first, second, third = app.pending_questions()[:3]
        app.answer(first.id)
        assert app.fine_tune(NIGHT).state == "too_few"
        app.answer(second.id, "walk")
        app.answer(third.id)
        assert app.fine_tune(NIGHT).state == "accepted"
    (job,) = tuner.jobs
    assert (job.stopping, job.guard) == ((), (first.dialogue,))
    learnt = [one for one in job.training if "#" not in one.id]
    assert learnt == [second.dialogue.with_answer("walk"), third.dialogue]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_stopped_anywhere_it_ends_the_same(tmp_path: Path, every: int) -> None:
    def night(folder: Path, limit: int) -> tuple[bytes, list[tuple[object, ...]], int]:
        calls = 0
        while True:
            asked = iter(range(10**6))
            with open_toy(folder, clock=Clock(10**9)) as app:  # closed and opened each time
                if app.status().observed == 0:
                    live(app, 0, 20, "walk to the sun")
                calls += 1
                assert calls < 300
                report = app.fine_tune(NIGHT, stop=lambda asked=asked: next(asked) >= limit)
                if report.state != "stopped":
                    pairs = app.store.rows("SELECT * FROM synthetic ORDER BY number")
                    file = folder / "state" / "adapters" / "00001.safetensors"
                    return file.read_bytes(), pairs, calls

    straight = night(tmp_path / "a", 10**6)
    halting = night(tmp_path / "b", every)
    assert straight[:2] == halting[:2]
    assert (straight[2], halting[2] > 1) == (1, True)


def test_the_guard_refuses_and_the_old_adapter_stays(tmp_path: Path) -> None:
    engine, tuner = ToyEngine(), ToyTuner()
    with open_toy(tmp_path, small_policy(bins=64), engine=engine, tuner=tuner) as app:
        live(app, 0, 20)
        app.fine_tune(NIGHT)
        old = engine.adapter
        for change in (0.1, float("nan")):
            tuner.change = change
            live(app, app.status().observed, app.status().observed + 20)
            report = app.fine_tune(NIGHT)
            assert (report.state, report.adapter, engine.adapter) == ("rejected", 1, old)
        assert app.store.log()[-1].event == "adapter_rejected"
        assert app.status().fine_tunes == 3
        assert app.status().adapters_accepted == 1


def test_memory_shortens_the_sequences_or_postpones(tmp_path: Path) -> None:
    tuner = ToyTuner(too_long=128)
    with open_toy(tmp_path, tuner=tuner) as app:
        live(app, 0, 20)
        tight = Conditions(charging=True, idle=True, celsius=20, free_memory_mb=80)
        report = app.fine_tune(tight)
        assert report.state == "accepted"
        events = [line for line in app.store.log() if line.event.startswith("job_")]
        assert [line.data["sequence_tokens"] for line in events] == [256, 128]
        tuner.too_long = 8
        live(app, 20, 40)
        report = app.fine_tune(NIGHT)
        assert report.state == "postponed"
        assert "1000 MB are free" in report.reason
        assert app.status().job == 2
        tuner.too_long = 512
        none = dataclasses.replace(NIGHT, free_memory_mb=1)
        assert app.fine_tune(none).state == "postponed"
        assert app.fine_tune(NIGHT).state == "accepted"


def test_rollback(tmp_path: Path) -> None:
    engine = ToyEngine()
    with open_toy(tmp_path, small_policy(bins=64), engine=engine) as app:
        live(app, 0, 20)
        app.fine_tune(NIGHT)
        live(app, 20, 40)
        app.fine_tune(NIGHT)
        assert app.status().adapter == 2
        assert app.rollback() == 1
        assert engine.adapter is not None
        assert engine.adapter.name == "00001.safetensors"
        live(app, 40, 60)
        report = app.fine_tune(NIGHT)
        assert report.adapter == 3
        assert app.rollback() == 1  # that is what 3 was trained from
        assert app.rollback() == 0
        assert engine.adapter == tmp_path / "bundle" / "adapter.safetensors"


def test_rollback_abandons_an_unfinished_job(tmp_path: Path) -> None:
    tuner = ToyTuner()
    with open_toy(tmp_path, tuner=tuner) as app:
        live(app, 0, 20)
        app.fine_tune(NIGHT)
        live(app, 20, 40)
        tuner.halt = True
        assert app.fine_tune(NIGHT).state == "stopped"
        assert app.status().job == 2
        app.rollback()
        assert app.status().job is None
        assert app.status().adapter == 0


def test_a_damaged_adapter_is_not_used(tmp_path: Path) -> None:
    with open_toy(tmp_path) as app:
        for first in (0, 20):
            live(app, first, first + 20)
            app.fine_tune(NIGHT)
    (tmp_path / "state" / "adapters" / "00002.safetensors").write_text("flipped")
    engine = ToyEngine()
    with open_toy(tmp_path, engine=engine) as app:
        assert app.status().adapter == 1
        assert app.store.log()[-1].event == "adapter_damaged"
        assert engine.adapter is not None
        assert engine.adapter.name == "00001.safetensors"


def test_old_adapter_files_are_removed(tmp_path: Path) -> None:
    policy = dataclasses.replace(small_policy("paper", every=5), adapters_kept=2)
    with open_toy(tmp_path, policy) as app:
        for first in range(0, 50, 5):
            live(app, first, first + 5)
            app.fine_tune(NIGHT)
        last = app.status().adapter
        names = sorted(path.name for path in (tmp_path / "state" / "adapters").iterdir())
        assert names == [f"{n:05d}.safetensors" for n in (last - 1, last)]
        assert app.rollback() == last - 1
        assert app.rollback() == 0  # the files between are gone


def test_forget(tmp_path: Path) -> None:
    secret = "hotel xyzzysecret"
    with open_toy(tmp_path, small_policy("fifo", bins=64)) as app:
        for number in range(20):
            app.observe(dialogue(number))
        ids = [question.id for question in app.pending_questions()]
        for id in ids:
            app.answer(id, secret if id == ids[1] else None)
        app.fine_tune(NIGHT)
        gone = app.forget(ids[1])
        assert (gone.stored, gone.adapters, gone.job_abandoned) == (True, (1,), False)
        assert "the adapters 1 have learnt from it and stay" in gone.note
        for path in (tmp_path / "state").glob("loop.sqlite*"):
            assert b"xyzzysecret" not in path.read_bytes()
        assert app.lost() == ()
        with pytest.raises(DuplicateDialogue):
            app.observe(dialogue(int(ids[1][1:])))
        for number in range(100, 120):
            app.observe(dialogue(number))
        report = app.fine_tune(NIGHT)
        assert (report.state, report.adapter) == ("accepted", 2)
        parent = app.store.rows("SELECT parent FROM adapters WHERE number = 2")
        assert parent == [(0,)]  # not 1, which knows the forgotten set
        again = app.forget(ids[1])
        assert (again.stored, again.adapters) == (False, ())


def test_forgetting_abandons_a_job_that_has_the_set(tmp_path: Path) -> None:
    tuner = ToyTuner()
    with open_toy(tmp_path, small_policy("fifo", bins=64), tuner=tuner) as app:
        for number in range(20):
            app.observe(dialogue(number))
        ids = [question.id for question in app.pending_questions()]
        for id in ids:
            app.answer(id)
        tuner.halt = True
        assert app.fine_tune(NIGHT).state == "stopped"
        gone = app.forget(ids[1])
        assert (gone.job_abandoned, app.status().job) == (True, None)
        assert list((tmp_path / "state" / "jobs").iterdir()) == []
        tuner.halt = False  # the other answers do not wait for twenty sets more
        report = app.fine_tune(NIGHT)
        assert (report.state, report.job) == ("accepted", 2)
        job = tuner.jobs[-1]
        learned = {one.id.partition("#")[0] for one in (*job.training, *job.guard)}
        assert learned == {*ids} - {ids[1]}


def test_a_changed_policy_is_noted_and_a_smaller_one_refused(tmp_path: Path) -> None:
    with open_toy(tmp_path) as app:
        live(app, 0, 20)
    with open_toy(tmp_path, small_policy("paper", bins=10)) as app:
        assert app.store.log()[-1].event == "policy_changed"
        assert app.status().stored == 8
    with pytest.raises(LoopError, match="give the policy at least 8"):
        open_toy(tmp_path, small_policy(bins=4))
    with open_toy(tmp_path) as app:  # the failed opening released the store
        assert app.status().observed == 20


def test_misfits_are_told(tmp_path: Path) -> None:
    with open_toy(tmp_path) as app:
        live(app, 0, 20)
    bundle = tmp_path / "bundle"

    def reopen(lexicons: Lexicons = LEXICONS, hidden: int = HIDDEN, bundle: Path = bundle) -> None:
        Personalizer(
            folder=tmp_path / "state",
            policy=small_policy(),
            lexicons=lexicons,
            engine=ToyEngine(),
            tuner=ToyTuner(),
            clock=Clock(),
            bundle=ToyBundle(bundle, hidden),
        ).close()

    other = make_lexicons({"x": ["y"]})
    with pytest.raises(LoopError, match="vectors of 12 numbers, this bundle's have 13"):
        reopen(hidden=13)
    with pytest.raises(LoopError, match="which the lexicons lack"):
        reopen(lexicons=other)
    with pytest.raises(LoopError, match="no room for text beside a vector of 9999"):
        reopen(hidden=9999)
    with pytest.raises(LoopError, match="there is no adapter at"):
        reopen(bundle=tmp_path / "nowhere")
    reopen()


def test_replies_take_nothing_from_the_streams(tmp_path: Path) -> None:
    with open_toy(tmp_path) as app:
        before = app.store.rows("SELECT * FROM streams")
        assert app.generate("bread and salt") == app.generate([Turn("user", "bread and salt")])
        assert app.store.rows("SELECT * FROM streams") == before


def test_forgetting_leaves_the_tallies_too(tmp_path: Path) -> None:
    """What was observed and asked about, less what was forgotten: as if it had never been."""
    policy = small_policy("fifo", bins=64)

    def tallies(folder: Path, numbers: list[int], forgotten: list[int]) -> list[tuple[object, ...]]:
        with open_toy(folder, policy) as app:
            for number in numbers:
                app.observe(dialogue(number))
            for number in forgotten:
                app.forget(f"d{number}")
            return app.store.rows("SELECT * FROM tallies ORDER BY kind, domain")

    without = tallies(tmp_path / "a", [1, 2, 4, 6, 7, 8], [])
    assert tallies(tmp_path / "b", [1, 2, 3, 4, 6, 7, 8], [3]) != without  # the fifth is not asked
    policy = dataclasses.replace(policy, questions_per_day=100)
    without = tallies(tmp_path / "c", [1, 2, 4, 6, 7, 8], [])
    assert tallies(tmp_path / "d", [1, 2, 3, 4, 5, 6, 7, 8], [3, 5]) == without


def test_centred_directions(tmp_path: Path) -> None:
    """Against cosines of centred vectors; another mean starts the tallies anew."""
    policy = dataclasses.replace(small_policy("fifo", bins=64), centre="bundle")
    mean = np.random.default_rng(1).standard_normal(HIDDEN).astype(np.float32)
    engine = ToyEngine()

    def reopen(mean: np.ndarray | None, policy: LoopPolicy = policy) -> Personalizer:
        bundle = toy_bundle(tmp_path)
        return Personalizer(
            tmp_path / "state", policy, LEXICONS, engine, ToyTuner(), Clock(), bundle, mean=mean
        )

    with pytest.raises(LoopError, match="centres vectors by the bundle's mean"):
        reopen(None)
    with pytest.raises(LoopError, match=r"the mean of vectors is float64 \[12\]"):
        reopen(mean.astype(np.float64))
    with reopen(mean) as app:
        vectors: dict[str, list[np.ndarray]] = {}
        for number in range(30):
            decision = app.observe(dialogue(number))
            own = engine.embed(dialogue(number)).pooled.astype(np.float64) - mean
            own /= np.linalg.norm(own)
            mates = vectors.setdefault(str(decision.domain), [])
            expected = 1 - float(np.mean([own @ mate for mate in mates])) if mates else 1.0
            assert decision.scores is not None
            assert decision.scores.idd == pytest.approx(expected, abs=2e-6)
            mates.append(own)
    with reopen(mean) as app:
        assert app.store.log()[-1].event != "tallies_restarted"
    with reopen(mean + 1) as app:
        assert app.store.log()[-1].event == "tallies_restarted"
    with reopen(None, small_policy("fifo", bins=64)) as app:
        assert [line.event for line in app.store.log()[-2:]] == [
            "policy_changed",
            "tallies_restarted",
        ]


def test_recalled_examples_stand_before_the_conversation(tmp_path: Path) -> None:
    class Hearing(ToyEngine):
        heard: tuple[Turn, ...] = ()

        def generate(
            self, messages: Sequence[Turn], *, temperature: float, seed: int, max_new_tokens: int
        ) -> str:
            self.heard = tuple(messages)
            return "yes"

    engine = Hearing()
    policy = dataclasses.replace(
        small_policy("fifo", bins=64), recall_examples=3, questions_per_day=100
    )
    conversation = (*dialogue(77).turns, Turn("user", "bread salt oven"))
    with open_toy(tmp_path, policy, engine=engine) as app:
        app.generate(conversation)
        assert engine.heard == conversation  # nothing is answered yet
        for number in range(20):
            app.observe(dialogue(number, exchanges=2))
        for question in app.pending_questions()[:15]:
            app.answer(question.id, f"walk {question.id}")
        app.generate(conversation)
        own = engine.embed(Dialogue("prompt", conversation)).pooled.astype(np.float64)

        def cosine(number: int) -> float:
            other = engine.embed(dialogue(number, exchanges=2)).pooled.astype(np.float64)
            return float(own @ other / np.linalg.norm(own) / np.linalg.norm(other))

        closest = sorted(sorted(range(15), key=cosine)[-3:])
        expected = [
            turn
            for n in closest
            for turn in (dialogue(n, exchanges=2).turns[2], Turn("assistant", f"walk d{n}"))
        ]
        assert engine.heard == (*expected, *conversation)
        app.forget(f"d{closest[0]}")
        app.generate(conversation)
        assert len(engine.heard) == 9
        assert engine.heard[0] != expected[0]
