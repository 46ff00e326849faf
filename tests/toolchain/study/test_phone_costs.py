"""What a life's work costs on a phone: the calls, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from runtime_py.bundle.chat_text import Tokens
from runtime_py.engine.phone_engine import LmCall
from runtime_py.engine.streamed_tuner import TrainingCall
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import FineTuneJob, FineTuneResult
from toolchain.fleet.counted import CountedEngine, Ledger
from toolchain.simulate.device import find_device
from toolchain.simulate.rhythm import Clock
from toolchain.simulate.roofline import Cost
from toolchain.study.phone_costs import PhoneCosts

PIXEL = find_device("pixel-8")


class Recorder:
    """A token's embedding costs 1 s of flops, and so on: what is asked for can be read off."""

    def __init__(self) -> None:
        self.calls: Counter[LmCall | TrainingCall] = Counter()
        self._second = PIXEL.compute.gflops * 1e9

    def lm(self, call: LmCall) -> Cost:
        self.calls[call] += 1
        return Cost(flops=self._second * call.tokens * (10 if call.kind == "decode" else 1))

    def training(self, call: TrainingCall) -> Cost:
        self.calls[call] += 1
        seconds = {"gradient": 3 * call.labels, "loss": call.labels, "update": 0.5}[call.kind]
        return Cost(flops=self._second * seconds)


class WordText:
    """A token a word, and one more to begin a turn or a reply."""

    def tokens(self, turns: Sequence[Turn], reply: bool = False) -> Tokens:
        text = " ".join(["turn " + turn.content for turn in turns] + ["reply"] * reply)
        return Tokens(self.encode(text), [])

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())


def told(id: str, question: int, answer: int) -> Dialogue:
    return Dialogue(id, (Turn("user", "q " * question), Turn("assistant", "a " * answer)))


@pytest.fixture
def counter() -> Recorder:
    return Recorder()


@pytest.fixture
def costs(counter: Recorder) -> PhoneCosts:
    return PhoneCosts(counter, PIXEL.compute, WordText(), 12, (16, 32))


def test_embedding_and_replying(costs: PhoneCosts, counter: Recorder) -> None:
    assert costs.embed(told("x", 3, 4)) == pytest.approx(9)
    assert costs.embed(told("y", 30, 4)) == pytest.approx(12)  # cut
    messages = (Turn("user", "how are you"),)
    assert costs.reply(messages, "I am well") == pytest.approx(5 + 3 * 10)
    assert set(counter.calls) == {
        LmCall("embed", 9, 0),
        LmCall("embed", 12, 0),
        LmCall("prefill", 5, 0),
        LmCall("decode", 3, 5),
    }


def a_job() -> FineTuneJob:
    return FineTuneJob(
        number=1,
        training=(told("a", 4, 4), told("b", 10, 8)),  # 5 and 9 labels, the longest 20 tokens
        stopping=(told("c", 1, 1),),
        guard=(told("d", 1, 2),),
        parent=Path(),
        seed=1,
        steps=8,
        learning_rate=1e-3,
        b_rate_ratio=1.0,
        batch=4,
        check_every=4,
        max_sequence_tokens=64,
    )


def test_training(costs: PhoneCosts, counter: Recorder) -> None:
    """Five steps of four sequences, two looks at the stopping set, the guard twice."""
    job = a_job()
    result = FineTuneResult(Path(), (1.0,), (1.0,), (1.0,) * 5, ((0, 1.0), (4, 1.0)), 4, 1.0)
    steps = 5 * (4 * 3 * (5 + 9) / 2 + 0.5)
    assert costs.training(job, result) == pytest.approx(steps + 2 * 2 + 2 * 3)
    lengths = {call.length for call in counter.calls if isinstance(call, TrainingCall)}
    assert lengths == {0, 32}  # of an update, and of the programs that hold 20 tokens
    assert costs.length(job) == 32


@pytest.mark.parametrize(("scale", "readings"), [(1.0, 2), (0.5, 6)])
def test_a_night(costs: PhoneCosts, scale: float, readings: int) -> None:
    """What is paraphrased, and the general text at each look: 100 tokens are four sequences of 32.
    Where the adapter is scaled, a bisection of 16 steps looks four times more."""
    plain = FineTuneResult(Path(), (1.0,), (1.0,), (1.0,) * 5, (), 5, 1.0)
    bound = replace(plain, scale=scale, base_perplexity=9.0, perplexity=9.1)
    job = replace(a_job(), forgetting_tokens=100)
    general = costs.training(job, bound) - costs.training(job, plain)
    assert general == pytest.approx(readings * 4 * 32)
    replies = [((Turn("user", "how are you"),), "I am well"), ((Turn("user", "so"),), "yes")]
    written = 5 + 3 * 10 + 3 + 1 * 10
    assert costs.night(replies, []) == pytest.approx(written)
    assert costs.night(replies, [(job, plain)] * 2) == pytest.approx(
        written + 2 * costs.training(job, plain)
    )


def test_a_ledger_has_days_and_nights(costs: PhoneCosts) -> None:
    """By day the seconds are the work's; by night the clock has them, with its pauses."""

    class Echo:
        def embed(self, dialogue: Dialogue) -> str:
            return dialogue.id

        def use_adapter(self, file: Path) -> None:
            self.file = file

    clock = Clock(PIXEL, LoopPolicy())
    ledger = Ledger(clock)
    engine = CountedEngine(Echo(), costs, ledger)  # type: ignore[arg-type]
    assert engine.embed(told("x", 3, 4)) == "x"
    assert ledger.day_seconds == pytest.approx(9)
    clock.by_night()
    engine.embed(told("x", 3, 4))
    assert ledger.day_seconds == pytest.approx(9)
    assert clock.work == pytest.approx(9, rel=1e-6)
    engine.use_adapter(Path("a"))
    assert engine.file == Path("a")
