"""A fine-tuning of the loop: its lessons, its judges, memory, and what a kill changes: nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from runtime_py.bundle.adapter_forms import read_values
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.examples import IGNORED, Example, example, fit, sequences
from runtime_py.engine.run_state import FILE
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.engine.tuning import lessons
from runtime_py.loop.errors import TrainingError
from runtime_py.loop.protocols import FineTuneJob
from tests.runtime_py.engine.toy import chat_text, dialogue
from tests.runtime_py.engine.toy_tuner import (
    LENGTHS,
    START,
    Quadratic,
    ToyTuner,
    toy_job,
    toy_parent,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ChatText:
    return chat_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_parent(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def job(parent: Path) -> FineTuneJob:
    return toy_job(parent)


def never() -> bool:
    return False


def test_what_it_says_of_a_dialogue(text: ChatText, parent: Path) -> None:
    tuner = ToyTuner(text, parent)
    assert tuner.lengths == (48, 96)
    one, more = dialogue("the cat", "sat"), dialogue("the cat", "sat", "that", "hat")
    read = text.tokens(one.turns).ids
    # All but the last token of the reply, which ends its turn, is read; a new line follows it.
    end = max(i for i, token in enumerate(read) if token == 2)
    assert tuner.tokens(one) == end
    assert tuner.tokens(more) > tuner.tokens(one)


def test_a_reply_that_is_written_otherwise_in_history(tmp_path: Path) -> None:
    """As where the thoughts of earlier replies are left out: a dialogue is as many sequences as it
    has exchanges, each of which teaches its last reply, what comes before its words included."""
    text = chat_text(tmp_path)
    chat = text.facts.chat.model_copy(update={"last_answer": (2, "\n", 1, "assistant: (so)")})
    text.facts = text.facts.model_copy(update={"chat": chat})
    more = dialogue("the cat", "sat on the mat", "that", "hat")

    def said(one: Example) -> str:
        return str(text.tokenizer.decode(one.tokens[one.labels != IGNORED], False))

    assert not text.written_alike
    assert said(example(more, text, last_only=True)) == "(so)hat</s>"
    with pytest.raises(TrainingError, match="learn each in a sequence of its own"):
        example(more, text)
    first, second = sequences(more, text)
    assert (said(first), said(second)) == ("(so)sat on the mat</s>", "(so)hat</s>")
    whole = text.tokenizer.decode(second.tokens, skip_special_tokens=False)
    assert whole == text.render(more.turns)
    assert "assistant: sat on the mat</s>" in whole
    assert [len(some) for some in fit([more], text, 512).sets] == [2]  # one dialogue


def test_lessons(text: ChatText, job: FineTuneJob) -> None:
    two = dialogue("the cat", "sat on the mat", "that", "hat", id="two")
    taught = lessons(replace(job, training=(two,)), text, 96)
    said = [t for t in taught.training[0].labels if t != IGNORED]
    assert text.tokenizer.decode(said, skip_special_tokens=False) == " hat</s>"
    assert taught.longest == max(
        e.inputs for part in (taught.training, taught.stopping, taught.guard) for e in part
    )
    long = replace(job, guard=(*job.guard, replace(two, id="g")), stopping=(two,))
    most = lessons(job, text, 96).longest
    with pytest.raises(TrainingError, match=r"2 dialogues of job 3 are longer than .*: two, g\."):
        lessons(long, text, most)
    for nothing in (replace(job, training=()), replace(job, guard=())):
        with pytest.raises(TrainingError, match="give at least one of each"):
            lessons(nothing, text, 96)


def test_a_run(text: ChatText, job: FineTuneJob, tmp_path: Path) -> None:
    """Guard sets are judged one a call, before and after; the adapter has the kept step's values;
    every call is seen."""
    calls: list[TrainingCall] = []
    engine = Quadratic()
    tuner = ToyTuner(text, job.parent, engine, calls.append)
    found = tuner.run(job, tmp_path, never)
    assert found is not None
    ids = [d.id for d in job.guard]
    assert engine.losses_of[:3] == engine.losses_of[-3:] == [[id] for id in ids]
    assert [c.stage for c in calls if c.kind == "loss"].count("before") == 3
    assert [c.stage for c in calls if c.kind == "loss"].count("after") == 3
    steps = [step for step, _ in found.stopping_curve]
    assert [c.step for c in calls if c.kind == "check"] == steps
    assert [c.step for c in calls if c.kind == "update"] == list(range(1, len(found.losses) + 1))
    assert {c.length for c in calls if c.kind in ("loss", "gradient")} <= set(LENGTHS)
    values = read_values(found.adapter, tuner.tensors)["layers.0.x.lora_A"]
    for one, *known in zip(
        lessons(job, text, 96).guard, found.guard_before, found.guard_after, strict=True
    ):
        off = [at.astype(np.float64) - one.tokens.sum() % 7 for at in (START, values)]
        assert known == pytest.approx([(x * x).sum() / one.count for x in off], rel=1e-9)
    curve = dict(found.stopping_curve)
    assert curve[found.kept_step] == min(curve.values()) < curve[0]


def test_nothing_learned_is_said(text: ChatText, job: FineTuneJob, tmp_path: Path) -> None:
    """Where no step helps the stopping sets, the adapter is the parent, to the bit."""
    engine = Quadratic(script=[float(step) for step in range(10)])
    tuner = ToyTuner(text, job.parent, engine)
    found = tuner.run(job, tmp_path, never)
    assert found is not None
    assert found.kept_step == 0
    assert [step for step, _ in found.stopping_curve] == [0, 2, 4, 6]  # and patience ran out
    assert found.guard_after == found.guard_before
    assert found.adapter.read_bytes() == job.parent.read_bytes()


def test_a_run_that_diverges(text: ChatText, job: FineTuneJob, tmp_path: Path) -> None:
    """``fail``: a call within a step, after 3 guard sets and the first look."""
    engine = Quadratic(fail=9)
    found = ToyTuner(text, job.parent, engine).run(job, tmp_path, never)
    assert found is not None
    assert found.losses == ()
    assert found.guard_after == (math.inf,) * 3
    assert all(math.isfinite(loss) for loss in found.guard_before)
    assert (found.kept_step, found.stopping_curve) == (0, ())
    assert found.adapter.read_bytes() == job.parent.read_bytes()


def test_stopped_anywhere(text: ChatText, job: FineTuneJob, tmp_path: Path) -> None:
    """Between any two calls; the guard's sets too."""
    whole = ToyTuner(text, job.parent).run(job, tmp_path / "whole", never)
    assert whole is not None
    total = count()
    ToyTuner(text, job.parent).run(job, tmp_path / "counted", lambda: next(total) < 0)
    for most in range(0, next(total), 3):
        folder, calls = tmp_path / str(most), count()
        stopped = ToyTuner(text, job.parent).run(job, folder, lambda n=calls, k=most: next(n) >= k)
        assert stopped is None
        found = ToyTuner(text, job.parent).run(job, folder, never)
        assert found is not None
        assert replace(found, adapter=whole.adapter, seconds=whole.seconds) == whole
        assert found.adapter.read_bytes() == whole.adapter.read_bytes()


