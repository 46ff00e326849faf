"""What selection takes beyond the embedding, with a full buffer of so many bins."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.lexicons import read_lexicons
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.protocols import Embedding, FineTuneJob, FineTuneResult
from runtime_py.loop.schedule import Moment
from toolchain.compile.shipped_text import as_dialogue, shipped_dialogues

COUNTED = 400  # dialogues after the buffer is full


@dataclass(frozen=True)
class SelectionRow:
    """Of ``bins`` full bins: milliseconds of one ``observe`` with its transaction, and how many of
    the dialogues entered the buffer."""

    bins: int
    median_ms: float
    slowest_ms: float
    kept: int
    observed: int


class _Vectors:
    """An engine whose embeddings cost nothing: random vectors."""

    def __init__(self, hidden: int) -> None:
        self._random, self._hidden = np.random.default_rng(0), hidden

    def embed(self, dialogue: Dialogue) -> Embedding:
        pooled = self._random.standard_normal(self._hidden, np.float32)
        return Embedding(pooled, float(self._random.random()))

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        raise NotImplementedError

    def use_adapter(self, file: Path) -> None:
        pass


@dataclass(frozen=True)
class _NoBundle:
    """The length of vectors, and an adapter that nothing reads."""

    hidden: int
    adapter_file: Path

    def as_peft(self, file: Path, folder: Path) -> None:
        raise NotImplementedError


class _NoTuner:
    lengths = (512,)

    def tokens(self, dialogue: Dialogue) -> int:
        return 0

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        raise NotImplementedError


def bench_selection(
    bins: Sequence[int],
    *,
    hidden: int,
    selection: str = "paper",
    progress: Callable[[str], None] = lambda text: None,
) -> list[SelectionRow]:
    """Real dialogues that ship with attune, again and again, with random vectors of ``hidden``
    numbers."""
    texts = shipped_dialogues("perplexity")
    rows = []
    for count in bins:
        progress(f"fill {count:,} bins")
        policy = LoopPolicy(selection=selection, bins=count, questions_per_day=0)
        with tempfile.TemporaryDirectory(prefix="attune-") as folder:
            adapter = Path(folder) / "adapter.ptd"
            adapter.write_bytes(b"")
            with Personalizer(
                Path(folder) / "state", policy, read_lexicons(), _Vectors(hidden), _NoTuner(),
                lambda: Moment(0.0, 0), _NoBundle(hidden, adapter),
            ) as app:  # fmt: skip
                seconds, kept = [], 0
                for number in range(count + COUNTED):
                    dialogue = as_dialogue(str(number), texts[number % len(texts)])
                    if number == count:
                        progress(f"observe with {count:,} bins full")
                    begin = time.perf_counter()
                    decision = app.observe(dialogue)
                    if number >= count:
                        seconds.append(time.perf_counter() - begin)
                        kept += decision.bin is not None
        rows.append(
            SelectionRow(count, 1e3 * statistics.median(seconds), 1e3 * max(seconds), kept, COUNTED)
        )
    return rows
