"""What the loop needs from outside: an engine, something that fine-tunes, and a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.policy import UNBOUNDED


@dataclass(frozen=True, eq=False)
class Embedding:
    """``pooled``: float32 [hidden], the mean of the tokens' vectors; ``entropy``: the set's EOE."""

    pooled: np.ndarray
    entropy: float


class Engine(Protocol):
    def embed(self, dialogue: Dialogue) -> Embedding:
        """Pure: the same dialogue and weights give the same bits. A conversation whose last turn is
        the user's is embedded too."""
        ...

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        """Pure too: the same messages, adapter, temperature, seed and prefix give the same text.

        The reply begins with ``prefix``, which is given, and goes on with what is returned. Raises
        ``PromptTooLong`` where the last message alone leaves no room for a token.
        """
        ...

    def use_adapter(self, file: Path) -> None:
        """Switches the adapter of ``generate``; ``embed`` is the base model's, without one."""
        ...


class AdapterBundle(Protocol):
    """What adapts and is adapted: never changed, so that version 0 is always there."""

    @property
    def hidden(self) -> int:
        """The length of pooled vectors."""
        ...

    @property
    def adapter_file(self) -> Path:
        """Version 0 of the adapter, in the form that engine and fine-tuner take."""
        ...

    def as_peft(self, file: Path, folder: Path) -> None:
        """Writes a version's file as a PEFT folder, whole or not at all."""
        ...


@dataclass(frozen=True)
class FineTuneJob:
    """Everything a run depends on, so that a run can be repeated bit for bit.

    Of each dialogue the last reply alone is learned and scored. No dialogue is in two of
    ``training``, ``stopping`` and ``guard``, and each takes at most ``max_sequence_tokens``.
    """

    number: int
    training: tuple[Dialogue, ...]  # at least one
    stopping: tuple[Dialogue, ...]  # held out: they choose the step whose state is kept; or none
    guard: tuple[Dialogue, ...]  # held out: they judge; at least one
    parent: Path  # the adapter to start from
    seed: int  # in [0, 2^63)
    steps: int  # the budget; without stopping sets exactly so many are taken
    learning_rate: float  # of A
    b_rate_ratio: float  # B's rate is so many times A's (LoRA+, Hayou et al., 2024)
    batch: int  # sequences whose gradients make one step
    check_every: int  # steps between two looks at the stopping sets
    max_sequence_tokens: int
    forgetting_bound: float = UNBOUNDED  # what the adapter may add to the general text's perplexity
    forgetting_tokens: int = 2048  # of that text
    replay_share: float = 0.0  # of the training sequences that are generic dialogues


@dataclass(frozen=True)
class FineTuneResult:
    """``adapter``: a file in the job's folder. Losses are nats a label, over the labels of one
    dialogue, of one step or of all stopping sets."""

    adapter: Path
    guard_before: tuple[float, ...]  # one a guard set, in the job's order, with the parent
    guard_after: tuple[float, ...]  # the same sets with ``adapter``
    losses: tuple[float, ...]  # one a step that was taken
    stopping_curve: tuple[tuple[int, float], ...]  # (step, loss), step 0 first; empty without sets
    kept_step: int  # the step whose state is ``adapter``, but for ``scale``
    seconds: float
    scale: float = 1.0  # every B of ``adapter`` is so many times what was trained
    base_perplexity: float | None = None  # of the general text without an adapter; None: unmeasured
    perplexity: float | None = None  # and with ``adapter``

    @property
    def forgetting(self) -> float | None:
        """What ``adapter`` adds to the general text's perplexity, as a part of the base's."""
        if self.perplexity is None or self.base_perplexity is None:
            return None
        return self.perplexity / self.base_perplexity - 1.0


class FineTuner(Protocol):
    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the training programs, ascending; at least one."""
        ...

    def tokens(self, dialogue: Dialogue) -> int:
        """How many tokens learning the last reply of ``dialogue`` reads. Pure: the same dialogue
        has the same number on every call."""
        ...

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        """Goes on from what an earlier run of the same job left in ``folder``.

        None: ``stop`` said so between two micro-batches. Raises ``MemoryError`` where the device
        has too little memory for the job's sequence length.
        """
        ...
