"""The loop's two engines in PyTorch: the reference for what a phone decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from exporters.model.lora_tensors import set_adapter
from exporters.model.transformer import Transformer
from runtime_py.bundle.adapter_forms import read_values, write_values
from runtime_py.bundle.adapter_state import AdapterState
from runtime_py.engine.examples import example
from runtime_py.engine.streaming import StreamingEngine
from runtime_py.engine.tuning import lessons, tune
from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.errors import LoopError
from runtime_py.loop.protocols import Embedding, FineTuneJob, FineTuneResult
from toolchain.verify.parity.context import Context
from toolchain.verify.parity.models import embedding_of, logits_of


class TorchPhone:
    """``PhoneEngine``'s contract in PyTorch, without a cache."""

    def __init__(self, context: Context, model: Transformer) -> None:
        self._context, self._model = context, model
        self._adapter = context.bundle.android.adapter

    def use_adapter(self, file: Path) -> None:
        self._adapter = file

    def embed(self, dialogue: Dialogue) -> Embedding:
        text, manifest = self._context.text, self._context.bundle.manifest
        ids = text.tokens(dialogue.turns).ids[: manifest.policy.embed_length]
        pooled, entropy = embedding_of(self._model, np.array(ids, np.int64))
        return Embedding(pooled.astype(np.float32), float(entropy[0]))

    def generate(
        self,
        messages: Sequence[Turn],
        *,
        temperature: float,
        seed: int,
        max_new_tokens: int,
        prefix: str = "",
    ) -> str:
        if temperature != 0.0:
            raise LoopError("the loop in PyTorch writes greedy text only: ask for temperature 0.")
        return self.greedy(messages, max_new_tokens, prefix)[0]

    def greedy(
        self, messages: Sequence[Turn], most: int, prefix: str = ""
    ) -> tuple[str, list[int], list[float]]:
        """The reply, its tokens, and by how much of the logits' range each was the likeliest."""
        text, manifest = self._context.text, self._context.bundle.manifest
        set_adapter(self._model, read_values(self._adapter, manifest.adapter.tensors))
        ids = text.tokens(messages, True, prefix).ids
        written: list[int] = []
        margins: list[float] = []
        while len(written) < most and len(ids) + len(written) < manifest.model.context:
            row = logits_of(self._model, np.array(ids + written, np.int64), -1)[0]
            second, first = np.partition(row, -2)[-2:]
            margins.append(float(first - second) / float(np.abs(row).max()))
            token = int(row.argmax())
            if token in manifest.tokenizer.eos_ids:
                break
            written.append(token)
        reply = text.decode(written)
        return str(reply).strip(), written, margins


class TorchTuner:
    """``StreamedFineTuner``'s run with the captured functions in PyTorch."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted(self._context.bundle.training.lengths))

    def tokens(self, dialogue: Dialogue) -> int:
        return example(dialogue, self._context.text, last_only=True).inputs

    def run(
        self, job: FineTuneJob, folder: Path, stop: Callable[[], bool]
    ) -> FineTuneResult | None:
        """Writes the trained adapter to ``folder``, with the guard's losses before and after in
        nats a label. None where ``stop`` said so."""
        context, tensors = self._context, self._context.bundle.manifest.adapter.tensors
        training = context.bundle.training
        longest = min(job.max_sequence_tokens, max(training.lengths))
        taught = lessons(job, context.text, longest, context.bundle)
        state = AdapterState.of(tensors, read_values(job.parent, tensors))
        engine = StreamingEngine(context.programs, context.weights, training)
        result = tune(
            engine, state, job, taught, training.optimizer, folder, folder / "adapter.ptd",
            stop=stop,
        )  # fmt: skip
        if result is not None:
            write_values(result.adapter, job.parent, tensors, state.tensors)
        return result
