"""The engines that a benchmark compares, each behind the same two calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from runtime_py.engine.lm import ExecutorchLm


class GenerationEngine(Protocol):
    """One model in one runtime, with a KV cache. Both calls end when the logits of the last token
    can be read."""

    @property
    def name(self) -> str: ...

    def prefill(self, tokens: Sequence[int]) -> None:
        """Forgets everything, then reads a prompt."""

    def step(self, token: int) -> None:
        """Reads one more token."""


class BundleEngine:
    """A ``lm.pte`` through attune's reference runtime. ExecuTorch has one thread pool for all
    programs of a process, which must have its size before a program is loaded."""

    def __init__(
        self, name: str, program: Path, adapter: Path | None, threads: int | None = None
    ) -> None:
        self.name = name
        self._lm = ExecutorchLm(program, adapter, threads)
        self._position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        self._lm.prefill(torch.tensor([list(tokens)]))
        self._position = len(tokens)

    def step(self, token: int) -> None:
        self._lm.forward(torch.tensor([[token]]), self._position)
        self._position += 1


class TorchEngine:
    """Hugging Face's module in eager PyTorch, float32, with its dynamic KV cache."""

    name = "PyTorch eager fp32"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache()

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int]) -> None:
        self._model(
            torch.tensor([list(tokens)]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def prefill(self, tokens: Sequence[int]) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._read(tokens)

    def step(self, token: int) -> None:
        self._read([token])
