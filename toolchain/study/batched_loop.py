"""The loop's engine and fine-tuner in PyTorch: what a bundle's programs compute, in batches.

Every decision is ``runtime_py``'s own. What is embedded together decides the last bits of a vector,
so that embeddings are kept from one life to the next by whole lists alone: a life's decisions do
not depend on which lives the same worker led before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime_py.bundle.adapter_forms import read_values, write_values
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.bundle.manifest import Optimizer
from runtime_py.engine.examples import Example, example
from runtime_py.engine.phone_engine import sample
from runtime_py.engine.streaming import StepNumbers
from runtime_py.engine.tuning import lessons, tune
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.protocols import Embedding, FineTuneJob, FineTuneResult
from runtime_py.loop.random_stream import SplitMix64
from toolchain.study.batched_model import BatchedModel

ADAPTER = "adapter.ptd"  # in a job's folder
LISTS_KEPT = 12  # of a stream and its tests' prompts, by each estimator: some 2,000 vectors each
ALONE_KEPT = 4096  # embeddings of dialogues that stand in no list
CLIPPED = 1e-6  # beside the norm, as torch.nn.utils.clip_grad_norm_ has it


class BatchedEngine:
    """The loop's ``Engine``. ``estimator``: of the entropy."""

    def __init__(self, model: BatchedModel, estimator: str = "norm") -> None:
        self.model, self.estimator = model, estimator
        self._lists: dict[tuple[str, tuple[Dialogue, ...]], dict[Dialogue, Embedding]] = {}
        self._prepared: dict[Dialogue, Embedding] = {}
        self._alone: dict[Dialogue, Embedding] = {}
        self.file: Path | None = None

    def with_estimator(self, name: str) -> BatchedEngine:
        """The same model's for another life, which shares the lists that are kept."""
        other = BatchedEngine(self.model, name)
        other._lists = self._lists
        return other

    def prepare(self, dialogues: Sequence[Dialogue]) -> None:
        """Embeds in batches what will be asked for one by one."""
        key = self.estimator, tuple(dict.fromkeys(dialogues))
        if key not in self._lists:
            found = dict(zip(key[1], self.model.embed(key[1], self.estimator), strict=True))
            if len(self._lists) == LISTS_KEPT:
                del self._lists[next(iter(self._lists))]
            self._lists[key] = found
        self._prepared |= self._lists[key]

    def embed(self, dialogue: Dialogue) -> Embedding:
        if (found := self._prepared.get(dialogue) or self._alone.get(dialogue)) is not None:
            return found
        if len(self._alone) == ALONE_KEPT:
            self._alone.clear()
        (self._alone[dialogue],) = self.model.embed([dialogue], self.estimator)
        return self._alone[dialogue]

    def use_adapter(self, file: Path) -> None:
        """Takes effect at once, for ``generate``; ``embed`` runs without any."""
        self.file = file
        self.model.set_values(read_values(file, self.model.shape.tensors))

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        """A reply to ``messages`` that goes on after ``prefix``; ``seed``: of the draws, where the
        temperature is above 0."""
        ids = self.model.prompt(messages, prefix)
        chance = SplitMix64(seed)

        def choose(logits: Tensor) -> Tensor:
            token = sample(logits[0].cpu().numpy(), temperature, chance)
            return torch.tensor([token], device=logits.device)

        return self.model.write(ids, max_new_tokens, choose)


class BatchedTraining:
    """``runtime_py``'s ``TrainingEngine`` on a model. A call takes a whole batch."""

    def __init__(self, model: BatchedModel, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    @property
    def capacity(self) -> int:
        return self._model.tokens_a_call

    def loss(self, state: AdapterState, examples: Sequence[Example]) -> tuple[float, int]:
        self._model.set_adapter(state)
        total = float(self._model.losses(examples).sum())
        return total, sum(example.count for example in examples)

    def gradient(
        self, state: AdapterState, examples: Sequence[Example], into: np.ndarray
    ) -> tuple[float, int]:
        self._model.set_adapter(state)
        total, gradient = self._model.loss_and_gradient(examples)
        into += gradient
        return total, sum(example.count for example in examples)

    def update(self, state: AdapterState, gradient: np.ndarray, numbers: StepNumbers) -> float:
        """The ``adamw`` program's formulas, float32."""
        f = np.float32
        beta1, beta2 = f(self._optimizer.beta1), f(self._optimizer.beta2)
        scaled = gradient * f(numbers.per_token)
        norm = math.sqrt(float(np.square(scaled, dtype=np.float64).sum()))
        if not math.isfinite(norm):
            return norm
        scaled *= f(min(1.0, numbers.clip / (norm + CLIPPED)))
        mean = state.mean * beta1 + scaled * (f(1) - beta1)
        square = state.square * beta2 + scaled * scaled * (f(1) - beta2)
        first, second = (f(correction) for correction in numbers.corrections)
        step = mean * first / (np.sqrt(square * second) + f(self._optimizer.epsilon))
        rate = state.layout.zeros()
        state.layout.fill_rates(rate, *numbers.rates)
        decay = state.parameters * f(numbers.weight_decay)
        state.replace(state.parameters - rate * (decay + step), mean, square)
        return norm


class BatchedFineTuner:
    """The loop's ``FineTuner``, as ``StreamedFineTuner`` is on the programs: what the engine writes
    and embeds with is the same afterwards, whatever was trained."""

    def __init__(self, model: BatchedModel) -> None:
        self._model = model
        self._training = model.bundle.training

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted(self._training.lengths))

    def tokens(self, dialogue: Dialogue) -> int:
        return example(dialogue, self._model.text, last_only=True).inputs

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        """Trains from ``job.parent``, and writes the adapter into ``folder``; None where ``stop``
        ended it. What ran to its end is in ``runs``."""
        longest = min(job.max_sequence_tokens, max(self._training.lengths))
        taught = lessons(job, self._model.text, longest, self._model.bundle)
        tensors = self._model.shape.tensors
        state = AdapterState.of(tensors, read_values(job.parent, tensors))
        with self._model.lent():
            result = tune(
                BatchedTraining(self._model, self._training.optimizer),
                state,
                job,
                taught,
                self._training.optimizer,
                folder,
                folder / ADAPTER,
                stop=stop,
            )
        if result is not None:
            write_values(result.adapter, job.parent, tensors, state.tensors)
        return result