@pytest.mark.parametrize("left", ["damaged", "another recipe", "another base"])
def test_a_state_that_cannot_be_gone_on_with_begins_anew(
    text: ChatText, job: FineTuneJob, tmp_path: Path, left: str
) -> None:
    """What was left in the job's folder and does not fit it stops no night."""
    whole = ToyTuner(text, job.parent).run(job, tmp_path / "whole", never)
    folder, calls = tmp_path / "left", count()
    other = replace(job, learning_rate=0.5) if left == "another recipe" else job
    before = ToyTuner(text, job.parent, base="old" if left == "another base" else "weights")
    assert before.run(other, folder, lambda: next(calls) >= 20) is None
    file = folder / FILE
    assert file.exists()
    if left == "damaged":
        file.write_bytes(file.read_bytes()[:-5])
    found = ToyTuner(text, job.parent).run(job, folder, never)
    assert whole is not None
    assert found is not None
    assert replace(found, adapter=whole.adapter, seconds=whole.seconds) == whole
    assert found.adapter.read_bytes() == whole.adapter.read_bytes()


def test_too_little_memory(text: ChatText, job: FineTuneJob, tmp_path: Path) -> None:
    """Before a run, by the shortest programs that hold its longest dialogue, and within it."""
    tuner = ToyTuner(text, job.parent, available_mb=lambda: 95.9)
    assert lessons(job, text, 96).longest <= 48
    with pytest.raises(MemoryError):
        tuner.run(job, tmp_path, never)
    assert ToyTuner(text, job.parent, available_mb=lambda: 96.0).run(job, tmp_path, never)
    later = iter([96.0] * 6 + [1.0] * 99)
    tuner = ToyTuner(text, job.parent, available_mb=lambda: next(later))
    with pytest.raises(MemoryError):
        tuner.run(job, tmp_path / "later", never)
