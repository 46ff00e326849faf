"""An engine and a fine-tuner whose work on a phone is counted, whatever it takes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.protocols import Embedding, Engine, FineTuneJob, FineTuner, FineTuneResult
from toolchain.fleet.fleet_world import Costs
from toolchain.simulate.rhythm import Clock


class Ledger:
    """``day_seconds``: of work by day; a night's is the clock's."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.day_seconds = clock, 0.0

    def add(self, seconds: float) -> None:
        if self.clock.night:
            self.clock.add(seconds)
        else:
            self.day_seconds += seconds


class CountedEngine:
    """``file``: the adapter that is in use."""

    def __init__(self, engine: Engine, costs: Costs, ledger: Ledger) -> None:
        self._engine, self._costs, self._ledger = engine, costs, ledger
        self.file: Path | None = None

    def embed(self, dialogue: Dialogue) -> Embedding:
        embedding = self._engine.embed(dialogue)
        self._ledger.add(self._costs.embed(dialogue))
        return embedding

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        """The engine's own reply, whose modelled seconds go to the ledger."""
        text = self._engine.generate(
            messages,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            prefix=prefix,
        )
        self._ledger.add(self._costs.reply(messages, text))
        return text

    def use_adapter(self, file: Path) -> None:
        self._engine.use_adapter(file)
        self.file = file


class CountedTuner:
    """``guard``: sets that judged the last run; ``steps``: that it took."""

    def __init__(self, tuner: FineTuner, costs: Costs, ledger: Ledger) -> None:
        self._tuner, self._costs, self._ledger = tuner, costs, ledger
        self.guard, self.steps = 0, 0

    @property
    def lengths(self) -> tuple[int, ...]:
        return self._tuner.lengths

    def tokens(self, dialogue: Dialogue) -> int:
        return self._tuner.tokens(dialogue)

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        result = self._tuner.run(job, folder, stop)
        if result is not None:
            self._ledger.add(self._costs.training(job, result))
            self.guard, self.steps = len(job.guard), len(result.losses)
        return result
