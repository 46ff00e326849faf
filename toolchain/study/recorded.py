"""An engine and a fine-tuner that remember what they were asked for, so that it can be modelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.protocols import Embedding, FineTuneJob, FineTuner, FineTuneResult
from toolchain.study.batched_loop import BatchedEngine

Reply = tuple[tuple[Turn, ...], str]  # what was read, and what was written after it
Run = tuple[FineTuneJob, FineTuneResult]


@dataclass(frozen=True)
class Night:
    """What one call of ``fine_tune`` computed: paraphrases, and trainings that ended."""

    replies: tuple[Reply, ...]
    runs: tuple[Run, ...]


class RecordedEngine:
    """``replies``: until the caller empties it."""

    def __init__(self, engine: BatchedEngine) -> None:
        self._engine = engine
        self.replies: list[Reply] = []

    @property
    def file(self) -> Path | None:
        """Of the adapter that is in use."""
        return self._engine.file

    def prepare(self, dialogues: Sequence[Dialogue]) -> None:
        self._engine.prepare(dialogues)

    def embed(self, dialogue: Dialogue) -> Embedding:
        return self._engine.embed(dialogue)

    def use_adapter(self, file: Path) -> None:
        self._engine.use_adapter(file)

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        """``Engine.generate``, remembered for what it would cost on a phone."""
        text = self._engine.generate(
            messages,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            prefix=prefix,
        )
        self.replies.append((tuple(messages), text))
        return text


class RecordedTuner:
    """``runs``: until the caller empties it."""

    def __init__(self, tuner: FineTuner) -> None:
        self._tuner = tuner
        self.runs: list[Run] = []

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
            self.runs.append((job, result))
        return result
